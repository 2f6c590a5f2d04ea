"""Profiles and ledger, one step of the large profiles, and the paper's own on tiny official files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from pipelines.papers import Beats, Paper, Threshold, load_paper
from shared.config import Stage, UserError, load_params, validate
from shared.evaluation.scores import read_scores

from .. import data
from ..config import FAMILIES, SOURCES, VARIANTS, CoupledTraining, Experiment, Params, Pooling, TransformerRanker
from ..evaluate import SPARSELY_JUDGED, evaluate
from ..model import Models, accumulate_gradients
from ..sampling import Member, Sampler
from ..train import make_inputs, make_network, train

FOLDER = Path(__file__).parents[1]
SECTIONS: dict[str, Any] = yaml.safe_load((FOLDER / "params.yaml").read_text(encoding="utf-8"))
PROFILES = [name for name in SECTIONS if name != "profile"]


def params_of(profile: str) -> Params:
    return load_params(FOLDER / "params.yaml", Params, profile)[1]


@pytest.fixture(scope="module")
def ledger() -> Paper:
    return load_paper(FOLDER)


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_loads_and_compares_over_seeds(profile: str) -> None:
    assert len(params_of(profile).seeds) >= (3 if profile in ("tiny", "gpu") else 5)


def test_every_variant_is_run_in_the_real_profile() -> None:
    used = {variant for experiment in params_of("real").experiments.values() for variant in experiment.models}
    assert used == set(VARIANTS)
    assert set(params_of("real").experiments["weak_pool"].models["plain"]) == set(SOURCES)


def test_the_protocol_is_the_one_described() -> None:
    pooling, training = params_of("real").pooling, params_of("real").training
    assert (pooling.depth, pooling.negatives, pooling.reranked, pooling.folds) == (20, 50, 100, 5)
    assert pooling.label == "highest_ranked"
    assert (training.negatives_per_query, training.epochs, training.gradient_clip) == (8, 15, 1.0)
    assert VARIANTS["cet"].tau == 10


@pytest.mark.parametrize("profile", ["small", "real", "gpu", "paper"])
def test_checks_name_what_the_profile_measures(profile: str, ledger: Paper) -> None:
    params = params_of(profile)
    known: dict[str, set[str]] = {"strong_against_weak": {*params.experiments, "no_false_negatives"}}
    for name, experiment in params.experiments.items():
        models = set(experiment.trained())
        for dataset in params.corpus.tests if profile == "paper" else (name,):
            known[dataset] = models | {f"selection_{model}" for model in models} | set(SOURCES)
    judged = [claim for claim in ledger.claims if not claim.profiles or profile in claim.profiles]
    assert len(judged) >= (2 if profile == "paper" else 8)
    for claim in judged:
        for check in claim.all_checks():
            pairs = check.all_pairs() if isinstance(check, Beats) else [check.model]
            for dataset in check.datasets:
                named = {model for pair in pairs for model in pair}
                assert named <= known[dataset], f"{claim.id} names {named - known[dataset]} in {dataset}"
            if not isinstance(check, Threshold) and check.metric == "sparse_mrr@10":
                assert {model for pair in pairs for model in pair} <= set(SPARSELY_JUDGED)


def test_every_claim_of_the_paper_has_a_row(ledger: Paper) -> None:
    assert {claim.id for claim in ledger.claims} >= {f"C{number}" for number in range(1, 7)}


def test_stages_are_the_families() -> None:
    stages = yaml.safe_load((FOLDER / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    assert stages["train"]["foreach"] == list(FAMILIES)
    assert {f"runs/{family}" for family in FAMILIES} <= set(stages["evaluate"]["deps"])


# --- large profiles, shrunken ---


def test_the_gpu_profile_takes_steps(tmp_path: Path) -> None:
    """The Transformer of its size, on few documents and pairs, in both models."""
    params = params_of("gpu")
    corpus = params.corpus.model_copy(update={"documents": 150, "queries": 30, "topics": 8, "concentration": 0.8})
    pooling = params.pooling.model_copy(update={"negatives": 5, "reranked": 5, "lsa_dimensions": 5})
    training = params.training.model_copy(update={"batch_size": 4, "precision": "32-true"})
    params = params.model_copy(update={"corpus": corpus, "pooling": pooling, "training": training})
    data.prepare(Stage(tmp_path, "prepare", "gpu", params))
    prepared = data.load(tmp_path / "data")
    members = [Member(0, 0)]
    relevance, selection = (make_network(params, prepared, role, members) for role in ("relevance", "selection"))
    assert 10e6 < sum(parameter.numel() for parameter in relevance.parameters()) < 20e6
    inputs = make_inputs(params, prepared, torch.device("cpu"))
    sampler = Sampler(prepared, "weak_pool", "strong", VARIANTS["cet"], training, members)
    pairs = sampler.epoch(0).step(0, single=True)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-4) for model in (relevance, selection)]
    losses = []
    for _ in range(2):
        found = accumulate_gradients(
            Models(relevance, selection, relevance), pairs, inputs, VARIANTS["cet"], training.gradient_clip
        )
        losses.append(sum(found.values()).item())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert np.isfinite(losses).all()
    assert losses[1] < losses[0]


PASSAGES = ["heat flow wing", "wing body", "shock wave flow", "boundary layer", "heat layer body", "wave", "flow body"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted({word for text in PASSAGES for word in text.split()})]


def write(path: Path, *lines: str) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


@pytest.fixture
def msmarco(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The official layout: seven passages, five training queries, three for testing, and a tiny BERT on disk."""
    from transformers import BertConfig, BertModel, BertTokenizer

    monkeypatch.setenv("REPRISE_DATA", str(tmp_path / "official"))
    folder = tmp_path / "official" / "msmarco"
    folder.mkdir(parents=True)
    write(folder / "collection.tsv", *(f"{100 + i}\t{text}" for i, text in enumerate(PASSAGES)))
    write(folder / "queries.train.tsv", "1\theat", "2\tflow", "3\twing", "4\tbody", "5\tnot used")
    triples = ["1\t100\t103", "1\t100\t105", "2\t102\t101", "3\t101\t104", "4\t106\t105", "4\t106\t103"]
    write(folder / "qidpidtriples.train.small.tsv", *triples)
    write(folder / "qidpidtriples.train.small.ance.tsv", *(f"{line}\t0.5\t0.25" for line in reversed(triples)))
    for name in ("queries.dev.small.tsv", "msmarco-test2019-queries.tsv"):
        write(folder / name, "11\theat flow", "12\twave", "13\tnever judged")
    write(folder / "qrels.dev.small.tsv", "11\t0\t100\t1", "12\t0\t105\t1")
    write(folder / "2019qrels-pass.txt", "11 Q0 100 3", "11 Q0 104 1", "12 Q0 102 0", "12 Q0 105 2", "12 Q0 106 1")
    for name in ("ance.dev.small.top100.tsv", "ance.dl19.top100.tsv"):
        write(folder / name, "11\t104\t1", "11\t100\t2", "11\t101\t3", "12\t102\t1", "12\t105\t2", "13\t101\t1")
    bert = tmp_path / "bert"
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=len(WORDS),
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=64,
        )
    ).save_pretrained(bert)
    write(bert / "vocab.txt", *WORDS)
    BertTokenizer(str(bert / "vocab.txt")).save_pretrained(bert)
    return folder


