"""Figures: contours on slices, Dice by organ, masked volumes and what was made of them, and a phantom in space."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from shared.config import Stage, read_yaml
from shared.evaluation.figures import save_figures
from shared.evaluation.statistics import Interval, bootstrap_interval
from shared.nn.masked_modeling import fill_in

from .config import ATLAS, Params, PhantomData
from .data import Prepared
from .phantom import ORGANS, STRUCTURES, Grid, phantom
from .pretrain import load_masked_model, masked_volumes

matplotlib.use("Agg")
import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Labels = NDArray[np.uint8]
MODELS = {
    "gynbtnet": ("GynBTNet, 1 → 2 → 3", "tab:blue", "o"),
    "multi_organ": ("2 → 3", "tab:cyan", "s"),
    "self_supervised": ("1 → 3", "tab:green", "^"),
    "scratch": ("3 (scratch)", "tab:pink", "v"),
    "scratch_long": ("3, as many steps", "0.7", "<"),
    "nnunet": ("nnU-Net", "tab:orange", "D"),
    "swin_unetr": ("Swin UNETR", "tab:red", "X"),
    ATLAS: ("most frequent label", "black", "_"),
}
OUTLINED = ("gynbtnet", "nnunet", "swin_unetr", "self_supervised", "scratch")
WINDOW = (-160.0, 240.0)  # HU, of soft tissue
ORGAN_NAMES = {"ctv": "CTV", "small_bowel": "small bowel", "femoral_heads": "femoral heads"}
RENDERED = Grid((128, 112, 96), (1.5, 1.5, 1.5))
COLORS = plt.get_cmap("tab10").colors


def draw(
    stage: Stage[Params],
    scores: pd.DataFrame,
    prepared: Prepared,
    predictions: Mapping[tuple[str, int | None], Labels],
) -> list[Path]:
    """Draw all figures of a profile; returns their files. `predictions` by model and training cases, first seed."""
    cases = stage.params.main_cases
    main = "real_ct" if cases is None else f"cases_{cases}"
    shown = {model: labels for (model, n), labels in predictions.items() if n == cases and model in OUTLINED}
    paper = read_yaml(stage.folder / "paper.yaml")["claims"]
    references = {each["label"]: each["value"] for claim in paper for each in claim.get("reference", ())}
    figures = {
        "dice_by_organ": dice_by_organ(scores[scores.dataset.eq(main)], references if cases else {}),
        "segmentations": segmentations(stage.params, scores[scores.dataset.eq(main)], prepared, shown),
        "reconstruction": reconstruction(stage, prepared),
    }
    if isinstance(stage.params.data, PhantomData):
        figures["phantom"] = rendered_phantom(stage.params.seed)
    if scores.dataset.eq("gain_by_cases").any() and len(stage.params.models) > 1:
        figures["dice_by_cases"] = dice_by_cases(scores)
    return save_figures(stage.results_dir, figures)


def interval(rows: pd.DataFrame) -> Interval:
    """Mean and 95 % interval over seeds and test cases, of the seeds alone where there is one case."""
    table = rows.assign(item=rows.item.fillna(0) if "item" in rows else 0)
    values = table.pivot_table(index="seed", columns="item", values="value").to_numpy()
    if values.size < 2:
        return Interval(float(values.mean()), float(values.mean()), float(values.mean()))
    return bootstrap_interval(values if min(values.shape) > 1 else values.ravel(), num_resamples=2000)


def dice_by_organ(scores: pd.DataFrame, references: Mapping[str, float]) -> Figure:
    """Dice of every model by organ, and over all, with the paper's figures on its own CT drawn in."""
    rows = scores[scores.metric.eq("dice")]
    organs = [*dict.fromkeys(rows.organ.dropna()), None]
    models = [model for model in MODELS if rows.model.eq(model).any()]
    figure, axis = plt.subplots(figsize=(2.4 + 1.5 * len(organs), 4.2), layout="constrained")
    for number, model in enumerate(models):
        label, color, marker = MODELS[model]
        shift = (number - (len(models) - 1) / 2) * 0.8 / len(models)
        of_model = rows[rows.model.eq(model)]
        found = [interval(of_model if organ is None else of_model[of_model.organ.eq(organ)]) for organ in organs]
        _intervals(axis, np.arange(len(organs)) + shift, found, color=color, marker=marker, label=label)
    for place, organ in enumerate(organs):
        if f"dice/{organ}" in references:
            value = references[f"dice/{organ}"]
            label = "the paper, on its own CT" if place == 0 else None
            axis.plot([place - 0.45, place + 0.45], [value, value], color="black", ls="--", lw=1, label=label)
    axis.set_xticks(range(len(organs)), ["mean" if organ is None else _name(organ) for organ in organs])
    axis.set_ylabel("Dice")
    axis.set_title("95 % over test cases and seeds", fontsize=9)
    axis.set_ylim(0, 1)
    axis.grid(axis="y", alpha=0.25)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def dice_by_cases(scores: pd.DataFrame) -> Figure:
    """Mean Dice by the number of training cases of the third stage."""
    rows = scores[scores.metric.eq("dice") & scores.dataset.str.startswith("cases_")]
    rows = rows.assign(cases=rows.dataset.str.removeprefix("cases_").astype(int))
    figure, axis = plt.subplots(figsize=(5.6, 3.8), layout="constrained")
    for model, (label, color, marker) in MODELS.items():
        of_model = rows[rows.model.eq(model)]
        sizes = sorted(of_model.cases.unique())
        if len(sizes) > 1:
            found = [interval(of_model[of_model.cases.eq(size)]) for size in sizes]
            _intervals(axis, np.array(sizes), found, color=color, marker=marker, label=label, line="-")
    sizes = sorted(rows.cases.unique())
    axis.set_xscale("log")
    axis.set_xticks(sizes, [str(size) for size in sizes])
    axis.minorticks_off()
    axis.set_xlabel("labeled cases in the third stage")
    axis.set_ylabel("Dice, mean over organs")
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8)
    return figure


