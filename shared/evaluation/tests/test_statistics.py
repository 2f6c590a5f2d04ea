from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from shared.evaluation.statistics import (
    Interval,
    benjamini_hochberg,
    bootstrap_interval,
    cohens_d,
    paired_bootstrap,
    paired_effect_size,
    seed_summary,
)


def covers(interval: Interval, value: float) -> bool:
    return interval.low <= value <= interval.high


def test_two_values_by_hand() -> None:
    # Resamples of (0, 1): 0, 1/2, 1/2, 1 with 1/4 each; the 2.5 % and 97.5 % quantiles are the ends.
    plain = bootstrap_interval([0.0, 1.0], widen=False)
    assert (plain.estimate, plain.low, plain.high) == (0.5, 0.0, 1.0)
    # At 40 % confidence the quantiles are at 30 % and 70 %, inside the middle half.
    middle = bootstrap_interval([0.0, 1.0], confidence=0.4, widen=False)
    assert (middle.low, middle.high) == (0.5, 0.5)


def test_three_values_by_hand() -> None:
    # 27 resamples of (0, 3, 6), sums 0, 3, ..., 18 in 1, 3, 6, 7, 6, 3, 1 orders: 1/27 < 10 % < 4/27.
    plain = bootstrap_interval([0.0, 3.0, 6.0], confidence=0.8, widen=False)
    assert plain.low == pytest.approx(1.0)
    assert plain.high == pytest.approx(5.0)
    # Student's t with 2 degrees of freedom at 90 % one-sided, over the normal quantile, times sqrt(3 / 2).
    factor = 1.885618 / 1.281552 * math.sqrt(1.5)
    widened = bootstrap_interval([0.0, 3.0, 6.0], confidence=0.8)
    assert widened.low == pytest.approx(3 - 2 * factor, rel=1e-5)
    assert widened.high == pytest.approx(3 + 2 * factor, rel=1e-5)


def test_agrees_with_scipy() -> None:
    values = np.random.default_rng(1).lognormal(size=40)
    ours = bootstrap_interval(values, widen=False, num_resamples=50_000)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=50_000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert ours.low == pytest.approx(theirs.low, rel=0.01)
    assert ours.high == pytest.approx(theirs.high, rel=0.01)


def test_exact_enumeration_agrees_with_drawing() -> None:
    values = np.random.default_rng(3).normal(size=8)
    exact = bootstrap_interval(values, widen=False)
    drawn = stats.bootstrap(
        (values,), np.mean, n_resamples=100_000, method="percentile", rng=np.random.default_rng(4)
    ).confidence_interval
    assert exact.low == pytest.approx(drawn.low, abs=0.01)
    assert exact.high == pytest.approx(drawn.high, abs=0.01)
    assert exact == bootstrap_interval(values, widen=False, seed=99)


@pytest.mark.parametrize("size", [3, 5, 30])
def test_covers_the_mean_of_normals(size: int) -> None:
    generator = np.random.default_rng(size)
    samples = generator.normal(1.0, 2.0, size=(400, size))
    intervals = [paired_bootstrap(sample, num_resamples=1000) for sample in samples]
    coverage = np.mean([covers(interval, 1.0) for interval in intervals])
    # Three standard errors of a coverage of 95 % are 3.3 points.
    assert 0.91 <= coverage <= 0.985


def test_width_is_that_of_students_interval_on_normals() -> None:
    samples = np.random.default_rng(0).normal(size=(300, 4))
    ours = np.mean([(i.high - i.low) for i in map(paired_bootstrap, samples)])
    students = np.mean(2 * stats.t.ppf(0.975, 3) * samples.std(axis=1, ddof=1) / 2)
    assert ours == pytest.approx(students, rel=0.1)


def test_crossed_interval_counts_shared_items_once() -> None:
    # Items differ a lot, seeds not at all: more seeds on the same items are no new evidence.
    items = np.random.default_rng(5).normal(size=50)
    one = paired_bootstrap(items)
    many = paired_bootstrap(np.tile(items, (4, 1)))
    assert many.estimate == pytest.approx(one.estimate)
    assert many.high - many.low == pytest.approx(one.high - one.low, rel=0.05)


def test_crossed_interval_covers() -> None:
    generator = np.random.default_rng(6)
    hits = []
    for _ in range(150):
        values = generator.normal(size=(4, 1)) + generator.normal(size=(1, 30)) + generator.normal(size=(4, 30))
        hits.append(covers(paired_bootstrap(values, num_resamples=500), 0.0))
    assert np.mean(hits) >= 0.88


