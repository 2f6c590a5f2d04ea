"""Scores every network and control on the test windows, the published code's evaluation errors too, and draws figures.

In clean units the metrics are those of the H-th step; in paper units all H steps are pooled, as in the paper's tables.
`mape` is the paper's: percent of the 95th percentile of the window's targets. `squared_error` and `absolute_error` are
means over blocks of 12 hours of test windows, `item`: windows overlap and are no independent test items, blocks of
twice the longest horizon hardly overlap, and claims are judged by resampling seeds and blocks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from shared.config import Stage
from shared.data.spatiotemporal import Windows
from shared.evaluation.forecasting import (
    block_means,
    error_by_step,
    masked_mae,
    masked_rmse,
    percentile_mape,
)
from shared.evaluation.scores import write_metrics, write_scores
from shared.tracking import open_run
from shared.training import Job, load_weights, run_jobs
from shared.training.parallel import Report

from . import data, figures
from .baselines import fit_predict
from .config import BLOCK_STEPS, MISALIGNED, STEP_MINUTES, Experiment, Params
from .train import make_model, predict, run_folder

Array = NDArray[np.float32]
Row = dict[str, Any]
# Of errors by block and by step: enough for an interval, and a table of a third of the size.
BLOCK_DIGITS = 5


def evaluate(stage: Stage[Params]) -> None:
    """Write scores.csv, costs.csv (which no two runs measure alike), metrics.json and figures."""
    jobs = [
        Job(f"{model}, {name}, {horizon * STEP_MINUTES} min", score_model, (stage, name, model, horizon))
        for name, experiment in stage.params.experiments.items()
        for horizon in experiment.horizons
        for model in (*experiment.models, *experiment.controls)
    ]
    workers = 1 if torch.cuda.is_available() else stage.params.workers
    results = run_jobs(jobs, workers=workers, threads=stage.params.threads)
    rows = [row for rows, _ in results for row in rows]
    frame = pd.DataFrame([*rows, *gains(rows, stage.params)])
    write_scores(stage.results_dir / "scores.csv", frame)
    costs = pd.DataFrame(training_costs(stage))
    write_scores(stage.results_dir / "costs.csv", costs)
    prepared = {name: data.load(stage.data_dir, name) for name in stage.params.experiments}
    sources = [each.attrs["source"] for each in prepared.values()]
    write_metrics(stage, frame, sources[0])
    examples = {key: value for _, example in results for key, value in example.items()}
    paths = figures.draw(stage, frame, prepared, examples)
    if stage.run:
        stage.run.log_table(stage.results_dir / "scores.csv")
        for path in paths:
            stage.run.log_artifact(path, "figures")
        track_scores(stage, frame)


def score_model(
    stage: Stage[Params], name: str, model: str, horizon: int, report: Report
) -> tuple[list[Row], dict[tuple[str, str, int], Array]]:
    """Rows of scores.csv of a model at a horizon, all its seeds; and the forecasts of the first seed for the figures.

    Of these only the H-th step is kept, [windows, N].
    """
    experiment = stage.params.experiments[name]
    prepared = data.load(stage.data_dir, name)
    windows = prepared.windows("test", horizon, experiment.test_stride)
    rows: list[Row] = []
    first: Array | None = None
    if model in experiment.models:
        for number, seed in enumerate(stage.params.seeds):
            forecast, count = forecast_of(stage, name, model, horizon, seed, prepared, windows)
            rows += scores(experiment, name, model, horizon, seed, forecast, prepared, windows)
            first = forecast if first is None else first
            report((number + 1) / len(stage.params.seeds), "")
        rows.append(_row(model, f"{name}/{horizon * STEP_MINUTES}min", "parameters", 0, count))
    else:
        first = fit_predict(model, prepared, horizon, train_stride=experiment.train_stride)[:: experiment.test_stride]
        rows += scores(experiment, name, model, horizon, 0, first, prepared, windows)
    # Two horizons are drawn; the forecasts of all of them would not fit between processes.
    example = {(name, model, horizon): first[:, -1]} if horizon == example_horizon(experiment) else {}
    return rows, example


def forecast_of(
    stage: Stage[Params],
    name: str,
    model: str,
    horizon: int,
    seed: int,
    prepared: data.Prepared,
    windows: Windows,
) -> tuple[Array, int]:
    """Forecasts [windows, horizon, N] of a trained network, in the target's units, and its number of weights."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = make_model(stage.params.experiments[name], model, prepared.graph, horizon, seed)
    load_weights(run_folder(stage, name, model, horizon, seed) / "best.safetensors", network)
    scaled = predict(network.to(device).eval(), windows.tensors()[0], device)
    return prepared.unscale_target(scaled.cpu().numpy()), sum(weight.numel() for weight in network.parameters())


def example_horizon(experiment: Experiment) -> int:
    """The horizon that figures show sites at: two hours where there is that."""
    return 12 if 12 in experiment.horizons else max(experiment.horizons)


# --- Scores -----------------------------------------------------------------------------------------------------------


