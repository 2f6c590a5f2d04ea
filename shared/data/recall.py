"""Associative recall: key-value pairs are shown, later a key is shown again and its value is asked for.

A set of examples is a pair of int64 arrays, inputs and labels, each [num_examples, length]. The label at a position is
the token that the model should give out there; `IGNORED` marks positions where nothing is asked.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from shared.config import UserError

Tokens = NDArray[np.int64]

IGNORED = -100  # the index that torch's cross-entropy ignores by default


def mqar(
    num_examples: int,
    *,
    length: int,
    num_pairs: int,
    vocab_size: int = 8192,
    power: float = 0.01,
    random_non_queries: bool = False,
    seed: int,
) -> tuple[Tokens, Tokens]:
    """Multi-query associative recall: inputs and labels, [num_examples, length] each.

    A sequence is `key value key value …` (`num_pairs` pairs of distinct keys and distinct values) and then a zone in
    which every key is queried once. Queries lie at even offsets 2 (gap - 1) into the zone; key after key, in the order
    of the pairs, gaps are drawn without replacement from p(gap) ∝ power * gap**(power - 1). The label at a query is the
    key's value. The rest of the zone is 0, or uniformly random tokens with `random_non_queries`.
    Keys are tokens 1 … vocab_size // 2 - 1, values are vocab_size // 2 … vocab_size - 1.

    `UserError` names the smallest length or vocabulary that holds the pairs.
    Source: Arora et al. 2023, "Zoology" (arXiv 2312.04927), appendix on MQAR.
    """
    return overwrite_mqar(
        num_examples,
        length=length,
        num_pairs=num_pairs,
        num_overwritten=0,
        vocab_size=vocab_size,
        power=power,
        random_non_queries=random_non_queries,
        seed=seed,
    )


def overwrite_mqar(
    num_examples: int,
    *,
    length: int,
    num_pairs: int,
    num_overwritten: int,
    vocab_size: int = 8192,
    power: float = 0.01,
    random_non_queries: bool = False,
    seed: int,
) -> tuple[Tokens, Tokens]:
    """MQAR in which some keys get a new value before the queries, and the latest value is asked for.

    Between the `num_pairs` pairs and the query zone of `mqar` stand `num_overwritten` further pairs: a random choice of
    the same keys, in random order, each with a value that the sequence has not seen. A memory that only adds returns a
    mixture of both values. `overwritten_queries` tells the queries of these keys from the others.
    """
    _check_sizes(num_examples, length, num_pairs, num_overwritten, vocab_size, power)
    rng = np.random.default_rng(seed)
    first_value = vocab_size // 2
    num_bindings = num_pairs + num_overwritten
    zone = 2 * num_bindings

    keys = distinct_tokens(rng, num_examples, num_pairs, 1, first_value)
    values = distinct_tokens(rng, num_examples, num_bindings, first_value, vocab_size)
    overwritten = distinct_tokens(rng, num_examples, num_overwritten, 0, num_pairs)
    latest = values[:, :num_pairs].copy()
    np.put_along_axis(latest, overwritten, values[:, num_pairs:], axis=1)
    queries = zone + 2 * _power_law_draws(rng, num_examples, (length - zone) // 2, num_pairs, power)

    inputs = np.zeros((num_examples, length), dtype=np.int64)
    inputs[:, : 2 * num_pairs : 2] = keys
    inputs[:, 2 * num_pairs : zone : 2] = np.take_along_axis(keys, overwritten, axis=1)
    inputs[:, 1:zone:2] = values
    np.put_along_axis(inputs, queries, keys, axis=1)
    labels = np.full((num_examples, length), IGNORED, dtype=np.int64)
    np.put_along_axis(labels, queries, latest, axis=1)
    if random_non_queries:
        empty = labels == IGNORED
        empty[:, :zone] = False
        inputs[empty] = rng.integers(vocab_size, size=np.count_nonzero(empty))
    return inputs, labels


def overwritten_queries(inputs: Tokens, labels: Tokens, *, num_pairs: int) -> NDArray[np.bool_]:
    """Where `overwrite_mqar` asks for a key that was re-bound, [num_examples, length].

    `numpy.where(overwritten_queries(…), labels, IGNORED)` leaves these queries only.
    """
    is_query = labels != IGNORED
    if not (is_query.sum(axis=1) == num_pairs).all():
        raise UserError(
            f"these labels do not ask for {num_pairs} keys in every sequence: give num_pairs as at generation"
        )
    answers = labels[is_query].reshape(len(labels), num_pairs)
    # Values are distinct within a sequence: an answer that is not among the first bindings came later.
    mask = np.zeros(labels.shape, dtype=bool)
    mask[is_query] = ~repeats(np.concatenate([inputs[:, 1 : 2 * num_pairs : 2], answers], axis=1))[
        :, num_pairs:
    ].ravel()
    return mask


def distinct_tokens(rng: np.random.Generator, num_rows: int, count: int, low: int, high: int) -> Tokens:
    """Per row, `count` tokens of low … high - 1 without replacement, every ordered choice equally likely."""
    if 2 * count > high - low:
        # Few tokens to choose from, among which redrawing would go on for long.
        return low + rng.random((num_rows, high - low)).argsort(axis=1)[:, :count]
    return draw_distinct(lambda shape: rng.integers(low, high, size=shape), num_rows, count)


def draw_distinct(draw: Callable[[tuple[int, ...]], Tokens], num_rows: int, count: int) -> Tokens:
    """Rows of `count` distinct numbers, made by drawing anew whatever repeats an earlier number of its row.

    `draw(shape)` returns independent numbers. Which of them are drawn again depends on equality alone, so where `draw`
    prefers no number, neither does the result: all ordered choices are equally likely.
    """
    rows = draw((num_rows, count))
    unsettled = np.arange(num_rows)
    while len(unsettled):
        part = rows[unsettled]
        repeated = repeats(part)
        part[repeated] = draw((np.count_nonzero(repeated),))
        rows[unsettled] = part
        unsettled = unsettled[repeated.any(axis=1)]
    return rows


def repeats(rows: Tokens) -> NDArray[np.bool_]:
    """Which entries, [num_rows, count], are equal to an earlier entry of their row."""
    order = rows.argsort(axis=1, kind="stable")
    in_order = np.take_along_axis(rows, order, axis=1)
    out = np.zeros(rows.shape, dtype=bool)
    np.put_along_axis(out, order[:, 1:], in_order[:, 1:] == in_order[:, :-1], axis=1)
    return out


def _power_law_draws(rng: np.random.Generator, num_rows: int, size: int, count: int, power: float) -> Tokens:
    """Per row, `count` numbers gap - 1 of 0 … size - 1, drawn one by one without replacement, p ∝ gap**(power - 1).

    The largest of log p plus independent Gumbel noise come in the order of such draws (Kool et al. 2019, 1903.06059).
    """
    scores = rng.gumbel(size=(num_rows, size)) + (power - 1) * np.log(np.arange(1, size + 1))
    np.negative(scores, out=scores)
    drawn = np.argpartition(scores, count - 1, axis=1)[:, :count]
    order = np.take_along_axis(scores, drawn, axis=1).argsort(axis=1)
    return np.take_along_axis(drawn, order, axis=1)


def _check_sizes(
    num_examples: int, length: int, num_pairs: int, num_overwritten: int, vocab_size: int, power: float
) -> None:
    if num_examples < 1 or num_pairs < 1:
        raise UserError(f"num_examples ({num_examples}) and num_pairs ({num_pairs}) must be at least 1")
    if not 0 <= num_overwritten <= num_pairs:
        raise UserError(f"num_overwritten is {num_overwritten}, but lies between 0 and num_pairs ({num_pairs})")
    if not 0 < power < np.inf:
        raise UserError(f"power is {power}, but must be positive: 1 spreads queries evenly, less puts them early")
    bindings = f"{num_pairs} pairs" + (f" of which {num_overwritten} are overwritten" if num_overwritten else "")
    shortest = 4 * num_pairs + 2 * num_overwritten
    if length < shortest:
        raise UserError(
            f"a sequence of length {length} is too short for {bindings}: give a length of at least {shortest} "
            "(two tokens a binding and two a query), or fewer pairs"
        )
    # Keys are 1 … vocab_size // 2 - 1, values the upper half.
    smallest = max(2 * num_pairs + 2, 2 * (num_pairs + num_overwritten) - 1)
    if vocab_size < smallest:
        raise UserError(
            f"a vocabulary of {vocab_size} is too small for {bindings} with distinct keys and values: "
            f"give a vocab_size of at least {smallest}, or fewer pairs"
        )
