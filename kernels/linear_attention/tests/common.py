"""Inputs for the tests, and the recurrence in float64 that results and gradients are held against."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from kernels.tests.comparing import hold_against

from ..reference import gla_reference

FORMS = ("none", "constant", "scalar", "vector")


def inputs(
    form: str,
    batch: int = 2,
    length: int = 20,
    heads: int = 2,
    key_dim: int = 5,
    value_dim: int = 3,
    *,
    normalizer: float = 1.0,
    dtype: torch.dtype = torch.float64,
    sequences: int | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """q, k, v, the gate logsigmoid(rand) / normalizer and the initial state."""
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.float64}
    shape = (batch, length, heads, key_dim)
    values = {
        "q": torch.randn(shape, **draw),
        "k": torch.randn(shape, **draw),
        "v": torch.randn(*shape[:-1], value_dim, **draw),
        "initial_state": torch.randn(batch if sequences is None else sequences, heads, key_dim, value_dim, **draw),
    }
    gate = {"constant": (heads,), "scalar": shape[:-1], "vector": shape}.get(form)
    if gate is not None:
        values["g"] = functional.logsigmoid(torch.rand(gate, **draw)) / normalizer
    return {name: value.to(dtype) for name, value in values.items()}


hold_against_reference = partial(hold_against, gla_reference)
