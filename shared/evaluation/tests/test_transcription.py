from __future__ import annotations

import random
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import bootstrap

from shared.config import UserError
from shared.evaluation.statistics import paired_bootstrap
from shared.evaluation.transcription import (
    UNKNOWN,
    Errors,
    compositional_oracle,
    count_changes,
    count_errors,
    edit_distances,
    nbest_oracle,
    nearest,
    spell_out_digits,
    strip_punctuation,
    whisper_normalizer,
)

REFERENCES = ["show me flights to boston", "what is the fare", "", "one way"]
NBEST = [
    ["show me flight to boston", "show flights to boston please", "show me flights to austin"],
    ["what is the fair", "what is a fair", "what is the fare"],
    ["uh", "", "uh huh"],
    ["one one way", "one day way", "one day"],
]


def plain_distance(first: list[str], second: list[str]) -> int:
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, start=1):
        before, row = row, [i]
        for j, b in enumerate(second, start=1):
            row.append(min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (a != b)))
    return row[-1]


def test_errors_by_hand() -> None:
    errors = count_errors(REFERENCES, [hypotheses[1] for hypotheses in NBEST])
    # "me" deleted, "please" inserted; "the fare" as "a fair"; nothing; "day" inserted.
    assert errors.substitutions.tolist() == [0, 2, 0, 0]
    assert errors.deletions.tolist() == [1, 0, 0, 0]
    assert errors.insertions.tolist() == [1, 0, 0, 1]
    assert errors.reference_lengths.tolist() == [5, 4, 0, 2]
    assert errors.rate == pytest.approx(5 / 11)
    assert errors.macro_rate == pytest.approx((2 / 5 + 2 / 4 + 1 / 2) / 3)
    assert errors.num_empty == 1


def test_characters_by_hand() -> None:
    errors = count_errors(["ab c", "x"], ["ab d", "xyz"], unit="character")
    assert (errors.substitutions.tolist(), errors.insertions.tolist()) == ([1, 0], [0, 2])
    assert errors.reference_lengths.tolist() == [4, 1]
    assert errors.rate == pytest.approx(3 / 5)
    assert errors.macro_rate == pytest.approx((1 / 4 + 2) / 2)


def test_empty_references_count_in_corpus_rates_only() -> None:
    errors = count_errors(["a b", ""], ["a b", "c d e"])
    assert errors.insertions.tolist() == [0, 3]
    assert (errors.rate, errors.macro_rate) == (1.5, 0)
    nothing = count_errors(["", " "], ["a", ""])
    for rate in ("rate", "macro_rate"):
        with pytest.raises(UserError, match="all references are empty"):
            getattr(nothing, rate)
    assert count_errors(["a b"], [""]).deletions.tolist() == [2]


texts = st.lists(st.sampled_from(["a", "b", "c", "dd"]), max_size=6).map(" ".join)


@given(pairs=st.lists(st.tuples(texts, st.lists(texts, min_size=3, max_size=3)), min_size=1, max_size=4))
def test_distances_are_levenshteins(pairs: list[tuple[str, list[str]]]) -> None:
    references, nbest = [reference for reference, _ in pairs], [hypotheses for _, hypotheses in pairs]
    expected = [[plain_distance(r.split(), h.split()) for h in hypotheses] for r, hypotheses in pairs]
    assert edit_distances(references, nbest).tolist() == expected
    by_character = [[plain_distance(list(r), list(h)) for h in hypotheses] for r, hypotheses in pairs]
    assert edit_distances(references, nbest, unit="character").tolist() == by_character
    for place in range(3):
        errors = count_errors(references, [hypotheses[place] for hypotheses in nbest])
        assert errors.edits.tolist() == [row[place] for row in expected]


def test_oracles_by_hand() -> None:
    assert nearest(REFERENCES, NBEST).tolist() == [0, 2, 1, 0]
    oracle = nbest_oracle(REFERENCES, NBEST)
    assert oracle.edits.tolist() == [1, 0, 0, 1]
    assert oracle.rate == pytest.approx(2 / 11)
    # Every word of the first three is somewhere in its list; each is also in the fourth.
    assert compositional_oracle(REFERENCES, NBEST).rate == 0
    oracle = compositional_oracle(["the long long fare", "a"], [["the fare", "fare a"], ["a", "b"]])
    assert oracle.deletions.tolist() == [2, 0]
    assert oracle.rate == pytest.approx(2 / 5)


@given(pairs=st.lists(st.tuples(texts, st.lists(texts, min_size=2, max_size=2)), min_size=1, max_size=4))
def test_oracles_are_bounds(pairs: list[tuple[str, list[str]]]) -> None:
    references, nbest = [reference for reference, _ in pairs], [hypotheses for _, hypotheses in pairs]
    best, composed = nbest_oracle(references, nbest).edits, compositional_oracle(references, nbest).edits
    assert (best <= edit_distances(references, nbest).T).all()
    assert (composed <= best).all()


def test_changes_by_hand() -> None:
    references = ["flights from denver to boston", "on monday", ""]
    nbest = [["flight from denver to austin", "flights from denver to austin"], ["on sunday", "in monday"], ["a", "b"]]
    # Of the first: "flights" repaired, "boston" recovered out of nowhere, "denver" broken.
    changes = count_changes(references, nbest, ["flights from dover to boston", "on sunday", "a"])
    assert changes.out_of_list.tolist() == [1, 0, 0]
    assert changes.recovered.tolist() == [1, 0, 0]
    assert changes.repaired.tolist() == [2, 0, 0]
    assert changes.broken.tolist() == [1, 0, 0]
    unchanged = count_changes(references, nbest, [hypotheses[0] for hypotheses in nbest])
    assert not np.concatenate([unchanged.recovered, unchanged.repaired, unchanged.broken]).any()


