"""Training: patches, that both kinds of networks learn, what a training is repeated for, and budgets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shared.config import Stage, UserError, load_params
from shared.data.volumes import Normalization
from shared.nn.masked_modeling import patch_mask, reconstruction_loss
from shared.training import Job, Moment

from .. import data
from .. import train as training
from ..config import Params
from ..data import CaseSet
from ..model import masked_model
from ..multi_organ import multi_organ
from ..pretrain import MaskedModeling, masked_volumes, pretrain
from ..train import Patches, Segmentation, build, load_segmenter, run_folder, run_side_by_side

FOLDER = Path(__file__).parents[1]
UNIT = Normalization(low=-1e9, high=1e9, mean=0.0, std=1.0)


@pytest.fixture(scope="module")
def params() -> Params:
    loaded = load_params(FOLDER / "params.yaml", Params, "tiny")[1]
    return loaded.model_copy(update={"seeds": (0,)})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, params: Params) -> Path:
    """A copy of the paper with prepared data and a first stage."""
    folder = tmp_path_factory.mktemp("paper")
    for path in FOLDER.glob("*.py"):
        (folder / path.name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    data.prepare(Stage(folder, "prepare", "tiny", params))
    pretrain(Stage(folder, "pretrain", "tiny", params))
    return folder


# --- patches ---


def cases_of_one_voxel() -> CaseSet:
    """Two cases of 24³ whose voxels are numbered, one voxel of each labeled."""
    images = np.arange(2 * 24**3, dtype=np.int16).reshape(2, 24, 24, 24)
    labels = np.zeros(images.shape, np.uint8)
    labels[:, 12, 5, 20] = 3
    return CaseSet(images, labels)


def test_patches_are_cut_where_the_labels_are(params: Params) -> None:
    patches = Patches(cases_of_one_voxel(), UNIT, params, 60)
    torch.manual_seed(0)
    drawn = [patches[index] for index in range(60)]
    seen = sum(int(labels.any()) for _, labels in drawn)
    assert 20 < seen < 60
    for image, labels in drawn:
        assert image.shape == (1, 16, 16, 16)
        assert image.dtype == torch.float32
        assert labels.shape == (16, 16, 16)
        assert labels.dtype == torch.int64
        first = int(image.flatten()[0])
        numbers = first + np.add.outer(np.add.outer(np.arange(16) * 576, np.arange(16) * 24), np.arange(16))
        np.testing.assert_array_equal(image[0].numpy(), numbers)
    assert len({int(image.flatten()[0]) // 24**3 for image, _ in drawn}) == 2


def test_patches_follow_torchs_seed(params: Params) -> None:
    patches = Patches(cases_of_one_voxel(), UNIT, params, 4)
    torch.manual_seed(3)
    first = patches[0]
    torch.manual_seed(3)
    again, *others = (patches[0] for _ in range(6))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not all(torch.equal(first[0], other[0]) for other in others)


def test_augmented_patches_keep_shapes_and_labels(params: Params) -> None:
    full = params.model_copy(update={"augmentation": "full"})
    torch.manual_seed(0)
    image, labels = Patches(cases_of_one_voxel(), UNIT, full, 4)[0]
    assert image.shape == (1, 16, 16, 16)
    assert labels.shape == (16, 16, 16)
    assert set(labels.unique().tolist()) <= {0, 3}
    unlabeled = CaseSet(cases_of_one_voxel().images, None)
    assert len(Patches(unlabeled, UNIT, full, 4)[0]) == 1


def test_a_patch_larger_than_the_case(params: Params) -> None:
    large = params.model_copy(update={"patch": (32, 16, 16)})
    with pytest.raises(UserError, match="does not fit into a volume"):
        Patches(cases_of_one_voxel(), UNIT, large, 1)[0]


# --- learning ---


def test_segmentation_is_learned(params: Params) -> None:
    """Bright blocks, as large as a voxel of the coarsest scale, are class 1."""
    torch.manual_seed(0)
    labels = (torch.randn(2, 4, 4, 4) > 0.5).long()
    for axis in (1, 2, 3):
        labels = labels.repeat_interleave(4, axis)
    image = labels[:, None] + 0.1 * torch.randn(2, 1, 16, 16, 16)
    for name in ("scratch", "nnunet"):
        network = build(params, name, 2, seed=0)
        optimizer = torch.optim.AdamW(network.parameters(), 1e-2)
        losses = []
        for _ in range(25):
            loss = Segmentation()(network, (image, labels), Moment(0, 0, 1, 1))["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.6 * losses[0], name


def test_masked_modeling_learns_more_than_the_mean_of_a_patch(params: Params) -> None:
    """On waves that go through visible and masked patches alike; predicting the mean has a loss of 1."""
    torch.manual_seed(0)
    x = torch.arange(16.0)
    phases = torch.rand(2, 1, 1, 1, 1) * 6
    volume = torch.sin(x[:, None, None] * 0.5 + x[None, :, None] * 0.3 + 0 * x + phases)
    model = masked_model(params.network.model_copy(update={"width": 4}), seed=0)
    objective = MaskedModeling(params.mask_ratio)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(60):
        loss = objective(model, (volume,), Moment(0, 0, 1, 1))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.7
    mask = patch_mask(2, model.patches_of(volume), 0.6)
    assert reconstruction_loss(torch.zeros_like(volume), volume, mask).item() == pytest.approx(1, abs=1e-3)


def test_every_loss_is_of_new_masks(params: Params) -> None:
    model = masked_model(params.network, seed=0)
    volume = torch.randn(1, 1, 16, 16, 16)
    objective = MaskedModeling(params.mask_ratio)
    torch.manual_seed(1)
    first, second = (objective(model, (volume,), Moment(0, 0, 1, 1))["loss"] for _ in range(2))
    torch.manual_seed(1)
    again = objective(model, (volume,), Moment(0, 0, 1, 1))["loss"]
    assert first.item() == again.item() != second.item()


def test_held_out_masks_are_the_same_for_all_models(folder: Path, params: Params) -> None:
    prepared = data.load(folder / "data")
    first, again = (list(masked_volumes(params, prepared)) for _ in range(2))
    assert len(first) == 2
    assert all(torch.equal(a[1], b[1]) for a, b in zip(first, again, strict=True))
    assert first[0][1].float().mean().item() == pytest.approx(0.4, abs=0.02)


# --- stages ---


def test_a_stage_starts_from_the_one_before_and_again_when_that_changes(folder: Path, params: Params) -> None:
    stage = Stage(folder, "multi_organ", "tiny", params)
    multi_organ(stage)
    variants = ("scratch", "self_supervised")
    finished = {name: run_folder(stage, "multi_organ", name, 0) / "finished.json" for name in variants}
    before = {name: path.stat().st_mtime_ns for name, path in finished.items()}
    multi_organ(stage)
    assert {name: path.stat().st_mtime_ns for name, path in finished.items()} == before
    # Another first stage: what inherits from it is trained anew, what does not is kept.
    changed = params.model_copy(update={"pretrain": params.pretrain.model_copy(update={"learning_rate": 5e-3})})
    pretrain(Stage(folder, "pretrain", "tiny", changed))
    multi_organ(stage)
    after = {name: path.stat().st_mtime_ns for name, path in finished.items()}
    assert after["scratch"] == before["scratch"]
    assert after["self_supervised"] > before["self_supervised"]
    assert json.loads((folder / "runs/multi_organ/summary.json").read_text())["last_loss"]


def test_a_first_stage_of_another_size_is_refused(folder: Path, params: Params) -> None:
    network = params.network.model_copy(update={"width": 4})
    stage = Stage(folder, "multi_organ", "tiny", params.model_copy(update={"network": network}))
    with pytest.raises(UserError, match=r"pretrain/seed0/best.safetensors does not fit.*run the earlier stage again"):
        multi_organ(stage)


def test_networks_that_were_not_trained(tmp_path: Path, folder: Path, params: Params) -> None:
    stage = Stage(tmp_path, "evaluate", "tiny", params)
    with pytest.raises(UserError, match=r"best.safetensors is missing"):
        load_segmenter(stage, data.load(folder / "data"), "brachytherapy", "scratch", 0, 3)


def test_the_long_training_has_the_steps_of_all_stages() -> None:
    for profile in ("small", "long", "gpu", "paper"):
        params = load_params(FOLDER / "params.yaml", Params, profile)[1]
        stages = (params.pretrain, params.multi_organ, params.brachytherapy)
        assert params.training("scratch_long").steps == sum(each.steps for each in stages)
        assert params.training("scratch").steps == params.training("nnunet").steps == params.brachytherapy.steps


def test_the_longest_trainings_come_first(tmp_path: Path, params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def record(jobs: list[Job], **options: Any) -> list[float]:
        seen.extend(job.label for job in jobs)
        return [0.0] * len(jobs)

    monkeypatch.setattr(training, "run_jobs", record)
    jobs = [Job(label, print) for label in ("scratch, 3 cases", "scratch_long, 3 cases", "gynbtnet, 3 cases")]
    run_side_by_side(Stage(tmp_path, "brachytherapy", "tiny", params), jobs)
    assert seen == ["scratch_long, 3 cases", "scratch, 3 cases", "gynbtnet, 3 cases"]
