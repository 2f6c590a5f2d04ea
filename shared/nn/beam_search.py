"""Decoding of any model that goes on token by token: beam search, and sampling.

A step takes the last tokens `[R]` int64 and a state, and gives the log-probabilities of the next ones `[R, V]` and the
next state: nested dicts, lists and tuples of tensors whose first axis are the R rows, or None. Rows are B items of K
beams each, those of an item one behind the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shared.config import UserError

Step = Callable[[Tensor, Any], tuple[Tensor, Any]]


@dataclass(frozen=True)
class Beams:
    """N results for each of B items, best first: `tokens` [B, N, L] without the start, end tokens behind the end.

    `lengths` [B, N] count the end token, where there is one; `log_probs` [B, N] are those of all tokens up to there,
    and `scores` [B, N] what was ranked by.
    """

    tokens: Tensor
    lengths: Tensor
    log_probs: Tensor
    scores: Tensor


@torch.no_grad()
def beam_search(
    step: Step,
    start: Tensor,
    *,
    end_token: int,
    beam_size: int,
    max_length: int,
    num_results: int = 1,
    length_penalty: float = 0.0,
    state: Any = None,
) -> Beams:
    """The most probable continuations of the start tokens `[B]`, by log p / length^`length_penalty`.

    In every step the `beam_size` best of all continuations of an item are kept, finished ones among them as they are,
    until all are finished or `max_length` tokens long. A beam of 1 is greedy decoding. `state` is that before the start
    tokens, with B rows. Items do not influence each other. Where there are fewer texts than results, the last ones have
    a log-probability of −∞.
    """
    _check(start, max_length, num_results)
    if not num_results <= beam_size:
        raise UserError(f"a beam of {beam_size} has no {num_results} results: widen it")
    num_items, device = len(start), start.device
    items = torch.arange(num_items, device=device)[:, None]
    state = select_rows(state, items.expand(-1, beam_size).flatten())
    last = start.repeat_interleave(beam_size)
    tokens = torch.full((num_items, beam_size, max_length), end_token, dtype=torch.int64, device=device)
    lengths = torch.zeros(num_items, beam_size, dtype=torch.int64, device=device)
    finished = torch.zeros(num_items, beam_size, dtype=torch.bool, device=device)
    log_probs = None
    for place in range(max_length):
        next_log_probs, state = step(last, state)
        vocab_size = next_log_probs.shape[-1]
        next_log_probs = next_log_probs.view(num_items, beam_size, vocab_size)
        if log_probs is None:
            # All beams of an item are the same yet: the first one speaks for them.
            log_probs = torch.full((num_items, beam_size), -torch.inf, dtype=next_log_probs.dtype, device=device)
            log_probs[:, 0] = 0
        # A finished text goes on with its end token alone, for nothing.
        only_end = torch.full_like(next_log_probs[0, 0], -torch.inf)
        only_end[end_token] = 0
        next_log_probs = torch.where(finished[..., None], only_end, next_log_probs)
        total = log_probs[..., None] + next_log_probs
        grown = lengths + (~finished).long()
        chosen = _ranked(total, grown, length_penalty).flatten(1).topk(beam_size).indices
        beams, words = chosen // vocab_size, chosen % vocab_size
        log_probs = total.flatten(1).gather(1, chosen)
        lengths, finished = grown[items, beams], finished[items, beams] | (words == end_token)
        tokens = tokens[items, beams]
        tokens[..., place] = words
        if finished.all():
            break
        state = select_rows(state, (items * beam_size + beams).flatten())
        last = words.flatten()
    assert log_probs is not None
    scores = _ranked(log_probs[..., None], lengths, length_penalty)[..., 0]
    tokens = tokens[:, :num_results, : int(lengths[:, :num_results].max())]
    return Beams(tokens, lengths[:, :num_results], log_probs[:, :num_results], scores[:, :num_results])


@torch.no_grad()
def sample(
    step: Step,
    start: Tensor,
    *,
    end_token: int,
    max_length: int,
    num_results: int = 1,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    state: Any = None,
) -> Beams:
    """`num_results` random continuations of the start tokens `[B]`, sorted by their log-probability.

    Tokens are drawn by `filtered_log_probs`, and these are what `log_probs` adds up. A `generator` must be of the
    tokens' device.
    """
    _check(start, max_length, num_results)
    num_items, device = len(start), start.device
    rows = torch.arange(num_items, device=device).repeat_interleave(num_results)
    state, last = select_rows(state, rows), start[rows]
    finished = torch.zeros_like(last, dtype=torch.bool)
    columns, total, lengths = [], None, torch.zeros_like(last)
    for _ in range(max_length):
        next_log_probs, state = step(last, state)
        next_log_probs = filtered_log_probs(next_log_probs, temperature, top_k, top_p)
        drawn = torch.multinomial(next_log_probs.exp(), 1, generator=generator)
        gained = next_log_probs.gather(1, drawn)[:, 0].masked_fill(finished, 0)
        last = drawn[:, 0].masked_fill(finished, end_token)
        total = gained if total is None else total + gained
        lengths += (~finished).long()
        finished |= last == end_token
        columns.append(last)
        if finished.all():
            break
    assert total is not None
    log_probs, order = total.view(num_items, num_results).sort(dim=1, descending=True, stable=True)
    lengths = lengths.view(num_items, num_results).gather(1, order)
    tokens = torch.stack(columns, dim=1).view(num_items, num_results, -1)
    tokens = tokens[torch.arange(num_items, device=device)[:, None], order]
    return Beams(tokens, lengths, log_probs, log_probs)


def filtered_log_probs(
    log_probs: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Log-probabilities `[…, V]` to those that are drawn from: divided by the temperature, cut, and normalized.

    Of the distribution at that temperature the `top_k` likeliest tokens are kept (those as likely as the last, too),
    and of these the likeliest that together have a probability of `top_p` (Holtzman et al. 2020, section 3.1).
    """
    if not temperature > 0:
        raise UserError(f"temperature must be above 0, not {temperature}: a beam of 1 is what it tends to at 0")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k must be at least 1, not {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p must lie above 0 and be at most 1, not {top_p}")
    log_probs = (log_probs / temperature).log_softmax(-1)
    if top_k is not None and top_k < log_probs.shape[-1]:
        least = log_probs.topk(top_k, dim=-1).values[..., -1:]
        log_probs = log_probs.masked_fill(log_probs < least, -torch.inf).log_softmax(-1)
    if top_p is not None and top_p < 1:
        ordered, order = log_probs.sort(dim=-1, descending=True, stable=True)
        # A token is left out where those before it have enough already.
        enough = ordered.exp().cumsum(-1) - ordered.exp() >= top_p
        cut = torch.zeros_like(enough).scatter(-1, order, enough)
        log_probs = log_probs.masked_fill(cut, -torch.inf).log_softmax(-1)
    return log_probs


def language_model_step(model: nn.Module) -> Step:
    """The step of a `shared.nn.LanguageModel`, or any called as `model(tokens [R, T], state, keep_state=True)`.

    Prompts of one length are read before: `_, state = model(prompts[:, :-1], keep_state=True)`, and their last tokens
    are the start.
    """

    def step(tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        logits, state = model(tokens[:, None], state, keep_state=True)
        return logits[:, 0].log_softmax(-1), state

    return step


def select_rows(state: Any, rows: Tensor) -> Any:
    """The rows `[R']` of all tensors of a state, repeats allowed; what is no tensor is kept."""
    if isinstance(state, Tensor):
        return state.index_select(0, rows)
    if isinstance(state, dict):
        return {name: select_rows(part, rows) for name, part in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(select_rows(part, rows) for part in state)
    return state


def _ranked(log_probs: Tensor, lengths: Tensor, length_penalty: float) -> Tensor:
    """Scores of `[B, K, V]` by the lengths `[B, K]`."""
    if not length_penalty:
        return log_probs
    return log_probs / lengths.to(log_probs.dtype)[..., None] ** length_penalty


def _check(start: Tensor, max_length: int, num_results: int) -> None:
    if start.ndim != 1 or start.dtype != torch.int64 or not len(start):
        raise UserError(
            f"start must be one token an item, [batch] of int64 (given: {list(start.shape)}, {start.dtype})"
        )
    if max_length < 1 or num_results < 1:
        raise UserError(f"max_length ({max_length}) and num_results ({num_results}) must be at least 1")
