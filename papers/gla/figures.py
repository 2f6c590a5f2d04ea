"""Figures that answer the paper's questions: does the gate matter, does it reach beyond the context, at what cost?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import pandas as pd

from shared.config import Stage, read_yaml
from shared.files import atomic_path

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, NullFormatter

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABELS = {
    "transformer": "Transformer",
    "retnet": "RetNet",
    "mamba": "Mamba",
    "hyena": "Hyena",
    "rwkv4": "RWKV-4",
    "gla": "GLA",
    "gla_8_heads": "GLA, 8 heads",
    "gla_1_head": "GLA, 1 head",
    "gla_scalar": "GLA, scalar gate",
    "gla_constant": "GLA, RetNet's decay",
    "gla_no_gate": "GLA, no gate",
    "gla_long": "GLA, long context",
    "gla_truncated": "GLA, truncated backpropagation",
    "bigram": "bigrams, no network",
    "chance": "guessing",
    "attention": "softmax attention (SDPA)",
    "linear_attention": "linear attention, chunkwise",
    "linear_attention_pytorch": "linear attention, chunkwise in PyTorch",
    "gla_recurrent": "GLA, step by step",
}
MARKERS = {"gla_recurrent": "s", "linear_attention_pytorch": "s"}
COLORS = dict(
    zip(
        ("gla", "transformer", "retnet", "mamba", "gla_scalar", "gla_constant", "gla_no_gate", "gla_long"),
        plt.cm.tab10.colors,
        strict=False,
    )
) | {
    "gla_truncated": "olive",
    "gla_8_heads": "navy",
    "gla_1_head": "steelblue",
    "hyena": "teal",
    "rwkv4": "purple",
    "bigram": "0.5",
    "chance": "0.5",
    "attention": plt.cm.tab10.colors[1],
    "linear_attention": plt.cm.tab10.colors[6],
    "linear_attention_pytorch": "0.5",
    "gla_recurrent": "navy",
}
# In the order of the paper's Table 4, best first.
ABLATIONS = ("gla_1_head", "gla", "gla_8_heads", "gla_scalar", "gla_constant", "gla_no_gate")
# Those whose loss is followed by position.
FOLLOWED = ("transformer", "retnet", "mamba", "gla", "gla_long", "gla_truncated")


def draw(stage: Stage, scores: pd.DataFrame, costs: pd.DataFrame) -> list[Path]:
    """Draw all figures of a profile from its scores and costs; returns their files."""
    figures = {
        "language": language(scores, table_4(stage.folder)),
        "position": by_position(scores, stage.params.language.context),
        "mqar": recall(scores),
        "speed": speed(costs),
    }
    paths = []
    for name, figure in figures.items():
        path = stage.results_dir / f"{name}.png"
        with atomic_path(path) as temporary:
            # No software version inside, so that equal runs give equal files.
            figure.savefig(temporary, dpi=110, bbox_inches="tight", metadata={"Software": None})
        plt.close(figure)
        paths.append(path)
    return paths


def table_4(folder: Path) -> dict[str, float]:
    """The paper's training perplexities of the ablations, as its ledger lists them."""
    claims = read_yaml(folder / "paper.yaml")["claims"]
    return {entry["label"]: entry["value"] for claim in claims for entry in claim.get("reference", [])}


def language(scores: pd.DataFrame, paper: dict[str, float]) -> Figure:
    """Bits per character of all arms, a dot a seed; beside it the ablations relative to GLA, here and in the paper."""
    chosen = scores[scores.metric.eq("bits_per_character") & scores.dataset.eq("language")]
    arms = sorted(set(chosen.model), key=lambda arm: chosen[chosen.model.eq(arm)].value.mean())
    ablations = [arm for arm in ABLATIONS if arm in arms and arm in paper]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 0.32 * len(arms) + 1.2), layout="constrained")
    _dots(left, chosen, arms)
    left.set_xlabel("test loss [bits per character] (dot: a seed, bar: mean)")

    means = chosen.groupby("model").value.mean()
    for position, arm in enumerate(ablations):
        theirs = 100 * (math.log(paper[arm]) / math.log(paper["gla"]) - 1)
        ours = 100 * (chosen[chosen.model.eq(arm)].set_index("seed").value / means["gla"] - 1)
        right.plot(ours, [position - 0.12] * len(ours), "o", ms=4, alpha=0.6, color=COLORS[arm])
        right.plot(ours.mean(), position - 0.12, "|", ms=14, mew=2, color="black", label="here" * (position == 0))
        right.plot(theirs, position + 0.16, "D", ms=5, color="0.4", label="paper, Table 4 (340M)" * (position == 0))
    right.axvline(0, lw=0.8, color="0.6", zorder=0)
    _rows(right, ablations)
    right.set_xlabel("more bits than GLA with 4 heads [%]")
    right.legend(fontsize=8)
    return figure


