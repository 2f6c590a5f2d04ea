"""Sets of phantoms and of a small official CT, labels by class, and files that are missing or do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.config import Stage, UserError, load_params, validate
from shared.data.volumes import Volume, write_volume

from .. import data
from ..config import BRACHYTHERAPY_CLASSES, MULTI_ORGAN_CLASSES, REAL_CLASSES, Params, PhantomData
from ..phantom import CODE

FOLDER = Path(__file__).parents[1]


def params_of(profile: str) -> Params:
    return load_params(FOLDER / "params.yaml", Params, profile)[1]


def stage_of(folder: Path, params: Params, profile: str = "tiny") -> Stage[Params]:
    return Stage(folder, "prepare", profile, params)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> data.Prepared:
    folder = tmp_path_factory.mktemp("paper")
    data.prepare(stage_of(folder, params_of("tiny")))
    return data.load(folder / "data")


def test_sets_of_phantoms(prepared: data.Prepared) -> None:
    settings = params_of("tiny").data
    assert isinstance(settings, PhantomData)
    for name in data.SETS:
        cases = prepared.read(name)
        assert cases.images.shape == (getattr(settings, name), 16, 16, 16)
        assert cases.images.dtype == np.int16
        assert (cases.labels is None) == name.startswith("unlabeled")
    multi_organ, brachytherapy = prepared.read("multi_organ").labels, prepared.read("brachytherapy").labels
    assert set(np.unique(multi_organ)) == set(range(7))
    assert set(np.unique(brachytherapy)) == set(range(6))
    assert prepared.spacing == (11.0, 11.0, 11.0)
    assert prepared.source.startswith("generated")


def test_no_anatomy_is_in_two_sets(prepared: data.Prepared) -> None:
    images = [image.tobytes() for name in data.SETS for image in prepared.read(name).images]
    assert len(set(images)) == len(images)
    train, test = (prepared.read(name).labels for name in ("brachytherapy", "test"))
    assert all((a != b).mean() > 0.005 for a in train for b in test)


def test_preparing_again_gives_the_same(prepared: data.Prepared, tmp_path: Path) -> None:
    params = params_of("tiny")
    data.prepare(stage_of(tmp_path, params.model_copy(update={"workers": 2})))
    assert data.load(tmp_path / "data").digest == prepared.digest
    data.prepare(stage_of(tmp_path, params.model_copy(update={"seed": 1})))
    assert data.load(tmp_path / "data").digest != prepared.digest


def test_smaller_training_sets_are_part_of_larger_ones(prepared: data.Prepared) -> None:
    cases = prepared.read("brachytherapy")
    assert np.array_equal(cases.first(2).images, cases.images[:2])
    assert np.array_equal(cases.first(2).labels, cases.labels[:2])


def test_classes_are_made_of_structures() -> None:
    codes = np.array([CODE[name] for name in ("background", "rectum", "sigmoid", "sacrum", "ctv", "bladder")])
    assert data.relabel(codes, data.codes_of(MULTI_ORGAN_CLASSES)).tolist() == [0, 2, 2, 5, 0, 1]
    assert data.relabel(codes, data.codes_of(BRACHYTHERAPY_CLASSES)).tolist() == [0, 2, 3, 0, 5, 1]
    assert data.relabel(np.array([[1, 26], [50, 117]]), REAL_CLASSES).tolist() == [[2, 6], [6, 0]]


def test_blocks_lie_around_the_middle() -> None:
    image = np.arange(5 * 4 * 6).reshape(5, 4, 6).astype(np.int16)
    found = list(data.blocks(image, (2, 4, 5)))
    assert [block.shape for block in found] == [(2, 4, 5)] * 2
    np.testing.assert_array_equal(found[1], image[2:4, :, :5])


# --- the real CT ---


@pytest.fixture
def official(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The official layout: a CT of 16 x 16 x 40 voxels, its uppermost 20 slices, and their labels."""
    monkeypatch.setenv("REPRISE_DATA", str(tmp_path))
    folder = tmp_path / "gynbtnet"
    folder.mkdir()
    generator = np.random.default_rng(0)
    scan = generator.normal(0, 100, (16, 16, 40)).astype(np.int16)
    labels = generator.choice([0, 5, 30, 92], (16, 16, 20)).astype(np.uint8)
    affine = np.diag([3.0, 3.0, 3.0, 1.0])
    write_volume(folder / "example_ct.nii.gz", Volume(scan, affine))
    write_volume(folder / "example_ct_sm.nii.gz", Volume(scan[:, :, 20:], affine))
    write_volume(folder / "example_seg.nii.gz", Volume(labels, affine))
    return folder


