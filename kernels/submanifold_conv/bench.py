"""Sparse convolution against the masked dense one: `python -m kernels.submanifold_conv.bench [--device cuda]`.

A layer of 3 x 3 x 3 over volumes of which a share is masked out: in blocks, as in masked image modeling, or voxel by
voxel. Both sides are measured in turns in one run; the dense one in the memory layout that is faster.
Writes `results/<device>.json` and the figure beside it, with the masked share from which sparse is faster.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from kernels import bench
from kernels.bench import MAIN

from . import build_rulebook, sparse_conv
from .reference import gather

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]
DENSE = "conv3d, masked"
WITH_RULEBOOK = f"{MAIN}, rulebook built each time"
PASSES = ("forward", "forward+backward")
MASKED = (0.0, 0.6, 0.75, 0.9, 0.95, 0.97)
VOXEL = "single voxels"
REPEATS = 7


@dataclass(frozen=True)
class Volume:
    """Volumes `[batch, channels, size, size, size]`, masked out in cubes of `block` voxels."""

    batch: int
    channels: int
    size: int
    block: int

    @property
    def pattern(self) -> str:
        return f"blocks of {self.block}³" if self.block > 1 else VOXEL


CPU_VOLUMES = (Volume(2, 32, 48, 8), Volume(2, 32, 48, 1))
CUDA_VOLUMES = (Volume(2, 64, 96, 16), Volume(2, 64, 96, 1))
# The first volume again, three quarters masked, with other numbers of channels.
CHANNELS = (16, 64)


def mask(volume: Volume, masked: float) -> Tensor:
    """Active voxels `[batch, size, size, size]`: the same share in every sample, at least one block."""
    grid = volume.size // volume.block
    active = torch.zeros(volume.batch, grid**3, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    for sample in active:
        sample[torch.randperm(grid**3, generator=generator)[: max(1, round((1 - masked) * grid**3))]] = True
    active = active.view(volume.batch, grid, grid, grid)
    for axis in (1, 2, 3):
        active = active.repeat_interleave(volume.block, axis)
    return active


def compare(volume: Volume, masked: float, device: str, dtype: torch.dtype) -> list[Row]:
    """Rows of all implementations in both passes."""
    active = mask(volume, masked).to(device)
    coordinates = active.nonzero()
    shape = active.shape[1:]
    dense = torch.randn(volume.batch, volume.channels, *shape, device=device).to(dtype)
    dense = (dense * active[:, None]).contiguous(memory_format=_fastest_layout(dense))
    weight = torch.randn(volume.channels, volume.channels, 3, 3, 3, device=device).to(dtype)
    inputs = (gather(dense, coordinates), weight.permute(2, 3, 4, 1, 0).flatten(0, 2).contiguous())
    rulebook = build_rulebook(coordinates, shape)
    kept = active[:, None].to(dtype)
    weight = weight.contiguous(memory_format=_fastest_layout(dense))
    implementations: Mapping[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
        MAIN: (lambda x, w: sparse_conv(x, w, rulebook), inputs),
        WITH_RULEBOOK: (lambda x, w: sparse_conv(x, w, build_rulebook(coordinates, shape)), inputs),
        DENSE: (lambda x, w: functional.conv3d(x, w, padding=1) * kept, (dense, weight)),
    }
    rows = []
    for name in PASSES:
        prepare = bench.forward if name == "forward" else bench.forward_backward
        cases = {label: prepare(function, *given) for label, (function, given) in implementations.items()}
        # The best of some rounds: what other processes take is noise, and threads that wait for each other add to it.
        measured = list(bench.rounds(cases, REPEATS))
        seconds = {label: min(taken[label] for taken in measured) for label in cases}
        rows += [
            {
                "implementation": label,
                "pass": name,
                "pattern": volume.pattern,
                "masked": masked,
                "batch": volume.batch,
                "channels": volume.channels,
                "size": volume.size,
                "active_voxels": len(coordinates),
                "neighbors": rulebook.num_pairs / max(len(coordinates), 1),
                "dtype": str(dtype).removeprefix("torch."),
                "milliseconds": 1e3 * seconds[label],
                "memory_mib": bench.peak_memory_mib(run),
            }
            for label, run in cases.items()
        ]
    return rows


def _fastest_layout(volume: Tensor) -> torch.memory_format:
    """The layout in which conv3d is faster: channels last, on a CPU (by a quarter) and for half precision on a GPU."""
    half = volume.dtype in (torch.float16, torch.bfloat16)
    return torch.channels_last_3d if not volume.is_cuda or half else torch.contiguous_format


def benchmark(device: str) -> list[Row]:
    """All rows: float32 on two threads of a CPU, bfloat16 on a GPU."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    volumes = CPU_VOLUMES if device == "cpu" else CUDA_VOLUMES
    rows = []
    with bench.threads():
        for volume in volumes:
            for masked in MASKED:
                if masked or volume == volumes[0]:  # with nothing masked out all patterns are one
                    rows += compare(volume, masked, device, dtype)
        for channels in CHANNELS:
            first = volumes[0]
            rows += compare(Volume(first.batch, channels, first.size, first.block), 0.75, device, dtype)
    return rows


