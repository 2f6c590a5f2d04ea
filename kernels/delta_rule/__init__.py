"""The delta rule: linear attention that overwrites the value under a key instead of adding to it (DeltaNet)."""

from __future__ import annotations

from torch import Tensor

from kernels.common import (
    accumulation_dtype,
    check_cu_seqlens,
    check_device,
    check_shapes,
    check_types_and_devices,
)
from kernels.delta_rule.reference import step

__all__ = ["delta_rule", "delta_rule_step"]


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
    _check(q, k, v, beta, initial_state, "B, T, H", check_cu_seqlens(q, cu_seqlens))
    check_device("delta_rule", q)
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
    check_shapes(q, k, v, state, layout, num_sequences)
    if beta.shape != q.shape[:-1]:
        raise ValueError(f"beta must be [{layout}] = {list(q.shape[:-1])} (given: {list(beta.shape)})")
    check_types_and_devices(q, k, v, {"beta": beta, "the state": state})