def paper_params(folder: Path) -> Params:
    section = SECTIONS["paper"] | {"seeds": [42, 43, 44]}
    section["ranker"] = section["ranker"] | {
        "pretrained": str(folder.parents[1] / "bert"),
        "document_tokens": 6,
        "query_tokens": 4,
    }
    training = {"batch_size": 4, "negatives_per_query": 2, "warmup_steps": 2, "precision": "32-true"}
    section["training"] = section["training"] | training
    return validate(Params, section, "here")


def test_official_files_become_candidates(msmarco: Path, tmp_path: Path) -> None:
    data.prepare(Stage(tmp_path, "prepare", "paper", paper_params(msmarco)))
    prepared = data.load(tmp_path / "data")
    assert prepared.groups == ("dev", "dl19", "train")
    assert prepared.group.tolist() == [0, 0, 1, 1, 2, 2, 2, 2]
    assert prepared.fold.tolist() == [0] * 4 + [1] * 4

    def passages(numbers: np.ndarray) -> list[str]:
        tokens = prepared.document_tokens[numbers[numbers >= 0]]
        return [" ".join(WORDS[token] for token in row if token) for row in tokens]

    def named(slots: np.ndarray, row: int) -> list[str]:
        return passages(prepared.documents[row, slots[row][slots[row] >= 0]])

    # The first training query: one positive, two negatives of BM25, and the same of the dense retriever turned round.
    assert named(prepared.labels["given"], 4) == [PASSAGES[0]]
    assert named(prepared.sources["bm25"], 4) == [PASSAGES[3], PASSAGES[5]]
    assert named(prepared.sources["strong"], 4) == [PASSAGES[5], PASSAGES[3]]
    assert named(prepared.reranked, 0) == [PASSAGES[4], PASSAGES[0], PASSAGES[1]]
    assert not named(prepared.labels["given"], 0)
    assert [WORDS[token] for token in prepared.query_tokens[0] if token] == ["heat", "flow"]
    # Graded judgments of the second test set, the passage that no list has included.
    assert sorted(prepared.grades[3].data.tolist()) == [1, 2]


