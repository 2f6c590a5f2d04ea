"""Scores every model on every table, on true labels and in the published reading, and draws the figures.

`item` is the table, `ratio` the share of training rows of a few-shot table, `family` where its rule comes from. Answers
are greedy; `<model>_sampled` and `<model>_scored` are the other ways of the same weights. `published_accuracy` is what
the paper's evaluation would report: answers are sampled; those of models trained on augmented targets are held against
`reference`, an XGBoost fitted on all rows of the table; and XGBoost, which raises where a class of the table is absent
from its training part, has 0 there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.metrics import recall_score

from shared.config import Stage
from shared.evaluation.scores import write_metrics, write_scores
from shared.evaluation.tabular import (
    NO_ANSWER,
    classification_scores,
    compare_models,
    critical_difference,
    friedman_test,
    ranks,
    ratio_over_tables,
    reliability_bins,
    scores_by_table,
)
from shared.tracking import open_run

from . import data, figures
from .config import BASELINES, RANKED, VARIANTS, Params
from .data import Prepared, Task
from .speed import measure
from .train import Predictions, read_predictions, run_folder

Row = dict[str, Any]
# Of values by table: enough for an interval, and a table of half the size.
DIGITS = 4
POOLED_BINS = 10
SUPERVISED, FEW_SHOT = "supervised", "few_shot"


def evaluate(stage: Stage[Params]) -> None:
    """Write scores.csv, costs.csv (which no two runs measure alike), metrics.json and figures."""
    params = stage.params
    prepared = data.load(stage.data_dir)
    rows: list[Row] = [*left_out(prepared)]
    costs: list[Row] = []
    for model in params.models:
        for seed in params.seeds_of(model):
            predictions, note = read_predictions(run_folder(stage, model, seed) / "predictions.npz")
            rows += model_rows(prepared, model, seed, predictions)
            rows += note_rows(model, seed, note)
            costs += [_row(model, f"seconds/{name}", "seconds", seed, each) for name, each in note["seconds"].items()]
    frame = pd.DataFrame(rows)
    derived = [*rank_rows(frame, params), *metadata_gain(frame), *cause_rows(frame, prepared), *transfer_rows(frame)]
    frame = pd.concat([frame, pd.DataFrame([*derived, *median_rows(frame)])], ignore_index=True)
    frame = pd.concat([frame, pd.DataFrame([*comparison_rows(frame)])], ignore_index=True)
    write_scores(stage.results_dir / "scores.csv", frame)
    if params.speed:
        costs += measure(params, prepared, stage.data_dir / "tokenizer.json")
    write_scores(stage.results_dir / "costs.csv", pd.DataFrame(costs))
    write_metrics(stage, frame, prepared.source)
    paths = figures.draw(stage, frame)
    if stage.run:
        stage.run.log_table(stage.results_dir / "scores.csv")
        for path in paths:
            stage.run.log_artifact(path, "figures")
        track_scores(stage, frame)


def left_out(prepared: Prepared) -> Iterator[Row]:
    """How many tables there are, and how many could not be used."""
    for pool in (SUPERVISED, FEW_SHOT):
        yield _row("all", "tables", f"{pool}_tables", 0, len(prepared.pool(pool)))
    yield _row("all", "tables", "left_out", 0, len(prepared.left_out))


def note_rows(model: str, seed: int, note: Mapping[str, Any]) -> Iterator[Row]:
    """What a training left word of: its size, its padding, and of how many rows something was cut off."""
    if "parameters" in note and seed == 0:
        yield _row(model, "packing", "parameters", 0, note["parameters"])
    if "padding" in note:
        yield _row(model, "packing", "padding", seed, round(note["padding"], 6))
        yield _row(model, "packing", "overlong_rows", seed, sum(note["overlong"].values()))


# --- By table ---------------------------------------------------------------------------------------------------------


def model_rows(
    prepared: Prepared, model: str, seed: int, predictions: Mapping[tuple[str, str], Predictions]
) -> Iterator[Row]:
    """Scores of a model and seed on all tables, and on all of their test rows together."""
    pooled: dict[tuple[str, str], list[tuple[NDArray, NDArray]]] = {}
    for task in prepared.tasks:
        for key in task.parts:
            if (task.name, key) not in predictions:
                continue
            each = predictions[task.name, key]
            yield from task_scores(task, key, model, seed, each)
            if task.pool == SUPERVISED:
                labels = task.classes.labels[task.parts[key].split.test]
                for way, probabilities in each.probabilities.items():
                    pooled.setdefault(way, []).append(confidence_and_correct(labels, probabilities, each.classes[way]))
    for way, parts in pooled.items():
        yield from calibration_rows(_named(model, way), seed, parts)


def task_scores(task: Task, key: str, model: str, seed: int, predictions: Predictions) -> Iterator[Row]:
    """Scores of one model on one part of one table."""
    test = task.parts[key].split.test
    labels, reference = task.classes.labels[test], task.reference[test].argmax(axis=1)
    where: Row = {"item": task.name}
    if task.pool == FEW_SHOT:
        where |= {"ratio": float(key), "family": task.family}
    accuracy = {}
    for way, classes in predictions.classes.items():
        accuracy[way] = float((classes == labels).mean())
        yield _row(_named(model, way), task.pool, "accuracy", seed, _short(accuracy[way])) | where
    greedy = predictions.classes["greedy"]
    present = np.unique(labels)
    balanced = recall_score(labels, greedy, labels=present, average="macro", zero_division=0)
    yield _row(model, task.pool, "balanced_accuracy", seed, _short(balanced)) | where
    if model in VARIANTS:
        yield _row(model, task.pool, "unanswered", seed, _short((greedy == NO_ANSWER).mean())) | where
    if task.pool == SUPERVISED:
        scores = classification_scores(labels, predictions.probabilities["greedy"], greedy)
        yield _row(model, task.pool, "brier", seed, _short(scores["brier"])) | where
    yield from published_rows(task, key, model, seed, predictions, accuracy, labels, reference, where)


def published_rows(
    task: Task,
    key: str,
    model: str,
    seed: int,
    predictions: Predictions,
    accuracy: Mapping[str, float],
    labels: NDArray,
    reference: NDArray,
    where: Row,
) -> Iterator[Row]:
    """`published_accuracy`, and what it adds: `inflation` by the reference, `cost_of_failures` of XGBoost."""
    published = accuracy.get("sampled", accuracy["greedy"])
    if model in VARIANTS and VARIANTS[model].targets == "in_sample":
        published = float((predictions.classes["sampled"] == reference).mean())
        agreement = float((predictions.classes["greedy"] == reference).mean())
        yield _row(model, task.pool, "inflation", seed, _short(agreement - accuracy["greedy"])) | where
    if model == "xgboost":
        if lacks_a_class(task, key):
            published = 0.0
        yield _row(model, task.pool, "cost_of_failures", seed, _short(accuracy["greedy"] - published)) | where
    yield _row(model, task.pool, "published_accuracy", seed, _short(published)) | where


def lacks_a_class(task: Task, key: str) -> bool:
    """Whether the training part is without a class of the table, where the published XGBoost raises."""
    return len(np.unique(task.classes.labels[task.parts[key].split.train])) < len(task.classes)


def confidence_and_correct(labels: NDArray, probabilities: NDArray, classes: NDArray) -> tuple[NDArray, NDArray]:
    """Largest probability [rows] and whether the class is right, of the rows that were answered."""
    answered = (classes != NO_ANSWER) & (probabilities.sum(axis=1) > 0)
    kept = probabilities[answered]
    return kept.max(axis=1) / np.maximum(kept.sum(axis=1), 1e-12), (classes == labels)[answered]


def calibration_rows(model: str, seed: int, parts: Sequence[tuple[NDArray, NDArray]]) -> Iterator[Row]:
    """Confidence and accuracy over all tables' test rows, by bin of confidence and as calibration error."""
    confidence = np.concatenate([each for each, _ in parts])
    correct = np.concatenate([each for _, each in parts]).astype(np.int64)
    if not len(confidence):
        return
    # Tables differ in their classes. What reliability needs is the answer's probability, as that of a class 0, with the
    # rest on as many others as make it the largest, and whether it was right: label 0 or not.
    others = np.ceil(1 / confidence.min()).astype(int)
    rest = np.repeat((1 - confidence)[:, None] / others, others, axis=1)
    found = reliability_bins(1 - correct, np.column_stack([confidence, rest]), POOLED_BINS)
    for number in np.flatnonzero(found.count):
        at = {"bin": int(number) + 1}
        yield _row(model, "calibration", "confidence", seed, _short(found.confidence[number])) | at
        yield _row(model, "calibration", "share_correct", seed, _short(found.accuracy[number])) | at
        yield _row(model, "calibration", "rows", seed, found.count[number]) | at
    yield _row(model, "calibration", "calibration_error", seed, _short(found.calibration_error))


