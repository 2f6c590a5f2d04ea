"""How long commands keep one waiting as papers become many: `python benchmarks/pipeline.py`, about two minutes.

In two throw-away repositories, one with the paper CAPE and one with 79 copies of it beside it, each with its own
pipeline, lock file and committed results: an up-to-date `dvc repro papers/cape` (DVC must say that it is), `reprise
verdict`, `reprise board` and `reprise doctor`. Data and weights are placeholders: of files that it knows, DVC looks at
size and time of change alone. And the import of shared.nn, beyond that of torch. Writes results/pipeline.csv and .png.
"""

from __future__ import annotations

import argparse
import functools
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from common import machine, save_figure, take_turns, write_table

from pipelines.scaffold import root_stage

ROOT = Path(__file__).parents[1]
# The tests, whose throw-away repository is of use here, are not installed.
sys.path.append(str(ROOT))
from tests.repository import Repository  # noqa: E402

COUNTS = (1, 80)
IMPORT = "import shared.nn, beyond torch"
COMMANDS = {
    "dvc repro papers/cape": ("dvc", "repro", "papers/cape"),
    "reprise verdict papers/cape": ("reprise", "verdict", "papers/cape"),
    "reprise board": ("reprise", "board"),
    "reprise doctor": ("reprise", "doctor"),
}
GOALS = {IMPORT: 0.3, "dvc repro papers/cape": 3.0, "reprise board": 5.0, "reprise doctor": 5.0}
UP_TO_DATE = "Data and pipelines are up to date."


def make_repository(folder: Path, count: int) -> Repository:
    """A repository with `count` papers, all of them CAPE, up to date for DVC."""
    repository = Repository(ROOT, folder)
    cape = repository.add("cape", profile="small")
    committed = ROOT / "papers" / "cape" / "results"
    if not (committed / "small" / "verdict.json").is_file():
        raise SystemExit(f"{committed / 'small'} is not there: run 'make papers/cape' first")
    shutil.copytree(committed, cape / "results")
    for output in pipeline_outputs(cape):
        output.mkdir(parents=True)
        for number in range(10):
            (output / f"part{number}.bin").write_bytes(bytes(number))
    repository.run("reprise", "verdict", "papers/cape")
    repository.run("dvc", "commit", "--force", "--recursive", "papers", "dvc.yaml")

    # What DVC has recorded of one paper is true of its copies.
    names = ["cape", *(f"copy{number:02}" for number in range(1, count))]
    for name in names[1:]:
        shutil.copytree(cape, cape.parent / name)
    lock = yaml.safe_load((folder / "dvc.lock").read_text())
    recorded = lock["stages"]["papers/cape"]
    lock["stages"] = {f"papers/{name}": recorded for name in names}
    (folder / "dvc.lock").write_text(yaml.safe_dump(lock))
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": {f"papers/{name}": root_stage(name) for name in names}}))
    assert UP_TO_DATE in repository.run("dvc", "repro", f"papers/{names[-1]}").stdout, "a copy is not up to date"
    return repository


def pipeline_outputs(folder: Path) -> list[Path]:
    """The git-ignored outputs of a paper's dvc.yaml."""
    outputs = []
    for stage in yaml.safe_load((folder / "dvc.yaml").read_text())["stages"].values():
        for output in stage.get("do", stage).get("outs", []):
            name = output if isinstance(output, str) else next(iter(output))
            outputs += [folder / name.replace("${item}", item) for item in stage.get("foreach", [""])]
    return [output for output in outputs if "results" not in output.parts]


def time_command(repository: Repository, command: tuple[str, ...]) -> float:
    """Seconds that a command takes, as its user waits for it."""
    started = time.perf_counter()
    output = repository.run(*command).stdout
    seconds = time.perf_counter() - started
    assert command[0] != "dvc" or UP_TO_DATE in output, f"DVC had work to do:\n{output}"
    return seconds


def time_import() -> float:
    """Seconds that `import shared.nn` takes in a fresh process that has imported torch."""
    program = (
        "import time, torch; started = time.perf_counter(); import shared.nn; print(time.perf_counter() - started)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return float(result.stdout)


def measure(repeats: int) -> list[dict[str, Any]]:
    """A row a case, number of papers and turn."""
    with tempfile.TemporaryDirectory() as name:
        cases: dict[tuple[str, int | str], Callable[[], float]] = {(IMPORT, ""): time_import}
        for count in COUNTS:
            repository = make_repository(Path(name) / str(count), count)
            for label, command in COMMANDS.items():
                cases[label, count] = functools.partial(time_command, repository, command)
        for case in cases.values():
            # Unmeasured: the second time is the one that people know.
            case()
        measured = take_turns(cases, repeats)
    return [
        {"case": label, "papers": count, "turn": turn, "seconds": round(seconds, 3), "goal": GOALS.get(label, "")}
        for (label, count), turns in measured.items()
        for turn, seconds in enumerate(turns)
    ]


def times(rows: list[dict[str, Any]], label: str, count: int | str) -> list[float]:
    """The measured seconds of a case."""
    return [row["seconds"] for row in rows if (row["case"], row["papers"]) == (label, count)]


def draw(rows: list[dict[str, Any]], where: str) -> None:
    """Bars of the median time of each command with one paper and with many, every measurement as a dot, the goals."""
    from matplotlib import pyplot as plt

    bars = [(label, count) for label in COMMANDS for count in COUNTS] + [(IMPORT, "")]
    figure, axes = plt.subplots(figsize=(9, 4.2), layout="constrained")
    for position, (label, count) in enumerate(bars):
        values = times(rows, label, count)
        median = statistics.median(values)
        axes.barh(position, median, color="C1" if count == COUNTS[-1] else "C0", alpha=0.7)
        axes.plot(values, [position] * len(values), "k.", markersize=4)
        axes.annotate(
            f"{median:.2f} s", (max(values), position), xytext=(6, 0), textcoords="offset points", va="center"
        )
        if label in GOALS:
            axes.plot([GOALS[label]] * 2, [position - 0.45, position + 0.45], "r--", linewidth=1.5)
    axes.plot([], [], "r--", label="goal")
    axes.set_yticks(range(len(bars)), [f"{label}, {count} paper(s)" if count else label for label, count in bars])
    axes.set_xlabel("seconds")
    axes.margins(x=0.1)
    axes.invert_yaxis()
    axes.legend(loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(where, fontsize=9)
    save_figure("pipeline", figure)
    plt.close(figure)


def main() -> None:
    """Measure, write table and figure, and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    os.environ["DVC_NO_ANALYTICS"] = "true"
    where = machine()
    rows = measure(repeats)
    write_table("pipeline", rows)
    draw(rows, where)
    print(where)
    for label, count in dict.fromkeys((row["case"], row["papers"]) for row in rows):
        values = times(rows, label, count)
        goal = f"  goal {GOALS[label]} s" if label in GOALS else ""
        print(
            f"{label:32}{count:>4}  {statistics.median(values):6.2f} s ({min(values):.2f} to {max(values):.2f}){goal}"
        )


if __name__ == "__main__":
    main()
