"""Figures that answer the paper's question: does knowing the parameters help, when, and where?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
import pandas as pd
from torch import Tensor

from shared.config import Stage
from shared.files import atomic_path

from . import data

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

LABELS = {
    "fno": "FNO",
    "unet": "U-Net",
    "mpnn": "message passing",
    "cape": "CAPE",
    "conditional": "conditional",
    "two_frames": "two frames",
    "pino": "PINO",
    "pino_official": "PINO, published residual",
    "teacher_forcing": "teacher forcing",
    "autoregressive": "autoregressive",
    "push_forward": "push-forward",
    "linear": "linear schedule",
    "persistence": "persistence",
    "truth": "truth",
}
PARAMETER_LABELS = {
    "advection": "advection speed β (domain lengths per unit time)",
    "burgers": "viscosity ν",
    "navier_stokes": "shear viscosity η",
}
SYMBOLS = {"advection": "β", "burgers": "ν", "navier_stokes": "(η, ζ, M)"}
# The models that answer the question; the curricula are compared in the figure of all models.
MAIN = (
    "fno",
    "fno_conditional",
    "fno_two_frames",
    "fno_pino",
    "fno_cape",
    "unet",
    "unet_cape",
    "fno_pino_official",
    "mpnn",
    "mpnn_cape",
)
# Gray is left to persistence.
COLORS = dict(zip(MAIN, [*plt.cm.tab10.colors[:7], "olive", "teal", "black"], strict=True)) | {"persistence": "0.5"}


def label(name: str) -> str:
    """A model's name as a reader would write it: `fno_cape_push_forward` is "FNO + CAPE, push-forward"."""
    if name in LABELS:
        return LABELS[name]
    base, _, rest = name.partition("_")
    text = LABELS.get(base, base)
    if rest == "cape" or rest.startswith("cape_"):
        text, rest = f"{text} + CAPE", rest.removeprefix("cape").removeprefix("_")
    return f"{text}, {LABELS.get(rest, rest)}" if rest else text


def draw(stage: Stage, scores: pd.DataFrame, examples: Mapping[tuple[str, str, str], Tensor]) -> list[Path]:
    """Draw all figures of a profile from its scores and example rollouts; returns their files."""
    equations = list(stage.params.experiments)
    nrmse = scores[scores.metric.eq("nrmse")]
    figures = {
        "models": all_models(nrmse, equations),
        "error_over_time": over_time(nrmse, equations),
        "error_over_parameter": over_parameter(nrmse, stage, equations),
    }
    for equation in equations:
        figures[f"rollouts_{equation}"] = rollouts(stage, equation, examples)
    paths = []
    for name, figure in figures.items():
        path = stage.results_dir / f"{name}.png"
        with atomic_path(path) as temporary:
            # No software version inside, so that equal runs give equal files.
            figure.savefig(temporary, dpi=110, bbox_inches="tight", metadata={"Software": None})
        plt.close(figure)
        paths.append(path)
    return paths


def all_models(nrmse: pd.DataFrame, equations: Sequence[str]) -> Figure:
    """Every model's error, a dot a seed, at seen, interpolated and extrapolated parameter values."""
    overall = nrmse[nrmse.time.isna() & nrmse.parameter.isna()]
    names = {eq: list(dict.fromkeys(overall[overall.dataset.str.startswith(f"{eq}/")].model)) for eq in equations}
    height = sum(0.28 * len(of_equation) + 0.9 for of_equation in names.values())
    ratios = [len(of_equation) + 2 for of_equation in names.values()]
    figure, axes = plt.subplots(
        len(equations), 3, figsize=(12, height), squeeze=False, sharex=True, height_ratios=ratios, layout="constrained"
    )
    for row, equation in zip(axes, equations, strict=True):
        for axis, regime in zip(row, ("seen", "interpolated", "extrapolated"), strict=True):
            of_panel = overall[overall.dataset.eq(f"{equation}/{regime}")]
            for position, name in enumerate(names[equation]):
                values = of_panel[of_panel.model.eq(name)].value
                axis.plot(values, [position] * len(values), "o", ms=4, alpha=0.6, color=color(name))
                axis.plot(values.mean(), position, "|", ms=14, mew=2, color="black")
            axis.set_xscale("log")
            _plain_ticks(axis.xaxis)
            axis.set_yticks(range(len(names[equation])), [label(name) for name in names[equation]])
            axis.set_ylim(len(names[equation]) - 0.4, -0.6)
            axis.set_title(f"{equation.replace('_', '–')}, {regime}", fontsize=10)
            axis.grid(axis="x", which="both", alpha=0.25)
            if axis is not row[0]:
                axis.tick_params(labelleft=False)
    for axis in axes[-1]:
        axis.set_xlabel("nRMSE of the rollout (dot: a seed, bar: mean)")
    return figure


