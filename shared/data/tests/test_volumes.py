from __future__ import annotations

import gzip
import struct
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from shared.config import UserError, data_root
from shared.data.volumes import (
    Normalization,
    Volume,
    augmentation,
    check_same_grid,
    fit_normalization,
    keep_largest_component,
    predict_logits,
    read_labels,
    read_volume,
    resample,
    sample_patch,
    write_volume,
)

nibabel = pytest.importorskip("nibabel")
pytest.importorskip("monai")

AFFINE = np.array([[2.0, 0, 0, -10], [0, 3, 0, 5], [0, 0, 4, 7], [0, 0, 0, 1]])


def ramp(shape: tuple[int, ...] = (6, 5, 4)) -> Volume:
    """Each voxel holds its own position's first coordinate in mm, plus 1000 times the second's index."""
    x, y, _ = np.indices(shape)
    return Volume((2.0 * x - 10 + 1000 * y).astype(np.float32), AFFINE)


# ------------------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("name", ["volume.nii", "volume.nii.gz"])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "float32", "float64"])
def test_round_trip(tmp_path: Path, name: str, dtype: str) -> None:
    volume = Volume(np.arange(120).reshape(6, 5, 4).astype(dtype), AFFINE)
    write_volume(tmp_path / name, volume)
    again = read_volume(tmp_path / name, spacing=(2, 3, 4), orientation="RAS")
    np.testing.assert_array_equal(again.values, volume.values)
    assert again.values.dtype == dtype
    np.testing.assert_allclose(again.affine, AFFINE)
    assert again.spacing == (2, 3, 4)
    first = (tmp_path / name).read_bytes()
    write_volume(tmp_path / name, volume)
    assert (tmp_path / name).read_bytes() == first


def test_types_that_nifti_has_not(tmp_path: Path) -> None:
    for given, stored in {"bool": "uint8", "int64": "int32", "float16": "float32"}.items():
        write_volume(tmp_path / "a.nii", Volume(np.ones((2, 2, 2), dtype=given), AFFINE))
        assert read_volume(tmp_path / "a.nii").values.dtype == stored
    with pytest.raises(UserError, match="64-bit"):
        write_volume(tmp_path / "a.nii", Volume(np.full((2, 2, 2), 2**40), AFFINE))
    with pytest.raises(UserError, match="ends in"):
        write_volume(tmp_path / "a.mha", ramp())


@pytest.mark.parametrize("orientation", ["LPS", "RAS", "SLA", "PIR"])
def test_every_orientation_is_read_as_ras(tmp_path: Path, orientation: str) -> None:
    from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

    volume = ramp()
    image = nibabel.Nifti1Image(volume.values, volume.affine)
    turned = image.as_reoriented(ornt_transform(io_orientation(image.affine), axcodes2ornt(orientation)))
    nibabel.save(turned, tmp_path / "turned.nii")
    again = read_volume(tmp_path / "turned.nii", orientation=orientation, spacing=(2, 3, 4))
    np.testing.assert_array_equal(again.values, volume.values)
    np.testing.assert_allclose(again.affine, volume.affine)
    assert torch.from_numpy(again.values).shape == (6, 5, 4)


