"""The delta rule: linear attention that overwrites the value under a key instead of adding to it (DeltaNet)."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from kernels.delta_rule.reference import accumulation_dtype, step

__all__ = ["delta_rule", "delta_rule_step"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """S_t = (I − β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ and o_t = scale · S_tᵀ q_t, in time and memory linear in T.

    Args:
        q, k: queries and keys `[B, T, H, K]`. Keys are expected to have unit length (not checked: it would cost a pass
            over k); with longer ones the state may grow without bound.
        v: values `[B, T, H, V]`.
        beta: how much of the value under a key is overwritten, `[B, T, H]`, in (0, 2) (not checked): 1 replaces it,
            beyond 1 the transition has a negative eigenvalue.
        scale: factor on the queries, by default K^(-1/2).
        initial_state: S_0 `[B, H, K, V]`, by default 0. It and the final state carry gradients, and one run can be
            continued in the next.
        output_final_state: also return S_T.
        cu_seqlens: for sequences of different lengths laid end to end, with B = 1: where they start, and the total
            (`[0, 3, 8]` for lengths 3 and 5), int32 or int64. States are then `[num_sequences, H, K, V]`.

    Returns:
        o `[B, T, H, V]` in the type of v, and S_T (float32; float64 if the inputs are) or None.

    q, k and v share one of float16, bfloat16, float32 and float64; beta and the state may have another of them. All is
    computed in float32, or float64 for float64. Gradients are those of a first derivative. CPU and CUDA tensors each
    have their path.

    Raises TypeError for types and ValueError for shapes, devices and `cu_seqlens` that do not fit.

    Yang et al., "Parallelizing Linear Transformers with the Delta Rule over Sequence Length" (NeurIPS 2024), section
    2.2; the state is the transpose of the paper's.
    """
    num_sequences = _check_cu_seqlens(q, cu_seqlens)
    _check(q, k, v, beta, initial_state, "B, T, H", num_sequences)
    if q.device.type not in ("cpu", "cuda", "meta"):
        raise ValueError(
            f"delta_rule runs on CPU and CUDA tensors (given: {q.device}); move the inputs, or use delta_rule_step"
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if initial_state is not None:
        initial_state = initial_state.to(accumulation_dtype(q.dtype))
    if q.device.type == "cuda":
        from kernels.delta_rule.gpu import delta_rule_gpu as run
    else:
        from kernels.delta_rule.cpu import delta_rule_cpu as run
    return run(q, k, v, beta, scale, initial_state, output_final_state, cu_seqlens)


def delta_rule_step(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, *, state: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """One token of `delta_rule`, for decoding: time and memory do not depend on how many came before.

    q and k `[B, H, K]`, v `[B, H, V]`, beta `[B, H]`, state `[B, H, K, V]`. Returns o `[B, H, V]` in the type of v, and
    the new state. Plain PyTorch on any device, differentiable; errors as for `delta_rule`.
    """
    _check(q, k, v, beta, state, "B, H", q.shape[0] if q.ndim else 0)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    o, state = step(q, k, v, beta, state.to(accumulation_dtype(q.dtype)), scale)
    return o.to(v.dtype), state


def _check(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor | None, layout: str, num_sequences: int
) -> None:
    """`layout` names the axes before the last one of q, k and v."""
    ndim = layout.count(",") + 2
    if q.ndim != ndim or k.shape != q.shape or v.ndim != ndim or v.shape[:-1] != q.shape[:-1]:
        raise ValueError(f"q and k must be [{layout}, K] and v [{layout}, V] (given: {_shapes(q=q, k=k, v=v)})")
    if 0 in q.shape or 0 in v.shape:
        raise ValueError(f"q, k and v must not be empty: skip the call (given: {_shapes(q=q, k=k, v=v)})")
    if beta.shape != q.shape[:-1]:
        raise ValueError(f"beta must be [{layout}] = {list(q.shape[:-1])} (given: {list(beta.shape)})")
    expected = (num_sequences, *q.shape[-2:], v.shape[-1])
    if state is not None and state.shape != expected:
        raise ValueError(f"the state must be [sequences, H, K, V] = {list(expected)} (given: {list(state.shape)})")

    if q.dtype not in _DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise TypeError(
            "q, k and v must share one of the types float16, bfloat16, float32 and float64 "
            f"(given: q {q.dtype}, k {k.dtype}, v {v.dtype}); convert with .to()"
        )
    others = {"beta": beta} if state is None else {"beta": beta, "the state": state}
    for name, x in others.items():
        if x.dtype not in _DTYPES:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64 (given: {x.dtype})")
    for name, x in {"k": k, "v": v, **others}.items():
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device} and q on {q.device}: move them to one device")


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
    if cu_seqlens.device != q.device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device} and q on {q.device}: move them to one device")
    # Values are not known while torch.compile traces.
    if not torch.compiler.is_compiling() and cu_seqlens.device.type != "meta":
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != q.shape[1] or any(a >= b for a, b in pairwise(bounds)):
            raise ValueError(f"cu_seqlens must rise from 0 to T = {q.shape[1]} (given: {bounds})")
    return len(cu_seqlens) - 1


def _shapes(**tensors: Tensor) -> str:
    return ", ".join(f"{name} {list(x.shape)}" for name, x in tensors.items())
