"""Scores by hand, the published evaluation errors against their code's arithmetic, and the pipeline at tiny size."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from shared.config import Stage, load_params
from shared.evaluation.scores import overall, read_scores

from .. import data, figures
from ..config import FAMILIES, Params
from ..evaluate import evaluate, gains, misaligned_rmse, scores
from ..train import train

FOLDER = Path(__file__).parents[1]


def tiny() -> Params:
    return load_params(FOLDER / "params.yaml", Params, "tiny")[1]


def test_misaligned_scores_are_the_broadcast_of_the_published_code() -> None:
    generator = np.random.default_rng(0)
    forecast, targets = generator.random((4, 3, 5)), generator.random((4, 3, 5))
    theirs = [(targets[w].T - forecast[w][None, :, :, None]) ** 2 for w in range(4)]
    assert theirs[0].shape == (1, 3, 5, 3)
    assert misaligned_rmse(forecast, targets) == pytest.approx(np.sqrt(np.mean(theirs)))
    one = misaligned_rmse(forecast[:, :1], targets[:, :1])
    assert one == pytest.approx(np.sqrt(((forecast - targets)[:, 0] ** 2).mean()))


def forecast_that_is_off(units: str, by: float) -> tuple[pd.DataFrame, data.Prepared]:
    """Scores at three steps of a forecast that is exact but for the last step, which is too high everywhere."""
    experiment = tiny().experiments["clean" if units == "clean" else "paper_units"]
    prepared = data.build(data.generate(experiment.data, 0), experiment.data)
    windows = prepared.windows("test", 3)
    forecast = windows.targets.copy()
    forecast[:, -1] += by
    rows = scores(experiment, "name", "stid", 3, 0, forecast, prepared, windows)
    return pd.DataFrame(rows), prepared


def test_clean_units_score_the_last_step() -> None:
    table, _ = forecast_that_is_off("clean", 0.25)
    values = overall(table[table.metric.isin(["rmse", "mae"])]).set_index("metric").value
    assert values["rmse"] == pytest.approx(0.25, abs=1e-6)
    assert values["mae"] == pytest.approx(0.25, abs=1e-6)
    by_step = table[table.step.notna()].set_index("step").value
    assert by_step.to_dict() == pytest.approx({1: 0, 2: 0, 3: 0.25})
    blocks = table[table.metric.eq("squared_error")]
    assert blocks.value.to_numpy() == pytest.approx(0.0625, rel=1e-4)
    assert blocks.item.tolist() == list(range(len(blocks)))
    assert "rmse_ratio" not in set(table.metric)


def test_paper_units_pool_all_steps_and_show_the_evaluation_errors() -> None:
    table, prepared = forecast_that_is_off("paper", 0.3)
    values = overall(table).set_index(["model", "metric"]).value
    assert values["stid", "rmse"] == pytest.approx(0.3 / np.sqrt(3), rel=1e-4)
    assert values["stid", "mae"] == pytest.approx(0.1, rel=1e-4)
    windows = prepared.windows("test", 3)
    high = np.percentile(windows.targets.reshape(len(windows), -1), 95, axis=1)
    assert values["stid", "mape"] == pytest.approx(100 * (0.1 / high).mean(), rel=1e-4)
    # Compared with all steps, even what is exact has an error.
    assert values["stid_scored_broadcast", "rmse"] > values["stid", "rmse"]
    assert values["stid_last_scale", "rmse_ratio"] > values["stid", "rmse_ratio"]


def test_the_ratio_with_the_targets_own_scale_is_exact_for_an_exact_forecast() -> None:
    table, _ = forecast_that_is_off("paper", 0.0)
    values = overall(table).set_index(["model", "metric"]).value
    assert values["stid", "rmse_ratio"] == pytest.approx(0, abs=1e-6)
    assert values["stid_last_scale", "rmse_ratio"] > 0.001


def test_gains_pair_seeds() -> None:
    rows = [
        {"dataset": "correlation_0.5/30min", "metric": "rmse", "model": model, "seed": seed, "value": value}
        for model, seed, value in (("t_gcn", 0, 2.0), ("t_gcn", 1, 4.0), ("regt_gcn", 0, 1.0), ("regt_gcn", 1, 3.0))
    ]
    rows.append(rows[-1] | {"value": 99.0, "step": 1})
    (first, second) = gains(rows, tiny())
    assert (first["value"], second["value"]) == (50.0, 25.0)
    assert first["dataset"] == "correlation/30min"
    assert first["correlation"] == 0.5


def test_table_2_is_that_of_the_ledger() -> None:
    table = figures.table_2(FOLDER)
    assert len(table) == 8 * 4
    assert table["regt_gcn", 30] == 0.094
    assert min(value for (model, minutes), value in table.items() if minutes == 10) == table["stid", 10] == 0.082


# --- the whole pipeline ---


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Stage[Params]:
    folder = tmp_path_factory.mktemp("pipeline")
    for path in (*FOLDER.glob("*.py"), *FOLDER.glob("*.yaml")):
        (folder / path.name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    stage = Stage(folder, "evaluate", "tiny", tiny())
    data.prepare(stage)
    for family in FAMILIES:
        train(replace(stage, name="train", model=family))
    evaluate(stage)
    return stage


def test_the_pipeline_writes_finite_scores_of_all(pipeline: Stage[Params]) -> None:
    table = read_scores(pipeline.results_dir / "scores.csv")
    assert np.isfinite(table.value).all()
    for name, experiment in pipeline.params.experiments.items():
        for horizon in experiment.horizons:
            rows = table[table.dataset.eq(f"{name}/{10 * horizon}min") & table.metric.eq("mae")]
            assert rows[rows.model.isin(experiment.models)].groupby("model").seed.nunique().eq(3).all()
            assert set(experiment.models) | set(experiment.controls) <= set(rows.model)
    assert set(table[table.metric.eq("gain_over_t_gcn")].correlation) == {0.0, 0.5, 0.9}
    metrics = json.loads((pipeline.results_dir / "metrics.json").read_text())
    assert metrics["data_source"].startswith("generated")


def test_the_rmse_is_that_of_the_blocks(pipeline: Stage[Params]) -> None:
    """Blocks are of almost one length, so that the mean of their squared errors is close to the squared RMSE."""
    table = read_scores(pipeline.results_dir / "scores.csv")
    chosen = table[table.dataset.eq("clean/10min") & table.model.eq("stid") & table.seed.eq(1)]
    rmse = overall(chosen[chosen.metric.eq("rmse")]).value.item()
    assert np.sqrt(chosen[chosen.metric.eq("squared_error")].value.mean()) == pytest.approx(rmse, rel=0.1)


def test_evaluating_again_gives_the_same_table_and_figures(pipeline: Stage[Params]) -> None:
    names = [path.name for path in pipeline.results_dir.glob("*.png")] + ["scores.csv"]
    assert {"error_by_horizon.png", "error_by_step.png", "regional_correlation.png", "sites.png", "week.png"} <= set(
        names
    )
    before = {name: (pipeline.results_dir / name).read_bytes() for name in names}
    evaluate(pipeline)
    assert {name: (pipeline.results_dir / name).read_bytes() for name in names} == before