def over_time(nrmse: pd.DataFrame, equations: Sequence[str]) -> Figure:
    """Error as the rollout goes on: mean over seeds, band from the best to the worst seed."""
    return _curves(nrmse, equations, "time", dict.fromkeys(equations, "time t"))


def over_parameter(nrmse: pd.DataFrame, stage: Stage, equations: Sequence[str]) -> Figure:
    """Error over the value of the equation's parameter, the values of the training set marked."""
    joined = nrmse.assign(dataset=nrmse.dataset.str.split("/").str[0] + "/all")
    figure = _curves(joined, equations, "parameter", PARAMETER_LABELS, regimes=("all",), markers=True)
    for axis, equation in zip(figure.axes, equations, strict=True):
        settings = stage.params.equations[equation]
        columns = np.array(settings.train_parameters).T
        varied = int(np.argmax([column.std() for column in columns]))
        axis.set_xscale("log")
        _plain_ticks(axis.xaxis)
        for index, value in enumerate(sorted(set(columns[varied]))):
            axis.axvline(value, color="0.6", lw=0.8, ls=":", zorder=0, label="training values" if index == 0 else None)
        axis.set_title(equation.replace("_", "–"), fontsize=10)
    _legend(figure)
    return figure


def _curves(
    nrmse: pd.DataFrame,
    equations: Sequence[str],
    column: str,
    xlabels: Mapping[str, str],
    regimes: Sequence[str] = ("seen", "interpolated", "extrapolated"),
    markers: bool = False,
) -> Figure:
    shape = (len(equations), len(regimes)) if len(regimes) > 1 else (1, len(equations))
    size = (4 * shape[1], 3.1 * shape[0])
    figure, axes = plt.subplots(*shape, figsize=size, squeeze=False, sharey="row", layout="constrained")
    panels = [(equation, regime) for equation in equations for regime in regimes]
    for axis, (equation, regime) in zip(axes.flat, panels, strict=True):
        rows = nrmse[nrmse.dataset.eq(f"{equation}/{regime}") & nrmse[column].notna()]
        for name in (*MAIN, "persistence"):
            of_model = rows[rows.model.eq(name)]
            if of_model.empty:
                continue
            grouped = of_model.groupby(column).value
            x, mean = np.array(list(grouped.groups)), grouped.mean().to_numpy()
            axis.fill_between(x, grouped.min(), grouped.max(), color=color(name), alpha=0.15, lw=0)
            style = {"ls": "--"} if name == "persistence" else {"marker": "o" if markers else "", "ms": 3}
            axis.plot(x, mean, color=color(name), label=label(name), lw=1.5, **style)
        axis.set_yscale("log")
        axis.set_xlabel(xlabels[equation])
        axis.grid(which="both", alpha=0.2)
        axis.set_title(f"{equation.replace('_', '–')}, {regime}", fontsize=10)
    for row in axes:
        row[0].set_ylabel("nRMSE")
        # Persistence is exact after a full period and far off elsewhere: the models set the scale.
        lines = [line for axis in row for line in axis.lines if line.get_label() in map(label, MAIN)]
        heights = np.concatenate([line.get_ydata() for line in lines])
        row[0].set_ylim(0.8 * heights.min(), 1.25 * heights.max())
        _plain_ticks(row[0].yaxis)
    _legend(figure)
    return figure


