"""Gated linear attention: linear attention whose state forgets, with a gate per key channel, per head, or none."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["gla", "gla_step"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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
    sequences = _check_cu_seqlens(q, cu_seqlens)
    _check(q, k, v, g, initial_state, "B, T, H", sequences)
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
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
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
    """`layout` names the axes before the last one of q, k and v."""
    ndim = layout.count(",") + 2
    if q.ndim != ndim or k.shape != q.shape or v.ndim != ndim or v.shape[:-1] != q.shape[:-1]:
        raise ValueError(f"q and k must be [{layout}, K] and v [{layout}, V] (given: {_shapes(q=q, k=k, v=v)})")
    if 0 in q.shape or 0 in v.shape:
        raise ValueError(f"q, k and v must not be empty: skip the call (given: {_shapes(q=q, k=k, v=v)})")
    heads = q.shape[-2]
    if g is not None and g.shape not in ((heads,), q.shape[:-1], q.shape):
        raise ValueError(
            f"g must be None, [H] = {[heads]}, [{layout}] = {list(q.shape[:-1])} or [{layout}, K] = {list(q.shape)} "
            f"(given: {list(g.shape)})"
        )
    expected = (num_sequences, heads, q.shape[-1], v.shape[-1])
    if state is not None and state.shape != expected:
        raise ValueError(f"the state must be [sequences, H, K, V] = {list(expected)} (given: {list(state.shape)})")

    if q.dtype not in _DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise TypeError(
            "q, k and v must share one of the types float16, bfloat16, float32 and float64 "
            f"(given: q {q.dtype}, k {k.dtype}, v {v.dtype}); convert with .to()"
        )
    others = {name: x for name, x in (("g", g), ("the state", state)) if x is not None}
    for name, x in others.items():
        if x.dtype not in _DTYPES:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64 (given: {x.dtype})")
    for name, x in {"k": k, "v": v, **others}.items():
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device} and q on {q.device}: move them to one device")
    if layout == "B, T, H" and q.device.type not in ("cpu", "cuda", "meta"):
        raise ValueError(f"gla runs on CPU and CUDA tensors (given: {q.device}); move the inputs, or use gla_step")


def _check_cu_seqlens(q: Tensor, cu_seqlens: Tensor | None) -> int:
    """The number of sequences."""
    if cu_seqlens is None:
        return q.shape[0] if q.ndim else 0
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be int32 or int64 (given: {cu_seqlens.dtype})")
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2 or q.ndim != 4 or q.shape[0] != 1:
        raise ValueError(
            "cu_seqlens must be [num_sequences + 1], for sequences laid end to end in a batch of 1 "
            f"(given: cu_seqlens {list(cu_seqlens.shape)}, q {list(q.shape)})"
        )
    # Values are not known while torch.compile traces.
    if not torch.compiler.is_compiling() and cu_seqlens.device.type != "meta":
        bounds = cu_seqlens.tolist()
        increasing = all(a < b for a, b in pairwise(bounds))
        if bounds[0] != 0 or bounds[-1] != q.shape[1] or not increasing:
            raise ValueError(f"cu_seqlens must rise from 0 to T = {q.shape[1]} (given: {bounds})")
    return len(cu_seqlens) - 1


def _shapes(**tensors: Tensor) -> str:
    return ", ".join(f"{name} {list(x.shape)}" for name, x in tensors.items())
