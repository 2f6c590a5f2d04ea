"""Independent runs (seeds, data sets) side by side in as many processes as there are cores, with progress bars."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import Any

from shared.config import UserError

Report = Callable[[float, str], None]
STOPS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Job:
    """A call `function(*arguments, report)` and the label that its progress bar carries."""

    label: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...] = field(default=())


def run_jobs(jobs: Sequence[Job], *, workers: int | None = None, threads: int = 1) -> list[Any]:
    """Run jobs in up to `workers` processes with `threads` torch threads each and return their results in order.

    Small models do not profit from threads, and threads that compete ruin them: hence processes. With one worker, or
    as one process of a distributed run, jobs run here, one after the other. The first job that fails stops the others
    and its error is raised; Ctrl-C stops them all.
    """
    workers = min(workers or os.cpu_count() or 1, len(jobs))
    with _Display([job.label for job in jobs]) as display:
        if workers <= 1 or int(os.environ.get("WORLD_SIZE", 1)) > 1:
            _limit_threads(threads)
            results = []
            for index, job in enumerate(jobs):
                results.append(_call(job, display.reporter(index)))
                display.update(index, 1.0, "")
            return results
        return _run_in_processes(jobs, workers, threads, display)


def _limit_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


def _run_in_processes(jobs: Sequence[Job], workers: int, threads: int, display: _Display) -> list[Any]:
    # Fork spares each job the seconds that importing torch takes; with CUDA in use, forking is not possible.
    torch = sys.modules.get("torch")
    forkable = hasattr(os, "fork") and not (torch is not None and torch.cuda.is_initialized())
    if torch is not None and forkable:
        # The first optimizer of a process imports it, which takes most of a second.
        import torch._dynamo
    context = multiprocessing.get_context("fork" if forkable else "spawn")
    messages = context.SimpleQueue()
    results: dict[int, Any] = {}
    running: dict[int, Any] = {}
    waiting = list(range(len(jobs)))
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                index = waiting.pop(0)
                process = context.Process(target=_work, args=(index, jobs[index], threads, messages), daemon=True)
                with _signals_held():
                    process.start()
                running[index] = process
            wait([messages._reader, *(process.sentinel for process in running.values())], timeout=1.0)
            while not messages.empty():
                index, kind, content = messages.get()
                if kind == "progress":
                    display.update(index, *content)
                elif kind == "result":
                    results[index] = content
                    display.update(index, 1.0, "")
                else:
                    raise content
            for index in [i for i, process in running.items() if not process.is_alive()]:
                process = running.pop(index)
                process.join()
                if index not in results and messages.empty():
                    raise UserError(
                        f"the process of {jobs[index].label!r} died (exit code {process.exitcode}): it was killed or "
                        "ran out of memory. Run the same command again; finished runs are kept, others continue"
                    )
                if index not in results:
                    running[index] = process
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.join(5)
            if process.is_alive():
                process.kill()
    return [results[index] for index in range(len(jobs))]


def _work(index: int, job: Job, threads: int, messages: Any) -> None:
    """Body of a worker process, which starts with `STOPS` held back."""
    last = 0.0

    def report(fraction: float, text: str) -> None:
        nonlocal last
        if time.monotonic() - last > 0.2:
            last = time.monotonic()
            messages.put((index, "progress", (fraction, text)))

    # Ctrl-C reaches the whole process group; the parent decides what happens then, and stops a worker in such a way
    # that it takes its unfinished files along. A stop that came while the process started is met here too, and one
    # that comes when all is said ends it without a word.
    with suppress(KeyboardInterrupt):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
        _die_with_parent()
        _limit_threads(threads)
        messages.put((index, *_outcome(job, report)))
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def _signals_held() -> Iterator[None]:
    """Hold `STOPS` back while a process starts, which inherits that: it lets them through once it can answer them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _outcome(job: Job, report: Report) -> tuple[str, Any]:
    """What a worker says at its end: a result or an error that can be sent to another process."""
    try:
        return "result", _call(job, report)
    except UserError as error:
        return "error", error
    except Exception as error:
        import traceback

        detail = "".join(traceback.format_exception(error))
        return "error", RuntimeError(f"{job.label} failed:\n{detail}")


def _call(job: Job, report: Report) -> Any:
    """Do a job; its mistakes, and a disk that takes no more, are `UserError`s that name it."""
    try:
        return job.function(*job.arguments, report)
    except UserError as error:
        raise type(error)(f"{job.label}: {error}") from None
    except OSError as error:
        raise UserError(
            f"{job.label}: {error}. Make room or mend the permissions, then run the same command again: finished runs "
            "are kept, others continue"
        ) from error


def _die_with_parent() -> None:
    """Have the kernel end this process when its parent is killed, lest two runs write the same checkpoints."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


class _Display:
    """Progress bars on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, labels: Sequence[str]) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self.labels = labels
        self.fractions = [0.0] * len(labels)
        self.console = Console(stderr=True)
        self.last_line = self.started = time.monotonic()
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.tasks = [self.progress.add_task(label, total=1.0, start=False, text="") for label in labels]

    def __enter__(self) -> _Display:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def reporter(self, index: int) -> Report:
        return lambda fraction, text: self.update(index, fraction, text)

    def update(self, index: int, fraction: float, text: str) -> None:
        self.fractions[index] = fraction
        if self.console.is_terminal:
            if not self.progress.tasks[index].started:
                self.progress.start_task(self.tasks[index])
            self.progress.update(self.tasks[index], completed=fraction, text=text)
        elif time.monotonic() - self.last_line > 10 or all(f >= 1.0 for f in self.fractions):
            self.last_line = time.monotonic()
            done = sum(self.fractions) / len(self.fractions)
            elapsed = self.last_line - self.started
            left = elapsed * (1 - done) / max(done, 1e-3)
            self.console.print(
                f"{100 * done:3.0f} %  {elapsed:.0f} s, about {left:.0f} s left  {self.labels[index]} {text}",
                highlight=False,
            )


__all__ = ["Job", "Report", "run_jobs"]
