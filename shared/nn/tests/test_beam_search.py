from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from shared.config import UserError
from shared.nn import Attention, LanguageModel
from shared.nn.beam_search import (
    Beams,
    beam_search,
    filtered_log_probs,
    language_model_step,
    sample,
    select_rows,
)

END, WORDS = 0, 4


class Chain:
    """A second-order Markov chain of its own for each item; the state carries the item and the token before last."""

    def __init__(self, num_items: int, num_words: int = WORDS, sharpness: float = 2.0) -> None:
        shape = (num_items, num_words, num_words, num_words)
        self.table = (sharpness * torch.randn(shape, dtype=torch.float64)).log_softmax(-1)

    def state(self) -> dict[str, Any]:
        items = torch.arange(len(self.table))
        return {"item": items, "before": (torch.zeros_like(items),), "name": "chain"}

    def step(self, tokens: Tensor, state: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        assert state["name"] == "chain"
        return self.table[state["item"], state["before"][0], tokens], {**state, "before": (tokens,)}

    def log_prob(self, item: int, start: int, text: tuple[int, ...]) -> float:
        total, before, last = 0.0, 0, start
        for word in text:
            total, before, last = total + self.table[item, before, last, word].item(), last, word
        return total


def all_texts(max_length: int) -> list[tuple[int, ...]]:
    """Texts that end, and those of full length that do not."""
    words = range(1, WORDS)
    ended = [(*text, END) for length in range(max_length) for text in product(words, repeat=length)]
    return ended + list(product(words, repeat=max_length))


def test_beam_of_one_is_greedy() -> None:
    chain, start = Chain(20), torch.arange(20) % WORDS
    found = beam_search(chain.step, start, end_token=END, beam_size=1, max_length=7, state=chain.state())
    for item in range(20):
        state, last, text = select_rows(chain.state(), torch.tensor([item])), start[item, None], []
        while len(text) < 7 and (not text or text[-1] != END):
            log_probs, state = chain.step(last, state)
            last = log_probs.argmax(-1)
            text.append(int(last))
        length = found.lengths[item, 0]
        assert found.tokens[item, 0, :length].tolist() == text
        assert (found.tokens[item, 0, length:] == END).all()
        assert found.log_probs[item, 0].item() == pytest.approx(chain.log_prob(item, int(start[item]), tuple(text)))


@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 1.0, 2.0])
def test_wide_beam_is_exhaustive_search(length_penalty: float) -> None:
    chain, start = Chain(3), torch.tensor([1, 2, 3])
    found = beam_search(
        chain.step,
        start,
        end_token=END,
        beam_size=200,
        max_length=4,
        num_results=5,
        length_penalty=length_penalty,
        state=chain.state(),
    )
    for item in range(3):
        scored = [(chain.log_prob(item, item + 1, text) / len(text) ** length_penalty, text) for text in all_texts(4)]
        best = sorted(scored, reverse=True)[:5]
        assert found.scores[item].tolist() == pytest.approx([score for score, _ in best])
        for place, (_, text) in enumerate(best):
            assert found.tokens[item, place, : len(text)].tolist() == list(text)
            assert found.lengths[item, place] == len(text)
            assert found.log_probs[item, place].item() == pytest.approx(chain.log_prob(item, item + 1, text))


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_batched_is_one_at_a_time(length_penalty: float) -> None:
    chain, start = Chain(9, sharpness=3.0), torch.arange(9) % WORDS
    options: dict[str, Any] = {
        "end_token": END,
        "beam_size": 3,
        "max_length": 12,
        "num_results": 3,
        "length_penalty": length_penalty,
    }
    together = beam_search(chain.step, start, state=chain.state(), **options)
    assert len(set(together.lengths.flatten().tolist())) > 2
    for item in range(9):
        state = select_rows(chain.state(), torch.tensor([item]))
        alone = beam_search(chain.step, start[item, None], state=state, **options)
        length = alone.tokens.shape[2]
        torch.testing.assert_close(together.tokens[item, :, :length], alone.tokens[0])
        assert (together.tokens[item, :, length:] == END).all()
        torch.testing.assert_close(together.scores[item], alone.scores[0])


def test_a_wider_beam_finds_no_worse_texts_here() -> None:
    chain, start = Chain(50), torch.ones(50, dtype=torch.int64)
    scores = [
        beam_search(chain.step, start, end_token=END, beam_size=k, max_length=5, state=chain.state()).scores.mean()
        for k in (1, 3, 200)
    ]
    assert scores[0] < scores[1] <= scores[2]


def test_results_differ_and_are_ordered() -> None:
    chain = Chain(4)
    found = beam_search(
        chain.step, torch.ones(4).long(), end_token=END, beam_size=6, max_length=6, num_results=6, state=chain.state()
    )
    assert (found.scores.diff(dim=1) <= 0).all()
    for tokens in found.tokens.tolist():
        assert len({tuple(row) for row in tokens}) == 6


