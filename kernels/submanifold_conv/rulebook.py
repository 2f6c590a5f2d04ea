"""Which active place meets which through which kernel offset, found once for all layers with the same active places.

An output place o sees the input place stride · o + offset. Places are numbered by linear keys in a grid that is one
place larger on every side, so that a neighbor beyond the border is a place of its own, always empty, and never wraps
around into the next row, slice or sample. Keys are found in an index of the whole grid where the grid is not too much
larger than the number of active places (an order of magnitude faster), else by binary search among the sorted keys.

Graham, Engelcke and van der Maaten, "3D Semantic Segmentation with Submanifold Sparse Convolutional Networks" (CVPR
2018), section 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

_Triple = tuple[int, int, int]

# An index of the grid takes 4 bytes a cell, the table of 27 neighbors 108 bytes an active place.
_LARGEST_GRID = 128  # cells an active place

# What each stride of an axis allows as its kernel size.
_KERNEL_SIZES = {1: (1, 3), 2: (2, 3)}


@dataclass(frozen=True, eq=False)
class Rulebook:
    """Pairs of input and output rows of a sparse convolution, by kernel offset; see `build_rulebook`.

    Offsets are in the order of a flattened conv3d kernel, z slowest. A stride of 1 in all axes is submanifold: outputs
    are the inputs, in their order.
    """

    neighbors: Tensor  # [N_out, K] int32: the input row seen through each offset, num_inputs where none is active
    coordinates: Tensor  # [N_out, 4] of the outputs, int64
    spatial_shape: _Triple  # of the outputs
    input_coordinates: Tensor  # [N_in, 4], int64
    input_spatial_shape: _Triple
    batch_size: int
    kernel_size: _Triple
    stride: _Triple

    @property
    def num_inputs(self) -> int:
        return len(self.input_coordinates)

    @property
    def num_outputs(self) -> int:
        return len(self.coordinates)

    @property
    def num_offsets(self) -> int:
        return math.prod(self.kernel_size)

    @property
    def is_submanifold(self) -> bool:
        """The active places stay as they are, and the offsets k and K - 1 - k are mirror images."""
        return self.stride == (1, 1, 1)

    @cached_property
    def num_pairs(self) -> int:
        return int((self.neighbors < self.num_inputs).count_nonzero())

    @cached_property
    def pairs(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """Of each offset the input rows and the output rows that it joins, int64; no row comes twice in one of them."""
        center = self.num_offsets // 2
        searched = center if self.is_submanifold else self.num_offsets
        found = []
        for k in range(searched):
            seen = self.neighbors[:, k]
            outputs = (seen < self.num_inputs).nonzero().squeeze(1)
            found.append((seen[outputs].long(), outputs))
        if self.is_submanifold:
            rows = torch.arange(self.num_outputs, device=self.neighbors.device)
            found += [(rows, rows), *((outputs, inputs) for inputs, outputs in reversed(found))]
        return tuple(found)

    @cached_property
    def _reversed_neighbors(self) -> Tensor:
        """`[N_in, K]` int32: the output row that sees an input through each offset, num_outputs where there is none."""
        shape = (self.num_inputs + 1, self.num_offsets)  # the row after the last takes what is no neighbor
        table = self.neighbors.new_full(shape, self.num_outputs)
        outputs = torch.arange(self.num_outputs, device=table.device, dtype=table.dtype)
        table.scatter_(0, self.neighbors.long(), outputs[:, None].expand_as(self.neighbors))
        return table[:-1]

    def table(self, transposed: bool) -> tuple[Tensor, bool]:
        """`[rows to compute, K]` int32: the rows to gather, and whether columns run from the last offset to the first.

        From inputs to outputs, or back where `transposed`. Nothing to gather is the row after the last.
        """
        if not transposed:
            return self.neighbors, False
        if self.is_submanifold:
            return self.neighbors, True
        return self._reversed_neighbors, False


def build_rulebook(
    coordinates: Tensor,
    spatial_shape: Sequence[int],
    *,
    kernel_size: int | Sequence[int] = 3,
    stride: int | Sequence[int] = 1,
    batch_size: int | None = None,
) -> Rulebook:
    """The rulebook of a sparse convolution over the active places `coordinates`, on their device.

    `coordinates` `[N, 4]`, integers, one row (sample, z, y, x) an active place, in any order, none twice; spatial_shape
    (D, H, W). `kernel_size` and `stride` are one number or one an axis.

    Stride 1, kernel 1 or 3: submanifold, out[o] = Σ_k W_k in[o + offset_k] over the active neighbors of active places.
    Stride 2, kernel 2 (offsets 0, 1) or 3 (offsets -1, 0, 1): out[o] = Σ_k W_k in[2 o + offset_k], active where an
    input is in its cell of 2 x 2 x 2 (o = ⌊input / 2⌋, each once, sorted); odd sizes are rounded up.

    Raises TypeError for coordinates that are no integers, ValueError for wrong shapes, places out of range or given
    twice, and kernels and strides that are not offered.
    """
    shape = _triple(spatial_shape, "spatial_shape (depth, height, width)")
    if min(shape) < 1:
        raise ValueError(f"spatial_shape must be positive (given: {list(shape)})")
    kernel, strides = _triple(kernel_size, "kernel_size"), _triple(stride, "stride")
    for size, step in zip(kernel, strides, strict=True):
        if size not in _KERNEL_SIZES.get(step, ()):
            offered = "stride 1 with kernel size 1 or 3, stride 2 with kernel size 2 or 3"
            raise ValueError(f"each axis may have {offered} (given: kernel size {kernel}, stride {strides})")
    coordinates, batch_size = _checked(coordinates, shape, batch_size)

    padded = tuple(size + 2 for size in shape)
    num_cells = batch_size * math.prod(padded)
    if num_cells >= 2**62:
        raise ValueError(f"the grid is too large for 64-bit keys (given: spatial_shape {list(shape)})")
    outputs, output_shape = coordinates, shape
    if strides != (1, 1, 1):
        output_shape = tuple(-(-size // step) for size, step in zip(shape, strides, strict=True))
        outputs = _coarsened(coordinates, strides, batch_size, output_shape)
    keys = _keys(coordinates, padded, margin=1)
    origins = _keys(outputs * outputs.new_tensor((1, *strides)), padded, margin=1)
    z, y, x = (range(-1, 2) if size == 3 else range(size) for size in kernel)
    # Offsets along x have keys in a row.
    rows = keys.new_tensor([(dz * padded[1] + dy) * padded[2] + x.start for dz in z for dy in y])
    neighbors = _find(coordinates, keys, origins[:, None] + rows, len(x), num_cells)
    return Rulebook(neighbors, outputs, output_shape, coordinates, shape, batch_size, kernel, strides)


def _triple(value: int | Sequence[int], name: str) -> _Triple:
    values = (value,) * 3 if isinstance(value, int) else tuple(value)
    if len(values) != 3 or not all(isinstance(number, int) for number in values):
        raise ValueError(f"{name} must be three integers (given: {value})")
    return values


def _checked(coordinates: Tensor, shape: _Triple, batch_size: int | None) -> tuple[Tensor, int]:
    """The coordinates in int64, and the number of samples."""
    if coordinates.is_floating_point() or coordinates.is_complex() or coordinates.dtype == torch.bool:
        raise TypeError(f"coordinates must be integers (given: {coordinates.dtype}); convert with .long()")
    if coordinates.ndim != 2 or coordinates.shape[1] != 4:
        raise ValueError(f"coordinates must be [N, 4] = (sample, z, y, x) (given: {list(coordinates.shape)})")
    coordinates = coordinates.long()
    if not len(coordinates):
        return coordinates, batch_size or 0
    lowest, highest = (bound.tolist() for bound in coordinates.aminmax(dim=0))
    batch_size = highest[0] + 1 if batch_size is None else batch_size
    if min(lowest) < 0 or any(top >= size for top, size in zip(highest, (batch_size, *shape), strict=True)):
        raise ValueError(
            f"coordinates (sample, z, y, x) must be from 0 to below {[batch_size, *shape]} "
            f"(given: from {lowest} to {highest})"
        )
    return coordinates, batch_size


def _keys(coordinates: Tensor, shape: Sequence[int], margin: int = 0) -> Tensor:
    """Linear keys `[N]` of places (sample, z, y, x) in a grid of this shape, with `margin` before the first place."""
    keys, *axes = coordinates.unbind(1)
    for axis, size in zip(axes, shape, strict=True):
        keys = keys * size + axis + margin
    return keys


def _coarsened(coordinates: Tensor, strides: _Triple, batch_size: int, shape: Sequence[int]) -> Tensor:
    """⌊place / stride⌋ of all places, each once, sorted, `[N_out, 4]`."""
    cells = coordinates.div(coordinates.new_tensor((1, *strides)), rounding_mode="floor")
    # Neighbors often share a cell: most of what is given twice is gone before anything is sorted.
    keys = torch.unique(torch.unique_consecutive(_keys(cells, shape)))
    if not len(keys):
        return cells
    return torch.stack(torch.unravel_index(keys, (batch_size, *shape)), dim=1)


def _find(coordinates: Tensor, keys: Tensor, first: Tensor, width: int, num_cells: int) -> Tensor:
    """Rows, int32, that hold the keys `first` `[N_out, G]` and the `width` - 1 after each; `[N_out, G · width]`.

    len(keys) stands where no row holds a key. ValueError where two rows hold the same.
    """
    absent = len(keys)
    rows = torch.arange(absent, device=keys.device, dtype=torch.int32)
    if 0 < num_cells <= _LARGEST_GRID * absent:
        grid = rows.new_full((num_cells,), absent)
        grid[keys] = rows
        if not torch.equal(grid[keys], rows):
            raise _twice(coordinates)
        return grid.take(first[:, :, None] + torch.arange(width, device=keys.device)).flatten(1)
    ordered, order = keys.sort()
    if (ordered.diff() == 0).any():
        raise _twice(coordinates)
    # One beyond the last: where a search ends that finds nothing, and what it then reports.
    ordered, order = torch.cat([ordered, ordered.new_tensor([-1])]), torch.cat([order.int(), rows.new_tensor([absent])])
    found = rows.new_empty(*first.shape, width)
    position = torch.searchsorted(ordered[:-1], first.contiguous())
    for step in range(width):
        hit = ordered[position] == first + step
        found[:, :, step] = order[torch.where(hit, position, absent)]
        position += hit
    return found.flatten(1)


def _twice(coordinates: Tensor) -> ValueError:
    places, counts = coordinates.unique(dim=0, return_counts=True)
    repeated = places[counts > 1]
    return ValueError(
        f"{len(repeated)} of the coordinates are given more than once, {repeated[0].tolist()} among them: "
        "merge the features of such rows first"
    )
