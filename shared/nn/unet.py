"""U-Nets in one and two dimensions (Ronneberger et al., 2015), as PDEBench (Takamoto et al., 2022) builds them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from shared.config import UserError

Padding = Literal["zeros", "circular"]


class _UNet(nn.Module):
    """What the one- and the two-dimensional network share; see `UNet1d`."""

    conv: type[nn.Conv1d] | type[nn.Conv2d]
    conv_transpose: type[nn.ConvTranspose1d] | type[nn.ConvTranspose2d]
    norm: type[nn.BatchNorm1d] | type[nn.BatchNorm2d]
    max_pool: type[nn.MaxPool1d] | type[nn.MaxPool2d]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        features: int = 32,
        multipliers: Sequence[int] = (1, 2, 4, 8, 16),
        padding: Padding = "zeros",
    ) -> None:
        super().__init__()
        if padding not in ("zeros", "circular"):
            raise UserError(f"unknown padding {padding!r} of a U-Net; choose zeros or circular")
        widths = [features * multiplier for multiplier in multipliers]
        self.encoders = nn.ModuleList(
            self._block(narrow, wide, padding) for narrow, wide in zip([in_channels, *widths], widths, strict=False)
        )
        self.pool = self.max_pool(2)
        pairs = list(pairwise(widths))[::-1]
        self.upsamplers = nn.ModuleList(self.conv_transpose(wide, narrow, 2, stride=2) for narrow, wide in pairs)
        self.decoders = nn.ModuleList(self._block(2 * narrow, narrow, padding) for narrow, _ in pairs)
        self.head = self.conv(widths[0], out_channels, 1)

    def _block(self, in_channels: int, out_channels: int, padding: Padding) -> nn.Sequential:
        """Twice convolution, batch normalization, tanh; no bias, since the normalization removes it."""
        layers: list[nn.Module] = []
        for channels in (in_channels, out_channels):
            layers += [
                self.conv(channels, out_channels, 3, padding=1, padding_mode=padding, bias=False),
                self.norm(out_channels),
                nn.Tanh(),
            ]
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        factor = 2 ** len(self.decoders)
        if any(size % factor for size in x.shape[2:]):
            raise UserError(
                f"this U-Net halves the grid {len(self.decoders)} times, so every side must be a multiple of {factor} "
                f"(given: {'×'.join(map(str, x.shape[2:]))}); resample the data or use fewer levels"
            )
        skips = []
        for encoder in self.encoders[:-1]:
            x = encoder(x)
            skips.append(x)
            x = self.pool(x)
        x = self.encoders[-1](x)
        for upsample, decoder in zip(self.upsamplers, self.decoders, strict=True):
            x = decoder(torch.cat([upsample(x), skips.pop()], dim=1))
        return self.head(x)


class UNet1d(_UNet):
    """U-Net on a line, `[batch, in_channels, n]` to `[batch, out_channels, n]`; n a multiple of 16 at the defaults.

    Levels of features · multipliers channels, the last being the bottleneck; a level is two convolutions of width 3
    with batch normalization and tanh. Max-pooling down, transposed convolutions up, skips concatenated, 1×1 head.
    `padding` is PDEBench's "zeros" or, for periodic domains, "circular".
    """

    conv = nn.Conv1d
    conv_transpose = nn.ConvTranspose1d
    norm = nn.BatchNorm1d
    max_pool = nn.MaxPool1d


class UNet2d(_UNet):
    """U-Net on a rectangle, `[batch, in_channels, nx, ny]` to `[batch, out_channels, nx, ny]`; as `UNet1d`."""

    conv = nn.Conv2d
    conv_transpose = nn.ConvTranspose2d
    norm = nn.BatchNorm2d
    max_pool = nn.MaxPool2d