def speedups(rows: Sequence[Row], implementation: str, name: str, pattern: str, channels: int) -> dict[float, float]:
    """How many times as fast as the dense convolution, by masked share."""
    chosen = [row for row in rows if (row["pass"], row["channels"]) == (name, channels)]
    chosen = [row for row in chosen if row["pattern"] == pattern or not row["masked"]]
    times = {(row["implementation"], row["masked"]): row["milliseconds"] for row in chosen}
    shares = sorted({row["masked"] for row in chosen})
    return {masked: times[DENSE, masked] / times[implementation, masked] for masked in shares}


def crossover(by_share: Mapping[float, float]) -> float | None:
    """The masked share from which on the speed-up is above 1, between two measured ones by interpolation."""
    shares = sorted(by_share)
    slower = [masked for masked in shares if by_share[masked] <= 1]
    if not slower:
        return shares[0]
    if slower[-1] == shares[-1]:
        return None
    before, after = slower[-1], shares[shares.index(slower[-1]) + 1]
    return before + (after - before) * (1 - by_share[before]) / (by_share[after] - by_share[before])


def summary(rows: Sequence[Row]) -> list[Row]:
    """Speed-ups and crossover of every series of masked shares."""
    series = dict.fromkeys((row["implementation"], row["pass"], row["pattern"], row["channels"]) for row in rows)
    found = []
    for implementation, name, pattern, channels in series:
        if implementation != DENSE:
            by_share = speedups(rows, implementation, name, pattern, channels)
            found.append(
                {
                    "implementation": implementation,
                    "pass": name,
                    "pattern": pattern,
                    "channels": channels,
                    "times_as_fast_as_dense": by_share,
                    "crossover": crossover(by_share) if len(by_share) > 1 else None,
                }
            )
    return found


def draw(rows: Sequence[Row], about: Mapping[str, Any]) -> Figure:
    """Time above, memory below, over the masked share; a column a pattern and pass."""
    from matplotlib import pyplot

    counts = [row["channels"] for row in rows]
    rows = [row for row in rows if row["channels"] == max(set(counts), key=counts.count)]
    columns = list(dict.fromkeys((row["pattern"], row["pass"]) for row in rows))
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    figure, axes = pyplot.subplots(
        2, len(columns), figsize=(4 * len(columns), 7), sharey="row", squeeze=False, layout="constrained"
    )
    for column, (pattern, name) in enumerate(columns):
        for axis, value in zip(axes[:, column], ("milliseconds", "memory_mib"), strict=True):
            for index, implementation in enumerate(names):
                key = (pattern, name, implementation)
                mine = [row for row in rows if (row["pattern"], row["pass"], row["implementation"]) == key]
                points = [(100 * row["masked"], row[value]) for row in mine if row[value] is not None]
                axis.plot(*zip(*points, strict=True), "o-", markersize=3, color=f"C{index}", label=implementation)
            axis.set_yscale("log")
            axis.grid(alpha=0.3)
            axis.set_xlabel("masked out [%]")
        axes[0, column].set_title(f"{pattern}, {name}", fontsize=10)
    axes[0, 0].set_ylabel("time [ms]")
    axes[1, 0].set_ylabel("peak memory beyond the inputs [MiB]")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    first = rows[0]
    figure.suptitle(
        f"submanifold_conv 3³, {first['batch']} x {first['channels']} channels x {first['size']}³, {first['dtype']}: "
        f"{about['device']}, {about['threads']} threads, load {about['load']}, torch {about['versions']['torch']}",
        fontsize=9,
    )
    return figure


def write(device: str, rows: Sequence[Row]) -> Path:
    """Write rows, summary and figure to `results/`, whole or not at all; the path of the numbers."""
    from matplotlib import pyplot

    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    about = bench.machine(device)
    figure = draw(rows, about)
    figure.savefig(folder / f".{device}.part.png", dpi=130)
    pyplot.close(figure)
    result = {"machine": about, "summary": summary(rows), "rows": list(rows)}
    (folder / f".{device}.part.json").write_text(json.dumps(result, indent=1) + "\n")
    for ending in ("png", "json"):
        os.replace(folder / f".{device}.part.{ending}", folder / f"{device}.{ending}")
    return folder / f"{device}.json"


def table(rows: Sequence[Row]) -> str:
    """A line a series: times as fast as the dense convolution by masked share, and the crossover."""
    lines = []
    for row in summary(rows):
        shares = "  ".join(f"{100 * masked:.0f} %: {x:5.2f} x" for masked, x in row["times_as_fast_as_dense"].items())
        start = "" if row["crossover"] is None else f"  faster from {100 * row['crossover']:.0f} % on"
        head = f"{row['pattern']:16} {row['channels']:4} {row['pass']:17} {row['implementation']:36}"
        lines.append(f"{head} {shares}{start}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m kernels.submanifold_conv.bench", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    device = parser.parse_args(arguments).device
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device was found; on this machine: --device cpu")
    rows = benchmark(device)
    print(table(rows))
    print(f"written: {write(device, rows)}", file=sys.stderr)


if __name__ == "__main__":
    main()
