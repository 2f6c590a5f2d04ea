"""Intervals, effect sizes and summaries for a few seeds or many test items.

**The interval.** All intervals are bootstrap percentile intervals, widened for small samples. The plain percentile
interval is too narrow when there are few values: its quantiles stay inside the range of the data, and three seeds that
agree in sign, which happens by chance one time in four, would always exclude zero. Hesterberg (2015, "What teachers
should know about the bootstrap") names the two causes: a bootstrap standard error is short by
sqrt((n-1)/n), and normal quantiles stand where Student's t should. Both factors are known, so the percentile interval
is stretched about the estimate by t(n-1)/z * sqrt(n/(n-1)): 2.7 for three values, 1.6 for five, 1.1 for thirty, 1 in
the limit. It keeps the asymmetry of the bootstrap distribution, and on normal data it has the width of Student's
interval. BCa is no remedy here: it moves quantiles, but cannot move them outside of the data.

**Two levels.** A matrix [seeds, items] holds several trained models scored on the same test items. Seeds and items are
then crossed, and both are resampled (Owen 2007, "The pigeonhole bootstrap"): resampling items within each seed would
count one hard item as independent evidence once a seed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations_with_replacement
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit

Array = NDArray[np.float64]

# Multisets of n out of n: 6,435 for n = 8. All are weighed exactly, so that few seeds bring no Monte Carlo noise.
MAX_ENUMERATED = 8
# Weights held in memory at once when resampling, in numbers (16 MB).
CHUNK = 2_000_000


@dataclass(frozen=True)
class Interval:
    """An estimate and its confidence interval."""

    estimate: float
    low: float
    high: float
    confidence: float = 0.95


@dataclass(frozen=True)
class SeedSummary:
    """Mean, sample standard deviation (nan for one value), extremes and count of a metric over seeds."""

    mean: float
    sd: float
    min: float
    max: float
    count: int


def paired_bootstrap(
    differences: ArrayLike, confidence: float = 0.95, num_resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Interval of the mean of paired differences, [n] (one a seed or item) or [seeds, items] (crossed).

    The difference is real at this confidence where the interval excludes zero.
    """
    return bootstrap_interval(differences, confidence=confidence, num_resamples=num_resamples, seed=seed)


def bootstrap_interval(
    values: ArrayLike,
    denominator: ArrayLike | None = None,
    *,
    confidence: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
    block_length: int = 1,
    widen: bool = True,
) -> Interval:
    """Interval of mean(values), or of mean(values) / mean(denominator) where the two are paired.

    `values` are [n] or [seeds, items]; up to eight values are enumerated exactly, more are resampled `num_resamples`
    times from `seed`. A ratio is treated on the log scale, so both sides must be positive. `block_length` > 1 resamples
    circular blocks of neighbors ([n] only), for windows that overlap: give it the number of windows that share data.
    `widen=False` gives the plain percentile interval (see the module's text). ValueError for fewer than two values,
    values that are not finite, or shapes that do not agree.
    """
    samples = _checked(values, denominator)
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, not {confidence}")
    num_values = samples.shape[-1]
    if block_length != 1 and not 2 <= block_length <= num_values // 2:
        raise ValueError(f"block_length must be 1, or between 2 and half the number of values, {num_values // 2}")
    if block_length > 1 and samples.ndim > 2:
        raise ValueError("blocks are defined for one row of values, not for a matrix of seeds and items")

    if samples.ndim == 3:
        means, probabilities = _crossed_means(samples, num_resamples, seed), None
    elif block_length > 1:
        means, probabilities = _block_means(samples, block_length, num_resamples, seed), None
    elif num_values <= MAX_ENUMERATED:
        weights, probabilities = _all_resamples(num_values)
        means = samples @ weights.T
    else:
        means, probabilities = _resampled_means(samples, num_resamples, seed), None

    estimates = samples.reshape(len(samples), -1).mean(axis=1)
    tail = (1 - confidence) / 2
    if denominator is None:
        center, resampled, influence = float(estimates[0]), means[0], samples[0]
    else:
        center, resampled = math.log(estimates[0] / estimates[1]), np.log(means[0] / means[1])
        # First-order effect of each value on the log ratio: gives the levels their shares in the small-sample factor.
        influence = samples[0] / estimates[0] - samples[1] / estimates[1]
    low, high = _quantiles(resampled, probabilities, [tail, 1 - tail])
    factor = _small_sample_factor(influence, block_length, tail) if widen else 1.0
    bounds = (center, center - factor * (center - low), center + factor * (high - center))
    if denominator is not None:
        bounds = tuple(math.exp(bound) for bound in bounds)
    return Interval(*bounds, confidence=confidence)


