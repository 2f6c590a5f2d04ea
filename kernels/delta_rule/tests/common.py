"""Inputs for the tests, and the recurrence in float64 that results and gradients are held against."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from kernels.tests.comparing import hold_against

from ..reference import delta_rule_reference


def inputs(
    batch: int = 2,
    length: int = 20,
    heads: int = 2,
    key_dim: int = 5,
    value_dim: int = 3,
    *,
    keys: str = "random",
    largest_beta: float = 2.0,
    sequences: int | None = None,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> dict[str, Tensor]:
    """q, k of unit length, v, beta and the initial state; keys "random", "repeated" (three of them) or "collinear"."""
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.float64}
    shape = (batch, length, heads, key_dim)
    k = torch.randn(shape, **draw)
    if keys == "repeated":
        k = k[:, torch.randint(min(3, length), (length,), generator=generator)]
    elif keys == "collinear":
        k = torch.randn(batch, 1, heads, key_dim, **draw) + 0.01 * k
    values = {
        "q": functional.normalize(torch.randn(shape, **draw), dim=-1),
        "k": functional.normalize(k, dim=-1),
        "v": torch.randn(*shape[:-1], value_dim, **draw),
        "beta": largest_beta * torch.rand(shape[:-1], **draw),
        "initial_state": torch.randn(batch if sequences is None else sequences, heads, key_dim, value_dim, **draw),
    }
    return {name: value.to(dtype) for name, value in values.items()}


hold_against_reference = partial(hold_against, delta_rule_reference)
