"""A seeded phantom of the pelvis on CT: anatomy drawn in millimeters, then sampled on a grid of voxels.

Axes are those of shared.data.volumes: left → right, posterior → anterior, inferior → superior, origin at the center.
What is difficult in patients is difficult here: the border between rectum and sigmoid is positional, loops of small
bowel look like the sigmoid, the clinical target volume has nearly the density of the uterus, and the applicator throws
streaks. Densities are in Hounsfield units (HU).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import comb
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import gaussian_filter

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
Kind = Literal["unlabeled", "multi_organ", "brachytherapy"]

ORGANS = ("bladder", "rectum", "sigmoid", "uterus", "ctv")
# What the phantom can label, by number; each stage has its own classes made of these.
STRUCTURES = ("background", *ORGANS, "femoral_heads", "sacrum", "small_bowel")
CODE = {name: number for number, name in enumerate(STRUCTURES)}

AIR = -1000.0
SKIN_TO_MUSCLE = 12.0
CURVE_POINTS = 60
LUMEN = 0.7
STOOL_TEXTURE = 6.0
SCANNER_BLUR_VOXELS = 0.8
NOISE = 25.0
ROD_RADIUS = 2.5
METAL = 2500.0


@dataclass(frozen=True)
class Grid:
    """Voxels in space: their number along each axis and their size in mm."""

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]

    def coordinates(self) -> tuple[Array, Array, Array]:
        """Coordinates of voxel centers in mm along each axis, shaped to broadcast against each other."""
        axes = [(np.arange(n) - (n - 1) / 2) * step for n, step in zip(self.shape, self.spacing, strict=True)]
        x, y, z = np.ix_(*axes)
        return x, y, z

    def millimeters_to_voxels(self, length: float) -> tuple[float, ...]:
        return tuple(length / step for step in self.spacing)


@dataclass(frozen=True)
class Ellipsoid:
    """Center and semi-axes in mm, tilted about the left–right axis by `tilt` radians, the upper pole to the front."""

    center: tuple[float, float, float]
    semi_axes: tuple[float, float, float]
    tilt: float = 0.0

    def axis(self) -> tuple[float, float, float]:
        """Direction from the center to the upper pole."""
        return (0.0, float(np.sin(self.tilt)), float(np.cos(self.tilt)))

    def along(self, share: float) -> tuple[float, float, float]:
        """The point at `share` of the way from the center to the upper pole."""
        x, y, z = (c + share * self.semi_axes[2] * a for c, a in zip(self.center, self.axis(), strict=True))
        return (x, y, z)

    def contains(self, grid: Grid) -> Mask:
        """Voxels inside, [X, Y, Z]."""
        x, y, z = (c - center for c, center in zip(grid.coordinates(), self.center, strict=True))
        y, z = np.cos(self.tilt) * y - np.sin(self.tilt) * z, np.sin(self.tilt) * y + np.cos(self.tilt) * z
        a, b, c = self.semi_axes
        return (x / a) ** 2 + (y / b) ** 2 + (z / c) ** 2 < 1


@dataclass(frozen=True)
class Tube:
    """A bowel: a Bézier curve through control points [n, 3] in mm, around it a radius that rises and falls twice."""

    points: Array
    radius: float
    phase: float

    def relative_distance(self, grid: Grid) -> Array:
        """Distance from the curve in local radii, [X, Y, Z]; infinite where it is 1 or more.

        It is the least over the points of the curve, so that the tube is a union of balls.
        """
        curve = bezier(self.points, CURVE_POINTS)
        t = np.linspace(0, 1, CURVE_POINTS)
        radii = self.radius * (1 + 0.2 * np.sin(2 * np.pi * (2 * t + self.phase)))
        axes = [axis.ravel() for axis in grid.coordinates()]
        distance = np.full(grid.shape, np.inf)
        for center, radius in zip(curve, radii, strict=True):
            # Only the box around each ball is looked at, which is a thousandth of the volume.
            box = tuple(
                slice(*np.searchsorted(axis, (c - radius, c + radius))) for axis, c in zip(axes, center, strict=True)
            )
            x, y, z = np.ix_(*(axis[part] - c for axis, part, c in zip(axes, box, center, strict=True)))
            distance[box] = np.minimum(distance[box], np.sqrt(x**2 + y**2 + z**2) / radius)
        return np.where(distance < 1, distance, np.inf)


@dataclass(frozen=True)
class Anatomy:
    """Everything that is drawn of a patient, in mm and HU, before there are voxels; densities by structure's name."""

    body: tuple[float, float]
    ellipsoids: dict[str, tuple[Ellipsoid, ...]]
    tubes: dict[str, tuple[Tube, ...]]
    density: dict[str, float]
    applicator: bool
    distractors: tuple[tuple[Ellipsoid, float], ...] = field(default=())