def segmentations(params: Params, scores: pd.DataFrame, prepared: Prepared, shown: Mapping[str, Labels]) -> Figure:
    """Contours of the truth and of some models on the slices, axial and sagittal, in which each organ is largest."""
    tested = prepared.read("test")
    assert tested.labels is not None
    names = params.classes("multi_organ" if params.main_cases is None else "brachytherapy")
    item = _typical_case(scores)
    image, truth = np.asarray(tested.images[item]), np.asarray(tested.labels[item])
    x, y, z = (side * step for side, step in zip(truth.shape, prepared.spacing, strict=True))
    heights = [y / x, z / y]
    size = (2.3 * len(names), 2.3 * sum(heights) + 1.0)
    figure, axes = plt.subplots(2, len(names), figsize=size, height_ratios=heights, layout="constrained", squeeze=False)
    for column, organ in enumerate(names):
        number = column + 1
        for row, axis in ((0, 2), (1, 0)):
            area = (truth == number).sum(axis=tuple({0, 1, 2} - {axis}))
            at, panel = int(area.argmax()), axes[row, column]
            _show(panel, image.take(at, axis), prepared.spacing, axis)
            for model in OUTLINED[::-1]:
                if model in shown:
                    _outline(panel, shown[model][item].take(at, axis) == number, MODELS[model][1], 1.2)
            _outline(panel, truth.take(at, axis) == number, "yellow", 1.6)
            if row == 0:
                panel.set_title(_name(organ), fontsize=10)
    axes[0, 0].set_ylabel("axial")
    axes[1, 0].set_ylabel("sagittal")
    lines = [plt.Line2D([], [], color="yellow", label="truth")]
    lines += [plt.Line2D([], [], color=MODELS[name][1], label=MODELS[name][0]) for name in OUTLINED if name in shown]
    legend = figure.legend(handles=lines, loc="outside lower center", ncols=len(lines), fontsize=8)
    legend.get_frame().set_facecolor("0.6")
    return figure


def reconstruction(stage: Stage[Params], prepared: Prepared) -> Figure:
    """Held-out volumes, what masked modeling sees of them, and what it makes of the rest (first seed)."""
    model = load_masked_model(stage, stage.params.seeds[0])
    device = next(model.parameters()).device
    volumes = [each for each, _ in zip(masked_volumes(stage.params, prepared), range(2), strict=False)]
    figure, axes = plt.subplots(len(volumes), 6, figsize=(13, 2.4 * len(volumes)), layout="constrained", squeeze=False)
    for row, (volume, mask) in enumerate(volumes):
        with torch.no_grad():
            predicted = model(volume.to(device), mask.to(device)).float().cpu()
        hidden = volume.clone()
        hidden[:, :, ~_voxels(mask, volume.shape[2:])] = volume.min()
        parts = {"held out": volume, "visible": hidden, "reconstructed": fill_in(predicted, volume, mask)}
        for column, (axis, (title, values)) in enumerate((axis, part) for axis in (2, 0) for part in parts.items()):
            panel = axes[row, column]
            at = values.shape[2 + axis] // 2
            _show(panel, _hu(prepared, values)[0, 0].take(at, axis), prepared.spacing, axis)
            if row == 0:
                panel.set_title(f"{title}, {'axial' if axis == 2 else 'sagittal'}", fontsize=9)
    return figure


