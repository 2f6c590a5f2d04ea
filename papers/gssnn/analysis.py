"""Statistics of populations: how much accuracies vary, what they vary with, and what training accuracy tells."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from shared.evaluation.statistics import Interval

Array = NDArray[np.float64]

# What a network's evaluation accuracy varies with; the interaction is that of graph and training set.
COMPONENTS = ("graph", "training_set", "interaction", "seed")
DRAWS = 20_000


def correlation(x: Array, y: Array) -> float:
    """Pearson's r; 0 where one of the two does not vary, and so tells nothing."""
    x, y = x - x.mean(), y - y.mean()
    scale = math.sqrt(float((x**2).sum() * (y**2).sum()))
    # Accuracies are multiples of 1/n: what varies by less than that is rounding.
    return float((x * y).sum() / scale) if scale > 1e-12 else 0.0


def expected_maximum(values: Array, count: int) -> float:
    """The expected greatest of `count` values drawn without replacement.

    The i-th smallest of n is the greatest of those drawn with probability C(i − 1, count − 1) / C(n, count). It makes
    bests of populations of different sizes comparable.
    """
    n = len(values)
    weights = np.array([math.comb(i, count - 1) for i in range(n)], dtype=float) / math.comb(n, count)
    return float(weights @ np.sort(values))


def halves(train: Array, values: Array) -> tuple[float, float]:
    """Means of `values` over the upper half by training accuracy and over the rest; of equal ones the earlier is ahead.

    The middle one of an odd number belongs to the upper half.
    """
    order = np.argsort(-train, kind="stable")
    upper = (len(train) + 1) // 2
    return float(values[order[:upper]].mean()), float(values[order[upper:]].mean())


def graph_share(values: Array) -> float:
    """The share of the variance between graphs, of values `[graphs, seeds]` on the same puzzles.

    The intraclass correlation of a one-way layout, (MSB − MSW) / (MSB + (S − 1) MSW): unbiased, so it can be below 0.
    """
    graphs, seeds = values.shape
    between = seeds * values.mean(axis=1).var(ddof=1)
    within = ((values - values.mean(axis=1, keepdims=True)) ** 2).sum() / (graphs * (seeds - 1))
    total = between + (seeds - 1) * within
    return float((between - within) / total) if total > 0 else 0.0


@dataclass(frozen=True)
class Component:
    """A variance component: its standard deviation and its share of the total variance."""

    sd: Interval
    share: Interval


def variance_components(values: Array, seed: int = 0) -> dict[str, Component]:
    """Graph, training set, their interaction and seed in values `[graphs, training sets, seeds]`, 95 % intervals.

    A balanced two-way layout of random effects with replication: components from the mean squares, negative estimates
    at 0. Intervals are generalized confidence intervals (Weerahandi 1993): every mean square is replaced by draws of
    df · MS / χ²(df), so they are as wide as the few training sets make them.
    """
    graphs, sets, seeds = values.shape
    if min(graphs, sets, seeds) < 2:
        raise ValueError(f"two graphs, training sets and seeds at least are needed, not {values.shape}")
    cells = values.mean(axis=2)
    by_graph, by_set, mean = cells.mean(axis=1), cells.mean(axis=0), cells.mean()
    left = cells - by_graph[:, None] - by_set + mean
    sums = np.array(
        [
            sets * seeds * ((by_graph - mean) ** 2).sum(),
            graphs * seeds * ((by_set - mean) ** 2).sum(),
            seeds * (left**2).sum(),
            ((values - cells[..., None]) ** 2).sum(),
        ]
    )
    freedom = np.array([graphs - 1, sets - 1, (graphs - 1) * (sets - 1), graphs * sets * (seeds - 1)])

    def components(squares: Array) -> Array:
        """From mean squares [..., 4] to variances [..., 4]."""
        graph, training_set, interaction, error = np.moveaxis(squares, -1, 0)
        parts = [
            (graph - interaction) / (sets * seeds),
            (training_set - interaction) / (graphs * seeds),
            (interaction - error) / seeds,
            error,
        ]
        return np.stack([np.maximum(part, 0) for part in parts], axis=-1)

    estimates = components(sums / freedom)
    draws = components(sums / stats.chi2.rvs(freedom, size=(DRAWS, 4), random_state=np.random.default_rng(seed)))

    def shares(variances: Array) -> Array:
        total = variances.sum(axis=-1, keepdims=True)
        return np.divide(variances, total, out=np.zeros_like(variances), where=total > 0)

    found = {}
    for index, name in enumerate(COMPONENTS):
        sd, share = (
            Interval(float(estimate[index]), *map(float, np.quantile(drawn[:, index], [0.025, 0.975])))
            for estimate, drawn in (
                (np.sqrt(estimates), np.sqrt(draws)),
                (shares(estimates), shares(draws)),
            )
        )
        found[name] = Component(sd, share)
    return found


def agreement(means: Array) -> Array:
    """How the graphs' means `[graphs, sets]` on each training set correlate with those on the others: [sets]."""
    sets = means.shape[1]
    others = (means.sum(axis=1, keepdims=True) - means) / (sets - 1)
    return np.array([correlation(means[:, i], others[:, i]) for i in range(sets)])


def retrained(train: Array, values: Array) -> tuple[float, float]:
    """How graphs chosen by training accuracy fare in a training that they were not chosen by, and those dropped.

    `train` and `values` are `[graphs, seeds]`. By each seed in turn the upper half is chosen, and `values` are averaged
    over all other seeds.
    """
    seeds = train.shape[1]
    other = [np.delete(values, seed, axis=1).mean(axis=1) for seed in range(seeds)]
    pairs = np.array([halves(train[:, seed], other[seed]) for seed in range(seeds)])
    return float(pairs[:, 0].mean()), float(pairs[:, 1].mean())
