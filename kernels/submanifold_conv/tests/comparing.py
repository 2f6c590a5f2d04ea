"""Sparse convolutions held against the dense definition in float64: values and the gradients of everything."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.submanifold_conv import Rulebook, build_rulebook
from kernels.submanifold_conv.reference import sparse_conv_reference, transposed_reference
from kernels.tests.comparing import TOLERANCE, hold

Path = Callable[[Tensor, Tensor, Tensor | None, Rulebook, bool], Tensor]


def places(shape: tuple[int, int, int], *, batch_size: int = 2, share: float = 0.4, seed: int = 0) -> Tensor:
    """Scattered active places `[N, 4]` in no order, the corners of every sample among them."""
    generator = torch.Generator().manual_seed(seed)
    active = torch.rand(batch_size, *shape, generator=generator) < share
    active[:, :: max(shape[0] - 1, 1), :: max(shape[1] - 1, 1), :: max(shape[2] - 1, 1)] = True
    coordinates = active.nonzero()
    return coordinates[torch.randperm(len(coordinates), generator=generator)]


def hold_against_definition(
    path: Path,
    coordinates: Tensor,
    shape: tuple[int, int, int],
    *,
    kernel_size: int | tuple[int, int, int] = 3,
    stride: int | tuple[int, int, int] = 1,
    channels: tuple[int, int] = (3, 5),
    dtype: torch.dtype = torch.float64,
    transposed: bool = False,
    device: str = "cpu",
    tolerance: float | None = None,
) -> None:
    """y and the gradients of features, weight and bias have the dtype they should and are those of the definition."""
    rulebook = build_rulebook(coordinates.to(device), shape, kernel_size=kernel_size, stride=stride, batch_size=2)
    sources = rulebook.num_outputs if transposed else rulebook.num_inputs
    generator = torch.Generator().manual_seed(1)
    sizes = {
        "features": (sources, channels[0]),
        "weight": (*rulebook.kernel_size, *channels),
        "bias": (channels[1],),
    }
    given = {name: torch.randn(size, generator=generator).to(dtype) for name, size in sizes.items()}

    def run(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return path(features, weight.flatten(0, 2), bias, rulebook, transposed)

    def define(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if transposed:
            coarse = rulebook.coordinates.cpu()
            grid = (rulebook.spatial_shape, 2)
            return transposed_reference(features, coarse, weight, bias, *grid, stride=rulebook.stride, onto=coordinates)
        y, outputs = sparse_conv_reference(features, coordinates, weight, bias, shape, 2, stride=rulebook.stride)
        assert torch.equal(outputs, rulebook.coordinates.cpu())
        return y

    results, reference = {}, {}
    for found, function, kind, where in ((results, run, dtype, device), (reference, define, torch.float64, "cpu")):
        leaves = {name: x.to(where, kind).requires_grad_() for name, x in given.items()}
        y = function(**leaves)
        upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
        gradients = torch.autograd.grad(y, list(leaves.values()), upstream.to(where, kind))
        assert [x.dtype for x in (y, *gradients)] == [kind] * 4
        found |= {"y": y.detach().cpu(), **{name: x.cpu() for name, x in zip(leaves, gradients, strict=True)}}
    hold(results, reference, TOLERANCE[dtype] if tolerance is None else tolerance)
