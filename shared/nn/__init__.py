"""Blocks that several papers build their networks from.

Those of grids take `[batch, channels, *grid]`; those of language models, from attention to `LanguageModel`, take
`[batch, length, channels]`.
"""

from __future__ import annotations

from shared.nn.attention import Attention, rotary
from shared.nn.conditioning import ChannelMask, FiLM, constant_channels, per_channel, pointwise_conv
from shared.nn.delta_net import DeltaNet
from shared.nn.fourier import FNO1d, FNO2d, SpectralConv1d, SpectralConv2d
from shared.nn.hyena import Hyena
from shared.nn.language_model import Block, LanguageModel, SwiGLU, detach_state
from shared.nn.linear_attention import GatedLinearAttention, LinearAttention, Retention, ShortConvolution
from shared.nn.mamba import Mamba
from shared.nn.rwkv import RWKV4ChannelMix, RWKV4TimeMix
from shared.nn.unet import UNet1d, UNet2d

__all__ = [
    "Attention",
    "Block",
    "ChannelMask",
    "DeltaNet",
    "FNO1d",
    "FNO2d",
    "FiLM",
    "GatedLinearAttention",
    "Hyena",
    "LanguageModel",
    "LinearAttention",
    "Mamba",
    "RWKV4ChannelMix",
    "RWKV4TimeMix",
    "Retention",
    "ShortConvolution",
    "SpectralConv1d",
    "SpectralConv2d",
    "SwiGLU",
    "UNet1d",
    "UNet2d",
    "constant_channels",
    "detach_state",
    "per_channel",
    "pointwise_conv",
    "rotary",
]
