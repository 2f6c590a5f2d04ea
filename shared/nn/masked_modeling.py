"""Masked modeling of volumes for convolutional encoders: SparK (Tian et al., ICLR 2023), in three dimensions.

Patches of a volume are masked out; the encoder sees the others, and a light decoder reconstructs those that are masked.
A plain convolution would read the zeros of masked patches as data, and the mask would erode with depth. The encoder
therefore follows the rule of sparse convolution: it computes at active places only, from active neighbors only, and
its norms take statistics over them. Two grids do so with the same weights: `MaskedGrid` multiplies by the mask after
every convolution and spends as much as a dense network; `SparseGrid` computes rows of active places alone.

Masks are `[batch, 1, *patches]`, True where a patch is visible.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from kernels.submanifold_conv import Rulebook, build_rulebook, sparse_conv
from shared.config import UserError
from shared.nn.residual_unet import Grid, ResidualEncoder

_EPSILON = 1e-6  # of a patch's variance


# ------------------------------------------------------------------------------------------------------------ masks


def patch_mask(
    batch_size: int,
    patches: Sequence[int],
    ratio: float = 0.6,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Random masks `[batch_size, 1, *patches]`: of L patches round((1 - ratio) L) stay visible, drawn for each sample.

    Drawn on the generator's device (by default the CPU's), so that a seed gives the same mask on every `device`.
    """
    total = math.prod(patches)
    visible = round((1 - ratio) * total)
    if not 0 < visible < total:
        raise UserError(
            f"a mask must leave at least one patch visible and mask at least one: {ratio} of "
            f"{'×'.join(map(str, patches))} patches does not; choose another ratio, or larger volumes"
        )
    where = generator.device if generator is not None else "cpu"
    order = torch.rand(batch_size, total, generator=generator, device=where).argsort(dim=1)
    mask = torch.zeros(batch_size, total, dtype=torch.bool, device=where).scatter_(1, order[:, :visible], True)
    return mask.view(batch_size, 1, *patches).to(device)


