"""How well a segmentation agrees with another: overlap, and distances between surfaces in millimeters.

Libraries differ in what a surface and a Hausdorff distance at 95 % are. Here a surface is the mask minus its erosion by
6 neighbors, what lies outside of the image being background, and HD95 is the larger of the two directed 95th
percentiles, as in MONAI. A structure that only one side has gets DSC 0 and, as both distances, the diagonal of the
image; one that neither has gets 1 and distances of 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shared.config import UserError

_Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class SegmentationScores:
    """Dice similarity coefficient; HD95 and average surface distance in mm; whether one side alone is empty."""

    dice: float
    hd95: float
    asd: float
    empty: bool


def dice(prediction: ArrayLike, target: ArrayLike) -> float:
    """2 |P ∩ G| / (|P| + |G|) of two masks; 1 where both are empty."""
    prediction, target = _masks(prediction, target)
    total = np.count_nonzero(prediction) + np.count_nonzero(target)
    return 2 * int(np.count_nonzero(prediction & target)) / int(total) if total else 1.0


def surface_distances(
    prediction: ArrayLike, target: ArrayLike, spacing: Sequence[float]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Distances in mm from every surface voxel of the prediction to the target's surface, and back.

    Masks of the same shape, none empty; `spacing` in mm, one an axis.
    """
    from scipy.ndimage import binary_erosion, distance_transform_edt

    prediction, target = _masks(prediction, target)
    _check_spacing(spacing, prediction.ndim)
    if not prediction.any() or not target.any():
        raise UserError("an empty mask has no surface: segmentation_scores gives such cases the image's diagonal")
    # All of both surfaces lies in the common box, and all around it is background.
    box = _bounding_box(prediction | target)
    surfaces = [mask & ~binary_erosion(mask) for mask in (prediction[box], target[box])]
    to_target, to_prediction = (distance_transform_edt(~surface, sampling=spacing) for surface in reversed(surfaces))
    return to_target[surfaces[0]], to_prediction[surfaces[1]]


def segmentation_scores(prediction: ArrayLike, target: ArrayLike, spacing: Sequence[float]) -> SegmentationScores:
    """All scores of a mask against the target.

    HD95 is the larger 95th percentile of the distances there and back; ASD is the mean of both together,
    (Σ d(P→G) + Σ d(G→P)) / (|S_P| + |S_G|).
    """
    prediction, target = _masks(prediction, target)
    _check_spacing(spacing, prediction.ndim)
    present = prediction.any(), target.any()
    if not any(present):
        return SegmentationScores(1.0, 0.0, 0.0, empty=False)
    if not all(present):
        diagonal = math.hypot(*(size * step for size, step in zip(prediction.shape, spacing, strict=True)))
        return SegmentationScores(0.0, diagonal, diagonal, empty=True)
    there, back = surface_distances(prediction, target, spacing)
    hd95 = max(np.percentile(there, 95), np.percentile(back, 95))
    asd = (there.sum() + back.sum()) / (there.size + back.size)
    return SegmentationScores(dice(prediction, target), float(hd95), float(asd), empty=False)


def label_scores(
    prediction: ArrayLike, target: ArrayLike, classes: Mapping[int, str], spacing: Sequence[float]
) -> dict[str, SegmentationScores]:
    """Scores of every class by name; prediction and target are label maps, `classes` names those to score."""
    prediction, target = np.asarray(prediction), np.asarray(target)
    return {
        name: segmentation_scores(prediction == number, target == number, spacing) for number, name in classes.items()
    }


def _masks(prediction: ArrayLike, target: ArrayLike) -> tuple[_Mask, _Mask]:
    masks = np.asarray(prediction), np.asarray(target)
    if masks[0].shape != masks[1].shape or any(mask.dtype != bool for mask in masks):
        raise UserError(
            "prediction and target must be boolean masks of one shape, such as labels == 3 (given: "
            f"{', '.join(f'{mask.dtype} {list(mask.shape)}' for mask in masks)})"
        )
    return masks


def _check_spacing(spacing: Sequence[float], axes: int) -> None:
    if len(spacing) != axes or not all(step > 0 and math.isfinite(step) for step in spacing):
        raise UserError(f"spacing must be {axes} positive numbers, in mm (given: {list(spacing)})")


def _bounding_box(mask: _Mask) -> tuple[slice, ...]:
    from scipy.ndimage import find_objects

    return find_objects(mask.view(np.uint8))[0]
