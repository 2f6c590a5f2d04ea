"""The delta rule against the recurrence, flash-linear-attention and causal attention."""

from __future__ import annotations

import sys

import torch
from torch.nn.functional import normalize

from kernels import bench
from kernels.bench import ATTENTION, FLASH, LONGEST_RECURRENCE, MAIN, RECURRENCE, Implementations, Row, Run, Shape

from . import delta_rule, delta_rule_step
from .reference import delta_rule_reference

OPERATOR = "delta_rule"
CPU_SHAPES = tuple(Shape(1, 256 * 2**i, 4, 64) for i in range(6))
# The paper's Figure 1: the gain over the recurrence grows with the length (above) and with the head dimension.
CPU_HEAD_DIMS = tuple(Shape(1, 2048, 4, dim) for dim in (32, 64, 128))
# flash-linear-attention's first benchmark of this operator: a model dimension of 2048, split into heads. Then two
# shapes of its present one.
CUDA_SHAPES = (
    *(Shape(b, t, 2048 // dim, dim) for dim in (64, 128, 256) for b, t in ((8, 2048), (4, 4096), (2, 8192))),
    Shape(1, 8192, 96, 128),
    Shape(4, 2048, 16, 128),
)


def benchmark(device: str) -> list[Row]:
    """Rows of `kernels.bench.KEYS`: float32 on two threads of a CPU, bfloat16 on a GPU."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    with bench.threads():
        peaks = bench.measure_peaks(device, dtype)
        rows = []
        for shape in CPU_SHAPES if device == "cpu" else CUDA_SHAPES:
            rows += bench.compare(OPERATOR, shape, dtype, _implementations(shape, device, dtype), _work(device), peaks)
        for shape in CPU_HEAD_DIMS if device == "cpu" else ():
            every = _implementations(shape, device, dtype)
            chosen = {label: every[label] for label in (MAIN, RECURRENCE)}
            passes, study = ("forward+backward",), f"forward+backward, T = {shape.length}"
            rows += bench.compare(OPERATOR, shape, dtype, chosen, _work(device), peaks, passes, study=study)
        return rows + _decoding(device, dtype, peaks)


def _library(device: str) -> tuple[str, Run] | None:
    """flash-linear-attention: its kernel on a GPU; on a CPU, where it has none, its chunkwise reference in PyTorch."""
    try:
        if device == "cpu":
            from fla.ops.delta_rule.naive import delta_rule_chunkwise

            return f"{FLASH} (torch reference)", delta_rule_chunkwise
        from fla.ops.delta_rule import chunk_delta_rule
    except ImportError as error:
        print(f"{FLASH} is left out: {error} (pip install -e '.[bench]')", file=sys.stderr)
        return None
    return FLASH, chunk_delta_rule


def _implementations(shape: Shape, device: str, dtype: torch.dtype) -> Implementations:
    size = (shape.batch, shape.length, shape.heads, shape.dim)
    q, v = (torch.randn(size, device=device).to(dtype) for _ in range(2))
    k = normalize(torch.randn(size, device=device), dim=-1).to(dtype)
    beta = torch.rand(size[:-1], device=device).sigmoid().to(dtype)
    # Some expect [B, H, T, D]; turned outside of the clock.
    turned = tuple(x.transpose(1, 2).contiguous() for x in (q, k, v, beta))
    implementations: dict[str, tuple[Run, tuple[torch.Tensor, ...]]] = {MAIN: (delta_rule, (q, k, v, beta))}
    library = _library(device)
    if library is not None:
        implementations[library[0]] = (library[1], turned if device == "cpu" else (q, k, v, beta))
    if device == "cpu" and shape.length <= LONGEST_RECURRENCE:
        implementations[RECURRENCE] = (delta_rule_reference, (q, k, v, beta))
    implementations[ATTENTION] = (bench.attention, turned[:3])
    return implementations


def _work(device: str) -> bench.Work:
    """Of the chunkwise algorithm, by its matrix products as `cpu.py` lists them, and the inverse, C²/6 a token.

    Per token and head, with K = V = D: 5 C D + 3 D² multiplications forward; backward computes all but the outputs
    again, and 11 C D + 8 D² in all. Forward reads q, k, v and writes o; backward reads these three and do and writes
    three gradients.
    """

    def work(shape: Shape, name: str) -> tuple[float, float]:
        chunk_size = 64 if device == "cuda" else 16 if shape.dim <= 32 else 32
        chunk, square, inverse = chunk_size * shape.dim, shape.dim**2, chunk_size**2 / 6
        products, tensors = 5 * chunk + 3 * square + inverse, 4
        if name != "forward":
            products, tensors = products + 11 * chunk + 8 * square + inverse, tensors + 7
        return 2 * shape.tokens * products, tensors * shape.tokens * shape.dim

    return work


def _decoding(device: str, dtype: torch.dtype, peaks: bench.Peaks) -> list[Row]:
    shape = Shape(1, 0, 4, 64) if device == "cpu" else Shape(1, 0, 16, 128)
    size = (shape.batch, shape.heads, shape.dim)
    q, v = (torch.randn(size, device=device).to(dtype) for _ in range(2))
    k = normalize(torch.randn(size, device=device), dim=-1).to(dtype)
    beta = torch.rand(size[:-1], device=device).to(dtype)
    return bench.decode(
        OPERATOR, lambda state: delta_rule_step(q, k, v, beta, state=state)[1], dtype, device, shape, peaks
    )
