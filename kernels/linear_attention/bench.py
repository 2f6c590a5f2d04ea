"""Gated linear attention against the recurrence, flash-linear-attention and causal attention."""

from __future__ import annotations

import sys

import torch
from torch.nn.functional import logsigmoid

from kernels import bench
from kernels.bench import ATTENTION, FLASH, LONGEST_RECURRENCE, MAIN, RECURRENCE, Implementations, Row, Run, Shape

from . import gla, gla_step
from .reference import gla_reference

OPERATOR = "linear_attention"
CHUNK_SIZE = 64
CPU_SHAPES = tuple(Shape(1, 256 * 2**i, 4, 64) for i in range(6))
# Those of flash-linear-attention's own benchmark.
CUDA_SHAPES = (
    Shape(1, 8192, 96, 128),
    Shape(2, 16384, 16, 128),
    Shape(4, 2048, 16, 128),
    Shape(4, 4096, 64, 128),
    Shape(8, 1024, 8, 64),
    Shape(8, 2048, 32, 256),
)


def benchmark(device: str) -> list[Row]:
    """Rows of `kernels.bench.KEYS`: float32 on two threads of a CPU, bfloat16 on a GPU."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    with bench.threads():
        peaks = bench.measure_peaks(device, dtype)
        rows = []
        for shape in CPU_SHAPES if device == "cpu" else CUDA_SHAPES:
            rows += bench.compare(OPERATOR, shape, dtype, _implementations(shape, device, dtype), _work, peaks)
        return rows + _decoding(device, dtype, peaks)


def _library(device: str) -> tuple[str, Run] | None:
    """flash-linear-attention: its kernel on a GPU, and on a CPU, where it has none, its reference in PyTorch."""
    try:
        if device == "cpu":
            from fla.ops.gla.naive import naive_recurrent_gla

            return f"{FLASH} (torch reference)", naive_recurrent_gla
        from fla.ops.gla import chunk_gla
    except ImportError as error:
        print(f"{FLASH} is left out: {error} (pip install -e '.[bench]')", file=sys.stderr)
        return None
    return FLASH, chunk_gla


def _implementations(shape: Shape, device: str, dtype: torch.dtype) -> Implementations:
    size = (shape.batch, shape.length, shape.heads, shape.dim)
    q, k, v = (torch.randn(size, device=device).to(dtype) for _ in range(3))
    g = logsigmoid(torch.randn(size, device=device)).clamp(min=-5).to(dtype)
    implementations: dict[str, tuple[Run, tuple[torch.Tensor, ...]]] = {MAIN: (gla, (q, k, v, g))}
    if device != "cpu" or shape.length <= LONGEST_RECURRENCE:
        library = _library(device)
        if library is not None:
            implementations[library[0]] = (library[1], (q, k, v, g))
        if device == "cpu":
            implementations[RECURRENCE] = (gla_reference, (q, k, v, g))
    # Turned to attention's own layout [B, H, T, D] outside of the clock.
    implementations[ATTENTION] = (bench.attention, tuple(x.transpose(1, 2).contiguous() for x in (q, k, v)))
    return implementations


def _work(shape: Shape, name: str) -> tuple[float, float]:
    """Of the chunked algorithm: C K + C V + 2 K V products a token forward, 3 C K + 2 C V + 5 K V more backward.

    Forward reads q, k, v, g and writes o; backward reads these four and do, and writes four gradients.
    """
    chunk, square = CHUNK_SIZE * shape.dim, shape.dim**2
    products, tensors = 2 * chunk + 2 * square, 5
    if name != "forward":
        products, tensors = products + 5 * chunk + 5 * square, tensors + 9
    return 2 * shape.tokens * products, tensors * shape.tokens * shape.dim


def _decoding(device: str, dtype: torch.dtype, peaks: bench.Peaks) -> list[Row]:
    shape = Shape(1, 0, 4, 64) if device == "cpu" else Shape(1, 0, 16, 128)
    size = (shape.batch, shape.heads, shape.dim)
    q, k, v = (torch.randn(size, device=device).to(dtype) for _ in range(3))
    g = logsigmoid(torch.randn(size, device=device)).to(dtype)
    return bench.decode(OPERATOR, lambda state: gla_step(q, k, v, g, state=state)[1], dtype, device, shape, peaks)
