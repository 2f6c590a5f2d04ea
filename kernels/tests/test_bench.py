"""The benchmarks run, at sizes that take no time; what they measure is not asserted."""

from __future__ import annotations

import importlib
import json
import time
from pathlib import Path

import pytest
import torch

from kernels import bench
from kernels.bench import ATTENTION, KEYS, MAIN, OPERATORS, Peaks, Shape


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_operator_has_a_benchmark(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(f"kernels.{operator}.bench")
    shapes = tuple(Shape(1, length, 2, 32) for length in (4, 8))
    monkeypatch.setattr(module, "CPU_SHAPES", shapes)
    if hasattr(module, "CPU_HEAD_DIMS"):
        monkeypatch.setattr(module, "CPU_HEAD_DIMS", (Shape(1, 4, 2, 32), Shape(1, 4, 2, 64)))
    if hasattr(module, "_library"):
        # The same with and without flash-linear-attention.
        monkeypatch.setattr(module, "_library", lambda device: None)
    monkeypatch.setattr(bench, "DECODED", (2, 4))
    monkeypatch.setattr(bench, "SHORTEST_SECONDS", 0.0)
    monkeypatch.setattr(bench, "measure_peaks", lambda device, dtype: Peaks(1e11, 1e10))
    threads = torch.get_num_threads()
    rows = module.benchmark("cpu")
    assert torch.get_num_threads() == threads
    assert all(set(KEYS) <= set(row) for row in rows)
    assert {row["operator"] for row in rows} == {operator}
    compared = [row for row in rows if "study" not in row and row["pass"] != "decode"]
    assert {row["pass"] for row in compared} == {"forward", "forward+backward"}
    assert {row["length"] for row in compared} == {4, 8}
    assert len({row["implementation"] for row in compared}) >= 2
    assert all(row["milliseconds"] > 0 < row["floor_milliseconds"] for row in rows)
    assert MAIN in bench.table(rows)


def test_cases_take_turns() -> None:
    calls: list[str] = []
    cases = {name: lambda name=name: (calls.append(name), time.sleep(0.02)) for name in ("a", "b")}
    taken = list(bench.rounds(cases, 3))
    assert [set(of_round) for of_round in taken] == [{"a", "b"}] * 3
    assert calls == [*"aabb", *"ab", *"ba", *"ab"]
    assert all(of_round["a"] >= 0.02 for of_round in taken)


def test_the_floor_is_the_slower_of_arithmetic_and_traffic() -> None:
    peaks = Peaks(flops=1e9, bandwidth=1e8)
    assert peaks.floor(1e6, 1e4) == (1.0, "compute")
    assert peaks.floor(1e6, 2e5) == (2.0, "bandwidth")


def test_what_causal_attention_computes() -> None:
    """Two products over half of T² scores, each of D multiplications and as many additions."""
    assert bench.attention_work(Shape(1, 100, 2, 8), "forward")[0] == 2 * 2 * 100**2 / 2 * 8 * 2


def test_gradients_are_asked_for_all_inputs() -> None:
    x, y = torch.tensor(2.0), torch.tensor(3.0)
    first, second = bench.forward_backward(lambda x, y: (x * y, None), x, y)()
    torch.testing.assert_close(first / second, y / x)
    assert not x.requires_grad


def test_peak_memory_sees_what_is_allocated_and_freed() -> None:
    if not Path("/proc/self/clear_refs").exists():
        assert bench.peak_memory_mib(lambda: None) is None
        return
    large = bench.peak_memory_mib(lambda: torch.ones(2**24).add(1).sum())
    small = bench.peak_memory_mib(lambda: torch.ones(2**10).sum())
    assert large > 100
    assert small < 20


def test_rows_are_written_with_the_machine_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "bench.py"))
    (tmp_path / "op").mkdir()
    values = {"operator": "op", "batch": 1, "heads": 1, "key_dim": 8, "value_dim": 8, "dtype": "float32"}
    rows = [
        dict.fromkeys(KEYS) | values | {"implementation": name, "pass": "forward", "length": length, "milliseconds": 1}
        for name in (MAIN, ATTENTION)
        for length in (1, 2)
    ]
    path = bench.write("op", "cpu", rows)
    written = json.loads(path.read_text())
    assert written["rows"] == rows
    assert written["machine"]["threads"] == bench.THREADS
    assert {file.name for file in path.parent.iterdir()} == {"cpu.json", "cpu.png"}


def test_unknown_operators_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["delta", "--device", "cpu"])
    assert "no operator delta; there are: linear_attention, delta_rule" in capsys.readouterr().err
