"""The definition: a dense convolution of the volume, read at the active places; what tests hold the paths against."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from torch import Tensor
from torch.nn import functional


def sparse_conv_reference(
    features: Tensor,
    coordinates: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    spatial_shape: Sequence[int],
    batch_size: int,
    *,
    stride: Sequence[int] = (1, 1, 1),
) -> tuple[Tensor, Tensor]:
    """features `[N, C_in]`, coordinates `[N, 4]`, weight `[kz, ky, kx, C_in, C_out]`; outputs and their coordinates."""
    volume, mask = scatter(features, coordinates, spatial_shape, batch_size)
    # An even kernel begins at its cell, an odd one lies around the place; what a stride needs at the end is zero.
    kernel = zip(weight.shape[:3], stride, strict=True)
    margins = [((size - 1) // 2, size // 2 + step - 1) for size, step in kernel]
    dense = functional.conv3d(
        functional.pad(volume, list(chain(*reversed(margins)))), weight.permute(4, 3, 0, 1, 2), bias, tuple(stride)
    )
    outputs = coordinates
    if max(stride) > 1:
        outputs = functional.max_pool3d(mask, tuple(stride), ceil_mode=True).squeeze(1).nonzero()
    return gather(dense, outputs), outputs


def transposed_reference(
    features: Tensor,
    coordinates: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    spatial_shape: Sequence[int],
    batch_size: int,
    *,
    stride: Sequence[int],
    onto: Tensor,
) -> Tensor:
    """From places of the coarse grid to the places `onto` `[M, 4]` of one `stride` times as fine, `[M, C_out]`."""
    volume, _ = scatter(features, coordinates, spatial_shape, batch_size)
    dense = functional.conv_transpose3d(volume, weight.permute(3, 4, 0, 1, 2), bias, tuple(stride))
    return gather(dense, onto + onto.new_tensor([0, *((size - 1) // 2 for size in weight.shape[:3])]))


def scatter(
    features: Tensor, coordinates: Tensor, spatial_shape: Sequence[int], batch_size: int
) -> tuple[Tensor, Tensor]:
    """The volume `[batch_size, C, D, H, W]`, zero where nothing is active, and its mask `[batch_size, 1, D, H, W]`."""
    places = tuple(coordinates.long().T)
    shape = (batch_size, *spatial_shape)
    volume = features.new_zeros(*shape, features.shape[1]).index_put(places, features)
    mask = features.new_zeros(shape).index_put(places, features.new_ones(()))
    return volume.permute(0, 4, 1, 2, 3), mask[:, None]


def gather(volume: Tensor, coordinates: Tensor) -> Tensor:
    """The rows `[N, C]` of a volume `[B, C, D, H, W]` at the coordinates `[N, 4]`."""
    return volume.permute(0, 2, 3, 4, 1)[tuple(coordinates.long().T)]
