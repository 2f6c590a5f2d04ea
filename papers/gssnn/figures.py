"""Figures: which graphs are best, what training accuracy tells, how the library grows, what accuracy varies with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
import pandas as pd

from shared.config import Stage, read_yaml
from shared.evaluation.figures import save_figures

from .analysis import COMPONENTS
from .config import Params
from .symbolic.interpreter import Graph

matplotlib.use("Agg")
import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABELS = {
    "ssn": "many graphs (G-SSNN)",
    "one_graph": "one graph, many seeds",
    "baseline": "baseline, many seeds",
}
COLORS = {"ssn": "tab:blue", "one_graph": "tab:orange", "baseline": "0.55"}
LINES = {"majority": (":", "majority"), "layout": ("--", "table of layouts")}
COMPONENT_LABELS = {"graph": "graph", "training_set": "training set", "interaction": "graph × set", "seed": "seed"}
# Mean (training, evaluation) accuracy of the paper's population in iteration 5 and of its baseline, from its logs.
PAPER_MEANS = {"ssn": (0.789, 0.629), "baseline": (0.949, 0.671)}
PAPER_LIBRARY = (10, 11, 14, 17, 20, 23)
# As in the paper's plots.
MOVING_AVERAGE = 6
SHOWN_GRAPHS = 4


def draw(stage: Stage[Params], scores: pd.DataFrame, graphs: Mapping[str, Graph]) -> list[Path]:
    """Draw all figures of a profile from its scores; returns their files."""
    dataset = f"{stage.params.populations['ssn'].epochs[-1]}_epochs"
    figures = {
        "graphs": best_and_worst(scores, graphs, dataset),
        "train_against_eval": train_against_eval(scores),
        "ranks": by_rank(scores, reference(stage.folder)),
        "variance": variance(scores),
    }
    if "evolution" in set(scores.dataset):
        figures["evolution"] = evolution(scores)
    return save_figures(stage.results_dir, figures)


def reference(folder: Path) -> dict[str, float]:
    """The paper's figures by label, as its ledger lists them."""
    claims = read_yaml(folder / "paper.yaml")["claims"]
    return {entry["label"]: entry["value"] for claim in claims for entry in claim.get("reference", [])}


def networks_of(scores: pd.DataFrame, dataset: str, model: str) -> pd.DataFrame:
    """A row a network: graph, training set (`seed`), replicate, `train_accuracy`, `eval_accuracy`."""
    chosen = scores[(scores.dataset == dataset) & (scores.model == model)]
    chosen = chosen[chosen.metric.isin(["train_accuracy", "eval_accuracy"]) & chosen.replicate.notna()]
    wide = chosen.assign(graph=chosen.graph.fillna("")).pivot_table(
        index=["graph", "seed", "replicate"], columns="metric", values="value"
    )
    return wide.reset_index()


def populations_datasets(scores: pd.DataFrame) -> list[str]:
    """The data sets that population `ssn` was measured in, by epochs."""
    names = scores[(scores.model == "ssn") & (scores.metric == "eval_accuracy")].dataset.unique()
    return sorted(names, key=lambda name: int(name.partition("_")[0]))


