"""Blocks that several papers build their networks from; tensors are `[batch, channels, *grid]`."""

from __future__ import annotations

from shared.nn.conditioning import ChannelMask, FiLM, constant_channels, per_channel, pointwise_conv
from shared.nn.fourier import FNO1d, FNO2d, SpectralConv1d, SpectralConv2d
from shared.nn.unet import UNet1d, UNet2d

__all__ = [
    "ChannelMask",
    "FNO1d",
    "FNO2d",
    "FiLM",
    "SpectralConv1d",
    "SpectralConv2d",
    "UNet1d",
    "UNet2d",
    "constant_channels",
    "per_channel",
    "pointwise_conv",
]
