"""Batched, cached answers are those of one prompt at a time, read anew for every token."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ..config import Decoding
from ..generation import answer, decode, read_prompts, sample, score_candidates
from ..prompts import candidate_answers
from ..speed import generate_without_cache
from ..tokens import Rows
from .helpers import random_tokens, small_model, tokenizer_of

PAD = 1


def some_rows(prefix: int) -> Rows:
    rng = np.random.default_rng(2)
    return Rows(random_tokens(rng, prefix, prefix), [random_tokens(rng, 2, 12) for _ in range(6)])


@pytest.mark.parametrize("prefix", [0, 5])
def test_greedy_answers_of_a_batch_are_those_of_each_alone(prefix: int) -> None:
    model, rows = small_model(), some_rows(prefix)
    state = read_prompts(model, rows.prefix, rows.prompts, PAD)
    greedy = torch.zeros(6, dtype=torch.bool)
    written = decode(model, state, 8, -1, Decoding(), greedy, torch.Generator())
    assert written == generate_without_cache(model, rows, 8)


def test_rows_end_by_themselves() -> None:
    model, rows = small_model(), some_rows(4)
    alone = generate_without_cache(model, rows, 8)
    end = alone[0][2]
    state = read_prompts(model, rows.prefix, rows.prompts, PAD)
    written = decode(model, state, 8, end, Decoding(), torch.zeros(6, dtype=torch.bool), torch.Generator())
    assert written == [each[: each.index(end)] if end in each else each for each in alone]


@pytest.mark.parametrize("prefix", [0, 5])
@torch.no_grad()
def test_scores_are_log_likelihoods(prefix: int) -> None:
    model, rows = small_model(), some_rows(prefix)
    candidates = [[5, 6, 7], [9], [8, 2]]
    state = read_prompts(model, rows.prefix, rows.prompts, PAD)
    before = state.cache.get_seq_length()
    scores = score_candidates(model, state, candidates, PAD)
    assert state.cache.get_seq_length() == before
    for row, prompt in enumerate(rows.whole()):
        for place, candidate in enumerate(candidates):
            tokens = torch.tensor([prompt + candidate])
            logits = model(input_ids=tokens[:, :-1]).logits[0].log_softmax(-1)
            each = logits[torch.arange(tokens.shape[1] - 1), tokens[0, 1:]]
            assert scores[row, place] == pytest.approx(each[len(prompt) - 1 :].sum().item(), abs=1e-4)


def test_samples_come_from_the_nucleus_in_its_proportions() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.04, 0.01])
    logits = probabilities.log().expand(4000, 5)
    drawn = sample(logits, Decoding(top_k=4, top_p=0.9), torch.Generator().manual_seed(0))
    shares = torch.bincount(drawn, minlength=5) / 4000
    # Of the four likeliest, .5 + .3 does not reach .9 of them, and .15 more does.
    assert shares[3:].tolist() == [0, 0]
    assert shares[:3].numpy() == pytest.approx(np.array([0.5, 0.3, 0.15]) / 0.95, abs=0.03)
    first = sample(logits[:5], Decoding(top_p=0.01), torch.Generator())
    assert (first == 0).all()


def test_answers_come_in_the_order_of_the_rows_and_follow_the_seed() -> None:
    texts = candidate_answers(2, per_table=False)
    tokenizer = tokenizer_of(texts, 300)
    model, rows = small_model(), some_rows(3)
    one, again, other, small = (
        answer(model, rows, tokenizer, texts, Decoding(batch_size=size), seed)
        for size, seed in ((64, 0), (64, 0), (64, 1), (2, 0))
    )
    assert one.sampled == again.sampled
    assert one.sampled != other.sampled
    assert one.greedy == other.greedy == small.greedy
    assert np.allclose(one.scores, small.scores, atol=1e-4)
    assert one.scores.shape == (6, 2)


def test_no_room_for_an_answer() -> None:
    """Prompts as long as the context: nothing can be written, which is no crash and is read as no answer."""
    texts = candidate_answers(2, per_table=False)
    tokenizer = tokenizer_of(texts, 300)
    model = small_model(context=16)
    rows = Rows([], [[5] * 16, [6] * 3])
    answers = answer(model, rows, tokenizer, texts, Decoding(batch_size=1), 0)
    assert answers.greedy[0] == ""
    assert answers.scores[0].tolist() == [0, 0]