def test_the_paper_profile_runs_on_a_tiny_bert(msmarco: Path, tmp_path: Path) -> None:
    folder = tmp_path / "paper"
    folder.mkdir()
    for path in (*FOLDER.glob("*.py"), *FOLDER.glob("*.yaml")):
        (folder / path.name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    stage = Stage(folder, "evaluate", "paper", paper_params(msmarco), None)
    data.prepare(stage)
    for family in FAMILIES:
        train(Stage(folder, "train", "paper", stage.params, family))
    evaluate(stage)
    table = read_scores(stage.results_dir / "scores.csv")
    for model in ("plain_bm25", "plain_strong", "cet_bm25", "cet_strong"):
        for dataset in ("dev", "dl19"):
            rows = table[table.model.eq(model) & table.dataset.eq(dataset)]
            assert rows[rows.metric.eq("mrr@10")].groupby("seed").size().to_dict() == {42: 2, 43: 2, 44: 2}
    first = table[table.model.eq("first_stage") & table.dataset.eq("dev") & table.metric.eq("mrr@10")]
    assert first.value.tolist() == [0.5, 0.5]


def test_ids_that_the_collection_lacks(msmarco: Path, tmp_path: Path) -> None:
    write(msmarco / "qidpidtriples.train.small.tsv", "1\t100\t999")
    with pytest.raises(UserError, match=r"small.tsv: passages are named that are not there, 1 times, first 999"):
        data.prepare(Stage(tmp_path, "prepare", "paper", paper_params(msmarco)))
    (msmarco / "collection.tsv").unlink()
    with pytest.raises(UserError, match=r"collection.tsv is missing"):
        data.prepare(Stage(tmp_path, "prepare", "paper", paper_params(msmarco)))


# --- mistakes ---


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"experiments": {"a/b": {"models": {"plain": ["weak"]}}}}, "no name for an experiment"),
        ({"experiments": {"a": {"labels": "given", "models": {"plain": ["weak"]}}}}, "use 'given' with MS MARCO"),
        ({"corpus": {"kind": "collections", "names": ["trec"]}}, "'cranfield', 'cisi', 'cacm' or 'npl'"),
        ({"ranker": {"kind": "kernel", "hidden": 3}}, "unknown key"),
    ],
)
def test_impossible_params(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        validate(Params, SECTIONS["tiny"] | changes, "here")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"models": {"coupled": ["weak"]}}, "unknown variant 'coupled'; choose among plain, cet"),
        ({"models": {"plain": ["weak", "weak"]}}, "each once"),
        ({"models": {"plain": ["ance"]}}, "'random', 'weak', 'bm25', 'strong' or 'dense'"),
    ],
)
def test_impossible_experiments(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        validate(Experiment, changes, "here")


def test_msmarco_needs_its_triples_and_a_transformer() -> None:
    section = SECTIONS["paper"]
    experiments = {"msmarco": {"labels": "given", "models": {"plain": ["dense"]}}}
    with pytest.raises(UserError, match="needs triples with negatives of dense"):
        validate(Params, section | {"experiments": experiments}, "here")
    with pytest.raises(UserError, match="the ranker must be a transformer"):
        validate(Params, section | {"ranker": {"kind": "kernel"}}, "here")
    with pytest.raises(UserError, match="must be a multiple of num_heads"):
        validate(TransformerRanker, {"hidden_size": 10, "num_heads": 3}, "here")
    with pytest.raises(UserError, match="must not be more than folds"):
        validate(Pooling, {"folds": 2, "tested_folds": 3}, "here")


def test_learning_rates() -> None:
    linear = CoupledTraining(epochs=1, learning_rate=1.0, schedule="linear", warmup_steps=4)
    rates = [linear.learning_rate_at(step, 12) for step in (0, 3, 4, 8, 11)]
    assert rates == pytest.approx([0.25, 1.0, 1.0, 0.5, 0.125])
    assert CoupledTraining(epochs=1, learning_rate=1.0).learning_rate_at(11, 12) == 1.0
