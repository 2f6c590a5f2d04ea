"""Scores every trained model on text and on associative recall, times operators and models, draws the figures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from shared.config import Stage, UserError
from shared.evaluation.language import answer_accuracy, bits, loss_by_position
from shared.evaluation.scores import write_metrics, write_scores
from shared.tracking import open_run
from shared.training import Job, load_weights, run_jobs
from shared.training.parallel import Report

from . import data, figures
from .config import TASKS, Params
from .model import build_model
from .speed import measure_costs
from .train import rate_folder, seed_folder

Row = dict[str, Any]
SHORTEST_BUCKET = 16
TOKENS_AT_ONCE = 2**14


def evaluate(stage: Stage[Params]) -> None:
    """Write scores.csv, costs.csv (which no two runs measure alike), metrics.json and figures."""
    params, device = stage.params, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    text, recall = data.load_text(stage.data_dir), data.load_recall(stage.data_dir)
    jobs = [
        Job(f"{arm}, {task}, seed {seed}", score_one, (stage, task, arm, seed, device))
        for task in TASKS
        for arm in params.experiment(task).models
        for seed in params.seeds
    ]
    workers = 1 if device.type == "cuda" else params.workers
    rows = [row for of_model in run_jobs(jobs, workers=workers, threads=params.threads) for row in of_model]
    rows += control_scores(params, text, recall)
    torch.set_num_threads(params.threads)
    costs = measure_costs(params, text.vocab_size, device)

    frame = pd.DataFrame(rows)
    costs_frame = pd.DataFrame(costs)
    write_scores(stage.results_dir / "scores.csv", frame)
    write_scores(stage.results_dir / "costs.csv", costs_frame)
    write_metrics(stage, frame, SOURCES[text.source])
    paths = figures.draw(stage, frame, costs_frame)
    if stage.run:
        stage.run.log_table(stage.results_dir / "scores.csv")
        for path in paths:
            stage.run.log_artifact(path, "figures")
        track_scores(stage, frame)


SOURCES = {
    "python": "embedded: Python's documentation",
    "tinyshakespeare": "real: tinyshakespeare",
    "gutenberg_books": "real: books of Project Gutenberg",
    "slimpajama": "real: SlimPajama",
}


def track_scores(stage: Stage[Params], frame: pd.DataFrame) -> None:
    """Add each model's and seed's test scores to the run that trained it, as `test/<metric>/<dataset>`."""
    controls = {"bigram", "chance"}
    tested = frame[
        frame.position.isna() & ~frame.model.isin(controls) & ~frame.metric.isin(["parameters", "learning_rate"])
    ]
    for (arm, task, seed), rows in tested.groupby(["model", tested.dataset.str.split("/").str[0], "seed"]):
        record = chosen_run(stage, task, arm, seed)[0] / "run.json"
        if record.is_file():
            with open_run(json.loads(record.read_text(encoding="utf-8"))["run_id"]) as run:
                names = "test/" + rows.metric + "/" + rows.dataset
                run.log(
                    dict(zip(names, rows.value, strict=True)), step=stage.params.experiment(task).training.validations
                )


# --- Scores of models -------------------------------------------------------------------------------------------------


def score_one(stage: Stage[Params], task: str, arm: str, seed: int, device: torch.device, report: Report) -> list[Row]:
    """Rows of scores.csv of one trained model."""
    experiment = stage.params.experiment(task)
    corpus = data.load_text(stage.data_dir) if task == "language" else data.load_recall(stage.data_dir)
    model = build_model(arm, experiment.network, corpus.vocab_size)
    folder, rate = chosen_run(stage, task, arm, seed)
    load_weights(folder / "best.safetensors", model)
    model = model.to(device).eval()
    if isinstance(corpus, data.Text):
        rows = language_scores(model, corpus, stage.params.language.context, stage.params.language.test_length)
    else:
        rows = recall_scores(model, corpus.examples["test"], experiment.validation_batch_size)
    about = {"learning_rate": rate, "parameters": float(model.num_parameters())}
    rows = [*rows, *({"dataset": task, "metric": metric, "value": value} for metric, value in about.items())]
    return [{"model": arm, "seed": seed, "position": np.nan, **row} for row in rows]


def chosen_run(stage: Stage[Params], task: str, arm: str, seed: int) -> tuple[Path, float]:
    """The folder of the training whose learning rate the validation picked, and that rate."""
    path = seed_folder(stage, task, arm, seed) / "chosen.json"
    try:
        rate = float(json.loads(path.read_text(encoding="utf-8"))["learning_rate"])
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing: train the model first (reprise run train --model {arm.partition('_')[0]})"
        ) from None
    return path.parent / rate_folder(rate), rate


def language_scores(model: nn.Module, text: data.Text, context: int, test_length: int) -> Iterator[Row]:
    """Bits per character in windows as long as those of the training, and in longer ones, overall and by position.

    The position of a row is the end of a range that begins at half of it.

    Growth of the loss: that in the last half of the long windows, which all lies beyond the context, over that of the
    very same characters in the last half of windows as long as the context.
    """

    def by_position(windows: Tensor) -> np.ndarray:
        nats = loss_by_position(model, windows.long(), max(1, TOKENS_AT_ONCE // windows.shape[1]))
        return bits(nats) / text.characters_per_token

    windows = text.windows("test", test_length, stride=test_length // 2)
    long = by_position(windows)
    yield {
        "dataset": "language",
        "metric": "bits_per_character",
        "value": by_position(text.windows("test", context)).mean(),
    }
    yield {"dataset": "language/long", "metric": "bits_per_character", "value": long.mean()}
    start, end = 0, min(SHORTEST_BUCKET, test_length)
    while start < test_length:
        value = long[start:end].mean()
        yield {"dataset": "language/long", "metric": "bits_per_character", "position": end, "value": value}
        start, end = end, min(2 * end, test_length)
    # The last halves of all long windows lie end to end; so do those of windows as long as the context from here on.
    first, last = (test_length - context) // 2, (len(windows) + 1) * (test_length // 2)
    near = by_position(text.tokens["test"][first : last + 1].unfold(0, context + 1, context // 2))
    growth = long[test_length // 2 :].mean() / near[context // 2 :].mean()
    yield {"dataset": "language/long", "metric": "loss_growth", "value": growth}


def recall_scores(model: nn.Module, examples: tuple[Tensor, Tensor], batch_size: int) -> Iterator[Row]:
    """Accuracy of the answers to all queries."""
    inputs, labels = (part.long() for part in examples)
    yield {"dataset": "mqar", "metric": "accuracy", "value": answer_accuracy(model, inputs, labels, batch_size)}


# --- Controls ---------------------------------------------------------------------------------------------------------


def control_scores(params: Params, text: data.Text, recall: data.Recall) -> Iterator[Row]:
    """What can be had without a network: a bigram model's bits per character, and guessing among the values."""
    common = {"seed": 0, "position": np.nan}
    loss = bigram_loss(text.tokens["train"].numpy(), text.tokens["test"].numpy(), text.vocab_size)
    value = bits(loss) / text.characters_per_token
    yield common | {"model": "bigram", "dataset": "language", "metric": "bits_per_character", "value": value}
    yield common | {"model": "chance", "dataset": "mqar", "metric": "accuracy", "value": params.mqar.data.chance}


def bigram_loss(train: np.ndarray, test: np.ndarray, vocab_size: int) -> float:
    """Nats a token of p(b | a) = (n(ab) + m p(b)) / (n(a) + m) with p(b) = (n(b) + 1) / (n + vocabulary).

    The counts n are those of the training text, and m is the number of different successors of a (Witten–Bell).
    """
    counts = np.bincount(train, minlength=vocab_size)
    unigram = (counts + 1) / (len(train) + vocab_size)
    pairs, pair_counts = np.unique(train[:-1].astype(np.int64) * vocab_size + train[1:], return_counts=True)
    successors = np.bincount(pairs // vocab_size, minlength=vocab_size)
    starts = np.bincount(train[:-1], minlength=vocab_size)
    asked = test[:-1].astype(np.int64) * vocab_size + test[1:]
    found = np.minimum(np.searchsorted(pairs, asked), len(pairs) - 1)
    seen = np.where(pairs[found] == asked, pair_counts[found], 0)
    # A token that the training text never continues is followed by anything, as by the unigram model.
    weight = np.maximum(successors[test[:-1]], 1)
    probability = (seen + weight * unigram[test[1:]]) / (starts[test[:-1]] + weight)
    return float(-np.log(probability).mean())
