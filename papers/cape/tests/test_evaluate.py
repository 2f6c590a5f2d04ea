"""Scores against fields made by hand, and what evaluate writes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from shared.config import Stage, UserError, load_params
from shared.evaluation.scores import overall, read_scores
from shared.files import write_json
from shared.tracking import Run
from shared.training import save_weights

from .. import evaluate as evaluation
from .. import figures
from ..baselines import model_like
from ..config import Params, split_name
from ..data import EquationData, load, prepare
from ..evaluate import evaluate, predict, scores, track_scores

FOLDER = Path(__file__).parents[1]


def constant_fields(values: list[list[float]]) -> torch.Tensor:
    """Fields [samples, frames, 1, 8] that have one value all over."""
    return torch.tensor(values)[:, :, None, None].expand(-1, -1, 1, 8)


@pytest.fixture
def test_set() -> EquationData:
    """Two samples at one parameter seen in training, and one each inside and outside of the range."""
    return EquationData(
        u=np.ones((4, 2, 1, 8), dtype=np.float32),
        parameters=np.array([[0.2], [0.2], [0.5], [9.0]], dtype=np.float32),
        regime=np.array(["seen", "seen", "interpolated", "extrapolated"]),
        grid=np.zeros((1, 8), dtype=np.float32),
        times=np.array([0.1, 0.2], dtype=np.float32),
        attrs={"split": "test"},
    )


def test_scores_of_hand_made_fields(test_set: EquationData) -> None:
    truth = constant_fields([[1, 1], [2, 2], [1, 1], [1, 1]])
    # nRMSE of the frames: 0.1, 0.3 and 0.5, 0.5 (mean 0.35); 0, 0; 1, 3 (mean 2).
    predicted = constant_fields([[1.1, 1.3], [3, 3], [1, 1], [2, 4]])
    table = pd.DataFrame(scores("advection", "fno", 7, predicted, truth, test_set, test_set.times))
    assert set(table.model) == {"fno"}
    assert set(table.seed) == {7}
    nrmse = table[table.metric.eq("nrmse")]

    of_all = nrmse[nrmse.time.isna() & nrmse.parameter.isna()].set_index("dataset").value
    assert of_all.to_dict() == pytest.approx(
        {"advection/seen": 0.35, "advection/interpolated": 0.0, "advection/extrapolated": 2.0}, abs=1e-6
    )
    over_time = nrmse[nrmse.time.notna()].set_index(["dataset", "time"]).value
    assert over_time["advection/seen"].to_dict() == pytest.approx({0.1: 0.3, 0.2: 0.4}, abs=1e-6)
    assert over_time["advection/extrapolated"].to_dict() == pytest.approx({0.1: 1.0, 0.2: 3.0}, abs=1e-6)
    by_parameter = nrmse[nrmse.parameter.notna()].set_index("parameter").value
    assert by_parameter.to_dict() == pytest.approx({0.2: 0.35, 0.5: 0.0, 9.0: 2.0}, abs=1e-6)

    # A constant error is all in the mean, none of it at high wavenumbers, and as large at the boundary.
    seen = table[table.dataset.eq("advection/seen") & table.time.isna() & table.parameter.isna()]
    by_metric = seen.set_index("metric").value
    for metric in ("rmse", "conserved_rmse", "max_error", "boundary_rmse", "fourier_rmse_low"):
        assert by_metric[metric] == pytest.approx(0.6, abs=1e-6)
    assert by_metric["fourier_rmse_high"] == pytest.approx(0, abs=1e-6)


def test_the_parameter_of_a_curve_is_the_one_that_varies_most(test_set: EquationData) -> None:
    parameters = np.array([[0.1, 1.0], [0.1, 1.0], [0.1, 2.0], [0.1, 3.0]], dtype=np.float32)
    changed = EquationData(**(vars(test_set) | {"parameters": parameters}))
    rows = scores("x", "fno", 0, torch.ones(4, 2, 1, 8), torch.ones(4, 2, 1, 8), changed, changed.times)
    assert {row["parameter"] for row in rows if not math.isnan(row["parameter"])} == {1.0, 2.0, 3.0}


def test_regimes_without_samples_have_no_rows(test_set: EquationData) -> None:
    unseen = EquationData(**(vars(test_set) | {"regime": np.array(["extrapolated"] * 4)}))
    rows = scores("x", "fno", 0, torch.ones(4, 2, 1, 8), torch.ones(4, 2, 1, 8), unseen, unseen.times)
    assert {row["dataset"] for row in rows} == {"x/extrapolated"}


class Doubling(torch.nn.Module):
    """Predicts twice the latest of the two frames it is given."""

    frames_in, frames_out = 2, 1

    def forward(self, history: torch.Tensor, parameters: torch.Tensor) -> tuple[torch.Tensor, None]:
        return 2 * history[:, -1:], None


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_predictions_begin_with_the_frames_that_are_given(batch_size: int) -> None:
    truth = constant_fields([[1, 3, 0, 0], [5, 7, 0, 0], [0, 1, 0, 0]])
    predicted = predict(Doubling(), truth, torch.zeros(3, 1), torch.device("cpu"), batch_size)
    expected = constant_fields([[1, 3, 6, 12], [5, 7, 14, 28], [0, 1, 2, 4]])
    torch.testing.assert_close(predicted, expected)


# --- The whole stage --------------------------------------------------------------------------------------------------

MODELS = ("fno", "fno_two_frames", "fno_cape")


@pytest.fixture
def untrained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage[Params]:
    """A stage whose data is prepared and whose models are as they were initialized; it draws nothing."""
    params = load_params(FOLDER / "params.yaml", Params, "tiny")[1]
    advection = params.experiments["advection"].model_copy(update={"models": MODELS})
    params = params.model_copy(
        update={
            "workers": 1,
            "seeds": (0, 1),
            "equations": {"advection": params.equations["advection"]},
            "experiments": {"advection": advection},
        }
    )
    (tmp_path / "params.yaml").write_text((FOLDER / "params.yaml").read_text(encoding="utf-8"))
    stage = Stage(folder=tmp_path, name="evaluate", profile="tiny", params=params)
    prepare(stage)
    example = load(stage.data_dir, "advection", "test")
    for name in MODELS:
        for seed in params.seeds:
            torch.manual_seed(seed)
            model = model_like(example, split_name(name)[0], advection.network)
            save_weights(stage.runs_dir / name / "advection" / f"seed{seed}" / "best.safetensors", model)
    monkeypatch.setattr(figures, "draw", lambda *_: [])
    return stage


def test_evaluate(untrained: Stage[Params]) -> None:
    evaluate(untrained)
    table = read_scores(untrained.results_dir / "scores.csv")
    nrmse = table[table.metric.eq("nrmse")]
    settings = untrained.params.equations["advection"]

    # All are scored on the frames that not even the model with two frames is given.
    times = {round(time, 6) for time in settings.times[2:]}
    for name in (*MODELS, "persistence"):
        assert set(nrmse[nrmse.model.eq(name)].time.dropna()) == times
    assert nrmse.groupby("model").seed.nunique().to_dict() == dict.fromkeys(MODELS, 2) | {"persistence": 1}
    assert set(nrmse.dataset) == {"advection/seen", "advection/interpolated", "advection/extrapolated"}

    # A curve is a view of the same errors: its mean is the overall one.
    keys = ["model", "dataset", "seed"]
    curve = nrmse[nrmse.time.notna()].groupby(keys).value.mean()
    of_all = overall(nrmse).groupby(keys).value.mean()
    pd.testing.assert_series_equal(curve, of_all, check_exact=False, rtol=1e-6)

    # Persistence, from its definition.
    test_set = load(untrained.data_dir, "advection", "test")
    truth = test_set.u[:, 2:, 0].astype(np.float64)
    error = np.sqrt(((test_set.u[:, :1, 0] - truth) ** 2).mean(axis=2)) / np.sqrt((truth**2).mean(axis=2))
    assert of_all["persistence", "advection/seen", 0] == pytest.approx(error.mean(), rel=1e-6)

    counts = table[table.metric.eq("parameters")].set_index("model").value
    assert set(counts.index) == set(MODELS)
    assert counts["fno_cape"] == pytest.approx(counts["fno"], rel=0.15)
    costs = read_scores(untrained.results_dir / "costs.csv")
    assert set(costs.metric) == {"milliseconds_per_step"}
    assert (costs.value > 0).all()
    metrics = json.loads((untrained.results_dir / "metrics.json").read_text())
    assert metrics["data_source"].startswith("generated")


def test_evaluating_twice_gives_the_same_scores(untrained: Stage[Params]) -> None:
    tables = []
    for _ in range(2):
        evaluate(untrained)
        tables.append((untrained.results_dir / "scores.csv").read_bytes())
    assert tables[0] == tables[1]


def test_a_model_that_was_not_trained_is_named(untrained: Stage[Params]) -> None:
    missing = untrained.runs_dir / "fno_cape" / "advection" / "seed1" / "best.safetensors"
    missing.unlink()
    with pytest.raises(UserError, match=f"{missing} is missing: train the model first"):
        evaluate(untrained)
    assert not untrained.results_dir.exists()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("fno", "FNO"),
        ("persistence", "persistence"),
        ("fno_cape", "FNO + CAPE"),
        ("unet_two_frames", "U-Net, two frames"),
        ("fno_pino", "FNO, PINO"),
        ("fno_cape_push_forward", "FNO + CAPE, push-forward"),
        ("mpnn_cape", "message passing + CAPE"),
    ],
)
def test_labels(name: str, text: str) -> None:
    assert figures.label(name) == text


def test_test_errors_go_to_the_runs_that_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, params = load_params(FOLDER / "params.yaml", Params, "tiny")
    stage = Stage(tmp_path, "evaluate", "tiny", params)
    write_json(tmp_path / "runs" / "fno" / "burgers" / "seed1" / "run.json", {"run_id": "of seed 1"})
    common = {"model": "fno", "metric": "nrmse", "time": math.nan, "parameter": math.nan}
    frame = pd.DataFrame(
        [
            common | {"dataset": "burgers/seen", "seed": 0, "value": 0.1},  # trained without tracking
            common | {"dataset": "burgers/seen", "seed": 1, "value": 0.2},
            common | {"dataset": "burgers/interpolated", "seed": 1, "value": 0.3},
            common | {"dataset": "burgers/seen", "seed": 1, "value": 0.4, "time": 0.5},
            common | {"model": "persistence", "dataset": "burgers/seen", "seed": 0, "value": 1.0},
        ]
    )
    logged = {}

    class Opened(Run):
        def log(self, metrics: Mapping[str, float], step: int) -> None:
            logged[self.id, step] = dict(metrics)

    monkeypatch.setattr(evaluation, "open_run", lambda run_id: Opened(run_id, None))
    track_scores(stage, frame)
    epochs = params.experiments["burgers"].training.epochs
    assert logged == {("of seed 1", epochs): {"test/nrmse/burgers/seen": 0.2, "test/nrmse/burgers/interpolated": 0.3}}