def _plain_ticks(axis: Axis) -> None:
    """Ticks of a logarithmic axis written as plain numbers: powers of ten and, if it spans few, 2 and 5 times them."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _legend(figure: Figure) -> None:
    """One legend beside all panels, an entry for each label that any of them has."""
    for old in figure.legends:
        old.remove()
    entries = {}
    for axis in figure.axes:
        for handle, text in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(text, handle)
    figure.legend(entries.values(), entries.keys(), loc="outside right upper", fontsize=8)


def rollouts(stage: Stage, equation: str, examples: Mapping[tuple[str, str, str], Tensor]) -> Figure:
    """One sample of a seen, an interpolated and an extrapolated parameter value: truth and rollouts beside it."""
    columns = list(_sample_of_each_regime(stage, equation))
    names = ["truth"] + [name for name in MAIN if (equation, "test", name) in examples]
    size = (2.1 * len(names), 2.1 * len(columns))
    figure, axes = plt.subplots(len(columns), len(names), figsize=size, squeeze=False, layout="constrained")
    for row, (split, index, title, times) in zip(axes, columns, strict=True):
        truth = examples[equation, split, "truth"][index, :, 0].numpy()
        low, high = truth.min(), truth.max()
        image = None
        for axis, name in zip(row, names, strict=True):
            field = examples[equation, split, name][index, :, 0].numpy()
            image = _show(axis, field, times, low, high)
            error = np.linalg.norm(field - truth) / np.linalg.norm(truth)
            axis.set_title(label(name) if name == "truth" else f"{label(name)}\nerror {100 * error:.0f} %", fontsize=8)
        row[0].set_ylabel(f"{title}\n{'time' if truth.ndim == 2 else 'y'}", fontsize=8)
        figure.colorbar(image, ax=row, shrink=0.8, pad=0.01)
    for axis in axes[-1]:
        axis.set_xlabel("x", fontsize=8)
    return figure


def _sample_of_each_regime(stage: Stage, equation: str) -> Any:
    """(split, index, title, times) of the most varied sample of the middle parameter value of each regime."""
    for regime, split in (("seen", "test"), ("interpolated", "unseen"), ("extrapolated", "unseen")):
        if split == "unseen" and not stage.params.equations[equation].unseen_parameters:
            continue
        test_set = data.load(stage.data_dir, equation, split)
        values = np.unique(test_set.parameters[test_set.regime == regime], axis=0)
        if not len(values):
            continue
        chosen = values[len(values) // 2]
        candidates = np.flatnonzero((test_set.parameters == chosen).all(axis=1))
        index = int(max(candidates, key=lambda candidate: test_set.u[candidate, 0].std()))
        text = ", ".join(f"{value:g}" for value in chosen)
        yield split, index, f"{regime}, {SYMBOLS[equation]} = {text}", test_set.times


def _show(axis: Axes, field: np.ndarray, times: np.ndarray, low: float, high: float) -> Any:
    """A field over space and time, or the last frame of a field over two dimensions."""
    axis.tick_params(labelsize=6)
    if field.ndim == 2:
        extent = (0, 1, float(times[0]), float(times[-1]))
        return axis.imshow(
            field, origin="lower", aspect="auto", extent=extent, vmin=low, vmax=high, interpolation="nearest"
        )
    return axis.imshow(field[-1].T, origin="lower", extent=(0, 1, 0, 1), vmin=low, vmax=high)


def color(name: str) -> Any:
    """One color a model; the variants of a curriculum share that of CAPE."""
    return COLORS.get(name, COLORS["fno_cape"])
