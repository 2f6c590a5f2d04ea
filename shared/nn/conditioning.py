"""Networks that hand known parameters (of an equation, a task, a time) to the channels of another network."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ChannelMask(nn.Sequential):
    """One factor a channel from the parameters: Linear, GELU, Linear.

    `[batch, num_parameters]` to `[batch, channels]`, unbounded. Takamoto et al. (2023): the channel
    attention of the CAPE module; a squeeze-and-excitation block that is told the parameters instead of the mean.
    """

    def __init__(self, num_parameters: int, channels: int, hidden: int) -> None:
        super().__init__(nn.Linear(num_parameters, hidden), nn.GELU(), nn.Linear(hidden, channels))


class FiLM(nn.Module):
    """Feature-wise linear modulation: x · (1 + scale(parameters)) + shift(parameters), a pair for every channel.

    `x` `[batch, channels, *grid]` and parameters `[batch, num_parameters]` to the shape of `x`. The last layer starts
    at zero, so that the network begins as if there were no modulation. Perez et al. (2018).
    """

    def __init__(self, num_parameters: int, channels: int, hidden: int) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(num_parameters, hidden), nn.GELU(), nn.Linear(hidden, 2 * channels))
        nn.init.zeros_(self.embed[-1].weight)
        nn.init.zeros_(self.embed[-1].bias)

    def forward(self, x: Tensor, parameters: Tensor) -> Tensor:
        scale, shift = per_channel(self.embed(parameters), x).chunk(2, dim=1)
        return x * (1 + scale) + shift


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """`[batch, channels]` with one axis of length 1 for every grid axis of `x`, ready to be multiplied with it."""
    return values.reshape(*values.shape, *[1] * (x.ndim - 2))


def constant_channels(values: Tensor, x: Tensor) -> Tensor:
    """Put `values` `[batch, count]` before `x` `[batch, channels, *grid]` as channels that are constant in space."""
    return torch.cat([per_channel(values, x).expand(-1, -1, *x.shape[2:]), x], dim=1)


def pointwise_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Convolution of kernel size 1, with one weight for all samples or one a sample.

    `x` `[batch, in_channels, *grid]`, weight `[out_channels, in_channels]` or `[batch, out_channels, in_channels]` and
    bias `[out_channels]` or `[batch, out_channels]`, to `[batch, out_channels, *grid]`. As one batched matrix product,
    which on small grids takes a third of the time of the convolution on CPU.
    """
    weight = weight.expand(x.shape[0], -1, -1)
    return torch.baddbmm(bias[..., None], weight, x.flatten(2)).unflatten(2, x.shape[2:])
