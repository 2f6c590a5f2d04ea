"""What GynBTNet is compared with: MONAI's nnU-Net and Swin UNETR, and the most frequent label of each place."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from shared.config import Stage, UserError, load_optional

from .config import BASELINES, Params, SwinSettings
from .data import CaseSet

LARGEST_WIDTH_RATIO = 10
SWIN_STRIDE = 32


def baselines(stage: Stage[Params]) -> None:
    """Train the baselines on the third stage; weights to runs/baselines/<model>/cases<n>/…."""
    # Here, since the training that all models share builds these networks.
    from .train import train_third_stage

    load_optional("monai.networks.nets", "gynbtnet")  # once, not in each of the processes that are forked
    train_third_stage(stage, BASELINES)


def build_baseline(name: str, params: Params, num_classes: int, seed: int) -> nn.Module:
    """The network of a baseline, weights drawn from `seed`."""
    torch.manual_seed(seed)
    if name == "nnunet":
        return NNUNet(params.network.width, params.patch, num_classes)
    return SwinUNETR(params.swin, num_classes)


def plan_strides(patch: Sequence[int], smallest: int = 4, most: int = 5) -> list[tuple[int, ...]]:
    """Stride of each resolution along each axis by nnU-Net's rule, for isotropic voxels.

    An axis is halved as long as what is left of the patch has `smallest` voxels or more, at most `most` times; the
    first resolution has stride 1.
    """
    sides = list(patch)
    strides: list[tuple[int, ...]] = [(1,) * len(sides)]
    while len(strides) <= most:
        stride = tuple(2 if side >= 2 * smallest and side % 2 == 0 else 1 for side in sides)
        if max(stride) == 1:
            break
        strides.append(stride)
        sides = [side // step for side, step in zip(sides, stride, strict=True)]
    return strides


class NNUNet(nn.Module):
    """nnU-Net's plain U-Net (Isensee et al. 2021) as MONAI's DynUNet: two convolutions a level, deep supervision.

    Number of levels and strides follow from the patch; channels double from `width` on, up to ten times as many.
    """

    def __init__(self, width: int, patch: Sequence[int], num_classes: int) -> None:
        super().__init__()
        strides = plan_strides(patch)
        if len(strides) < 3:
            raise UserError(
                f"nnU-Net needs patches that can be halved twice, of 16 voxels or more (given: {list(patch)})"
            )
        widths = [min(width * 2**level, LARGEST_WIDTH_RATIO * width) for level in range(len(strides))]
        self.network = _monai("DynUNet")(
            spatial_dims=3,
            in_channels=1,
            out_channels=num_classes,
            kernel_size=[3] * len(strides),
            strides=strides,
            upsample_kernel_size=strides[1:],
            filters=widths,
            norm_name=("INSTANCE", {"affine": True}),
            deep_supervision=True,
            deep_supr_num=len(strides) - 2,
            res_block=False,
        )

    def forward(self, volume: Tensor) -> Tensor:
        return self.scales(volume)[0]

    def scales(self, volume: Tensor) -> list[Tensor]:
        """Logits of the decoder's levels, finest first, all brought to the volume's size; in eval mode the finest."""
        logits = self.network(volume)
        return list(logits.unbind(1)) if self.training else [logits]


class SwinUNETR(nn.Module):
    """MONAI's Swin UNETR (Hatamizadeh et al. 2022); volumes are padded at their ends to what its five halvings need."""

    def __init__(self, settings: SwinSettings, num_classes: int) -> None:
        super().__init__()
        group = ("group", {"num_groups": settings.feature_size // 3, "affine": True})
        self.network = _monai("SwinUNETR")(
            in_channels=1,
            out_channels=num_classes,
            feature_size=settings.feature_size,
            window_size=settings.window_size,
            norm_name="instance" if settings.norm == "instance" else group,
        )

    def forward(self, volume: Tensor) -> Tensor:
        sides = volume.shape[2:]
        padding = [amount for side in reversed(sides) for amount in (0, -side % SWIN_STRIDE)]
        # Repeating the edge leaves no step that looks like a border of the body.
        logits = self.network(functional.pad(volume, padding, mode="replicate"))
        return logits[:, :, : sides[0], : sides[1], : sides[2]]

    def scales(self, volume: Tensor) -> list[Tensor]:
        """Its only output, as a list: it has no deep supervision."""
        return [self(volume)]


def atlas(cases: CaseSet, num_classes: int) -> NDArray[np.uint8]:
    """The most frequent label of each voxel over the cases, [X, Y, Z]; the lower one where two are level."""
    assert cases.labels is not None
    counts = np.stack([(cases.labels == label).sum(axis=0) for label in range(num_classes)])
    return counts.argmax(axis=0).astype(np.uint8)


def _monai(name: str) -> type[nn.Module]:
    return getattr(load_optional("monai.networks.nets", "gynbtnet"), name)
