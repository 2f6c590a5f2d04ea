"""Classifiers on many tables: scores of one table, calibration, and comparisons over tables.

Labels are whole numbers 0 … K-1, and probabilities [rows, K]. The comparisons follow Demšar, "Statistical comparisons
of classifiers over multiple data sets" (JMLR 7, 2006): average ranks, Friedman's test with Iman and Davenport's
correction, Nemenyi's critical difference, and Wilcoxon's signed-rank test, here with Holm's correction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shared.config import UserError
from shared.evaluation.statistics import Interval, bootstrap_interval, paired_bootstrap

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

Array = NDArray[np.float64]
Labels = NDArray[np.int64]

# What stands in predictions for an answer that could not be read.
NO_ANSWER = -1


# ------------------------------------------------------------------------------------------------------ one table


def fit_predict_proba(
    estimator: Any, inputs: ArrayLike, labels: ArrayLike, test_inputs: ArrayLike, num_classes: int
) -> Array:
    """Fit a scikit-learn classifier and return probabilities [test rows, K] of all K classes.

    Classes that the training part lacks have probability 0, so they are an error on the test rows that are of them and
    no crash; a single class in training is predicted everywhere. The estimator is fitted on labels renumbered without
    gaps, as XGBoost demands.
    """
    labels = _checked_labels(labels, num_classes)
    seen, renumbered = np.unique(labels, return_inverse=True)
    probabilities = np.zeros((len(test_inputs), num_classes))
    if len(seen) == 1:
        probabilities[:, seen[0]] = 1
    else:
        probabilities[:, seen] = estimator.fit(inputs, renumbered).predict_proba(test_inputs)
    return probabilities


def normalized_probabilities(written: ArrayLike) -> Array:
    """Rows [rows, K] of probabilities that were written down, made to sum to 1: rounded ones seldom do.

    Rows that are not finite, have negative numbers or sum to 0 become uniform: they say nothing.
    """
    values = np.array(written, dtype=np.float64)
    if values.ndim != 2 or not values.shape[1]:
        raise UserError(f"probabilities must be [rows, classes], not of shape {values.shape}")
    says_something = np.isfinite(values).all(axis=1) & (values >= 0).all(axis=1) & (values.sum(axis=1) > 0)
    values[~says_something] = 1
    return values / values.sum(axis=1, keepdims=True)


def classification_scores(
    labels: ArrayLike, probabilities: ArrayLike, predictions: ArrayLike | None = None
) -> dict[str, float]:
    """The scores of one table, by name, from labels [rows] and probabilities [rows, K], which are normalized first.

    - `accuracy`; `balanced_accuracy`, the mean recall, and `macro_f1`, the mean F1, over the classes among the labels.
    - `auc`: area under the ROC curve; of more than two classes the mean over pairs of those among the labels (Hand &
      Till 2001). Not defined, nan, where the labels are of one class.
    - `brier`: mean over rows of Σ_k (p_k - [label = k])², between 0 and 2 (Brier 1950).
    - `calibration_error`: `expected_calibration_error` in 15 bins.
    - `unanswered`: the share of rows without a prediction.

    `predictions` [rows] are the classes answered, by default the most probable, the first of them where several are;
    `NO_ANSWER` is wrong whatever the label.
    """
    from sklearn.metrics import accuracy_score, brier_score_loss, f1_score, recall_score, roc_auc_score

    probabilities = normalized_probabilities(probabilities)
    num_classes = probabilities.shape[1]
    labels = _checked_labels(labels, num_classes, len(probabilities))
    if predictions is None:
        predictions = probabilities.argmax(axis=1)
    predictions = _checked_labels(predictions, num_classes, len(labels), smallest=NO_ANSWER)
    present = np.unique(labels)
    macro: dict[str, Any] = {"labels": present, "average": "macro", "zero_division": 0}
    auc = math.nan
    if len(present) > 1 and num_classes == 2:
        auc = roc_auc_score(labels, probabilities[:, 1])
    elif len(present) > 1:
        auc = roc_auc_score(labels, probabilities, multi_class="ovo", labels=range(num_classes))
    brier = brier_score_loss(labels, probabilities, labels=range(num_classes), scale_by_half=False)
    return {
        "accuracy": float(accuracy_score(labels, predictions)),
        "balanced_accuracy": float(recall_score(labels, predictions, **macro)),
        "macro_f1": float(f1_score(labels, predictions, **macro)),
        "auc": float(auc),
        "brier": float(brier),
        "calibration_error": expected_calibration_error(labels, probabilities),
        "unanswered": float((predictions == NO_ANSWER).mean()),
    }


@dataclass(frozen=True)
class ReliabilityBins:
    """Rows by confidence, the largest probability, in bins (edge, next edge] of equal width; each array is [bins].

    `confidence` and `accuracy` are means over a bin's rows, nan where `count` is 0.
    """

    edges: Array
    count: Labels
    confidence: Array
    accuracy: Array

    @property
    def calibration_error(self) -> float:
        """Σ_bins count / rows · |accuracy - confidence|."""
        gaps = self.count * np.abs(self.accuracy - self.confidence)
        return float(np.nansum(gaps) / self.count.sum())


def reliability_bins(labels: ArrayLike, probabilities: ArrayLike, num_bins: int = 15) -> ReliabilityBins:
    """Confidence and accuracy by bin, for a reliability diagram. Guo et al. 2017 (arXiv 1706.04599), section 2."""
    probabilities = normalized_probabilities(probabilities)
    labels = _checked_labels(labels, probabilities.shape[1], len(probabilities))
    if num_bins < 1:
        raise UserError(f"reliability needs one bin at least (given: {num_bins})")
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    # Probabilities of two decimals lie on edges: floating point must not choose their side.
    bins = np.clip(np.ceil(np.round(confidence * num_bins, 9)).astype(np.int64) - 1, 0, num_bins - 1)
    count = np.bincount(bins, minlength=num_bins)
    with np.errstate(invalid="ignore"):
        mean_confidence = np.bincount(bins, confidence, num_bins) / count
        mean_accuracy = np.bincount(bins, correct, num_bins) / count
    return ReliabilityBins(np.linspace(0, 1, num_bins + 1), count, mean_confidence, mean_accuracy)


def expected_calibration_error(labels: ArrayLike, probabilities: ArrayLike, num_bins: int = 15) -> float:
    """Mean gap of confidence and accuracy over bins, weighted by rows. Guo et al. 2017, equation 3."""
    return reliability_bins(labels, probabilities, num_bins).calibration_error


def _checked_labels(labels: ArrayLike, num_classes: int, rows: int | None = None, smallest: int = 0) -> Labels:
    values = np.asarray(labels)
    if values.ndim != 1 or not values.size or values.dtype.kind not in "iu" or rows not in (None, len(values)):
        expected = "rows" if rows is None else rows
        raise UserError(f"labels must be whole numbers [{expected}], not {values.dtype} of shape {values.shape}")
    if values.min() < smallest or values.max() >= num_classes:
        raise UserError(
            f"labels must lie between {smallest} and {num_classes - 1} for {num_classes} classes "
            f"(given: {values.min()} to {values.max()})"
        )
    return values


# ---------------------------------------------------------------------------------------------------- over tables


def scores_by_table(
    scores: pd.DataFrame, metric: str, models: Sequence[str] | None = None, *, failed: float | None = None
) -> pd.DataFrame:
    """One metric of tidy scores (model, dataset, metric, seed, value) as a frame of tables × models, mean over seeds.

    `models` chooses and orders the columns. Where a model has no score on a table, or one that is nan, `failed` stands
    in (UniPredict's figures count failures as 0); without it that is a `UserError`.
    """
    rows = scores[scores["metric"] == metric]
    if rows.empty:
        raise UserError(
            f"there is no metric {metric!r} in the scores; there are {', '.join(scores['metric'].unique())}"
        )
    unknown = sorted(set(models or ()) - set(rows["model"]))
    if unknown:
        raise UserError(f"no model {', '.join(unknown)} has {metric!r}; there are {', '.join(rows['model'].unique())}")
    chosen = list(models) if models is not None else sorted(rows["model"].unique())
    frame = rows.pivot_table(index="dataset", columns="model", values="value", aggfunc="mean").reindex(columns=chosen)
    if failed is not None:
        return frame.fillna(failed)
    gaps = [f"{model} on {dataset}" for dataset, model in frame.isna().stack().loc[lambda gap: gap].index]
    if gaps:
        raise UserError(
            f"{metric} is missing {len(gaps)} times, such as {', '.join(gaps[:3])}: score failures when they happen, "
            "leave these tables out for all models, or pass `failed`"
        )
    return frame


def ranks(
    values: ArrayLike, *, better: Literal["higher", "lower"] = "higher", ties: Literal["average", "min"] = "average"
) -> Array:
    """Ranks [tables, models] of each table's values, 1 the best.

    Ties share the mean of their ranks (Demšar), or the best of them (`min`, which UniPredict reports). Floating point
    makes ties unequal: round the values first where that can happen.
    """
    from scipy.stats import rankdata

    values = _checked_matrix(values)
    if better not in ("higher", "lower"):
        raise UserError(f"better must be 'higher' or 'lower', not {better!r}")
    return rankdata(-values if better == "higher" else values, method=ties, axis=1)


def mean_rank_intervals(rank_matrix: ArrayLike, *, confidence: float = 0.95, seed: int = 0) -> list[Interval]:
    """The mean rank of each model with its bootstrap interval over tables; ranks [tables, models]."""
    return [bootstrap_interval(column, confidence=confidence, seed=seed) for column in _checked_matrix(rank_matrix).T]


@dataclass(frozen=True)
class FriedmanTest:
    """Friedman's chi-square and Iman and Davenport's less conservative F, with their p-values."""

    chi_square: float
    p_value: float
    f_statistic: float
    f_p_value: float


def friedman_test(values: ArrayLike) -> FriedmanTest:
    """Whether all models are alike, from values [N tables, k ≥ 3 models]; ranks that tie are corrected for.

    F = (N - 1) χ² / (N (k - 1) - χ²) has k - 1 and (k - 1)(N - 1) degrees of freedom. Demšar 2006, section 3.2.2.
    """
    from scipy.stats import f, friedmanchisquare

    values = _checked_matrix(values)
    num_tables, num_models = values.shape
    if num_models < 3:
        raise UserError("Friedman's test compares three models or more; compare two by Wilcoxon's test")
    if (values == values[:, :1]).all():
        return FriedmanTest(0.0, 1.0, 0.0, 1.0)
    chi_square, p_value = friedmanchisquare(*values.T)
    rest = num_tables * (num_models - 1) - chi_square
    statistic = (num_tables - 1) * chi_square / rest if rest > 1e-9 else math.inf
    f_p_value = f.sf(statistic, num_models - 1, (num_models - 1) * (num_tables - 1))
    return FriedmanTest(float(chi_square), float(p_value), float(statistic), float(f_p_value))


def critical_difference(num_models: int, num_tables: int, alpha: float = 0.05) -> float:
    """By how much mean ranks of two models must differ (Nemenyi): q_α √(k (k + 1) / (6 N)).

    q_α is the quantile of the studentized range for infinite degrees of freedom over √2. Demšar 2006, section 3.2.2.
    """
    from scipy.stats import studentized_range

    if num_models < 2 or num_tables < 1 or not 0 < alpha < 1:
        raise UserError(
            "a critical difference needs two models, one table and 0 < alpha < 1 "
            f"(given: {num_models}, {num_tables}, {alpha})"
        )
    q = studentized_range.ppf(1 - alpha, num_models, np.inf) / math.sqrt(2)
    return float(q * math.sqrt(num_models * (num_models + 1) / (6 * num_tables)))


@dataclass(frozen=True)
class PairedComparison:
    """Two models over tables: the mean difference first - second and its interval, and Wilcoxon's test.

    `statistic` is the smaller sum of signed ranks, `p_value` two-sided, `adjusted` corrected by Holm over all pairs
    that were compared together.
    """

    first: str
    second: str
    difference: Interval
    wins: int
    ties: int
    losses: int
    statistic: float
    p_value: float
    adjusted: float


def compare_models(
    values: Mapping[str, ArrayLike] | pd.DataFrame, control: str | None = None, *, seed: int = 0
) -> list[PairedComparison]:
    """Wilcoxon's signed-rank tests over tables with Holm's correction, and bootstrap intervals of mean differences.

    `values` maps models to their scores, [tables] each. All pairs are compared, or all models with the `control`
    (which comes first). Differences of 0 are split evenly between both sides (Demšar 2006, section 3.1.3).
    """
    from scipy.stats import wilcoxon

    names = list(values)
    matrix = _checked_matrix(np.column_stack([np.asarray(values[name], dtype=np.float64) for name in names]))
    if control is not None and control not in names:
        raise UserError(f"there is no model {control!r}; there are {', '.join(names)}")
    by_name = dict(zip(names, matrix.T, strict=True))
    others = [name for name in names if name != control]
    pairs = [(control, other) for other in others] if control is not None else list(combinations(names, 2))
    differences = [by_name[first] - by_name[second] for first, second in pairs]
    tests = [wilcoxon(difference, zero_method="zsplit") for difference in differences]
    adjusted = holm([float(test.pvalue) for test in tests])
    return [
        PairedComparison(
            first,
            second,
            paired_bootstrap(difference, seed=seed),
            wins=int((difference > 0).sum()),
            ties=int((difference == 0).sum()),
            losses=int((difference < 0).sum()),
            statistic=float(test.statistic),
            p_value=float(test.pvalue),
            adjusted=float(p_value),
        )
        for (first, second), difference, test, p_value in zip(pairs, differences, tests, adjusted, strict=True)
    ]


def holm(p_values: ArrayLike) -> Array:
    """P-values adjusted for the family-wise error by Holm's step-down procedure (1979), in the order given."""
    values = np.asarray(p_values, dtype=np.float64)
    if values.ndim != 1 or not ((values >= 0) & (values <= 1)).all():
        raise UserError("Holm's correction needs p-values between 0 and 1, in one row")
    order = np.argsort(values, kind="stable")
    adjusted = np.empty(len(values))
    adjusted[order] = np.minimum(np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1)), 1)
    return adjusted


