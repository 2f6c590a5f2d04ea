"""What the training loop costs, and what it costs to be killed: `python benchmarks/training.py`, about two minutes.

`shared.training.fit`, with a checkpoint an epoch and without validation, against a bare PyTorch loop that takes the
same steps on data of the same shape: the small profile's advection experiment, half of each rollout on the network's
own output, as in the middle of the curriculum. Both are timed from their first step over whole epochs, checkpoints
included, and take turns on one CPU thread. Beside wall time stands processor time, which other processes disturb less.
Writes results/training.csv and .png.

A training that was killed is started again: the time to its next step, against that to the first step of a new one,
and size and time of a checkpoint as the model grows. Writes results/resume.csv and .png.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# Before torch is loaded: threads that compete would be all that is measured.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from common import machine, save_figure, take_turns, write_table
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from papers.cape.baselines import build_model, num_weights
from papers.cape.config import Params
from papers.cape.losses import rollout_loss
from shared.config import load_params
from shared.training import Moment, TrainingSettings, fit, make_fabric
from shared.training.checkpoint import load_tensors, save_tensors
from shared.training.loop import Loss

ROOT = Path(__file__).parents[1]
MODELS = {"fno": "FNO", "unet": "U-Net", "fno_cape": "FNO + CAPE"}
LOOPS = {"bare": "bare PyTorch", "fit": "shared.training.fit"}
EPOCHS = 2
SIZES = (10_000, 100_000, 1_000_000, 10_000_000)
GOAL = 0.03
BELOW: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2), "fontsize": 8, "frameon": False}

Problem = tuple[nn.Module, TensorDataset, Loss, TrainingSettings]


class Enough(Exception):
    """Ends a training whose remainder is of no interest."""


class Watch:
    """A loss that starts the clocks when it is first called, and stops them, and the training, at a later step."""

    def __init__(self, loss: Loss, stop_at: int | None = None) -> None:
        self.loss, self.stop_at = loss, stop_at
        self.first_step: int | None = None
        self.started, self.seconds, self.cpu_seconds = 0.0, 0.0, 0.0

    def __call__(self, model: nn.Module, batch: tuple[Tensor, ...], moment: Moment) -> Mapping[str, Tensor]:
        if self.first_step is None:
            self.first_step = moment.step
            self.started, self._cpu_started = time.perf_counter(), time.process_time()
        if moment.step == self.stop_at:
            self.seconds = time.perf_counter() - self.started
            self.cpu_seconds = time.process_time() - self._cpu_started
            raise Enough
        return self.loss(model, batch, moment)


# --- time and memory of a step ----------------------------------------------------------------------------------------


def paper_problem(name: str) -> Problem:
    """A network of CAPE's small profile, with data, loss and settings of its advection experiment."""
    _, params = load_params(ROOT / "papers" / "cape" / "params.yaml", Params, "small")
    equation, experiment = params.equations["advection"], params.experiments["advection"]
    torch.manual_seed(0)
    num_samples = equation.num_train * len(equation.train_parameters)
    frames = torch.randn(num_samples, equation.num_frames, 1, equation.num_points)
    model = build_model(name, experiment.network, channels=1, num_parameters=1, grid_shape=(equation.num_points,))

    def loss(model: nn.Module, batch: tuple[Tensor, ...], moment: Moment) -> Mapping[str, Tensor]:
        steps = (equation.num_frames - 1) // 2
        return rollout_loss(
            model, *batch, autoregressive_steps=steps, guess_weight=experiment.guess_weight, noise=experiment.noise
        )

    return model, TensorDataset(frames, torch.rand(num_samples, 1)), loss, experiment.training


def train_bare(model: nn.Module, data: TensorDataset, loss: Loss, settings: TrainingSettings) -> None:
    """The loop that one would write by hand."""
    optimizer = torch.optim.Adam(
        model.parameters(), settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay
    )
    model.train()
    for epoch in range(settings.epochs):
        chunks = torch.randperm(len(data)).split(settings.batch_size)
        total = 0.0
        for index, chunk in enumerate(chunks):
            moment = Moment(epoch, epoch * len(chunks) + index, settings.epochs, len(chunks))
            terms = loss(model, tuple(tensor[chunk] for tensor in data.tensors), moment)
            optimizer.zero_grad()
            terms["loss"].backward()
            optimizer.step()
            total += terms["loss"].item()


