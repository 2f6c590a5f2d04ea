from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from shared.config import UserError
from shared.evaluation.segmentation import dice, label_scores, segmentation_scores, surface_distances

SPACING = (3.0, 1.0, 2.0)
Mask = np.ndarray


def blobs(seed: int, shape: tuple[int, ...] = (12, 14, 10)) -> tuple[Mask, Mask]:
    """Two smooth random masks that overlap, and reach the image's border."""
    from scipy.ndimage import gaussian_filter

    generator = np.random.default_rng(seed)
    common, *noises = (gaussian_filter(generator.normal(size=shape), 1.5, mode="nearest") for _ in range(3))
    return tuple(common + noise > 0.05 for noise in noises)


def surface(mask: Mask) -> Mask:
    """By the definition: voxels of the mask with a neighbor, of 6, that is not of it."""
    padded = np.pad(mask, 1)
    inner = np.ones_like(mask)
    for axis in range(mask.ndim):
        for step in (-1, 1):
            inner &= np.roll(padded, step, axis)[(slice(1, -1),) * mask.ndim]
    return mask & ~inner


def brute_force(prediction: Mask, target: Mask) -> tuple[np.ndarray, np.ndarray]:
    points = [np.argwhere(surface(mask)) * SPACING for mask in (prediction, target)]
    distances = cdist(*points)
    return distances.min(1), distances.min(0)


@pytest.mark.parametrize("seed", range(4))
def test_distances_by_brute_force(seed: int) -> None:
    prediction, target = blobs(seed)
    there, back = brute_force(prediction, target)
    for ours, expected in zip(surface_distances(prediction, target, SPACING), (there, back), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-12)
    scores = segmentation_scores(prediction, target, SPACING)
    assert scores.hd95 == pytest.approx(max(np.percentile(there, 95), np.percentile(back, 95)))
    assert scores.asd == pytest.approx(np.concatenate([there, back]).mean())
    assert scores.dice == pytest.approx(2 * (prediction & target).sum() / (prediction.sum() + target.sum()))
    assert not scores.empty
    assert all(type(value) is float for value in (scores.dice, scores.hd95, scores.asd))


@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_monai(seed: int) -> None:
    metrics = pytest.importorskip("monai.metrics")
    import torch

    # Away from the border: there MONAI's crop decides what a surface is.
    prediction, target = (np.pad(mask, 2) for mask in blobs(10 + seed))
    batch = [torch.from_numpy(mask)[None, None] for mask in (prediction, target)]
    scores = segmentation_scores(prediction, target, SPACING)
    theirs = metrics.compute_hausdorff_distance(*batch, include_background=True, percentile=95, spacing=[SPACING])
    assert scores.hd95 == pytest.approx(theirs.item(), rel=1e-5)
    theirs = metrics.compute_average_surface_distance(
        *batch, include_background=True, symmetric=True, spacing=[SPACING]
    )
    assert scores.asd == pytest.approx(theirs.item(), rel=1e-5)
    assert scores.dice == pytest.approx(metrics.compute_dice(*batch).item(), rel=1e-5)


def test_single_voxels_by_hand() -> None:
    prediction, target = np.zeros((2, 8, 8, 8), dtype=bool)
    prediction[1, 1, 1] = True
    target[2, 5, 3] = True
    scores = segmentation_scores(prediction, target, SPACING)
    # 1 · 3 mm, 4 · 1 mm and 2 · 2 mm apart.
    expected = math.sqrt(3**2 + 4**2 + 4**2)
    assert (scores.dice, scores.hd95, scores.asd) == (0, pytest.approx(expected), pytest.approx(expected))
    assert segmentation_scores(target, target, SPACING) == segmentation_scores(prediction, prediction, SPACING)
    assert segmentation_scores(target, target, SPACING).hd95 == 0


