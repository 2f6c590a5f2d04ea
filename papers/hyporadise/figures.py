"""Figures: word error rates by system beside the paper's, words repaired against words broken, and three lists."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
import pandas as pd

from shared.config import Stage, read_yaml
from shared.evaluation.figures import save_figures
from shared.evaluation.rover import confusion_network
from shared.evaluation.statistics import bootstrap_interval

from .config import Params

matplotlib.use("Agg")
import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SYSTEMS = {
    "one_best": "first hypothesis",
    "rover": "word voting (ROVER)",
    "lm_rank_trigram": "re-ranked, trigram",
    "lm_rank_transformer": "re-ranked, Transformer",
    "lm_full": "language model, all weights",
    "lm_lora": "language model, low rank",
    "lm_lora_1best": "the same, first hypothesis only",
    "pointer_generator_1best": "pointer-generator, first only",
    "pointer_generator_no_copy": "encoder–decoder, no pointer",
    "pointer_generator": "pointer-generator",
}
ORACLES = {"oracle_nbest": ("best of each list", "tab:orange"), "oracle_compositional": ("words of all", "tab:green")}
PUBLISHED = {
    "one_best": ("first hypothesis", "0.6"),
    "lm_rank": ("re-ranked", "tab:purple"),
    "oracle_nbest": ("best of each list", "tab:orange"),
    "best_lora": ("best low-rank model", "tab:blue"),
    "oracle_compositional": ("words of all", "tab:green"),
}


def draw(stage: Stage[Params], scores: pd.DataFrame, examples: list[dict[str, Any]]) -> list[Path]:
    """Draw all figures of a profile from its scores; returns their files."""
    domains = [name for name in stage.params.domains if scores.dataset.eq(name).any()]
    figures = {"word_error_rates": by_system(scores, domains, references(stage.folder))}
    if scores.metric.eq("repaired").any():
        figures["repaired_and_broken"] = repaired_and_broken(scores, domains)
    if examples:
        figures["examples"] = alignments(examples)
    return save_figures(stage.results_dir, figures)


def references(folder: Path) -> dict[str, dict[str, float]]:
    """The paper's word error rates by domain and system, from its ledger."""
    entries: dict[str, dict[str, float]] = {}
    for claim in read_yaml(folder / "paper.yaml")["claims"]:
        for entry in claim.get("reference", ()):
            domain, _, system = entry["label"].partition("/")
            entries.setdefault(domain, {})[system] = entry["value"]
    return entries


def by_system(scores: pd.DataFrame, domains: list[str], published: dict[str, dict[str, float]]) -> Figure:
    """Word error rates with 95 % intervals over seeds and utterances, oracles as lines; the paper's figures beside."""
    items = scores[scores.metric.eq("wer")]
    systems = [name for name in SYSTEMS if items.model.eq(name).any()]
    systems += sorted(set(items.model) - set(SYSTEMS) - set(ORACLES))
    columns = len(domains) + 1
    figure, axes = plt.subplots(
        1, columns, figsize=(3.4 * len(domains) + 4.6, 0.4 * len(systems) + 1.8), layout="constrained", squeeze=False
    )
    for axis, domain in zip(axes[0], domains, strict=False):
        rows = items[items.dataset.eq(domain)]
        for place, name in enumerate(systems):
            table = rows[rows.model.eq(name)].pivot_table(index="seed", columns="item", values="value")
            if table.size:
                interval = bootstrap_interval(table.to_numpy(), num_resamples=1000)
                color = "black" if name in ("one_best", "rover") or name.startswith("lm_rank") else "tab:blue"
                errors = [[interval.estimate - interval.low], [interval.high - interval.estimate]]
                axis.errorbar(interval.estimate, place, xerr=errors, fmt="o", ms=5, capsize=2, lw=1, color=color)
        for name, (label, color) in ORACLES.items():
            axis.axvline(rows[rows.model.eq(name)].value.mean(), color=color, ls="--", lw=1.2, label=label)
        axis.set_yticks(
            range(len(systems)), [SYSTEMS.get(name, name) for name in systems] if axis is axes[0, 0] else []
        )
        axis.set_ylim(-0.6, len(systems) - 0.4)
        axis.set_xlim(left=0)
        axis.set_xlabel("word error rate [%]")
        axis.set_title(domain.replace("_", " "), fontsize=10)
        axis.grid(axis="x", alpha=0.25)
    axes[0, 0].legend(fontsize=7, loc="upper right")
    _published(axes[0, -1], published)
    return figure