# --- Over tables ------------------------------------------------------------------------------------------------------


def accuracies(frame: pd.DataFrame, metric: str = "accuracy", dataset: str = SUPERVISED) -> pd.DataFrame:
    """Values of a metric with models as columns, rows are (seed, table); what has one seed stands beside all."""
    rows = frame[frame.metric.eq(metric) & frame.dataset.eq(dataset)]
    if "ratio" in rows and dataset == FEW_SHOT:
        index = ["seed", "item", "ratio", "family"]
    else:
        index = ["seed", "item"]
    table = rows.pivot_table(index=index, columns="model", values="value")
    units = [name for name in index if name != "seed"]
    return table.groupby(units).transform(lambda column: column.fillna(column.mean()))


def rank_rows(frame: pd.DataFrame, params: Params) -> Iterator[Row]:
    """`rank` of the paper's seven models on each table and seed, 1 the best; ties share the better rank (published)."""
    table = accuracies(frame)
    models = [model for model in RANKED if model in params.models and model in table]
    if len(models) < 2:
        return
    table = table[models].dropna()
    for seed, rows in table.groupby(level="seed"):
        places = ranks(rows.to_numpy(), ties="min") if len(rows) > 1 else []
        for (_, item), each in zip(rows.index, places, strict=True):
            for model, place in zip(models, each, strict=True):
                yield _row(model, SUPERVISED, "rank", seed, place) | {"item": item}


