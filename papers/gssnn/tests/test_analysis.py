"""Statistics, by hand and against direct computations."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from ..analysis import (
    COMPONENTS,
    agreement,
    correlation,
    expected_maximum,
    graph_share,
    halves,
    retrained,
    variance_components,
)


def test_correlation() -> None:
    x = np.array([0.1, 0.5, 0.2, 0.9])
    assert correlation(x, 3 * x + 1) == pytest.approx(1)
    assert correlation(x, np.array([1.0, 0, 3, 2])) == pytest.approx(np.corrcoef(x, [1, 0, 3, 2])[0, 1])
    assert correlation(x, np.full(4, 0.3)) == 0


def test_the_expected_best_of_a_few() -> None:
    values = np.array([0.3, 0.9, 0.5, 0.7])
    for count in (1, 2, 3, 4):
        direct = np.mean([max(chosen) for chosen in combinations(values, count)])
        assert expected_maximum(values, count) == pytest.approx(direct)


def test_halves_by_training_accuracy() -> None:
    train, values = np.array([0.5, 0.9, 0.9, 0.1, 0.7]), np.array([1.0, 2.0, 4.0, 8.0, 16.0])
    assert halves(train, values) == (pytest.approx((2 + 4 + 16) / 3), pytest.approx((1 + 8) / 2))
    # Of equal ones the earlier is ahead.
    assert halves(np.ones(4), np.array([1.0, 2, 3, 4])) == (1.5, 3.5)


def test_the_share_of_graphs_by_hand() -> None:
    """Two graphs with two seeds each: MSB = 2 · 8, MSW = 1, share (16 − 1) / (16 + 1)."""
    values = np.array([[0.0, np.sqrt(2)], [4.0, 4 + np.sqrt(2)]])
    assert graph_share(values) == pytest.approx((16 - 1) / (16 + 1))
    assert graph_share(np.array([[1.0, 1.0], [2.0, 2.0]])) == 1
    assert graph_share(np.array([[0.0, 1.0], [1.0, 0.0]])) == -1
    assert graph_share(np.ones((2, 2))) == 0


def test_variance_components_recover_what_was_put_in() -> None:
    generator = np.random.default_rng(0)
    sds = {"graph": 3.0, "training_set": 2.0, "interaction": 1.0, "seed": 0.5}
    graphs, sets, seeds = 60, 50, 3
    values = (
        generator.normal(0, sds["graph"], (graphs, 1, 1))
        + generator.normal(0, sds["training_set"], (1, sets, 1))
        + generator.normal(0, sds["interaction"], (graphs, sets, 1))
        + generator.normal(0, sds["seed"], (graphs, sets, seeds))
    )
    found = variance_components(values)
    total = sum(sd**2 for sd in sds.values())
    for name, sd in sds.items():
        assert found[name].sd.estimate == pytest.approx(sd, rel=0.25)
        assert found[name].sd.low < sd < found[name].sd.high
        assert found[name].share.low < sd**2 / total < found[name].share.high
    assert sum(found[name].share.estimate for name in COMPONENTS) == pytest.approx(1)


def test_intervals_of_the_graph_component_cover() -> None:
    """Of small samples such as the paper's: 8 graphs, 3 sets, 2 seeds, where graph and seed weigh the same."""
    generator = np.random.default_rng(1)
    covered = []
    for number in range(100):
        values = generator.normal(size=(8, 1, 1)) + generator.normal(size=(8, 3, 2))
        interval = variance_components(values, seed=number)["graph"].sd
        covered.append(interval.low <= 1 <= interval.high)
    assert 0.88 <= np.mean(covered) <= 1


def test_noise_alone_has_no_graph_in_it() -> None:
    values = np.random.default_rng(0).normal(size=(10, 4, 3))
    found = variance_components(values)
    assert found["graph"].share.low == 0
    assert found["seed"].share.estimate > 0.7
    with pytest.raises(ValueError, match="two graphs, training sets and seeds"):
        variance_components(values[:, :, :1])


def test_agreement_between_training_sets() -> None:
    means = np.array([[1.0, 2, 3], [2, 4, 1], [3, 6, 2]])
    found = agreement(means)
    assert found[0] == pytest.approx(np.corrcoef([1, 2, 3], [5, 5, 8])[0, 1])
    assert found.shape == (3,)


def test_graphs_that_were_chosen_are_judged_by_another_training() -> None:
    """By seed 0 graph 0 is chosen, by seed 1 graph 1; what the choice is made by does not count."""
    train = np.array([[0.9, 0.1], [0.2, 0.8]])
    values = np.array([[10.0, 1.0], [3.0, 20.0]])
    assert retrained(train, values) == (pytest.approx((1 + 3) / 2), pytest.approx((20 + 10) / 2))
