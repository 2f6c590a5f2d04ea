"""The phantom: volumes of its organs, where they lie, what they look like, and the shapes against direct formulas."""

from __future__ import annotations

import numpy as np
import pytest

from ..phantom import (
    CODE,
    METAL,
    NOISE,
    ORGANS,
    Ellipsoid,
    Grid,
    Tube,
    add_applicator,
    bezier,
    draw_anatomy,
    phantom,
    render,
)

GRID = Grid((64, 64, 48), (3.0, 3.0, 3.0))
# Milliliters, as measured on six phantoms of another implementation of the same description.
VOLUMES = {"ctv": (12, 28), "bladder": (39, 125), "rectum": (45, 84), "sigmoid": (22, 51), "uterus": (25, 54)}


@pytest.fixture(scope="module")
def phantoms() -> list[tuple[np.ndarray, np.ndarray]]:
    return [phantom((0, number), GRID, "brachytherapy") for number in range(24)]


def volume(labels: np.ndarray, organ: str, grid: Grid = GRID) -> float:
    return float((labels == CODE[organ]).sum() * np.prod(grid.spacing) / 1000)


@pytest.mark.parametrize("organ", ORGANS)
def test_volumes_are_those_of_the_description(phantoms: list, organ: str) -> None:
    low, high = VOLUMES[organ]
    volumes = np.array([volume(labels, organ) for _, labels in phantoms])
    assert low <= np.median(volumes) <= high
    # Ranges of six do not hold all of 24.
    assert ((volumes >= low / 1.5) & (volumes <= 1.5 * high)).mean() >= 0.75
    assert volumes.min() > low / 4
    assert volumes.max() < 2 * high


