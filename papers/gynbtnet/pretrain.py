"""Stage 1: trains the encoder by masked modeling of unlabeled CT, one training a seed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from shared.config import Stage
from shared.nn.masked_modeling import SparK, patch_mask, reconstruction_loss
from shared.training import Job, Moment, load_weights
from shared.training.parallel import Report

from . import data
from .config import Params
from .data import Prepared
from .model import masked_model
from .train import run_side_by_side, run_training


def pretrain(stage: Stage[Params]) -> None:
    """Train all seeds side by side; weights to runs/pretrain/seed<n>."""
    run_side_by_side(
        stage, [Job(f"masked modeling, seed {seed}", _pretrain, (stage, seed)) for seed in stage.params.seeds]
    )


class MaskedModeling:
    """Mean squared error of masked patches, each normalized by its own mean and deviation (SparK)."""

    def __init__(self, mask_ratio: float) -> None:
        self.mask_ratio = mask_ratio

    def __call__(self, model: SparK, batch: tuple[Tensor, ...], moment: Moment) -> Mapping[str, Tensor]:
        (image,) = batch
        mask = patch_mask(len(image), model.patches_of(image), self.mask_ratio, device=image.device)
        return {"loss": reconstruction_loss(model(image, mask), image, mask)}


def _pretrain(stage: Stage[Params], seed: int, report: Report) -> float:
    params = stage.params
    cases = data.load(stage.data_dir).read("unlabeled")
    model = masked_model(params.network, seed)
    directory = stage.runs_dir / "pretrain" / f"seed{seed}"
    objective = MaskedModeling(params.mask_ratio)
    return run_training(
        stage,
        "masked modeling",
        "masked_modeling",
        seed,
        model,
        objective,
        cases,
        params.pretrain,
        directory,
        None,
        report,
    )


def load_masked_model(stage: Stage[Params], seed: int) -> SparK:
    """The trained model of a seed, on the device that there is."""
    model = masked_model(stage.params.network, seed)
    load_weights(stage.runs_dir / "pretrain" / f"seed{seed}" / "best.safetensors", model)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def masked_volumes(params: Params, prepared: Prepared) -> Iterator[tuple[Tensor, Tensor]]:
    """Blocks of the held-out volumes, normalized, [1, 1, *patch], each with its mask, the same for all models."""
    images = prepared.read("unlabeled_held_out").images
    stride = 2 ** (params.network.resolutions - 1)
    patches = tuple(side // stride for side in params.patch)
    generator = torch.Generator().manual_seed(params.seed)
    for image in images:
        for block in data.blocks(image, params.patch):
            volume = torch.from_numpy(prepared.normalization.apply(block))[None, None]
            yield volume, patch_mask(1, patches, params.mask_ratio, generator=generator)
