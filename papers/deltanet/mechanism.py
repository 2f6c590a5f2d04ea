"""What each update rule does to a memory, without any training: key–value pairs are written, half of them anew.

A memory is the state S [K, V] of a linear-attention layer. Its value for a key k is S^T k (section 2), and the error of
recall is ‖S^T k − v‖ / ‖v‖ for the value v that was bound to k last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from kernels.delta_rule import delta_rule
from kernels.linear_attention import gla
from shared.config import Strict

Write = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class MechanismSettings(Strict):
    """A memory of `dimension`² numbers, written with each number of pairs in `num_pairs` and re-bound by half."""

    dimension: PositiveInt = 32
    num_pairs: tuple[int, ...] = (8, 16, 24, 32, 48, 64)
    num_seeds: int = Field(20, ge=3)
    decay: float = Field(0.98, gt=0, lt=1)


def write_additive(keys: Tensor, values: Tensor, state: Tensor | None = None) -> Tensor:
    """S + Σ k vᵀ: keys [B, T, K] and values [B, T, V] into a state [B, K, V]."""
    return _final_state(gla, keys, values, None, state)


def write_with_decay(keys: Tensor, values: Tensor, state: Tensor | None = None, *, decay: float) -> Tensor:
    """S ← decay · S + k vᵀ for one pair after the other; shapes as in `write_additive`."""
    return _final_state(gla, keys, values, torch.tensor([math.log(decay)], dtype=keys.dtype), state)


def write_by_delta_rule(keys: Tensor, values: Tensor, state: Tensor | None = None, *, beta: float) -> Tensor:
    """S ← S + beta · k (v − Sᵀ k)ᵀ for one pair after the other; shapes as in `write_additive`."""
    return _final_state(delta_rule, keys, values, keys.new_full((*keys.shape[:2], 1), beta), state)


def _final_state(operator: Callable[..., Any], keys: Tensor, values: Tensor, gate: Any, state: Tensor | None) -> Tensor:
    keys, values = keys[:, :, None], values[:, :, None]
    start = None if state is None else state[:, None]
    return operator(keys, keys, values, gate, initial_state=start, output_final_state=True)[1][:, 0]


def recall_error(state: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Relative error [B] of recalling values [B, T, V] by keys [B, T, K], averaged over the pairs."""
    recalled = keys @ state
    return ((recalled - values).norm(dim=-1) / values.norm(dim=-1)).mean(dim=-1)


def random_pairs(num_pairs: int, dimension: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Unit keys, values, and other values to bind them to later, each [num_pairs, dimension], in double precision."""
    generator = torch.Generator().manual_seed(seed)
    keys, values, others = torch.randn(3, num_pairs, dimension, generator=generator, dtype=torch.float64)
    return keys / keys.norm(dim=-1, keepdim=True), values, others


def recall_errors(settings: MechanismSettings) -> Iterator[dict[str, Any]]:
    """Rows of scores: recall error by rule, number of pairs and seed; of all pairs once they are written (`bound`), and
    then, after half of them was bound to other values, of these (`overwritten`) and of the rest (`other`)."""
    rules: dict[str, Write] = {
        "additive": write_additive,
        "decay": lambda *pairs: write_with_decay(*pairs, decay=settings.decay),
        "delta_rule": lambda *pairs: write_by_delta_rule(*pairs, beta=1.0),
        "delta_rule_half": lambda *pairs: write_by_delta_rule(*pairs, beta=0.5),
    }
    for count in settings.num_pairs:
        pairs = [random_pairs(count, settings.dimension, seed) for seed in range(settings.num_seeds)]
        keys, values, others = (torch.stack(part) for part in zip(*pairs, strict=True))
        half = count // 2
        for rule, write in rules.items():
            state = write(keys, values, None)
            later = write(keys[:, :half], others[:, :half], state)
            errors = {
                "bound": recall_error(state, keys, values),
                "overwritten": recall_error(later, keys[:, :half], others[:, :half]),
                "other": recall_error(later, keys[:, half:], values[:, half:]),
            }
            for which, of_seed in errors.items():
                for seed, error in enumerate(of_seed.tolist()):
                    row = {"model": rule, "dataset": f"mechanism/{which}", "metric": "recall_error", "seed": seed}
                    yield row | {"pairs": count, "value": error}
