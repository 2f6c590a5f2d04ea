"""Gated RMSNorm against its definition in plain PyTorch."""

from __future__ import annotations

import torch

from kernels import bench
from kernels.bench import MAIN, Row, Shape

from . import rms_norm_gated
from .reference import rms_norm_gated_reference

OPERATOR = "normalization"
PLAIN = "definition in PyTorch"
CPU_SHAPES = tuple(Shape(1, 512 * 4**i, 4, 64) for i in range(3))
CUDA_SHAPES = tuple(Shape(8, 1024 * 4**i, 16, 128) for i in range(3))


def benchmark(device: str) -> list[Row]:
    """Rows of `kernels.bench.KEYS`: float32 on two threads of a CPU, bfloat16 on a GPU."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    with bench.threads():
        peaks = bench.measure_peaks(device, dtype)
        rows = []
        for shape in CPU_SHAPES if device == "cpu" else CUDA_SHAPES:
            size = (shape.batch, shape.length, shape.heads, shape.dim)
            x, gate = (torch.randn(size, device=device).to(dtype) for _ in range(2))
            inputs = (x, gate, torch.ones(shape.dim, device=device, dtype=dtype))
            implementations = {
                MAIN: (rms_norm_gated, inputs),
                PLAIN: (lambda *x: rms_norm_gated_reference(*x, 1e-5), inputs),
            }
            rows += bench.compare(OPERATOR, shape, dtype, implementations, _work, peaks)
    return rows


def _work(shape: Shape, name: str) -> tuple[float, float]:
    """Forward reads x and the gate and writes y; backward reads these two and dy and writes two gradients."""
    numbers = shape.tokens * shape.dim
    return (10 * numbers, 3 * numbers) if name == "forward" else (30 * numbers, 8 * numbers)
