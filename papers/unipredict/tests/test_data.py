"""Tables, splits and targets: what they hold, what is left out, and the stand-in's rules."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from shared.config import UserError
from shared.data.tabular import make_table

from ..augment import calibrated_probabilities, held_out_folds
from ..config import Augmentation, StructuralTables
from ..data import embedded_tables, load, make_task, save, supervised_splits
from ..structural import generate, shared_weights
from .helpers import params_of, people

TINY = params_of("tiny")


def test_a_task_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    values = [1.5, None, 3.0, 4.25] * 15
    table = people(60, extra=values, when=["2024-01-01", "2024-02-03", None] * 20)
    task = make_task(table, "few_shot", "real", TINY)
    save(tmp_path, [task], "generated: test", {"other": "no features"})
    prepared = load(tmp_path)
    (found,) = prepared.tasks
    assert prepared.left_out == {"other": "no features"}
    assert (found.name, found.pool, found.family) == ("people", "few_shot", "real")
    assert found.table.columns == task.table.columns
    assert found.table.data[:] == task.table.data[:]
    assert found.classes.names == ("high", "low")
    assert list(found.parts) == ["0.1", "0.3", "0.8"]
    for key, part in task.parts.items():
        assert (found.parts[key].split.train == part.split.train).all()
        for kind, targets in part.targets.items():
            assert np.array_equal(found.parts[key].targets[kind], targets)
    assert np.array_equal(found.reference, task.reference, equal_nan=True)
    assert load(tmp_path, "supervised").tasks == ()


def test_missing_and_damaged_preparations(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run the stage prepare again"):
        load(tmp_path)
    save(tmp_path, [make_task(people(), "supervised", "real", TINY)], "generated: test", {})
    (tmp_path / "tables" / "people.npz").write_bytes(b"PK")
    with pytest.raises(UserError, match="run the stage prepare again"):
        load(tmp_path)


def test_splits_do_not_overlap_and_are_cut_at_random() -> None:
    table = people(100)
    (split,) = supervised_splits(table, TINY).values()
    assert len(split.train) == TINY.data.train_rows
    assert len(split.test) == TINY.data.test_rows
    assert not set(split.train) & set(split.test)
    assert np.diff(split.train).max() > 1


def test_larger_few_shot_parts_hold_the_smaller_ones_and_the_test_rows_are_the_same() -> None:
    params = TINY.model_copy(update={"few_shot": TINY.few_shot.model_copy(update={"test_rows": 10})})
    parts = make_task(people(60), "few_shot", "real", params).parts
    train = [set(part.split.train.tolist()) for part in parts.values()]
    assert train[0] < train[1]
    assert len({tuple(part.split.test.tolist()) for part in parts.values()}) == 1


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"income": ["low"] * 60}, "one class only"),
        ({"income": [f"class {number}" for number in range(60)] * 1}, None),
        ({"note": ["x" * 5000] * 60}, "its first prompt has"),
    ],
)
def test_tables_that_cannot_be_used_say_why(columns: dict[str, list[str]], words: str | None) -> None:
    if words is None:
        table = make_table(pa.table({"x": list(range(200)), "y": [f"c{n}" for n in range(200)]}), "y", name="t")
        words = "200 classes"
    else:
        table = people(60, **columns)
    with pytest.raises(UserError, match=words):
        make_task(table, "supervised", "real", TINY)


def test_a_column_without_values_is_left_out_and_counted() -> None:
    table = people(60, empty=pa.nulls(60, pa.string()))
    assert "empty" not in [column.name for column in table.columns]
    assert table.notes["empty_columns"] == 1
    make_task(table, "supervised", "real", TINY)


def test_scikit_learns_tables() -> None:
    tables = {table.name: (table, pool) for table, pool, _ in embedded_tables()}
    assert {name: pool for name, (_, pool) in tables.items()} == {
        "sklearn__breast_cancer": "supervised",
        "sklearn__iris": "few_shot",
        "sklearn__wine": "few_shot",
        "sklearn__diabetes": "few_shot",
    }
    assert set(tables["sklearn__iris"][0].data["target"]) == {"setosa", "versicolor", "virginica"}


# --- Targets ----------------------------------------------------------------------------------------------------------


def test_in_sample_targets_are_scikit_learns() -> None:
    from sklearn.calibration import CalibratedClassifierCV
    from xgboost import XGBClassifier

    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(90, 3))
    for num_classes in (2, 3):
        labels = np.digitize(inputs[:, 0] + rng.normal(size=90), np.linspace(-0.6, 0.6, num_classes - 1))
        trees = XGBClassifier(n_estimators=8, n_jobs=1, tree_method="hist")
        expected = CalibratedClassifierCV(trees, method="isotonic", cv=5).fit(inputs, labels).predict_proba(inputs)
        found = calibrated_probabilities(inputs, labels, num_classes, Augmentation(trees=8, folds=5))
        assert found.in_sample == pytest.approx(expected, abs=1e-6)


def test_in_sample_targets_know_labels_that_out_of_fold_targets_do_not() -> None:
    """Labels that are drawn at random can be known only by having seen them."""
    rng = np.random.default_rng(0)
    inputs, labels = rng.normal(size=(200, 4)), rng.integers(2, size=200)
    found = calibrated_probabilities(inputs, labels, 2, Augmentation(trees=40, folds=5))
    rows = np.arange(200)
    assert (found.in_sample.argmax(axis=1) == labels).mean() > 0.8
    assert abs(found.out_of_fold[rows, labels].mean() - 0.5) < 0.07
    for targets in found:
        assert targets.sum(axis=1) == pytest.approx(np.ones(200))


def test_classes_with_fewer_rows_than_folds() -> None:
    labels = np.array([0] * 12 + [1] * 9 + [2])
    found = calibrated_probabilities(np.arange(22.0)[:, None], labels, 4, Augmentation(trees=3))
    assert np.isfinite(found.in_sample).all()
    assert found.in_sample[:, 3] == pytest.approx(np.zeros(22))
    alone = calibrated_probabilities(np.arange(3.0)[:, None], np.array([0, 1, 2]), 3, Augmentation(trees=3))
    assert (alone.in_sample == np.eye(3)).all()
    assert held_out_folds(np.array([0, 1, 2]), 5) == []


# --- The stand-in -----------------------------------------------------------------------------------------------------


def test_the_shared_rule_is_one_for_all_tables_and_the_others_differ() -> None:
    settings = StructuralTables(supervised=8, few_shot=8, rows=(400, 400), noise=(0.0, 0.0))
    tables = list(generate(settings, 0))
    assert tables == list(generate(settings, 0))
    assert tables != list(generate(settings, 1))
    weights = shared_weights(0)
    agreement = {"shared": [], "arbitrary": []}
    for table in tables:
        names = [name for name in table.columns if name != table.target]
        numeric = [name for name in names if not isinstance(table.columns[name][0], str)]
        scores = sum(weights[name] * (np.array(table.columns[name]) - 50) / 10 for name in numeric)
        labels = np.unique(table.columns[table.target], return_inverse=True)[1]
        agreement[table.family].append(abs(np.corrcoef(scores, labels)[0, 1]))
    assert min(agreement["shared"]) > 0.35
    assert np.mean(agreement["arbitrary"]) < 0.5 < np.mean(agreement["shared"])


def test_neither_class_is_rare() -> None:
    for table in generate(StructuralTables(rows=(500, 300)), 3):
        _, counts = np.unique(table.columns[table.target], return_counts=True)
        assert counts.min() > 0.15 * counts.sum(), table.name
