from __future__ import annotations

import math
import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from shared.config import UserError
from shared.evaluation.tabular import (
    NO_ANSWER,
    classification_scores,
    compare_models,
    critical_difference,
    critical_difference_figure,
    expected_calibration_error,
    fit_predict_proba,
    friedman_test,
    holm,
    indistinguishable_groups,
    mean_rank_intervals,
    normalized_probabilities,
    ranks,
    ratio_over_tables,
    reliability_bins,
    scores_by_table,
)

# Demšar 2006, table 6: AUC of four variants of C4.5 on 14 data sets.
VARIANTS = ("C4.5", "C4.5+m", "C4.5+cf", "C4.5+m+cf")
AUC = np.array(
    [
        [0.763, 0.768, 0.771, 0.798],
        [0.599, 0.591, 0.590, 0.569],
        [0.954, 0.971, 0.968, 0.967],
        [0.628, 0.661, 0.654, 0.657],
        [0.882, 0.888, 0.886, 0.898],
        [0.936, 0.931, 0.916, 0.931],
        [0.661, 0.668, 0.609, 0.685],
        [0.583, 0.583, 0.563, 0.625],
        [0.775, 0.838, 0.866, 0.875],
        [1.000, 1.000, 1.000, 1.000],
        [0.940, 0.962, 0.965, 0.962],
        [0.619, 0.666, 0.614, 0.669],
        # Printed as 0.975 both; the published mean ranks, of figures before rounding, put the first of them ahead.
        [0.972, 0.981, 0.9751, 0.975],
        [0.957, 0.978, 0.946, 0.970],
    ]
)


# --- One table --------------------------------------------------------------------------------------------------------


def test_scores_by_hand() -> None:
    labels = [0, 0, 0, 1]
    probabilities = [[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.3, 0.7]]
    scores = classification_scores(labels, probabilities)
    assert scores["accuracy"] == 3 / 4
    assert scores["balanced_accuracy"] == pytest.approx((2 / 3 + 1) / 2)
    assert scores["macro_f1"] == pytest.approx((2 * 1 * (2 / 3) / (1 + 2 / 3) + 2 * 0.5 * 1 / 1.5) / 2)
    # The row of class 1 stands above two of the three of class 0.
    assert scores["auc"] == pytest.approx(2 / 3)
    assert scores["brier"] == pytest.approx(2 * (0.1**2 + 0.4**2 + 0.8**2 + 0.3**2) / 4)
    assert scores["calibration_error"] == pytest.approx((0.1 + 0.4 + 0.8 + 0.3) / 4)
    assert scores["unanswered"] == 0


def test_no_answer_is_wrong_and_counted() -> None:
    written = [[0.9, 0.1], [math.nan, math.nan], [0.1, 0.9]]
    scores = classification_scores([0, 0, 1], written, [0, NO_ANSWER, 1])
    assert scores["accuracy"] == pytest.approx(2 / 3)
    assert scores["balanced_accuracy"] == pytest.approx((1 / 2 + 1) / 2)
    assert scores["unanswered"] == pytest.approx(1 / 3)
    assert scores["brier"] == pytest.approx((0.02 + 0.5 + 0.02) / 3)


def test_classes_absent_from_test_or_training_are_no_crash() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Class 1 is not among the labels, but is predicted once.
        scores = classification_scores([0, 0, 2], [[0.6, 0.2, 0.2], [0.1, 0.8, 0.1], [0.0, 0.1, 0.9]])
        assert scores["balanced_accuracy"] == pytest.approx((1 / 2 + 1) / 2)
        assert scores["auc"] == 1
        one = classification_scores([1, 1], [[0.1, 0.9], [0.6, 0.4]])
        assert math.isnan(one.pop("auc"))
        assert all(math.isfinite(value) for value in one.values())


def test_multiclass_auc_is_the_mean_over_pairs() -> None:
    generator = np.random.default_rng(0)
    labels, probabilities = np.repeat([0, 1, 2], 10), generator.dirichlet([1, 1, 1], 30)

    def above(i: int, j: int) -> float:
        """P(a row of class i has more of p_i than a row of class j), Hand & Till's A(i | j)."""
        return float((probabilities[labels == i, i][:, None] > probabilities[labels == j, i]).mean())

    expected = np.mean([(above(i, j) + above(j, i)) / 2 for i, j in ((0, 1), (0, 2), (1, 2))])
    assert classification_scores(labels, probabilities)["auc"] == pytest.approx(expected)


