"""Inputs for the tests, and runs whose results and gradients are held against the recurrence in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from ..reference import delta_rule_reference

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}

Run = Callable[..., tuple[Tensor, Tensor | None]]


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


def values_and_gradients(
    run: Run, values: dict[str, Tensor], *, rounded: torch.dtype = torch.float64, **options: object
) -> dict[str, Tensor]:
    """o, the final state and the gradient of every input, for fixed random gradients of both.

    These are `rounded`, so that two precisions can be compared on numbers that both of them hold.
    """
    leaves = {name: value.detach().clone().requires_grad_() for name, value in values.items()}
    o, state = run(**leaves, output_final_state=True, **options)
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (x.double() * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(rounded)).sum()
        for x in (o, state)
    )
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return {"o": o.detach(), "state": state.detach(), **dict(zip(leaves, gradients, strict=True))}


def relative_error(x: Tensor, expected: Tensor) -> float:
    return float((x.double() - expected).norm() / expected.norm())


def hold(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Every tensor is there and within the tolerance."""
    assert got.keys() == expected.keys()
    errors = {name: relative_error(x, expected[name]) for name, x in got.items()}
    assert all(error <= tolerance for error in errors.values()), errors


def hold_against_reference(run: Run, values: dict[str, Tensor], **options: object) -> None:
    """Values and gradients are those of the recurrence in float64 from the same numbers, each in its due type."""
    dtype = values["q"].dtype
    expected = values_and_gradients(
        delta_rule_reference, {name: x.double() for name, x in values.items()}, rounded=dtype, **options
    )
    got = values_and_gradients(run, values, rounded=dtype, **options)
    assert got["o"].dtype == dtype
    assert got["state"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert all(got[name].dtype == x.dtype for name, x in values.items())
    hold(got, expected, TOLERANCE[dtype])
