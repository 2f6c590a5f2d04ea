from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.config import UserError
from shared.evaluation.rover import DELETION, INSERTION, SUBSTITUTION, align, confusion_network, rover, rover_all

words = st.lists(st.sampled_from("abc"), max_size=7)


def test_network_by_hand() -> None:
    network = confusion_network([text.split() for text in ("a b c", "a x c", "a c d", "a b c d")])
    assert network == [
        ["a", "a", "a", "a"],
        ["b", "x", "", "b"],
        ["c", "c", "c", "c"],
        ["", "", "d", "d"],
    ]


def test_votes_by_hand() -> None:
    assert rover(["the cat sat", "the bat sat", "a bat sat down"]) == "the bat sat"
    # Two of three have the word at the end, so it stays; two of three lack the one in the middle, so it goes.
    assert rover(["go on now please", "go now", "go now please"]) == "go now please"


def test_ties_go_to_the_earliest() -> None:
    assert rover(["x b", "a c"]) == "x b"
    assert rover(["a", "a b"]) == "a"
    assert rover(["a b", "a"]) == "a b"


def test_repeats_have_no_vote() -> None:
    hypotheses = ["flight to boston", "flights to austin", "flights to dallas"]
    assert rover(hypotheses) == "flights to boston"
    # As votes, the padding would win "flight" by three to two.
    assert rover([*hypotheses, hypotheses[0], hypotheses[0]]) == "flights to boston"
    assert rover(["a  b", "a b", "a c", "a c"]) == "a b"


def test_confidences_by_hand() -> None:
    # 0.5·2/3 + 0.5·0.2 = 0.433 for b against 0.5·1/3 + 0.5·0.9 = 0.617 for c.
    hypotheses, confidences = ["a b", "a b d", "a c"], [0.1, 0.2, 0.9]
    assert rover(hypotheses, confidences, vote_share=0.5) == "a c"
    assert rover(hypotheses, confidences, vote_share=1.0) == "a b"
    # With votes alone "d" loses by one to two; 0.2·1/3 + 0.8·0.2 = 0.227 against 0.2·2/3 + 0.8·0 = 0.133.
    assert rover(hypotheses, confidences, vote_share=0.2) == "a c d"
    assert rover(hypotheses, confidences, vote_share=0.2, null_confidence=0.5) == "a c"


def test_one_hypothesis_is_its_own_vote() -> None:
    assert rover(["a b"]) == "a b"
    assert rover(["a b", "a b"]) == "a b"
    assert rover([""]) == ""
    assert rover_all([["a"], ["b", "c"]]) == ["a", "b"]


def cost_of(pairs: Sequence[tuple[Sequence[str] | None, str]]) -> int:
    total = 0
    for slot, word in pairs:
        if slot is None:
            total += INSERTION
        elif word not in slot:
            total += SUBSTITUTION if word else DELETION
    return total


def least_cost(slots: Sequence[Sequence[str]], text: Sequence[str]) -> int:
    @lru_cache(None)
    def cost(i: int, j: int) -> int:
        if i == len(slots) and j == len(text):
            return 0
        options = []
        if i < len(slots):
            options.append(cost(i + 1, j) + (0 if "" in slots[i] else DELETION))
        if j < len(text):
            options.append(cost(i, j + 1) + INSERTION)
        if i < len(slots) and j < len(text):
            options.append(cost(i + 1, j + 1) + (0 if text[j] in slots[i] else SUBSTITUTION))
        return min(options)

    return cost(0, 0)


@given(slots=st.lists(st.lists(st.sampled_from(["", "a", "b", "c"]), min_size=1, max_size=3), max_size=6), text=words)
def test_alignment_is_cheapest_and_keeps_everything(slots: list[list[str]], text: list[str]) -> None:
    pairs = align(slots, text)
    assert [slot for slot, _ in pairs if slot is not None] == slots
    assert [word for _, word in pairs if word] == text
    assert cost_of(pairs) == least_cost(slots, text)


@given(hypotheses=st.lists(words, min_size=1, max_size=5))
def test_network_holds_each_hypothesis(hypotheses: list[list[str]]) -> None:
    network = confusion_network(hypotheses)
    for number, text in enumerate(hypotheses):
        assert [slot[number] for slot in network if slot[number]] == text
    assert all(any(slot) for slot in network)


def test_clear_errors() -> None:
    with pytest.raises(UserError, match="at least one"):
        rover([])
    with pytest.raises(UserError, match="at least one"):
        rover("a b c")
    with pytest.raises(UserError, match="between 0 and 1"):
        rover(["a"], [0.5], vote_share=2)
    with pytest.raises(UserError, match="give one for each"):
        rover(["a"], vote_share=0.5)
    with pytest.raises(UserError, match="2 hypotheses, but 1"):
        rover(["a", "b"], [0.5])
    with pytest.raises(UserError, match="confidences of 2"):
        rover_all([["a"]], [[0.5], [0.5]])
