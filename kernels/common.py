"""What operators on queries, keys and values `[B, T, H, …]` have in common: precision, and checks of what is given."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that states and sums are kept in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_shapes(q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, layout: str, num_sequences: int) -> None:
    """q, k `[layout, K]`, v `[layout, V]`, the state `[num_sequences, H, K, V]`; ValueError for what does not fit.

    `layout` names the axes before the last one: "B, T, H", or "B, H" for a single token.
    """
    ndim = layout.count(",") + 2
    if q.ndim != ndim or k.shape != q.shape or v.ndim != ndim or v.shape[:-1] != q.shape[:-1]:
        raise ValueError(f"q and k must be [{layout}, K] and v [{layout}, V] (given: {_shapes(q=q, k=k, v=v)})")
    if 0 in q.shape or 0 in v.shape:
        raise ValueError(f"q, k and v must not be empty: skip the call (given: {_shapes(q=q, k=k, v=v)})")
    expected = (num_sequences, *q.shape[-2:], v.shape[-1])
    if state is not None and state.shape != expected:
        raise ValueError(f"the state must be [sequences, H, K, V] = {list(expected)} (given: {list(state.shape)})")


def check_types_and_devices(q: Tensor, k: Tensor, v: Tensor, others: Mapping[str, Tensor | None]) -> None:
    """q, k and v share a type and everything a device; TypeError and ValueError where not."""
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise TypeError(
            "q, k and v must share one of the types float16, bfloat16, float32 and float64 "
            f"(given: q {q.dtype}, k {k.dtype}, v {v.dtype}); convert with .to()"
        )
    given = {name: x for name, x in others.items() if x is not None}
    for name, x in given.items():
        if x.dtype not in DTYPES:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64 (given: {x.dtype})")
    for name, x in {"k": k, "v": v, **given}.items():
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device} and q on {q.device}: move them to one device")


def check_device(operator: str, q: Tensor) -> None:
    """There is a path for the device of q; else ValueError."""
    if q.device.type not in ("cpu", "cuda", "meta"):
        raise ValueError(
            f"{operator} runs on CPU and CUDA tensors (given: {q.device}); move the inputs, or use {operator}_step"
        )


def check_cu_seqlens(q: Tensor, cu_seqlens: Tensor | None) -> int:
    """The number of sequences; TypeError and ValueError unless `cu_seqlens` rises from 0 to the tokens of q.

    Reading the values waits for a GPU. They are not known, and not checked, while torch.compile traces.
    """
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
    if not torch.compiler.is_compiling() and cu_seqlens.device.type != "meta":
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != q.shape[1] or any(a >= b for a, b in pairwise(bounds)):
            raise ValueError(f"cu_seqlens must rise from 0 to T = {q.shape[1]} (given: {bounds})")
    return len(cu_seqlens) - 1


def _shapes(**tensors: Tensor) -> str:
    return ", ".join(f"{name} {list(x.shape)}" for name, x in tensors.items())
