"""What retrieval heads are compared with: random heads, random heads of the same layers, induction heads."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from shared.lm.hooked import HookedLM

from .model import THRESHOLD, Head, ranked

Array = NDArray[np.float64]
# The released code draws random heads from all but the 100 strongest of 1,024.
EXCLUDED_SHARE = 100 / 1024


def random_heads(score: Array, count: int, rng: np.random.Generator) -> list[Head]:
    """`count` heads drawn from those [L, H] that are not retrieval heads, nor among the strongest.

    Left out are heads with a score of at least 0.1, the strongest tenth, and as many of the strongest as are drawn;
    where fewer than `count` heads are left then, all but the weakest `count`.
    """
    left_out = max(count, math.ceil(EXCLUDED_SHARE * score.size), int((score >= THRESHOLD).sum()))
    pool = ranked(score)[min(left_out, score.size - count) :]
    return _draw(pool, count, rng)


def layer_matched_heads(score: Array, chosen: Sequence[Head], rng: np.random.Generator) -> list[Head]:
    """As many heads as are `chosen`, none of which is, from the layers that these are in, in equal numbers.

    Where a layer has too few others, heads of all layers fill up.
    """
    others = [head for head in ranked(score) if head not in set(chosen)]
    drawn: list[Head] = []
    for layer, count in sorted(Counter(layer for layer, _ in chosen).items()):
        pool = [head for head in others if head[0] == layer]
        drawn += _draw(pool, min(count, len(pool)), rng)
    rest = [head for head in others if head not in drawn]
    return drawn + _draw(rest, min(len(chosen) - len(drawn), len(rest)), rng)


def _draw(pool: Sequence[Head], count: int, rng: np.random.Generator) -> list[Head]:
    return [pool[index] for index in rng.permutation(len(pool))[:count]]


@torch.no_grad()
def induction_score(
    lm: HookedLM, words: NDArray[np.int64], *, period: int = 20, batch: int = 32, seed: int = 0
) -> Array:
    """Mean attention of each head, from tokens of a random sequence's repeat to the token after the same one: [L, H].

    `words` are the tokens to draw from. Olsson et al., "In-context Learning and Induction Heads" (2022), section on
    the prefix matching score.
    """
    rng = np.random.default_rng(seed)
    once = torch.from_numpy(rng.choice(words, size=(batch, period))).to(lm.device)
    total = np.zeros((lm.num_layers, lm.num_heads))
    for row in once.repeat(1, 2).split(max(1, 256 // lm.num_layers)):
        pattern = lm.forward(row, cache=["attn.pattern"], logits="none").kept.stack("attn.pattern")
        total += pattern.diagonal(1 - period, dim1=-2, dim2=-1)[..., 1:].double().mean(-1).sum(1).cpu().numpy()
    return total / batch