def _published(axis: Axes, published: dict[str, dict[str, float]]) -> None:
    for name, (label, color) in PUBLISHED.items():
        points = [(values[name], place) for place, values in enumerate(published.values()) if name in values]
        axis.plot(*zip(*points, strict=True), "o", ms=5, color=color, label=label)
    axis.set_yticks(range(len(published)), [name.replace("_", " ") for name in published], fontsize=8)
    axis.set_xlim(left=0)
    axis.set_xlabel("word error rate [%]")
    axis.set_title("the paper's figures", fontsize=10)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=7)


def repaired_and_broken(scores: pd.DataFrame, domains: list[str]) -> Figure:
    """Of all reference words, those that a model repaired in the first hypothesis against those that it broke."""
    figure, axes = plt.subplots(1, len(domains), figsize=(4.4 * len(domains), 4.0), layout="constrained", squeeze=False)
    for axis, domain in zip(axes[0], domains, strict=True):
        rows = scores[scores.dataset.eq(domain)]
        table = rows[rows.metric.isin(["repaired", "broken"])].pivot_table(
            index=["model", "seed"], columns="metric", values="value"
        )
        for name, points in table.groupby(level="model"):
            axis.plot(points["broken"], points["repaired"], "o", ms=5, label=SYSTEMS.get(str(name), str(name)))
        limit = 1.05 * max(float(table.to_numpy().max(initial=0)), 0.1)
        axis.plot([0, limit], [0, limit], color="0.6", lw=0.8, ls="--")
        axis.set_xlabel("broken [% of words]")
        axis.set_ylabel("repaired [% of words]")
        axis.set_title(domain.replace("_", " "), fontsize=10)
        axis.grid(alpha=0.25)
    axes[0, 0].legend(fontsize=7)
    return figure


def alignments(examples: list[dict[str, Any]]) -> Figure:
    """Lists aligned word by word with the transcript and what was written; words that are not in the former in red."""
    heights = [len(set(each["nbest"])) + 3 for each in examples]
    figure, axes = plt.subplots(
        len(examples), 1, figsize=(13, 0.27 * sum(heights)), height_ratios=heights, layout="constrained", squeeze=False
    )
    for axis, example in zip(axes[:, 0], examples, strict=True):
        nbest = list(dict.fromkeys(example["nbest"]))
        rows = {"transcript": example["reference"], "written": example["written"]}
        rows |= {f"hypothesis {place}": text for place, text in enumerate(nbest, start=1)}
        slots = confusion_network([text.split() for text in rows.values()])
        widths = np.array([max(len(word) for word in slot) + 1.5 for slot in slots])
        places = np.concatenate([[0.0], np.cumsum(widths)])
        for line, name in enumerate(rows):
            axis.text(-0.5, -line, name, ha="right", fontsize=8, color="0.4")
            for slot, place in zip(slots, places, strict=False):
                is_right = slot[line] == slot[0]
                color = "black" if is_right else "tab:red"
                weight = "bold" if line == 1 else "normal"
                axis.text(place, -line, slot[line] or "·", fontsize=8, color=color, weight=weight, family="monospace")
        axis.set_xlim(-14, max(places[-1], 95))
        axis.set_ylim(-len(rows) + 0.4, 1)
        axis.set_title(example["kind"], fontsize=9, loc="left")
        axis.axis("off")
    return figure