def bezier(points: ArrayLike, count: int) -> Array:
    """The Bézier curve of control points [n, 3] at `count` evenly spaced parameters, [count, 3]."""
    points = np.asarray(points, dtype=float)
    degree = len(points) - 1
    t = np.linspace(0, 1, count)[:, None]
    k = np.arange(degree + 1)
    binomials = np.array([comb(degree, i) for i in k])
    return (binomials * t**k * (1 - t) ** (degree - k)) @ points


def draw_anatomy(generator: np.random.Generator, kind: Kind) -> Anatomy:
    """Draw a patient. Those of `unlabeled` have other densities, and masses and bowels that the others lack.

    Only `brachytherapy` has a clinical target volume and an applicator.
    """

    def normal(mean: float, sd: float, at_least: float = -np.inf) -> float:
        return max(float(generator.normal(mean, sd)), at_least)

    def length(mean: float, sd: float) -> float:
        # Half of the mean is four standard deviations away in most cases: no organ vanishes or turns inside out.
        return normal(mean, sd, at_least=mean / 2)

    def tube(points: list[tuple[float, float, float]], radius: float) -> Tube:
        return Tube(np.array(points), radius, float(generator.uniform()))

    def loop() -> Tube:
        return tube([(normal(0, 35), normal(25, 20), normal(45, 15)) for _ in range(4)], length(11, 2))

    shift = 20.0 if kind == "unlabeled" else 0.0
    body = (length(88, 5), length(76, 5))
    heads = tuple(
        Ellipsoid((side * normal(62, 3), -normal(5, 4), normal(-20, 5)), (radius, radius, radius))
        for side in (-1, 1)
        for radius in [length(20, 2)]
    )
    sacrum = Ellipsoid((0, -normal(58, 3), normal(22, 5)), (30, 12, 45))
    loops = tuple(loop() for _ in range(generator.integers(2, 5)))
    top = (normal(0, 5), -normal(38, 5), normal(20, 5))
    rectum = tube([(0, -30, -80), (0, -48, -30), (0, -45, 0), top], length(13, 3))
    between = [(normal(-10 * i, 15), -normal(25 - 12 * i, 12), normal(25 + 7 * i, 8)) for i in (1, 2, 3)]
    sigmoid = tube([top, *between, (-60, -normal(-10, 8), normal(40, 6))], length(11, 2))
    bladder = Ellipsoid((normal(0, 4), normal(36, 4), normal(-15, 6)), (length(32, 6), length(20, 4), length(24, 5)))
    uterus = Ellipsoid(
        (normal(0, 5), -normal(0, 4), normal(8, 5)),
        (length(22, 3), length(18, 2), length(32, 4)),
        tilt=float(np.deg2rad(normal(20, 15))),
    )
    target = Ellipsoid(uterus.along(-0.75), (length(18, 3), length(15, 2), length(18, 3)), uterus.tilt)
    density = {
        "fat": -100 + normal(0, shift),
        "muscle": normal(45, 5 + shift),
        "femoral_heads": normal(420, 60),
        "sacrum": normal(350, 50),
        "bladder": normal(8, 5 + shift),
        "uterus": normal(55, 8 + shift),
        "bowel_wall": 40 + normal(0, shift),
    }
    density["ctv"] = density["uterus"] + normal(4, 4)
    distractors: list[tuple[Ellipsoid, float]] = []
    if kind == "unlabeled":
        loops += tuple(loop() for _ in range(generator.integers(1, 4)))
        for _ in range(generator.integers(3, 7)):
            center = (normal(0, 35), normal(0, 30), normal(0, 35))
            semi_axes = tuple(float(each) for each in generator.uniform(8, 25, 3))
            mass = Ellipsoid(center, semi_axes, tilt=float(generator.uniform(-np.pi, np.pi)))
            distractors.append((mass, normal(45, 40)))
    ellipsoids = {"femoral_heads": heads, "sacrum": (sacrum,), "uterus": (uterus,), "bladder": (bladder,)}
    if kind == "brachytherapy":
        ellipsoids["ctv"] = (target,)
    tubes = {"small_bowel": loops, "rectum": (rectum,), "sigmoid": (sigmoid,)}
    return Anatomy(body, ellipsoids, tubes, density, kind == "brachytherapy", tuple(distractors))


