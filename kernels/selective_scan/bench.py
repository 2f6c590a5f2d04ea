"""Mamba's scan against the step recurrence."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from kernels import bench
from kernels.bench import MAIN, RECURRENCE, Row, Shape

from . import selective_scan
from .reference import selective_scan_reference

OPERATOR = "selective_scan"
STATES = 16  # N
CPU_SHAPES = tuple(Shape(8, 64 * 4**i, 1, 192) for i in range(3))
CUDA_SHAPES = tuple(Shape(8, 256 * 4**i, 1, 1024) for i in range(2))


def benchmark(device: str) -> list[Row]:
    """Rows of `kernels.bench.KEYS`, `key_dim` being the number of channels: float32 everywhere."""
    with bench.threads():
        peaks = bench.measure_peaks(device, torch.float32)
        rows = []
        for shape in CPU_SHAPES if device == "cpu" else CUDA_SHAPES:
            inputs = _inputs(shape, device)
            implementations = {
                MAIN: (selective_scan, inputs),
                RECURRENCE: (lambda *tensors: selective_scan_reference(*tensors, None, None), inputs),
            }
            rows += bench.compare(OPERATOR, shape, torch.float32, implementations, _work, peaks)
    return rows


def _inputs(shape: Shape, device: str) -> tuple[Tensor, ...]:
    tokens = (shape.batch, shape.length)
    x, delta = (torch.randn(*tokens, shape.dim, device=device) for _ in range(2))
    rates = -torch.arange(1.0, STATES + 1, device=device).expand(shape.dim, STATES).contiguous()
    b, c = (torch.randn(*tokens, STATES, device=device) for _ in range(2))
    return x, functional.softplus(delta - 3), rates, b, c


def _work(shape: Shape, name: str) -> tuple[float, float]:
    """An exponential (counted as 10 operations), two products and two sums a state; three times that backward."""
    operations = 14 * shape.tokens * shape.dim * STATES
    numbers = shape.tokens * (3 * shape.dim + 2 * STATES)
    return (operations, numbers) if name == "forward" else (4 * operations, 3 * numbers)
