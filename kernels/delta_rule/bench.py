"""The delta rule against the recurrence, flash-linear-attention and causal attention."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor
from torch.nn.functional import normalize, scaled_dot_product_attention

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

from . import delta_rule, delta_rule_step
from .reference import delta_rule_reference

THREADS = 2
LONGEST_RECURRENCE = 2048  # tokens; beyond, the recurrence takes seconds a call
DECODED = tuple(1024 * 2**i for i in range(7))
FLASH = "flash-linear-attention"
RECURRENCE = "step recurrence"
ATTENTION = "SDPA, causal"

Run = Callable[..., object]
Peaks = tuple[float, float]


@dataclass(frozen=True)
class Shape:
    batch: int
    length: int
    heads: int
    dim: int  # of keys and of values


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
    with _threads(THREADS):
        peaks = peak_flops(device, dtype), peak_bandwidth(device)
        rows = []
        for shape in CPU_SHAPES if device == "cpu" else CUDA_SHAPES:
            rows += _training(shape, device, dtype, peaks)
        if device == "cpu":
            for shape in CPU_HEAD_DIMS:
                study = {"study": f"forward+backward, T = {shape.length}"}
                compared = _training(shape, device, dtype, peaks, ("forward+backward",), ("reprise", RECURRENCE))
                rows += [row | study for row in compared]
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
    """flash-linear-attention: its kernel on a GPU; on a CPU, where it has none, its chunkwise reference in PyTorch."""
    try:
        if device == "cpu":
            from fla.ops.delta_rule.naive import delta_rule_chunkwise

            return f"{FLASH} (torch reference)", delta_rule_chunkwise
        from fla.ops.delta_rule import chunk_delta_rule
    except ImportError as error:
        print(f"{FLASH} is left out: {error} (pip install flash-linear-attention)", file=sys.stderr)
        return None
    return FLASH, chunk_delta_rule


def _implementations(shape: Shape, device: str, dtype: torch.dtype) -> dict[str, tuple[Run, tuple[Tensor, ...]]]:
    size = (shape.batch, shape.length, shape.heads, shape.dim)
    q, v = (torch.randn(size, device=device).to(dtype) for _ in range(2))
    k = normalize(torch.randn(size, device=device), dim=-1).to(dtype)
    beta = torch.rand(size[:-1], device=device).sigmoid().to(dtype)
    # Some expect [B, H, T, D]; turned outside of the clock.
    turned = tuple(x.transpose(1, 2).contiguous() for x in (q, k, v, beta))

    implementations: dict[str, tuple[Run, tuple[Tensor, ...]]] = {"reprise": (delta_rule, (q, k, v, beta))}
    library = _library(device)
    if library is not None:
        implementations[library[0]] = (library[1], turned if device == "cpu" else (q, k, v, beta))
    if device == "cpu" and shape.length <= LONGEST_RECURRENCE:
        implementations[RECURRENCE] = (delta_rule_reference, (q, k, v, beta))
    implementations[ATTENTION] = (lambda *x: scaled_dot_product_attention(*x, is_causal=True), turned[:3])
    return implementations


def _training(
    shape: Shape,
    device: str,
    dtype: torch.dtype,
    peaks: Peaks,
    passes: Sequence[str] = ("forward", "forward+backward"),
    only: Sequence[str] | None = None,
) -> list[Row]:
    implementations = _implementations(shape, device, dtype)
    chosen = [label for label in implementations if only is None or label in only]
    rows = []
    for name in passes:
        prepare = _forward if name == "forward" else forward_backward
        cases = {label: prepare(implementations[label][0], *implementations[label][1]) for label in chosen}
        times = measure(cases)
        for label, run in cases.items():
            bound = _attention_floor if label == ATTENTION else _floor
            memory = peak_memory_mib(run)
            rows.append(_row(shape, label, name, dtype, times[label], memory, bound(shape, name, device, dtype, peaks)))
    return rows


def _forward(run: Run, *inputs: Tensor) -> Callable[[], object]:
    def forward() -> object:
        with torch.no_grad():
            return run(*inputs)

    return forward


def _floor(shape: Shape, name: str, device: str, dtype: torch.dtype, peaks: Peaks) -> tuple[float, str]:
    """Of the chunkwise algorithm, by its matrix products as `cpu.py` lists them, and the inverse, C²/6 a token.

    Per token and head, with K = V = D: 5 C D + 3 D² multiplications forward; backward computes all but the outputs
    again, and 11 C D + 8 D² in all. Forward reads q, k, v and writes o; backward reads these three and do and writes
    three gradients.
    """
    chunk_size = 64 if device == "cuda" else 16 if shape.dim <= 32 else 32
    tokens = shape.batch * shape.length * shape.heads
    chunk, square, inverse = chunk_size * shape.dim, shape.dim**2, chunk_size**2 / 6
    products, tensors = 5 * chunk + 3 * square + inverse, 4
    if name != "forward":
        products, tensors = products + 11 * chunk + 8 * square + inverse, tensors + 7
    return floor(2 * tokens * products, tokens * tensors * shape.dim * dtype.itemsize, peaks)


def _attention_floor(shape: Shape, name: str, device: str, dtype: torch.dtype, peaks: Peaks) -> tuple[float, str]:
    """Of causal attention: two products over half of T² forward, five more backward."""
    tokens = shape.batch * shape.length * shape.heads
    products, tensors = (2, 4) if name == "forward" else (7, 12)
    return floor(tokens * shape.length * products * shape.dim, tokens * tensors * shape.dim * dtype.itemsize, peaks)


def _decoding(shape: Shape, device: str, dtype: torch.dtype, peaks: Peaks) -> list[Row]:
    """Generate token after token; time a step, and weigh what is kept for the next one, at each length in `DECODED`."""
    size = (shape.batch, shape.heads, shape.dim)
    q, v = (torch.randn(size, device=device).to(dtype) for _ in range(2))
    k = normalize(torch.randn(size, device=device), dim=-1).to(dtype)
    beta = torch.rand(size[:-1], device=device).to(dtype)
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
                _, state = delta_rule_step(q, k, v, beta, state=state)
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
            seconds = measure(attention)["attend"]
            label = "SDPA over a cache of keys and values"
            rows.append(_row(here, label, "decode", dtype, seconds, kept / 2**20, floor(0, kept, peaks)))
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
        "operator": "delta_rule",
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