def median_rows(frame: pd.DataFrame) -> Iterator[Row]:
    """Medians over tables by seed, and their ratios to XGBoost's and FT-Transformer's, with intervals over tables."""
    for metric in ("accuracy", "balanced_accuracy", "published_accuracy"):
        table = accuracies(frame, metric)
        medians = table.groupby(level="seed").median()
        for model in table:
            for seed, value in medians[model].dropna().items():
                yield _row(model, SUPERVISED, f"median_{metric}", seed, value)
    table = accuracies(frame)
    medians = table.groupby(level="seed").median()
    by_table = table.groupby(level="item").mean()
    for other in ("xgboost", "ft_transformer"):
        if other not in table:
            continue
        for model in ("heavy", "light", "heavy_noaug", "light_noaug"):
            if model not in table or (medians[other] <= 0).any():
                continue
            for seed, value in (medians[model] / medians[other]).dropna().items():
                yield _row(model, SUPERVISED, f"median_ratio_over_{other}", seed, value)
            if len(by_table) > 1 and (by_table[other] > 0).all():
                interval = ratio_over_tables(by_table[model], by_table[other])
                yield _row(model, SUPERVISED, f"median_ratio_over_{other}_low", 0, interval.low)
                yield _row(model, SUPERVISED, f"median_ratio_over_{other}_high", 0, interval.high)


def metadata_gain(frame: pd.DataFrame) -> Iterator[Row]:
    """Accuracy with metadata less that without, by table and seed."""
    table = accuracies(frame)
    if {"heavy", "light"} <= set(table):
        for (seed, item), value in (table.heavy - table.light).dropna().items():
            yield _row("heavy", SUPERVISED, "metadata_gain", seed, _short(value)) | {"item": item}


def cause_rows(frame: pd.DataFrame, prepared: Prepared) -> Iterator[Row]:
    """How far the universal models lie behind XGBoost, along what the paper names as causes of failure.

    Means over tables that agree in a cause: `columns`, `odd_values` (share of cells that are missing, free text or of a
    column with more than 20 categories) and `metadata_characters`; `failed` counts tables below the majority class.
    """
    table = accuracies(frame)
    causes = pd.DataFrame({task.name: causes_of(task) for task in prepared.pool(SUPERVISED)}).T
    for model in ("heavy", "light"):
        if not {model, "xgboost", "majority"} <= set(table):
            continue
        deficit = (table.xgboost - table[model]).dropna()
        below = table[model] < table.majority
        for seed, values in deficit.groupby(level="seed"):
            values = values.droplevel("seed")
            yield _row(model, "causes", "failed", seed, below.loc[seed].sum())
            for cause in causes:
                for at, mean in values.groupby(causes[cause].reindex(values.index)).mean().items():
                    yield _row(model, "causes", "deficit", seed, _short(mean)) | {cause: at}


