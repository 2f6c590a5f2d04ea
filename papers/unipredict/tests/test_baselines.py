"""Baselines learn what can be learned, and live through what tables bring along."""

from __future__ import annotations

import importlib.util
import sys

import numpy as np
import pytest

from shared.config import UserError
from shared.data.tabular import target_classes

from ..baselines import (
    SEARCH,
    batch_size_without_remainder_of_one,
    draw_trials,
    fit_and_predict,
    log_loss,
    search,
)
from ..config import BASELINES, BaselineSettings
from .helpers import people

SETTINGS = BaselineSettings(trials=2, tabnet_epochs=25, ft_transformer_epochs=12, mlp_iterations=60)
TABLE = people(120)
CLASSES = target_classes(TABLE)
ROWS, TEST = np.arange(80), np.arange(80, 120)
PACKAGES = {"tabnet": "pytorch_tabnet", "tabnet_defaults": "pytorch_tabnet", "ft_transformer": "rtdl_revisiting_models"}


def needs_its_package(model: str) -> None:
    if model in PACKAGES and importlib.util.find_spec(PACKAGES[model]) is None:
        pytest.skip(f"{PACKAGES[model]} is not installed")


def predict(model: str, rows: np.ndarray = ROWS, **options: object) -> np.ndarray:
    labels = options.pop("labels", CLASSES.labels)
    classes = options.pop("num_classes", 2)
    return fit_and_predict(
        model, TABLE, labels, classes, rows, TEST, SETTINGS, **({"seed": 0, "tune": False} | options)
    )


@pytest.mark.parametrize("model", [model for model in BASELINES if model not in ("majority", "tabnet_defaults")])
def test_a_rule_on_one_column_is_learned(model: str) -> None:
    needs_its_package(model)
    probabilities = predict(model)
    assert probabilities.sum(axis=1) == pytest.approx(np.ones(40), abs=1e-5)
    assert (probabilities.argmax(axis=1) == CLASSES.labels[TEST]).mean() > 0.75


@pytest.mark.parametrize("model", BASELINES)
def test_seeds_fix_everything(model: str) -> None:
    needs_its_package(model)
    assert (predict(model, ROWS[:30]) == predict(model, ROWS[:30])).all()


@pytest.mark.parametrize("model", BASELINES)
def test_absent_classes_single_classes_and_few_rows(model: str) -> None:
    needs_its_package(model)
    without_1 = predict(model, labels=np.where(CLASSES.labels == 1, 2, 0), num_classes=4)
    assert without_1.shape == (40, 4)
    assert (without_1[:, [1, 3]] == 0).all()
    single = predict(model, rows=np.flatnonzero(CLASSES.labels == 1)[:5])
    assert (single == [0, 1]).all()
    two = predict(model, rows=np.array([np.argmin(CLASSES.labels), np.argmax(CLASSES.labels)]))
    assert np.isfinite(two).all()


def test_majority_is_the_training_parts() -> None:
    assert (predict("majority", labels=np.repeat([2, 0], [50, 70]), num_classes=3) == [0, 0, 1]).all()


def test_tabnet_with_its_defaults_is_not_trained_at_all() -> None:
    needs_its_package("tabnet_defaults")
    untrained = predict("tabnet_defaults")
    more = BaselineSettings(tabnet_epochs=1)
    once = fit_and_predict("tabnet_defaults", TABLE, CLASSES.labels, 2, ROWS, TEST, more, seed=0, tune=False)
    assert (untrained == once).all()
    assert (predict("tabnet") != untrained).any()


@pytest.mark.parametrize("num_rows", [2, 3, 5, 17, 65, 128, 129, 161, 257, 385, 513, 1025])
def test_no_batch_of_one_row(num_rows: int) -> None:
    size = batch_size_without_remainder_of_one(num_rows, 128)
    assert 2 <= size <= 128
    assert num_rows % size != 1


# --- The search -------------------------------------------------------------------------------------------------------


def test_the_first_trial_is_the_defaults_and_the_others_are_drawn() -> None:
    for model, space in SEARCH.items():
        trials = draw_trials(model, 4, 0)
        assert trials[0] == {}
        assert all(trial[name] in space[name] for trial in trials[1:] for name in trial)
        assert trials == draw_trials(model, 4, 0)


def test_the_search_takes_the_lowest_validation_loss_of_training_rows() -> None:
    settings = BaselineSettings(trials=6)
    best = search("logistic_regression", TABLE, CLASSES.labels, 2, ROWS, settings, 0)
    flipped = CLASSES.labels.copy()
    flipped[TEST] = 1 - flipped[TEST]
    assert search("logistic_regression", TABLE, flipped, 2, ROWS, settings, 0) == best
    assert best in draw_trials("logistic_regression", 6, 0)


def test_log_loss_by_hand() -> None:
    loss = log_loss(np.array([0, 1]), np.array([[0.5, 0.5], [1.0, 0.0]]))
    assert loss == pytest.approx((np.log(2) + np.log(1000)) / 2)


@pytest.mark.parametrize(
    ("model", "package"), [("tabnet", "pytorch_tabnet.tab_model"), ("ft_transformer", "rtdl_revisiting_models")]
)
def test_a_missing_package_is_named(model: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=r"pip install -e '.\[unipredict\]'"):
        predict(model)