def cohens_d(first: ArrayLike, second: ArrayLike) -> float:
    """Cohen's d of two independent samples: difference of means over the pooled standard deviation."""
    a, b = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if min(a.size, b.size) < 2:
        raise ValueError("Cohen's d needs at least two values on each side")
    pooled = ((a.size - 1) * a.var(ddof=1) + (b.size - 1) * b.var(ddof=1)) / (a.size + b.size - 2)
    return _standardized(a.mean() - b.mean(), math.sqrt(pooled))


def paired_effect_size(differences: ArrayLike) -> float:
    """Cohen's d_z of paired differences: their mean over their standard deviation."""
    values = np.asarray(differences, dtype=float)
    if values.size < 2:
        raise ValueError("an effect size needs at least two differences")
    return _standardized(values.mean(), values.std(ddof=1))


def benjamini_hochberg(p_values: ArrayLike) -> Array:
    """P-values adjusted for the false discovery rate (Benjamini and Hochberg 1995), in the order given.

    Below a level of α lie those that are significant while at most α of such findings are expected to be false.
    """
    from scipy.stats import false_discovery_control

    values = np.asarray(p_values, dtype=np.float64)
    if values.ndim != 1 or values.size == 0 or not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"the adjustment needs p-values between 0 and 1, in one row (given: {p_values})")
    return false_discovery_control(values, method="bh")


def seed_summary(values: ArrayLike) -> SeedSummary:
    """Mean, standard deviation, minimum, maximum and count of the values of several seeds."""
    array = np.asarray(values, dtype=float).ravel()
    if array.size == 0:
        raise ValueError("there is nothing to summarize: no values")
    sd = float(array.std(ddof=1)) if array.size > 1 else math.nan
    return SeedSummary(float(array.mean()), sd, float(array.min()), float(array.max()), array.size)


def _standardized(difference: float, sd: float) -> float:
    if sd == 0:
        return math.copysign(math.inf, difference) if difference else 0.0
    return float(difference / sd)


def _checked(values: ArrayLike, denominator: ArrayLike | None) -> Array:
    """The sides of the statistic stacked, [sides, n] or [sides, seeds, items]."""
    sides = [np.asarray(side, dtype=np.float64) for side in (values, denominator) if side is not None]
    if len({side.shape for side in sides}) != 1:
        raise ValueError(f"numerator and denominator must be paired, not of shapes {sides[0].shape}, {sides[1].shape}")
    samples = np.stack(sides)
    if samples.ndim == 3 and 1 in samples.shape[1:]:
        samples = samples.reshape(len(sides), -1)
    if samples.ndim not in (2, 3) or samples.shape[-1] < 2:
        raise ValueError(f"an interval needs at least two values, [n] or [seeds, items], not shape {sides[0].shape}")
    if not np.isfinite(samples).all():
        raise ValueError("an interval needs finite values; leave out or report those that are not")
    if denominator is not None and (samples <= 0).any():
        raise ValueError("a ratio of means needs positive values on both sides")
    return samples