def causes_of(task: Task) -> dict[str, float]:
    """What a table has of the paper's causes of failure."""
    table = task.table
    columns = table.data.with_format("arrow")[:]
    odd = 0
    for column in table.features:
        values = columns[column.name]
        is_odd = column.kind == "text" or (column.kind == "categorical" and len(values.unique()) > 20)
        odd += len(values) if is_odd else values.null_count
    explained = sum(len(column.description) for column in table.features)
    return {
        "columns": len(table.features),
        "odd_values": round(odd / (len(table) * len(table.features)), 4),
        "metadata_characters": len(table.description) + explained,
    }


def transfer_rows(frame: pd.DataFrame) -> Iterator[Row]:
    """By how much the joint training helps on few-shot tables of each family, at the smallest ratio, by seed.

    The gain of `light` over the language model that was trained on the table alone.
    """
    rows = frame[frame.dataset.eq(FEW_SHOT)]
    if rows.empty or not {"light", "tabllm"} <= set(rows.model) or not {"arbitrary", "shared"} <= set(rows.family):
        return
    table = accuracies(frame, dataset=FEW_SHOT).xs(rows.ratio.min(), level="ratio")
    for (family, seed), value in (table.light - table.tabllm).groupby(level=["family", "seed"]).mean().items():
        if family in ("arbitrary", "shared"):
            yield _row(family, "transfer", "transfer_gain", seed, value)


def comparison_rows(frame: pd.DataFrame) -> Iterator[Row]:
    """Friedman's test and critical difference over tables, and Wilcoxon's of heavy and light against the others."""
    rows = frame[frame.dataset.eq(SUPERVISED) & frame.metric.eq("accuracy")]
    chosen = [model for model in (*RANKED, "logistic_regression", "majority") if model in set(rows.model)]
    by_table = scores_by_table(rows.assign(dataset=rows["item"]), "accuracy", chosen).round(6)
    if len(by_table) < 2 or len(chosen) < 3:
        return
    yield _row("all", "comparison", "friedman_p", 0, friedman_test(by_table).f_p_value)
    yield _row("all", "comparison", "critical_difference", 0, critical_difference(len(chosen), len(by_table)))
    for model, place in zip(chosen, ranks(by_table.to_numpy()).mean(axis=0), strict=True):
        yield _row(model, "comparison", "mean_rank", 0, place)
    for control in ("heavy", "light"):
        if control in chosen:
            for pair in compare_models(by_table, control):
                at = f"comparison/{control}"
                yield _row(pair.second, at, "wilcoxon_p", 0, pair.p_value)
                yield _row(pair.second, at, "wilcoxon_p_holm", 0, pair.adjusted)
                yield _row(pair.second, at, "wins_of_universal", 0, pair.wins)
                yield _row(pair.second, at, "losses_of_universal", 0, pair.losses)


def track_scores(stage: Stage[Params], frame: pd.DataFrame) -> None:
    """Add each model's mean test scores to the run that trained it, as `test/accuracy` and so on."""
    chosen = frame[frame.metric.isin(["accuracy", "balanced_accuracy"]) & frame.dataset.eq(SUPERVISED)]
    means = chosen.groupby(["model", "seed", "metric"]).value.mean()
    for model in stage.params.models:
        for seed in stage.params.seeds_of(model):
            record = run_folder(stage, model, seed) / "run.json"
            if record.is_file() and (model, seed) in means.index.droplevel(2):
                with open_run(json.loads(record.read_text(encoding="utf-8"))["run_id"]) as run:
                    values = {f"test/{metric}": float(value) for metric, value in means[model, seed].items()}
                    run.log(values, step=stage.params.training.epochs if model not in BASELINES else 1)


def _named(model: str, way: str) -> str:
    return model if way == "greedy" else f"{model}_{way}"


def _short(value: float) -> float:
    return round(float(value), DIGITS)


def _row(model: str, dataset: str, metric: str, seed: int, value: float) -> Row:
    return {"model": model, "dataset": dataset, "metric": metric, "seed": int(seed), "value": float(value)}
