"""nnU-Net's plan, the wrapped networks of MONAI, and the atlas."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch

from shared.config import UserError

from ..baselines import NNUNet, SwinUNETR, atlas, plan_strides
from ..config import SwinSettings
from ..data import CaseSet


def test_the_plan_halves_axes_down_to_four_voxels() -> None:
    assert plan_strides((128, 128, 128)) == [(1, 1, 1), *[(2, 2, 2)] * 5]
    assert plan_strides((32, 32, 24)) == [(1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 1)]
    # nnU-Net's patch for thick slices: five halvings in the plane, four across.
    assert plan_strides((64, 192, 160)) == [(1, 1, 1), *[(2, 2, 2)] * 4, (1, 2, 2)]
    assert plan_strides((256, 256, 256)) == [(1, 1, 1), *[(2, 2, 2)] * 5]


def test_nnunet_has_deep_supervision_in_training_alone() -> None:
    torch.manual_seed(0)
    model = NNUNet(2, (16, 16, 32), num_classes=3)
    volume = torch.randn(2, 1, 16, 16, 32)
    scales = model.scales(volume)
    assert [tuple(each.shape) for each in scales] == [(2, 3, 16, 16, 32)] * 3
    model.eval()
    assert len(model.scales(volume)) == 1
    torch.testing.assert_close(model(volume), model.scales(volume)[0])


def test_nnunet_is_no_residual_network_and_its_width_is_limited() -> None:
    model = NNUNet(2, (128, 128, 128), num_classes=2)
    weights = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if "conv1" in name}
    assert max(shape[0] for shape in weights.values()) == 20
    assert not any("conv3" in name for name in model.state_dict())


def test_patches_that_are_too_small_for_nnunet() -> None:
    with pytest.raises(
        UserError, match=r"patches that can be halved twice, of 16 voxels or more \(given: \[8, 8, 8\]\)"
    ):
        NNUNet(2, (8, 8, 8), num_classes=2)


def test_swin_unetr_pads_and_crops() -> None:
    torch.manual_seed(0)
    model = SwinUNETR(SwinSettings(feature_size=12, window_size=2, norm="group"), num_classes=3).eval()
    with torch.no_grad():
        volume = torch.randn(1, 1, 16, 32, 24)
        found = model(volume)
        padded = torch.nn.functional.pad(volume, (0, 8, 0, 0, 0, 16), mode="replicate")
        torch.testing.assert_close(found, model.network(padded)[:, :, :16, :, :24])
    assert len(model.scales(volume)) == 1


def test_the_atlas_is_the_most_frequent_label() -> None:
    labels = np.array([[[[0, 1, 2]]], [[[0, 1, 1]]], [[[2, 0, 2]]]], np.uint8)
    cases = CaseSet(np.zeros(labels.shape, np.int16), labels)
    assert atlas(cases, 3).tolist() == [[[0, 1, 2]]]
    assert atlas(cases.first(2), 3).tolist() == [[[0, 1, 1]]]


def test_without_monai(monkeypatch: pytest.MonkeyPatch) -> None:
    modules: dict[str, Any] = dict.fromkeys(("monai", "monai.networks", "monai.networks.nets"))
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(UserError, match=r"pip install -e '.\[gynbtnet\]'"):
        NNUNet(2, (16, 16, 16), num_classes=2)
