"""Figures that answer the paper's questions: which heads retrieve, in how many tests, and what happens without them?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from shared.config import Stage
from shared.evaluation.figures import save_figures

from .model import KINDS, THRESHOLD, activation_frequency, shares

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Samples = Mapping[tuple[str, int], NDArray[np.float64]]

LABELS = {
    "unmasked": "nothing masked",
    "retrieval": "K strongest retrieval heads",
    "random": "K random heads",
    "layer_matched": "K random heads of the same layers",
    "induction": "K strongest induction heads",
}
COLORS = {"retrieval": "tab:red", "random": "tab:blue", "layer_matched": "tab:cyan", "induction": "tab:purple"}
KIND_COLORS = dict(zip(KINDS, ("tab:green", "gold", "tab:orange", "tab:red"), strict=True))
# Shares of heads by the paper's section 3.1, and the scores that they are about.
BANDS = {
    "retrieval_share": (0.03, 0.06, "at least 0.1"),
    "weak_share": (0.25, 0.52, "above 0, below 0.1"),
    "zero_share": (0.45, 0.73, "0 in every test"),
}
# As many masked heads as the figure by depth and length shows.
SHOWN_SHARE = 0.125


def draw(stage: Stage, scores: pd.DataFrame, samples: Samples, answers: pd.DataFrame | None) -> list[Path]:
    """Draw all figures of a profile; returns their files."""
    figures = {"heads": head_maps(samples)}
    if scores.metric.eq("retrieval_share_low").any():
        figures["shares"] = share_figure(samples)
    if scores.dataset.eq("correlation").any() and not scores.model.str.startswith("other-seed").any():
        figures["correlation"] = correlations(scores)
    if answers is not None:
        first = stage.params.masking.models[0]
        figures["masking"] = masking(scores, "recall", "recall [%]", 100)
        if scores.dataset.eq("in_steps/uniform").any():
            figures["questions"] = masking(scores, "accuracy", "share of right answers", 1)
        figures["depth"] = by_depth(answers, first, samples)
        figures["errors"] = errors(scores, first)
    return save_figures(stage.results_dir, figures, dpi=100)


def head_maps(samples: Samples) -> Figure:
    """Mean score of every head, layers downward; squares mark retrieval heads."""
    models, seeds = list(dict.fromkeys(name for name, _ in samples)), sorted({seed for _, seed in samples})
    by_seed = len(seeds) > 1
    columns = len(models) if by_seed else min(4, len(models))
    rows = len(seeds) if by_seed else math.ceil(len(models) / columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.9 * columns + 0.8, 2.7 * rows), layout="constrained", squeeze=False
    )
    for axis in axes.flat:
        axis.axis("off")
    for index, ((name, seed), tests) in enumerate(samples.items()):
        place = (seeds.index(seed), models.index(name)) if by_seed else divmod(index, columns)
        axis, score = axes[place], tests.mean(axis=0)
        axis.axis("on")
        image = axis.imshow(score, vmin=0, vmax=1, cmap="Blues", aspect="equal")
        marked = np.argwhere(score >= THRESHOLD)
        for layer, head in marked:
            axis.add_patch(Rectangle((head - 0.5, layer - 0.5), 1, 1, fill=False, ec="tab:red", lw=0.9))
        title = f"{name}, seed {seed}" if by_seed else name
        axis.set_title(f"{title}: {len(marked)} of {score.size}", fontsize=9)
        axis.set(xlabel="head", ylabel="layer")
        if score.size <= 64:
            axis.set(xticks=range(score.shape[1]), yticks=range(score.shape[0]))
            for (layer, head), value in np.ndenumerate(score):
                color = "white" if value > 0.6 else "0.3"
                axis.text(head, layer, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color)
    figure.colorbar(image, ax=axes, shrink=0.6, label="mean retrieval score")
    figure.suptitle("Scores of all heads; red squares: retrieval heads (mean score at least 0.1)", fontsize=10)
    return figure


def share_figure(samples: Samples) -> Figure:
    """Histogram of mean scores, shares of heads against the paper's bands, and how many heads are how often active."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    colors = dict(zip([name for name, _ in samples], plt.cm.tab10.colors, strict=False))
    edges = np.concatenate([[-0.05, 1e-9], np.linspace(0.05, 1.0, 20)])
    for (name, _), tests in samples.items():
        score = tests.mean(axis=0)
        density = np.histogram(score, edges)[0] / score.size
        left.stairs(np.where(density > 0, density, np.nan), edges, color=colors[name], label=name, lw=1.3)
    left.axvspan(-0.05, 0, color="0.85", label="0 in every test")
    left.axvline(THRESHOLD, color="black", ls=":", label="retrieval heads from here on")
    left.set(yscale="log", xlabel="mean retrieval score of a head", ylabel="share of heads in a bin")
    left.legend(fontsize=7)

    for position, (metric, (low, high, _)) in enumerate(BANDS.items()):
        middle.add_patch(Rectangle((100 * low, position - 0.36), 100 * (high - low), 0.72, color="0.87"))
        for number, ((name, _), tests) in enumerate(samples.items()):
            value = 100 * shares(tests.mean(axis=0))[metric]
            middle.plot(value, position - 0.27 + 0.09 * number, "o", ms=5, color=colors[name])
    middle.set_yticks(range(len(BANDS)), [text for _, _, text in BANDS.values()])
    middle.set(ylim=(len(BANDS) - 0.5, -0.5), xlim=(0, 100), xlabel="share of heads [%]", ylabel="mean score")
    middle.set_title("gray: the paper's range (section 3.1)", fontsize=9)

    for (name, _), tests in samples.items():
        frequency = np.sort(activation_frequency(tests).ravel())[::-1]
        right.plot(np.arange(1, len(frequency) + 1), frequency, color=colors[name], lw=1.3)
    right.set(xscale="log", xlabel="heads, most active first", ylabel="share of tests in which a head copies")
    for axis in (left, middle, right):
        axis.grid(alpha=0.25)
    return figure


