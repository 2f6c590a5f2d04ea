"""Figures that answer the paper's questions: do stronger negatives do harm, why, and what do the weights do?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
import pandas as pd

from shared.config import Stage
from shared.evaluation.figures import save_figures
from shared.evaluation.statistics import Interval, bootstrap_interval

from .config import SOURCES, Params

matplotlib.use("Agg")
import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SOURCE_LABELS = {"random": "random", "weak": "weak", "bm25": "BM25", "strong": "strong", "dense": "dense"}
# Variants by source, in the order in which they stand beside each other.
SHOWN = {
    "plain": ("unweighted", "black", "o"),
    "cet": ("coupled, τ = 10", "tab:blue", "s"),
    "cet_tau1": ("coupled, τ = 1", "tab:cyan", "D"),
    "fixed_selection": ("selection model fixed", "tab:orange", "v"),
    "denoised": ("denoised", "tab:red", "^"),
    "pu": ("positive-unlabeled risk", "tab:purple", "P"),
    "oracle": ("no false negatives (oracle)", "tab:green", "*"),
}
LABEL_NAMES = {
    "weak_pool": "one label,\nweak pool",
    "no_false_negatives": "the same,\nno false\nnegatives",
    "strong_pool": "one label,\nstrong pool",
    "complete": "all relevant\nlabeled",
}


def draw(stage: Stage[Params], scores: pd.DataFrame) -> list[Path]:
    """Draw all figures of a profile from its scores; returns their files."""
    scores = scores.reindex(columns=[*scores.columns, *{"item", "epoch", "collection"}.difference(scores.columns)])
    figures = {"ndcg_by_source": by_source(scores)}
    if scores.metric.eq("false_negatives").any():
        figures["false_negatives"] = false_negatives(scores)
    if (drawn := weights(scores)) is not None:
        figures["weights"] = drawn
    return save_figures(stage.results_dir, figures)


def interval(rows: pd.DataFrame) -> Interval | None:
    """95 % interval of a mean over seeds and queries; None where there are fewer than two of either."""
    table = rows.pivot_table(index="seed", columns="item", values="value")
    if table.size < 2 or table.isna().any(axis=None):
        return None
    return bootstrap_interval(table.to_numpy(), num_resamples=2000)


def by_source(scores: pd.DataFrame) -> Figure:
    """nDCG@10 by source of the negatives; beside it, what the strong retriever's cost by who made the labels."""
    items = scores[scores.metric.eq("ndcg@10") & scores.item.notna()]
    main = "weak_pool" if items.dataset.eq("weak_pool").any() else items.dataset.iloc[0]
    harm = scores[scores.metric.eq("harm")]
    count = 2 if len(harm) else 1
    figure, axes = plt.subplots(
        1, count, figsize=(8 + 5 * (count - 1), 4.4), layout="constrained", width_ratios=[1.9, 1][:count], squeeze=False
    )
    axis = axes[0, 0]
    rows = items[items.dataset.eq(main)]
    sources = [source for source in SOURCES if rows.model.str.endswith(f"_{source}").any()]
    for number, (variant, (label, color, marker)) in enumerate(SHOWN.items()):
        found = {source: interval(rows[rows.model.eq(f"{variant}_{source}")]) for source in sources}
        shift = (number - (len(SHOWN) - 1) / 2) * 0.1
        points = [(x + shift, each) for x, each in enumerate(found.values()) if each is not None]
        _intervals(axis, points, color=color, marker=marker, label=label)
    bm25 = rows[rows.model.isin(["bm25", "first_stage"])].value
    if len(bm25):
        axis.axhline(bm25.mean(), color="0.5", ls="--", lw=1, label="BM25's own order")
    axis.set_xticks(range(len(sources)), [SOURCE_LABELS[source] for source in sources])
    axis.set_xlim(-0.5, len(sources) - 0.5)
    axis.set_xlabel("negatives are drawn from the top documents of")
    axis.set_ylabel("nDCG@10, all judgments")
    axis.set_title("labels from the weak pool, 95 % over queries and seeds", fontsize=10)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    if len(harm):
        axis = axes[0, 1]
        names = [name for name in LABEL_NAMES if harm.model.eq(name).any()]
        points = [(x, interval(harm[harm.model.eq(name)])) for x, name in enumerate(names)]
        _intervals(axis, [(x, each) for x, each in points if each is not None], color="black", marker="o")
        axis.axhline(0, color="0.5", lw=0.8)
        axis.set_xticks(range(len(names)), [LABEL_NAMES[name] for name in names], fontsize=8)
        axis.set_xlim(-0.6, len(names) - 0.4)
        axis.set_ylabel("nDCG@10, weak less strong negatives")
        axis.set_title("harm of strong negatives, unweighted", fontsize=10)
        axis.grid(alpha=0.25)
    return figure


