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
    "strong_pool": "one label,\nstrong pool",
    "complete": "all relevant\nlabeled",
}


def draw(stage: Stage[Params], scores: pd.DataFrame) -> list[Path]:
    """Draw all figures of a profile from its scores; returns their files."""
    scores = scores.reindex(columns=[*scores.columns, *{"item", "epoch", "collection"}.difference(scores.columns)])
    figures = {"ndcg_by_source": by_source(scores), "weights": weights(scores)}
    if scores.metric.eq("false_negatives").any():
        figures["false_negatives"] = false_negatives(scores)
    if not figures["weights"].axes:
        plt.close(figures.pop("weights"))
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
        1, count, figsize=(8 + 4 * (count - 1), 4.4), layout="constrained", width_ratios=[2.2, 1][:count], squeeze=False
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


def weights(scores: pd.DataFrame) -> Figure:
    """Mean weights of true and of false negatives in the relevance loss, and how well weights tell them apart."""
    rows = scores[scores.epoch.notna() & scores.dataset.eq("weak_pool")]
    models = [
        (f"{variant}_{source}", f"{label}, {SOURCE_LABELS[source]}", color, style)
        for variant, label, color in (("cet", "τ = 10", "tab:blue"), ("cet_tau1", "τ = 1", "tab:cyan"))
        for source, style in (("bm25", "--"), ("strong", "-"))
        if rows.model.eq(f"{variant}_{source}").any()
    ]
    if not models:
        return plt.figure()
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for model, label, color, style in models:
        of_model = rows[rows.model.eq(model)]
        for metric, tint in (("weight_of_true", color), ("weight_of_false", "tab:red")):
            means = of_model[of_model.metric.eq(metric)].groupby("epoch").value.mean()
            which = "true" if metric == "weight_of_true" else "false"
            width = 2.2 if "10" in label else 1.1
            axes[0].plot(means.index, means, style, color=tint, lw=width, label=f"{which} negatives, {label}")
        for metric, tint in (("auc_of_weights", color), ("auc_of_relevance", "0.6")):
            means = of_model[of_model.metric.eq(metric)].groupby("epoch").value.mean()
            if len(means) and (tint != "0.6" or label.startswith("τ = 10")):
                known = label if metric == "auc_of_weights" else f"R itself finds the false ones, {label}"
                axes[1].plot(means.index, means, style, color=tint, label=known)
    axes[0].set_yscale("log")
    axes[0].yaxis.set_major_formatter("{x:g}")
    axes[0].yaxis.set_minor_formatter("{x:g}")
    axes[0].set_ylabel("mean weight $w_R$")
    axes[1].axhline(0.5, color="black", lw=0.8)
    axes[1].set_ylabel("AUC: true negatives weigh more than false ones")
    for axis in axes:
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.25)
        axis.legend(fontsize=7)
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
