"""The short causal convolution against PyTorch's depthwise `conv1d`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from kernels import bench
from kernels.bench import MAIN, Row, Shape

from . import short_convolution

OPERATOR = "short_convolution"
CONV1D = "conv1d, one group a channel"
WIDTH = 4
CPU_SHAPES = tuple(Shape(1, 512 * 4**i, 1, 256) for i in range(3))
CUDA_SHAPES = tuple(Shape(8, 1024 * 4**i, 1, 2048) for i in range(3))


def conv1d(x: Tensor, weight: Tensor) -> Tensor:
    """The same by `torch.nn.functional.conv1d`, whose layout is `[B, D, T]`."""
    padded = functional.pad(x.mT, (WIDTH - 1, 0))
    return functional.silu(functional.conv1d(padded, weight[:, None], groups=weight.shape[0])).mT


def benchmark(device: str) -> list[Row]:
    """Rows of `kernels.bench.KEYS`: float32 on two threads of a CPU, bfloat16 on a GPU."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    with bench.threads():
        peaks = bench.measure_peaks(device, dtype)
        rows = []
        for shape in CPU_SHAPES if device == "cpu" else CUDA_SHAPES:
            x = torch.randn(shape.batch, shape.length, shape.dim, device=device).to(dtype)
            inputs = (x, torch.randn(shape.dim, WIDTH, device=device).to(dtype))
            implementations = {
                MAIN: (lambda x, weight: short_convolution(x, weight, activation="silu"), inputs),
                CONV1D: (conv1d, inputs),
            }
            rows += bench.compare(OPERATOR, shape, dtype, implementations, _work, peaks)
    return rows


def _work(shape: Shape, name: str) -> tuple[float, float]:
    """Forward reads x and writes y; backward reads x and dy and writes dx."""
    numbers = shape.tokens * shape.dim
    products = 2 * WIDTH * numbers
    return (products, 2 * numbers) if name == "forward" else (3 * products, 5 * numbers)