def test_a_seed_is_a_phantom() -> None:
    first, again, other = (phantom((0, number), GRID, "brachytherapy") for number in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert (first[1] != other[1]).mean() > 0.01


def test_the_anatomy_does_not_depend_on_the_grid() -> None:
    coarse = Grid((32, 32, 24), (6.0, 6.0, 6.0))
    for number in range(3):
        fine, rough = (phantom((0, number), grid, "brachytherapy")[1] for grid in (GRID, coarse))
        for organ in ORGANS:
            assert volume(rough, organ, coarse) == pytest.approx(volume(fine, organ), rel=0.1)


def test_organs_lie_where_they_belong(phantoms: list) -> None:
    for _, labels in phantoms[:8]:
        center = {name: np.argwhere(labels == code).mean(axis=0) for name, code in CODE.items()}
        assert center["bladder"][1] > center["uterus"][1] > center["rectum"][1]  # front to back
        assert center["sacrum"][1] < center["rectum"][1] + 3
        assert center["uterus"][2] > center["ctv"][2]  # the target is at the lower pole
        assert center["sigmoid"][2] > center["rectum"][2]
        assert center["sigmoid"][0] < 31.5  # on the patient's left
        heads = np.argwhere(labels == CODE["femoral_heads"])[:, 0]
        assert 0.3 < (heads < 32).mean() < 0.7


def test_densities(phantoms: list) -> None:
    image, labels = phantoms[0]
    assert image[0, 0].mean() == pytest.approx(-1000, abs=30)
    inside = {name: image[labels == code] for name, code in CODE.items()}
    assert np.median(inside["bladder"]) == pytest.approx(8, abs=25)
    assert 300 < np.median(inside["femoral_heads"]) < 600
    assert abs(np.median(inside["uterus"]) - np.median(inside["ctv"])) < 25
    rods = [image[labels == CODE["ctv"]].max() for image, labels in phantoms]
    assert min(rods) > 1000


def test_noise_has_its_strength() -> None:
    """In the corners there is nothing but air, which HU below -1024 cut off on one side."""
    image, labels = phantom((0, 5), GRID, "multi_organ")
    bladder = image[labels == CODE["bladder"]].astype(float)
    assert 0.5 * NOISE < bladder.std() < 3 * NOISE
    assert image.min() == -1024


def test_only_brachytherapy_has_target_and_applicator() -> None:
    for kind in ("unlabeled", "multi_organ"):
        image, labels = phantom((0, 3), GRID, kind)
        assert not (labels == CODE["ctv"]).any()
        assert image.max() < METAL / 2
        assert (labels == CODE["uterus"]).any()


def test_unlabeled_phantoms_have_other_densities_and_more_in_them() -> None:
    anatomies = {
        kind: [draw_anatomy(np.random.default_rng(seed), kind) for seed in range(20)]
        for kind in ("unlabeled", "multi_organ")
    }
    spread = {kind: np.std([each.density["uterus"] for each in drawn]) for kind, drawn in anatomies.items()}
    assert spread["unlabeled"] > 2 * spread["multi_organ"]
    assert all(each.distractors for each in anatomies["unlabeled"])
    assert not any(each.distractors for each in anatomies["multi_organ"])


def test_later_structures_win() -> None:
    anatomy = draw_anatomy(np.random.default_rng(0), "brachytherapy")
    _, labels = render(anatomy, GRID, np.random.default_rng(0))
    target = anatomy.ellipsoids["ctv"][0].contains(GRID)
    assert (labels[target] == CODE["ctv"]).all()
    uterus = anatomy.ellipsoids["uterus"][0].contains(GRID)
    assert set(np.unique(labels[uterus])) <= {CODE[name] for name in ("uterus", "bladder", "rectum", "sigmoid", "ctv")}


# --- shapes ---


def test_bezier_is_de_casteljaus() -> None:
    points = np.random.default_rng(0).normal(size=(5, 3))
    curve = bezier(points, 7)
    for t, point in zip(np.linspace(0, 1, 7), curve, strict=True):
        rest = points
        while len(rest) > 1:
            rest = (1 - t) * rest[:-1] + t * rest[1:]
        np.testing.assert_allclose(point, rest[0], atol=1e-12)


def test_a_tube_is_the_union_of_its_balls() -> None:
    grid = Grid((14, 15, 16), (4.0, 3.0, 5.0))
    tube = Tube(np.array([(-20.0, 0, -30), (0, 25, 0), (15, -10, 30)]), 8.0, 0.3)
    places = np.stack(np.broadcast_arrays(*grid.coordinates()), axis=-1)
    t = np.linspace(0, 1, 60)
    radii = 8 * (1 + 0.2 * np.sin(2 * np.pi * (2 * t + 0.3)))
    distance = np.linalg.norm(places[..., None, :] - bezier(tube.points, 60), axis=-1) / radii
    expected = distance.min(axis=-1)
    found = tube.relative_distance(grid)
    np.testing.assert_array_equal(np.isfinite(found), expected < 1)
    np.testing.assert_allclose(found[expected < 1], expected[expected < 1])


@pytest.mark.parametrize("tilt", [0.0, 0.4, -1.2])
def test_an_ellipsoid_has_its_volume_and_its_pole(tilt: float) -> None:
    ellipsoid = Ellipsoid((3, -6, 1), (22, 18, 32), tilt)
    inside = ellipsoid.contains(GRID)
    assert inside.sum() * 27 == pytest.approx(4 / 3 * np.pi * 22 * 18 * 32, rel=0.02)
    axes = [axis.ravel() for axis in GRID.coordinates()]
    for share, expected in ((0.9, True), (-0.9, True), (1.15, False)):
        voxel = tuple(np.abs(axis - place).argmin() for axis, place in zip(axes, ellipsoid.along(share), strict=True))
        assert inside[voxel] == expected


def test_the_upper_pole_leans_to_the_front() -> None:
    assert Ellipsoid((0, 0, 0), (1, 1, 1), np.deg2rad(20)).along(1)[1] > 0


def test_streaks_fall_off_with_distance_and_the_rod_ends() -> None:
    uterus = Ellipsoid((0, 0, 0), (22, 18, 32), 0.3)
    image = np.zeros(GRID.shape)
    add_applicator(image, uterus, GRID, np.random.default_rng(0))
    x, y, z = GRID.coordinates()
    radius = np.hypot(x, y - z * np.tan(0.3)) + 0 * z
    below = (np.broadcast_to(z, GRID.shape) < 20) & (radius > 8)
    near, far = below & (radius < 16), below & (radius > 32) & (radius < 40)
    assert np.abs(image[near]).mean() > 2 * np.abs(image[far]).mean() > 0
    assert abs(image[far].mean()) < 0.2 * np.abs(image[far]).mean()
    assert image[:, :, 0].max() > 0.7 * METAL
    assert not image[:, :, z.ravel() > uterus.along(0.8)[2]].any()
