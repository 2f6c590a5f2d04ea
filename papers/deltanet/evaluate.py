"""Tests every trained model, the untrained memory and the speed of it all, and writes scores and figures."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from shared.config import Stage
from shared.data.mad import TASKS
from shared.data.recall import IGNORED, overwritten_queries
from shared.evaluation.language import answer_accuracy, bits, loss_by_position
from shared.evaluation.scores import write_metrics, write_scores
from shared.tracking import open_run
from shared.training import load_weights

from . import data, figures
from .config import Experiment, Params
from .mechanism import recall_errors
from .model import build_model, num_state_elements
from .speed import operator_times, throughput

Row = dict[str, Any]
Models = dict[str, dict[int, nn.Module]]
BATCH_SIZE = 64
# Curves over the position have this many points within the training length.
BUCKETS = 4
# The three feature maps that are compared with the L2 norm (Table 1); that of `deltanet` is SiLU.
FEATURE_MAPS = ("deltanet", "deltanet_l2_elu", "deltanet_l2_relu")


def evaluate(stage: Stage[Params]) -> None:
    """Write scores.csv, costs.csv (which no two runs measure alike), metrics.json and figures."""
    params = stage.params
    torch.set_num_threads(params.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows: list[Row] = list(recall_errors(params.mechanism)) if params.mechanism else []
    sources = {}
    for name, experiment in params.experiments.items():
        known = data.about(stage.data_dir, name)
        sources[name] = known["source"]
        models = load_models(stage, name, known["vocab_size"], device)
        if name == "language":
            rows += language_scores(stage, models, known["characters_per_token"])
        else:
            rows += task_scores(stage, name, models)
        rows += sizes(name, experiment, models, known["vocab_size"])
    rows += ablation_effects(rows)
    rows += mad_averages(rows)
    costs: list[Row] = []
    if params.speed:
        costs += operator_times(params.speed.operator, device)
        costs += throughput(params.speed.throughput, device)

    frame, cost_frame = pd.DataFrame(rows), pd.DataFrame(costs)
    write_scores(stage.results_dir / "scores.csv", frame)
    if costs:
        write_scores(stage.results_dir / "costs.csv", cost_frame)
    write_metrics(stage, frame, data_source(params, sources))
    paths = figures.draw(stage, frame, cost_frame)
    if stage.run:
        stage.run.log_table(stage.results_dir / "scores.csv")
        for path in paths:
            stage.run.log_artifact(path, "figures")
        track_scores(stage, frame)


def load_models(stage: Stage[Params], experiment: str, vocab_size: int, device: torch.device) -> Models:
    """The trained models of an experiment by name and seed."""
    settings = stage.params.experiments[experiment]
    models: Models = {}
    for name in settings.models:
        for seed in stage.params.seeds:
            model = build_model(name, settings.network, vocab_size, reconstruct=experiment == "compress")
            load_weights(stage.runs_dir / name / experiment / f"seed{seed}" / "best.safetensors", model)
            models.setdefault(name, {})[seed] = model.to(device).eval()
    return models


# --- Text -------------------------------------------------------------------------------------------------------------


def language_scores(stage: Stage[Params], models: Models, characters_per_token: float) -> Iterator[Row]:
    """Rows of the language models: bits per character of the test text, and by position in longer windows."""
    settings = stage.params.experiments["language"].data
    train, test, long = (data.load(stage.data_dir, "language", split).long() for split in ("train", "test", "long"))
    nats = unigram_loss(train, test)
    yield _score("unigram", "language", 0, "bits_per_character", bits(nats) / characters_per_token)
    for name, of_name in models.items():
        for seed, model in of_name.items():
            nats = float(np.mean(loss_by_position(model, test, BATCH_SIZE)))
            yield _score(name, "language", seed, "bits_per_character", bits(nats) / characters_per_token)
            yield _score(name, "language", seed, "perplexity_per_token", math.exp(nats))
            if name in stage.params.extrapolated:
                curve = bits(loss_by_position(model, long, max(1, BATCH_SIZE // 8))) / characters_per_token
                yield from length_scores(name, seed, curve, settings.length)


def length_scores(name: str, seed: int, curve: np.ndarray, length: int) -> Iterator[Row]:
    """Rows of one model's bits per character by position, a curve as long as the windows.

    `position` is the last one of a bucket. The increase is the mean beyond the training length, less that in the
    second half of it, where a model has seen about as much of a sequence as it ever did in training.
    """
    width = max(1, length // BUCKETS)
    for start in range(0, len(curve), width):
        bucket = curve[start : start + width]
        row = _score(name, "language/long", seed, "bits_per_character", float(bucket.mean()))
        yield row | {"position": start + len(bucket)}
    increase = float(curve[length:].mean() - curve[length // 2 : length].mean())
    yield _score(name, "language/long", seed, "increase_in_bits_per_character", increase)


def unigram_loss(train: Tensor, test: Tensor) -> float:
    """Nats a token of predicting the tokens of `test` from their frequency in `train`, each counted once more."""
    size = int(max(train.max(), test.max())) + 1
    counts = torch.bincount(train[:, 1:].flatten(), minlength=size).double() + 1
    return float(-(counts / counts.sum()).log()[test[:, 1:].flatten().long()].mean())


def ablation_effects(rows: list[Row]) -> Iterator[Row]:
    """Rows that put the ablation of norm and feature map in two numbers a seed, in bits per character.

    `norm`: what is lost by L1 instead of L2. `feature_map`: from the best to the worst of the three feature maps.
    """
    scores: dict[str, dict[int, float]] = {}
    for row in rows:
        if row["dataset"] == "language" and row["metric"] == "bits_per_character":
            scores.setdefault(row["model"], {})[row["seed"]] = row["value"]
    if {*FEATURE_MAPS, "deltanet_l1_elu"} <= set(scores):
        for seed, value in scores["deltanet"].items():
            of_maps = [scores[name][seed] for name in FEATURE_MAPS]
            effects = {
                "norm": scores["deltanet_l1_elu"][seed] - scores["deltanet_l2_elu"][seed],
                "feature_map": max(of_maps) - min(of_maps),
            }
            for name, value in effects.items():
                yield _score(name, "language/ablation", seed, "effect_in_bits_per_character", value)


# --- Tasks ------------------------------------------------------------------------------------------------------------


def task_scores(stage: Stage[Params], experiment: data.ExperimentName, models: Models) -> Iterator[Row]:
    """Rows of accuracy in a task; the control always answers with the most frequent answer of the training set."""
    train_labels = data.load(stage.data_dir, experiment, "train")[1]
    inputs, labels = (part.long() for part in data.load(stage.data_dir, experiment, "test"))
    answer = torch.bincount(train_labels[train_labels != IGNORED]).argmax()
    for dataset, asked in questions(stage, experiment, inputs, labels).items():
        right = (asked == answer).sum() / (asked != IGNORED).sum()
        yield _score("most_frequent", dataset, 0, "accuracy", right.item())
        for name, of_name in models.items():
            for seed, model in of_name.items():
                yield _score(name, dataset, seed, "accuracy", answer_accuracy(model, inputs, asked, BATCH_SIZE))


def questions(
    stage: Stage[Params], experiment: data.ExperimentName, inputs: Tensor, labels: Tensor
) -> Mapping[str, Tensor]:
    """Labels by the name of the data set they are scored as: the answers on overwritten keys apart from the others."""
    if experiment != "overwrite":
        return {f"mad/{experiment}" if experiment in TASKS else experiment: labels}
    num_pairs = stage.params.experiments["overwrite"].data.num_pairs
    again = torch.from_numpy(overwritten_queries(inputs.numpy(), labels.numpy(), num_pairs=num_pairs))
    return {
        "overwrite/overwritten": labels.where(again, IGNORED),
        "overwrite/other": labels.where(~again, IGNORED),
    }


def mad_averages(rows: list[Row]) -> Iterator[Row]:
    """Rows of the mean over the six tasks of MAD, of models that were trained on all of them."""
    accuracies: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        if row["dataset"].startswith("mad/") and row["metric"] == "accuracy":
            accuracies.setdefault((row["model"], row["seed"]), []).append(row["value"])
    for (name, seed), values in accuracies.items():
        if len(values) == len(TASKS):
            yield _score(name, "mad/average", seed, "accuracy", float(np.mean(values)))


# --- What all experiments share ---------------------------------------------------------------------------------------


@torch.no_grad()
def sizes(name: str, experiment: Experiment, models: Models, vocab_size: int) -> Iterator[Row]:
    """Rows of each model's parameters, and of the numbers it keeps of one sequence at the training length."""
    for model_name, of_name in models.items():
        model = next(iter(of_name.values()))
        device = next(model.parameters()).device
        tokens = torch.arange(experiment.data.length, device=device)[None] % vocab_size
        state = model(tokens, keep_state=True)[1]
        yield _score(model_name, f"{name}/cost", 0, "parameters", float(model.num_parameters()))
        yield _score(model_name, f"{name}/cost", 0, "state_size", float(num_state_elements(state)))