def test_one_seed_with_items_is_a_row_of_items() -> None:
    values = np.random.default_rng(7).normal(size=20)
    assert paired_bootstrap(values[None]) == paired_bootstrap(values)


def test_ratio_of_exact_multiples_has_no_width() -> None:
    denominator = np.array([1.0, 2.0, 4.0])
    interval = bootstrap_interval(3 * denominator, denominator)
    assert (interval.estimate, interval.low, interval.high) == pytest.approx((3.0, 3.0, 3.0))


def test_ratio_is_the_same_upside_down() -> None:
    generator = np.random.default_rng(8)
    a, b = generator.lognormal(size=12), generator.lognormal(size=12)
    ratio, inverse = bootstrap_interval(a, b), bootstrap_interval(b, a)
    assert ratio.estimate == pytest.approx(a.mean() / b.mean())
    assert (ratio.low, ratio.high) == pytest.approx((1 / inverse.high, 1 / inverse.low))


def test_blocks_widen_the_interval_of_overlapping_windows() -> None:
    # A moving sum of 10: neighbors share nine tenths, the variance of the mean is that of white noise.
    noise = np.random.default_rng(9).normal(size=1009)
    windows = np.convolve(noise, np.ones(10) / 10, mode="valid")
    naive = bootstrap_interval(windows)
    blocks = bootstrap_interval(windows, block_length=50)
    expected = 2 * 1.96 / math.sqrt(len(windows))
    assert naive.high - naive.low < 0.5 * expected
    assert blocks.high - blocks.low == pytest.approx(expected, rel=0.25)


def test_block_of_all_values_but_rotation_keeps_the_mean() -> None:
    # Two blocks of half the values each: every resample of a constant is that constant.
    interval = bootstrap_interval(np.full(20, 2.0), block_length=10)
    assert (interval.estimate, interval.low, interval.high) == (2.0, 2.0, 2.0)


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ([1.0], {}, "at least two"),
        ([1.0, math.nan], {}, "finite"),
        ([1.0, 2.0], {"denominator": [1.0, 2.0, 3.0]}, "paired"),
        ([1.0, 2.0], {"denominator": [1.0, 0.0]}, "positive"),
        ([1.0, 2.0], {"confidence": 95}, "confidence"),
        ([1.0, 2.0, 3.0, 4.0], {"block_length": 3}, "block_length"),
        (np.ones((3, 4)), {"block_length": 2}, "blocks"),
    ],
)
def test_refuses(values: list[float], options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(values, **options)


def test_effect_sizes_by_hand() -> None:
    # Means 2 and 4, both variances 1.
    assert cohens_d([1, 2, 3], [3, 4, 5]) == pytest.approx(-2.0)
    # Differences 1, 2, 3: mean 2, standard deviation 1.
    assert paired_effect_size([1, 2, 3]) == pytest.approx(2.0)
    assert paired_effect_size([2, 2, 2]) == math.inf
    assert paired_effect_size([0, 0]) == 0.0
    with pytest.raises(ValueError, match="two"):
        cohens_d([1], [1, 2])


def test_seed_summary_by_hand() -> None:
    summary = seed_summary([2, 4, 9])
    assert (summary.mean, summary.min, summary.max, summary.count) == (5, 2, 9, 3)
    assert summary.sd == pytest.approx(math.sqrt(13))
    assert math.isnan(seed_summary([1.0]).sd)
    with pytest.raises(ValueError, match="no values"):
        seed_summary([])


def test_benjamini_hochberg_by_hand() -> None:
    # p (3 / rank) from the largest down: 0.04 · 3/3, then min(0.04, 0.03 · 3/2), then min(0.04, 0.005 · 3).
    assert benjamini_hochberg([0.03, 0.005, 0.04]) == pytest.approx([0.04, 0.015, 0.04])
    assert benjamini_hochberg([0.2]) == pytest.approx([0.2])


def test_benjamini_hochberg_is_the_smallest_level_of_the_step_up_procedure() -> None:
    p_values = np.random.default_rng(11).uniform(size=9) ** 2
    adjusted = benjamini_hochberg(p_values)
    for alpha in np.linspace(0.01, 0.99, 99):
        # The definition: reject the k smallest, k the largest rank with p_(k) <= α k / m.
        below = np.sort(p_values) <= alpha * np.arange(1, 10) / 9
        rejected = below.nonzero()[0].max(initial=-1) + 1
        assert set(np.argsort(p_values)[:rejected]) == set((adjusted <= alpha).nonzero()[0])


@pytest.mark.parametrize("p_values", [[0.5, 1.2], [math.nan], [], [[0.1]]])
def test_benjamini_hochberg_refuses(p_values: list) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        benjamini_hochberg(p_values)
