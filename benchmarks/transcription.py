"""Edit distances and oracles over N-best lists, against a plain Python loop and jiwer; growth with lists and words.

    python benchmarks/transcription.py

The released lists are read from `$REPRISE_DATA/hyporadise`, where they are; random ones are drawn in any case, of which
the i-th word is drawn in proportion to 1/i and one in ten is changed in a hypothesis. The loop is the definition with
two rows of Python numbers, for a sample of the lists; its time is multiplied by how many samples there are. What is
compared takes turns, and the least time counts. One CPU thread.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jiwer
import matplotlib.pyplot as plt
import numpy as np
from common import machine, save_figure, take_turns, write_table

from shared.config import data_root
from shared.data.nbest import read_nbest
from shared.evaluation.rover import rover_all
from shared.evaluation.transcription import compositional_oracle, count_errors, edit_distances, nbest_oracle

Row = dict[str, Any]
Lists = tuple[list[str], list[list[str]]]

REPEATS = 3
SAMPLE = 100  # lists of the loop
NUM_HYPOTHESES = 5
VOCABULARY = 5_000
LISTS = (1_000, 4_000, 16_000)
WORDS = (10, 40, 160)
BATCHED, LOOP, JIWER = "edit distances", "edit distances, plain loop", "edit distances, jiwer"


def seconds_of(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def least_seconds(cases: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    timed = {name: lambda run=run: seconds_of(run) for name, run in cases.items()}
    return {name: min(seconds) for name, seconds in take_turns(timed, REPEATS).items()}


def plain_distance(first: list[str], second: list[str]) -> int:
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, start=1):
        before, row = row, [i]
        for j, b in enumerate(second, start=1):
            row.append(min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (a != b)))
    return row[-1]


def plain_loop(references: list[str], nbest: list[list[str]]) -> list[list[int]]:
    return [
        [plain_distance(reference.split(), text.split()) for text in hypotheses]
        for reference, hypotheses in zip(references, nbest, strict=True)
    ]


def by_jiwer(references: list[str], nbest: list[list[str]]) -> None:
    jiwer.process_words(
        [reference for reference in references for _ in range(NUM_HYPOTHESES)],
        [text for hypotheses in nbest for text in hypotheses],
    )


def measured(name: str, lists: Lists, *, path: Path | None = None, everything: bool = True) -> list[Row]:
    references, nbest = lists
    step = max(1, len(references) // SAMPLE)
    sample = references[::step], nbest[::step]
    np.testing.assert_array_equal(plain_loop(*sample), edit_distances(*sample))
    cases: dict[str, Callable[[], Any]] = {
        BATCHED: lambda: edit_distances(*lists),
        LOOP: lambda: plain_loop(*sample),
        JIWER: lambda: by_jiwer(*lists),
        "n-best oracle": lambda: nbest_oracle(*lists),
        "compositional oracle": lambda: compositional_oracle(*lists),
    }
    if everything:
        cases["errors of the first"] = lambda: count_errors(references, [hypotheses[0] for hypotheses in nbest])
        cases["ROVER"] = lambda: rover_all(nbest)
    if path is not None:
        cases["read"] = lambda: read_nbest(path)
    seconds = least_seconds(cases)
    seconds[LOOP] *= len(references) / len(sample[0])
    words = np.mean([len(reference.split()) for reference in references])
    return [
        {
            "lists_of": name,
            "what": what,
            "lists": len(references),
            "words": f"{words:.1f}",
            "seconds": f"{value:.4g}",
            "ratio_to_batched": f"{value / seconds[BATCHED]:.3g}",
            "machine": machine(),
        }
        for what, value in seconds.items()
    ]


def random_lists(count: int, num_words: int, seed: int = 0) -> Lists:
    generator = np.random.default_rng(seed)
    share = 1 / np.arange(1, VOCABULARY + 1)
    share /= share.sum()
    words = generator.choice(VOCABULARY, (count, num_words), p=share)
    others = generator.choice(VOCABULARY, (count, NUM_HYPOTHESES, num_words), p=share)
    changed = generator.random(others.shape) < 0.1
    heard = np.where(changed, others, words[:, None])

    def texts(rows: list[list[int]]) -> list[str]:
        return [" ".join(f"w{number}" for number in row) for row in rows]

    return texts(words.tolist()), [texts(hypotheses) for hypotheses in heard.tolist()]


def released() -> list[Row]:
    rows = []
    for path in sorted((data_root() / "hyporadise").glob("*.jsonl.gz")):
        dataset = read_nbest(path, num_hypotheses=NUM_HYPOTHESES)
        lists = list(dataset["reference"]), [list(hypotheses) for hypotheses in dataset["nbest"]]
        rows += measured(path.name.removesuffix(".jsonl.gz"), lists, path=path)
    return rows


def growth() -> list[Row]:
    rows = []
    for count in LISTS:
        rows += measured("random words", random_lists(count, 20), everything=False)
    for num_words in WORDS:
        rows += measured("random words", random_lists(LISTS[0], num_words), everything=False)
    return rows


def draw(rows: list[Row]) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    real = [row for row in rows if row["lists_of"] != "random words"]
    drawn = [row for row in rows if row["lists_of"] == "random words"]
    shown = real or drawn
    steps = list(dict.fromkeys(row["what"] for row in shown))
    color = {what: f"C{place}" for place, what in enumerate(steps)}
    for place, what in enumerate(steps):
        values = [1e6 * float(row["seconds"]) / row["lists"] for row in shown if row["what"] == what]
        axes[0].plot(values, [place] * len(values), "o", color=color[what], alpha=0.6)
    label = "released lists" if real else "random lists"
    axes[0].set(xscale="log", xlabel=f"µs a list, {label}", yticks=range(len(steps)), yticklabels=steps)
    axes[0].invert_yaxis()
    for axis, across, chosen in (
        (axes[1], "lists", lambda row: row["words"] == "20.0"),
        (axes[2], "words", lambda row: row["lists"] == LISTS[0]),
    ):
        for what in (BATCHED, JIWER, LOOP, "n-best oracle", "compositional oracle"):
            some = sorted(
                (float(row[across]), float(row["seconds"])) for row in drawn if row["what"] == what and chosen(row)
            )
            axis.plot([x for x, _ in some], [y for _, y in some], "o-", color=color[what], label=what)
        axis.set(xscale="log", yscale="log", ylabel="seconds")
    axes[1].set_xlabel("lists of 5 hypotheses, 20 words each")
    axes[2].set_xlabel(f"words of a hypothesis, {LISTS[0]:,} lists")
    axes[1].legend(frameon=False, fontsize="x-small", loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    save_figure("transcription", figure)
    plt.close(figure)


def main() -> None:
    rows = released() + growth()
    for row in rows:
        print(
            f"{row['lists_of']:14} {row['what']:27} {row['lists']:6} lists {row['words']:>6} words "
            f"{row['seconds']:>9} s  {row['ratio_to_batched']:>6}"
        )
    write_table("transcription", rows)
    draw(rows)


if __name__ == "__main__":
    main()
