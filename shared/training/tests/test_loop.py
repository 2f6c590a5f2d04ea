from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from shared.config import UserError
from shared.training import Diverged, Moment, TrainingSettings, fit, load_weights, make_fabric
from shared.training.checkpoint import load_tensors, save_tensors
from shared.training.tests import problem


def weights(directory: Path) -> dict[str, Tensor]:
    return load_tensors(directory / "final.safetensors")[0]


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


PROGRAM = ("-m", "shared.training.tests.problem")


def run_program(*arguments: str, program: tuple[str, ...] = PROGRAM, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, *program, *arguments]
    return subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment, capture_output=True)


class MemoryLog:
    id = "memory"

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.rows.append((step, dict(metrics)))


def test_a_killed_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    whole = problem.train(tmp_path / "whole")
    # Step 13 is in the middle of the third epoch; --checkpoint-every-steps 2 leaves a checkpoint inside that epoch.
    for name, extra in (("by_epoch", ()), ("by_step", ("--checkpoint-every-steps", "2"))):
        killed = run_program(str(tmp_path / name), "--kill-at", "13", *extra)
        assert killed.returncode == -signal.SIGKILL
        assert (tmp_path / name / "last.safetensors").exists()
        assert not (tmp_path / name / "finished.json").exists()
        assert run_program(str(tmp_path / name), *extra).returncode == 0
        record = json.loads((tmp_path / name / "finished.json").read_text())
        assert record["history"] == whole.history
        assert_equal(weights(tmp_path / name), weights(tmp_path / "whole"))


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *PROGRAM)
FABRIC_RUN = ("-m", "lightning_fabric.cli", "--accelerator=cpu", "--devices=2", "--strategy=ddp", problem.__file__)


@pytest.mark.parametrize("program", [TORCHRUN, FABRIC_RUN], ids=["torchrun", "fabric run"])
def test_two_processes_train_as_one(tmp_path: Path, program: tuple[str, ...]) -> None:
    assert run_program(str(tmp_path / "one"), "--no-dropout").returncode == 0
    two = run_program(str(tmp_path / "two"), "--no-dropout", program=program)
    assert two.returncode == 0, two.stderr.decode()
    left, right = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], rtol=1e-4, atol=1e-5)


def test_a_finished_run_is_not_repeated_and_a_changed_one_is(tmp_path: Path) -> None:
    calls = 0

    def counting(model: nn.Module, batch: tuple[Tensor, ...], moment: Moment) -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        return problem.loss(model, batch, moment)

    def run(fingerprint: str) -> dict[str, Tensor]:
        model = problem.make_model()
        options = {"directory": tmp_path, "seed": 0, "fingerprint": fingerprint}
        fit(model, problem.make_data(), counting, problem.SETTINGS, **options)
        return model.state_dict()

    first = run("a")
    assert calls == 4 * 5
    assert_equal(run("a"), first)
    assert calls == 4 * 5
    run("b")
    assert calls == 2 * 4 * 5