def ratio_over_tables(
    first: ArrayLike,
    second: ArrayLike,
    center: Callable[..., Any] = np.median,
    *,
    confidence: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """center(first) / center(second) with its percentile interval over resampled tables, both [tables] and paired.

    A ratio of medians is UniPredict's relative advantage; ratios of means have `statistics.bootstrap_interval`.
    `UserError` where the second center is not positive, also in a resample.
    """
    from scipy.stats import bootstrap

    pair = _checked_matrix(np.column_stack([first, second])).T
    estimate = _positive(center(pair[1]))
    result = bootstrap(
        (pair[0], pair[1]),
        lambda a, b, axis: center(a, axis=axis) / _positive(center(b, axis=axis)),
        n_resamples=num_resamples,
        confidence_level=confidence,
        method="percentile",
        paired=True,
        vectorized=True,
        rng=np.random.default_rng(seed),
    )
    low, high = result.confidence_interval
    return Interval(float(center(pair[0]) / estimate), float(low), float(high), confidence)


def _positive(center: Any) -> Any:
    if not (np.asarray(center) > 0).all():
        raise UserError("a ratio needs a second model whose scores are positive: compare differences instead")
    return center


def _checked_matrix(values: ArrayLike) -> Array:
    matrix = np.asarray(values, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] < 2 or matrix.shape[1] < 2:
        raise UserError(f"a comparison needs values [tables, models], two of each at least, not shape {matrix.shape}")
    if not np.isfinite(matrix).all():
        raise UserError(
            f"{int((~np.isfinite(matrix)).sum())} values are not finite: give models that failed on a table the score "
            "of a failure, or leave the table out for all"
        )
    return matrix


# ---------------------------------------------------------------------------------------------------- the diagram


def indistinguishable_groups(mean_ranks: Mapping[str, float], cd: float) -> list[tuple[str, ...]]:
    """The largest groups of models, from the best on, in which no two mean ranks differ by `cd` or more."""
    names = sorted(mean_ranks, key=mean_ranks.__getitem__)
    groups: list[tuple[str, ...]] = []
    for start, first in enumerate(names):
        group = tuple(name for name in names[start:] if mean_ranks[name] - mean_ranks[first] < cd)
        if len(group) > 1 and not (groups and set(group) <= set(groups[-1])):
            groups.append(group)
    return groups


def critical_difference_figure(ax: Axes, mean_ranks: Mapping[str, float], cd: float) -> None:
    """Draw Demšar's diagram: models on a scale of mean ranks, best to the left, bars over those that tests cannot tell.

    `cd` comes from `critical_difference`; its length is drawn in the corner. Labels stand in two columns, better half
    on the left.
    """
    if len(mean_ranks) < 2:
        raise UserError(f"a critical-difference diagram needs two models or more (given: {len(mean_ranks)})")
    names = sorted(mean_ranks, key=mean_ranks.__getitem__)
    groups = indistinguishable_groups(mean_ranks, cd)
    left = names[: (len(names) + 1) // 2]
    right = names[len(left) :][::-1]
    lowest, highest = 1, max(len(names), math.ceil(max(mean_ranks.values())))
    bars = 0.35 * len(groups) + 0.4
    depth = bars + 0.8 * max(len(left), len(right))

    ax.set(xlim=(lowest - 0.6, highest + 0.6), ylim=(depth, -1.6))
    ax.axis("off")
    ax.plot([lowest, highest], [0, 0], color="black", linewidth=1)
    for tick in range(lowest, highest + 1):
        ax.plot([tick, tick], [0, -0.15], color="black", linewidth=1)
        ax.text(tick, -0.25, str(tick), ha="center", va="bottom", fontsize="small")
    ax.plot([lowest, lowest + cd], [-1.15, -1.15], color="black", linewidth=1, marker="|")
    ax.text(lowest + cd / 2, -1.2, f"critical difference {cd:.2f}", ha="center", va="bottom", fontsize="small")
    for column, edge, side in ((left, lowest - 0.1, "right"), (right, highest + 0.1, "left")):
        for place, name in enumerate(column):
            rank, height = mean_ranks[name], bars + 0.8 * (place + 0.5)
            ax.plot([rank, rank, edge], [0, height, height], color="black", linewidth=0.8)
            ax.annotate(
                f"{name} ({rank:.2f})",
                (edge, height),
                (-3 if side == "right" else 3, 0),
                textcoords="offset points",
                ha=side,
                va="center",
                fontsize="small",
                annotation_clip=False,
            )
    for number, group in enumerate(groups):
        height = 0.35 * (number + 1)
        ends = [mean_ranks[group[0]] - 0.03, mean_ranks[group[-1]] + 0.03]
        ax.plot(ends, [height, height], color="black", linewidth=3, solid_capstyle="butt")
