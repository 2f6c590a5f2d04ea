"""Scores, answers and controls against examples worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ..baselines import layer_matched_heads, random_heads
from ..evaluate import pseudo_values
from ..model import (
    Needles,
    activation_frequency,
    copies,
    counted_score,
    cut,
    kind_of_answer,
    pearson,
    ranked,
    retrieval_score,
    shares,
    token_recall,
)


def needles(tokens: list[int], start: int, size: int, needle: tuple[int, int], context: tuple[int, int]) -> Needles:
    return Needles(
        tokens=torch.tensor([tokens]),
        answer=torch.tensor([tokens[start : start + size]]),
        start=torch.tensor([start]),
        context=torch.tensor([context]),
        needle=torch.tensor([needle]),
        depth=torch.tensor([50.0]),
        item=torch.tensor([0]),
        length=len(tokens),
    )


# <bos> 7 7 . | name 5 6 8 . | 9 9 9 . | question
ONE = needles([0, 7, 7, 1, 4, 5, 6, 8, 1, 9, 10, 9, 1, 2], start=5, size=3, needle=(4, 9), context=(1, 13))


def test_a_head_copies_what_it_looks_at_inside_of_the_answer() -> None:
    made = torch.tensor([[5, 6, 5]])
    # Head 0 looks where the token stands, head 1 into the needle but elsewhere, head 2 at the same token outside.
    attended = torch.tensor([[[[5, 6, 1]], [[6, 7, 13]], [[5, 4, 40]]]])
    copied = copies(ONE, made, attended)
    assert copied.tolist() == [[[[True, False, False]], [[True, False, False]], [[True, False, False]]]]


def test_the_paper_counts_tokens_and_the_code_counts_steps() -> None:
    made = torch.tensor([[5, 6, 5]])
    copied = torch.tensor([[[[True]], [[True]], [[True]]]])
    assert retrieval_score(copied, made, ONE.answer).item() == pytest.approx(2 / 3)
    assert counted_score(copied, 3).item() == 1.0


def test_a_token_that_the_answer_has_twice_counts_once_in_the_paper() -> None:
    answer = torch.tensor([[5, 6, 5]])
    copied = torch.tensor([[[[True]]]])
    assert retrieval_score(copied, torch.tensor([[5]]), answer).item() == 0.5
    assert counted_score(copied, 3).item() == pytest.approx(1 / 3)


def test_scores_agree_with_sets_on_random_examples() -> None:
    generator = torch.Generator().manual_seed(0)
    made = torch.randint(0, 5, (4, 6), generator=generator)
    answer = torch.randint(0, 5, (4, 3), generator=generator)
    copied = torch.rand((4, 6, 2, 3), generator=generator) < 0.4
    score = retrieval_score(copied, made, answer)
    for b, layer, head in np.ndindex(4, 2, 3):
        wanted = set(answer[b].tolist())
        got = {int(made[b, n]) for n in range(6) if copied[b, n, layer, head]}
        assert score[b, layer, head].item() == pytest.approx(len(got & wanted) / len(wanted))


def test_activation_and_shares() -> None:
    tests = np.array([[[0.0, 0.5, 0.02]], [[0.0, 1.0, 0.0]]])
    assert activation_frequency(tests).tolist() == [[0.0, 1.0, 0.5]]
    found = shares(tests.mean(axis=0))
    assert found["zero_share"] == found["weak_share"] == found["strong_share"] == pytest.approx(1 / 3)
    assert found["retrieval_share"] == pytest.approx(1 / 3)


def test_ranking_and_correlation() -> None:
    score = np.array([[0.1, 0.9], [0.9, 0.0]])
    assert ranked(score) == [(0, 1), (1, 0), (0, 0), (1, 1)]
    assert pearson(score, 1 - 2 * score) == pytest.approx(-1)
    assert pearson(score, np.ones((2, 2))) is None


def test_recall_counts_words_as_rouge_does() -> None:
    answer = torch.tensor([[5, 6, 5, 7]])
    assert token_recall(torch.tensor([[5, 5, 5, 9]]), answer).tolist() == [0.5]
    assert token_recall(torch.tensor([[5, 9]]), answer).tolist() == [0.25]


def test_answers_end_before_the_stop() -> None:
    assert [row.tolist() for row in cut(torch.tensor([[5, 1, 6], [1, 5, 6]]), torch.tensor([1]))] == [[5], []]


@pytest.mark.parametrize(
    ("made", "kind"),
    [([5, 6, 8], "complete"), ([5, 3], "incomplete"), ([9, 10], "wrong_extraction"), ([9, 3, 10], "hallucination"),
     ([], "hallucination"), ([4, 11], "hallucination")],
)  # fmt: skip
def test_what_became_of_an_answer(made: list[int], kind: str) -> None:
    recall = float(token_recall(torch.tensor([made]).long(), ONE.answer)[0]) if made else 0.0
    assert kind_of_answer(ONE, 0, torch.tensor(made).long(), recall, run=2) == kind


def test_random_heads_are_no_retrieval_heads() -> None:
    score = np.zeros((4, 4))
    score[3, :2], score[2, 0] = 0.9, 0.05
    for seed in range(20):
        drawn = random_heads(score, 2, np.random.default_rng(seed))
        assert len(set(drawn)) == 2
        assert not {(3, 0), (3, 1)} & set(drawn)
    # With 12 of 16 heads to be drawn, the 4 strongest at least stay out.
    assert set(random_heads(score, 12, np.random.default_rng(0))) == set(ranked(score)[4:])


def test_matched_heads_are_of_the_same_layers_and_others() -> None:
    score = np.arange(16.0).reshape(4, 4)
    chosen = [(3, 3), (3, 2), (2, 0)]
    for seed in range(20):
        drawn = layer_matched_heads(score, chosen, np.random.default_rng(seed))
        assert sorted(layer for layer, _ in drawn) == [2, 3, 3]
        assert not set(chosen) & set(drawn)
    crowded = layer_matched_heads(score, [(3, head) for head in range(4)], np.random.default_rng(0))
    assert len(set(crowded)) == 4
    assert all(layer < 3 for layer, _ in crowded)


def test_pseudo_values_of_a_mean_are_the_groups_means() -> None:
    tests = np.random.default_rng(0).random((60, 2, 2))
    values = pseudo_values([tests], lambda maps: float(maps[0][0, 0]), groups=6)
    assert values.mean() == pytest.approx(tests[:, 0, 0].mean())
    order = np.random.default_rng(0).permutation(60)
    assert values == pytest.approx([tests[chosen, 0, 0].mean() for chosen in np.array_split(order, 6)])
