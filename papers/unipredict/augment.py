"""Target augmentation: class probabilities of gradient-boosted trees with isotonic calibration."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shared.data.tabular import Table, baseline_encoder, feature_frame
from shared.evaluation.tabular import fit_predict_proba, normalized_probabilities

from .config import Augmentation

if TYPE_CHECKING:
    from xgboost import XGBClassifier

Array = NDArray[np.float64]
Labels = NDArray[np.int64]


class Augmented(NamedTuple):
    """Probabilities [rows, K] for the rows that were given, by calibrated trees that saw them and that did not."""

    in_sample: Array
    out_of_fold: Array


def make_trees(num_trees: int = 100, **options: object) -> XGBClassifier:
    """XGBoost on one thread, with its library's defaults otherwise."""
    from xgboost import XGBClassifier

    return XGBClassifier(n_estimators=num_trees, n_jobs=1, tree_method="hist", **options)


def tree_inputs(table: Table, fitted: NDArray[np.int64], rows: NDArray[np.int64] | None = None) -> tuple[Array, Array]:
    """Features of the rows to fit on and of `rows` (default: the same): numbers as they are, categories as codes."""
    encoder = baseline_encoder(table, categories="ordinal", numbers="raw")
    inputs = encoder.fit_transform(feature_frame(table, fitted))
    return inputs, inputs if rows is None else encoder.transform(feature_frame(table, rows))


def augmented_targets(
    table: Table, rows: NDArray[np.int64], labels: Labels, num_classes: int, settings: Augmentation
) -> Augmented:
    """Targets for `rows` of a table, of trees fitted on these rows alone; labels [rows]."""
    inputs, _ = tree_inputs(table, rows)
    return calibrated_probabilities(inputs, labels, num_classes, settings)


def calibrated_probabilities(inputs: Array, labels: Labels, num_classes: int, settings: Augmentation) -> Augmented:
    """Both kinds of targets from one set of fits, as many as there are folds.

    In sample as scikit-learn's CalibratedClassifierCV(isotonic) has it, and UniPredict: for each fold trees are fitted
    on the rest and calibrated on the fold, one class against the others; the result is the mean over folds, of rows
    that most of these trees were fitted on. Out of fold: a row gets the probabilities of the trees that did not see it,
    calibrated on the other folds' out-of-fold probabilities.

    A class with fewer rows than folds is no error (in scikit-learn it is): folds without it give it probability 0.
    Where no class has two rows there is nothing to hold out, and targets are the labels.
    """
    from sklearn.isotonic import IsotonicRegression

    one_hot = np.eye(num_classes)[labels]
    folds = held_out_folds(labels, settings.folds)
    if not folds:
        return Augmented(one_hot, one_hot)
    raw = np.zeros((len(folds), *one_hot.shape))
    for number, fold in enumerate(folds):
        rest = np.setdiff1d(np.arange(len(labels)), fold)
        raw[number] = fit_predict_proba(make_trees(settings.trees), inputs[rest], labels[rest], inputs, num_classes)
    held_out = np.zeros_like(one_hot)
    for number, fold in enumerate(folds):
        held_out[fold] = raw[number, fold]

    def fit_isotonic(scores: Array, truth: Array) -> IsotonicRegression:
        return IsotonicRegression(out_of_bounds="clip", y_min=0, y_max=1).fit(scores, truth)

    in_sample = np.zeros_like(raw)
    out_of_fold = np.zeros_like(one_hot)
    for number, fold in enumerate(folds):
        others = np.setdiff1d(np.arange(len(labels)), fold)
        # Of two classes the second is calibrated, and the first is the rest.
        for column in range(num_classes) if num_classes > 2 else (1,):
            calibrator = fit_isotonic(raw[number, fold, column], one_hot[fold, column])
            in_sample[number, :, column] = calibrator.predict(raw[number, :, column])
            calibrator = fit_isotonic(held_out[others, column], one_hot[others, column])
            out_of_fold[fold, column] = calibrator.predict(held_out[fold, column])
    if num_classes == 2:
        in_sample[..., 0] = 1 - in_sample[..., 1]
        out_of_fold[:, 0] = 1 - out_of_fold[:, 1]
    by_fold = [normalized_probabilities(each) for each in in_sample]
    return Augmented(np.mean(by_fold, axis=0), normalized_probabilities(out_of_fold))


def held_out_folds(labels: Labels, num_folds: int) -> list[NDArray[np.int64]]:
    """Stratified folds, each the row numbers that are held out; none where no class has two rows."""
    from sklearn.model_selection import StratifiedKFold

    num_folds = min(num_folds, int(np.bincount(labels).max()))
    if num_folds < 2:
        return []
    with warnings.catch_warnings():
        # Rare classes are meant to be absent from some folds.
        warnings.filterwarnings("ignore", message="The least populated class", category=UserWarning)
        return [held for _, held in StratifiedKFold(num_folds).split(np.zeros(len(labels)), labels)]
