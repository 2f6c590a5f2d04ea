"""Residual U-Net for volumes with deep supervision, and the transfer of its weights from one task to the next.

Blocks, widths and sizes are those of STU-Net (Huang et al., arXiv 2304.06716), which scales up nnU-Net (Isensee et al.
2021). Volumes are `[batch, channels, X, Y, Z]`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from shared.config import UserError

Norm = Literal["instance", "batch"]

# ResidualUNet(1, 105, **size) has 14.60, 58.26, 440.30 and 1457.33 million parameters, those published for
# TotalSegmentator's 104 classes and background; a decoder stage has as many blocks as one of the encoder.
STU_NET_SIZES: Mapping[str, Mapping[str, int]] = {
    "S": {"width": 16, "blocks": 1},
    "B": {"width": 32, "blocks": 1},
    "L": {"width": 64, "blocks": 2},
    "H": {"width": 96, "blocks": 3},
}
_MULTIPLIERS = (1, 2, 4, 8, 16)  # and 16 for all further stages


class Grid(Protocol):
    """At which places of a volume layers compute: all (`FULL`), or those that masked modeling leaves visible.

    Level l has 1/2^l of the resolution. A layer of stride 2 reads level - 1 and writes `level`.
    """

    def enter(self, volume: Tensor) -> Tensor:
        """What layers are given for a volume."""

    def conv(self, layer: nn.Conv3d, x: Tensor, level: int) -> Tensor:
        """The convolution, at places of its output's level."""

    def norm(self, layer: nn.Module, x: Tensor, level: int) -> Tensor:
        """The normalization, over places of the level."""

    def leave(self, x: Tensor, level: int) -> Tensor:
        """The dense volume for what layers return."""


class _FullGrid:
    def enter(self, volume: Tensor) -> Tensor:
        return volume

    def conv(self, layer: nn.Conv3d, x: Tensor, level: int) -> Tensor:
        return layer(x)

    def norm(self, layer: nn.Module, x: Tensor, level: int) -> Tensor:
        return layer(x)

    def leave(self, x: Tensor, level: int) -> Tensor:
        return x


FULL: Grid = _FullGrid()


class ResidualBlock(nn.Module):
    """y = φ(N(C(φ(N(C x)))) + S x): convolutions C of 3³, norms N, φ = LeakyReLU(0.01).

    S is the identity, or a convolution of 1³ where `project` is set: in the first block of a stage, as in STU-Net.
    """

    def __init__(self, in_channels: int, out_channels: int, norm: Norm, stride: int = 1, project: bool = False) -> None:
        super().__init__()
        normalization = {
            "instance": lambda channels: nn.InstanceNorm3d(channels, affine=True),
            "batch": nn.BatchNorm3d,
        }
        if norm not in normalization:
            raise UserError(f"unknown norm {norm!r} of a residual U-Net; choose {' or '.join(normalization)}")
        self.conv1 = nn.Conv3d(in_channels, out_channels, 3, stride, padding=1)
        self.norm1 = normalization[norm](out_channels)
        self.conv2 = nn.Conv3d(out_channels, out_channels, 3, padding=1)
        self.norm2 = normalization[norm](out_channels)
        self.skip = nn.Conv3d(in_channels, out_channels, 1, stride) if project else None
        self.activation = nn.LeakyReLU(0.01)

    def forward(self, x: Tensor, grid: Grid = FULL, level: int = 0) -> Tensor:
        y = self.activation(grid.norm(self.norm1, grid.conv(self.conv1, x, level), level))
        y = grid.norm(self.norm2, grid.conv(self.conv2, y, level), level)
        return self.activation(y + (x if self.skip is None else grid.conv(self.skip, x, level)))


def _stage(in_channels: int, out_channels: int, blocks: int, norm: Norm, stride: int = 1) -> nn.ModuleList:
    first = ResidualBlock(in_channels, out_channels, norm, stride, project=True)
    return nn.ModuleList([first, *(ResidualBlock(out_channels, out_channels, norm) for _ in range(blocks - 1))])


class ResidualEncoder(nn.Module):
    """Features of every resolution: `num_stages` stages of `blocks` residual blocks, each half as fine as the last.

    Volumes `[B, in_channels, X, Y, Z]`, sides multiples of `total_stride`, to features of `widths` channels, finest
    first; widths are width · (1, 2, 4, 8, 16, 16, ...). `grid` says where to compute; features are dense in any case.
    """

    def __init__(
        self, in_channels: int, width: int = 32, blocks: int = 1, num_stages: int = 6, norm: Norm = "instance"
    ) -> None:
        super().__init__()
        if min(in_channels, width, blocks) < 1 or num_stages < 2:
            raise UserError(
                "a residual U-Net needs in_channels, width and blocks of at least 1 and two stages or more "
                f"(given: {in_channels}, {width}, {blocks}, {num_stages})"
            )
        self.widths = tuple(width * _MULTIPLIERS[min(i, len(_MULTIPLIERS) - 1)] for i in range(num_stages))
        self.total_stride = 2 ** (num_stages - 1)
        self.stages = nn.ModuleList(
            _stage(narrow, wide, blocks, norm, stride=2 if level else 1)
            for level, (narrow, wide) in enumerate(pairwise([in_channels, *self.widths]))
        )

    def forward(self, volume: Tensor, grid: Grid = FULL) -> list[Tensor]:
        if volume.ndim != 5 or any(side % self.total_stride for side in volume.shape[2:]):
            raise UserError(
                f"volumes must be [batch, channels, X, Y, Z] with sides that are multiples of {self.total_stride}, the "
                f"stride of {len(self.stages)} stages (given: {list(volume.shape)}); crop, pad or use fewer stages"
            )
        x, features = grid.enter(volume), []
        for level, stage in enumerate(self.stages):
            for block in stage:
                x = block(x, grid, level)
            features.append(grid.leave(x, level))
        return features


