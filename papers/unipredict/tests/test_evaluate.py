"""Both readings of the evaluation, by hand; and comparisons over tables."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from shared.data.tabular import Classes, Split
from shared.evaluation.tabular import NO_ANSWER

from ..data import Part, Prepared, Task
from ..evaluate import (
    accuracies,
    calibration_rows,
    causes_of,
    confidence_and_correct,
    lacks_a_class,
    median_rows,
    model_rows,
    rank_rows,
    task_scores,
    transfer_rows,
)
from ..train import Predictions
from .helpers import params_of, people


def task(train: list[int], test: list[int], pool: str = "supervised", key: str = "supervised") -> Task:
    """Labels are 0, 1, 0, 1 …; the reference says 1 everywhere."""
    table = people(12)
    labels = np.arange(12) % 2
    part = Part(Split(np.array(train), np.array(test)), {})
    reference = np.tile([0.2, 0.8], (12, 1))
    return Task(table, Classes(labels, ("a", "b")), pool, "real", {key: part}, reference)


def said(*classes: int, sampled: tuple[int, ...] | None = None) -> Predictions:
    """Answers with certainty; those that are `NO_ANSWER` have no probabilities."""
    ways = {"greedy": classes} | ({"sampled": sampled} if sampled else {})
    arrays = {way: np.array(each) for way, each in ways.items()}
    return Predictions({way: np.eye(3)[each][:, :2] for way, each in arrays.items()}, arrays)


def values(rows: Any) -> dict[tuple[str, str], float]:
    return {(row["model"], row["metric"]): row["value"] for row in rows}


def test_true_labels_and_the_published_reading() -> None:
    """Labels of the test rows are 0 1 0 1. Greedy says 1 1 0 nothing, samples say 1 1 1 0."""
    found = values(
        task_scores(
            task([0, 1], [4, 5, 6, 7]), "supervised", "light", 0, said(1, 1, 0, NO_ANSWER, sampled=(1, 1, 1, 0))
        )
    )
    assert found["light", "accuracy"] == 0.5
    assert found["light_sampled", "accuracy"] == 0.25
    assert found["light", "balanced_accuracy"] == 0.5
    assert found["light", "unanswered"] == 0.25
    # Samples agree with the reference three times, greedy answers twice.
    assert found["light", "published_accuracy"] == 0.75
    assert found["light", "inflation"] == 0.0


def test_models_of_one_hot_targets_are_published_on_true_labels() -> None:
    answers = said(1, 1, 0, 0, sampled=(1, 1, 1, 0))
    found = values(task_scores(task([0, 1], [4, 5, 6, 7]), "supervised", "light_noaug", 0, answers))
    assert found["light_noaug", "published_accuracy"] == 0.25
    assert ("light_noaug", "inflation") not in found


def test_a_class_absent_from_training_is_a_failure_in_the_published_reading_alone() -> None:
    absent, present = (task(train, [4, 5], "few_shot", "0.1") for train in ([0, 2], [0, 1]))
    assert lacks_a_class(absent, "0.1")
    assert not lacks_a_class(present, "0.1")
    found = values(task_scores(absent, "0.1", "xgboost", 0, said(0, 0)))
    assert found["xgboost", "accuracy"] == 0.5
    assert found["xgboost", "published_accuracy"] == 0.0
    assert found["xgboost", "cost_of_failures"] == 0.5
    assert values(task_scores(present, "0.1", "xgboost", 0, said(0, 0)))["xgboost", "published_accuracy"] == 0.5
    assert values(task_scores(absent, "0.1", "mlp", 0, said(0, 0)))["mlp", "published_accuracy"] == 0.5


def test_calibration_is_pooled_over_tables_without_what_was_not_answered() -> None:
    confidence, correct = confidence_and_correct(
        np.array([0, 1, 0]), np.array([[0.6, 0.2], [0.0, 0.0], [0.1, 0.3]]), np.array([0, NO_ANSWER, 1])
    )
    assert confidence == pytest.approx([0.75, 0.75])
    assert correct.tolist() == [True, False]
    ten = (np.full(10, 0.3), np.array([True] * 4 + [False] * 6))
    rows = list(calibration_rows("light", 0, [ten, (np.full(10, 0.95), np.full(10, True))]))
    by_bin = {row["bin"]: row["value"] for row in rows if row["metric"] == "share_correct"}
    assert by_bin == {3: 0.4, 10: 1.0}
    assert rows[-1]["value"] == pytest.approx(0.5 * 0.1 + 0.5 * 0.05)


def frame(rows: dict[tuple[str, int, str], float]) -> pd.DataFrame:
    """Accuracies by (model, seed, table)."""
    return pd.DataFrame(
        [
            {"model": model, "dataset": "supervised", "metric": "accuracy", "seed": seed, "item": item, "value": value}
            for (model, seed, item), value in rows.items()
        ]
    )


SCORES = frame(
    {
        ("heavy", 0, "a"): 0.9,
        ("heavy", 0, "b"): 0.5,
        ("heavy", 1, "a"): 0.7,
        ("heavy", 1, "b"): 0.5,
        ("light", 0, "a"): 0.8,
        ("light", 0, "b"): 0.5,
        ("light", 1, "a"): 0.8,
        ("light", 1, "b"): 0.7,
        ("xgboost", 0, "a"): 0.8,
        ("xgboost", 0, "b"): 0.4,
    }
)


def test_what_has_one_seed_stands_beside_all() -> None:
    table = accuracies(SCORES)
    assert table.xgboost.tolist() == [0.8, 0.4, 0.8, 0.4]
    assert table.loc[(1, "a"), "heavy"] == 0.7


def test_ranks_share_the_better_place() -> None:
    found = {(row["model"], row["seed"], row["item"]): row["value"] for row in rank_rows(SCORES, params_of("tiny"))}
    assert [found["heavy", 0, "a"], found["light", 0, "a"], found["xgboost", 0, "a"]] == [1, 2, 2]
    assert [found["heavy", 1, "b"], found["light", 1, "b"], found["xgboost", 1, "b"]] == [2, 1, 3]


def test_ratios_of_medians() -> None:
    found = {(row["model"], row["metric"], row["seed"]): row["value"] for row in median_rows(published(SCORES))}
    assert found["heavy", "median_accuracy", 0] == pytest.approx(0.7)
    assert found["heavy", "median_ratio_over_xgboost", 0] == pytest.approx(0.7 / 0.6)
    assert found["heavy", "median_ratio_over_xgboost", 1] == pytest.approx(0.6 / 0.6)


def published(scores: pd.DataFrame) -> pd.DataFrame:
    """With the metrics that medians are taken of."""
    others = [scores.assign(metric=metric) for metric in ("balanced_accuracy", "published_accuracy")]
    return pd.concat([scores, *others], ignore_index=True)


def test_transfer_is_the_gain_over_training_on_the_table_alone() -> None:
    rows = []
    for model, accuracy in (
        ("light", {"shared": 0.9, "arbitrary": 0.6}),
        ("tabllm", {"shared": 0.5, "arbitrary": 0.5}),
    ):
        for family, value in accuracy.items():
            for ratio, extra in ((0.1, 0.0), (0.8, 0.05)):
                where = {"item": family, "ratio": ratio, "family": family}
                rows.append(
                    {"model": model, "dataset": "few_shot", "metric": "accuracy", "seed": 0, "value": value + extra}
                    | where
                )
    found = {row["model"]: row["value"] for row in transfer_rows(pd.DataFrame(rows))}
    assert found == {"shared": pytest.approx(0.4), "arbitrary": pytest.approx(0.1)}


def test_causes_of_failure() -> None:
    """Three columns; of 60 rows an eighth has no score, and notes are free text."""
    table = people(40, note=[f"a long note number {n}" for n in range(40)], gaps=[None, 1.0] * 20)
    found = causes_of(Task(table, Classes(np.zeros(40, int), ("a",)), "supervised", "real", {}, np.zeros((40, 1))))
    assert found["columns"] == 5
    assert found["odd_values"] == pytest.approx((40 + 20) / 200)
    assert found["metadata_characters"] == len("People at work.") + len("Age in years.") + len("What they do.")


def test_tables_that_a_model_was_not_asked_about_have_no_rows() -> None:
    one = task([0, 1], [4, 5])
    prepared = Prepared((one,), "generated: test", "")
    assert list(model_rows(prepared, "light", 0, {})) == []
    assert len(list(model_rows(prepared, "mlp", 0, {("people", "supervised"): said(0, 1)}))) > 3
