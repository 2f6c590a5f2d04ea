"""Figures that answer the paper's questions: who wins on how many tables, with how few rows, and what is written?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
import pandas as pd

from shared.config import Stage, read_yaml
from shared.evaluation.figures import save_figures
from shared.evaluation.statistics import bootstrap_interval
from shared.evaluation.tabular import critical_difference_figure

from .config import Params

matplotlib.use("Agg")
import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABELS = {
    "heavy": "UniPredict heavy",
    "light": "UniPredict light",
    "heavy_noaug": "heavy, one-hot targets",
    "light_noaug": "light, one-hot targets",
    "heavy_oof": "heavy, out-of-fold targets",
    "light_oof": "light, out-of-fold targets",
    "tabllm": "TabLLM's way",
    "xgboost": "XGBoost",
    "mlp": "MLP",
    "tabnet": "TabNet",
    "tabnet_defaults": "TabNet, default batches",
    "ft_transformer": "FT-Transformer",
    "logistic_regression": "logistic regression",
    "majority": "majority class",
}
COLORS = {
    "heavy": "tab:blue",
    "light": "tab:cyan",
    "heavy_noaug": "navy",
    "light_noaug": "teal",
    "heavy_oof": "slateblue",
    "light_oof": "mediumseagreen",
    "tabllm": "tab:purple",
    "xgboost": "tab:orange",
    "mlp": "tab:brown",
    "tabnet": "tab:pink",
    "tabnet_defaults": "0.75",
    "ft_transformer": "tab:red",
    "logistic_regression": "olive",
    "majority": "black",
}


def draw(stage: Stage[Params], scores: pd.DataFrame) -> list[Path]:
    """Draw all figures of a profile from its scores; returns their files."""
    published = references(stage.folder)
    figures = {
        "accuracy": by_table(scores),
        "readings": readings(scores, published),
        "calibration": calibration(scores),
    }
    if scores.metric.eq("critical_difference").any():
        figures["critical_difference"] = critical_differences(scores)
    if scores.dataset.eq("few_shot").any():
        figures["few_shot"] = few_shot(scores, published)
    return save_figures(stage.results_dir, figures)


def references(folder: Path) -> dict[str, float]:
    """The paper's figures in the ledger, by label, such as `few_shot/0.1/heavy`."""
    claims = read_yaml(folder / "paper.yaml")["claims"]
    return {each["label"]: each["value"] for claim in claims for each in claim.get("reference", ())}


def by_table(scores: pd.DataFrame) -> Figure:
    """Accuracy on each table, tables in the order of XGBoost's; below, what the universal model is ahead or behind."""
    rows = scores[scores.metric.eq("accuracy") & scores.dataset.eq("supervised")]
    table = rows.pivot_table(index="item", columns="model", values="value")
    table = table.sort_values(["xgboost", "majority"] if "xgboost" in table else "heavy")
    figure, axes = plt.subplots(
        2, 1, figsize=(max(8, 0.16 * len(table)), 7), layout="constrained", sharex=True, height_ratios=[2, 1.2]
    )
    places = np.arange(len(table))
    if "majority" in table:
        axes[0].bar(places, table.majority, 0.85, color="0.88", label="majority class")
    for model, marker in (("xgboost", "_"), ("heavy", "o"), ("light", "D"), ("ft_transformer", "x")):
        if model in table:
            axes[0].plot(places, table[model], marker, ms=5, color=COLORS[model], label=LABELS[model])
    axes[0].set_ylabel("accuracy, true labels")
    axes[0].set_ylim(0, 1.02)
    axes[0].legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncol=4, frameon=False)
    if {"heavy", "xgboost"} <= set(table):
        difference = table.heavy - table.xgboost
        axes[1].bar(places, difference, 0.85, color=np.where(difference >= 0, COLORS["heavy"], COLORS["xgboost"]))
        ahead, behind = int((difference > 0).sum()), int((difference < 0).sum())
        axes[1].set_title(f"heavy ahead of XGBoost on {ahead} tables, behind on {behind}", fontsize=10)
    axes[1].axhline(0, color="black", lw=0.8)
    axes[1].set_ylabel("heavy less XGBoost")
    names = [name.rpartition("__")[2] for name in table.index]
    axes[1].set_xticks(places, names, rotation=90, fontsize=6)
    axes[1].set_xlim(-0.8, len(table) - 0.2)
    for axis in axes:
        axis.grid(axis="y", alpha=0.25)
    return figure