def false_negatives(scores: pd.DataFrame) -> Figure:
    """The share of relevant documents among each source's negatives, in all and by collection."""
    rows = scores[scores.metric.eq("false_negatives") & scores.dataset.eq("weak_pool")]
    collections = [None, *rows.collection.dropna().unique()]
    figure, axis = plt.subplots(figsize=(7, 3.8), layout="constrained")
    width = 0.8 / len(collections)
    for number, collection in enumerate(collections):
        chosen = rows[rows.collection.isna() if collection is None else rows.collection.eq(collection)]
        heights = [100 * chosen[chosen.model.eq(source)].value.mean() for source in SOURCES]
        places = np.arange(len(SOURCES)) + (number - (len(collections) - 1) / 2) * width
        color = "black" if collection is None else f"C{number - 1}"
        axis.bar(places, heights, width * 0.9, color=color, label=collection or "all queries")
    axis.set_xticks(range(len(SOURCES)), [SOURCE_LABELS[source] for source in SOURCES])
    axis.set_xlabel("negatives are drawn from the top documents of")
    axis.set_ylabel("relevant among them [%]")
    axis.grid(axis="y", alpha=0.25)
    if len(collections) > 1:
        axis.legend(fontsize=8)
    return figure


def weights(scores: pd.DataFrame) -> Figure | None:
    """Mean weights of true and of false negatives in the relevance loss, and how well weights tell them apart.

    None where no model has weights.
    """
    rows = scores[scores.epoch.notna() & scores.dataset.eq("weak_pool")]
    curves = rows.pivot_table(index="epoch", columns=["model", "metric"], values="value")
    variants = {"cet": "τ = 10", "cet_tau1": "τ = 1"}
    sources = {"bm25": "--", "strong": "-"}
    shown = [variant for variant in variants if f"{variant}_strong" in curves]
    if not shown:
        return None
    figure, axes = plt.subplots(1, len(shown) + 1, figsize=(4.4 * (len(shown) + 1), 3.8), layout="constrained")
    for axis, variant in zip(axes, shown, strict=False):
        for source, style in sources.items():
            for metric, color in (("weight_of_true", "black"), ("weight_of_false", "tab:red")):
                if (f"{variant}_{source}", metric) in curves:
                    label = f"{metric.rpartition('_')[2]} negatives, {SOURCE_LABELS[source]}"
                    axis.plot(curves[f"{variant}_{source}", metric], style, color=color, label=label)
        axis.set_yscale("linear" if variant == "cet" else "log")
        axis.set_ylabel("mean weight $w_R$")
        axis.set_title(variants[variant], fontsize=10)
    for variant, color in zip(shown, ("tab:blue", "tab:cyan"), strict=False):
        for source, style in sources.items():
            if (f"{variant}_{source}", "auc_of_weights") in curves:
                label = f"{variants[variant]}, {SOURCE_LABELS[source]}"
                axes[-1].plot(curves[f"{variant}_{source}", "auc_of_weights"], style, color=color, label=label)
    axes[-1].axhline(0.5, color="0.5", lw=0.8)
    axes[-1].set_ylabel("AUC")
    axes[-1].set_title("chance that a true negative weighs more than a false one", fontsize=9)
    for axis in axes:
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8)
    return figure


def _intervals(
    axis: Axes, points: list[tuple[float, Interval]], *, color: str, marker: str, label: str | None = None
) -> None:
    if not points:
        return
    places = [place for place, _ in points]
    values = np.array([each.estimate for _, each in points])
    below = values - [each.low for _, each in points]
    above = np.array([each.high for _, each in points]) - values
    axis.errorbar(places, values, [below, above], fmt=marker, ms=5, lw=1, capsize=2, color=color, label=label)
