"""Medical volumes: NIfTI files, resampling, normalization, patches, augmentation, and inference by sliding windows.

Arrays are `[X, Y, Z]` in RAS+ orientation: indices grow to the patient's right, front and head, so that axis 0 is left
to right. Spacing is in millimeters. The recipes are nnU-Net's (Isensee et al., Nature Methods 18, 2021, supplementary
notes); its operations are those of nibabel, SciPy and MONAI.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from shared.config import UserError, load_optional
from shared.files import atomic_path

Array = NDArray[Any]
EXTRA = "gynbtnet"


@dataclass(frozen=True, eq=False)
class Volume:
    """Values `[X, Y, Z]` and the affine `[4, 4]` that takes voxel indices to millimeters in RAS+."""

    values: Array
    affine: NDArray[np.float64]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def spacing(self) -> tuple[float, ...]:
        """Edges of a voxel in mm."""
        return tuple(np.linalg.norm(self.affine[:3, :3], axis=0).tolist())


# ------------------------------------------------------------------------------------------------------------ files


def read_volume(path: Path, *, spacing: Sequence[float] | None = None, orientation: str | None = None) -> Volume:
    """Read a NIfTI file, its axes brought into the order and directions closest to RAS+.

    `spacing` in mm (of the axes in RAS+ order) and `orientation` of the axes as stored, such as "LPS", are what the
    file must have. `UserError` for a file that is missing, damaged, of another format, not of three axes, with voxels
    that are not finite, without a valid affine, or of other spacing or orientation.
    """
    nibabel = load_optional("nibabel", EXTRA)
    path = Path(path)
    image, values = _load(nibabel, path)
    affine = np.asarray(image.affine, dtype=np.float64)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise UserError(f"{path} has an affine that maps no volume: {affine.tolist()}; write the file again with one")
    if orientation is not None:
        codes = "".join(nibabel.aff2axcodes(affine))
        known = bool(image.header["qform_code"] or image.header["sform_code"])
        if not known or codes != orientation:
            raise UserError(
                f"{path} must be of orientation {orientation}, and "
                + (f"is {codes}" if known else "its header does not say (qform_code and sform_code are 0)")
                + "; reorient it, or read it without a demand to have it in RAS+ by its header"
            )
    turned = nibabel.as_closest_canonical(nibabel.Nifti1Image(values, affine, dtype=values.dtype))
    # A copy, since a view with negative strides is no tensor, and a memory map would follow the file.
    volume = Volume(np.array(turned.dataobj, order="C"), np.asarray(turned.affine, dtype=np.float64))
    if spacing is not None and not np.allclose(volume.spacing, spacing, rtol=1e-3):
        raise UserError(
            f"{path} must have a spacing of {_listed(spacing)} mm, and has {_listed(volume.spacing)}; use "
            "shared.data.volumes.resample"
        )
    return volume


def _load(nibabel: Any, path: Path) -> tuple[Any, Array]:
    """The image and its values, three axes, all finite."""
    damaged = (OSError, EOFError, zlib.error, nibabel.filebasedimages.ImageFileError)
    damaged += (nibabel.spatialimages.HeaderDataError, nibabel.wrapstruct.WrapStructError)
    if not path.is_file():
        raise UserError(f"{path} is missing: give the path of a NIfTI file (.nii or .nii.gz)")
    try:
        image = nibabel.load(path)
        values = np.asanyarray(image.dataobj)
    except damaged as error:
        raise UserError(f"{path} is no complete NIfTI file ({error}): fetch or write it again") from None
    if not isinstance(image, nibabel.Nifti1Pair):
        raise UserError(f"{path} is no NIfTI file, but {type(image).__name__}: convert it to .nii.gz")
    while values.ndim > 3 and values.shape[-1] == 1:
        values = values[..., 0]
    if values.ndim != 3 or 0 in values.shape:
        raise UserError(f"{path} must hold one volume of three axes (given: shape {list(values.shape)})")
    if values.dtype.kind not in "iuf":
        raise UserError(f"{path} must hold one number a voxel (given: {values.dtype})")
    lost = values.size - np.count_nonzero(np.isfinite(values))
    if lost:
        raise UserError(f"{path} has {lost} voxels that are not finite: replace them, for CT by -1000 (air)")
    return image, values


def read_labels(path: Path, classes: Collection[int], *, image: Volume | None = None) -> Volume:
    """Read a label map, int16, in RAS+; `classes` are the labels it may hold, `image` one whose grid it must have."""
    volume = read_volume(path)
    found = np.unique(volume.values)
    unknown = found[~np.isin(found, list(classes))]
    if len(unknown):
        raise UserError(
            f"{path} has labels that are not in the list of classes: {_listed(unknown[:10])} (allowed: "
            f"{_listed(sorted(classes))}); add these classes or map the labels"
        )
    labels = Volume(volume.values.astype(np.int16), volume.affine)
    if image is not None:
        check_same_grid(image, labels)
    return labels


def check_same_grid(image: Volume, labels: Volume) -> None:
    """`UserError` unless both have the same shape and, to a hundredth of a millimeter, the same affine."""
    if image.shape != labels.shape:
        what = f"{list(image.shape)} and {list(labels.shape)} voxels"
    elif not np.allclose(image.affine, labels.affine, rtol=0, atol=1e-2):
        what = f"affines {image.affine.round(3).tolist()} and {labels.affine.round(3).tolist()}"
    else:
        return
    raise UserError(f"image and labels are not on the same grid: {what}; resample one onto the other, or find its pair")


def write_volume(path: Path, volume: Volume) -> None:
    """Write a NIfTI file, .nii or .nii.gz, whole or not at all; the same volume gives the same bytes.

    Booleans become uint8 and 64-bit integers int32, half-precision numbers float32; other types are kept.
    """
    nibabel = load_optional("nibabel", EXTRA)
    path, values = Path(path), volume.values
    if not path.name.endswith((".nii", ".nii.gz")):
        raise UserError(f"the name of a NIfTI file ends in .nii or .nii.gz (given: {path.name})")
    if values.dtype.kind in "iu" and values.dtype.itemsize == 8 and values.size and np.abs(values).max() >= 2**31:
        raise UserError(f"{path} would need 64-bit integers, which few programs read: write smaller numbers or floats")
    stored = {"bool": "uint8", "int64": "int32", "uint64": "int32", "float16": "float32"}
    dtype = stored.get(values.dtype.name, values.dtype.name)
    image = nibabel.Nifti1Image(values.astype(dtype), volume.affine)
    image.header.set_xyzt_units("mm")
    content = image.to_bytes()
    if path.suffix == ".gz":
        content = gzip.compress(content, compresslevel=6, mtime=0)
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


# ---------------------------------------------------------------------------------------- resampling, normalization


def resample(volume: Volume, spacing: Sequence[float], *, labels: bool = False, order: int = 3) -> Volume:
    """The volume at another spacing in mm, over the same extent up to half a voxel.

    Images by splines of this order; labels by linear interpolation of each class, of which the largest wins.
    """
    from scipy.ndimage import affine_transform

    if len(spacing) != 3 or not all(step > 0 and math.isfinite(step) for step in spacing):
        raise UserError(f"spacing must be three positive numbers, in mm (given: {list(spacing)})")
    steps = np.asarray(spacing, dtype=np.float64) / volume.spacing
    if np.allclose(steps, 1, rtol=1e-3):
        return volume
    shape = tuple(max(1, round(size / step)) for size, step in zip(volume.shape, steps, strict=True))
    # Edges of the volume stay where they are, not centers of voxels.
    offset = (steps - 1) / 2

    def interpolate(values: Array, order: int) -> Array:
        return affine_transform(values.astype(np.float32), steps, offset, shape, order=order, mode="nearest")

    if labels:
        present = np.unique(volume.values)
        best = np.full(shape, -np.inf, dtype=np.float32)
        values = np.zeros(shape, dtype=volume.values.dtype)
        for label in present:
            share = interpolate(volume.values == label, 1)
            values[share > best] = label
            best = np.maximum(best, share)
    else:
        values = interpolate(volume.values, order)
    affine = volume.affine @ np.diag([*steps, 1.0])
    affine[:3, 3] = volume.affine[:3, :3] @ offset + volume.affine[:3, 3]
    return Volume(values, affine)


@dataclass(frozen=True)
class Normalization:
    """Clip to [low, high], subtract the mean, divide by the standard deviation; see `fit_normalization`."""

    low: float
    high: float
    mean: float
    std: float

    def apply(self, values: ArrayLike) -> NDArray[np.float32]:
        clipped = np.clip(np.asarray(values, dtype=np.float32), self.low, self.high)
        return ((clipped - self.mean) / self.std).astype(np.float32)


def fit_normalization(images: Iterable[Array], foregrounds: Iterable[Array]) -> Normalization:
    """Percentiles 0.5 and 99.5, mean and standard deviation of all foreground voxels, as nnU-Net does for CT.

    Images and boolean foregrounds `[X, Y, Z]`, in pairs; those of the training set only.
    """
    pairs = zip(images, foregrounds, strict=True)
    voxels = [np.asarray(image)[np.asarray(foreground, dtype=bool)] for image, foreground in pairs]
    values = np.concatenate(voxels).astype(np.float64) if voxels else np.empty(0)
    if not values.size or not np.isfinite(values).all() or values.std() == 0:
        raise UserError(
            f"a normalization needs foreground of finite, varying values (given: {values.size} voxels in {len(voxels)} "
            "images); check labels and images"
        )
    low, high = np.percentile(values, [0.5, 99.5])
    return Normalization(float(low), float(high), float(values.mean()), float(values.std()))


# ------------------------------------------------------------------------------------------- patches, augmentation


def sample_patch(
    image: Array,
    labels: Array | None,
    size: Sequence[int],
    generator: np.random.Generator,
    foreground: float = 1 / 3,
) -> tuple[Array, Array | None]:
    """A random patch of an image `[C, X, Y, Z]` and its labels `[X, Y, Z]`, as views; arrays or tensors.

    With probability `foreground` it is centered, as far as the border allows, at a voxel of a foreground class, class
    and voxel drawn evenly from those present. `UserError` where the volume is smaller than the patch.
    """
    shape = image.shape[1:]
    if len(size) != len(shape) or any(small > large for small, large in zip(size, shape, strict=True)):
        raise UserError(
            f"a patch of {'×'.join(map(str, size))} does not fit into a volume of {'×'.join(map(str, shape))}: choose "
            "a smaller patch, or pad the volume"
        )
    if labels is not None and tuple(labels.shape) != tuple(shape):
        raise UserError(f"image and labels must have the same grid (given: {list(shape)}, {list(labels.shape)})")
    room = [large - small for small, large in zip(size, shape, strict=True)]
    corner = [int(generator.integers(free + 1)) for free in room]
    if labels is not None and generator.random() < foreground:
        flat = np.asarray(labels).ravel()
        present = np.bincount(flat.astype(np.intp)).nonzero()[0]
        present = present[present > 0]
        if len(present):
            voxel = generator.choice(np.flatnonzero(flat == generator.choice(present)))
            center = np.unravel_index(voxel, shape)
            corner = [
                int(np.clip(at - small // 2, 0, free)) for at, small, free in zip(center, size, room, strict=True)
            ]
    box = tuple(slice(start, start + small) for start, small in zip(corner, size, strict=True))
    return image[(slice(None), *box)], None if labels is None else labels[box]


class Augmentation:
    """Random changes of an image, and of its labels along with it; see `augmentation`.

    Called with an image `[C, X, Y, Z]`, its labels `[X, Y, Z]` or None, and a seed that fixes all draws; returns both
    with shape and type kept.
    """

    def __init__(self, with_labels: Any, without_labels: Any) -> None:
        self._with_labels, self._without_labels = with_labels, without_labels

    def __call__(self, image: Tensor, labels: Tensor | None, seed: int) -> tuple[Tensor, Tensor | None]:
        transform = self._without_labels if labels is None else self._with_labels
        transform.set_random_state(seed=seed % 2**32)
        given = {"image": image} if labels is None else {"image": image, "labels": labels[None].float()}
        changed = {name: torch.Tensor.as_subclass(value, Tensor) for name, value in transform(given).items()}
        augmented = changed["image"].to(image.dtype).contiguous()
        return augmented, None if labels is None else changed["labels"][0].to(labels.dtype).contiguous()


def augmentation(*, left_right: bool, deformation: bool = True, intensity: bool = True) -> Augmentation:
    """nnU-Net's augmentation of normalized patches by MONAI, with its probabilities.

    Rotation ±30° and scale 0.7-1.4 (`deformation`); noise, blur, brightness and contrast 0.75-1.25, low resolution and
    gamma 0.7-1.5 (`intensity`); mirroring of every axis, of the first only where `left_right` is exchangeable, which it
    is not for organs that lie on one side.
    """
    monai = load_optional("monai.transforms", EXTRA)

    def compose(keys: tuple[str, ...]) -> Any:
        modes = ["bilinear", "nearest"][: len(keys)]
        turn, zoom = math.radians(30), ["trilinear", "nearest"][: len(keys)]
        deforming = [
            monai.RandRotated(keys, range_x=turn, range_y=turn, range_z=turn, prob=0.2, mode=modes),
            monai.RandZoomd(keys, prob=0.2, min_zoom=0.7, max_zoom=1.4, mode=zoom),
        ]
        of_intensity = [
            monai.RandGaussianNoised("image", prob=0.1, std=0.1),
            monai.RandGaussianSmoothd("image", (0.5, 1), (0.5, 1), (0.5, 1), prob=0.2),
            monai.RandScaleIntensityd("image", factors=0.25, prob=0.15),
            monai.RandScaleIntensityFixedMeand("image", factors=0.25, preserve_range=True, prob=0.15),
            monai.RandSimulateLowResolutiond("image", prob=0.25, zoom_range=(0.5, 1)),
            monai.RandAdjustContrastd("image", prob=0.1, gamma=(0.7, 1.5), retain_stats=True, invert_image=True),
            monai.RandAdjustContrastd("image", prob=0.3, gamma=(0.7, 1.5), retain_stats=True),
        ]
        mirroring = [monai.RandFlipd(keys, prob=0.5, spatial_axis=axis) for axis in range(0 if left_right else 1, 3)]
        return monai.Compose([*(deforming if deformation else []), *(of_intensity if intensity else []), *mirroring])

    return Augmentation(compose(("image", "labels")), compose(("image",)))


# -------------------------------------------------------------------------------------------------------- inference


def predict_logits(
    model: nn.Module,
    volumes: Tensor,
    window: Sequence[int],
    *,
    overlap: float = 0.5,
    sigma: float = 0.125,
    mirror_axes: Sequence[int] = (),
    batch_size: int = 2,
) -> Tensor:
    """Logits `[B, K, X, Y, Z]` of volumes `[B, C, X, Y, Z]` by sliding windows that overlap.

    Windows are weighted by a Gaussian whose standard deviation is `sigma` of their sides; each is the mean over all
    mirrorings of `mirror_axes` (0 to 2). Volumes smaller than the window are padded by their border. The model is in
    evaluation mode meanwhile.
    """
    inferers = load_optional("monai.inferers", EXTRA)
    if volumes.ndim != 5 or len(window) != 3 or not set(mirror_axes) <= {0, 1, 2} or not 0 <= overlap < 1:
        raise UserError(
            "prediction needs volumes [batch, channels, X, Y, Z], a window of three sides, mirror_axes among 0, 1, 2 "
            f"and 0 <= overlap < 1 (given: {list(volumes.shape)}, {list(window)}, {list(mirror_axes)}, {overlap})"
        )
    axes = [2 + axis for axis in mirror_axes]
    mirrored = list(chain.from_iterable(combinations(axes, count) for count in range(len(axes) + 1)))

    def predict(patches: Tensor) -> Tensor:
        return sum(model(patches.flip(flipped)).flip(flipped) for flipped in mirrored) / len(mirrored)

    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return inferers.sliding_window_inference(
                volumes,
                window,
                batch_size,
                predict,
                overlap=overlap,
                mode="gaussian",
                sigma_scale=sigma,
                padding_mode="replicate",
            )
    finally:
        model.train(training)


def keep_largest_component(labels: Array, classes: Collection[int]) -> Array:
    """Of each of these classes the largest part connected by faces, edges or corners; the rest becomes 0."""
    from scipy.ndimage import generate_binary_structure, label

    labels = np.array(labels)
    structure = generate_binary_structure(labels.ndim, labels.ndim)
    for number in classes:
        mask = labels == number
        parts, count = label(mask, structure)
        if count > 1:
            largest = 1 + np.bincount(parts.ravel())[1:].argmax()
            labels[mask & (parts != largest)] = 0
    return labels