def test_a_shift_by_hand_on_every_axis() -> None:
    target = np.zeros((12, 12, 12), dtype=bool)
    target[3:8, 3:8, 3:8] = True
    for axis, step in enumerate(SPACING):
        scores = segmentation_scores(np.roll(target, 1, axis), target, SPACING)
        assert scores.dice == pytest.approx(0.8)
        assert scores.hd95 == pytest.approx(step)
        assert 0 < scores.asd < step


def test_the_surface_of_a_cube_is_its_outermost_voxels() -> None:
    cube, point = np.zeros((2, 9, 9, 9), dtype=bool)
    cube[2:7, 2:7, 2:7] = True
    point[4, 4, 4] = True
    there, back = surface_distances(cube, point, (1, 1, 1))
    assert len(there) == 5**3 - 3**3
    assert there.min() == 2
    assert back.tolist() == [2]


def test_outside_of_the_image_is_background() -> None:
    everything = np.ones((5, 5, 5), dtype=bool)
    there, _ = surface_distances(everything, everything, (1, 1, 1))
    assert len(there) == 5**3 - 3**3


def test_empty_masks() -> None:
    target, empty = np.zeros((2, 10, 20, 30), dtype=bool)
    target[5, 5, 5] = True
    diagonal = math.sqrt(30**2 + 20**2 + 60**2)
    for pair in ((empty, target), (target, empty)):
        scores = segmentation_scores(*pair, SPACING)
        assert (scores.dice, scores.hd95, scores.asd, scores.empty) == (0, diagonal, diagonal, True)
    both = segmentation_scores(empty, empty, SPACING)
    assert (both.dice, both.hd95, both.asd, both.empty) == (1, 0, 0, False)
    assert dice(empty, empty) == 1
    with pytest.raises(UserError, match="no surface"):
        surface_distances(empty, target, SPACING)


def test_scores_are_symmetric_and_scale_with_the_spacing() -> None:
    prediction, target = blobs(7)
    scores = segmentation_scores(prediction, target, SPACING)
    mirrored = segmentation_scores(target, prediction, SPACING)
    assert (mirrored.dice, mirrored.hd95) == (scores.dice, scores.hd95)
    assert mirrored.asd == pytest.approx(scores.asd)
    doubled = segmentation_scores(prediction, target, [2 * step for step in SPACING])
    assert doubled.dice == scores.dice
    assert doubled.hd95 == pytest.approx(2 * scores.hd95)
    assert doubled.asd == pytest.approx(2 * scores.asd)


def test_cropping_changes_nothing() -> None:
    prediction, target = blobs(8)
    inside = segmentation_scores(prediction, target, SPACING)
    assert segmentation_scores(np.pad(prediction, 5), np.pad(target, 5), SPACING) == inside


def test_labels_by_class() -> None:
    target = np.zeros((8, 8, 8), dtype=np.int64)
    target[1:4, 1:4, 1:4], target[5:7, 5:7, 5:7] = 1, 2
    prediction = np.where(target == 2, 3, target)
    scores = label_scores(prediction, target, {1: "bladder", 2: "rectum", 3: "colon", 4: "uterus"}, SPACING)
    assert [score.dice for score in scores.values()] == [1, 0, 0, 1]
    assert [name for name, score in scores.items() if score.empty] == ["rectum", "colon"]
    assert scores["bladder"] == segmentation_scores(prediction == 1, target == 1, SPACING)


@pytest.mark.parametrize(
    ("prediction", "spacing", "message"),
    [
        (np.zeros((4, 4, 5), dtype=bool), (1, 1, 1), "one shape"),
        (np.zeros((4, 4, 4), dtype=int), (1, 1, 1), "boolean.*int64"),
        (np.zeros((4, 4, 4), dtype=bool), (1, 1), "3 positive numbers"),
        (np.zeros((4, 4, 4), dtype=bool), (1, 1, 0), "3 positive numbers"),
    ],
)
def test_refuses(prediction: Mask, spacing: tuple[float, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        segmentation_scores(prediction, np.zeros((4, 4, 4), dtype=bool), spacing)