def _repeated(mask: Tensor, shape: Sequence[int]) -> Tensor:
    """The mask at the resolution of a volume of this shape."""
    for axis, (size, patches) in enumerate(zip(shape, mask.shape[2:], strict=True), start=2):
        if size % patches:
            raise UserError(
                f"a mask of {list(mask.shape[2:])} patches does not divide a volume of {list(shape)}: it needs one "
                "element a patch"
            )
        mask = mask.repeat_interleave(size // patches, axis)
    return mask


# ------------------------------------------------------------------------------------------- norms of active places


def masked_norm(layer: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    """Batch or instance norm of `[B, C, X, Y, Z]` whose statistics are over active places only; 0 at the others.

    `mask` `[B, 1, X, Y, Z]`, boolean. With all active the layer itself; a batch norm in training updates its running
    statistics, in evaluation it uses them. With several processes each has statistics of its own.
    """
    axes = (0, 2, 3, 4) if isinstance(layer, nn.BatchNorm3d) else (2, 3, 4)
    count = mask.sum(axes, keepdim=True).clamp(min=1)

    def mean(values: Tensor) -> Tensor:
        return (values * mask).sum(axes, keepdim=True) / count

    return _normalized(layer, x, mean, mask.sum(), (1, -1, 1, 1, 1)) * mask


def _rows_norm(layer: nn.Module, rows: Tensor, samples: Tensor, batch_size: int) -> Tensor:
    """The same of rows `[N, C]` of active places, which belong to `samples` `[N]`."""
    if isinstance(layer, nn.BatchNorm3d):
        return _normalized(layer, rows, lambda values: values.mean(0, keepdim=True), len(rows), (1, -1))
    counts = samples.bincount(minlength=batch_size).clamp(min=1)[:, None]

    def mean(values: Tensor) -> Tensor:
        sums = values.new_zeros(batch_size, values.shape[1]).index_add(0, samples, values)
        return (sums / counts).index_select(0, samples)

    return _normalized(layer, rows, mean, len(rows), (1, -1))


def _normalized(
    layer: nn.Module, x: Tensor, mean: Callable[[Tensor], Tensor], count: Tensor | int, shape: Sequence[int]
) -> Tensor:
    """γ (x - μ) / √(σ² + ε) + β with μ and σ² by `mean` over active places; `shape` brings channels into place."""
    values = x.to(torch.promote_types(x.dtype, torch.float32))
    if isinstance(layer, nn.BatchNorm3d) and layer.track_running_stats and not layer.training:
        center, variance = layer.running_mean.view(shape), layer.running_var.view(shape)
    elif isinstance(layer, nn.BatchNorm3d | nn.InstanceNorm3d):
        center = mean(values)
        variance = mean((values - center).square())
        if isinstance(layer, nn.BatchNorm3d) and layer.track_running_stats:
            _update(layer, center.detach().flatten(), variance.detach().flatten(), count)
    else:
        raise UserError(f"only batch and instance norms have a sparse form (given: {type(layer).__name__})")
    values = (values - center) * torch.rsqrt(variance + layer.eps)
    if layer.affine:
        values = values * layer.weight.view(shape) + layer.bias.view(shape)
    return values.to(x.dtype)


@torch.no_grad()
def _update(layer: nn.BatchNorm3d, mean: Tensor, variance: Tensor, count: Tensor | int) -> None:
    """Running statistics as PyTorch keeps them: the variance unbiased."""
    layer.num_batches_tracked += 1
    momentum = layer.momentum if layer.momentum is not None else 1 / layer.num_batches_tracked.item()
    layer.running_mean.lerp_(mean.to(layer.running_mean.dtype), momentum)
    layer.running_var.lerp_((variance * count / (count - 1)).to(layer.running_var.dtype), momentum)


# ------------------------------------------------------------------------------------------------------------ grids


class MaskedGrid(Grid):
    """Layers on dense volumes that are zero outside of the mask: after every convolution, its bias included, times it.

    `num_levels` resolutions, the coarsest of one place a patch.
    """

    def __init__(self, mask: Tensor, num_levels: int) -> None:
        shapes = [[size << level for size in mask.shape[2:]] for level in reversed(range(num_levels))]
        self.masks = [_repeated(mask, shape) for shape in shapes]

    def enter(self, volume: Tensor) -> Tensor:
        _check_volume(volume, self.masks[0])
        return volume * self.masks[0]

    def conv(self, layer: nn.Conv3d, x: Tensor, level: int) -> Tensor:
        return layer(x) * self.masks[level]

    def norm(self, layer: nn.Module, x: Tensor, level: int) -> Tensor:
        return masked_norm(layer, x, self.masks[level])

    def leave(self, x: Tensor, level: int) -> Tensor:
        return x


class SparseGrid(Grid):
    """Layers on rows `[N, C]` of active places by `kernels.submanifold_conv`: masked places cost nothing.

    Masks align with strides, so that submanifold and strided convolutions never meet a half-visible cell.
    """

    def __init__(self, mask: Tensor, num_levels: int) -> None:
        self.mask = _repeated(mask, [size << (num_levels - 1) for size in mask.shape[2:]])
        finest, shape = self.mask[:, 0].nonzero(), self.mask.shape[2:]
        self.strided: list[Rulebook | None] = [None]  # from the level before
        self.same = [build_rulebook(finest, shape, batch_size=len(mask))]
        for _ in range(1, num_levels):
            last = self.same[-1]
            down = build_rulebook(last.coordinates, last.spatial_shape, stride=2, batch_size=len(mask))
            self.strided.append(down)
            self.same.append(build_rulebook(down.coordinates, down.spatial_shape, batch_size=len(mask)))

    def enter(self, volume: Tensor) -> Tensor:
        _check_volume(volume, self.mask)
        return volume.movedim(1, -1)[tuple(self.same[0].coordinates.T)]

    def conv(self, layer: nn.Conv3d, x: Tensor, level: int) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        rulebook = self.same[level] if layer.stride == (1, 1, 1) else self.strided[level]
        if layer.kernel_size == (1, 1, 1):
            if layer.stride != (1, 1, 1):
                # The center of the strided kernel: place 2 o, visible since its patch is.
                x = x.index_select(0, rulebook.neighbors[:, rulebook.num_offsets // 2])
            return functional.linear(x, layer.weight.flatten(1), layer.bias)
        return sparse_conv(x, layer.weight.permute(2, 3, 4, 1, 0), rulebook, bias=layer.bias)

    def norm(self, layer: nn.Module, x: Tensor, level: int) -> Tensor:
        return _rows_norm(layer, x, self.same[level].coordinates[:, 0], len(self.mask))

    def leave(self, x: Tensor, level: int) -> Tensor:
        rulebook = self.same[level]
        volume = x.new_zeros(len(self.mask), *rulebook.spatial_shape, x.shape[1])
        return volume.index_put(tuple(rulebook.coordinates.T), x).movedim(-1, 1)


def _check_volume(volume: Tensor, mask: Tensor) -> None:
    if (len(volume), *volume.shape[2:]) != (len(mask), *mask.shape[2:]):
        raise UserError(
            f"the mask is for {len(mask)} volumes of {list(mask.shape[2:])}, and these are {len(volume)} of "
            f"{list(volume.shape[2:])}: make it with patch_mask(len(volumes), spark.patches_of(volumes))"
        )


# --------------------------------------------------------------------------------------------------------- the model


class _DecoderBlock(nn.Module):
    """Twice as fine: transposed convolution, then convolution, batch norm, ReLU6, convolution, batch norm."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.ConvTranspose3d(in_channels, in_channels, 4, stride=2, padding=1),
            nn.Conv3d(in_channels, in_channels, 3, padding=1, bias=False),
            nn.BatchNorm3d(in_channels),
            nn.ReLU6(),
            nn.Conv3d(in_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm3d(out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class SparK(nn.Module):
    """Encoder, densification and light decoder: volumes and a mask to a prediction of the same shape.

    A patch is a place of the coarsest resolution, `patch` voxels a side. Every scale but the finest is densified:
    sparse batch norm, a learned token at masked places, a projection to the decoder's width, which halves from scale
    to scale. `sparse` takes the sparse kernel instead of masking.
    Tian et al., "Designing BERT for Convolutional Networks: Sparse and Hierarchical Masked Modeling", section 3.
    """

    def __init__(self, encoder: ResidualEncoder, *, decoder_width: int | None = None, sparse: bool = False) -> None:
        super().__init__()
        scales = encoder.widths[:0:-1]  # coarsest first, without the finest
        width = encoder.widths[-1] if decoder_width is None else decoder_width
        if width < 1 or width % 2 ** len(scales):
            raise UserError(
                f"decoder_width halves {len(scales)} times, so it must be a multiple of {2 ** len(scales)} "
                f"(given: {width})"
            )
        widths = [width >> i for i in range(len(scales) + 1)]
        self.encoder, self.sparse = encoder, sparse
        self.norms = nn.ModuleList(nn.BatchNorm3d(channels) for channels in scales)
        self.tokens = nn.ParameterList(
            nn.init.trunc_normal_(torch.empty(1, channels, 1, 1, 1), std=0.02) for channels in scales
        )
        coarsest = nn.Identity() if scales[0] == width else nn.Conv3d(scales[0], width, 1)
        finer = (nn.Conv3d(*channels, 3, padding=1) for channels in zip(scales[1:], widths[1:], strict=False))
        self.projections = nn.ModuleList([coarsest, *finer])
        self.blocks = nn.ModuleList(_DecoderBlock(wide, narrow) for wide, narrow in pairwise(widths))
        self.head = nn.Conv3d(widths[-1], encoder.stages[0][0].conv1.in_channels, 1)

    @property
    def patch(self) -> int:
        """Voxels a side of a patch: the encoder's total stride."""
        return self.encoder.total_stride

    def patches_of(self, volume: Tensor) -> tuple[int, ...]:
        """Patches a side of `[B, C, X, Y, Z]`, for `patch_mask`."""
        return tuple(side // self.patch for side in volume.shape[2:])

    def forward(self, volume: Tensor, mask: Tensor) -> Tensor:
        """`[B, C, X, Y, Z]` and the mask `[B, 1, *patches]` to predicted patches, in units of normalized ones."""
        grid = (SparseGrid if self.sparse else MaskedGrid)(mask, len(self.encoder.stages))
        x: Tensor | float = 0.0
        scales = self.encoder(volume, grid)[:0:-1]
        for features, norm, token, project, block in zip(
            scales, self.norms, self.tokens, self.projections, self.blocks, strict=True
        ):
            active = _repeated(mask, features.shape[2:])
            features = masked_norm(norm, features, active)
            x = block(x + project(torch.where(active, features, token.to(features.dtype))))
        return self.head(x)


# ---------------------------------------------------------------------------------------------------------- the loss


def reconstruction_loss(prediction: Tensor, volume: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error over masked patches, each normalized by its own mean and standard deviation; a scalar.

    prediction and volume `[B, C, X, Y, Z]`, mask `[B, 1, *patches]`. Predicting zeros is predicting the patch's mean:
    1 - ε / (σ² + ε), which is 1 for all patches but those that are constant.
    """
    masked = ~mask.flatten(1)
    target = _normalized_patches(_patches(volume, mask))[0][masked]
    return (_patches(prediction, mask)[masked].to(target.dtype) - target).square().mean()


def fill_in(prediction: Tensor, volume: Tensor, mask: Tensor) -> Tensor:
    """The volume with masked patches as predicted, in the volume's units by the true mean and deviation of a patch."""
    _, mean, deviation = _normalized_patches(_patches(volume, mask))
    x, y, z = mask.shape[2:]
    filled = rearrange(
        (_patches(prediction, mask) * deviation + mean).to(volume.dtype),
        "b (x y z) (i j k c) -> b c (x i) (y j) (z k)",
        x=x,
        y=y,
        i=volume.shape[2] // x,
        j=volume.shape[3] // y,
        k=volume.shape[4] // z,
    )
    return torch.where(_repeated(mask, volume.shape[2:]), volume, filled)


def _patches(volume: Tensor, mask: Tensor) -> Tensor:
    """`[B, L, voxels · C]`: of each of the L patches its voxels."""
    x, y, z = mask.shape[2:]
    return rearrange(volume, "b c (x i) (y j) (z k) -> b (x y z) (i j k c)", x=x, y=y, z=z)


def _normalized_patches(patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Patches less their mean, over their standard deviation; and these two."""
    patches = patches.to(torch.promote_types(patches.dtype, torch.float32))
    variance, mean = torch.var_mean(patches, dim=-1, correction=0, keepdim=True)
    deviation = (variance + _EPSILON).sqrt()
    return (patches - mean) / deviation, mean, deviation
