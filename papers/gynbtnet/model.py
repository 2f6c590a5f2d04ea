"""The network of all three stages, and what each stage passes on to the next.

1. Masked modeling of unlabeled CT trains the encoder.
2. Segmentation of many organs trains encoder and decoder, from the encoder of stage 1.
3. Segmentation of the brachytherapy structures, from encoder and decoder of stage 2, or of an earlier one.

The output layers are always new. The paper's full text could not be read, and its abstract names no architecture: a
residual U-Net of nnU-Net's style stands for its "large CNN", and SparK for its pretraining.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from shared.config import Stage, UserError
from shared.nn.masked_modeling import SparK
from shared.nn.residual_unet import ResidualEncoder, ResidualUNet, transfer_weights
from shared.training.checkpoint import load_tensors

from .config import SECOND_STAGE, Network, Params


@dataclass(frozen=True)
class Origin:
    """Weights that a training starts from: a finished training of an earlier stage, and the parts that carry over."""

    path: Path
    parts: tuple[str, ...]

    def digest(self) -> str:
        """SHA-256 of the file, so that what was trained from other weights is trained again."""
        try:
            return hashlib.sha256(self.path.read_bytes()).hexdigest()
        except FileNotFoundError:
            raise UserError(f"{self.path} is missing: run the earlier stage first (dvc repro)") from None


def masked_model(network: Network, seed: int) -> SparK:
    """Encoder and light decoder of stage 1, weights drawn from `seed`."""
    torch.manual_seed(seed)
    encoder = ResidualEncoder(1, network.width, network.blocks, network.resolutions)
    return SparK(encoder, decoder_width=network.masked_decoder_width, sparse=network.sparse)


def residual_unet(network: Network, num_classes: int, seed: int) -> ResidualUNet:
    """The network of stages 2 and 3, weights drawn from `seed`; `num_classes` counts the background."""
    torch.manual_seed(seed)
    return ResidualUNet(1, num_classes, network.width, network.blocks, network.resolutions)


def origin_of(stage: Stage[Params], variant: str, seed: int) -> Origin | None:
    """What a variant of stage 2 or 3 (`stage.name`) starts from; None where it starts from nothing."""
    pretrained = Origin(stage.runs_dir / "pretrain" / f"seed{seed}" / "best.safetensors", ("encoder",))
    if variant == "self_supervised":
        return pretrained
    if variant in SECOND_STAGE:
        folder = stage.runs_dir / "multi_organ" / SECOND_STAGE[variant] / f"seed{seed}"
        return Origin(folder / "best.safetensors", ("encoder", "decoder"))
    return None


def inherit(model: nn.Module, origin: Origin) -> None:
    """Carry weights over into `model`, in place; `UserError` where the file is missing, damaged or of another size."""
    weights, _ = load_tensors(origin.path)
    try:
        transfer_weights(model, weights, origin.parts)
    except UserError as error:
        raise UserError(
            f"{origin.path} does not fit the network of this stage (trained with other params?): run the earlier stage "
            f"again (dvc repro). {error}"
        ) from None
