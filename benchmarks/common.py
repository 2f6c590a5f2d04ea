"""What the benchmarks share: measuring in turns, naming the machine, writing tables and figures."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from shared.evaluation.scores import device_name
from shared.files import atomic_path, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
Key = TypeVar("Key")
Measurement = TypeVar("Measurement")


def take_turns(cases: Mapping[Key, Callable[[], Measurement]], repeats: int) -> dict[Key, list[Measurement]]:
    """Measure every case `repeats` times, in turns and in an order that alternates.

    Whatever else the machine does then meets all cases alike, and the measurements of one turn can be compared.
    """
    measured: dict[Key, list[Measurement]] = {name: [] for name in cases}
    for turn in range(repeats):
        for name in list(cases)[:: 1 if turn % 2 == 0 else -1]:
            measured[name].append(cases[name]())
    return measured


def machine() -> str:
    """The device, and how many processes wanted to run on it over the last minute: high load, doubtful times."""
    return f"{device_name()}, load {os.getloadavg()[0]:.1f}"


def write_table(name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows with equal keys to results/<name>.csv."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(RESULTS / f"{name}.csv", text.getvalue())


def save_figure(name: str, figure: Figure) -> None:
    """Write a figure to results/<name>.png."""
    with atomic_path(RESULTS / f"{name}.png") as path:
        figure.savefig(path, dpi=150)