@lru_cache
def _all_resamples(num_values: int) -> tuple[Array, Array]:
    """Every distinct resample of n values: its weights, [resamples, n], and its probability, [resamples]."""
    chosen = np.array(list(combinations_with_replacement(range(num_values), num_values)))
    counts = (chosen[:, :, None] == np.arange(num_values)).sum(axis=1)
    factorials = np.array([math.factorial(count) for count in range(num_values + 1)], dtype=float)
    orders = factorials[num_values] / factorials[counts].prod(axis=1)
    return counts / num_values, orders / float(num_values) ** num_values


def _resampled_means(samples: Array, num_resamples: int, seed: int) -> Array:
    """Means over resampled values, [sides, n] -> [sides, resamples]."""
    generator = np.random.default_rng(seed)
    size = samples.shape[1]
    chunks = [samples @ _draw(generator, size, rows).T for rows in _chunks(num_resamples, size)]
    return np.concatenate(chunks, axis=1)


def _crossed_means(samples: Array, num_resamples: int, seed: int) -> Array:
    """Means over resampled seeds and resampled items, [sides, seeds, items] -> [sides, resamples]."""
    generator = np.random.default_rng(seed)
    _, num_seeds, num_items = samples.shape
    chunks = []
    for rows in _chunks(num_resamples, num_items):
        over_seeds = np.einsum("rs,ksi->kri", _draw(generator, num_seeds, rows), samples)
        chunks.append(np.einsum("kri,ri->kr", over_seeds, _draw(generator, num_items, rows)))
    return np.concatenate(chunks, axis=1)


def _block_means(samples: Array, block_length: int, num_resamples: int, seed: int) -> Array:
    """Means over circular blocks of neighbors, [sides, n] -> [sides, resamples]."""
    generator = np.random.default_rng(seed)
    size = samples.shape[1]
    num_blocks = -(-size // block_length)
    chunks = []
    for rows in _chunks(num_resamples, size):
        starts = generator.integers(size, size=(rows, num_blocks, 1))
        indices = ((starts + np.arange(block_length)) % size).reshape(rows, -1)[:, :size]
        chunks.append(samples[:, indices].mean(axis=2))
    return np.concatenate(chunks, axis=1)


def _draw(generator: np.random.Generator, size: int, rows: int) -> Array:
    """Weights of `rows` resamples of `size` values, [rows, size]."""
    return generator.multinomial(size, np.full(size, 1 / size), size=rows) / size


def _chunks(num_resamples: int, size: int) -> list[int]:
    rows = max(1, min(num_resamples, CHUNK // size))
    full, rest = divmod(num_resamples, rows)
    return [rows] * full + ([rest] if rest else [])


def _quantiles(values: Array, probabilities: Array | None, levels: list[float]) -> Array:
    """Quantiles of resampled statistics: interpolated when drawn, the inverse distribution function when enumerated."""
    if probabilities is None:
        return np.quantile(values, levels)
    order = np.argsort(values)
    cumulative = np.cumsum(probabilities[order])
    # Rounding must not push a level over a step of the distribution.
    positions = np.searchsorted(cumulative, np.asarray(levels) - 1e-12)
    return values[order][np.minimum(positions, len(values) - 1)]


def _small_sample_factor(values: Array, block_length: int, tail: float) -> float:
    """By how much the percentile interval of a mean is too short (see the module's text).

    With seeds and items, degrees of freedom and variance deficit follow from each level's share in the variance of the
    mean (Satterthwaite). With blocks, the number of blocks counts.
    """
    levels = [values] if values.ndim == 1 else [values.mean(axis=1), values.mean(axis=0)]
    sizes = np.array([len(level) / block_length for level in levels])
    variances = np.array([level.var(ddof=1) for level in levels]) / sizes
    total = variances.sum()
    if total == 0:
        return 1.0
    degrees = total**2 / (variances**2 / (sizes - 1)).sum()
    deficit = total / (variances * (sizes - 1) / sizes).sum()
    return float(stdtrit(degrees, 1 - tail) / NormalDist().inv_cdf(1 - tail) * math.sqrt(deficit))
