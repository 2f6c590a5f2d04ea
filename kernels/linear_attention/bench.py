"""Gated linear attention against the recurrence, flash-linear-attention and causal attention."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, scaled_dot_product_attention

from kernels.bench import (
    Row,
    floor,
    forward_backward,
    measure,
    peak_bandwidth,
    peak_flops,
    peak_memory_mib,
    synchronize,
)

from . import gla, gla_step
from .reference import gla_reference

THREADS = 2
CHUNK_SIZE = 64
LONGEST_RECURRENCE = 2048  # tokens; beyond, the step-by-step implementations take seconds a call
DECODED = tuple(1024 * 2**i for i in range(7))

Run = Callable[..., object]


@dataclass(frozen=True)
class Shape:
    batch: int
    length: int
    heads: int
    dim: int  # of keys and of values


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
    with _threads(THREADS):
        peaks = peak_flops(device, dtype), peak_bandwidth(device)
        rows = []
        for shape in CPU_SHAPES if device == "cpu" else CUDA_SHAPES:
            rows += _training(shape, device, dtype, peaks)
        rows += _decoding(Shape(1, 0, 4, 64) if device == "cpu" else Shape(1, 0, 16, 128), device, dtype, peaks)
    return rows


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _library(device: str) -> tuple[str, Run] | None:
    """flash-linear-attention: its kernel on a GPU, and on a CPU, where it has none, its reference in PyTorch."""
    try:
        if device == "cpu":
            from fla.ops.gla.naive import naive_recurrent_gla

            return "flash-linear-attention (torch reference)", naive_recurrent_gla
        from fla.ops.gla import chunk_gla
    except ImportError as error:
        print(f"flash-linear-attention is left out: {error} (pip install fla-core)", file=sys.stderr)
        return None
    return "flash-linear-attention", chunk_gla


def _training(shape: Shape, device: str, dtype: torch.dtype, peaks: tuple[float, float]) -> list[Row]:
    size = (shape.batch, shape.length, shape.heads, shape.dim)
    q, k, v = (torch.randn(size, device=device).to(dtype) for _ in range(3))
    g = logsigmoid(torch.randn(size, device=device)).clamp(min=-5).to(dtype)
    # Attention's own layout [B, H, T, D], turned outside of the clock.
    turned = tuple(x.transpose(1, 2).contiguous() for x in (q, k, v))

    implementations: dict[str, tuple[Run, tuple[Tensor, ...]]] = {"reprise": (gla, (q, k, v, g))}
    library = _library(device)
    if device != "cpu" or shape.length <= LONGEST_RECURRENCE:
        if library is not None:
            implementations[library[0]] = (library[1], (q, k, v, g))
        if device == "cpu":
            implementations["step recurrence"] = (gla_reference, (q, k, v, g))
    implementations["SDPA, causal"] = (lambda *x: scaled_dot_product_attention(*x, is_causal=True), turned)

    rows = []
    for name, prepare in (("forward", _forward), ("forward+backward", forward_backward)):
        cases = {label: prepare(run, *inputs) for label, (run, inputs) in implementations.items()}
        times = measure(cases)
        for label, run in cases.items():
            bound = _attention_floor if label.startswith("SDPA") else _floor
            rows.append(
                _row(shape, label, name, dtype, times[label], peak_memory_mib(run), bound(shape, name, dtype, peaks))
            )
    return rows


def _forward(run: Run, *inputs: Tensor) -> Callable[[], object]:
    def forward() -> object:
        with torch.no_grad():
            return run(*inputs)

    return forward


def _floor(shape: Shape, name: str, dtype: torch.dtype, peaks: tuple[float, float]) -> tuple[float, str]:
    """Of the chunked algorithm: C K + C V + 2 K V products a token forward, 3 C K + 2 C V + 5 K V more backward.

    Forward reads q, k, v, g and writes o; backward reads these four and do, and writes four gradients.
    """
    tokens = shape.batch * shape.length * shape.heads
    chunk, square = CHUNK_SIZE * shape.dim, shape.dim**2
    products, passes = 2 * chunk + 2 * square, 5
    if name != "forward":
        products, passes = products + 5 * chunk + 5 * square, passes + 9
    return floor(2 * tokens * products, tokens * passes * shape.dim * dtype.itemsize, peaks)


def _attention_floor(shape: Shape, name: str, dtype: torch.dtype, peaks: tuple[float, float]) -> tuple[float, str]:
    """Of causal attention: two products over half of T² forward, five more backward."""
    tokens = shape.batch * shape.length * shape.heads
    products, passes = (2, 4) if name == "forward" else (7, 12)
    return floor(tokens * shape.length * products * shape.dim, tokens * passes * shape.dim * dtype.itemsize, peaks)


def _decoding(shape: Shape, device: str, dtype: torch.dtype, peaks: tuple[float, float]) -> list[Row]:
    """Generate token after token; time a step, and weigh what is kept for the next one, at each length in `DECODED`."""
    size = (shape.batch, shape.heads, shape.dim)
    q, k, v = (torch.randn(size, device=device).to(dtype) for _ in range(3))
    g = logsigmoid(torch.randn(size, device=device)).to(dtype)
    state = torch.zeros(*size, shape.dim, device=device)
    cache = torch.randn(2, shape.batch, shape.heads, DECODED[-1], shape.dim, device=device).to(dtype)
    rows = []
    token = 0
    with torch.no_grad():
        for length in DECODED:
            here = Shape(shape.batch, length, shape.heads, shape.dim)
            steps = []
            while token < length:
                started = time.perf_counter()
                _, state = gla_step(q, k, v, g, state=state)
                synchronize()
                steps.append(time.perf_counter() - started)
                token += 1
            bound = floor(0, 2 * state.nbytes, peaks)
            rows.append(_row(here, "reprise", "decode", dtype, median(steps), state.nbytes / 2**20, bound))
            keys, values = cache[:, :, :, :length]
            attention = {
                "attend": lambda keys=keys, values=values: scaled_dot_product_attention(q[:, :, None], keys, values)
            }
            kept = keys.nbytes + values.nbytes
            bound = floor(0, kept, peaks)
            seconds = measure(attention)["attend"]
            rows.append(
                _row(here, "SDPA over a cache of keys and values", "decode", dtype, seconds, kept / 2**20, bound)
            )
    return rows


def _row(
    shape: Shape,
    implementation: str,
    name: str,
    dtype: torch.dtype,
    seconds: float,
    memory_mib: float | None,
    bound: tuple[float, str],
) -> Row:
    return {
        "operator": "linear_attention",
        "implementation": implementation,
        "pass": name,
        "batch": shape.batch,
        "length": shape.length,
        "heads": shape.heads,
        "key_dim": shape.dim,
        "value_dim": shape.dim,
        "dtype": str(dtype).removeprefix("torch."),
        "milliseconds": 1e3 * seconds,
        "memory_mib": memory_mib,
        "floor_milliseconds": bound[0],
        "floor": bound[1],
    }
