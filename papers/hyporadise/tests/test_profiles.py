"""Profiles and ledger: what checks name is measured, published sizes and recipe, one step of the large profile."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from pipelines.papers import Beats, Paper, Ratio, load_paper
from shared.config import load_params
from shared.data.nbest import WordVocabulary
from shared.data.text import BytePairTokenizer

from ..checkpoints import count_parameters
from ..config import Params, Recorded
from ..figures import references
from ..model import PointerGenerator, PromptedLanguageModel

FOLDER = Path(__file__).parents[1]
PROFILES = [name for name in yaml.safe_load((FOLDER / "params.yaml").read_text(encoding="utf-8")) if name != "profile"]
UNTRAINED = {"one_best", "rover", "lm_rank_trigram", "oracle_nbest", "oracle_compositional"}


def params_of(profile: str) -> Params:
    return load_params(FOLDER / "params.yaml", Params, profile)[1]


@pytest.fixture(scope="module")
def ledger() -> Paper:
    return load_paper(FOLDER)


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_compares_over_three_seeds(profile: str) -> None:
    assert len(params_of(profile).seeds) >= 3


@pytest.mark.parametrize("profile", PROFILES)
def test_checks_name_what_the_profile_measures(profile: str, ledger: Paper) -> None:
    params = params_of(profile)
    models = UNTRAINED | set(params.models) | set(params.checkpoints)
    whole = {f"{name}/all_lists" for name, domain in params.domains.items() if isinstance(domain, Recorded)}
    judged = [claim for claim in ledger.claims if not claim.profiles or profile in claim.profiles]
    assert len(judged) >= (4 if profile == "paper" else 9)
    for claim in judged:
        for check in claim.all_checks():
            if isinstance(check, Beats):
                named = {model for pair in check.all_pairs() for model in pair}
            else:
                named = {check.numerator, check.denominator} if isinstance(check, Ratio) else set(check.model)
            assert named <= models, f"{claim.id} names {named - models}"
            assert set(check.datasets) <= set(params.domains) | whole, f"{claim.id}, {profile}"


def test_every_claim_of_the_paper_has_a_row(ledger: Paper) -> None:
    assert {claim.id for claim in ledger.claims} >= {f"C{number}" for number in range(1, 10)}


def test_the_papers_figures_are_in_the_ledger() -> None:
    published = references(FOLDER)
    assert len(published) == 8
    for values in published.values():
        assert set(values) == {"one_best", "lm_rank", "best_lora", "oracle_nbest", "oracle_compositional"}
    assert published["atis"]["best_lora"] == 1.7


def test_the_recipe_is_the_published_one() -> None:
    params = params_of("paper")
    settings, training = params.checkpoints["llama_lora"], params.checkpoints["llama_lora"].training
    assert (settings.low_rank.rank, settings.low_rank.alpha, settings.low_rank.dropout) == (16, 16, 0.05)
    assert (training.learning_rate, training.warmup_steps, training.epochs) == (2e-4, 100, 10)
    assert (training.batch_size, training.micro_batch_size, settings.max_tokens) == (256, 64, 512)
    assert training.loss_on_prompt
    assert settings.eight_bit
    decoding = params.decoding
    assert (decoding.beam_size, decoding.max_new_tokens, decoding.sample) == (4, 256, False)
    assert (decoding.temperature, decoding.top_p, decoding.top_k) == (0.1, 0.75, 40)
    assert all(domain.held_out == 512 for domain in params.domains.values())


@pytest.mark.parametrize(
    ("name", "total", "trained"), [("t5_lora", 737_668_096, 9_437_184), ("llama_lora", 13_015_864_320, 26_214_400)]
)
def test_published_sizes_are_built_without_memory(name: str, total: int, trained: int) -> None:
    settings = params_of("paper").checkpoints[name]
    counted = count_parameters(settings.architecture, settings)
    assert counted == (total, trained)
    assert counted[0] / 1e9 == pytest.approx(settings.published_parameters, rel=0.02)


def test_the_small_network_is_the_one_described() -> None:
    params = params_of("small")
    settings = params.encoder_decoder
    assert (settings.hidden_size, settings.num_heads, settings.num_layers, settings.feed_forward_size) == (
        128,
        4,
        2,
        256,
    )
    assert (settings.vocabulary_size, settings.max_source, settings.dropout) == (3500, 100, 0.1)
    assert params.num_hypotheses == 5
    assert params.reranking.order == 3


def test_one_step_of_the_large_profile() -> None:
    params = params_of("gpu")
    vocabulary = WordVocabulary.build(["the cat sat on the mat"])
    tokenizer = BytePairTokenizer.train(" the cat sat on the mat" * 4, 300)
    nbest, references_ = [["the cat sat", "a cat sat"]] * 2, ["the cat sat"] * 2
    large = params.encoder_decoder.model_copy(update={"num_layers": 1, "feed_forward_size": 64})
    narrow = params.decoder_only.model_copy(update={"num_layers": 1, "feed_forward_size": 64})
    for corrector in (
        PointerGenerator(large, vocabulary, 5),
        PromptedLanguageModel(narrow, tokenizer, max_tokens=64, num_hypotheses=5),
    ):
        loss = corrector.loss(corrector.network, corrector.pairs(nbest, references_), torch.arange(2), 0.1)
        loss.backward()
        assert torch.isfinite(loss)
        assert all(torch.isfinite(p.grad).all() for p in corrector.network.parameters() if p.grad is not None)
