"""The benchmark runs, at sizes that take no time; what it measures is not asserted."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest

from kernels.submanifold_conv import bench
from kernels.submanifold_conv.bench import DENSE, Volume


def test_rows_are_written_with_their_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "bench.py"))
    monkeypatch.setattr(bench, "CPU_VOLUMES", (Volume(1, 2, 4, 2), Volume(1, 2, 4, 1)))
    monkeypatch.setattr(bench, "CHANNELS", (3,))
    monkeypatch.setattr(bench, "MASKED", (0.0, 0.9))
    monkeypatch.setattr(bench.bench, "SHORTEST_SECONDS", 0.0)
    # Two threads would only wait for each other on a busy machine.
    monkeypatch.setattr(bench.bench, "threads", nullcontext)
    bench.main(["--device", "cpu"])
    written = json.loads((tmp_path / "results" / "cpu.json").read_text())
    assert len(written["rows"]) == (2 + 1 + 1) * 2 * 3
    assert {row["active_voxels"] for row in written["rows"]} == {64, 8, 6, 16}
    assert all(row["milliseconds"] > 0 for row in written["rows"])
    assert DENSE not in {row["implementation"] for row in written["summary"]}
    assert {file.name for file in (tmp_path / "results").iterdir()} == {"cpu.json", "cpu.png"}


def test_what_is_compared_computes_the_same() -> None:
    """The dense side reads the volume that the sparse side's features came from."""
    active = bench.mask(Volume(2, 3, 8, 4), 0.75)
    assert active.sum(dim=(1, 2, 3)).tolist() == [128, 128]
    assert active.view(2, 2, 4, 2, 4, 2, 4).float().mean(dim=(2, 4, 6)).unique().tolist() == [0, 1]


def test_where_sparse_becomes_faster() -> None:
    assert bench.crossover({0.0: 0.5, 0.5: 1.5, 0.9: 3.0}) == pytest.approx(0.25)
    assert bench.crossover({0.0: 2.0, 0.5: 3.0}) == 0.0
    assert bench.crossover({0.0: 0.2, 0.5: 0.3}) is None
