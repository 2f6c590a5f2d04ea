"""Scores against numbers made by hand, what evaluate writes, and that the figures draw."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from shared.config import Stage, UserError, load_params
from shared.data.mad import TASKS
from shared.evaluation.scores import read_scores
from shared.training import save_weights

from .. import data
from ..config import Params
from ..data import prepare
from ..evaluate import (
    ablation_effects,
    data_source,
    evaluate,
    length_scores,
    mad_averages,
    questions,
    unigram_loss,
)
from ..model import build_model

FOLDER = Path(__file__).parents[1]


def row(model: str, dataset: str, metric: str, seed: int, value: float) -> dict[str, object]:
    return {"model": model, "dataset": dataset, "metric": metric, "seed": seed, "value": value}


def test_unigram_loss_by_hand() -> None:
    """Token 0 once, 1 three times, 2 never, each counted once more: probabilities 2/7, 4/7 and 1/7."""
    train, test = torch.tensor([[9, 0, 1], [9, 1, 1]]), torch.tensor([[9, 1, 2]])
    train[:, 0] = test[:, 0] = 0
    assert unigram_loss(train, test) == pytest.approx(-(math.log(4 / 7) + math.log(1 / 7)) / 2)


def test_the_increase_beyond_the_training_length() -> None:
    curve = np.array([9.0, 9, 9, 9, 2, 2, 4, 4, 5, 5, 7, 7])
    table = pd.DataFrame(length_scores("gla", 1, curve, length=8))
    increase = table[table.metric.eq("increase_in_bits_per_character")].value.item()
    assert increase == pytest.approx(6.0 - 3.0)
    points = table[table.metric.eq("bits_per_character")].set_index("position").value
    assert points.to_dict() == {2: 9, 4: 9, 6: 2, 8: 4, 10: 5, 12: 7}


def test_effects_of_norm_and_feature_map() -> None:
    values = {"deltanet": 2.0, "deltanet_l2_elu": 2.1, "deltanet_l2_relu": 2.3, "deltanet_l1_elu": 2.6, "gla": 1.0}
    rows = [row(name, "language", "bits_per_character", 5, value) for name, value in values.items()]
    effects = {effect["model"]: effect["value"] for effect in ablation_effects(rows)}
    assert effects == pytest.approx({"norm": 0.5, "feature_map": 0.3})
    assert list(ablation_effects(rows[:3])) == []


def test_averages_need_all_tasks() -> None:
    rows = [row("gla", f"mad/{task}", "accuracy", 0, place / 10) for place, task in enumerate(TASKS)]
    rows += [row("mamba", f"mad/{task}", "accuracy", 0, 1.0) for task in TASKS[1:]]
    rows += [row("gla", "mqar", "accuracy", 0, 1.0), row("gla", "compress/cost", "parameters", 0, 7.0)]
    assert list(mad_averages(rows)) == [row("gla", "mad/average", "accuracy", 0, pytest.approx(0.25))]


def test_overwritten_keys_are_asked_for_apart() -> None:
    params = load_params(FOLDER / "params.yaml", Params, "tiny")[1]
    stage = Stage(FOLDER, "evaluate", "tiny", params)
    settings = params.experiments["overwrite"].data
    inputs, labels = map(torch.from_numpy, data.task_data("overwrite", settings, 0)[0]["test"])
    parts = questions(stage, "overwrite", inputs, labels)
    asked = {name: part != -100 for name, part in parts.items()}
    assert set(asked) == {"overwrite/overwritten", "overwrite/other"}
    assert (asked["overwrite/overwritten"] ^ asked["overwrite/other"]).equal(labels != -100)
    # Of two keys one is bound anew, as the third pair.
    assert asked["overwrite/overwritten"].sum(dim=1).tolist() == [1] * len(inputs)
    for sequence, mask in zip(inputs, asked["overwrite/overwritten"], strict=True):
        assert sequence[mask].item() == sequence[4].item()
    assert list(questions(stage, "compress", inputs, labels)) == ["mad/compress"]
    assert list(questions(stage, "mqar", inputs, labels)) == ["mqar"]


def test_sources_are_named() -> None:
    small, real = (load_params(FOLDER / "params.yaml", Params, profile)[1] for profile in ("small", "real"))
    assert data_source(small, {"language": "Python's documentation", "mqar": "generated"}).startswith("generated")
    assert data_source(real, {"language": "tinyshakespeare", "mqar": "generated"}).startswith("real: tinyshakespeare")


# --- The whole stage --------------------------------------------------------------------------------------------------

MODELS = {
    "language": ("transformer", "deltanet", "deltanet_l1_elu", "deltanet_l2_elu", "deltanet_l2_relu"),
    "mqar": ("deltanet",),
    "overwrite": ("gla", "deltanet"),
} | dict.fromkeys(TASKS, ("deltanet",))


@pytest.fixture
def untrained(tmp_path: Path) -> Stage[Params]:
    """A stage whose data is prepared and whose models are as they were initialized."""
    params = load_params(FOLDER / "params.yaml", Params, "tiny")[1]
    experiments = {
        name: params.experiments[name].model_copy(update={"models": models}) for name, models in MODELS.items()
    }
    params = params.model_copy(update={"seeds": (0, 1), "experiments": experiments, "extrapolated": ("deltanet",)})
    (tmp_path / "params.yaml").write_text((FOLDER / "params.yaml").read_text(encoding="utf-8"))
    stage = Stage(folder=tmp_path, name="evaluate", profile="tiny", params=params)
    prepare(stage)
    for experiment, models in MODELS.items():
        vocab_size = data.about(stage.data_dir, experiment)["vocab_size"]
        for name in models:
            for seed in params.seeds:
                torch.manual_seed(seed)
                reconstruct = experiment == "compress"
                model = build_model(name, experiments[experiment].network, vocab_size, reconstruct=reconstruct)
                save_weights(stage.runs_dir / name / experiment / f"seed{seed}" / "best.safetensors", model)
    return stage


def test_evaluate(untrained: Stage[Params]) -> None:
    evaluate(untrained)
    table = read_scores(untrained.results_dir / "scores.csv")
    bits = table[table.metric.eq("bits_per_character") & table.dataset.eq("language")]
    assert bits.groupby("model").seed.nunique().to_dict() == dict.fromkeys(MODELS["language"], 2) | {"unigram": 1}
    # An untrained model is as good as chance, and the frequencies of the characters better.
    vocab_size = data.about(untrained.data_dir, "language")["vocab_size"]
    by_model = bits.groupby("model").value.mean()
    assert by_model["deltanet"] == pytest.approx(math.log2(vocab_size), rel=0.02)
    assert by_model["unigram"] < 0.8 * by_model["deltanet"]

    curve = table[table.dataset.eq("language/long") & table.metric.eq("bits_per_character")]
    assert set(curve.model) == {"deltanet"}
    assert curve.position.max() == untrained.params.experiments["language"].data.long_length

    accuracies = table[table.metric.eq("accuracy")]
    expected = {"mqar", "overwrite/overwritten", "overwrite/other", "mad/average", *(f"mad/{task}" for task in TASKS)}
    assert set(accuracies.dataset) == expected
    assert accuracies.value.between(0, 1).all()
    assert set(accuracies[accuracies.dataset.eq("overwrite/other")].model) == {"gla", "deltanet", "most_frequent"}

    sizes = table[table.dataset.eq("language/cost")].set_index(["model", "metric"]).value
    network = untrained.params.experiments["language"].network
    assert sizes["deltanet", "parameters"] == build_model("deltanet", network, vocab_size).num_parameters()
    assert sizes["deltanet", "state_size"] < sizes["transformer", "state_size"]

    costs = read_scores(untrained.results_dir / "costs.csv")
    assert set(costs.metric) == {"milliseconds", "speedup", "tokens_per_second"}
    assert (costs.value > 0).all()
    metrics = json.loads((untrained.results_dir / "metrics.json").read_text())
    assert metrics["data_source"] == "generated: recall tasks; text: Python's documentation"
    drawn = {path.name for path in untrained.results_dir.glob("*.png")}
    assert drawn == {"mechanism.png", "language.png", "length.png", "recall.png", "speed.png"}


def test_a_model_that_was_not_trained_is_named(untrained: Stage[Params]) -> None:
    missing = untrained.runs_dir / "deltanet" / "mqar" / "seed1" / "best.safetensors"
    missing.unlink()
    with pytest.raises(UserError, match=f"{missing} is missing: train the model first"):
        evaluate(untrained)
    assert not untrained.results_dir.exists()