def rendered_phantom(seed: int) -> Figure:
    """One phantom of the third stage: its structures from the front and from the left, and CT slices."""
    image, labels = phantom((seed, len(STRUCTURES), 0), RENDERED, "brachytherapy")
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.6), layout="constrained")
    visible = np.where(np.isin(labels, [STRUCTURES.index("sacrum"), STRUCTURES.index("femoral_heads")]), 0, labels)
    # From the front the y axis is looked along from its anterior end, from the left the x axis from its left end. What
    # lies to the right of the viewer, the patient's left or back, is where the other axis begins.
    views = (("from the front", visible[:, ::-1], 1), ("from the left", visible, 0))
    for axis, (title, turned, along) in zip(axes, views, strict=False):
        axis.imshow(shaded(turned, along)[::-1].swapaxes(0, 1), origin="lower")
        axis.set_title(title, fontsize=10)
    _show(axes[2], image.take(RENDERED.shape[2] // 2 - 8, 2), RENDERED.spacing, 2)
    _show(axes[3], image.take(RENDERED.shape[0] // 2, 0), RENDERED.spacing, 0)
    axes[2].set_title("axial, HU -160 to 240", fontsize=10)
    axes[3].set_title("sagittal", fontsize=10)
    named = [*ORGANS, "small_bowel"]
    patches = [plt.Rectangle((0, 0), 1, 1, color=COLORS[STRUCTURES.index(name)], label=_name(name)) for name in named]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), fontsize=8)
    for axis in axes:
        axis.set_xticks([])
        axis.set_yticks([])
    return figure


def shaded(labels: Labels, axis: int) -> NDArray[np.float64]:
    """The surface of labels [X, Y, Z] seen along an axis from its beginning, lit from above the viewer, RGB."""
    solid = labels > 0
    seen = solid.any(axis=axis)
    depth = np.where(seen, solid.argmax(axis=axis), labels.shape[axis]).astype(float)
    first = np.take_along_axis(labels, np.expand_dims(solid.argmax(axis=axis), axis), axis).squeeze(axis)
    along, upward = np.gradient(gaussian_filter(depth, 1.0))
    # Towards the viewer the normal is (∂u, ∂v, -1) of the depth; of both vectors the last entry is turned.
    light = np.array([-0.3, 0.5, 1.0]) / np.linalg.norm([-0.3, 0.5, 1.0])
    normal = np.stack([along, upward, np.ones_like(depth)], axis=-1)
    lit = (normal @ light) / np.linalg.norm(normal, axis=-1)
    colors = np.array(COLORS)[first % len(COLORS)] * (0.25 + 0.75 * np.clip(lit, 0, 1))[..., None]
    return np.where(seen[..., None], colors, 1.0)


def _typical_case(scores: pd.DataFrame) -> int:
    """The test case whose mean Dice over models is the median one."""
    rows = scores[scores.metric.eq("dice") & scores.model.ne(ATLAS)]
    if "item" not in rows or rows.item.isna().all():
        return 0
    means = rows.groupby("item").value.mean().sort_values()
    return int(means.index[(len(means) - 1) // 2])


def _show(panel: Axes, values: NDArray, spacing: tuple[float, float, float], axis: int) -> None:
    """A slice across `axis` in a soft-tissue window, axial as seen from the feet, sagittal with the front left."""
    step_x, step_y = (step for number, step in enumerate(spacing) if number != axis)
    panel.imshow(
        values.T,
        origin="lower",
        cmap="gray",
        vmin=WINDOW[0],
        vmax=WINDOW[1],
        aspect=step_y / step_x,
        interpolation="none",
    )
    panel.set_xlim(values.shape[0] - 0.5, -0.5)
    panel.set_xticks([])
    panel.set_yticks([])


def _outline(panel: Axes, mask: NDArray[np.bool_], color: str, width: float) -> None:
    if mask.any():
        panel.contour(mask.T.astype(float), levels=[0.5], colors=[color], linewidths=width)


def _voxels(mask: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The patches of a mask [1, 1, *patches] as voxels, [X, Y, Z]."""
    voxels = mask[0, 0]
    for axis, side in enumerate(shape):
        voxels = voxels.repeat_interleave(side // voxels.shape[axis], axis)
    return voxels


def _hu(prepared: Prepared, values: torch.Tensor) -> NDArray[np.float32]:
    return values.numpy() * prepared.normalization.std + prepared.normalization.mean


def _name(organ: str) -> str:
    return ORGAN_NAMES.get(organ, organ)


def _intervals(
    axis: Axes,
    places: NDArray[np.float64],
    found: list[Interval],
    *,
    color: str,
    marker: str,
    label: str,
    line: str = "",
) -> None:
    values = np.array([each.estimate for each in found])
    below = values - [each.low for each in found]
    above = np.array([each.high for each in found]) - values
    errors = np.maximum([below, above], 0)
    axis.errorbar(
        places, values, errors, fmt=marker, ls=line or "none", ms=5, lw=1, capsize=2, color=color, label=label
    )
