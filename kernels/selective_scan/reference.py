"""The definition, token by token; tests hold the fast path against it in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def selective_scan_reference(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """h = exp(delta A) h + delta B x, y = C h + D x; returns y `[B, T, D]` and the final state `[B, D, N]`."""
    h = x.new_zeros(x.shape[0], *A.shape) if initial_state is None else initial_state
    outputs = []
    for t in range(x.shape[1]):
        step = delta[:, t, :, None]
        h = torch.exp(step * A) * h + step * x[:, t, :, None] * B[:, t, None, :]
        outputs.append((h * C[:, t, None, :]).sum(-1))
    y = torch.stack(outputs, dim=1)
    return (y if D is None else y + D * x), h