def language_model() -> LanguageModel:
    return LanguageModel(7, 8, 2, lambda _: Attention(8, 2), feed_forward_size=16).double().eval()


def test_language_model_goes_on_behind_a_prompt() -> None:
    model, prompts = language_model(), torch.randint(1, 7, (3, 5))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)
        _, state = model(prompts[:, :-1], keep_state=True)
        found = beam_search(
            language_model_step(model),
            prompts[:, -1],
            end_token=END,
            beam_size=4,
            max_length=6,
            num_results=2,
            state=state,
        )
        for item, tokens in enumerate(found.tokens):
            for place, text in enumerate(tokens):
                text = text[: found.lengths[item, place]]
                whole = torch.cat([prompts[item], text])[None]
                log_probs = model(whole)[0].log_softmax(-1)[4:-1]
                expected = log_probs.gather(1, text[:, None]).sum()
                torch.testing.assert_close(found.log_probs[item, place], expected)


def drawn(chain: Chain, count: int, seed: int = 0, **options: Any) -> Beams:
    generator = torch.Generator().manual_seed(seed)
    start = torch.ones(len(chain.table), dtype=torch.int64)
    return sample(
        chain.step,
        start,
        end_token=END,
        max_length=3,
        num_results=count,
        state=chain.state(),
        generator=generator,
        **options,
    )


def test_samples_have_the_chains_frequencies() -> None:
    chain = Chain(2, sharpness=1.0)
    found = drawn(chain, 20_000)
    for item in range(2):
        for text in all_texts(3):
            padded = torch.tensor(text + (END,) * (3 - len(text)))
            rows = (found.tokens[item] == padded).all(dim=1)
            expected = chain.log_prob(item, 1, text)
            assert rows.double().mean().item() == pytest.approx(torch.tensor(expected).exp().item(), abs=0.02)
            if rows.any():
                assert found.log_probs[item][rows][0].item() == pytest.approx(expected)
                assert found.lengths[item][rows][0] == len(text)
    assert (found.log_probs.diff(dim=1) <= 0).all()


@pytest.mark.parametrize("options", [{"top_k": 1}, {"temperature": 1e-4}, {"top_p": 1e-6}])
def test_samples_tend_to_greedy_decoding(options: dict[str, Any]) -> None:
    chain = Chain(10)
    greedy = beam_search(
        chain.step, torch.ones(10).long(), end_token=END, beam_size=1, max_length=3, state=chain.state()
    )
    found = drawn(chain, 2, **options)
    assert (found.tokens == greedy.tokens).all()


def test_samples_are_the_seeds() -> None:
    chain = Chain(5)
    assert (drawn(chain, 20).tokens == drawn(chain, 20).tokens).all()
    assert drawn(chain, 20).tokens.tolist() != drawn(chain, 20, seed=1).tokens.tolist()


def test_filters_by_hand() -> None:
    p = torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64)

    def kept(**options: Any) -> list[float]:
        return filtered_log_probs(p.log(), **options).exp().tolist()

    assert kept() == pytest.approx(p.tolist())
    assert kept(top_k=2) == pytest.approx([0, 4 / 7, 0, 3 / 7])
    assert kept(top_k=9) == pytest.approx(p.tolist())
    assert kept(top_p=0.6) == pytest.approx([0, 4 / 7, 0, 3 / 7])
    assert kept(top_p=0.75) == pytest.approx([0, 4 / 9, 2 / 9, 3 / 9])
    assert kept(top_p=1.0) == pytest.approx(p.tolist())
    # Of the two likeliest, 4/7 and 3/7, the first is enough.
    assert kept(top_k=2, top_p=0.5) == pytest.approx([0, 1, 0, 0])
    squared = p**2 / (p**2).sum()
    assert kept(temperature=0.5) == pytest.approx(squared.tolist())


def test_clear_errors() -> None:
    chain, start = Chain(2), torch.ones(2, dtype=torch.int64)
    options: dict[str, Any] = {"end_token": END, "beam_size": 2, "max_length": 3, "state": chain.state()}
    with pytest.raises(UserError, match="no 3 results"):
        beam_search(chain.step, start, **options, num_results=3)
    with pytest.raises(UserError, match="at least 1"):
        beam_search(chain.step, start, **{**options, "max_length": 0})
    with pytest.raises(UserError, match=r"\[batch\] of int64"):
        beam_search(chain.step, start[:, None], **options)
    for wrong in ({"temperature": 0}, {"top_k": 0}, {"top_p": 0}, {"top_p": 1.5}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            drawn(chain, 1, **wrong)