def scores(
    experiment: Experiment,
    name: str,
    model: str,
    horizon: int,
    seed: int,
    forecast: Array,
    prepared: data.Prepared,
    windows: Windows,
) -> Iterator[Row]:
    """Rows of scores.csv of one forecast [windows, horizon, N]."""
    dataset = f"{name}/{horizon * STEP_MINUTES}min"
    in_paper_units = experiment.data.units == "paper"
    steps = slice(None) if in_paper_units else slice(-1, None)
    scored = forecast[:, steps], windows.targets[:, steps], windows.observed[:, steps]
    for metric, function in (("rmse", masked_rmse), ("mae", masked_mae), ("mape", percentile_mape)):
        yield _row(model, dataset, metric, seed, function(*scored))
    errors = np.where(scored[2], scored[0].astype(np.float64) - scored[1], np.nan)
    block = BLOCK_STEPS // experiment.test_stride
    for metric, values in (("squared_error", errors**2), ("absolute_error", np.abs(errors))):
        for item, value in enumerate(block_means(values, block)):
            yield _row(model, dataset, metric, seed, float(f"{value:.{BLOCK_DIGITS}g}")) | {"item": item}
    if horizon == max(experiment.horizons) and horizon > 1:
        for step, value in enumerate(error_by_step(forecast, windows.targets, windows.observed)["rmse"]):
            value = float(f"{value:.{BLOCK_DIGITS}g}")
            yield _row(model, dataset, "rmse", seed, value) | {"step": step + 1}
    if in_paper_units:
        yield from evaluation_errors(model, dataset, seed, forecast, prepared, windows)


def evaluation_errors(
    model: str, dataset: str, seed: int, forecast: Array, prepared: data.Prepared, windows: Windows
) -> Iterator[Row]:
    """What the same forecast scores under the published code's two errors of evaluation.

    `<model>_scored_broadcast`: every forecast step against every target step. `rmse_ratio` is in units of the ratio
    available/capacity: of `<model>` with each target's own snapshot for its scale, which is not known beforehand, and
    of `<model>_last_scale` with the last snapshot that is.
    """
    if model in MISALIGNED:
        yield _row(f"{model}_scored_broadcast", dataset, "rmse", seed, misaligned_rmse(forecast, windows.targets))
    horizon = forecast.shape[1]
    offset, span = prepared.snapshots[windows.first_targets[:, None] + np.arange(horizon)].transpose(2, 0, 1)[..., None]
    last_offset, last_span = prepared.snapshots[windows.first_targets - 1].T[..., None, None]
    truth = windows.targets * span + offset
    yield _row(model, dataset, "rmse_ratio", seed, masked_rmse(forecast * span + offset, truth))
    last = forecast * last_span + last_offset
    yield _row(f"{model}_last_scale", dataset, "rmse_ratio", seed, masked_rmse(last, truth))


def misaligned_rmse(forecast: Array, targets: Array) -> float:
    """Root of the mean of (forecast[w, h, n] - target[w, k, n])² over windows, sites and all pairs of steps h, k."""
    forecast, targets = forecast.astype(np.float64), targets.astype(np.float64)
    products = forecast.mean(axis=1) * targets.mean(axis=1)
    mean = (forecast**2).mean(axis=1) + (targets**2).mean(axis=1) - 2 * products
    return float(np.sqrt(mean.mean()))


def gains(rows: list[Row], params: Params) -> Iterator[Row]:
    """By how many percent regions lower T-GCN's RMSE, over the regional correlation of generated data.

    From the experiments that are called `correlation_<ρ>`; data set `correlation/<minutes>min`.
    """
    swept = {name: each.data.regional_correlation for name, each in params.experiments.items() if is_swept(name)}
    values = {
        (row["dataset"], row["model"], row["seed"]): row["value"]
        for row in rows
        if row["metric"] == "rmse" and "step" not in row
    }
    for (dataset, model, seed), value in values.items():
        name, _, horizon = dataset.partition("/")
        if name in swept and model in ("regt_gcn", "rant_gcn"):
            gain = 100 * (1 - value / values[dataset, "t_gcn", seed])
            yield _row(model, f"correlation/{horizon}", "gain_over_t_gcn", seed, gain) | {"correlation": swept[name]}


def is_swept(experiment: str) -> bool:
    return experiment.startswith("correlation_")


def training_costs(stage: Stage[Params]) -> Iterator[Row]:
    """Rows of costs.csv: seconds of an epoch in training, validation included, as the loop took it."""
    for name, experiment in stage.params.experiments.items():
        for horizon in experiment.horizons:
            for model in experiment.models:
                for seed in stage.params.seeds:
                    path = run_folder(stage, name, model, horizon, seed) / "finished.json"
                    record = json.loads(path.read_text(encoding="utf-8"))
                    seconds = record["seconds"] / record["epochs"]
                    yield _row(model, f"{name}/{horizon * STEP_MINUTES}min", "seconds_per_epoch", seed, seconds)


def track_scores(stage: Stage[Params], frame: pd.DataFrame) -> None:
    """Add each network's test errors to the run that trained it, as `test/rmse`, `test/mae` and `test/mape`."""
    details = [column for column in ("item", "step", "correlation") if column in frame]
    chosen = frame[frame.metric.isin(["rmse", "mae", "mape"]) & frame[details].isna().all(axis=1)]
    by_training = dict(iter(chosen.groupby(["dataset", "model", "seed"])))
    for name, experiment in stage.params.experiments.items():
        for horizon in experiment.horizons:
            for model in experiment.models:
                for seed in stage.params.seeds:
                    record = run_folder(stage, name, model, horizon, seed) / "run.json"
                    if record.is_file():
                        rows = by_training[f"{name}/{horizon * STEP_MINUTES}min", model, seed]
                        values = {f"test/{m}": v for m, v in zip(rows.metric, rows.value, strict=True)}
                        with open_run(_run_id(record)) as run:
                            run.log(values, step=experiment.training.epochs)


def _run_id(record: Path) -> str:
    return json.loads(record.read_text(encoding="utf-8"))["run_id"]


def _row(model: str, dataset: str, metric: str, seed: int, value: float) -> Row:
    return {"model": model, "dataset": dataset, "metric": metric, "seed": seed, "value": float(value)}
