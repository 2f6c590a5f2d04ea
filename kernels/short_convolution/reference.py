"""The definition, token by token; tests hold the other paths against it in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def short_convolution_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """x `[B, T, D]`, weight `[D, W]`, state `[B, D, W-1]`; returns y and the final state."""
    batch, length, channels = x.shape
    history = x.new_zeros(batch, channels, weight.shape[1] - 1) if initial_state is None else initial_state
    outputs = []
    for t in range(length):
        history = torch.cat([history, x[:, t, :, None]], dim=2)
        y = (history * weight).sum(-1)
        history = history[:, :, 1:]
        outputs.append(y if bias is None else y + bias)
    y = torch.stack(outputs, dim=1)
    return (y * torch.sigmoid(y) if activation == "silu" else y), history