class ResidualDecoder(nn.Module):
    """From the coarsest features up: nearest ×2 and a convolution of 1³, the skip concatenated, residual blocks.

    Takes the encoder's features, finest first, and returns those of all scales but the coarsest, finest first.
    """

    def __init__(self, widths: Sequence[int], blocks: int = 1, norm: Norm = "instance") -> None:
        super().__init__()
        pairs = list(pairwise(widths))[::-1]
        self.upsample = nn.Upsample(scale_factor=2, mode="nearest")
        self.reduce = nn.ModuleList(nn.Conv3d(wide, narrow, 1) for narrow, wide in pairs)
        self.stages = nn.ModuleList(_stage(2 * narrow, narrow, blocks, norm) for narrow, _ in pairs)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        *skips, x = features
        outputs = []
        for reduce, stage, skip in zip(self.reduce, self.stages, reversed(skips), strict=True):
            # A pointwise convolution commutes with repetition, and costs an eighth before it.
            x = torch.cat([self.upsample(reduce(x)), skip], dim=1)
            for block in stage:
                x = block(x)
            outputs.append(x)
        return outputs[::-1]


class ResidualUNet(nn.Module):
    """Residual U-Net, `[B, in_channels, X, Y, Z]` to logits `[B, num_classes, X, Y, Z]`; background is a class.

    `scales` gives the logits of every decoder scale, for deep supervision. A decoder stage has `decoder_blocks`
    residual blocks, by default `blocks`. STU-Net's sizes: `ResidualUNet(1, num_classes, **STU_NET_SIZES["L"])`.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        width: int = 32,
        blocks: int = 1,
        num_stages: int = 6,
        norm: Norm = "instance",
        decoder_blocks: int | None = None,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise UserError(f"segmentation needs two classes or more, background included (given: {num_classes})")
        self.encoder = ResidualEncoder(in_channels, width, blocks, num_stages, norm)
        self.decoder = ResidualDecoder(self.encoder.widths, blocks if decoder_blocks is None else decoder_blocks, norm)
        self.heads = nn.ModuleList(nn.Conv3d(channels, num_classes, 1) for channels in self.encoder.widths[:-1])

    def forward(self, volume: Tensor) -> Tensor:
        return self.heads[0](self.decoder(self.encoder(volume))[0])

    def scales(self, volume: Tensor) -> list[Tensor]:
        """Logits `[B, num_classes, X / 2^l, Y / 2^l, Z / 2^l]` of the scales l = 0, 1, ..., finest first."""
        return [head(x) for head, x in zip(self.heads, self.decoder(self.encoder(volume)), strict=True)]


@dataclass(frozen=True)
class Transfer:
    """Names of tensors: `carried` over, `fresh` in the target as they were, `unused` of those that were offered."""

    carried: tuple[str, ...]
    fresh: tuple[str, ...]
    unused: tuple[str, ...]


def transfer_weights(
    target: nn.Module, weights: Mapping[str, Tensor], parts: Sequence[str] = ("encoder", "decoder")
) -> Transfer:
    """Copy the weights of these parts into `target`, in place; all else, output layers too, stays as it was.

    `weights` is the state of a network with parts of the same names: all of a U-Net for the next task, or the
    `encoder` of masked modeling. `UserError`, and nothing is copied, where a part is absent or its tensors differ.
    """
    own = target.state_dict()
    prefixes = tuple(f"{part}." for part in parts)
    for part, prefix in zip(parts, prefixes, strict=True):
        for side, names in {"target": own, "given weights": weights}.items():
            if not any(name.startswith(prefix) for name in names):
                has = ", ".join(sorted({name.split(".")[0] for name in names})) or "nothing"
                raise UserError(f"the {side} have no part {part!r} to carry over; they have: {has}")
    wanted = [name for name in own if name.startswith(prefixes)]
    offered = [name for name in weights if name.startswith(prefixes)]
    problems = [f"{name} is missing from the given weights" for name in wanted if name not in weights]
    problems += [f"{name} is not in the target" for name in offered if name not in own]
    problems += [
        f"{name} is {list(weights[name].shape)}, and in the target {list(own[name].shape)}"
        for name in wanted
        if name in weights and weights[name].shape != own[name].shape
    ]
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(
            f"weights of {', '.join(parts)} do not fit: {'; '.join(problems[:3])}{more}. Build both networks with the "
            "same in_channels, width, blocks, stages and norm, or carry over fewer parts"
        )
    target.load_state_dict({name: weights[name] for name in wanted}, strict=False)
    carried = set(wanted)
    return Transfer(
        carried=tuple(wanted),
        fresh=tuple(name for name in own if name not in carried),
        unused=tuple(name for name in weights if name not in carried),
    )
