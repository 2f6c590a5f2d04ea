"""Normalization in plain PyTorch, differentiated by autograd; on CPU that leaves little to gain."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def rms_norm_gated_cpu(x: Tensor, gate: Tensor | None, weight: Tensor | None, eps: float) -> Tensor:
    """See `kernels.normalization.rms_norm_gated`."""
    dtype = _statistics_dtype(x)
    y = functional.rms_norm(x.to(dtype), x.shape[-1:], None if weight is None else weight.to(dtype), eps)
    if gate is not None:
        y = y * functional.silu(gate.to(dtype))
    return y.to(x.dtype)


def l2_norm_cpu(x: Tensor, eps: float) -> Tensor:
    """See `kernels.normalization.l2_norm`."""
    wide = x.to(_statistics_dtype(x))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