def test_written_probabilities_are_normalized() -> None:
    written = [[0.33, 0.33, 0.33], [2, 1, 1], [0, 0, 0], [math.nan, 1, 0], [-1, 1, 1], [math.inf, 0, 0]]
    result = normalized_probabilities(written)
    np.testing.assert_allclose(result[1], [0.5, 0.25, 0.25])
    np.testing.assert_allclose(np.delete(result, 1, axis=0), 1 / 3)


def test_reliability_by_hand() -> None:
    # Of 10 rows at 0.8, 6 are right; of 5 at 0.6, all are.
    probabilities = [[0.8, 0.2]] * 10 + [[0.6, 0.4]] * 5
    labels = [0] * 6 + [1] * 4 + [0] * 5
    bins = reliability_bins(labels, probabilities, num_bins=5)
    assert bins.count.tolist() == [0, 0, 5, 10, 0]
    np.testing.assert_allclose(bins.confidence, [math.nan, math.nan, 0.6, 0.8, math.nan])
    np.testing.assert_allclose(bins.accuracy, [math.nan, math.nan, 1.0, 0.6, math.nan])
    np.testing.assert_allclose(bins.edges, [0, 0.2, 0.4, 0.6, 0.8, 1])
    assert bins.calibration_error == pytest.approx((10 * 0.2 + 5 * 0.4) / 15)


@given(st.integers(2, 20), st.integers(0, 20))
@settings(max_examples=50, deadline=None)
def test_confidence_on_an_edge_belongs_to_the_bin_below(num_bins: int, edge: int) -> None:
    confidence = max(min(edge, num_bins) / num_bins, 0.5)
    count = reliability_bins([0], [[confidence, 1 - confidence]], num_bins).count
    assert int(count.argmax()) == math.ceil(round(confidence * num_bins, 6)) - 1


def test_sure_and_right_is_calibrated_sure_and_wrong_is_not() -> None:
    assert expected_calibration_error([0, 1], [[1, 0], [0, 1]]) == 0
    assert expected_calibration_error([1, 0], [[1, 0], [0, 1]]) == 1


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 3], "between 0 and 1 for 2 classes"),
        ([0, -1], "between 0 and 1"),
        ([0], r"\[2\], not int64 of shape \(1,\)"),
        ([0.0, 1.0], "whole numbers"),
        ([], "whole numbers"),
    ],
)
def test_bad_labels(labels: list, message: str) -> None:
    with pytest.raises(UserError, match=message):
        classification_scores(labels, [[0.5, 0.5]] * 2)


def test_bad_probabilities_and_bins() -> None:
    with pytest.raises(UserError, match=r"\[rows, classes\]"):
        classification_scores([0, 1], [0.5, 0.5])
    with pytest.raises(UserError, match="one bin"):
        reliability_bins([0], [[1, 0]], num_bins=0)


def test_fit_knows_all_classes() -> None:
    generator = np.random.default_rng(0)
    labels = np.repeat([1, 3], 20)
    inputs = generator.normal(labels[:, None], 0.1, size=(40, 2))
    probabilities = fit_predict_proba(LogisticRegression(), inputs, labels, inputs, 5)
    assert probabilities.shape == (40, 5)
    assert (probabilities.argmax(axis=1) == labels).all()
    assert not probabilities[:, [0, 2, 4]].any()
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    # Logistic regression itself refuses one class.
    alone = fit_predict_proba(LogisticRegression(), inputs[:3], labels[:3], inputs, 5)
    assert (alone == [0, 1, 0, 0, 0]).all()


# --- Over tables ------------------------------------------------------------------------------------------------------


def tidy(rows: list[tuple[str, str, float]]) -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=["model", "dataset", "value"])
    return frame.assign(metric="accuracy", seed=frame.groupby(["model", "dataset"]).cumcount())


