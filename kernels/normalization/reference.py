"""The definitions, in whatever precision they are given; tests hold the other paths against them in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm_gated_reference(x: Tensor, gate: Tensor | None, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight · gate · sigmoid(gate), over the last axis."""
    y = x / torch.sqrt((x**2).mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight
    if gate is not None:
        y = y * gate * torch.sigmoid(gate)
    return y


def l2_norm_reference(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(Σ x² + eps), over the last axis."""
    return x / torch.sqrt((x**2).sum(-1, keepdim=True) + eps)
