from __future__ import annotations

import numpy as np
import pytest

from shared.config import UserError
from shared.data.recall import (
    IGNORED,
    distinct_tokens,
    draw_distinct,
    mqar,
    overwrite_mqar,
    overwritten_queries,
    repeats,
)

SIZES = [(64, 4, 128), (64, 8, 64), (128, 8, 8192), (40, 10, 22), (37, 9, 20), (512, 64, 8192)]


def queries_of(labels: np.ndarray) -> list[list[int]]:
    return [np.flatnonzero(row != IGNORED).tolist() for row in labels]


@pytest.mark.parametrize(("length", "num_pairs", "vocab_size"), SIZES)
@pytest.mark.parametrize("random_non_queries", [False, True])
def test_a_sequence_is_pairs_and_then_one_query_a_key(
    length: int, num_pairs: int, vocab_size: int, random_non_queries: bool
) -> None:
    inputs, labels = mqar(
        20,
        length=length,
        num_pairs=num_pairs,
        vocab_size=vocab_size,
        random_non_queries=random_non_queries,
        seed=3,
    )
    assert inputs.shape == labels.shape == (20, length)
    assert inputs.dtype == labels.dtype == np.int64
    zone = 2 * num_pairs
    for sequence, answers, asked in zip(inputs, labels, queries_of(labels), strict=True):
        keys, values = sequence[:zone:2], sequence[1:zone:2]
        assert len(set(keys)) == len(set(values)) == num_pairs
        assert 1 <= keys.min() <= keys.max() < vocab_size // 2 <= values.min() <= values.max() < vocab_size
        bound = dict(zip(keys, values, strict=True))
        assert sorted(sequence[asked]) == sorted(keys)
        assert [bound[key] for key in sequence[asked]] == answers[asked].tolist()
        assert all(position >= zone and (position - zone) % 2 == 0 for position in asked)
        rest = np.setdiff1d(np.arange(zone, length), asked)
        if random_non_queries:
            assert 0 <= sequence.min() <= sequence.max() < vocab_size
        else:
            assert not sequence[rest].any()