def data_source(params: Params, sources: Mapping[str, str]) -> str:
    """What the scores were measured on, in a few words."""
    parts = ["generated: recall tasks"] if set(sources) - {"language"} else []
    if "language" in sources:
        is_real = params.experiments["language"].data.corpus != data.PYTHON_TEXT
        parts.insert(0 if is_real else len(parts), f"{'real' if is_real else 'text'}: {sources['language']}")
    return "; ".join(parts)


def track_scores(stage: Stage[Params], frame: pd.DataFrame) -> None:
    """Add each model's and seed's test scores to the run that trained it, as `test/<metric>/<dataset>`."""
    whole = frame[frame.metric.isin(["accuracy", "bits_per_character"])]
    for column in {"position", "pairs"} & set(frame.columns):
        whole = whole[whole[column].isna()]
    of_task = whole.dataset.str.removeprefix("mad/").str.split("/").str[0]
    for (name, experiment, seed), rows in whole.groupby(["model", of_task, "seed"]):
        record = stage.runs_dir / name / experiment / f"seed{seed}" / "run.json"
        if record.is_file():
            with open_run(json.loads(record.read_text(encoding="utf-8"))["run_id"]) as run:
                values = zip(rows.metric, rows.dataset, rows.value, strict=True)
                steps = stage.params.experiments[experiment].training.steps
                run.log({f"test/{metric}/{dataset}": value for metric, dataset, value in values}, step=steps)


def _score(model: str, dataset: str, seed: int, metric: str, value: float) -> Row:
    return {"model": model, "dataset": dataset, "metric": metric, "seed": seed, "value": value}