def phantom(seed: ArrayLike, grid: Grid, kind: Kind) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    """HU and labels (numbers in STRUCTURES) of one phantom, [X, Y, Z] each; the anatomy depends on `seed` alone."""
    anatomy_seed, voxel_seed = np.random.SeedSequence(seed).spawn(2)
    anatomy = draw_anatomy(np.random.default_rng(anatomy_seed), kind)
    return render(anatomy, grid, np.random.default_rng(voxel_seed))


def render(anatomy: Anatomy, grid: Grid, generator: np.random.Generator) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    """Sample an anatomy on a grid: HU and labels, [X, Y, Z]; where structures overlap, the later ones win."""
    x, y, _ = grid.coordinates()
    image = np.full(grid.shape, AIR)
    labels = np.zeros(grid.shape, np.uint8)
    for smaller, tissue in ((0.0, "fat"), (SKIN_TO_MUSCLE, "muscle")):
        a, b = (semi_axis - smaller for semi_axis in anatomy.body)
        image[np.broadcast_to((x / a) ** 2 + (y / b) ** 2 < 1, grid.shape)] = anatomy.density[tissue]
    inside_body = image > AIR
    for mass, density in anatomy.distractors:
        image[mass.contains(grid) & inside_body] = density
    for name, voxels, content in _structures(anatomy, grid, generator):
        voxels &= inside_body
        image[voxels] = content[voxels] if isinstance(content, np.ndarray) else content
        labels[voxels] = CODE[name]
    image = gaussian_filter(image, SCANNER_BLUR_VOXELS, mode="nearest")
    if anatomy.applicator:
        add_applicator(image, anatomy.ellipsoids["uterus"][0], grid, generator)
    noise = gaussian_filter(generator.standard_normal(grid.shape), 1.0)
    image += NOISE * noise / noise.std()
    return np.clip(np.rint(image), -1024, 3071).astype(np.int16), labels


def _structures(
    anatomy: Anatomy, grid: Grid, generator: np.random.Generator
) -> Iterator[tuple[str, Mask, float | Array]]:
    """Name, voxels and density of every structure, in the order in which they overwrite each other."""
    for name in ("femoral_heads", "sacrum", "small_bowel", "uterus", "bladder", "rectum", "sigmoid", "ctv"):
        for ellipsoid in anatomy.ellipsoids.get(name, ()):
            yield name, ellipsoid.contains(grid), anatomy.density[name]
        for tube in anatomy.tubes.get(name, ()):
            distance = tube.relative_distance(grid)
            content = bowel_content(distance, anatomy.density["bowel_wall"], grid, generator)
            yield name, np.isfinite(distance), content


def bowel_content(distance: Array, wall: float, grid: Grid, generator: np.random.Generator) -> Array:
    """HU of a bowel from the relative distance [X, Y, Z] to its curve: wall, and in the lumen gas pockets or stool."""
    texture = gaussian_filter(generator.standard_normal(grid.shape), grid.millimeters_to_voxels(STOOL_TEXTURE))
    texture /= texture.std()
    gas, stool = generator.normal(-750, 80), generator.normal(45, 20)
    filled = np.where(texture > generator.uniform(-1, 2), gas, stool + 15 * texture)
    return np.where(distance < LUMEN, filled, wall + generator.normal(0, 8))


def add_applicator(image: Array, uterus: Ellipsoid, grid: Grid, generator: np.random.Generator) -> None:
    """Lay the applicator into the image, in place: a metal rod along the axis of the uterus, and its streaks.

    The rod comes from below and ends close to the upper pole. Streaks are ∝ sin(kθ + φ) / r in each axial slice that
    it passes. Its edge is as wide as a voxel, so that a grid coarser than the rod does not miss it.
    """
    x, y, z = grid.coordinates()
    (cx, cy, cz), (_, ay, az) = uterus.center, uterus.axis()
    tip = uterus.along(0.8)[2]
    across = (y - cy) * az - (z - cz) * ay
    distance = np.sqrt((x - cx) ** 2 + across**2)
    in_slice_x, in_slice_y = x - cx, y - (cy + (z - cz) * ay / az)
    radius = np.maximum(np.hypot(in_slice_x, in_slice_y), ROD_RADIUS)
    angle = np.arctan2(in_slice_y, in_slice_x)
    strength, waves, phase = generator.uniform(300, 900), generator.integers(3, 9), generator.uniform(0, 2 * np.pi)
    passed = z <= tip
    image += np.where(passed, strength / radius * np.sin(waves * angle + phase), 0.0)
    voxel = max(grid.spacing[:2])
    metal = np.clip((ROD_RADIUS - distance) / voxel + 0.5, 0, 1) * passed
    image += metal * (METAL - image)
