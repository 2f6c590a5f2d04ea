"""Scores against models and counts made by hand, what is timed, and what the stages write at tiny size."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from kernels.linear_attention import gla
from shared.config import Stage, UserError, load_params
from shared.evaluation.scores import overall, read_scores
from shared.files import write_json
from shared.tracking import Run

from .. import evaluate as evaluation
from .. import figures, speed
from ..config import TASKS, Params
from ..data import Text, load_text, prepare
from ..evaluate import bigram_loss, evaluate, language_scores, recall_scores, track_scores
from ..train import rate_folder, seed_folder, train

FOLDER = Path(__file__).parents[1]


class Forgetful(nn.Module):
    """Gives the right one of two tokens, all zeros, a probability that halves at a position."""

    def __init__(self, position: int) -> None:
        super().__init__()
        self.position = position
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, tokens: Tensor) -> Tensor:
        right = torch.where(torch.arange(tokens.shape[1]) < self.position, 0.5, 0.25).expand_as(tokens)
        return torch.stack([right, 1 - right], dim=-1).log() + self.weight


def test_language_scores_of_a_model_made_by_hand() -> None:
    """One bit a token up to position 16, two from there on; two characters a token."""
    tokens = dict.fromkeys(("train", "validation", "test"), torch.zeros(130, dtype=torch.uint16))
    text = Text(tokens, vocab_size=2, characters_per_token=2.0, source="", digest="")
    rows = pd.DataFrame(language_scores(Forgetful(16), text, context=16, test_length=64))
    rows = rows.set_index(["dataset", "metric"]).sort_index()
    of_all = rows[rows.position.isna()].value
    assert of_all["language", "bits_per_character"] == pytest.approx(0.5)
    assert of_all["language/long", "bits_per_character"] == pytest.approx((16 * 1 + 48 * 2) / 64 / 2)
    assert of_all["language/long", "loss_growth"] == pytest.approx(2.0)
    curve = rows[rows.position.notna()].set_index("position").value
    assert curve.to_dict() == pytest.approx({16: 0.5, 32: 1.0, 64: 1.0})


@pytest.mark.parametrize("count", [65, 97, 140, 200])
def test_growth_compares_the_same_characters(count: int) -> None:
    """Where the loss depends on the character alone, and characters differ all along the text, nothing grows."""

    class Unigram(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.linspace(0, 5, 200, dtype=torch.float64))

        def forward(self, tokens: Tensor) -> Tensor:
            return self.weight.expand(*tokens.shape, -1)

    tokens = dict.fromkeys(("train", "validation", "test"), torch.arange(count).to(torch.uint16))
    text = Text(tokens, vocab_size=200, characters_per_token=1.0, source="", digest="")
    rows = pd.DataFrame(language_scores(Unigram(), text, context=16, test_length=64))
    assert rows[rows.metric.eq("loss_growth")].value.item() == pytest.approx(1, abs=1e-12)


def test_recall_is_scored_at_the_queries() -> None:
    class Repeat(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            return nn.functional.one_hot(tokens, 4).float()

    inputs = torch.tensor([[1, 2, 3], [3, 2, 1]], dtype=torch.int16)
    labels = torch.tensor([[-100, 2, 1], [-100, 3, 1]], dtype=torch.int16)
    (row,) = recall_scores(Repeat(), (inputs, labels), batch_size=1)
    assert row == {"dataset": "mqar", "metric": "accuracy", "value": 0.5}


def test_bigrams_by_hand() -> None:
    """After 0 came 1 twice and 2 once; 2 was never continued."""
    train_tokens, test_tokens = np.array([0, 1, 0, 1, 0, 2]), np.array([0, 1, 2, 2, 0])
    unigram = np.array([3 + 1, 2 + 1, 1 + 1]) / (6 + 3)
    expected = [
        (2 + 2 * unigram[1]) / (3 + 2),
        (0 + 1 * unigram[2]) / (2 + 1),
        unigram[2],
        unigram[0],
    ]
    assert bigram_loss(train_tokens, test_tokens, 3) == pytest.approx(-np.log(expected).mean())


def test_bigrams_are_probabilities() -> None:
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, 5, 60)
    for first in range(6):
        total = sum(math.exp(-bigram_loss(tokens, np.array([first, second]), 6)) for second in range(6))
        assert total == pytest.approx(1)


# --- Speed ------------------------------------------------------------------------------------------------------------


def test_exponents_of_powers() -> None:
    assert speed.exponent({256: 3.0, 512: 12.0, 1024: 48.0}) == pytest.approx(2)
    assert speed.exponent({256: 3.0, 512: 6.0, 1024: 12.0}) == pytest.approx(1)


def test_what_is_timed_computes_the_same() -> None:
    _, params = load_params(FOLDER / "params.yaml", Params, "tiny")
    cases = speed.operators(64, params.speed, torch.device("cpu"))
    results = {name: function(*inputs) for name, (function, inputs) in cases.items()}
    torch.testing.assert_close(results["gla"][0], results["gla_recurrent"][0], rtol=1e-4, atol=1e-4)
    q, k, v = cases["attention"][1]
    by_chunks = speed.linear_attention_pytorch(q, k, v, chunk_size=16)
    torch.testing.assert_close(by_chunks, gla(q, k, v)[0], rtol=1e-4, atol=1e-4)
    scores = torch.einsum("bthk,bshk->bhts", q, k) * q.shape[-1] ** -0.5
    hidden = torch.ones(64, 64).triu(1).bool()
    expected = torch.einsum("bhts,bshv->bthv", scores.masked_fill(hidden, -math.inf).softmax(-1), v)
    torch.testing.assert_close(results["attention"], expected, rtol=1e-4, atol=1e-4)


def test_the_recurrence_is_not_timed_on_the_longest() -> None:
    _, params = load_params(FOLDER / "params.yaml", Params, "tiny")
    settings = params.speed.model_copy(update={"recurrent_up_to": 32})
    assert "gla_recurrent" in speed.operators(32, settings, torch.device("cpu"))
    assert "gla_recurrent" not in speed.operators(64, settings, torch.device("cpu"))


# --- The stages -------------------------------------------------------------------------------------------------------

MODELS = ("transformer", "gla", "gla_long", "gla_truncated")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Stage[Params]:
    """The stages of four arms and two seeds, run in this process."""
    folder = tmp_path_factory.mktemp("paper")
    for name in ("params.yaml", "paper.yaml"):
        (folder / name).write_text((FOLDER / name).read_text(encoding="utf-8"))
    _, params = load_params(folder / "params.yaml", Params, "tiny")
    changes: dict[str, Any] = {
        "seeds": (0, 1),
        "workers": 1,
        "language": params.language.model_copy(update={"models": MODELS}),
        "mqar": params.mqar.model_copy(update={"models": ("transformer", "gla"), "learning_rates": (1e-6, 1e-2)}),
        "speed": params.speed.model_copy(update={"models": ("gla",), "lengths": (16, 32, 64)}),
    }
    params = params.model_copy(update=changes)
    prepare(Stage(folder, "prepare", "tiny", params))
    for model in ("transformer", "gla"):
        train(Stage(folder, "train", "tiny", params, model))
    stage = Stage(folder, "evaluate", "tiny", params)
    evaluate(stage)
    return stage


def test_scores_of_all_models_and_seeds(finished: Stage[Params]) -> None:
    table = read_scores(finished.results_dir / "scores.csv")
    losses = overall(table[table.metric.eq("bits_per_character")])
    for dataset, controls in (("language", {"bigram"}), ("language/long", set())):
        assert set(losses[losses.dataset.eq(dataset)].model) == {*MODELS, *controls}
    of_models = losses[losses.model.ne("bigram")]
    assert set(of_models.groupby(["model", "dataset"]).seed.nunique()) == {2}
    accuracies = table[table.metric.eq("accuracy")]
    assert set(accuracies.model) == {"transformer", "gla", "chance"}
    counts = table[table.metric.eq("parameters") & table.dataset.eq("language")].groupby("model").value.first()
    assert counts["gla_long"] == counts["gla"] == pytest.approx(counts["transformer"], rel=0.05)
    # Two steps teach little: the loss is that of guessing among all characters.
    guessing = math.log2(load_text(finished.data_dir).vocab_size)
    assert of_models.value.between(0.5 * guessing, 1.1 * guessing).all()


def test_costs_and_figures(finished: Stage[Params]) -> None:
    costs = read_scores(finished.results_dir / "costs.csv")
    assert set(costs.dataset) == {"operator/forward", "operator/forward+backward", "training_step"}
    assert (costs[costs.metric.eq("milliseconds")].value > 0).all()
    exponents = costs[costs.metric.eq("exponent")]
    assert set(exponents.model) == {"attention", "linear_attention", "gla", "gla_recurrent"}
    assert set(exponents.groupby(["model", "dataset"]).seed.nunique()) == {finished.params.speed.repeats}
    for name in ("language", "position", "mqar", "speed"):
        assert (finished.results_dir / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    metrics = json.loads((finished.results_dir / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["data_source"].startswith("embedded")


def test_evaluating_again_gives_the_same_scores(finished: Stage[Params]) -> None:
    before = (finished.results_dir / "scores.csv").read_bytes()
    evaluate(finished)
    assert (finished.results_dir / "scores.csv").read_bytes() == before


def test_arms_of_a_seed_differ_though_their_first_weights_are_the_same(finished: Stage[Params]) -> None:
    table = read_scores(finished.results_dir / "scores.csv")
    losses = overall(table[table.metric.eq("bits_per_character") & table.dataset.eq("language")])
    values = losses.set_index(["model", "seed"]).value
    assert len({values["gla", 0], values["gla_long", 0], values["gla_truncated", 0], values["gla", 1]}) == 4


def test_a_model_that_was_not_trained_is_named(finished: Stage[Params]) -> None:
    params = finished.params.model_copy(update={"seeds": (0, 1, 7)})
    missing = seed_folder(finished, "language", "transformer", 7) / "chosen.json"
    with pytest.raises(UserError, match=f"{missing} is missing: train the model first"):
        evaluate(Stage(finished.folder, "evaluate", "tiny", params))


def test_the_validation_picks_the_learning_rate(finished: Stage[Params]) -> None:
    table = read_scores(finished.results_dir / "scores.csv")
    rates = table[table.metric.eq("learning_rate")].set_index(["dataset", "model", "seed"]).value
    assert set(rates["language"]) == {finished.params.language.training.learning_rate}
    for arm, seed in rates["mqar"].index:
        folder = seed_folder(finished, "mqar", arm, seed)
        losses = {
            rate: json.loads((folder / rate_folder(rate) / "finished.json").read_text(encoding="utf-8"))["best_value"]
            for rate in (1e-6, 1e-2)
        }
        assert losses[1e-6] != losses[1e-2]
        assert rates["mqar", arm, seed] == min(losses, key=losses.__getitem__)


def test_training_needs_a_model_that_there_is(finished: Stage[Params]) -> None:
    for model, words in ((None, "train needs a model"), ("lstm", "unknown model 'lstm'")):
        with pytest.raises(UserError, match=words):
            train(Stage(finished.folder, "train", "tiny", finished.params, model))


def test_every_arm_has_a_label_and_a_color() -> None:
    for profile in ("small", "gpu"):
        _, params = load_params(FOLDER / "params.yaml", Params, profile)
        for task in TASKS:
            assert set(params.experiment(task).models) <= set(figures.LABELS) & set(figures.COLORS)


def test_the_papers_table_is_read_from_the_ledger() -> None:
    paper = figures.table_4(FOLDER)
    assert set(paper) == set(figures.ABLATIONS)
    assert sorted(paper, key=paper.__getitem__) == list(figures.ABLATIONS)


def test_test_scores_go_to_the_runs_that_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, params = load_params(FOLDER / "params.yaml", Params, "tiny")
    stage = Stage(tmp_path, "evaluate", "tiny", params)
    for seed in (0, 1):
        write_json(seed_folder(stage, "language", "gla_long", seed) / "chosen.json", {"learning_rate": 0.002})
    tracked = tmp_path / "runs" / "gla" / "language" / "gla_long" / "seed1" / "rate0.002"
    write_json(tracked / "run.json", {"run_id": "of seed 1"})
    common = {"model": "gla_long", "metric": "bits_per_character", "position": math.nan}
    frame = pd.DataFrame(
        [
            common | {"dataset": "language", "seed": 0, "value": 1.0},  # trained without tracking
            common | {"dataset": "language", "seed": 1, "value": 2.0},
            common | {"dataset": "language/long", "seed": 1, "value": 3.0},
            common | {"dataset": "language/long", "seed": 1, "value": 4.0, "position": 16},
            common | {"model": "bigram", "dataset": "language", "seed": 0, "value": 5.0},
        ]
    )
    logged = {}

    class Opened(Run):
        def log(self, metrics: Mapping[str, float], step: int) -> None:
            logged[self.id] = dict(metrics)

    monkeypatch.setattr(evaluation, "open_run", lambda run_id: Opened(run_id, None))
    track_scores(stage, frame)
    name = "test/bits_per_character/language"
    assert logged == {"of seed 1": {name: 2.0, f"{name}/long": 3.0}}