def test_random_non_queries_fill_the_zone_evenly() -> None:
    plain, labels = mqar(500, length=64, num_pairs=4, vocab_size=32, seed=0)
    filled, same_labels = mqar(500, length=64, num_pairs=4, vocab_size=32, random_non_queries=True, seed=0)
    empty = labels[:, 8:] == IGNORED
    np.testing.assert_array_equal(labels, same_labels)
    np.testing.assert_array_equal(filled[:, 8:][~empty], plain[:, 8:][~empty])
    np.testing.assert_array_equal(filled[:, :8], plain[:, :8])
    assert chi_square(np.bincount(filled[:, 8:][empty], minlength=32), np.full(32, 1 / 32)) < 62  # 31 df, p = 0.001


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> float:
    expected = counts.sum() * probabilities / probabilities.sum()
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("power", [0.01, 0.5, 1.0, 2.0])
def test_gaps_follow_the_power_law_without_replacement(power: float) -> None:
    # Nine gaps to choose from. The first pair's is drawn from p itself; the second's, given that the first took gap 1,
    # from p over the others.
    inputs, labels = mqar(20_000, length=4 + 18, num_pairs=2, vocab_size=64, power=power, seed=1)
    zone, asked = inputs[:, 4:], labels[:, 4:] != IGNORED
    first, second = (((zone == inputs[:, [place]]) & asked).argmax(axis=1) // 2 + 1 for place in (0, 2))
    probabilities = power * np.arange(1, 10) ** (power - 1.0)
    assert chi_square(np.bincount(first, minlength=10)[1:], probabilities) < 26.1  # 8 df, p = 0.001
    after_gap_1 = np.bincount(second[first == 1], minlength=10)[1:]
    assert after_gap_1[0] == 0
    assert chi_square(after_gap_1[1:], probabilities[1:]) < 24.3  # 7 df, p = 0.001


def test_keys_and_values_are_drawn_evenly_and_independently() -> None:
    inputs, _ = mqar(20_000, length=16, num_pairs=3, vocab_size=16, seed=0)
    for place, low, num_tokens in [(0, 1, 7), (4, 1, 7), (1, 8, 8), (5, 8, 8)]:
        counts = np.bincount(inputs[:, place] - low, minlength=num_tokens)
        assert chi_square(counts, np.ones(num_tokens)) < 24.3
    pairs = np.bincount((inputs[:, 0] - 1) * 8 + inputs[:, 1] - 8, minlength=56)
    assert chi_square(pairs, np.ones(56)) < 93.2  # 55 df, p = 0.001


@pytest.mark.parametrize("num_overwritten", [0, 1, 3, 5])
def test_queries_ask_for_the_latest_value(num_overwritten: int) -> None:
    num_pairs, vocab_size = 5, 64
    inputs, labels = overwrite_mqar(
        200, length=48, num_pairs=num_pairs, num_overwritten=num_overwritten, vocab_size=vocab_size, seed=4
    )
    mask = overwritten_queries(inputs, labels, num_pairs=num_pairs)
    assert mask.shape == labels.shape
    zone = 2 * (num_pairs + num_overwritten)
    for sequence, answers, re_bound, asked in zip(inputs, labels, mask, queries_of(labels), strict=True):
        latest: dict[int, int] = {}
        changed = set()
        for key, value in sequence[:zone].reshape(-1, 2).tolist():
            changed |= {key} & latest.keys()
            latest[key] = value
        assert len(latest) == num_pairs
        assert len(changed) == num_overwritten
        assert len(set(sequence[1:zone:2].tolist())) == num_pairs + num_overwritten
        assert min(asked) >= zone
        assert sorted(sequence[asked]) == sorted(latest)
        assert [latest[key] for key in sequence[asked].tolist()] == answers[asked].tolist()
        assert [key in changed for key in sequence[asked].tolist()] == re_bound[asked].tolist()
        assert re_bound.sum() == num_overwritten


def test_every_pair_is_overwritten_as_often_as_another() -> None:
    inputs, _ = overwrite_mqar(8_000, length=24, num_pairs=4, num_overwritten=2, vocab_size=32, seed=0)
    for place in (8, 10):
        original = (inputs[:, :8:2] == inputs[:, [place]]).argmax(axis=1)
        assert chi_square(np.bincount(original, minlength=4), np.ones(4)) < 16.3  # 3 df, p = 0.001


def test_overwritten_queries_of_a_hand_made_sequence() -> None:
    inputs = np.array([[1, 11, 2, 12, 1, 13, 2, 0, 1, 0]])
    labels = np.full_like(inputs, IGNORED)
    labels[0, 6], labels[0, 8] = 12, 13
    assert np.flatnonzero(overwritten_queries(inputs, labels, num_pairs=2)).tolist() == [8]
    with pytest.raises(UserError, match="do not ask for 3 keys"):
        overwritten_queries(inputs, labels, num_pairs=3)


def test_the_seed_fixes_the_examples() -> None:
    sizes = {"length": 64, "num_pairs": 8, "num_overwritten": 4, "vocab_size": 256, "random_non_queries": True}
    first, again, other = (overwrite_mqar(50, seed=seed, **sizes) for seed in (0, 0, 1))
    for a, b, c in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(a, b)
        assert not np.array_equal(a, c)


def test_sizes_that_cannot_be_are_refused_and_the_named_ones_work() -> None:
    with pytest.raises(UserError, match=r"too short for 8 pairs: give a length of at least 32 "):
        mqar(1, length=31, num_pairs=8, seed=0)
    with pytest.raises(UserError, match=r"too small for 8 pairs .* at least 18,"):
        mqar(1, length=32, num_pairs=8, vocab_size=17, seed=0)
    mqar(5, length=32, num_pairs=8, vocab_size=18, seed=0)

    sizes = {"num_pairs": 4, "num_overwritten": 3}
    with pytest.raises(UserError, match="4 pairs of which 3 are overwritten: give a length of at least 22 "):
        overwrite_mqar(1, length=21, seed=0, **sizes)
    with pytest.raises(UserError, match=r"at least 13,"):
        overwrite_mqar(1, length=22, vocab_size=12, seed=0, **sizes)
    overwrite_mqar(5, length=22, vocab_size=13, seed=0, **sizes)

    with pytest.raises(UserError, match="num_overwritten is 5"):
        overwrite_mqar(1, length=64, num_pairs=4, num_overwritten=5, seed=0)
    with pytest.raises(UserError, match="power is 0"):
        mqar(1, length=64, num_pairs=4, power=0.0, seed=0)
    with pytest.raises(UserError, match="must be at least 1"):
        mqar(0, length=64, num_pairs=4, seed=0)


@pytest.mark.parametrize(("count", "high"), [(1, 1), (3, 3), (3, 5), (3, 9)])
def test_distinct_tokens_are_every_choice_alike(count: int, high: int) -> None:
    rows = distinct_tokens(np.random.default_rng(0), 5_000, count, 0, high)
    assert not repeats(rows).any()
    assert 0 <= rows.min() <= rows.max() < high
    for column in rows.T:
        assert chi_square(np.bincount(column, minlength=high), np.ones(high)) < 26.2  # up to 8 df, p = 0.001


def test_what_repeats_an_earlier_number_is_drawn_again() -> None:
    given = iter([[[1, 2, 1], [3, 4, 5]], [2], [7], []])
    rows = draw_distinct(lambda shape: np.array(next(given), dtype=np.int64).reshape(shape), 2, 3)
    assert rows.tolist() == [[1, 2, 7], [3, 4, 5]]


def test_repeats_of_hand_made_rows() -> None:
    rows = np.array([[3, 1, 3, 3], [1, 2, 3, 4], [2, 2, 1, 1]])
    assert repeats(rows).tolist() == [
        [False, False, True, True],
        [False, False, False, False],
        [False, True, False, True],
    ]