def best_and_worst(scores: pd.DataFrame, graphs: Mapping[str, Graph], dataset: str) -> Figure:
    """The graphs with the highest and the lowest mean evaluation accuracy, each with the range over its networks."""
    import networkx

    networks = networks_of(scores, dataset, "ssn")
    table = networks.groupby("graph")[["train_accuracy", "eval_accuracy"]].agg(["mean", "min", "max"])
    ranked = table.sort_values([("eval_accuracy", "mean")], ascending=False, kind="stable")
    count = max(1, min(SHOWN_GRAPHS, len(ranked) // 2))
    rows = {"best": ranked.head(count), "worst": ranked.tail(count)}
    figure, axes = plt.subplots(2, count, figsize=(3.1 * count, 6.4), layout="constrained", squeeze=False)
    for (title, of_row), line in zip(rows.items(), axes, strict=True):
        for axis, (name, row) in zip(line, of_row.iterrows(), strict=True):
            drawn = networkx.Graph([(a, b) for a, b, _, _ in graphs[str(name)].edges])
            networkx.draw_networkx(
                drawn,
                networkx.spring_layout(drawn, seed=0, iterations=200),
                ax=axis,
                node_size=170,
                node_color="tab:green" if title == "best" else "tab:red",
                edge_color="0.4",
                font_size=7,
                font_color="white",
            )
            held_out = row["eval_accuracy"]
            axis.set_title(
                f"eval {held_out['mean']:.3f} ({held_out['min']:.2f}–{held_out['max']:.2f})\n"
                f"train {row['train_accuracy']['mean']:.3f}",
                fontsize=9,
            )
            axis.axis("off")
        line[0].text(-0.02, 0.5, title, transform=line[0].transAxes, rotation=90, va="center", ha="right")
    networks_each = len(networks) // max(len(table), 1)
    figure.suptitle(
        f"Graphs by mean evaluation accuracy after {dataset.replace('_', ' ')}; in brackets the range over a graph's "
        f"{networks_each} networks",
        fontsize=10,
    )
    return figure


def train_against_eval(scores: pd.DataFrame) -> Figure:
    """Training against evaluation accuracy of all networks, and what the controls reach."""
    datasets = populations_datasets(scores)
    figure, axes = plt.subplots(
        1, len(datasets), figsize=(5.6 * len(datasets), 4.8), layout="constrained", squeeze=False, sharey=True
    )
    for axis, dataset in zip(axes[0], datasets, strict=True):
        for model in ("baseline", "one_graph", "ssn"):
            networks = networks_of(scores, dataset, model)
            mean_r = _overall(scores, dataset, model, "train_eval_correlation").mean()
            axis.scatter(
                networks.train_accuracy,
                networks.eval_accuracy,
                s=18,
                alpha=0.65,
                color=COLORS[model],
                label=f"{LABELS[model]}: r = {mean_r:.2f}",
            )
        for model, (train, held_out) in PAPER_MEANS.items():
            axis.plot(train, held_out, "D", ms=9, mfc="none", mew=1.8, color=COLORS[model], label=f"paper, {model}")
        _control_lines(axis, scores, dataset)
        axis.set_title(dataset.replace("_", " "))
        axis.set_xlabel("training accuracy")
    axes[0, 0].set_ylabel("evaluation accuracy")
    axes[0, -1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.suptitle("Every network of every training set; r is a mean over training sets", fontsize=10)
    return figure


def by_rank(scores: pd.DataFrame, paper: Mapping[str, float]) -> Figure:
    """The paper's plot: evaluation accuracy of the networks ranked by training accuracy, moving average of 6.

    Ranks are relative to a population's size. Dashes are the paper's means of its upper and its lower half.
    """
    datasets = populations_datasets(scores)
    figure, axes = plt.subplots(
        1, len(datasets), figsize=(5.6 * len(datasets), 4.4), layout="constrained", squeeze=False, sharey=True
    )
    for axis, dataset in zip(axes[0], datasets, strict=True):
        for model in ("baseline", "one_graph", "ssn"):
            networks = networks_of(scores, dataset, model)
            # Ranked within each training set, then put together by relative rank.
            rank = networks.groupby("seed").train_accuracy.rank(ascending=False, method="first")
            share = (rank - 0.5) / networks.groupby("seed").train_accuracy.transform("size")
            order = np.argsort(share.to_numpy(), kind="stable")
            x, y = share.to_numpy()[order], networks.eval_accuracy.to_numpy()[order]
            axis.scatter(x, y, s=10, alpha=0.35, color=COLORS[model])
            # As wide relative to a small population as its curve allows.
            window = max(1, min(MOVING_AVERAGE * networks.seed.nunique(), len(y) // 3))
            kernel = np.ones(window) / window
            smooth = (np.convolve(x, kernel, "valid"), np.convolve(y, kernel, "valid"))
            axis.plot(*smooth, color=COLORS[model], lw=2, label=LABELS[model])
            for half, ends in (("top_half_eval", (0, 0.5)), ("bottom_half_eval", (0.5, 1))):
                if f"{half}/{model}" in paper:
                    value = paper[f"{half}/{model}"]
                    label = f"paper, {model}" if half == "top_half_eval" else None
                    axis.plot(ends, [value, value], ls=(0, (2, 1.5)), lw=1.6, color=COLORS[model], label=label)
        _control_lines(axis, scores, dataset)
        axis.set_title(dataset.replace("_", " "))
        axis.set_xlabel("relative rank by training accuracy (best first)")
    axes[0, 0].set_ylabel("evaluation accuracy")
    axes[0, -1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def variance(scores: pd.DataFrame) -> Figure:
    """Standard deviations over graphs, over seeds of one graph and of the baseline; and shares of the variance."""
    datasets = populations_datasets(scores)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11.5, 4.2), layout="constrained")
    width = 0.8 / len(datasets)
    models = ("ssn", "one_graph", "baseline")
    for number, dataset in enumerate(datasets):
        shade = 0.5 + 0.5 * (number + 1) / len(datasets)
        places = np.arange(len(models)) + (number - (len(datasets) - 1) / 2) * width
        values = [_overall(scores, dataset, model, "eval_sd") for model in models]
        colors = [COLORS[model] for model in models]
        heights = [value.mean() for value in values]
        left.bar(places, heights, width * 0.92, color=colors, alpha=shade, label=dataset.replace("_", " "))
        for place, value in zip(places, values, strict=True):
            left.plot([place] * len(value), value, "k.", ms=5)
        if "share_graph" in set(scores.metric):
            _shares(right, scores, dataset, number, len(datasets), shade)
    left.set_xticks(range(len(models)), [LABELS[model] for model in models], fontsize=8)
    left.set_ylabel("sd of evaluation accuracy (dots: training sets)")
    for model, value in (("ssn", 0.069), ("baseline", 0.022)):
        place = models.index(model)
        left.plot([place - 0.42, place + 0.42], [value] * 2, color="black", ls=(0, (2, 1.5)), lw=1.4)
    left.plot([], [], color="black", ls=(0, (2, 1.5)), label="paper")
    left.set_ylim(bottom=0)
    left.legend(fontsize=8)
    right.set_ylabel("share of the variance")
    right.set_title("What a G-SSNN's evaluation accuracy varies with (95 %)", fontsize=10)
    right.set_ylim(0, 1.02)
    return figure


def _shares(axis: Axes, scores: pd.DataFrame, dataset: str, number: int, count: int, shade: float) -> None:
    places = np.arange(len(COMPONENTS)) + (number - (count - 1) / 2) * 0.8 / count
    rows = scores[(scores.dataset == dataset) & (scores.model == "ssn")]
    for place, name in zip(places, COMPONENTS, strict=True):
        of_component = rows[rows.metric == f"share_{name}"]
        ends = of_component.bound.fillna("")
        value, low, high = (float(of_component.value[ends == end].iloc[0]) for end in ("", "low", "high"))
        axis.bar(place, value, 0.8 / count * 0.92, color="tab:blue", alpha=shade)
        axis.plot([place, place], [low, high], color="black", lw=1.3)
    axis.set_xticks(range(len(COMPONENTS)), [COMPONENT_LABELS[name] for name in COMPONENTS])


def evolution(scores: pd.DataFrame) -> Figure:
    """Growth of the library and of the population, and accuracies of the populations by iteration."""
    rows = scores[scores.dataset == "evolution"]
    figure, (first, second, third) = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    for axis, metric in ((first, "library_size"), (second, "population")):
        of_metric = rows[rows.metric == metric]
        for seed, curve in of_metric.groupby("seed"):
            axis.plot(curve.iteration, curve.value, "o-", alpha=0.7, label=f"evolution {seed}")
        axis.set_xlabel("iterations done")
        axis.xaxis.get_major_locator().set_params(integer=True)
    first.plot(range(len(PAPER_LIBRARY)), PAPER_LIBRARY, "D--", color="black", mfc="none", label="paper")
    first.set_ylabel("primitives in the library")
    first.legend(fontsize=8)
    second.set_ylabel("programs in the population")
    trained = rows[rows.metric.isin(["train_accuracy", "eval_accuracy"])].pivot_table(
        index=["seed", "iteration", "graph"], columns="metric", values="value"
    )
    iterations = sorted(set(trained.index.get_level_values("iteration")))
    colors = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(iterations)))
    for color, iteration in zip(colors, iterations, strict=True):
        of_iteration: Any = trained.xs(iteration, level="iteration")
        third.scatter(
            of_iteration.train_accuracy,
            of_iteration.eval_accuracy,
            s=20,
            alpha=0.8,
            color=color,
            label=f"iteration {iteration:.0f}",
        )
    third.set_xlabel("training accuracy")
    third.set_ylabel("evaluation accuracy")
    third.legend(fontsize=8)
    return figure


def _overall(scores: pd.DataFrame, dataset: str, model: str, metric: str) -> pd.Series:
    return scores[(scores.dataset == dataset) & (scores.model == model) & (scores.metric == metric)].value


def _control_lines(axis: Axes, scores: pd.DataFrame, dataset: str) -> None:
    for model, (style, label) in LINES.items():
        axis.axhline(
            _overall(scores, dataset, model, "eval_accuracy").mean(), color="black", lw=1, ls=style, label=label
        )