def test_scores_by_table() -> None:
    scores = tidy([("b", "t1", 0.5), ("b", "t1", 0.7), ("a", "t1", 0.4), ("a", "t2", 0.3), ("b", "t2", math.nan)])
    with pytest.raises(UserError, match="missing 1 times, such as b on t2"):
        scores_by_table(scores, "accuracy")
    frame = scores_by_table(scores, "accuracy", ["b", "a"], failed=0.0)
    assert list(frame.columns) == ["b", "a"]
    np.testing.assert_allclose(frame.loc[["t1", "t2"]], [[0.6, 0.4], [0.0, 0.3]])
    with pytest.raises(UserError, match="no metric 'auc' in the scores; there are accuracy"):
        scores_by_table(scores, "auc")
    with pytest.raises(UserError, match="no model c"):
        scores_by_table(scores, "accuracy", ["a", "c"])


def test_ranks_and_ties() -> None:
    values = [[0.9, 0.8, 0.9], [0.1, 0.2, 0.3]]
    assert ranks(values).tolist() == [[1.5, 3, 1.5], [3, 2, 1]]
    assert ranks(values, ties="min").tolist() == [[1, 3, 1], [3, 2, 1]]
    assert ranks(values, better="lower").tolist() == [[2.5, 1, 2.5], [1, 2, 3]]


def test_mean_ranks_of_the_worked_example() -> None:
    matrix = ranks(AUC)
    np.testing.assert_allclose(matrix.mean(axis=0), [3.143, 2.000, 2.893, 1.964], atol=5e-4)
    intervals = mean_rank_intervals(matrix)
    assert [interval.estimate for interval in intervals] == matrix.mean(axis=0).tolist()
    assert all(1 <= interval.low < interval.estimate < interval.high <= 4 for interval in intervals)


def test_friedman_of_the_worked_example() -> None:
    mean_ranks = ranks(AUC).mean(axis=0)
    plain = 12 * 14 / (4 * 5) * ((mean_ranks**2).sum() - 4 * 5**2 / 4)
    assert plain == pytest.approx(9.28, abs=5e-3)
    # Three ties of two and one of four: Σ(t³ - t) = 78 over N k (k² - 1) = 840.
    expected = plain / (1 - 78 / 840)
    result = friedman_test(AUC)
    assert result.chi_square == pytest.approx(expected)
    assert result.f_statistic == pytest.approx(13 * expected / (14 * 3 - expected))
    assert result.f_p_value < result.p_value < 0.05


def test_friedman_at_its_ends() -> None:
    same = friedman_test(np.ones((5, 3)))
    assert (same.chi_square, same.p_value, same.f_p_value) == (0, 1, 1)
    perfect = friedman_test(np.tile([1.0, 2.0, 3.0], (6, 1)))
    assert perfect.chi_square == pytest.approx(12)
    assert (perfect.f_statistic, perfect.f_p_value) == (math.inf, 0)


def test_critical_difference_of_the_worked_example() -> None:
    # Demšar 2006, table 5a and section 3.2.2.
    q = [critical_difference(k, 1) / math.sqrt(k * (k + 1) / 6) for k in range(2, 11)]
    np.testing.assert_allclose(q, [1.960, 2.343, 2.569, 2.728, 2.850, 2.949, 3.031, 3.102, 3.164], atol=2e-3)
    assert critical_difference(4, 14) == pytest.approx(1.25, abs=5e-3)
    assert critical_difference(4, 14, alpha=0.10) == pytest.approx(1.12, abs=5e-3)


def test_wilcoxon_of_the_worked_example() -> None:
    # Demšar 2006, table 2: R+ = 93 and R- = 12, which at 14 data sets is significant at 0.05 (below 21).
    comparison = compare_models(dict(zip(VARIANTS, AUC.T, strict=True)), control="C4.5+m")[0]
    assert (comparison.first, comparison.second) == ("C4.5+m", "C4.5")
    assert comparison.statistic == 12
    assert comparison.p_value < 0.05
    assert (comparison.wins, comparison.ties, comparison.losses) == (10, 2, 2)
    assert comparison.difference.estimate == pytest.approx((AUC[:, 1] - AUC[:, 0]).mean())
    assert comparison.difference.low > 0