def train_fit(model: nn.Module, data: TensorDataset, loss: Loss, settings: TrainingSettings, directory: Path) -> None:
    """The loop of the house."""
    fit(model, data, loss, settings, directory=directory, seed=0, fabric=make_fabric(settings, accelerator="cpu"))


def time_steps(name: str, loop: str) -> dict[str, float]:
    """Milliseconds a step over whole epochs, of the clock and of the processor."""
    model, data, loss, settings = paper_problem(name)
    num_steps = EPOCHS * -(-len(data) // settings.batch_size)
    watch = Watch(loss, stop_at=num_steps)
    with contextlib.suppress(Enough), tempfile.TemporaryDirectory() as folder:
        if loop == "bare":
            train_bare(model, data, watch, settings)
        else:
            train_fit(model, data, watch, settings, Path(folder))
    return {
        "milliseconds_per_step": 1000 * watch.seconds / num_steps,
        "cpu_milliseconds_per_step": 1000 * watch.cpu_seconds / num_steps,
    }


def peak_memory(name: str, loop: str) -> float:
    """The most memory in MiB that a fresh process holds while it trains."""
    return in_fresh_process(_send_peak_memory, name, loop)


def _send_peak_memory(sender: Connection, name: str, loop: str) -> None:
    time_steps(name, loop)
    # Not ru_maxrss, in which a process starts with the peak of the one that it was spawned from.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    sender.send(int(status["VmHWM"].split()[0]) / 1024)


def in_fresh_process(target: Callable[..., None], *arguments: Any) -> Any:
    """Call `target(sender, *arguments)` in a process that shares nothing with this one; returns what it sends."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(sender, *arguments))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise SystemExit(f"{target.__name__}{arguments} ended without a result") from None
    finally:
        process.join()


def measure_steps(repeats: int) -> list[dict[str, Any]]:
    """A row a model, loop and turn."""
    cases = [(name, loop) for name in MODELS for loop in LOOPS]
    for case in cases:
        # Unmeasured, to fill caches and pools.
        time_steps(*case)
    times = take_turns({case: lambda case=case: time_steps(*case) for case in cases}, repeats)
    memory = {case: peak_memory(*case) for case in cases}
    return [
        {"model": MODELS[name], "loop": loop, "turn": turn}
        | {quantity: round(value, 3) for quantity, value in measured.items()}
        | {"peak_mebibytes": round(memory[name, loop], 1)}
        for name, loop in cases
        for turn, measured in enumerate(times[name, loop])
    ]


def overheads(rows: list[dict[str, Any]], model: str, quantity: str) -> list[float]:
    """What the loop of the house adds to the bare one, turn by turn, as a fraction."""
    bare, ours = ([row[quantity] for row in rows if row["model"] == model and row["loop"] == loop] for loop in LOOPS)
    return [mine / other - 1 for mine, other in zip(ours, bare, strict=True)]


# --- restarts ---------------------------------------------------------------------------------------------------------


def grown_problem(num_parameters: int) -> Problem:
    """A model of about so many parameters whose steps cost next to nothing."""
    width = round(num_parameters**0.5)
    torch.manual_seed(0)
    settings = TrainingSettings(epochs=2, batch_size=2, learning_rate=1e-3)
    data = TensorDataset(torch.randn(4, width))
    return (
        nn.Linear(width, width, bias=False),
        data,
        lambda model, batch, _: {"loss": model(*batch).abs().mean()},
        settings,
    )


def time_restart(num_parameters: int, folder: Path) -> dict[str, float]:
    """Train, stop in the second epoch, start again: the seconds before the first step of each, and of a checkpoint."""

    def seconds_before_first_step(stop_at: int, expected: int) -> float:
        model, data, loss, settings = grown_problem(num_parameters)
        watch = Watch(loss, stop_at)
        started = time.perf_counter()
        with contextlib.suppress(Enough):
            train_fit(model, data, watch, settings, directory)
        assert watch.first_step == expected, f"started at step {watch.first_step}, not at step {expected}"
        return watch.started - started

    with tempfile.TemporaryDirectory(dir=folder) as name:
        directory = Path(name)
        checkpoint = directory / "last.safetensors"
        fresh = seconds_before_first_step(stop_at=2, expected=0)
        restart = seconds_before_first_step(stop_at=2, expected=2)
        content = load_tensors(checkpoint)
        started = time.perf_counter()
        save_tensors(checkpoint, *content)
        return {
            "fresh_seconds": fresh,
            "restart_seconds": restart,
            "write_seconds": time.perf_counter() - started,
            "checkpoint_mebibytes": checkpoint.stat().st_size / 2**20,
        }


def time_killed_process(folder: Path) -> dict[str, float]:
    """The same with processes and SIGKILL, FNO + CAPE of the small profile: from the start of a process to its step."""
    with tempfile.TemporaryDirectory(dir=folder) as directory:
        started = time.monotonic()
        fresh, first = in_fresh_process(_train_until, directory, True)
        fresh -= started
        started = time.monotonic()
        restart, continued = in_fresh_process(_train_until, directory, False)
    assert first == 0 < continued, f"the restart began at step {continued}"
    return {"fresh_seconds": fresh, "restart_seconds": restart - started}


def _train_until(sender: Connection, directory: str, die: bool) -> None:
    """Send the moment of the first step and its number; then die in the second epoch, or stop at once."""
    torch.set_num_threads(1)
    model, data, loss, settings = paper_problem("fno_cape")
    sent = False

    def watched(model: nn.Module, batch: tuple[Tensor, ...], moment: Moment) -> Mapping[str, Tensor]:
        nonlocal sent
        if not sent:
            # The monotonic clock is the same in all processes.
            sender.send((time.monotonic(), moment.step))
            sent = True
            if not die:
                raise Enough
        if moment.step == moment.steps_per_epoch + 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss(model, batch, moment)

    with contextlib.suppress(Enough):
        train_fit(model, data, watched, settings, Path(directory))


def measure_restarts(repeats: int) -> list[dict[str, Any]]:
    """A row a model: medians over the turns, and beside each its least and greatest value."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        time_restart(SIZES[0], folder)
        grown = take_turns({size: lambda size=size: time_restart(size, folder) for size in SIZES}, repeats)
        killed = [time_killed_process(folder) for _ in range(max(1, repeats // 2))]
    rows = [_summary("in a process", num_weights(grown_problem(size)[0]), measured) for size, measured in grown.items()]
    process = _summary("process, SIGKILL", num_weights(paper_problem("fno_cape")[0]), killed)
    return [*rows, {column: process.get(column, "") for column in rows[0]}]


def _summary(kind: str, num_parameters: int, turns: list[dict[str, float]]) -> dict[str, Any]:
    row: dict[str, Any] = {"restart": kind, "parameters": num_parameters, "turns": len(turns)}
    for quantity in turns[0]:
        values = [turn[quantity] for turn in turns]
        row[quantity] = f"{statistics.median(values):.4g}"
        if quantity.endswith("seconds"):
            row[f"{quantity}_range"] = f"{min(values):.4g}–{max(values):.4g}"
    return row


# --- figures ----------------------------------------------------------------------------------------------------------


def draw_steps(rows: list[dict[str, Any]], where: str) -> None:
    """What the loop adds to the time of a step, turn by turn, and the peak memory of both loops."""
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for shift, (quantity, label) in enumerate(
        {"milliseconds_per_step": "wall time", "cpu_milliseconds_per_step": "processor time"}.items()
    ):
        for position, model in enumerate(MODELS.values()):
            values = [100 * value for value in overheads(rows, model, quantity)]
            height = position + 0.3 * (shift - 0.5)
            left.plot(values, [height] * len(values), ".", color=f"C{shift}", alpha=0.6)
            median = statistics.median(values)
            left.plot(median, height, "|", color=f"C{shift}", markersize=16, markeredgewidth=2, label=label)
            left.annotate(f"{median:+.1f} %", (median, height), xytext=(0, 9), textcoords="offset points", ha="center")
            label = "_"
    left.axvline(100 * GOAL, color="k", linestyle="--", linewidth=1, label=f"goal: {100 * GOAL:.0f} %")
    left.axvline(0, color="0.7", linewidth=1)
    left.set_yticks(range(len(MODELS)), MODELS.values())
    left.set_xlabel("added to the time of a training step (%)")
    left.set_ylim(len(MODELS) - 0.5, -0.5)
    left.legend(**BELOW, ncols=3)
    for shift, (loop, label) in enumerate(LOOPS.items()):
        peaks = [
            next(r["peak_mebibytes"] for r in rows if (r["model"], r["loop"]) == (m, loop)) for m in MODELS.values()
        ]
        bars = right.barh([i + 0.35 * (shift - 0.5) for i in range(len(peaks))], peaks, 0.33, label=label)
        right.bar_label(bars, fmt="%.0f", padding=3)
    right.set_yticks(range(len(MODELS)), MODELS.values())
    right.set_xlabel("peak memory of the process (MiB)")
    right.margins(x=0.15)
    right.invert_yaxis()
    right.legend(**BELOW, ncols=2)
    figure.suptitle(f"{where}, one thread", fontsize=9)
    save_figure("training", figure)
    plt.close(figure)


def draw_restarts(rows: list[dict[str, Any]], where: str) -> None:
    """Seconds before a step, and of a checkpoint, over the size of the model."""
    from matplotlib import pyplot as plt

    grown, killed = rows[:-1], rows[-1]
    parameters = [row["parameters"] for row in grown]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    labels = {"fresh_seconds": "new run, to its first step", "restart_seconds": "restarted run, to its next step"}
    for color, (quantity, label) in enumerate(labels.items()):
        left.loglog(parameters, [float(row[quantity]) for row in grown], "o-", color=f"C{color}", label=label)
        left.loglog(killed["parameters"], float(killed[quantity]), "s", color=f"C{color}")
    left.annotate(
        "whole processes, SIGKILL between:\nimports count too",
        (killed["parameters"], float(killed["fresh_seconds"])),
        xytext=(14, -4),
        textcoords="offset points",
        fontsize=8,
        va="center",
    )
    left.set_ylabel("seconds")
    left.legend(**BELOW, ncols=2)
    right.loglog(parameters, [float(row["write_seconds"]) for row in grown], "o-", color="C2")
    for row in grown:
        size = f"{float(row['checkpoint_mebibytes']):.3g} MiB"
        place = (row["parameters"], float(row["write_seconds"]))
        right.annotate(size, place, xytext=(0, 7), textcoords="offset points", ha="center", fontsize=8)
    right.set_ylabel("seconds to write a checkpoint")
    for axis in (left, right):
        axis.set_xlabel("parameters of the model")
        axis.margins(x=0.12, y=0.2)
    figure.suptitle(f"{where}, one thread", fontsize=9)
    save_figure("resume", figure)
    plt.close(figure)


def main() -> None:
    """Measure, write tables and figures, and print the summary."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    where = machine()
    steps = measure_steps(repeats)
    write_table("training", steps)
    draw_steps(steps, where)
    restarts = measure_restarts(repeats)
    write_table("resume", restarts)
    draw_restarts(restarts, where)
    print(where)
    for model in MODELS.values():
        for quantity in ("milliseconds_per_step", "cpu_milliseconds_per_step"):
            values = overheads(steps, model, quantity)
            print(
                f"{model:12}{quantity:28}{statistics.median(values):+.1%}  ({min(values):+.1%} to {max(values):+.1%})"
            )
    for row in restarts:
        print(*row.values(), sep="  ")


if __name__ == "__main__":
    main()
