"""What tracking costs a training loop: `python benchmarks/tracking.py` writes results/tracking.csv and tracking.png.

One small network is trained, about a millisecond a step: without logging, with loss and learning rate logged to
`shared.tracking` at every step, and with one synchronous `mlflow.log_metrics` a step instead. Blocks of a hundred
steps take turns, so that whatever else the machine does meets all ways, and differences are taken within a turn.
The process that delivers to SQLite runs all along, at low priority; its processor time is printed beside.
"""

from __future__ import annotations

import argparse
import csv
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from shared.files import atomic_path
from shared.tracking import deliver, start_run

RESULTS = Path(__file__).parent / "results"
# After another way's turn the caches hold that one's data.
WARM_UP_STEPS = 20
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
    begin = cpu_begin = 0.0
    for step in range(-WARM_UP_STEPS, num_steps):
        if step == 0:
            begin, cpu_begin = time.perf_counter(), time.process_time()
        loss = torch.nn.functional.mse_loss(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        # Every way pays for reading the loss, as every loop that shows it does.
        value = loss.item()
        if step >= 0:
            log(value, step)
    return time.perf_counter() - begin, time.process_time() - cpu_begin


def measure(num_turns: int, num_steps: int) -> list[dict[str, str | int | float]]:
    """Train in turns in every way; the rows of the results."""
    import mlflow

    mlflow.set_experiment("synchronous")
    rows = []
    with deliver(), start_run("benchmark", "tracked", system_metrics=True) as run, mlflow.start_run():
        logs: dict[str, Callable[[float, int], None]] = {
            "off": lambda loss, step: None,
            "shared.tracking": lambda loss, step: run.log({"train/loss": loss, "train/learning_rate": 1e-3}, step),
            "mlflow.log_metrics": lambda loss, step: mlflow.log_metrics(
                {"train/loss": loss, "train/learning_rate": 1e-3}, step
            ),
        }
        for turn in range(num_turns):
            for way, log in logs.items():
                seconds, cpu_seconds = train(num_steps, log)
                rows.append(
                    {
                        "way": way,
                        "turn": turn,
                        "steps": num_steps,
                        "milliseconds_per_step": round(1000 * seconds / num_steps, 4),
                        "cpu_milliseconds_per_step": round(1000 * cpu_seconds / num_steps, 4),
                    }
                )
    return rows


def times(rows: list[dict], way: str, column: str = "milliseconds_per_step") -> list[float]:
    """The measured times of a step in one way, in milliseconds, a turn after the other."""
    return [row[column] for row in rows if row["way"] == way]


def overhead(rows: list[dict], way: str, column: str = "milliseconds_per_step") -> float:
    """What a way adds to the time of a step, as a fraction: the median over turns."""
    without = times(rows, "off", column)
    return statistics.median(
        (with_it - without_it) / without_it
        for with_it, without_it in zip(times(rows, way, column), without, strict=True)
    )


def draw(rows: list[dict], path: Path) -> None:
    """Bars of the median time of a step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 2.5), layout="constrained")
    for position, way in enumerate(WAYS):
        median = statistics.median(times(rows, way))
        note = "" if way == "off" else f" ({overhead(rows, way):+.1%})"
        axes.barh(position, median, color="tab:gray" if way == "off" else "tab:blue", alpha=0.6)
        axes.text(median, position, f" {median:.2f} ms{note}", va="center")
    axes.set_yticks(range(len(WAYS)), WAYS.values())
    axes.set_xlabel("time of a training step (ms), median over turns")
    axes.set_xlim(right=1.4 * statistics.median(times(rows, "mlflow.log_metrics")))
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)


def main() -> None:
    """Measure, write the table and the figure, and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--steps", type=int, default=100, help="steps in a turn")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {
            "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
            "REPRISE_SPOOL": f"{folder}/spool",
            "REPRISE_TRACKING": "on",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        rows = measure(options.turns, options.steps)
    with atomic_path(RESULTS / "tracking.csv") as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, RESULTS / "tracking.png")
    for way in WAYS:
        columns = ("milliseconds_per_step", "cpu_milliseconds_per_step")
        print(f"{way:20}" + ", ".join(f"{statistics.median(times(rows, way, column)):.3f} {column} "
              f"({overhead(rows, way, column):+.2%})" for column in columns))  # fmt: skip
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"delivering process: {usage.ru_utime + usage.ru_stime:.1f} s of processor time, start included")


if __name__ == "__main__":
    main()
