"""What is trained, when, and against which losses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from shared.config import Stage, UserError, load_params
from shared.training import Moment

from ..baselines import model_like
from ..config import SCHEDULES, Experiment, Params, split_name
from ..data import EquationData
from ..losses import rollout
from ..train import Objective, Validation, train

FOLDER = Path(__file__).parents[1]
EPOCHS, WARMUP, FRAMES, POINTS = 20, 3, 8, 32


def params_with(**changes: Any) -> Params:
    """The profile `tiny` with longer trainings, its experiments changed."""
    params = load_params(FOLDER / "params.yaml", Params, "tiny")[1]
    experiments = {
        equation: experiment.model_copy(
            update={
                "training": experiment.training.model_copy(update={"epochs": EPOCHS}),
                "warmup_epochs": WARMUP,
                "noise": 0.0,
                "gradient_penalty": 0.0,
                **changes,
            }
        )
        for equation, experiment in params.experiments.items()
    }
    return params.model_copy(update={"experiments": experiments})


def stage_of(model: str | None, folder: Path = FOLDER, **changes: Any) -> Stage[Params]:
    return Stage(folder=folder, name="train", profile="tiny", params=params_with(**changes), model=model)


@pytest.fixture
def waves() -> EquationData:
    """Three sine waves that run at the speeds 0.5, 1 and 2, frames 0.1 apart."""
    speeds = np.array([[0.5], [1.0], [2.0]], dtype=np.float32)
    times = 0.1 * np.arange(FRAMES, dtype=np.float32)
    x = np.arange(POINTS, dtype=np.float32) / POINTS
    u = np.sin(2 * np.pi * (x - speeds[:, :, None] * times[:, None]))[:, :, None]
    return EquationData(u.astype(np.float32), speeds, np.array(["seen"] * 3), x[None], times, {"split": "train"})


def losses_at(data: EquationData, name: str, epoch: int, **changes: Any) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    """A new model of a name and what a batch costs it in an epoch."""
    stage = stage_of(name, **changes)
    torch.manual_seed(0)
    model = model_like(data, split_name(name)[0], stage.params.experiments["advection"].network)
    batch = (torch.from_numpy(data.u), torch.from_numpy(data.parameters))
    return model, dict(Objective(stage, "advection", data)(model, batch, Moment(epoch, 0, EPOCHS, 1)))


# --- Names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "network", "schedule"),
    [
        ("fno", "fno", "tanh"),
        ("fno_cape", "fno_cape", "tanh"),
        ("unet_two_frames", "unet_two_frames", "tanh"),
        ("fno_cape_linear", "fno_cape", "linear"),
        ("fno_cape_teacher_forcing", "fno_cape", "teacher_forcing"),
        ("mpnn_autoregressive", "mpnn", "autoregressive"),
        ("fno_push_forward", "fno", "push_forward"),
    ],
)
def test_names_hold_network_and_schedule(name: str, network: str, schedule: str) -> None:
    assert split_name(name) == (network, schedule)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"models": ["fno_cappe"]}, "unknown model 'fno_cappe'; choose one of fno, .*followed by _tanh, _linear"),
        ({"models": ["fno", "fno"]}, "listed twice"),
        ({"models": []}, "at least 1 item"),
        ({"warmup_epochs": EPOCHS}, r"warmup_epochs \(20\) must be smaller than training.epochs \(20\)"),
        ({"noise": -0.1}, "noise"),
    ],
)
def test_impossible_experiments(changes: dict[str, Any], words: str) -> None:
    valid = params_with().experiments["advection"].model_dump()
    with pytest.raises(ValueError, match=words):
        Experiment.model_validate(valid | changes)


def test_experiments_need_data() -> None:
    valid = params_with().model_dump()
    with pytest.raises(ValueError, match="experiments need data: add burgers to equations"):
        Params.model_validate(valid | {"equations": {"advection": valid["equations"]["advection"]}})


# --- The objective ----------------------------------------------------------------------------------------------------


def test_only_cape_is_trained_in_the_warmup(waves: EquationData) -> None:
    model, losses = losses_at(waves, "fno_cape", WARMUP - 1)
    losses["loss"].backward()
    trained = {name.partition(".")[0] for name, weight in model.named_parameters() if weight.grad is not None}
    assert trained == {"cape"}
    model, losses = losses_at(waves, "fno_cape", WARMUP)
    losses["loss"].backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_a_model_without_cape_has_no_warmup(waves: EquationData) -> None:
    assert "prediction" in losses_at(waves, "fno", 0)[1]


def test_the_curriculum_ends_in_a_free_rollout(waves: EquationData) -> None:
    """The last epoch's loss of `prediction` is the error of the rollout that the model is tested by."""
    model, losses = losses_at(waves, "fno", EPOCHS - 1)
    truth, parameters = torch.from_numpy(waves.u), torch.from_numpy(waves.parameters)
    free = rollout(model, truth[:, :1], parameters, FRAMES - 1)
    error = torch.linalg.vector_norm((free - truth[:, 1:]).flatten(2), dim=2)
    expected = (error / torch.linalg.vector_norm(truth[:, 1:].flatten(2), dim=2)).mean(dim=0).sum()
    torch.testing.assert_close(losses["prediction"], expected)