def written(path: Path, values: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    nibabel.save(nibabel.Nifti1Image(values, affine), path)
    return path


def truncated(path: Path, suffix: str) -> Path:
    noise = np.random.default_rng(0).normal(size=(20, 20, 20)).astype(np.float32)
    content = nibabel.Nifti1Image(noise, AFFINE).to_bytes()
    content = gzip.compress(content) if suffix == ".nii.gz" else content
    path = path.with_name(f"cut{suffix}")
    path.write_bytes(content[: len(content) // 2])
    return path


def text_file(path: Path, text: str = "not an image") -> Path:
    path.write_text(text)
    return path


def patched(path: Path, offset: int, *numbers: float) -> Path:
    """A valid file, but for these float32 numbers of its header."""
    content = bytearray(nibabel.Nifti1Image(np.full((2, 2, 2), 7, dtype=np.int16), AFFINE).to_bytes())
    struct.pack_into(f"<{len(numbers)}f", content, offset, *numbers)
    path.write_bytes(content)
    return path


def other_format(path: Path) -> Path:
    path = path.with_suffix(".mgz")
    nibabel.save(nibabel.MGHImage(np.ones((2, 2, 2), dtype=np.float32), AFFINE), path)
    return path


def test_slope_and_intercept_of_the_file_are_applied(tmp_path: Path) -> None:
    path = patched(tmp_path / "scaled.nii", 112, 2, -1024)
    np.testing.assert_array_equal(read_volume(path).values, np.full((2, 2, 2), 2 * 7 - 1024))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path, "missing"),
        (text_file, "no complete NIfTI"),
        (lambda path: truncated(path, ".nii"), "no complete NIfTI"),
        (lambda path: truncated(path, ".nii.gz"), "no complete NIfTI"),
        (lambda path: text_file(path, ""), "no complete NIfTI"),
        (other_format, "no NIfTI file, but MGHImage"),
        (
            lambda path: written(path, np.ones((2, 2, 2, 3), dtype=np.float32)),
            r"three axes \(given: shape \[2, 2, 2, 3",
        ),
        (lambda path: written(path, np.full((2, 2, 2), np.nan, dtype=np.float32)), "8 voxels that are not finite"),
        (lambda path: written(path, np.ones((2, 2, 2), dtype=np.complex64)), "one number a voxel"),
        (lambda path: patched(path, 296, 0, 0, 0, 0), "affine that maps no volume"),
    ],
)
def test_files_that_are_no_volume(tmp_path: Path, make: Callable[[Path], Path], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_volume(make(tmp_path / "volume.nii"))


def test_a_single_time_is_a_volume(tmp_path: Path) -> None:
    assert read_volume(written(tmp_path / "a.nii", np.ones((2, 3, 4, 1), dtype=np.int16))).shape == (2, 3, 4)


def test_demands_of_the_caller(tmp_path: Path) -> None:
    path = written(tmp_path / "a.nii", np.ones((2, 2, 2), dtype=np.int16))
    with pytest.raises(UserError, match=r"spacing of 1, 1, 1 mm, and has 2, 3, 4.*resample"):
        read_volume(path, spacing=(1, 1, 1))
    with pytest.raises(UserError, match="orientation LPS, and is RAS"):
        read_volume(path, orientation="LPS")
    image = nibabel.Nifti1Image(np.ones((2, 2, 2), dtype=np.int16), None)
    nibabel.save(image, tmp_path / "unknown.nii")
    with pytest.raises(UserError, match="does not say"):
        read_volume(tmp_path / "unknown.nii", orientation="RAS")


def test_labels(tmp_path: Path) -> None:
    image = ramp()
    values = np.zeros(image.shape, dtype=np.float32)
    values[2] = 3
    write_volume(tmp_path / "labels.nii.gz", Volume(values, AFFINE))
    labels = read_labels(tmp_path / "labels.nii.gz", range(4), image=image)
    assert labels.values.dtype == np.int16
    np.testing.assert_array_equal(labels.values, values)
    with pytest.raises(UserError, match=r"not in the list of classes: 3 \(allowed: 0, 1, 2\)"):
        read_labels(tmp_path / "labels.nii.gz", range(3))
    write_volume(tmp_path / "labels.nii.gz", Volume(values / 2, AFFINE))
    with pytest.raises(UserError, match=r"classes: 1\.5"):
        read_labels(tmp_path / "labels.nii.gz", range(4))


def test_image_and_labels_of_different_grids(tmp_path: Path) -> None:
    image = ramp()
    moved = AFFINE.copy()
    moved[0, 3] += 1
    write_volume(tmp_path / "labels.nii", Volume(np.zeros(image.shape, dtype=np.int16), moved))
    with pytest.raises(UserError, match="not on the same grid: affines"):
        read_labels(tmp_path / "labels.nii", [0], image=image)
    with pytest.raises(UserError, match=r"\[6, 5, 4\] and \[6, 5, 3\] voxels"):
        check_same_grid(image, Volume(image.values[..., :3], AFFINE))
    check_same_grid(image, Volume(image.values, AFFINE + 1e-4))


@pytest.mark.parametrize("module", ["nibabel", "monai.transforms"])
def test_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[gynbtnet\]'"):
        read_volume(Path("a.nii")) if module == "nibabel" else augmentation(left_right=True)


# ---------------------------------------------------------------------------------------- resampling, normalization


@pytest.mark.parametrize("spacing", [(1.0, 3.0, 4.0), (4.0, 3.0, 2.0)])
def test_resampling_keeps_positions_in_space(spacing: tuple[float, ...]) -> None:
    volume = ramp((12, 5, 4))
    out = resample(volume, spacing, order=1)
    assert out.spacing == spacing
    assert np.prod([size * step for size, step in zip(out.shape, spacing, strict=True)]) == 12 * 2 * 5 * 3 * 4 * 4
    # Linear interpolation of a coordinate is the coordinate, away from the border.
    x = out.affine[0, 0] * np.arange(out.shape[0]) + out.affine[0, 3]
    np.testing.assert_allclose(out.values[1:-1, 0, 0], x[1:-1], atol=1e-4)
    np.testing.assert_allclose(out.values[2, 3, 1] - out.values[2, 2, 1], 1000, rtol=1e-5)
    # Outer edges of the first voxel.
    edges = [v.affine @ [-0.5, -0.5, -0.5, 1] for v in (volume, out)]
    np.testing.assert_allclose(*edges)


def test_resampled_labels_are_labels() -> None:
    values = np.zeros((12, 12, 12), dtype=np.int16)
    values[2:6, 2:10, 2:10], values[6:10, 2:10, 2:10] = 2, 7
    labels = Volume(values, np.eye(4))
    finer = resample(labels, (0.5, 0.5, 0.5), labels=True)
    assert finer.values.dtype == np.int16
    assert set(np.unique(finer.values)) == {0, 2, 7}
    for label in (2, 7):
        assert (finer.values == label).sum() / 8 == pytest.approx((values == label).sum(), rel=0.05)
    back = resample(finer, (1, 1, 1), labels=True)
    assert (back.values == values).mean() > 0.98


def test_resampling_to_the_same_spacing_is_nothing() -> None:
    volume = ramp()
    assert resample(volume, (2, 3, 4)) is volume
    with pytest.raises(UserError, match="three positive"):
        resample(volume, (1, 1))


def test_normalization_by_percentiles_of_the_foreground() -> None:
    values = np.arange(2000, dtype=np.float32).reshape(20, 10, 10)
    foreground = values >= 1000
    fitted = fit_normalization([values, values], [foreground, foreground])
    assert (fitted.low, fitted.high) == pytest.approx(
        tuple(np.percentile(np.arange(1000.0, 2000.0).repeat(2), [0.5, 99.5]))
    )
    assert fitted.mean == pytest.approx(1499.5)
    assert fitted.std == pytest.approx(np.arange(1000).std())
    applied = Normalization(low=-10, high=10, mean=5, std=2).apply(np.array([-50, 5, 7, 50]))
    assert applied.dtype == np.float32
    assert applied.tolist() == [-7.5, 0, 1, 2.5]
    for masks in ([np.zeros_like(foreground)], [values == 3], []):
        with pytest.raises(UserError, match="foreground of finite, varying values"):
            fit_normalization([values] * len(masks), masks)


# ------------------------------------------------------------------------------------------- patches, augmentation


def labeled() -> tuple[np.ndarray, np.ndarray]:
    labels = np.zeros((20, 18, 16), dtype=np.int16)
    labels[10, 9, 8], labels[1, 2, 14] = 1, 2
    return np.stack([np.arange(labels.size).reshape(labels.shape), labels]), labels


def test_foreground_patches_are_centered_where_the_border_allows() -> None:
    image, labels = labeled()
    generator = np.random.default_rng(0)
    corners = set()
    for _ in range(40):
        patch, of_labels = sample_patch(image, labels, (6, 4, 8), generator, foreground=1)
        assert patch.shape == (2, 6, 4, 8)
        np.testing.assert_array_equal(patch[1], of_labels)
        corners.add(tuple(int(i) for i in np.unravel_index(patch[0, 0, 0, 0], labels.shape)))
    assert corners == {(7, 7, 4), (0, 0, 8)}


def test_a_third_of_the_patches_has_foreground_at_its_center() -> None:
    image, labels = labeled()
    labels = np.zeros_like(labels)
    labels[10, 9, 8] = 1
    generator = np.random.default_rng(0)
    centered = [sample_patch(image, labels, (4, 4, 4), generator)[1][2, 2, 2] for _ in range(1500)]
    # A random patch has it there in one of 17 · 15 · 13 places.
    assert np.mean(centered) == pytest.approx(1 / 3, abs=0.04)


def test_random_patches_reach_every_place_and_follow_the_seed() -> None:
    image, labels = labeled()

    def corners(seed: int) -> list[int]:
        generator = np.random.default_rng(seed)
        return [int(sample_patch(image, None, (19, 17, 16), generator)[0][0, 0, 0, 0]) for _ in range(60)]

    assert len(set(corners(0))) == 4
    assert corners(0) == corners(0) != corners(1)
    nothing = np.zeros_like(labels)
    assert sample_patch(image, nothing, (4, 4, 4), np.random.default_rng(0), foreground=1)[1].shape == (4, 4, 4)


def test_patches_that_cannot_be() -> None:
    image, labels = labeled()
    with pytest.raises(UserError, match="patch of 21×4×4 does not fit into a volume of 20×18×16"):
        sample_patch(image, labels, (21, 4, 4), np.random.default_rng(0))
    with pytest.raises(UserError, match="same grid"):
        sample_patch(image, labels[1:], (4, 4, 4), np.random.default_rng(0))


def sided() -> tuple[torch.Tensor, torch.Tensor]:
    """An image that is its labels: 1 on the left, 2 at the front of the right, 3 behind."""
    labels = torch.ones(16, 16, 16, dtype=torch.long)
    labels[8:, 8:], labels[8:, :8] = 2, 3
    return labels[None].float(), labels


def test_augmentation_follows_the_seed() -> None:
    augment = augmentation(left_right=False)
    image, labels = sided()
    image = image + 0.1 * torch.randn_like(image)
    first, again = augment(image, labels, 5), augment(image, labels, 5)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    images = [augment(image, labels, seed)[0] for seed in range(12)]
    assert all(type(x) is torch.Tensor and x.shape == image.shape and x.dtype == image.dtype for x in images)
    assert all(x.isfinite().all() for x in images)
    assert len({tuple(x.flatten().tolist()) for x in images}) > 9


def test_image_and_labels_move_together() -> None:
    augment = augmentation(left_right=True, intensity=False)
    image, labels = sided()
    moved = 0
    for seed in range(20):
        x, y = augment(image, labels, seed)
        assert set(y.unique().tolist()) <= {1, 2, 3}
        moved += not torch.equal(x[0].round(), image[0])
        # Interpolation may differ from the nearest voxel at borders only.
        assert (x[0] - y).abs().lt(0.51).float().mean() > 0.9
    assert moved > 10


@pytest.mark.parametrize("left_right", [False, True])
def test_mirroring_of_left_and_right_is_a_choice(left_right: bool) -> None:
    augment = augmentation(left_right=left_right, deformation=False, intensity=False)
    image, labels = sided()
    flips = list(product([False, True], repeat=3))
    seen = set()
    for seed in range(40):
        x, y = augment(image, labels, seed)
        matching = [f for f in flips if torch.equal(y, labels.flip([axis for axis in range(3) if f[axis]]))]
        assert matching
        assert torch.equal(x[0], y.float())
        seen.add((matching[0][0], matching[0][1]))
        alone, none = augment(image, None, seed)
        assert none is None
        assert torch.equal(alone, x)
    assert seen == {(a, b) for a in {False, left_right} for b in (False, True)}


def test_intensities_change_and_labels_do_not() -> None:
    augment = augmentation(left_right=False, deformation=False)
    image, labels = torch.randn(1, 12, 12, 12), torch.ones(12, 12, 12, dtype=torch.long)
    changed = [augment(image, labels, seed) for seed in range(30)]
    assert all(torch.equal(y, labels) for _, y in changed)
    sorted_values = image.flatten().sort().values
    assert sum(not torch.equal(x.flatten().sort().values, sorted_values) for x, _ in changed) > 15


# -------------------------------------------------------------------------------------------------------- inference


class Ramp(nn.Module):
    """Returns the index along the first axis, whatever it is given."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert not self.training
        return torch.arange(x.shape[2], dtype=x.dtype)[:, None, None].expand_as(x)


@pytest.mark.parametrize("shape", [(16, 12, 10), (5, 12, 7)])
def test_windows_of_a_pointwise_model_are_the_whole(shape: tuple[int, ...]) -> None:
    model = nn.Conv3d(2, 3, 1)
    volumes = torch.randn(2, 2, *shape)
    for axes in ((), (0, 2)):
        logits = predict_logits(model, volumes, (8, 8, 8), mirror_axes=axes)
        torch.testing.assert_close(logits, model(volumes).detach(), rtol=1e-4, atol=1e-5)
        assert not logits.requires_grad
    assert model.training


def test_windows_are_weighted_by_a_gaussian() -> None:
    logits = predict_logits(Ramp(), torch.zeros(1, 1, 12, 8, 8), (8, 8, 8))
    # Windows begin at 0 and 4; of two that see a place, the one nearer to it in its center counts more.
    weights = np.exp(-((np.arange(8) - 3.5) ** 2) / 2)
    for x in range(4, 8):
        expected = (weights[x] * x + weights[x - 4] * (x - 4)) / (weights[x] + weights[x - 4])
        assert logits[0, 0, x, 4, 4].item() == pytest.approx(expected, rel=0.02)
    assert logits[0, 0, :4, 0, 0].tolist() == pytest.approx([0, 1, 2, 3], abs=1e-5)


def test_mirror_averaging() -> None:
    model = nn.Conv3d(1, 2, 3, padding=1)
    x = torch.randn(1, 1, 8, 8, 8)
    mirrorings = [(), (2,), (4,), (2, 4)]
    expected = sum(model(x.flip(axes)).flip(axes) for axes in mirrorings) / 4
    torch.testing.assert_close(predict_logits(model, x, (8, 8, 8), mirror_axes=(0, 2)), expected.detach())
    with pytest.raises(UserError, match="mirror_axes among 0, 1, 2"):
        predict_logits(model, x, (8, 8, 8), mirror_axes=(3,))


def test_the_largest_component() -> None:
    labels = np.zeros((8, 8, 8), dtype=np.int16)
    labels[0, 0, 0] = labels[1, 1, 1] = labels[2, 2, 2] = 1  # one part, by corners
    labels[6, 6, 6] = labels[6, 6, 7] = 1
    labels[0, 7, 7] = labels[4, 4, 0] = 2
    kept = keep_largest_component(labels, [1, 3])
    expected = labels.copy()
    expected[6, 6, 6:] = 0
    np.testing.assert_array_equal(kept, expected)
    assert labels[6, 6, 6] == 1
    assert (keep_largest_component(labels, [2]) == 2).sum() == 1


# -------------------------------------------------------------------------------------------------------- real data


@pytest.fixture(scope="module")
def folder() -> Path:
    folder = data_root() / "gynbtnet"
    if not (folder / "example_seg.nii.gz").is_file():
        pytest.skip(f"no real CT in {folder}")
    return folder


def test_a_real_ct_and_its_labels(folder: Path, tmp_path: Path) -> None:
    image = read_volume(folder / "example_ct_sm.nii.gz", spacing=(3, 3, 3), orientation="RAS")
    labels = read_labels(folder / "example_seg.nii.gz", range(118), image=image)
    assert image.shape == (122, 101, 30)
    assert len(np.unique(labels.values)) > 20
    # The right lung's air is on the right of the left lung's, and the liver (5) on the right of the spleen (1).
    liver, spleen = (np.argwhere(labels.values == label).mean(0) for label in (5, 1))
    assert liver[0] > spleen[0]
    write_volume(tmp_path / "again.nii.gz", image)
    again = read_volume(tmp_path / "again.nii.gz")
    np.testing.assert_array_equal(again.values, image.values)
    np.testing.assert_allclose(again.affine, image.affine, atol=1e-5)
    whole = read_volume(folder / "example_ct.nii.gz")
    with pytest.raises(UserError, match="not on the same grid"):
        check_same_grid(whole, labels)
    fitted = fit_normalization([image.values], [labels.values > 0])
    assert -1000 < fitted.low < 0 < fitted.high < 1500
    coarse = resample(image, (6, 6, 6), order=1)
    assert coarse.shape == (61, 50, 15)
    assert coarse.values.mean() == pytest.approx(image.values.mean(), rel=0.05)


def test_a_truncated_real_ct(folder: Path, tmp_path: Path) -> None:
    content = (folder / "example_ct_sm.nii.gz").read_bytes()
    (tmp_path / "cut.nii.gz").write_bytes(content[:100_000])
    with pytest.raises(UserError, match="no complete NIfTI"):
        read_volume(tmp_path / "cut.nii.gz")
