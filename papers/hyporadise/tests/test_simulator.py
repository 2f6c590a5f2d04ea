"""Pronunciations, their distances, the grammar, and the recognizer on words whose lists can be worked out."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from shared.config import UserError

from .. import grammar, phonetics
from ..config import RecognizerSettings
from ..phonetics import NUMBER, PHONES, edit_distances, gap_costs, pad, pronounce, read_espeak, substitution_costs
from ..simulator import Recognizer, frequent_words

GENERAL = ["the cat sat on the mat", "the dog sat on a log", "a cat and a dog ran to the mat", "to the dog on the log"]


def said(word: str) -> str:
    return " ".join(PHONES[phone] for phone in pronounce(word))


@pytest.mark.parametrize(
    ("word", "phones"),
    [
        ("flights", "F L AY T S"),
        ("morning", "M AO R N IH NG"),
        ("phone", "F OW N"),
        ("nation", "N AE SH AH N"),
        ("class", "K L AE S"),
        ("to", "T AH"),
        ("two", "T UW"),
        ("cheap", "CH IY P"),
        ("knife", "N AY F"),
    ],
)
def test_rules_say_words_as_english_does(word: str, phones: str) -> None:
    assert said(word) == phones


def test_no_word_is_mute() -> None:
    assert all(pronounce(word) for word in ("h", "ñ", "", *grammar.vocabulary()))


def test_the_names_of_espeak_are_read() -> None:
    assert read_espeak("f_l_'aI_t_s") == pronounce("flights")
    assert [PHONES[p] for p in read_espeak("b'0st@n")] == ["B", "AA", "S", "T", "AH", "N"]


def test_espeak_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="pronunciations: rules"):
        phonetics.pronounce_by_espeak(["boston"])


def test_costs_are_a_distance_and_like_phones_are_near() -> None:
    costs = substitution_costs()
    assert (costs == costs.T).all()
    assert (np.diag(costs) == 0).all()
    assert (costs[~np.eye(len(PHONES), dtype=bool)] > 0).all()
    at = NUMBER
    assert costs[at["P"], at["B"]] < costs[at["P"], at["Z"]]
    assert costs[at["IH"], at["EH"]] < costs[at["IY"], at["AA"]] < costs[at["IY"], at["K"]]


def slow_distance(heard: tuple[int, ...], word: tuple[int, ...]) -> int:
    """The recursion as it stands in textbooks."""
    substitution, gap = substitution_costs(), gap_costs()
    if not heard or not word:
        return int(gap[list(heard + word)].sum())
    return min(
        slow_distance(heard[1:], word) + gap[heard[0]],
        slow_distance(heard, word[1:]) + gap[word[0]],
        slow_distance(heard[1:], word[1:]) + substitution[heard[0], word[0]],
    )


def test_distances_of_many_strings_are_those_of_the_recursion() -> None:
    generator = np.random.default_rng(0)

    def draw() -> tuple[int, ...]:
        return tuple(generator.integers(len(PHONES), size=generator.integers(0, 5)).tolist())

    heard = [draw() for _ in range(12)]
    words = [[draw() for _ in range(3)] for _ in heard]
    table = np.stack([pad(row, 5) for row in words])
    expected = [[slow_distance(one, other) for other in row] for one, row in zip(heard, words, strict=True)]
    np.testing.assert_array_equal(edit_distances(pad(heard), table), expected)


def test_the_grammar_has_a_narrow_vocabulary() -> None:
    words = grammar.vocabulary()
    assert 400 <= len(words) <= 500
    assert len(grammar.CITIES) == 40
    assert len(grammar.AIRLINES) == 12
    assert all(word.isalpha() and word == word.lower() for word in words)


def test_test_combinations_are_new_but_their_fragments_are_not() -> None:
    made = grammar.generate({"train": 4000, "validation": 100, "test": 500}, 0)
    train, test = set(made.combinations["train"]), set(made.combinations["test"])
    assert not train & test
    assert not set(made.combinations["validation"]) & test
    for place in range(3):
        assert {each[place] for each in test} <= {each[place] for each in train}
    assert {word for text in made.texts["test"] for word in text.split()} <= set(grammar.vocabulary())


def test_fragments_follow_zipf() -> None:
    assert grammar.zipf(3).tolist() == pytest.approx([6 / 11, 3 / 11, 2 / 11])
    drawn = [each[1] for each in grammar.generate({"train": 5000}, 1, held_out=0.0).combinations["train"]]
    share = np.bincount(drawn, minlength=len(grammar.CORES)) / 5000
    np.testing.assert_allclose(share, grammar.zipf(len(grammar.CORES)), atol=0.02)


def recognizer(**changes: object) -> Recognizer:
    settings = {"lexicon_size": 10, "candidates": 6, "beam_size": 8, "inserted_words": 2, "add_k": 0.5} | changes
    return Recognizer(GENERAL, ["boston"], RecognizerSettings(**settings))


def test_what_is_clear_is_heard_as_it_was_said() -> None:
    clear = recognizer(noise_rate=(1e-6, 1e3), acoustic_weight=50)
    sentences = ["the cat sat on the mat", "to boston"]
    lists = clear.recognize(sentences, 0)
    assert [each[0] for each in lists.nbest] == sentences
    assert all(len(set(each)) == len(each) for each in lists.nbest)
    assert all(len(scores) == len(each) for scores, each in zip(lists.scores, lists.nbest, strict=True))


def test_noise_makes_errors_and_the_bigram_prefers_what_it_knows() -> None:
    sentences = ["the cat sat on the mat to boston"] * 40
    noisy = recognizer(noise_rate=(8.0, 2.0)).recognize(sentences, 0)
    wrong = np.mean([each[0] != sentence for each, sentence in zip(noisy.nbest, sentences, strict=True)])
    assert wrong > 0.5
    # Nothing but the bigram counts: a most frequent sentence comes out, whatever was said.
    deaf = recognizer(acoustic_weight=1e-2, language_weight=5.0, word_bonus=0.0, candidates=11)
    assert "boston" not in deaf.recognize(["boston"], 0).nbest[0][0]


def test_search_finds_the_best_of_all_sentences() -> None:
    made = recognizer(inserted_words=0, beam_size=500, noise_rate=(2.0, 3.0))
    spoken = [[made.number[word] for word in ("cat", "sat")]]
    heard = made._hear(spoken, np.random.default_rng([3, 1]))
    candidates, costs, lost = made._candidates(spoken, heard)
    unit, end, begin = 1000, len(made.words), len(made.words)
    settings = made.settings

    def score(choice: tuple[int, int]) -> tuple[str, float]:
        words, distance = [], 0
        for place, option in enumerate(choice):
            if option < 0:
                distance += int(lost[0][place])
            else:
                words.append(int(candidates[0][place, option]))
                distance += int(costs[0][place, option])
        path = [begin, *words, end]
        language = sum(int(made.log_bigram[a, b]) for a, b in pairwise(path))
        total = -settings.acoustic_weight * distance + settings.language_weight * language
        total += settings.word_bonus * unit * len(words)
        return " ".join(made.words[word] for word in words), total / unit

    options = range(-1, settings.candidates)
    everything: dict[str, float] = {}
    for choice in [(a, b) for a in options for b in options]:
        text, value = score(choice)
        everything[text] = max(value, everything.get(text, -np.inf))
    everything.pop("", None)
    ranked = sorted(everything.items(), key=lambda each: -each[1])[:5]
    ((texts, scores),) = made._search(candidates, costs, lost, np.array([0]), 5)
    assert texts == [text for text, _ in ranked]
    np.testing.assert_allclose(scores, [value / (len(text.split()) + 1) for text, value in ranked], atol=1e-9)


def test_lists_are_the_same_alone_and_among_others() -> None:
    made = recognizer(noise_rate=(2.0, 8.0))
    spoken = [[made.number[word] for word in text.split()] for text in ("the cat sat", "a dog to boston")]
    heard = made._hear(spoken, np.random.default_rng(0))
    parts = made._candidates(spoken, heard)
    together = made._search(*parts, np.array([0, 1]), 5)
    assert together == [made._search(*parts, np.array([row]), 5)[0] for row in (0, 1)]


def test_what_cannot_be_recognized_is_an_error() -> None:
    with pytest.raises(UserError, match="zeppelin"):
        recognizer().recognize(["zeppelin"], 0)
    with pytest.raises(UserError, match="lexicon_size"):
        frequent_words(GENERAL, 1000)