def test_all_pairs_are_compared_and_corrected() -> None:
    comparisons = compare_models(pd.DataFrame(AUC, columns=VARIANTS))
    assert len(comparisons) == 6
    assert [c.adjusted for c in comparisons] == holm([c.p_value for c in comparisons]).tolist()
    with pytest.raises(UserError, match="no model 'C5'"):
        compare_models({"a": [1, 2], "b": [2, 3]}, control="C5")


def test_models_that_are_equal_everywhere_do_not_differ() -> None:
    (same,) = compare_models({"a": [0.5] * 6, "b": [0.5] * 6})
    assert (same.p_value, same.ties) == (1, 6)


def test_holm_by_hand() -> None:
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]).tolist() == [1, 1]
    assert holm([]).tolist() == []
    with pytest.raises(UserError, match="between 0 and 1"):
        holm([0.1, math.nan])


def test_ratio_of_medians() -> None:
    generator = np.random.default_rng(1)
    second = generator.uniform(0.4, 0.9, 60)
    interval = ratio_over_tables(1.1 * second, second)
    # A ratio that is the same on every table is known exactly.
    np.testing.assert_allclose([interval.estimate, interval.low, interval.high], 1.1)
    first = second + generator.normal(0, 0.1, 60)
    noisy = ratio_over_tables(first, second)
    assert noisy.low < noisy.estimate < noisy.high
    assert noisy.estimate == np.median(first) / np.median(second)
    assert noisy == ratio_over_tables(first, second), "a seed fixes the resamples"
    with pytest.raises(UserError, match="positive"):
        ratio_over_tables([1.0, 2.0], [0.0, 0.0])


@pytest.mark.parametrize("values", [[[1, 2]], [[1], [2]], [1, 2, 3], [[1, math.nan], [1, 2]]])
def test_bad_values_over_tables(values: list) -> None:
    with pytest.raises(UserError, match=r"not shape|not finite"):
        ranks(values)


def test_bad_comparisons() -> None:
    with pytest.raises(UserError, match="three models or more"):
        friedman_test([[1, 2], [2, 1]])
    with pytest.raises(UserError, match="0 < alpha < 1"):
        critical_difference(3, 10, alpha=1.5)
    with pytest.raises(UserError, match="'higher' or 'lower'"):
        ranks([[1, 2], [2, 1]], better="larger")


# --- The diagram ------------------------------------------------------------------------------------------------------


def test_groups_by_hand() -> None:
    assert indistinguishable_groups({"d": 4.0, "a": 1.0, "c": 2.2, "b": 1.5}, 1.0) == [("a", "b"), ("b", "c")]
    assert indistinguishable_groups({"a": 1.0, "b": 1.4, "c": 1.8}, 1.0) == [("a", "b", "c")]
    assert indistinguishable_groups({"a": 1.0, "b": 2.0}, 1.0) == []
    worked = dict(zip(VARIANTS, ranks(AUC).mean(axis=0), strict=True))
    assert len(indistinguishable_groups(worked, critical_difference(4, 14))) == 1
    assert indistinguishable_groups(worked, critical_difference(4, 14, 0.10))[0] == ("C4.5+m+cf", "C4.5+m", "C4.5+cf")


def test_diagram_names_every_model_and_draws_every_group() -> None:
    from matplotlib.figure import Figure

    ax = Figure().subplots()
    critical_difference_figure(ax, {"a": 1.2, "b": 1.8, "c": 3.0}, 0.9)
    texts = " ".join(text.get_text() for text in ax.texts)
    assert all(label in texts for label in ("a (1.20)", "b (1.80)", "c (3.00)", "critical difference 0.90"))
    assert sum(line.get_linewidth() == 3 for line in ax.lines) == 1
    with pytest.raises(UserError, match="two models"):
        critical_difference_figure(ax, {"a": 1.0}, 0.9)


def test_import_is_light() -> None:
    heavy = "{'sklearn', 'pandas', 'matplotlib', 'torch'}"
    code = f"import sys, shared.evaluation.tabular; print(*{heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
