"""Rolls every trained model out over the test sets, from the first frame alone, and writes scores and figures."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from itertools import product
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from shared.config import Stage
from shared.evaluation.metrics import field_metrics
from shared.evaluation.scores import write_metrics, write_scores
from shared.tracking import open_run
from shared.training import load_weights

from . import data, figures
from .baselines import model_like, num_weights
from .config import Params, split_name
from .losses import rollout

REGIMES = ("seen", "interpolated", "extrapolated")
TIMED_BATCH = 50
TIMED_REPEATS = 5


def evaluate(stage: Stage[Params]) -> None:
    """Write scores.csv, costs.csv (which no two runs measure alike), metrics.json and figures."""
    torch.set_num_threads(stage.params.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows, costs, examples, sources = [], [], {}, set()
    for equation, experiment in stage.params.experiments.items():
        test_sets = [data.load(stage.data_dir, equation, "test")]
        if stage.params.equations[equation].unseen_parameters:
            test_sets.append(data.load(stage.data_dir, equation, "unseen"))
        sources |= {test_set.attrs["source"] for test_set in test_sets}
        models = {name: load_models(stage, equation, name, test_sets[0], device) for name in experiment.models}
        # All are scored on the same frames, those that not even the model with the longest history is given.
        first = max(model.frames_in for of_name in models.values() for model in of_name.values())
        for test_set in test_sets:
            truth, parameters = torch.from_numpy(test_set.u), torch.from_numpy(test_set.parameters)
            times = test_set.times[first:]
            for name, of_name in models.items():
                for seed, model in of_name.items():
                    predicted = predict(model, truth, parameters, device)
                    rows += scores(equation, name, seed, predicted[:, first:], truth[:, first:], test_set, times)
                    if seed == stage.params.seeds[0]:
                        examples[equation, test_set.attrs["split"], name] = predicted
            predicted = truth[:, :1].expand_as(truth)
            rows += scores(equation, "persistence", 0, predicted[:, first:], truth[:, first:], test_set, times)
            examples[equation, test_set.attrs["split"], "truth"] = truth
        costs += measure_costs(equation, models, truth, parameters, device)
        rows += count_parameters(equation, models)

    frame = pd.DataFrame(rows)
    write_scores(stage.results_dir / "scores.csv", frame)
    write_scores(stage.results_dir / "costs.csv", pd.DataFrame(costs))
    source = "real: PDEBench" if sources == {"pdebench"} else "generated: reference solvers"
    write_metrics(stage, frame, source)
    paths = figures.draw(stage, frame, examples)
    if stage.run:
        stage.run.log_table(stage.results_dir / "scores.csv")
        for path in paths:
            stage.run.log_artifact(path, "figures")
        track_scores(stage, frame)


def track_scores(stage: Stage[Params], frame: pd.DataFrame) -> None:
    """Add each model's and seed's test errors to the run that trained it, as `test/nrmse/<equation>/<regime>`."""
    overall = frame[frame.metric.eq("nrmse") & frame.time.isna() & frame.parameter.isna()]
    equations = overall.dataset.str.split("/").str[0]
    for (name, equation, seed), rows in overall.groupby(["model", equations, "seed"]):
        record = stage.runs_dir / name / equation / f"seed{seed}" / "run.json"
        if record.is_file():
            with open_run(json.loads(record.read_text(encoding="utf-8"))["run_id"]) as run:
                values = {
                    f"test/nrmse/{dataset}": value for dataset, value in zip(rows.dataset, rows.value, strict=True)
                }
                run.log(values, step=stage.params.experiments[equation].training.epochs)


def load_models(
    stage: Stage[Params], equation: data.EquationName, name: str, example: data.EquationData, device: torch.device
) -> dict[int, nn.Module]:
    """The trained models of a name, by seed."""
    models = {}
    for seed in stage.params.seeds:
        model = model_like(example, split_name(name)[0], stage.params.experiments[equation].network)
        load_weights(stage.runs_dir / name / equation / f"seed{seed}" / "best.safetensors", model)
        models[seed] = model.to(device).eval()
    return models


@torch.no_grad()
def predict(model: nn.Module, truth: Tensor, parameters: Tensor, device: torch.device, batch_size: int = 64) -> Tensor:
    """Free-running rollout `[samples, frames, channels, *grid]` from the frames that the model is given."""
    given, num_steps = model.frames_in, truth.shape[1] - model.frames_in
    parts = []
    for u, of_batch in zip(truth.split(batch_size), parameters.split(batch_size), strict=True):
        start = u[:, :given].to(device)
        parts.append(torch.cat([start, rollout(model, start, of_batch.to(device), num_steps)], dim=1).cpu())
    return torch.cat(parts)


def scores(
    equation: str,
    name: str,
    seed: int,
    predicted: Tensor,
    truth: Tensor,
    test_set: data.EquationData,
    times: Any,
) -> Iterator[dict[str, Any]]:
    """Rows of scores.csv: every metric by regime; nRMSE also over time, and by the value of the first parameter."""
    errors = field_metrics(predicted.double(), truth.double())
    by_sample = {metric: error.mean(dim=(1, 2)) for metric, error in errors.items()}
    over_time = errors["nrmse"].mean(dim=2)
    varied = int(test_set.parameters.std(axis=0).argmax())
    for regime in REGIMES:
        chosen = torch.from_numpy(test_set.regime == regime)
        if not chosen.any():
            continue
        common = {
            "model": name,
            "dataset": f"{equation}/{regime}",
            "seed": seed,
            "time": math.nan,
            "parameter": math.nan,
        }
        for metric, error in by_sample.items():
            yield common | {"metric": metric, "value": error[chosen].mean().item()}
        for moment, error in zip(times.tolist(), over_time[chosen].mean(dim=0).tolist(), strict=True):
            yield common | {"metric": "nrmse", "time": round(moment, 6), "value": error}
        values = torch.from_numpy(test_set.parameters[:, varied])
        for value in values[chosen].unique():
            error = by_sample["nrmse"][chosen & (values == value)].mean().item()
            yield common | {"metric": "nrmse", "parameter": float(f"{value.item():.6g}"), "value": error}


def count_parameters(equation: str, models: dict[str, dict[int, nn.Module]]) -> Iterator[dict[str, Any]]:
    """Rows of scores.csv: the number of weights of each model."""
    for name, of_name in models.items():
        count = num_weights(next(iter(of_name.values())))
        yield {"model": name, "dataset": f"{equation}/cost", "metric": "parameters", "seed": 0, "value": float(count)}


@torch.no_grad()
def measure_costs(
    equation: str, models: dict[str, dict[int, nn.Module]], truth: Tensor, parameters: Tensor, device: torch.device
) -> list[dict[str, Any]]:
    """Rows of costs.csv: inference time of one step for a batch, the models taking turns so that all see the same load.

    The seed of a row is the number of the repetition.
    """
    index = torch.arange(TIMED_BATCH) % len(truth)
    u, parameters = truth[index].to(device), parameters[index].to(device)
    num_steps = truth.shape[1] - 2
    rows = []
    for repeat, (name, of_name) in product(range(-1, TIMED_REPEATS), models.items()):
        model = next(iter(of_name.values()))
        started = time.perf_counter()
        rollout(model, u[:, : model.frames_in], parameters, num_steps)
        if device.type == "cuda":
            torch.cuda.synchronize()
        elapsed = 1000 * (time.perf_counter() - started) / num_steps
        if repeat >= 0:  # the first round warms up
            row = {"model": name, "dataset": f"{equation}/cost", "metric": "milliseconds_per_step", "seed": repeat}
            rows.append(row | {"value": elapsed})
    return rows
