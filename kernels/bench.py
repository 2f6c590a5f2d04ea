"""Measures the operators against what else one could use: `python -m kernels.bench [operator ...] [--device cuda]`.

Each operator's `bench.py` offers `benchmark(device)`, which returns one row a measurement (see `KEYS`); this module
times, weighs, and writes `kernels/<operator>/results/<device>.json` and the figure beside it. What is compared is
measured in turns in one run, so that ratios hold on a busy machine; a figure names the machine it was made on.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]
Run = Callable[..., Any]
Implementations = Mapping[str, tuple[Run, tuple[Tensor, ...]]]
KEYS = (
    "operator",
    "implementation",
    "pass",  # "forward", "forward+backward" or "decode"
    "batch",
    "length",
    "heads",
    "key_dim",
    "value_dim",
    "dtype",
    "milliseconds",
    "memory_mib",  # peak beyond the inputs; None where it was not measured
    "floor_milliseconds",  # what the arithmetic or the traffic alone would take on this machine
    "floor",  # which of the two: "compute" or "bandwidth"
)
OPERATORS = ("linear_attention", "delta_rule", "selective_scan", "short_convolution", "normalization")
SHORTEST_SECONDS = 2e-3  # a measurement is repeated inside until it takes this long: clocks are coarse
MAIN = "reprise"
RECURRENCE = "step recurrence"
FLASH = "flash-linear-attention"
ATTENTION = "SDPA, causal"
THREADS = 2
LONGEST_RECURRENCE = 2048  # tokens; beyond, step-by-step implementations take seconds a call
DECODED = tuple(1024 * 2**i for i in range(7))


@dataclass(frozen=True)
class Shape:
    """Sizes of queries, keys and values `[batch, length, heads, dim]`."""

    batch: int
    length: int
    heads: int
    dim: int

    @property
    def tokens(self) -> int:
        """Over the batch and all heads."""
        return self.batch * self.length * self.heads


Work = Callable[[Shape, str], tuple[float, float]]
"""Of a shape and a pass: floating-point operations, and numbers read and written."""


def synchronize() -> None:
    """Wait for the GPU where there is one, so that a clock read afterwards means something."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(run: Callable[[], object], times: int = 1) -> float:
    """Seconds one call takes, over `times` calls in a row."""
    synchronize()
    started = time.perf_counter()
    for _ in range(times):
        run()
    synchronize()
    return (time.perf_counter() - started) / times


def rounds(cases: Mapping[str, Callable[[], object]], repeats: int) -> Iterator[dict[str, float]]:
    """Seconds of every case, a round at a time, in an order that alternates.

    The first calls (compilation, autotuning, caches) are not counted. Whatever else the machine does meets all cases
    alike, which is what makes their ratios trustworthy.
    """
    times = {}
    for name, run in cases.items():
        first = seconds(run)
        # The first call may have compiled; one that is long all the same need not be asked again.
        again = seconds(run) if first < 1000 * SHORTEST_SECONDS else first
        times[name] = max(1, int(SHORTEST_SECONDS / max(again, 1e-7)))
    for turn in range(repeats):
        yield {name: seconds(cases[name], times[name]) for name in list(cases)[:: 1 if turn % 2 == 0 else -1]}


def measure(cases: Mapping[str, Callable[[], object]], *, repeats: int = 7) -> dict[str, float]:
    """Median seconds of every case over some `rounds`."""
    measured = list(rounds(cases, repeats))
    return {name: statistics.median(taken[name] for taken in measured) for name in cases}


def forward_backward(function: Callable[..., Any], *inputs: Tensor) -> Callable[[], object]:
    """A call of `function(*inputs)` followed by the gradients of its (first) output for all inputs.

    The incoming gradient is fixed random noise: ones would let some implementations skip work.
    """
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]

    def output() -> Tensor:
        result = function(*leaves)
        return result if isinstance(result, Tensor) else result[0]

    gradient = torch.randn_like(output())
    return lambda: torch.autograd.grad(output(), leaves, gradient)


def peak_memory_mib(run: Callable[[], object]) -> float | None:
    """MiB that `run()` needs at its peak beyond what was held before; None where the system cannot tell."""
    run()
    if torch.cuda.is_available():
        synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    if not Path("/proc/self/clear_refs").exists():
        return None
    gc.collect()
    # Freed memory that the allocator keeps would hide what the run needs.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status_kib("VmRSS")
    run()
    return (_status_kib("VmHWM") - before) / 1024