def random_errors(seed: int, size: int = 400) -> Errors:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(0, 30, size)
    substitutions = generator.binomial(lengths, 0.1)
    return Errors(
        substitutions, generator.binomial(lengths - substitutions, 0.05), generator.poisson(0.4, size), lengths
    )


def test_interval_is_that_of_the_ratio() -> None:
    errors = random_errors(0)
    assert errors.values().mean() == pytest.approx(errors.rate, abs=1e-12)
    result = bootstrap(
        (errors.edits, errors.reference_lengths),
        lambda edits, lengths, axis: edits.sum(axis) / lengths.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=4000,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    interval, expected = errors.interval(num_resamples=4000), result.confidence_interval
    width = expected.high - expected.low
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), abs=0.05 * width)
    assert interval.estimate == pytest.approx(errors.rate)


def test_differences_of_systems_are_differences_of_rates() -> None:
    first, lengths = random_errors(1), random_errors(1).reference_lengths
    second = Errors(first.substitutions // 2, first.deletions, first.insertions, lengths)
    differences = np.stack([second.values() - first.values()] * 3)
    interval = paired_bootstrap(differences)
    assert interval.estimate == pytest.approx(second.rate - first.rate)
    assert interval.high < 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Mr. Brown won't pay, he's broke!", "mister brown will not pay he is broke"),
        ("It grew by 10%.", "it grew by ten percent"),
        (
            "On the 25th, 3.14 or 2,310",
            "on the twenty-fiveth three point one four or two thousand three hundred and ten",
        ),
        ("twenty one (laughs) [noise] um", "twenty-one"),
        ("  ", UNKNOWN),
        ("uh, um", UNKNOWN),
        (UNKNOWN, UNKNOWN),
    ],
)
def test_whisper_normalization(text: str, expected: str) -> None:
    normalize = whisper_normalizer()
    assert normalize(text) == expected


def test_spellings_are_those_given() -> None:
    assert whisper_normalizer()("The colour") == "the colour"
    assert whisper_normalizer({"colour": "color"})("The colour") == "the color"


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "zero"),
        (13, "thirteen"),
        (20, "twenty"),
        (99, "ninety-nine"),
        (100, "one hundred"),
        (105, "one hundred and five"),
        (1000, "one thousand"),
        (1005, "one thousand and five"),
        (2310, "two thousand, three hundred and ten"),
        (1_000_000, "one million"),
        (7_000_340, "seven million, three hundred and forty"),
        (12_345_678, "twelve million, three hundred and forty-five thousand, six hundred and seventy-eight"),
        (10**15, "one" + " zero" * 15),
    ],
)
def test_numbers_in_words(number: int, words: str) -> None:
    assert spell_out_digits(f"a {number}b") == f"a {words.replace(',', '')}b"


def test_digits_in_odd_places() -> None:
    assert spell_out_digits("0.50 and 007") == "zero point five zero and seven"
    assert spell_out_digits("9" * 5000).split() == ["nine"] * 5000
    assert spell_out_digits("٣") == "٣"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It's 5 o'clock.", "its oclock"),
        ("Hello, World!\nmore", "hello world"),
        (" yes </s> ", "yes"),
        ("12 34!", ""),
        ("naïve — café_bar", "naïve cafébar"),
    ],
)
def test_published_post_processing(text: str, expected: str) -> None:
    assert strip_punctuation(text) == expected


def test_clear_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="2 references, but 1 hypotheses"):
        count_errors(["a", "b"], ["a"])
    with pytest.raises(UserError, match="hypotheses must be a list of texts"):
        count_errors(["a"], "a")
    with pytest.raises(UserError, match="references must be a list of texts"):
        count_errors([None], ["a"])
    with pytest.raises(UserError, match="word or character"):
        count_errors(["a"], ["a"], unit="phone")
    with pytest.raises(UserError, match="all references are empty"):
        _ = count_errors([], []).rate
    for lists in ([], [["a"], ["b"]]):
        with pytest.raises(UserError, match="one list for each"):
            edit_distances(["a"], lists)
    for hypotheses in ([], "abc", [1]):
        with pytest.raises(UserError, match="list 1 must hold"):
            compositional_oracle(["a", "b"], [["a"], hypotheses])
    with pytest.raises(UserError, match="as many hypotheses"):
        edit_distances(["a", "b"], [["a"], ["b", "c"]])

    def without_jiwer(name: str, *arguments: Any, **options: Any) -> Any:
        raise ImportError(name)

    monkeypatch.setattr("importlib.import_module", without_jiwer)
    with pytest.raises(UserError, match=r"pip install -e '\.\[hyporadise\]'"):
        count_errors(["a"], ["a"])


def test_thousands_of_lists_take_seconds() -> None:
    draw = random.Random(0)
    vocabulary = [f"w{number}" for number in range(2000)]

    def text() -> str:
        return " ".join(draw.choices(vocabulary, k=20))

    references = [text() for _ in range(7500)]
    nbest = [[text() for _ in range(5)] for _ in references]
    started = time.process_time()
    assert edit_distances(references, nbest).shape == (7500, 5)
    assert time.process_time() - started < 5
