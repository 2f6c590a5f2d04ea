"""The profiles of params.yaml and the ledger; the published model's size, and a step of the large one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from pipelines.papers import Beats, Paper, load_paper
from shared.config import UserError, validate

from ..config import FAMILIES, LanguageModel, Params
from ..model import answer_loss, build_model, count_parameters
from ..tokens import Rows, pack_rows
from .helpers import FOLDER, PROFILES, SECTIONS, params_of, random_tokens, small_model


@pytest.fixture(scope="module")
def ledger() -> Paper:
    return load_paper(FOLDER)


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_loads_and_has_three_seeds(profile: str) -> None:
    assert len(params_of(profile).seeds) >= 3


def test_stages_are_the_families() -> None:
    stages = yaml.safe_load((FOLDER / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    assert stages["train"]["foreach"] == list(FAMILIES)
    assert {f"runs/{family}" for family in FAMILIES} <= set(stages["evaluate"]["deps"])


@pytest.mark.parametrize("profile", ["small", "real", "long", "gpu", "paper"])
def test_checks_name_what_the_profile_measures(profile: str, ledger: Paper) -> None:
    params = params_of(profile)
    ways = {f"{model}_{way}" for model in params.language_models() for way in ("sampled", "scored")}
    supervised, few_shot = {*params.models, *ways}, {*params.few_shot.models, *ways}
    known = {
        "supervised": supervised,
        "few_shot": few_shot,
        "causes": {"heavy", "light"},
        "packing": {"heavy", "light"},
        "transfer": {"arbitrary", "shared"},
    }
    judged = [claim for claim in ledger.claims if not claim.profiles or profile in claim.profiles]
    assert len(judged) >= 14
    for claim in judged:
        for check in claim.all_checks():
            named = (
                {name for pair in check.all_pairs() for name in pair} if isinstance(check, Beats) else {*check.model}
            )
            for dataset in check.datasets:
                assert named <= known[dataset], f"{claim.id} names {named - known[dataset]} in {dataset}"
            for ratio in check.where.get("ratio", ()):
                assert ratio in params.few_shot.ratios


def test_every_claim_of_the_paper_has_a_row(ledger: Paper) -> None:
    assert {claim.id for claim in ledger.claims} >= {"C1", "C1b", "C2", "C3", "C4", "C5", "C6"}


def test_small_needs_no_optional_package() -> None:
    for profile in ("small", "tiny"):
        assert not {"tabnet", "tabnet_defaults", "ft_transformer"} & set(params_of(profile).models)


def test_the_paper_profile_is_the_published_recipe() -> None:
    params = params_of("paper")
    assert params.seeds[0] == params.seed == 42
    assert (params.prompt.wording, params.prompt.classes_first, params.prompt.overlong) == ("published", False, "cut")
    assert (params.training.learning_rate, params.training.epochs, params.training.batch_size) == (5e-5, 3, 4)
    assert params.packing.rows_per_prefix == 1
    assert params.few_shot.training.epochs == 30
    assert params.few_shot.ratios == tuple(round(0.1 * tenth, 1) for tenth in range(1, 10))
    assert (params.augmentation.trees, params.augmentation.folds) == (100, 5)
    assert (params.decoding.top_k, params.decoding.top_p) == (50, 0.95)


def test_gpt2_has_its_published_size() -> None:
    """124,439,808 weights; [PAD] and [MASK] are two embeddings more."""
    with torch.device("meta"):
        model = build_model(LanguageModel(), 50257)
        larger = build_model(LanguageModel(), 50259)
    assert count_parameters(model) == 124_439_808
    assert count_parameters(larger) == 124_439_808 + 2 * 768


def test_added_tokens_start_at_the_mean_embedding(tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path)
    model = build_model(LanguageModel(pretrained=str(tmp_path), context=96), 302)
    embedding = model.get_input_embeddings().weight.detach()
    assert embedding.shape[0] == 302
    assert torch.allclose(embedding[300:], embedding[:300].mean(dim=0).expand(2, -1), atol=1e-7)
    assert model.lm_head.weight.data_ptr() == embedding.data_ptr()
    with pytest.raises(UserError, match=r"language\.context is 512"):
        build_model(LanguageModel(pretrained=str(tmp_path), context=512), 302)
    with pytest.raises(UserError, match=r"language\.pretrained: no model at"):
        build_model(LanguageModel(pretrained=str(tmp_path / "none")), 302)


def test_a_shrunken_gpu_profile_learns_in_a_few_steps() -> None:
    settings = params_of("gpu").language.model_copy(update={"num_layers": 2, "hidden_size": 48, "num_heads": 4})
    model = build_model(settings, 300)
    rng = np.random.default_rng(0)
    rows = Rows(random_tokens(rng, 9, 9), [random_tokens(rng, 5, 9) for _ in range(8)], [[4, 5, 0]] * 8)
    packs = tuple(vars(pack_rows([rows], 256, 8, 1, 0)).values())
    optimizer = torch.optim.AdamW(model.parameters(), lr=params_of("gpu").training.learning_rate)
    losses = []
    for _ in range(6):
        loss = answer_loss(model, packs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]


# --- Mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"models": ["heavy", "gpt"]}, "unknown model 'gpt'; choose among heavy"),
        ({"models": ["light", "light"]}, "listed twice"),
        ({"models": ["light"]}, "few_shot.models names heavy"),
        ({"packing": {"length": 4096}}, "exceeds the context"),
        ({"data": {"source": "embedded"}}, "needs structural"),
        ({"data": {"source": "embedded", "structural": {"supervised": 3}}}, "multiple of 2"),
        ({"data": {"source": "embedded", "structural": {"features": [5, 4]}}}, "features must be the lowest"),
        ({"language": {"hidden_size": 30, "num_heads": 4}}, "must be a multiple of num_heads"),
        ({"prompts": {}}, "unknown key"),
        ({"decoding": {"top_p": 0}}, "greater than 0"),
    ],
)
def test_impossible_params(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        validate(Params, SECTIONS["tiny"] | changes, "here")


@pytest.mark.parametrize("ratios", [[], [0.3, 0.1], [0.1, 0.1], [1.0]])
def test_impossible_ratios(ratios: list[float]) -> None:
    section = SECTIONS["tiny"] | {"few_shot": SECTIONS["tiny"]["few_shot"] | {"ratios": ratios}}
    with pytest.raises(UserError, match="ratios"):
        validate(Params, section, "here")
