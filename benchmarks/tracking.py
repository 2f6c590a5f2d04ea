"""What tracking costs a training loop: `python benchmarks/tracking.py` writes results/tracking.csv and tracking.png.

One small network is trained, about a millisecond a step: without tracking, with tracking (loss and learning rate
logged at every step, system metrics, delivery to SQLite beside it), and with one synchronous `mlflow.log_metrics` a
step instead. The ways take turns, and the best of each counts, since whatever else the machine does only adds. Beside
the wall time of a step stands the processor time of the training process, which other processes disturb less.
The time that a stage waits at its end until everything is in the store is measured apart (`wait_seconds`).
"""

from __future__ import annotations

import argparse
import csv
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from shared.files import atomic_path
from shared.tracking import deliver, start_run

RESULTS = Path(__file__).parent / "results"
WAYS = {
    "off": "no tracking",
    "shared.tracking": "shared.tracking,\nevery step",
    "mlflow.log_metrics": "mlflow.log_metrics,\nevery step",
}


def train(num_steps: int, log: Callable[[float, int], None]) -> tuple[float, float]:
    """Train a small network and return the seconds that it took and those that this process computed."""
    torch.manual_seed(0)
    width, batch_size = 160, 160
    model = torch.nn.Sequential(
        torch.nn.Linear(32, width), torch.nn.GELU(), torch.nn.Linear(width, width), torch.nn.GELU(),
        torch.nn.Linear(width, 1),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters())
    inputs = torch.randn(batch_size, 32)
    targets = inputs.sin().sum(1, keepdim=True)
    begin, cpu_begin = time.perf_counter(), time.process_time()
    for step in range(num_steps):
        loss = torch.nn.functional.mse_loss(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        # Every way pays for reading the loss, as every loop that shows it does.
        log(loss.item(), step)
    return time.perf_counter() - begin, time.process_time() - cpu_begin


def measure(way: str, num_steps: int) -> dict[str, str | int | float]:
    """Train once in one way; a row of the results."""
    metrics = {"train/learning_rate": 1e-3}
    if way == "off":
        seconds, cpu_seconds = train(num_steps, lambda loss, step: None)
        end = time.perf_counter()
    elif way == "shared.tracking":
        with deliver(), start_run("benchmark", "tracked", system_metrics=True) as run:
            seconds, cpu_seconds = train(num_steps, lambda loss, step: run.log(metrics | {"train/loss": loss}, step))
            end = time.perf_counter()
    else:
        import mlflow

        mlflow.set_experiment("synchronous")
        with mlflow.start_run():
            seconds, cpu_seconds = train(
                num_steps, lambda loss, step: mlflow.log_metrics(metrics | {"train/loss": loss}, step)
            )
            end = time.perf_counter()
    return {
        "way": way,
        "steps": num_steps,
        "milliseconds_per_step": round(1000 * seconds / num_steps, 4),
        "cpu_milliseconds_per_step": round(1000 * cpu_seconds / num_steps, 4),
        "wait_seconds": round(time.perf_counter() - end, 3),
    }


def draw(rows: list[dict], path: Path) -> None:
    """Bars of the best time of a step, with every measurement as a dot."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
    best = {way: min(times(rows, way)) for way in WAYS}
    for position, way in enumerate(WAYS):
        axes.barh(position, best[way], color="tab:gray" if way == "off" else "tab:blue", alpha=0.6)
        axes.plot(times(rows, way), [position] * len(times(rows, way)), "k.", markersize=4)
        overhead = best[way] / best["off"] - 1
        note = "" if way == "off" else f" ({overhead:+.1%})"
        axes.text(max(times(rows, way)), position, f"  {best[way]:.2f} ms{note}", va="center")
    axes.set_yticks(range(len(WAYS)), WAYS.values())
    axes.set_xlabel("time of a training step (ms)")
    axes.set_xlim(right=1.45 * max(max(times(rows, way)) for way in WAYS))
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)


def times(rows: list[dict], way: str, column: str = "milliseconds_per_step") -> list[float]:
    """The measured times of a step in one way, in milliseconds."""
    return [row[column] for row in rows if row["way"] == way]


def summary(rows: list[dict], way: str, column: str) -> str:
    """The best of one way, and what it is over that without tracking."""
    best, without = (min(times(rows, each, column)) for each in (way, "off"))
    return f"{best:.3f} {column.replace('_', ' ')} ({best / without - 1:+.1%})"


def main() -> None:
    """Measure, write the table and the figure, and print the best times."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--synchronous-steps", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {
            "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
            "REPRISE_SPOOL": f"{folder}/spool",
            "REPRISE_TRACKING": "on",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        # Makes the store's tables and warms up.
        measure("shared.tracking", 100)
        rows = [
            measure(way, options.synchronous_steps if way == "mlflow.log_metrics" else options.steps)
            for _ in range(options.repeats)
            for way in WAYS
        ]
    with atomic_path(RESULTS / "tracking.csv") as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, RESULTS / "tracking.png")
    for way in WAYS:
        print(f"{way:20}" + ", ".join(summary(rows, way, column) for column in rows[0] if "milliseconds" in column))


if __name__ == "__main__":
    main()