def by_position(scores: pd.DataFrame, context: int) -> Figure:
    """Loss in ranges of positions that double, mean over seeds, band from the best to the worst seed."""
    chosen = scores[scores.metric.eq("bits_per_character") & scores.position.notna()]
    arms = [
        arm
        for arm in ("transformer", "retnet", "mamba", "gla", "gla_long", "gla_truncated")
        if arm in set(chosen.model)
    ]
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for arm in arms:
        curves = chosen[chosen.model.eq(arm)].pivot_table(index="position", columns="seed", values="value")
        style = "--" if arm in ("gla_long", "gla_truncated") else "-"
        axis.plot(curves.index, curves.mean(axis=1), f"o{style}", ms=3, color=COLORS[arm], label=LABELS[arm])
        axis.fill_between(curves.index, curves.min(axis=1), curves.max(axis=1), color=COLORS[arm], alpha=0.15, lw=0)
    axis.axvline(context, lw=0.8, ls=":", color="0.4", label=f"context of the training ({context})")
    axis.set_xscale("log", base=2)
    _plain(axis, "x")
    axis.set_xlabel("position [tokens], end of a range that begins at half of it")
    axis.set_ylabel("test loss [bits per character]")
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def recall(scores: pd.DataFrame) -> Figure:
    """Accuracy in associative recall, a dot a seed."""
    chosen = scores[scores.metric.eq("accuracy") & scores.dataset.eq("mqar")]
    arms = sorted(set(chosen.model) - {"chance"}, key=lambda arm: -chosen[chosen.model.eq(arm)].value.mean())
    figure, axis = plt.subplots(figsize=(7, 0.35 * len(arms) + 1.1), layout="constrained")
    _dots(axis, chosen, arms)
    axis.axvline(chosen[chosen.model.eq("chance")].value.mean(), ls=":", color="0.5", label=LABELS["chance"])
    axis.set_xlim(-0.02, 1.02)
    axis.set_xlabel("accuracy of the answers in MQAR (dot: a seed, bar: mean)")
    axis.legend(fontsize=8)
    return figure


def speed(costs: pd.DataFrame) -> Figure:
    """Time over length, of the operators and of a training step: median, band from the fastest to the slowest."""
    panels = {
        "operator/forward": "operator, forward",
        "operator/forward+backward": "operator, forward and backward",
        "training_step": "training step of models, equal tokens a step",
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(14, 4), layout="constrained")
    times = costs[costs.metric.eq("milliseconds")]
    for axis, (dataset, title) in zip(axes, panels.items(), strict=True):
        of_panel = times[times.dataset.eq(dataset)]
        for arm in dict.fromkeys(of_panel.model):
            table = of_panel[of_panel.model.eq(arm)].pivot_table(index="length", columns="seed", values="value")
            marker = MARKERS.get(arm, "o")
            axis.plot(table.index, table.median(axis=1), f"{marker}-", ms=3, color=COLORS[arm], label=LABELS[arm])
            axis.fill_between(table.index, table.min(axis=1), table.max(axis=1), color=COLORS[arm], alpha=0.15, lw=0)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        _plain(axis, "x")
        _plain(axis, "y")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("length of the sequences [tokens]")
        axis.set_ylabel("time [ms]")
        axis.grid(which="both", alpha=0.25)
        axis.legend(fontsize=8)
    return figure


def _dots(axis: Axes, rows: pd.DataFrame, arms: Sequence[str]) -> None:
    for position, arm in enumerate(arms):
        values = rows[rows.model.eq(arm)].value
        axis.plot(values, [position] * len(values), "o", ms=4, alpha=0.6, color=COLORS[arm])
        axis.plot(values.mean(), position, "|", ms=14, mew=2, color="black")
    _rows(axis, arms)


def _rows(axis: Axes, arms: Sequence[str]) -> None:
    axis.set_yticks(range(len(arms)), [LABELS[arm] for arm in arms])
    axis.set_ylim(len(arms) - 0.4, -0.6)
    axis.grid(axis="x", alpha=0.25)


def _plain(axis: Axes, which: str) -> None:
    """Numbers as they are said, instead of powers; those between powers of ten only where there are few of these."""
    chosen: Any = getattr(axis, f"{which}axis")
    numbers = FuncFormatter(lambda value, _: f"{value:g}")
    low, high = chosen.get_view_interval()
    chosen.set_major_formatter(numbers)
    chosen.set_minor_formatter(numbers if which == "y" and high < 10 * low else NullFormatter())
    axis.tick_params(axis=which, which="minor", labelsize=7)