@pytest.mark.parametrize("schedule", [schedule for schedule in SCHEDULES if schedule != "push_forward"])
def test_schedules_differ_where_they_should(waves: EquationData, schedule: str) -> None:
    """Early epochs are like teacher forcing and late ones like a free rollout, or the one or the other throughout."""

    def prediction(schedule: str, epoch: int) -> float:
        return losses_at(waves, f"fno_{schedule}", epoch)[1]["prediction"].item()

    forced, free = prediction("teacher_forcing", 0), prediction("autoregressive", 0)
    assert forced != free
    first = free if schedule == "autoregressive" else forced
    assert prediction(schedule, WARMUP) == pytest.approx(first, rel=1e-6)
    if schedule != "linear":  # which has its last frame at the very end
        last = forced if schedule == "teacher_forcing" else free
        assert prediction(schedule, EPOCHS - 1) == pytest.approx(last, rel=1e-6)


def test_the_gradient_penalty_is_added_where_it_is_asked_for(waves: EquationData) -> None:
    without = losses_at(waves, "fno_cape", EPOCHS - 1)[1]
    losses = losses_at(waves, "fno_cape", EPOCHS - 1, gradient_penalty=0.5)[1]
    assert "gradient_penalty" not in without
    assert losses["gradient_penalty"] > 0
    torch.testing.assert_close(losses["loss"], without["loss"] + losses["gradient_penalty"])
    assert "gradient_penalty" not in losses_at(waves, "fno", EPOCHS - 1, gradient_penalty=0.5)[1]


def test_the_guess_is_weighted(waves: EquationData) -> None:
    losses = losses_at(waves, "fno_cape", EPOCHS - 1, guess_weight=0.25)[1]
    torch.testing.assert_close(losses["loss"], losses["prediction"] + 0.25 * losses["guess"])


def test_which_residual_pino_is_given(waves: EquationData) -> None:
    """The published code's residual exists for Burgers' equation only, as a model of its own."""

    def residual(equation: str, name: str) -> Tensor | None:
        objective = Objective(stage_of(name), equation, waves)
        if objective.residual is None:
            return None
        u, parameters = torch.from_numpy(waves.u), torch.from_numpy(waves.parameters)
        return objective.residual(u[:, :-1], u[:, 1:], parameters)

    assert residual("burgers", "fno") is None
    assert residual("burgers", "fno_cape") is None
    correct, official = (residual("burgers", name) for name in ("fno_pino", "fno_pino_official"))
    assert not torch.allclose(correct, official)
    with pytest.raises(UserError, match="no residual for 'advection_official'"):
        residual("advection", "fno_pino_official")
    # The waves obey the advection equation: what remains is the error of differences over 0.1 and 1/32.
    assert residual("advection", "fno_pino")[0].square().mean() < 0.1 * correct[0].square().mean()


def test_validation_is_the_error_of_the_free_rollout(waves: EquationData) -> None:
    class Still(torch.nn.Module):
        """Predicts that nothing moves."""

        frames_in = frames_out = 1

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, history: Tensor, parameters: Tensor) -> tuple[Tensor, None]:
            return history, None

    # ‖sin(x) − sin(x − φ)‖ / ‖sin(x − φ)‖ = 2 |sin(φ/2)| for a shift by the phase φ.
    phases = 2 * np.pi * waves.parameters * waves.times[1:]
    expected = np.mean(2 * np.abs(np.sin(phases / 2)))
    assert Validation(waves)(Still()) == {"validation/nrmse": pytest.approx(expected, rel=1e-5)}


# --- The stage --------------------------------------------------------------------------------------------------------


def test_train_needs_a_model_that_exists(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="train needs a model, such as: reprise run train --model"):
        train(stage_of(None, tmp_path))
    with pytest.raises(UserError, match="unknown model 'fno_cappe'; choose one of fno"):
        train(stage_of("fno_cappe_linear", tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_model_outside_of_the_profile_trains_nothing(tmp_path: Path) -> None:
    """The pipeline lists the models of all profiles; each leaves the output that the pipeline expects."""
    train(stage_of("mpnn_cape", tmp_path))
    summary = tmp_path / "runs" / "mpnn_cape" / "summary.json"
    assert json.loads(summary.read_text()) == {"model": "mpnn_cape", "best_validation_nrmse": {}}
    assert list((tmp_path / "runs").rglob("*.safetensors")) == []
