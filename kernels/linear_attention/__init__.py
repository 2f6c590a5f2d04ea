"""Gated linear attention: linear attention whose state forgets, with a gate per key channel, per head, or none."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.common import (
    accumulation_dtype,
    check_cu_seqlens,
    check_device,
    check_shapes,
    check_types_and_devices,
)

__all__ = ["gla", "gla_step"]


def gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """S_t = diag(exp(g_t)) S_{t-1} + k_tᵀ v_t and o_t = scale · q_t S_t, in time and memory linear in T.

    Args:
        q, k: queries and keys `[B, T, H, K]`.
        v: values `[B, T, H, V]`.
        g: logarithm of the gate, at most 0 (not checked: it would cost a pass over g; any depth is safe, -inf too).
            `[B, T, H, K]` is a gate per key channel (GLA), `[B, T, H]` one per head (as in Mamba-2), `[H]` a constant
            decay (RetNet), None plain linear attention; each has its own, cheaper algorithm.
        scale: factor on the queries, by default K^(-1/2).
        initial_state: S_0 `[B, H, K, V]`, by default 0. It and the final state carry gradients, and one run can be
            continued in the next.
        output_final_state: also return S_T.
        cu_seqlens: for sequences of different lengths laid end to end, with B = 1: where they start, and the total
            (`[0, 3, 8]` for lengths 3 and 5), int32 or int64. States are then `[num_sequences, H, K, V]`.

    Returns:
        o `[B, T, H, V]` in the type of v, and S_T (float32; float64 if the inputs are) or None.

    q, k and v share one of float16, bfloat16, float32 and float64. All is computed in float32, or float64 for float64.
    Gradients are those of a first derivative. CPU and CUDA tensors each have their path.

    Raises TypeError for types and ValueError for shapes, devices and `cu_seqlens` that do not fit.

    Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training" (ICML 2024), equation 3.
    """
    _check(q, k, v, g, initial_state, "B, T, H", check_cu_seqlens(q, cu_seqlens))
    check_device("gla", q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if q.is_cuda:
        from .gpu import gla_gpu as run
    else:
        from .cpu import gla_cpu as run
    return run(q, k, v, g, scale, initial_state, output_final_state, cu_seqlens)


def gla_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, *, state: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """One token of `gla`, for decoding: time and memory do not depend on how many came before.

    q and k `[B, H, K]`, v `[B, H, V]`, g None, `[H]`, `[B, H]` or `[B, H, K]`, state `[B, H, K, V]`. Returns o
    `[B, H, V]` in the type of v, and the new state. Plain PyTorch on any device, differentiable; errors as for `gla`.
    """
    _check(q, k, v, g, state, "B, H", q.shape[0] if q.ndim else 0)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dtype = accumulation_dtype(q.dtype)
    queries, keys, values, state = (x.to(dtype) for x in (q, k, v, state))
    if g is not None:
        decay = g.to(dtype).exp()
        state = state * (decay if g.ndim == 3 else decay.expand(q.shape[:2]).unsqueeze(-1)).unsqueeze(-1)
    state = torch.addcmul(state, keys.unsqueeze(-1), values.unsqueeze(-2))
    # A sum rather than a matrix product, which autocast would round to bfloat16; the state's memory bounds both.
    return (state * (scale * queries).unsqueeze(-1)).sum(-2).to(v.dtype), state


def _check(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor | None, layout: str, num_sequences: int
) -> None:
    check_shapes(q, k, v, state, layout, num_sequences)
    heads = q.shape[-2]
    if g is not None and g.shape not in ((heads,), q.shape[:-1], q.shape):
        raise ValueError(
            f"g must be None, [H] = {[heads]}, [{layout}] = {list(q.shape[:-1])} or [{layout}, K] = {list(q.shape)} "
            f"(given: {list(g.shape)})"
        )
    check_types_and_devices(q, k, v, {"g": g, "the state": state})
