"""Retrieval heads: how strongly a head copies, which heads are retrieval heads, and what an answer without them is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]
Head = tuple[int, int]
Kind = Literal["complete", "incomplete", "wrong_extraction", "hallucination"]
KINDS: tuple[Kind, ...] = ("complete", "incomplete", "wrong_extraction", "hallucination")

# A head is a retrieval head from here on (section 3.1).
THRESHOLD = 0.1
# Tests count for detection where more than half of the answer is there (released code: ROUGE-1 recall above 50).
SUCCESS = 0.5
# What counts as a whole answer, and as part of one: less has function words in common with it at most.
COMPLETE, INCOMPLETE = 0.9, 1 / 3


@dataclass(frozen=True)
class Needles:
    """Needle tests of one length.

    `tokens` [B, T] are prompts, `answer` [B, A] the spans asked for, which stand at `start` [B] … start + A - 1.
    `context` [B, 2] and `needle` [B, 2] are where the context and, in it, the whole needle begin and end; `depth` [B]
    is in per cent, `item` [B] numbers documents or needles.
    """

    tokens: Tensor
    answer: Tensor
    start: Tensor
    context: Tensor
    needle: Tensor
    depth: Tensor
    item: Tensor
    length: int

    def __len__(self) -> int:
        return len(self.tokens)


# --- How strongly a head copies ---------------------------------------------------------------------------------------


def copies(needles: Needles, made: Tensor, attended: Tensor) -> Tensor:
    """Whether a head copies: it looks at a token of the answer's span, and that token is produced.

    `made` [B, N] are the tokens produced, `attended` [B, N, L, H] the position that each head attended to most from the
    token that produced them. Returns [B, N, L, H]. Section 2, "retrieval score", criteria (1) and (2).
    """
    start = needles.start.view(-1, 1, 1, 1)
    inside = (attended >= start) & (attended < start + needles.answer.shape[1])
    # Beyond the prompt lie tokens of the answer itself, which are no part of the needle.
    within = attended.clamp(max=needles.tokens.shape[1] - 1)
    there = needles.tokens.gather(1, within.flatten(1)).view_as(attended)
    return inside & (there == made[:, :, None, None])


def retrieval_score(copied: Tensor, made: Tensor, answer: Tensor) -> Tensor:
    """Share of the answer's tokens that a head copies, |g ∩ k| / |k|, a token recall in [0, 1]: [B, L, H].

    `copied` [B, N, L, H] as of `copies`, `made` [B, N], `answer` [B, A]. g and k are sets: a token that comes twice
    counts once. Section 2, equation (1).
    """
    same = made[:, :, None] == answer[:, None, :]  # [B, N, A]
    found = torch.einsum("bnlh,bna->balh", copied.double(), same.double()) > 0
    first = torch.triu(answer[:, :, None] == answer[:, None, :], diagonal=1).any(dim=1).logical_not()
    return torch.einsum("balh,ba->blh", found.double(), first.double()) / first.sum(dim=1)[:, None, None]


def counted_score(copied: Tensor, answer_length: int) -> Tensor:
    """Steps at which a head copies, over the length of the answer: [B, L, H].

    The released code's score, by which the published ones were made: a token that is produced again counts again, so
    that it can exceed 1.
    """
    return copied.double().sum(dim=1) / answer_length


def activation_frequency(scores: Array) -> Array:
    """Share of tests in which a head copied at least one token: [tests, L, H] to [L, H]. Section 3.2."""
    return (scores > 0).mean(axis=0)


def ranked(score: Array) -> list[Head]:
    """All heads (layer, head), strongest first; equal ones in the order of layers and heads."""
    order = np.argsort(-score.ravel(), kind="stable")
    return [(int(index // score.shape[1]), int(index % score.shape[1])) for index in order]


# --- What scores of many heads say ------------------------------------------------------------------------------------


def shares(score: Array) -> dict[str, float]:
    """Shares of heads [L, H] by mean score: retrieval heads, heads that never copy, weak and strong ones."""
    return {
        "retrieval_share": float((score >= THRESHOLD).mean()),
        "zero_share": float((score == 0).mean()),
        "weak_share": float(((score > 0) & (score < THRESHOLD)).mean()),
        "middle_share": float(((score >= THRESHOLD) & (score <= 0.5)).mean()),
        "strong_share": float((score > 0.5).mean()),
    }


def pearson(first: Array, second: Array) -> float | None:
    """Correlation of two score maps [L, H] of one shape; None where one of them is the same everywhere."""
    a, b = first.ravel() - first.mean(), second.ravel() - second.mean()
    scale = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / scale) if scale > 0 else None


# --- What an answer is ------------------------------------------------------------------------------------------------


def token_recall(made: Tensor, answer: Tensor) -> Array:
    """Share of the answer's tokens [B, A] that are among those made [B, N]: what ROUGE-1 recall is for single words."""
    left = made[:, None, :] == answer[:, :, None]  # [B, A, N]
    wanted = (answer[:, None, :] == answer[:, :, None]).sum(dim=2)
    # A word that is wanted twice is found as often as it was made, at most twice: each place has its part of that.
    found = torch.minimum(left.sum(dim=2), wanted) / wanted
    return found.double().mean(dim=1).cpu().numpy()


def cut(made: Tensor, stop: Tensor) -> list[Tensor]:
    """The tokens of each answer [B, N] before the first of the tokens `stop` [S]."""
    ended = torch.isin(made, stop).cumsum(dim=1) > 0
    return [row[~over] for row, over in zip(made, ended, strict=True)]


def kind_of_answer(needles: Needles, index: int, made: Tensor, recall: float, run: int) -> Kind:
    """What became of a needle: the whole of it, part of it, another part of the context, or something invented.

    `made` are the tokens of the answer. Of answers that hold less than a third of the needle, those in which `run`
    tokens in a row stand in the context outside of the needle are wrong extractions. Section 4.1.
    """
    if recall >= COMPLETE:
        return "complete"
    if recall >= INCOMPLETE - 1e-9:
        return "incomplete"
    begin, end = needles.context[index].tolist()
    first, last = needles.needle[index].tolist()
    parts = (needles.tokens[index, begin:first], needles.tokens[index, last:end])
    return "wrong_extraction" if any(_share_a_run(part, made, run) for part in parts) else "hallucination"


def _share_a_run(text: Tensor, made: Tensor, run: int) -> bool:
    if min(len(text), len(made)) < run:
        return False
    there, wanted = text.unfold(0, run, 1), made.unfold(0, run, 1)
    return any(bool((there == row).all(dim=1).any()) for row in wanted)
