"""Runs of operators on queries, keys and values whose results and gradients are held against float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}

Run = Callable[..., tuple[Tensor, Tensor | None]]


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
    for name, gradient in zip(leaves, gradients, strict=True):
        assert gradient.shape == leaves[name].shape
        assert gradient.dtype == leaves[name].dtype
    return {"o": o.detach(), "final_state": state.detach(), **dict(zip(leaves, gradients, strict=True))}


def relative_error(result: Tensor, reference: Tensor) -> float:
    """‖result − reference‖ / ‖reference‖, and the plain norm where the reference is zero."""
    error = torch.linalg.vector_norm(result.detach().double() - reference.detach().double())
    norm = torch.linalg.vector_norm(reference.detach().double())
    return float(error / norm if norm > 0 else error)


def hold(results: dict[str, Tensor], reference: dict[str, Tensor], tolerance: float) -> None:
    """Every tensor is there and within `tolerance` of the reference by its relative error."""
    assert results.keys() == reference.keys()
    errors = {name: relative_error(results[name], reference[name]) for name in results}
    worst = {name: error for name, error in errors.items() if not error <= tolerance}
    assert not worst, f"relative errors above {tolerance}: {worst}"


def hold_against(definition: Run, run: Run, values: dict[str, Tensor], **options: object) -> None:
    """Values and gradients are those of the definition in float64 from the same numbers, each in its due type."""
    dtype = values["q"].dtype
    exact = {name: value.double() for name, value in values.items()}
    reference = values_and_gradients(definition, exact, rounded=dtype, **options)
    results = values_and_gradients(run, values, rounded=dtype, **options)
    assert results["o"].dtype == dtype
    assert results["final_state"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    hold(results, reference, TOLERANCE[dtype])
