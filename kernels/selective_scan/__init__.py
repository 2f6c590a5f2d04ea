"""The selective state-space scan of Mamba (version 1)."""

from __future__ import annotations

from torch import Tensor

from kernels.selective_scan.cpu import selective_scan_cpu

__all__ = ["selective_scan"]


def selective_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Run one diagonal linear recurrence of N states a channel, whose step, input and output depend on the token.

        h_t = exp(delta_t A) ⊙ h_{t-1} + (delta_t x_t) B_tᵀ        h `[B, D, N]`, h_0 = `initial_state` or zero
        y_t = h_t C_t + D ⊙ x_t

    x `[B, T, D]`; delta `[B, T, D]`, the step size, > 0; A `[D, N]`, < 0; B and C `[B, T, N]`; D `[D]`. Returns y
    `[B, T, D]` in the dtype of x and, with `output_final_state`, the last h, else None. States and sums are float32,
    or float64 where any input is. Differentiable once in every tensor; memory for the backward pass is a fraction of
    the B·T·D·N states, which are recomputed.

    Raises ValueError for wrong shapes and devices, TypeError for dtypes that are not floating point.
    Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (2023), equation 2 and algorithm 2,
    with the simplified discretization delta·B of the published code.
    """
    if x.ndim != 3 or A.ndim != 2:
        raise ValueError(
            f"selective_scan needs x [batch, length, channels] and A [channels, states] "
            f"(given: {list(x.shape)} and {list(A.shape)})"
        )
    (batch, length, channels), num_states = x.shape, A.shape[1]
    if length == 0:
        raise ValueError("selective_scan needs at least one token (given: a sequence of length 0)")
    expected = {
        "x": (x, [batch, length, channels]),
        "delta": (delta, [batch, length, channels]),
        "A": (A, [channels, num_states]),
        "B": (B, [batch, length, num_states]),
        "C": (C, [batch, length, num_states]),
        "D": (D, [channels]),
        "initial_state": (initial_state, [batch, channels, num_states]),
    }
    given = {name: tensor for name, (tensor, _) in expected.items() if tensor is not None}
    for name, tensor in given.items():
        if list(tensor.shape) != expected[name][1]:
            raise ValueError(
                f"selective_scan needs {name} {expected[name][1]} beside x {list(x.shape)} and A {list(A.shape)} "
                f"(given: {list(tensor.shape)})"
            )
        if not tensor.is_floating_point():
            raise TypeError(f"selective_scan needs a floating-point {name} (given: {tensor.dtype}); convert it first")
        if tensor.device != x.device:
            raise ValueError(f"selective_scan needs all tensors on {x.device}, where x is ({name}: {tensor.device})")
    y, final_state = selective_scan_cpu(x, delta, A, B, C, D, initial_state)
    return y, final_state if output_final_state else None
