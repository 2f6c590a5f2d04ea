"""Figures that answer the paper's questions: do regions help, where, how far ahead, and against which controls?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from shared.config import Stage, read_yaml
from shared.files import atomic_path

from .config import STEP_MINUTES, Params
from .data import REGIONS, Prepared

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import NullFormatter

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LABELS = {
    "regt_gcn": "RegT-GCN",
    "regt_gcn_recurrent": "RegT-GCN, recurrent",
    "rant_gcn": "RanT-GCN",
    "t_gcn": "T-GCN",
    "graph_sage": "GraphSAGE",
    "gat": "GAT",
    "stacked_gcn": "Stacked GCN",
    "gconv_lstm": "LTGC (graph-conv. LSTM)",
    "stacked_gru": "Stacked GRU",
    "stid": "STID",
    "stid_broadcast": "STID, misaligned loss",
    "st_norm": "STNorm",
    "st_norm_broadcast": "STNorm, misaligned loss",
    "persistence": "persistence",
    "time_of_day": "time of day",
    "time_of_day_ar1": "time of day + AR(1)",
    "xgboost": "gradient boosting",
}
COLORS = {
    "regt_gcn": "tab:blue",
    "regt_gcn_recurrent": "navy",
    "rant_gcn": "tab:cyan",
    "t_gcn": "tab:red",
    "graph_sage": "tab:purple",
    "gat": "tab:brown",
    "stacked_gcn": "tab:pink",
    "gconv_lstm": "goldenrod",
    "stacked_gru": "yellowgreen",
    "stid": "tab:orange",
    "st_norm": "darkgreen",
    "persistence": "black",
    "time_of_day": "0.6",
    "time_of_day_ar1": "0.4",
    "xgboost": "teal",
}
CONTROL_STYLES = {"persistence": "--", "time_of_day": ":", "time_of_day_ar1": "-.", "xgboost": (0, (4, 1, 1, 1))}
STEPS_PER_WEEK = 7 * 24 * 60 // STEP_MINUTES

Examples = Mapping[tuple[str, str, int], NDArray[np.float32]]


def draw(
    stage: Stage[Params], scores: pd.DataFrame, prepared: Mapping[str, Prepared], examples: Examples
) -> list[Path]:
    """Draw all figures of a profile from its scores and the first seed's forecasts; returns their files."""
    figures = {"error_by_horizon": by_horizon(scores, table_2(stage.folder))}
    if "step" in scores:
        figures["error_by_step"] = by_step(scores)
    if "correlation" in scores:
        figures["regional_correlation"] = by_correlation(scores)
    horizon = max(h for name, _, h in examples if name == "clean")
    stride = stage.params.experiments["clean"].test_stride
    forecasts = {model: values for (name, model, h), values in examples.items() if (name, h) == ("clean", horizon)}
    figures["sites"] = site_map(prepared["clean"], forecasts, horizon, stride)
    figures["week"] = week(prepared["clean"], forecasts, horizon, stride)
    paths = []
    for name, figure in figures.items():
        path = stage.results_dir / f"{name}.png"
        with atomic_path(path) as temporary:
            # No software version inside, so that equal runs give equal files.
            figure.savefig(temporary, dpi=110, bbox_inches="tight", metadata={"Software": None})
        plt.close(figure)
        paths.append(path)
    return paths


def table_2(folder: Path) -> dict[tuple[str, int], float]:
    """The paper's RMSE by model and minutes, as its ledger lists them for claim C1."""
    claims = {claim["id"]: claim for claim in read_yaml(folder / "paper.yaml")["claims"]}
    entries = {}
    for reference in claims["C1"].get("reference", []):
        model, _, minutes = reference["label"].partition("/")
        entries[model, int(minutes.removesuffix("min"))] = reference["value"]
    return entries