def correlations(scores: pd.DataFrame) -> Figure:
    """Pearson's r between the score maps of models with heads alike."""
    rows = scores[scores.dataset.eq("correlation")]
    means = rows.groupby("model").value.mean()
    names = list(dict.fromkeys(name for pair in rows.model for name in pair.split("~")))
    table = np.full((len(names), len(names)), np.nan)
    np.fill_diagonal(table, 1)
    for pair, value in means.items():
        one, other = (names.index(name) for name in pair.split("~"))
        table[one, other] = table[other, one] = value
    figure, axis = plt.subplots(figsize=(0.75 * len(names) + 2.6, 0.65 * len(names) + 1.6), layout="constrained")
    image = axis.imshow(table, vmin=0, vmax=1, cmap="Blues")
    for (row, column), value in np.ndenumerate(table):
        if np.isfinite(value):
            color = "white" if value > 0.6 else "black"
            axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=color)
    axis.set_xticks(range(len(names)), names, rotation=35, ha="right", fontsize=8)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_title("blank: other numbers of layers and heads", fontsize=9)
    figure.colorbar(image, ax=axis, shrink=0.8, label="Pearson's r of the score maps")
    return figure


def masking(scores: pd.DataFrame, metric: str, label: str, best: float) -> Figure:
    """A metric over the number of masked heads: mean over seeds, band from the lowest to the highest seed."""
    chosen = scores[scores.metric.eq(metric) & scores.masked.notna()]
    panels = list(dict.fromkeys(chosen.dataset))
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.6 * columns, 3.4 * rows), layout="constrained", squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, panel in zip(axes.flat, panels, strict=False):
        of_panel = chosen[chosen.dataset.eq(panel)]
        whole = of_panel[of_panel.model.eq("unmasked")].value.mean()
        for masker, color in COLORS.items():
            table = of_panel[of_panel.model.eq(masker)].pivot_table(index="masked", columns="seed", values="value")
            counts = np.append(0, table.index)
            axis.plot(counts, np.append(whole, table.mean(axis=1)), "o-", ms=3.5, color=color, label=LABELS[masker])
            axis.fill_between(table.index, table.min(axis=1), table.max(axis=1), color=color, alpha=0.13, lw=0)
        axis.axhline(best / 2, ls=":", lw=0.8, color="0.5")
        axis.set(title=panel, xlabel="masked heads K", ylabel=label, ylim=(-0.03 * best, 1.03 * best))
        axis.title.set_fontsize(10)
        axis.grid(alpha=0.25)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside lower center", ncols=len(labels))
    return figure


