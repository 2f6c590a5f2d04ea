"""What is trained, on what, and by which recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shared.config import Stage, UserError, load_params
from shared.training import load_weights

from .. import data
from ..config import Params
from ..data import prepare
from ..model import build_model
from ..train import train, train_one

FOLDER = Path(__file__).parents[1]


def stage_of(folder: Path, model: str | None, *experiments: str, **training: Any) -> Stage[Params]:
    params = load_params(FOLDER / "params.yaml", Params, "tiny")[1]
    chosen = {
        name: params.experiments[name].model_copy(
            update={"training": params.experiments[name].training.model_copy(update=training)}
        )
        for name in experiments or params.experiments
    }
    changes = {"experiments": chosen, "seeds": (0,), "workers": 1}
    return Stage(folder, "train", "tiny", params.model_copy(update=changes), model)


def test_train_needs_a_model_that_exists(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="train needs a model, such as: reprise run train --model"):
        train(stage_of(tmp_path, None))
    with pytest.raises(UserError, match="unknown model 'deltanett'; choose one of transformer"):
        train(stage_of(tmp_path, "deltanett"))
    assert not list(tmp_path.iterdir())


def test_a_model_outside_of_the_profile_trains_nothing(tmp_path: Path) -> None:
    """The pipeline lists the models of all profiles; each leaves the output that the pipeline expects."""
    train(stage_of(tmp_path, "retnet", "mqar"))
    summary = tmp_path / "runs" / "retnet" / "summary.json"
    assert json.loads(summary.read_text()) == {"model": "retnet", "best_validation_loss": {}}
    assert list((tmp_path / "runs").rglob("*.safetensors")) == []


def test_a_model_is_trained_wherever_it_is_listed(tmp_path: Path) -> None:
    stage = stage_of(tmp_path, "deltanet_no_conv", "mqar", "compress", "overwrite")
    prepare(stage)
    train(stage)
    summary = json.loads((tmp_path / "runs" / "deltanet_no_conv" / "summary.json").read_text())
    assert list(summary["best_validation_loss"]) == ["deltanet_no_conv, mqar, seed 0"]
    weights = tmp_path / "runs" / "deltanet_no_conv" / "mqar" / "seed0" / "best.safetensors"
    load_weights(weights, build_model("deltanet_no_conv", stage.params.experiments["mqar"].network, 16))


def test_training_learns_what_there_is_to_learn(tmp_path: Path) -> None:
    """The facts of `memorize` are in no sequence: only weights that moved can know them."""
    stage = stage_of(tmp_path, "deltanet", "memorize", steps=60, learning_rate=1e-2)
    prepare(stage)
    untrained = stage_of(tmp_path, "deltanet", "memorize", steps=1, learning_rate=1e-9)
    losses = [
        train_one(of_stage, "memorize", 0, tmp_path / name, lambda fraction, text: None)
        for name, of_stage in (("untrained", untrained), ("trained", stage))
    ]
    assert losses[1] < 0.5 * losses[0]
    assert data.about(stage.data_dir, "memorize")["vocab_size"] == 16