def _status_kib(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {name}")


def peak_flops(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations a second of the best of some large matrix products."""
    size = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds(lambda: a @ b)
    return 2 * size**3 / min(seconds(lambda: a @ b) for _ in range(10))


def peak_bandwidth(device: str) -> float:
    """Bytes a second of the best of some large copies, reads and writes together."""
    source = torch.randn(2**28 if device == "cuda" else 2**25, device=device)
    target = torch.empty_like(source)
    seconds(lambda: target.copy_(source))
    return 2 * source.nbytes / min(seconds(lambda: target.copy_(source)) for _ in range(10))


@dataclass(frozen=True)
class Peaks:
    """What a machine can do: operations and bytes a second."""

    flops: float
    bandwidth: float

    def floor(self, flops: float, traffic: float) -> tuple[float, str]:
        """Milliseconds the operations and the bytes alone would take, and which of the two decides (roofline)."""
        compute, bandwidth = 1e3 * flops / self.flops, 1e3 * traffic / self.bandwidth
        return (compute, "compute") if compute >= bandwidth else (bandwidth, "bandwidth")


def measure_peaks(device: str, dtype: torch.dtype) -> Peaks:
    """The peaks that large products and copies reach on this machine now."""
    return Peaks(peak_flops(device, dtype), peak_bandwidth(device))


@contextmanager
def threads(number: int = THREADS) -> Iterator[None]:
    """So many threads for PyTorch on a CPU, and as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def forward(function: Run, *inputs: Tensor) -> Callable[[], object]:
    """A call of `function(*inputs)` without gradients."""

    def run() -> object:
        with torch.no_grad():
            return function(*inputs)

    return run


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal softmax attention in its own layout, `[B, H, T, D]`."""
    return scaled_dot_product_attention(q, k, v, is_causal=True)


def attention_work(shape: Shape, name: str) -> tuple[float, float]:
    """Of causal attention: two products over half of T² forward, five more backward."""
    products, tensors = (2, 4) if name == "forward" else (7, 12)
    return products * shape.tokens * shape.length * shape.dim, tensors * shape.tokens * shape.dim


def compare(
    operator: str,
    shape: Shape,
    dtype: torch.dtype,
    implementations: Implementations,
    work: Work,
    peaks: Peaks,
    passes: Sequence[str] = ("forward", "forward+backward"),
    **more: str,
) -> list[Row]:
    """Rows of every implementation, given as (function, inputs), in every pass."""
    rows = []
    for name in passes:
        prepare = forward if name == "forward" else forward_backward
        cases = {label: prepare(function, *inputs) for label, (function, inputs) in implementations.items()}
        times = measure(cases)
        for label, run in cases.items():
            flops, numbers = (attention_work if label == ATTENTION else work)(shape, name)
            bound = peaks.floor(flops, numbers * dtype.itemsize)
            rows.append(_row(operator, shape, label, name, dtype, times[label], peak_memory_mib(run), bound) | more)
    return rows


def decode(
    operator: str, step: Callable[[Tensor], Tensor], dtype: torch.dtype, device: str, shape: Shape, peaks: Peaks
) -> list[Row]:
    """Generate token after token by `step(state) -> state`; time a step, and weigh what is kept for the next one.

    Beside it attention over the keys and values of as many tokens, at each length in `DECODED`.
    """
    size = (shape.batch, shape.heads, shape.dim)
    state = torch.zeros(*size, shape.dim, device=device)
    query = torch.randn(size, device=device).to(dtype)[:, :, None]
    cache = torch.randn(2, shape.batch, shape.heads, DECODED[-1], shape.dim, device=device).to(dtype)
    rows = []
    token = 0
    with torch.no_grad():
        for length in DECODED:
            here = Shape(shape.batch, length, shape.heads, shape.dim)
            steps = []
            while token < length:
                started = time.perf_counter()
                state = step(state)
                synchronize()
                steps.append(time.perf_counter() - started)
                token += 1
            took, kept = statistics.median(steps), state.nbytes
            rows.append(_row(operator, here, MAIN, "decode", dtype, took, kept / 2**20, peaks.floor(0, 2 * kept)))
            keys, values = cache[:, :, :, :length]
            case = {"attend": lambda keys=keys, values=values: scaled_dot_product_attention(query, keys, values)}
            took, kept = measure(case)["attend"], keys.nbytes + values.nbytes
            label = "SDPA over a cache of keys and values"
            rows.append(_row(operator, here, label, "decode", dtype, took, kept / 2**20, peaks.floor(0, kept)))
    return rows


def _row(
    operator: str,
    shape: Shape,
    implementation: str,
    name: str,
    dtype: torch.dtype,
    took: float,
    memory_mib: float | None,
    bound: tuple[float, str],
) -> Row:
    sizes = (shape.batch, shape.length, shape.heads, shape.dim, shape.dim)
    kind = str(dtype).removeprefix("torch.")
    return dict(zip(KEYS, (operator, implementation, name, *sizes, kind, 1e3 * took, memory_mib, *bound), strict=True))


def machine(device: str) -> dict[str, Any]:
    """What the figures depend on: processor, threads, versions, load."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for package in ("triton", "fla-core"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU, {cores} cores ({_processor()})",
        "threads": THREADS if device == "cpu" else torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "versions": versions,
    }


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def draw(rows: Sequence[Row], about: Mapping[str, Any]) -> Figure:
    """One column a study (a pass, or what a row's `study` says), time above, memory below."""
    from matplotlib import pyplot

    studies = list(dict.fromkeys(study(row) for row in rows))
    figure, axes = pyplot.subplots(
        2, len(studies), figsize=(4.8 * len(studies), 7), squeeze=False, layout="constrained"
    )
    colors = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(row["implementation"] for row in rows))}
    for column, name in enumerate(studies):
        chosen = [row for row in rows if study(row) == name]
        memory = "kept from token to token [MiB]" if name == "decode" else "peak memory beyond the inputs [MiB]"
        panel(axes[0, column], chosen, "milliseconds", "time [ms]", colors)
        panel(axes[1, column], chosen, "memory_mib", memory, colors)
        axes[0, column].set_title(name)
    drawn = {text: line for axis in axes.flat for line, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(drawn.values(), drawn.keys(), loc="outside lower center", ncols=3, fontsize=8)
    versions = ", ".join(f"{package} {version}" for package, version in about["versions"].items())
    figure.suptitle(
        f"{rows[0]['operator']}: {about['device']}, {about['threads']} threads, load {about['load']}\n{versions}",
        fontsize=9,
    )
    return figure


def study(row: Row) -> str:
    return str(row.get("study", row["pass"]))


def panel(axes: Axes, rows: Sequence[Row], value: str, label: str, colors: Mapping[str, str]) -> None:
    """Values over what varies among the rows: lines where it is one size, bars where whole shapes differ."""
    rows = [row for row in rows if row[value] is not None]
    if not rows:
        axes.set_axis_off()
        return
    sizes = ("batch", "length", "heads", "key_dim")
    varying = [size for size in sizes if len({row[size] for row in rows}) > 1]
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    bars = len(varying) > 1
    labels = list(dict.fromkeys(label_of(row) for row in rows))
    for index, name in enumerate(names):
        mine = [row for row in rows if row["implementation"] == name]
        style = {"color": colors[name], "label": name}
        if bars:
            width = 0.8 / len(names)
            places = [labels.index(label_of(row)) + (index - (len(names) - 1) / 2) * width for row in mine]
            axes.bar(places, [row[value] for row in mine], width, **style)
        else:
            size = varying[0] if varying else "length"
            mine.sort(key=lambda row: row[size])
            axes.plot([row[size] for row in mine], [row[value] for row in mine], "o-", markersize=3, **style)
            if value == "milliseconds" and name == MAIN:
                floors = [row["floor_milliseconds"] for row in mine]
                if all(point is not None for point in floors):
                    axes.plot([row[size] for row in mine], floors, "k:", label="roofline of this algorithm")
    if bars:
        axes.set_xticks(range(len(labels)), labels, rotation=20, ha="right", fontsize=7)
    else:
        ticks = sorted({row[size] for row in rows})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.tick_params(axis="x", labelsize=7)
        axes.set_xlabel({"length": "sequence length T", "key_dim": "head dimension"}.get(size, size))
    axes.set_yscale("log")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)