def by_depth(answers: pd.DataFrame, subject: str, samples: Samples) -> Figure:
    """Recall by depth of the needle and length of the context: nothing masked, K retrieval heads, K random heads."""
    chosen = answers[answers.subject.eq(subject) & answers.task.eq("needle") & answers["mode"].eq("uniform")]
    size = next(tests[0].size for (name, _), tests in samples.items() if name == subject)
    counts = sorted(count for count in chosen.masked.unique() if count)
    shown = min(counts, key=lambda count: abs(count - SHOWN_SHARE * size))
    panels = {"unmasked": 0, "retrieval": shown, "random": shown}
    figure, axes = plt.subplots(1, 3, figsize=(12.5, 3.3), layout="constrained")
    for axis, (masker, count) in zip(axes, panels.items(), strict=True):
        rows = chosen[chosen.model.eq(masker) & chosen.masked.eq(count)]
        table = 100 * rows.pivot_table(index="depth", columns="length", values="recall")
        image = axis.imshow(table, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
        axis.set_xticks(range(len(table.columns)), [f"{length:g}" for length in table.columns])
        axis.set_yticks(range(len(table.index)), [f"{depth:g}" for depth in table.index])
        axis.set(xlabel="length of the context [tokens]", ylabel="depth of the needle [%]")
        axis.set_title(LABELS[masker].replace("K ", f"{count} "), fontsize=10)
        if table.size <= 60:
            for (row, column), value in np.ndenumerate(table.to_numpy()):
                axis.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8)
    figure.colorbar(image, ax=axes, label="recall [%]")
    figure.suptitle(f"{subject}, masked heads attend uniformly while the answer is generated", fontsize=10)
    return figure


def errors(scores: pd.DataFrame, subject: str) -> Figure:
    """What answers are, over the number of masked retrieval heads: shares of all answers, mean over seeds."""
    modes = [name for name in dict.fromkeys(scores.dataset) if name.startswith(f"{subject}/")]
    figure, axes = plt.subplots(1, len(modes), figsize=(4.3 * len(modes), 3.3), layout="constrained", squeeze=False)
    for axis, dataset in zip(axes.flat, modes, strict=True):
        rows = scores[scores.dataset.eq(dataset) & scores.model.isin(["retrieval", "unmasked"])]
        table = rows[rows.metric.isin(KINDS)].pivot_table(index="masked", columns="metric", values="value")[list(KINDS)]
        _stack(axis, table)
        axis.set(title=dataset, xlabel="masked retrieval heads K", ylabel="share of answers", ylim=(0, 1))
        axis.title.set_fontsize(10)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside lower center", ncols=len(labels))
    return figure


def _stack(axis: Axes, table: pd.DataFrame) -> None:
    bottom = np.zeros(len(table))
    places = np.arange(len(table))
    for kind in KINDS:
        label = kind.replace("_", " ")
        axis.bar(places, table[kind], bottom=bottom, color=KIND_COLORS[kind], label=label, width=0.85)
        bottom += table[kind].to_numpy()
    axis.set_xticks(places, [f"{int(count)}" for count in table.index])