def test_not_finite_loss_stops_and_names_step_and_checkpoint(tmp_path: Path) -> None:
    def breaking(model: nn.Module, batch: tuple[Tensor, ...], moment: Moment) -> dict[str, Tensor]:
        losses = problem.loss(model, batch, moment)
        return {"loss": losses["loss"] * float("nan")} if moment.step == 7 else losses

    model = problem.make_model()
    with pytest.raises(Diverged, match=r"step 7 \(epoch 1\).*last\.safetensors"):
        fit(model, problem.make_data(), breaking, problem.SETTINGS, directory=tmp_path, seed=0)
    kept, _ = load_tensors(tmp_path / "last.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in kept.values())


def test_best_weights_are_kept_and_training_stops_early(tmp_path: Path) -> None:
    values = iter([3.0, 1.0, 2.0, 2.0, 0.5])
    snapshots: list[dict[str, Tensor]] = []

    def scripted(model: nn.Module) -> dict[str, float]:
        assert not model.training
        snapshots.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return {"validation/loss": next(values)}

    settings = problem.SETTINGS.model_copy(update={"epochs": 5, "early_stopping_epochs": 2})
    model = problem.make_model()
    result = fit(model, problem.make_data(), problem.loss, settings, directory=tmp_path, seed=0, validate=scripted)
    assert (result.epochs, result.best_epoch, result.best_value) == (4, 1, 1.0)
    assert_equal(model.state_dict(), snapshots[1])


def test_augmentation_is_the_same_in_any_number_of_workers(tmp_path: Path) -> None:
    outcomes = []
    for workers in (0, 2):
        model = problem.make_model()
        settings = problem.SETTINGS.model_copy(update={"epochs": 2})
        options = {"directory": tmp_path / str(workers), "seed": 5, "num_workers": workers}
        fit(model, problem.Augmented(), problem.loss, settings, **options)
        outcomes.append(model.state_dict())
    assert_equal(*outcomes)


def test_parameters_without_gradient_stay_as_they_are(tmp_path: Path) -> None:
    """Weight decay and momentum must not move a part that a warm-up leaves out of the loss."""
    model = nn.ModuleDict({"used": nn.Linear(3, 1), "idle": nn.Linear(3, 1)})
    before = {name: tensor.clone() for name, tensor in model["idle"].state_dict().items()}
    settings = problem.SETTINGS.model_copy(update={"weight_decay": 0.1})
    fit(
        model,
        problem.make_data(),
        lambda m, batch, _: {"loss": (m["used"](batch[0]) - batch[1]).square().mean()},
        settings,
        directory=tmp_path,
        seed=0,
    )
    assert_equal(model["idle"].state_dict(), before)


def test_bfloat16_trains(tmp_path: Path) -> None:
    settings = problem.SETTINGS.model_copy(update={"precision": "bf16-mixed", "epochs": 8, "learning_rate": 0.05})
    fabric = make_fabric(settings, accelerator="cpu")
    model = problem.make_model()
    dtypes = set()

    def loss(model: nn.Module, batch: tuple[Tensor, ...], moment: Moment) -> dict[str, Tensor]:
        output = model(batch[0])
        dtypes.add(output.dtype)
        return {"loss": (output.float() - batch[1]).square().mean()}

    result = fit(model, problem.make_data(), loss, settings, directory=tmp_path, seed=0, fabric=fabric)
    assert dtypes == {torch.bfloat16}
    assert result.history[-1]["train/loss"] < 0.5 * result.history[0]["train/loss"]


def test_losses_are_logged_by_epoch_or_by_step(tmp_path: Path) -> None:
    by_epoch, by_step = MemoryLog(), MemoryLog()
    fit(
        problem.make_model(),
        problem.make_data(),
        problem.loss,
        problem.SETTINGS,
        directory=tmp_path / "a",
        seed=0,
        track=by_epoch,
    )
    settings = problem.SETTINGS.model_copy(update={"log_every_steps": 2})
    options = {"directory": tmp_path / "b", "seed": 0, "track": by_step}
    fit(problem.make_model(), problem.make_data(), problem.loss, settings, **options)
    assert [step for step, _ in by_epoch.rows] == [1, 2, 3, 4]
    assert {"train/loss", "train/learning_rate", "train/gradient_norm"} <= by_epoch.rows[0][1].keys()
    assert [step for step, _ in by_step.rows] == [2, 4, 5, 6, 8, 10, 10, 12, 14, 15, 16, 18, 20, 20]


def test_every_tracked_run_shows_the_whole_curve(tmp_path: Path) -> None:
    """The earlier epochs of a run that was interrupted, or had finished before, are logged again."""

    def interrupted(model: nn.Module, batch: tuple[Tensor, ...], moment: Moment) -> dict[str, Tensor]:
        if moment.epoch == 2:
            raise KeyboardInterrupt
        return problem.loss(model, batch, moment)

    logs = [MemoryLog() for _ in range(3)]
    options = {"directory": tmp_path, "seed": 0}
    with pytest.raises(KeyboardInterrupt):
        fit(problem.make_model(), problem.make_data(), interrupted, problem.SETTINGS, track=logs[0], **options)
    for log in logs[1:]:
        fit(problem.make_model(), problem.make_data(), problem.loss, problem.SETTINGS, track=log, **options)
    assert [step for step, _ in logs[0].rows] == [1, 2]
    assert [step for step, _ in logs[1].rows] == [1, 2, 3, 4]
    assert logs[1].rows == logs[2].rows
    assert json.loads((tmp_path / "run.json").read_text()) == {"run_id": "memory"}


def test_learning_rate_schedules_by_hand() -> None:
    common = {"batch_size": 1, "learning_rate": 1.0}
    step = TrainingSettings(epochs=20, schedule="step", step_epochs=8, hold_epochs=2, **common)
    assert [step.learning_rate_at(epoch) for epoch in (0, 9.99, 10, 18)] == [1.0, 1.0, 0.5, 0.25]
    cosine = TrainingSettings(epochs=10, schedule="cosine", warmup_epochs=2, final_fraction=0.1, **common)
    rates = [cosine.learning_rate_at(epoch) for epoch in (0, 1, 2, 6, 10)]
    assert rates == pytest.approx([0, 0.5, 1.0, 0.55, 0.1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "greater than 0"),
        ({"schedule": "step"}, "needs step_epochs"),
        ({"warmup_epochs": 30.0}, "smaller than epochs"),
        ({"learning_rate": float("nan")}, "finite"),
        ({"epoch": 3}, "Extra inputs"),
    ],
)
def test_impossible_settings_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingSettings(**{"epochs": 20, "batch_size": 4, "learning_rate": 0.1} | change)


def test_empty_data_and_foreign_weights_are_errors(tmp_path: Path) -> None:
    empty = TensorDataset(torch.zeros(0, 3))
    with pytest.raises(UserError, match="training set is empty"):
        fit(problem.make_model(), empty, problem.loss, problem.SETTINGS, directory=tmp_path, seed=0)
    problem.train(tmp_path)
    with pytest.raises(UserError, match="does not fit the model"):
        load_weights(tmp_path / "final.safetensors", nn.Linear(2, 2))
    (tmp_path / "final.safetensors").write_bytes(b"\x10\x00\x00")
    with pytest.raises(UserError, match="is damaged"):
        load_weights(tmp_path / "final.safetensors", nn.Linear(2, 2))
    with pytest.raises(UserError, match="is missing"):
        load_weights(tmp_path / "nothing.safetensors", nn.Linear(2, 2))


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights.safetensors"
    save_tensors(path, {"a": torch.ones(2)})

    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shared.training.checkpoint.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_tensors(path, {"a": torch.zeros(2)})
    assert load_tensors(path)[0]["a"].tolist() == [1.0, 1.0]
    assert list(tmp_path.iterdir()) == [path]


def test_tied_weights_are_saved(tmp_path: Path) -> None:
    tied = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    tied[1].weight = tied[0].weight
    save_tensors(tmp_path / "tied.safetensors", tied.state_dict())
    assert_equal(load_tensors(tmp_path / "tied.safetensors")[0], tied.state_dict())