def readings(scores: pd.DataFrame, published: Mapping[str, float]) -> Figure:
    """Mean accuracy of each model on true labels, in the published reading, and in the paper."""
    rows = scores[scores.dataset.eq("supervised")]
    models = [model for model in LABELS if rows.model.eq(model).any()]
    kinds = (
        ("accuracy", "true labels, greedy", "tab:blue", "o"),
        ("published_accuracy", "published reading", "tab:orange", "s"),
        ("balanced_accuracy", "balanced, true labels", "0.6", "v"),
    )
    figure, axis = plt.subplots(figsize=(8.5, 0.42 * len(models) + 1.4), layout="constrained")
    for number, (metric, label, color, marker) in enumerate(kinds):
        for place, model in enumerate(models):
            values = rows[rows.metric.eq(metric) & rows.model.eq(model)]
            table = values.pivot_table(index="seed", columns="item", values="value")
            if table.size < 2:
                continue
            found = bootstrap_interval(table.to_numpy(), num_resamples=2000)
            height = place + 0.22 * (number - 1)
            error = [[found.estimate - found.low], [found.high - found.estimate]]
            named = label if place == 0 else None
            axis.errorbar(found.estimate, height, xerr=error, fmt=marker, ms=5, color=color, capsize=2, label=named)
    paper = [(published[f"mean/{model}"], place) for place, model in enumerate(models) if f"mean/{model}" in published]
    if paper:
        axis.plot(*zip(*paper, strict=True), "k*", ms=8, label="in the paper, on its 169 tables")
    axis.set_yticks(range(len(models)), [LABELS[model] for model in models])
    axis.invert_yaxis()
    axis.set_xlabel("mean over tables, 95 % over seeds and tables")
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def critical_differences(scores: pd.DataFrame) -> Figure:
    """Demšar's diagram of mean ranks in accuracy on the supervised tables."""
    rows = scores[scores.dataset.eq("comparison")]
    mean_ranks = {LABELS[model]: value for model, value in _by_model(rows, "mean_rank").items()}
    figure, axis = plt.subplots(figsize=(9, 3.6), layout="constrained")
    critical_difference_figure(axis, mean_ranks, float(_by_model(rows, "critical_difference")["all"]))
    return figure


def few_shot(scores: pd.DataFrame, published: Mapping[str, float]) -> Figure:
    """Accuracy on held-out tables by the share of rows that are trained on; the published reading beside it."""
    rows = scores[scores.dataset.eq("few_shot")]
    families = [name for name in ("real", "arbitrary", "shared") if rows.family.eq(name).any()]
    panels = [("accuracy", family) for family in families] + [("published_accuracy", families[0])]
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.3 * len(panels) + 2, 4.4), layout="constrained", sharey=True, squeeze=False
    )
    titles = {"real": "real tables", "arbitrary": "rules of their own", "shared": "one rule for all tables"}
    for axis, (metric, family) in zip(axes[0], panels, strict=True):
        chosen = rows[rows.metric.eq(metric) & rows.family.eq(family)]
        for model, label in LABELS.items():
            means = chosen[chosen.model.eq(model)].groupby("ratio").value.mean()
            if len(means):
                width = 2 if model in ("heavy", "light", "xgboost") else 1
                axis.plot(means.index, means, "o-", ms=4, lw=width, color=COLORS[model], label=label)
        if metric == "published_accuracy":
            _paper_points(axis, published)
        reading = "true labels" if metric == "accuracy" else "published reading"
        axis.set_title(f"{titles[family]}, {reading}", fontsize=10)
        axis.set_xlabel("share of rows trained on")
        axis.grid(alpha=0.25)
    axes[0, 0].set_ylabel("mean accuracy over tables")
    handles, labels = axes[0, -1].get_legend_handles_labels()
    axes[0, -1].legend(handles, labels, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def _paper_points(axis: Axes, published: Mapping[str, float]) -> None:
    points = [label.split("/") for label in published if label.startswith("few_shot/")]
    for number, (_, ratio, model) in enumerate(points):
        value = published[f"few_shot/{ratio}/{model}"]
        label = "in the paper, on its 62 tables" if number == 0 else None
        axis.plot(float(ratio), value, "*", ms=11, mfc=COLORS[model], mec="black", mew=0.6, label=label)


def calibration(scores: pd.DataFrame) -> Figure:
    """How often answers are right by the probability that was written (or given), all tables' test rows together."""
    rows = scores[scores.dataset.eq("calibration")]
    figure, axis = plt.subplots(figsize=(6.6, 4.6), layout="constrained")
    axis.plot([0, 1], [0, 1], color="0.6", lw=1)
    for model in ("heavy", "light", "light_noaug", "light_oof", "xgboost", "ft_transformer", "logistic_regression"):
        chosen = rows[rows.model.eq(model)]
        table = chosen.pivot_table(index=["seed", "bin"], columns="metric", values="value")
        if "bin" not in chosen or table.empty or "confidence" not in table:
            continue
        table = table.dropna(subset=["confidence"]).groupby(level="bin").mean()
        table = table[table.rows >= 10]
        error = _by_model(chosen, "calibration_error")[model]
        label = f"{LABELS[model]} (error {error:.3f})"
        axis.plot(table.confidence, table.share_correct, "o-", ms=4, color=COLORS[model], label=label)
    axis.set_xlabel("probability of the answered class")
    axis.set_ylabel("share of answers that are right")
    axis.set_xlim(0, 1.02)
    axis.set_ylim(0, 1.02)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8)
    return figure


def _by_model(rows: pd.DataFrame, metric: str) -> dict[str, float]:
    return rows[rows.metric.eq(metric)].groupby("model").value.mean().to_dict()