def by_horizon(scores: pd.DataFrame, paper: Mapping[tuple[str, int], float]) -> Figure:
    """RMSE over the horizon, mean over seeds with the range of the seeds; in paper units the paper's figures too."""
    titles = {
        "paper_units": "paper units: all steps pooled, snapshots scaled [0, 1]",
        "clean": "clean units: occupancy at the last step",
    }
    split = scores.dataset.str.extract(r"^(?P<experiment>\w+)/(?P<minutes>\d+)min$").assign(value=scores.value)
    chosen = scores.metric.eq("rmse") & split.minutes.notna()
    if "step" in scores:
        chosen &= scores.step.isna()
    table = split[chosen].join(scores[["model", "seed"]]).astype({"minutes": int})
    present = [name for name in titles if name in set(table.experiment)]
    figure, axes = plt.subplots(
        1, len(present), figsize=(6.2 * len(present) + 2, 4.6), layout="constrained", squeeze=False
    )
    for axis, name in zip(axes[0], present, strict=True):
        of_panel = table[table.experiment.eq(name)]
        for model, label in LABELS.items():
            rows = of_panel[of_panel.model.eq(model)]
            if rows.empty:
                continue
            curves = rows.pivot_table(index="minutes", columns="seed", values="value")
            style = CONTROL_STYLES.get(model, "-" if "broadcast" not in model else (0, (1, 1)))
            width = 2.5 if model in ("regt_gcn", "persistence") else 1.2
            color = _color(model)
            axis.plot(
                curves.index,
                curves.mean(axis=1),
                ls=style,
                marker="o",
                ms=3,
                lw=width,
                color=color,
                label=label,
            )
            axis.fill_between(curves.index, curves.min(axis=1), curves.max(axis=1), color=color, alpha=0.12, lw=0)
        if name == "paper_units":
            for number, ((model, minutes), value) in enumerate(paper.items()):
                source = "paper, Table II" if number == 0 else None
                axis.plot(minutes * 1.06, value, "D", ms=5, mfc="none", mew=1.2, color=_color(model), label=source)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.tick_params(axis="y", which="minor", labelsize=8)
        axis.set_xticks(sorted(set(of_panel.minutes)), [str(minutes) for minutes in sorted(set(of_panel.minutes))])
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel("horizon [min]")
        axis.set_ylabel("RMSE on the test windows")
        axis.set_title(titles[name], fontsize=10)
        axis.grid(alpha=0.25)
    _legend(figure)
    return figure


def by_step(scores: pd.DataFrame) -> Figure:
    """RMSE of every step of the longest horizon's networks, mean over seeds."""
    chosen = scores[scores.metric.eq("rmse") & scores.step.notna() & ~scores.dataset.str.startswith("correlation_")]
    datasets = [name for name in dict.fromkeys(chosen.dataset) if not name.startswith("paper_recipe")]
    figure, axes = plt.subplots(
        1, len(datasets), figsize=(6 * len(datasets) + 2, 4.2), layout="constrained", squeeze=False
    )
    for axis, dataset in zip(axes[0], datasets, strict=True):
        of_panel = chosen[chosen.dataset.eq(dataset)]
        for model in (name for name in LABELS if name in set(of_panel.model)):
            curves = of_panel[of_panel.model.eq(model)].pivot_table(index="step", columns="seed", values="value")
            width = 2.5 if model in ("regt_gcn", "persistence") else 1.2
            style = CONTROL_STYLES.get(model, "-" if "broadcast" not in model else (0, (1, 1)))
            minutes = curves.index * STEP_MINUTES
            axis.plot(minutes, curves.mean(axis=1), ls=style, lw=width, color=_color(model), label=LABELS[model])
        axis.set_xlabel("minutes ahead, of the networks that forecast all of them")
        axis.set_ylabel("RMSE of the step")
        axis.set_title(dataset.replace("_", " ").replace("/", ", "), fontsize=10)
        axis.grid(alpha=0.25)
    _legend(figure)
    return figure


def by_correlation(scores: pd.DataFrame) -> Figure:
    """Gain over T-GCN by how much the sites of a region share: with none, regions should not help."""
    chosen = scores[scores.metric.eq("gain_over_t_gcn")]
    figure, axis = plt.subplots(figsize=(6.5, 4), layout="constrained")
    for shift, model in ((-0.008, "regt_gcn"), (0.008, "rant_gcn")):
        rows = chosen[chosen.model.eq(model)]
        if rows.empty:
            continue
        means = rows.groupby("correlation").value.mean()
        axis.plot(rows.correlation + shift, rows.value, "o", ms=5, alpha=0.5, color=_color(model))
        axis.plot(means.index + shift, means, "-", color=_color(model), label=LABELS[model])
    axis.axhline(0, lw=0.8, color="0.5")
    axis.set_xlabel("correlation of the shocks of two sites in a region")
    axis.set_ylabel("RMSE below that of T-GCN [%] (dot: a seed)")
    axis.grid(alpha=0.25)
    axis.legend(fontsize=9)
    return figure


