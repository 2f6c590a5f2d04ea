"""Answers of a language model to many prompts at once, with a key-value cache: greedy, sampled, or scored.

Prompts that share a beginning have it read once; what differs is padded on the left, so that all rows go on from the
same place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .config import Decoding
from .tokens import Rows, Tokenizer

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel


@dataclass(frozen=True)
class Answers:
    """Texts of greedy and of sampled answers, one a row, and log-likelihoods [rows, candidates] (None without)."""

    greedy: list[str]
    sampled: list[str]
    scores: NDArray[np.float64] | None


@torch.no_grad()
def answer(
    model: GPT2LMHeadModel,
    rows: Rows,
    tokenizer: Tokenizer,
    candidates: Sequence[str],
    settings: Decoding,
    seed: int,
) -> Answers:
    """Answers to all rows of one table, in batches of similar length; `seed` draws the samples.

    An answer ends with the end token, or where it is longer than the longest of the `candidates` by half, or at the
    end of the context.
    """
    device = next(model.parameters()).device
    ends = [[*each, tokenizer.end] for each in tokenizer.encode(candidates)]
    longest = max(map(len, ends))
    order = sorted(range(len(rows.prompts)), key=lambda row: len(rows.prompts[row]))
    generator = torch.Generator(device).manual_seed(seed)
    greedy, sampled = [""] * len(order), [""] * len(order)
    scores = np.zeros((len(order), len(ends))) if settings.scored else None
    prefix = _read_prefix(model, rows.prefix)
    for start in range(0, len(order), settings.batch_size):
        chosen = order[start : start + settings.batch_size]
        state = read_prompts(model, rows.prefix, [rows.prompts[row] for row in chosen], tokenizer.pad, prefix)
        room = model.config.n_positions - int(state.lengths.max())
        if scores is not None:
            scores[chosen] = score_candidates(model, state, ends, tokenizer.pad) if longest <= room else 0.0
        # Greedy and sampled answers are written side by side: a step costs about the same for twice the rows.
        both = state.repeat(2)
        is_sampled = torch.arange(2 * len(chosen), device=device) % 2 == 1
        written = decode(model, both, min(longest + longest // 2, room), tokenizer.end, settings, is_sampled, generator)
        texts = tokenizer.decode(written)
        for place, row in enumerate(chosen):
            greedy[row], sampled[row] = texts[2 * place], texts[2 * place + 1]
    return Answers(greedy, sampled, scores)


@dataclass
class PromptState:
    """Prompts that were read: the cache, which of its places count [B, S], true lengths [B], next logits [B, V]."""

    cache: Any
    mask: Tensor
    lengths: Tensor
    logits: Tensor

    def repeat(self, times: int) -> PromptState:
        """A copy with every row `times` times, one after the other."""
        return PromptState(
            _copied(self.cache, times),
            self.mask.repeat_interleave(times, 0),
            self.lengths.repeat_interleave(times, 0),
            self.logits.repeat_interleave(times, 0),
        )


@torch.no_grad()
def read_prompts(
    model: GPT2LMHeadModel, prefix: list[int], prompts: Sequence[list[int]], pad: int, cache: Any | None = None
) -> PromptState:
    """Read `prefix` + each of the prompts, which are padded on the left; `cache` holds the prefix if it was read."""
    device = next(model.parameters()).device
    length = max(map(len, prompts))
    tokens = torch.tensor([[pad] * (length - len(each)) + each for each in prompts], device=device)
    counts = torch.tensor([len(each) for each in prompts], device=device)
    mask = torch.arange(length, device=device) >= length - counts[:, None]
    positions = (mask.cumsum(1) - 1).clamp(min=0) + len(prefix)
    if prefix:
        cache = _copied(cache if cache is not None else _read_prefix(model, prefix), len(prompts))
        mask = torch.cat([mask.new_ones(len(prompts), len(prefix)), mask], dim=1)
    output = _forward(model, tokens, positions, mask, cache if prefix else None)
    return PromptState(output[1], mask, counts + len(prefix), output[0][:, -1])


@torch.no_grad()
def decode(
    model: GPT2LMHeadModel,
    state: PromptState,
    max_tokens: int,
    end: int,
    settings: Decoding,
    is_sampled: Tensor,
    generator: torch.Generator,
) -> list[list[int]]:
    """Go on from `state` until every row has written `end`; the tokens of each row before it.

    Rows where `is_sampled` draw from the `generator`, the others take the likeliest token. Uses up the state.
    """
    written = torch.full((len(is_sampled), max(max_tokens, 0)), end, device=is_sampled.device)
    finished = torch.zeros_like(is_sampled)
    logits, mask, positions = state.logits, state.mask, state.lengths[:, None]
    for step in range(max_tokens):
        token = logits.argmax(dim=-1)
        if is_sampled.any():
            token[is_sampled] = sample(logits[is_sampled], settings, generator)
        token = torch.where(finished, end, token)
        written[:, step] = token
        finished |= token == end
        if finished.all() or step + 1 == max_tokens:
            break
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        logits = _forward(model, token[:, None], positions, mask, state.cache)[0][:, -1]
        positions = positions + 1
    rows = written.tolist()
    return [row[: row.index(end)] if end in row else row for row in rows]


def sample(logits: Tensor, settings: Decoding, generator: torch.Generator) -> Tensor:
    """Tokens [B] from logits [B, V] at temperature 1: of the `top_k` likeliest, and of those the likeliest that
    together have probability `top_p`, the one that reaches it included."""
    values, tokens = logits.float().topk(min(settings.top_k, logits.shape[-1]), dim=-1)
    probabilities = values.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities.masked_fill(before >= settings.top_p, 0.0)
    chosen = torch.multinomial(probabilities, 1, generator=generator)
    return tokens.gather(-1, chosen)[:, 0]


@torch.no_grad()
def score_candidates(
    model: GPT2LMHeadModel, state: PromptState, candidates: Sequence[list[int]], pad: int
) -> NDArray[np.float64]:
    """Log-likelihoods [B, C] of each candidate's tokens after each prompt, all in one pass; leaves the state as it is.

    Candidates are padded on the right, where nothing of theirs looks.
    """
    device = state.logits.device
    length = max(map(len, candidates))
    tokens = torch.tensor([each + [pad] * (length - len(each)) for each in candidates], device=device)
    counts = torch.tensor([len(each) for each in candidates], device=device)
    number, rows = len(candidates), len(state.lengths)
    every = state.repeat(number)
    targets = tokens.repeat(rows, 1)
    positions = every.lengths[:, None] + torch.arange(length - 1, device=device)
    logits = every.logits[:, None]
    if length > 1:
        mask = torch.cat([every.mask, every.mask.new_ones(len(targets), length - 1)], dim=1)
        logits = torch.cat([logits, _forward(model, targets[:, :-1], positions, mask, every.cache)[0]], dim=1)
    likelihoods = logits.float().log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    counted = torch.arange(length, device=device) < counts.repeat(rows)[:, None]
    return (likelihoods * counted).sum(1).reshape(rows, number).double().cpu().numpy()


def _read_prefix(model: GPT2LMHeadModel, prefix: list[int]) -> Any:
    if not prefix:
        return None
    device = next(model.parameters()).device
    positions = torch.arange(len(prefix), device=device)[None]
    mask = torch.ones(1, len(prefix), dtype=torch.bool, device=device)
    return _forward(model, torch.tensor([prefix], device=device), positions, mask, None)[1]


def _forward(
    model: GPT2LMHeadModel, tokens: Tensor, positions: Tensor, mask: Tensor, cache: Any | None
) -> tuple[Tensor, Any]:
    """Logits [B, T, V] of new tokens [B, T], and the cache, which has grown by them; mask [B, S + T]."""
    output = model(input_ids=tokens, position_ids=positions, attention_mask=mask.long(), cache=cache, use_cache=True)
    return output.logits, output.cache


def _copied(cache: Any, times: int) -> Any:
    """A cache of its own with every row `times` times."""
    from transformers import DynamicCache

    copy = DynamicCache()
    for number, layer in enumerate(cache.layers):
        copy.update(layer.keys.repeat_interleave(times, 0), layer.values.repeat_interleave(times, 0), number)
    return copy