def real_params(**changes: Any) -> Params:
    section = params_of("real").model_dump(mode="json") | {"patch": [16, 16, 8], "workers": 1}
    section["data"] = section["data"] | {"held_out_slices": 12, "test_slices": 8} | changes
    return validate(Params, section, "here")


def test_the_real_ct_is_cut_up(official: Path, tmp_path: Path) -> None:
    data.prepare(stage_of(tmp_path, real_params(), "real"))
    prepared = data.load(tmp_path / "data")
    shapes = {
        name: prepared.read(name).images.shape[1:]
        for name in ("unlabeled", "unlabeled_held_out", "multi_organ", "test")
    }
    assert [shape[2] for shape in shapes.values()] == [28, 12, 12, 8]
    held_out, test = prepared.read("unlabeled_held_out").images, prepared.read("test")
    np.testing.assert_array_equal(held_out[0, :, :, -8:], test.images[0])
    assert set(np.unique(test.labels)) == {0, 1, 6}  # liver and vertebrae; a rib is no class
    assert prepared.source.startswith("real")
    with pytest.raises(UserError, match=r"brachytherapy_images.npy is missing: run the stage prepare"):
        prepared.read("brachytherapy")


def test_phantoms_and_the_real_ct_together(official: Path, tmp_path: Path) -> None:
    section = params_of("tiny").model_dump(mode="json")
    section["data"] |= {"with_real_ct": True}
    data.prepare(stage_of(tmp_path, validate(Params, section, "here")))
    # 48 x 48 x 120 mm are smaller than one block of 176 mm in every direction, and are padded with air.
    assert data.load(tmp_path / "data").read("unlabeled").images.shape == (5, 16, 16, 16)


def test_files_of_the_real_ct_that_are_missing(official: Path, tmp_path: Path) -> None:
    (official / "example_ct.nii.gz").unlink()
    (official / "example_seg.nii.gz").unlink()
    with pytest.raises(UserError, match=r"gynbtnet lacks example_ct.nii.gz, example_seg.nii.gz: .*REPRISE_DATA"):
        data.prepare(stage_of(tmp_path, real_params(), "real"))


def test_labels_that_are_no_class(official: Path, tmp_path: Path) -> None:
    labels = Volume(np.full((16, 16, 20), 118, np.uint8), np.diag([3.0, 3.0, 3.0, 1.0]))
    write_volume(official / "example_seg.nii.gz", labels)
    with pytest.raises(UserError, match="labels that are not in the list of classes: 118"):
        data.prepare(stage_of(tmp_path, real_params(), "real"))


def test_labels_of_another_scan(official: Path, tmp_path: Path) -> None:
    other = Volume(np.zeros((16, 16, 19), np.uint8), np.diag([3.0, 3.0, 3.0, 1.0]))
    write_volume(official / "example_seg.nii.gz", other)
    with pytest.raises(UserError, match="not on the same grid"):
        data.prepare(stage_of(tmp_path, real_params(), "real"))


def test_more_slices_kept_back_than_there_are(official: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lower held_out_slices or test_slices"):
        data.prepare(stage_of(tmp_path, real_params(held_out_slices=40), "real"))
    with pytest.raises(UserError, match="the first stage would see what is tested on"):
        real_params(held_out_slices=7)


# --- what goes wrong ---


def test_data_that_was_not_prepared_or_is_damaged(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run the stage prepare first"):
        data.load(tmp_path)
    (tmp_path / "sets.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        data.load(tmp_path)
    (tmp_path / "sets.json").write_text('{"spacing": [1, 1, 1]}')
    with pytest.raises(UserError, match="damaged"):
        data.load(tmp_path)


def test_an_array_that_is_cut_off(prepared: data.Prepared, tmp_path: Path) -> None:
    cut = tmp_path / "data"
    cut.mkdir()
    for path in prepared.folder.iterdir():
        (cut / path.name).write_bytes(path.read_bytes()[:-100] if path.name == "test_images.npy" else path.read_bytes())
    with pytest.raises(UserError, match=r"test_images.npy is damaged"):
        data.load(cut).read("test")