def site_map(prepared: Prepared, forecasts: Mapping[str, NDArray[np.float32]], horizon: int, stride: int) -> Figure:
    """RegT-GCN's error at every site, and how it compares with persistence there; edges as lines, markers by region."""
    windows = prepared.windows("test", horizon, stride)
    truth, seen = windows.targets[:, -1], windows.observed[:, -1]
    rmse = {name: _site_rmse(forecasts[name], truth, seen) for name in ("regt_gcn", "persistence")}
    better = 100 * (1 - rmse["regt_gcn"] / np.maximum(rmse["persistence"], 1e-6))
    minutes = horizon * STEP_MINUTES
    panels = (
        (rmse["regt_gcn"], "viridis", None, f"RMSE of RegT-GCN, {minutes} min ahead"),
        (better, "RdBu", np.percentile(np.abs(better), 90), "RMSE below that of persistence [%]"),
    )
    figure, axes = plt.subplots(1, 2, figsize=(13, 4.6), layout="constrained")
    latitude, longitude = prepared.positions.T
    for axis, (values, colors, limit, title) in zip(axes, panels, strict=True):
        for target, source in np.argwhere(np.triu(np.sum(prepared.graph.regions, axis=0) > 0)):
            axis.plot(longitude[[target, source]], latitude[[target, source]], lw=0.5, color="0.75", zorder=1)
        low, high = (values.min(), values.max()) if limit is None else (-limit, limit)
        for number, marker in enumerate("os^Dv"):
            inside = prepared.graph.region_of_node == number
            points = axis.scatter(
                longitude[inside], latitude[inside], c=values[inside], cmap=colors, marker=marker, s=38,
                edgecolors="black", linewidths=0.4, zorder=2, vmin=low, vmax=high,
            )  # fmt: skip
            axis.annotate(
                REGIONS[number], (longitude[inside].mean(), latitude[inside].max()), xytext=(0, 7),
                textcoords="offset points", ha="center", fontsize=9, fontweight="bold",
            )  # fmt: skip
        figure.colorbar(points, ax=axis, shrink=0.85, extend="neither" if limit is None else "both")
        axis.margins(y=0.15)
        axis.set_aspect(1 / np.cos(np.radians(latitude.mean())))
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("longitude [°]")
        axis.set_ylabel("latitude [°]")
    return figure


def week(prepared: Prepared, forecasts: Mapping[str, NDArray[np.float32]], horizon: int, stride: int) -> Figure:
    """Forecast and observed occupancy for the last week of the test days, at an easy, a middling and a hard site."""
    windows = prepared.windows("test", horizon, stride)
    truth, seen = windows.targets[:, -1], windows.observed[:, -1]
    when = prepared.times[windows.first_targets + horizon - 1]
    order = np.argsort(np.where(seen.mean(axis=0) > 0.9, _site_rmse(forecasts["regt_gcn"], truth, seen), np.inf))
    usable = int((seen.mean(axis=0) > 0.9).sum())
    chosen = order[[usable // 10, usable // 2, max(usable - 1 - usable // 10, 0)]]
    last = slice(-STEPS_PER_WEEK // stride, None)
    figure, axes = plt.subplots(3, 1, figsize=(12, 7), sharex=True, layout="constrained")
    for axis, site in zip(axes, chosen, strict=True):
        observed = np.where(seen[:, site], truth[:, site], np.nan)
        axis.plot(when[last], observed[last], color="black", lw=1.4, label="observed")
        for model in ("persistence", "time_of_day_ar1", "t_gcn", "regt_gcn"):
            if model in forecasts:
                style = CONTROL_STYLES.get(model, "-")
                values = forecasts[model][:, site][last]
                axis.plot(when[last], values, ls=style, lw=1, alpha=0.9, color=_color(model), label=LABELS[model])
        region = REGIONS[prepared.graph.region_of_node[site]]
        axis.set_title(f"{prepared.sites[site]} ({region})", fontsize=9)
        axis.set_ylabel("occupancy")
        axis.grid(alpha=0.25)
    axes[0].legend(fontsize=8, ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1.15))
    axes[-1].set_xlabel(f"time (UTC), forecasts made {horizon * STEP_MINUTES} min before")
    return figure


def _legend(figure: Figure) -> None:
    """One legend for all panels, each line once."""
    handles: dict[str, object] = {}
    for axis in figure.axes:
        handles |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), fontsize=8, loc="outside right upper")


def _site_rmse(forecast: NDArray[np.float32], truth: NDArray[np.float32], seen: NDArray[np.bool_]) -> NDArray:
    squares = np.where(seen, (forecast - truth) ** 2, 0).sum(axis=0)
    return np.sqrt(squares / np.maximum(seen.sum(axis=0), 1))


def _color(model: str) -> object:
    return COLORS.get(model.removesuffix("_broadcast"), "0.5")
