"""Figures that answer the paper's question: does overwriting help recall and language, and is it fast?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
import pandas as pd

from shared.config import Stage
from shared.data.mad import TASKS
from shared.files import atomic_path

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .config import Params

# Label and color; the variants of DeltaNet are shades of its red, controls are gray.
MODELS = {
    "transformer": ("Transformer++", "black"),
    "linear_attention": ("linear attention", "tab:olive"),
    "retnet": ("RetNet", "tab:green"),
    "mamba": ("Mamba", "tab:purple"),
    "hyena": ("Hyena", "darkgoldenrod"),
    "hyena_multi_head": ("Hyena, multi-head", "goldenrod"),
    "gla": ("GLA", "tab:blue"),
    "gla_conv": ("GLA, convolution", "tab:cyan"),
    "deltanet": ("DeltaNet", "tab:red"),
    "deltanet_no_conv": ("DeltaNet, no convolution", "salmon"),
    "deltanet_l1_elu": ("DeltaNet, L1 and 1+ELU", "peru"),
    "deltanet_l2_elu": ("DeltaNet, L2 and 1+ELU", "sandybrown"),
    "deltanet_l2_relu": ("DeltaNet, L2 and ReLU", "tan"),
    "deltanet_swa": ("DeltaNet + sliding window", "mediumvioletred"),
    "deltanet_global": ("DeltaNet + 2 × global", "hotpink"),
    "unigram": ("frequency of the characters", "0.6"),
    "most_frequent": ("most frequent answer", "0.6"),
}
RULES = {
    "additive": ("additive", "tab:olive"),
    "decay": ("additive, decaying", "tab:green"),
    "delta_rule": ("delta rule, β = 1", "tab:red"),
    "delta_rule_half": ("delta rule, β = ½", "salmon"),
}
IMPLEMENTATIONS = {
    "recurrent": ("recurrence", "tab:gray"),
    "chunk": ("by chunks", "tab:red"),
    "attention": ("softmax attention", "black"),
}
# Figure 3 of the paper, accuracy in percent, in the order of `TASKS`.
PAPER_MAD = {
    "transformer": (51.6, 29.8, 94.1, 85.2, 86.8, 99.6),
    "mamba": (52.7, 6.7, 90.4, 89.5, 90.1, 86.3),
    "hyena": (45.2, 7.9, 81.7, 89.5, 78.8, 93.1),
    "hyena_multi_head": (44.8, 14.4, 99.0, 89.4, 98.6, 93.0),
    "gla": (38.8, 6.9, 80.8, 63.3, 81.6, 88.6),
    "deltanet": (42.2, 35.7, 100.0, 52.8, 100.0, 100.0),
}


def draw(stage: Stage[Params], scores: pd.DataFrame, costs: pd.DataFrame) -> list[Path]:
    """Draw all figures that a profile has scores for; returns their files."""
    figures: dict[str, Callable[[], Figure] | None] = {
        "mechanism": stage.params.mechanism and (lambda: mechanism(scores, stage.params.mechanism.dimension)),
        "language": "language" in stage.params.experiments and (lambda: language(scores)),
        "length": bool(stage.params.extrapolated)
        and (lambda: length(scores, stage.params.experiments["language"].data.length)),
        "recall": bool(set(stage.params.experiments) - {"language"}) and (lambda: recall(scores)),
        "speed": not costs.empty and (lambda: speed(costs)),
    }
    paths = []
    for name, make in figures.items():
        if not make:
            continue
        figure = make()
        path = stage.results_dir / f"{name}.png"
        with atomic_path(path) as temporary:
            # No software version inside, so that equal runs give equal files.
            figure.savefig(temporary, dpi=110, bbox_inches="tight", metadata={"Software": None})
        plt.close(figure)
        paths.append(path)
    return paths


def mechanism(scores: pd.DataFrame, dimension: int) -> Figure:
    """Recall error over the number of pairs, for each rule, once written and after half was bound anew."""
    titles = {
        "bound": "all pairs, once written",
        "overwritten": "half of the keys bound anew:\nthese keys",
        "other": "half of the keys bound anew:\nthe other keys",
    }
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), sharey=True, layout="constrained")
    for axis, (which, title) in zip(axes, titles.items(), strict=True):
        rows = scores[scores.dataset.eq(f"mechanism/{which}")]
        _curves(axis, rows, "pairs", RULES)
        axis.axvline(dimension, color="0.6", lw=0.8, ls=":", zorder=0)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(f"pairs in a memory of {dimension} × {dimension}")
    axes[0].set_ylim(bottom=0)
    axes[0].set_ylabel("error of recall ‖Sᵀk − v‖ / ‖v‖")
    axes[0].legend(fontsize=8)
    return figure


def language(scores: pd.DataFrame) -> Figure:
    """Bits per character of the test text by model, a dot a seed; the best on top."""
    rows = scores[scores.dataset.eq("language") & scores.metric.eq("bits_per_character")]
    trained = rows[rows.model.ne("unigram")]
    names = list(trained.groupby("model").value.mean().sort_values().index)
    figure, axis = plt.subplots(figsize=(7, 0.3 * len(names) + 1.2), layout="constrained")
    _dots(axis, trained, names)
    axis.set_xlabel("bits per character of the test text (dot: a seed, bar: mean); less is better")
    unigram = rows[rows.model.eq("unigram")].value.mean()
    axis.set_title(f"character frequencies alone: {unigram:.2f} bits", fontsize=9)
    return figure


def length(scores: pd.DataFrame, training_length: int) -> Figure:
    """Bits per character by position, within and beyond the training length."""
    rows = scores[scores.dataset.eq("language/long") & scores.metric.eq("bits_per_character")]
    figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
    _curves(axis, rows, "position", MODELS)
    axis.axvline(training_length, color="0.6", lw=0.8, ls=":", label="training length")
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_xlabel("position in the sequence [tokens]")
    axis.set_ylabel("bits per character")
    axis.legend(fontsize=8)
    return figure


def recall(scores: pd.DataFrame) -> Figure:
    """Accuracy by task and model, a dot a seed, the paper's numbers for MAD as diamonds."""
    rows = scores[scores.metric.eq("accuracy")]
    order = ["mqar", "overwrite/overwritten", "overwrite/other", *(f"mad/{task}" for task in TASKS)]
    datasets = [dataset for dataset in order if rows.dataset.eq(dataset).any()]
    columns = min(3, len(datasets))
    of_dataset = {dataset: rows[rows.dataset.eq(dataset)] for dataset in datasets}
    names = {d: [name for name in MODELS if of_dataset[d].model.eq(name).any()] for d in datasets}
    lines = [datasets[start : start + columns] for start in range(0, len(datasets), columns)]
    heights = [max(len(names[dataset]) for dataset in line) for line in lines]
    figure, axes = plt.subplots(
        len(lines),
        columns,
        figsize=(4.2 * columns, sum(0.26 * height + 0.8 for height in heights)),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat[len(datasets) :]:
        axis.set_axis_off()
    for axis, dataset in zip(axes.flat, datasets, strict=False):
        _dots(axis, of_dataset[dataset].assign(value=100 * of_dataset[dataset].value), names[dataset])
        task = dataset.removeprefix("mad/")
        if task in TASKS:
            published = [
                (PAPER_MAD[name][TASKS.index(task)], names[dataset].index(name))
                for name in PAPER_MAD
                if name in names[dataset]
            ]
            axis.plot(*zip(*published, strict=True), "D", ms=5, mfc="none", mec="0.4", label="paper, Fig. 3")
        axis.set_xlim(-3, 103)
        axis.set_title(dataset.replace("mad/", "MAD: ").replace("_", " ").replace("mqar", "MQAR"), fontsize=10)
    for axis in axes[-1]:
        axis.set_xlabel("accuracy [%] (dot: a seed, bar: mean)")
    with_legend = next((axis for axis in axes.flat if axis.get_legend_handles_labels()[0]), None)
    if with_legend is not None:
        figure.legend(*with_legend.get_legend_handles_labels(), loc="outside lower right", fontsize=8)
    return figure


def speed(costs: pd.DataFrame) -> Figure:
    """Time of the operator and its speed-up over the recurrence by length, and tokens a second of whole models."""
    figure, axes = plt.subplots(2, 2, figsize=(10.5, 7), layout="constrained")
    dims = sorted({int(name.rpartition("_")[2]) for name in costs[costs.metric.eq("speedup")].model})
    for direction, style in (("forward", ":"), ("forward+backward", "-")):
        rows = costs[costs.dataset.eq(f"speed/head_dim_{dims[-1]}/{direction}")]
        labels = {name: (f"{text}, {direction}", color) for name, (text, color) in IMPLEMENTATIONS.items()}
        _curves(axes[0, 0], rows, "length", labels, ls=style)
    axes[0, 0].set_title(f"operator, head dimension {dims[-1]}", fontsize=10)
    axes[0, 0].set_ylabel("time [ms]")
    shades = plt.cm.viridis(np.linspace(0, 0.8, len(dims)))
    labels = {f"head_dim_{dim}": (f"head dimension {dim}", shade) for dim, shade in zip(dims, shades, strict=True)}
    for axis, direction in ((axes[0, 1], "forward"), (axes[1, 0], "forward+backward")):
        _curves(axis, costs[costs.dataset.eq(f"speed/{direction}")], "length", labels)
        axis.set_title(f"operator, {direction}", fontsize=10)
        axis.set_ylabel("speed-up over the recurrence [×]")
    _curves(axes[1, 1], costs[costs.dataset.eq("throughput")], "length", MODELS)
    axes[1, 1].set_title("whole models, training step", fontsize=10)
    axes[1, 1].set_ylabel("throughput [tokens/s]")
    for axis in axes.flat:
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        for which in (axis.xaxis, axis.yaxis):
            which.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        low, high = axis.get_ylim()
        if high < 10 * low:
            # Less than a power of ten: there may be no major tick at all.
            axis.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.tick_params(axis="y", which="minor", labelsize=7)
        axis.set_xlabel("length of the sequence T [tokens]")
        axis.legend(fontsize=7)
    return figure


def _curves(axis: Axes, rows: pd.DataFrame, column: str, labels: dict[str, tuple[str, Any]], ls: str = "-") -> None:
    """A line for each model over a column: the mean over seeds, in a band from the lowest to the highest."""
    for name, (text, color) in labels.items():
        grouped = rows[rows.model.eq(name)].groupby(column).value
        if not len(grouped):
            continue
        x = np.array(list(grouped.groups))
        axis.fill_between(x, grouped.min(), grouped.max(), color=color, alpha=0.15, lw=0)
        axis.plot(x, grouped.mean(), ls, marker="o", ms=3, lw=1.5, color=color, label=text)
    axis.grid(which="both", alpha=0.25)


def _dots(axis: Axes, rows: pd.DataFrame, names: Sequence[str]) -> None:
    """A line for each model, from top to bottom: a dot a seed and a bar at their mean."""
    for position, name in enumerate(names):
        values = rows[rows.model.eq(name)].value
        axis.plot(values, [position] * len(values), "o", ms=4.5, alpha=0.6, color=MODELS[name][1])
        axis.plot(values.mean(), position, "|", ms=14, mew=2, color="black")
    axis.set_yticks(range(len(names)), [MODELS[name][0] for name in names], fontsize=8)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.grid(axis="x", alpha=0.25)