def label_of(row: Row) -> str:
    return f"B{row['batch']} T{row['length']} H{row['heads']} D{row['key_dim']}"


def write(operator: str, device: str, rows: Sequence[Row]) -> Path:
    """Write the rows and their figure to kernels/<operator>/results/, whole or not at all; the path of the rows."""
    from matplotlib import pyplot

    folder = Path(__file__).parent / operator / "results"
    folder.mkdir(exist_ok=True)
    about = machine(device)
    figure = draw(rows, about)
    figure.savefig(folder / f".{device}.part.png", dpi=130)
    pyplot.close(figure)
    (folder / f".{device}.part.json").write_text(json.dumps({"machine": about, "rows": list(rows)}, indent=1) + "\n")
    for ending in ("png", "json"):
        os.replace(folder / f".{device}.part.{ending}", folder / f"{device}.{ending}")
    return folder / f"{device}.json"


def table(rows: Sequence[Row]) -> str:
    """Milliseconds by shape, with each implementation's time as a multiple of ours."""
    ours = {
        (study(row), label_of(row), row["pass"]): row["milliseconds"] for row in rows if row["implementation"] == MAIN
    }
    lines = []
    for row in rows:
        ratio = row["milliseconds"] / ours.get((study(row), label_of(row), row["pass"]), float("nan"))
        above = row["milliseconds"] / row["floor_milliseconds"] if row["floor_milliseconds"] else float("nan")
        note = f"{above:5.1f} x floor" if row["implementation"] == MAIN else f"{ratio:5.1f} x {MAIN}"
        lines.append(
            f"{study(row):24} {label_of(row):22} {row['implementation']:44} {row['milliseconds']:10.3f} ms  {note}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__.splitlines()[0])
    parser.add_argument("operators", nargs="*", metavar="operator", help=f"of {', '.join(OPERATORS)}; default: all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    chosen = parser.parse_args(arguments)
    unknown = sorted(set(chosen.operators) - set(OPERATORS))
    if unknown:
        parser.error(f"no operator {', '.join(unknown)}; there are: {', '.join(OPERATORS)}")
    if chosen.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device was found; on this machine: --device cpu")
    for operator in chosen.operators or OPERATORS:
        print(f"{operator} on {chosen.device}", file=sys.stderr)
        rows = importlib.import_module(f"kernels.{operator}.bench").benchmark(chosen.device)
        print(table(rows))
        print(f"written: {write(operator, chosen.device, rows)}", file=sys.stderr)


if __name__ == "__main__":
    main()
