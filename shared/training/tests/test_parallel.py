from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from shared.config import UserError
from shared.training import Job, parallel, run_jobs


def square(number: int, report: Callable[[float, str], None]) -> tuple[int, int]:
    for part in range(3):
        report(part / 3, f"part {part}")
    return number**2, torch.get_num_threads()


def refuse(report: Callable[[float, str], None]) -> None:
    raise UserError("width must be positive")


def break_down(report: Callable[[float, str], None]) -> None:
    raise ZeroDivisionError("a defect")


def die(report: Callable[[float, str], None]) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def sleep_and_tell(path: Path, report: Callable[[float, str], None]) -> None:
    path.write_text(str(os.getpid()))
    time.sleep(60)


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_the_order_of_the_jobs(workers: int) -> None:
    jobs = [Job(f"seed {number}", square, (number,)) for number in range(5)]
    assert run_jobs(jobs, workers=workers) == [(number**2, 1) for number in range(5)]


def test_the_number_of_threads_is_kept() -> None:
    assert [threads for _, threads in run_jobs([Job("a", square, (1,)), Job("b", square, (2,))], threads=2)] == [2, 2]
    torch.set_num_threads(1)


def test_a_mistake_names_its_job() -> None:
    with pytest.raises(UserError, match="seed 1: width must be positive"):
        run_jobs([Job("seed 0", square, (2,)), Job("seed 1", refuse)], workers=2)


def test_a_defect_comes_with_its_traceback() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)seed 1 failed.*break_down.*ZeroDivisionError: a defect"):
        run_jobs([Job("seed 0", square, (2,)), Job("seed 1", break_down)], workers=2)


def test_a_killed_process_is_reported_and_the_others_are_stopped(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="process of 'seed 1' died"):
        run_jobs([Job("seed 0", sleep_and_tell, (tmp_path / "pid",)), Job("seed 1", die)], workers=2)
    pid = tmp_path / "pid"
    assert not pid.exists() or not psutil.pid_exists(int(pid.read_text()))


def test_processes_stopped_while_they_start_say_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    first = tmp_path / "first"

    def slow_but_for_one() -> None:
        try:
            first.touch(exist_ok=False)
        except FileExistsError:
            time.sleep(30)

    monkeypatch.setattr(parallel, "_die_with_parent", slow_but_for_one)
    with pytest.raises(UserError, match="width must be positive"):
        run_jobs([Job(f"seed {number}", refuse) for number in range(4)], workers=4)
    assert "Traceback" not in capfd.readouterr().err
