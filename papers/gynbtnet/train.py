"""Trains segmentation networks of the second and third stage, their cases and seeds side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from shared.config import Stage
from shared.data.volumes import Normalization, augmentation, sample_patch
from shared.evaluation.scores import code_digest
from shared.files import write_json
from shared.nn.segmentation import segmentation_loss
from shared.tracking import start_run
from shared.training import Job, Moment, fit, load_weights, run_jobs
from shared.training.parallel import Report

from . import data
from .baselines import build_baseline
from .config import BASELINES, Params, StageTraining
from .data import CaseSet, Prepared
from .model import Origin, inherit, origin_of, residual_unet

SLOWEST = ("scratch_long", "swin_unetr")
# What a checkpoint depends on: one made by other code is not continued.
TRAINING_CODE = ("baselines.py", "model.py", "pretrain.py", "train.py")


class Segmenter(Protocol):
    """A network with logits of several scales, finest first, for the loss of training."""

    def scales(self, volume: Tensor) -> list[Tensor]: ...


class Patches(Dataset):
    """Random patches of cases, normalized: image [1, *size] and, where there are labels, labels [*size].

    A third of the patches of labeled cases is centered on a labeled voxel, as in nnU-Net. The training loop seeds
    torch's randomness for each patch, from which all that is random here is drawn.
    """

    def __init__(self, cases: CaseSet, normalization: Normalization, params: Params, length: int) -> None:
        self.cases, self.normalization, self.size, self.length = cases, normalization, params.patch, length
        self.augment = None
        if params.augmentation != "none":
            self.augment = augmentation(left_right=False, deformation=params.augmentation == "full", intensity=True)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        generator = np.random.default_rng(int(torch.randint(2**62, ())))
        number = int(generator.integers(len(self.cases.images)))
        labels = None if self.cases.labels is None else np.asarray(self.cases.labels[number])
        patch, labels = sample_patch(np.asarray(self.cases.images[number])[None], labels, self.size, generator)
        image = torch.from_numpy(self.normalization.apply(patch))
        target = None if labels is None else torch.from_numpy(np.ascontiguousarray(labels, dtype=np.int64))
        if self.augment is not None:
            image, target = self.augment(image, target, int(generator.integers(2**31)))
        return (image,) if target is None else (image, target)


class Segmentation:
    """Soft Dice plus cross-entropy at every scale."""

    def __call__(self, model: Segmenter, batch: tuple[Tensor, ...], moment: Moment) -> Mapping[str, Tensor]:
        image, labels = batch
        return segmentation_loss(model.scales(image), labels.long())


def run_folder(stage: Stage[Params], task: str, model: str, seed: int, cases: int | None = None) -> Path:
    """Where the weights of one training lie; `task` is the stage that trains it."""
    folder = stage.runs_dir / task / model
    return (folder if cases is None else folder / f"cases{cases}") / f"seed{seed}"


def build(params: Params, model: str, num_classes: int, seed: int) -> nn.Module:
    """The network of a model of the second or third stage, weights drawn from `seed`."""
    if model in BASELINES:
        return build_baseline(model, params, num_classes, seed)
    return residual_unet(params.network, num_classes, seed)


def train_third_stage(stage: Stage[Params], models: Sequence[str]) -> None:
    """Train those of `models` that the profile has, on each number of cases and seed, side by side."""
    wanted = [
        (model, cases, seed)
        for seed in stage.params.seeds
        for cases, listed in stage.params.models.items()
        for model in models
        if model in listed
    ]
    run_side_by_side(
        stage,
        [
            Job(f"{model}, {cases} cases, seed {seed}", _train_third, (stage, model, cases, seed))
            for model, cases, seed in wanted
        ],
    )


def _train_third(stage: Stage[Params], model: str, cases: int, seed: int, report: Report) -> float:
    training_set = data.load(stage.data_dir).read("brachytherapy").first(cases)
    return train_segmenter(stage, model, seed, training_set, stage.params.training(model), report, cases)


def run_side_by_side(stage: Stage[Params], jobs: list[Job]) -> None:
    """Run trainings in as many processes as the profile has workers; the last losses to runs/<stage>/summary.json."""
    # The longest first, so that none is left over at the end.
    jobs = sorted(jobs, key=lambda job: not job.label.startswith(SLOWEST))
    losses = run_jobs(jobs, workers=stage.params.workers, threads=stage.params.threads) if jobs else []
    summary = {job.label: loss for job, loss in zip(jobs, losses, strict=True)}
    write_json(stage.runs_dir / stage.name / "summary.json", {"last_loss": summary})


def train_segmenter(
    stage: Stage[Params],
    model: str,
    seed: int,
    cases: CaseSet,
    training: StageTraining,
    report: Report,
    num_cases: int | None = None,
) -> float:
    """Train one network of the stage `stage.name`, from what its variant inherits, and return its last loss."""
    params = stage.params
    task = "multi_organ" if stage.name == "multi_organ" else "brachytherapy"
    network = build(params, model, 1 + len(params.classes(task)), seed)
    origin = None if model in BASELINES else origin_of(stage, model, seed)
    if origin is not None:
        inherit(network, origin)
    directory = run_folder(stage, stage.name, model, seed, num_cases)
    return run_training(
        stage,
        f"{model} · {stage.name}",
        model,
        seed,
        network,
        Segmentation(),
        cases,
        training,
        directory,
        origin,
        report,
    )


def run_training(
    stage: Stage[Params],
    title: str,
    model: str,
    seed: int,
    network: nn.Module,
    objective: Any,
    cases: CaseSet,
    training: StageTraining,
    directory: Path,
    origin: Origin | None,
    report: Report,
) -> float:
    """Train a network on random patches of the cases, tracked; returns the mean loss of the last epoch."""
    prepared = data.load(stage.data_dir)
    fields = {"patch", "augmentation", "mask_ratio", "network", "swin"}
    settings = stage.params.model_dump(mode="json", include=fields) | {"training": training.model_dump(mode="json")}
    start = None if origin is None else origin.digest()
    code = code_digest(stage.folder, TRAINING_CODE)
    fingerprint = json.dumps([settings, model, len(cases.images), prepared.digest, start, code])
    with start_run(
        stage.slug,
        f"{title} · {len(cases.images)} cases · seed {seed}",
        parent=stage.run.id if stage.run else None,
        params=settings | {"seed": seed, "cases": len(cases.images)},
        tags={"model": model, "stage": stage.name, "seed": str(seed), "profile": stage.profile},
    ) as run:
        run.log_dataset(stage.name, prepared.digest, source=prepared.source, context="train")
        result = fit(
            # The layout in which convolutions of volumes are fastest, by an eighth on CPU.
            network.to(memory_format=torch.channels_last_3d),
            Patches(cases, prepared.normalization, stage.params, training.steps_per_epoch * training.batch_size),
            objective,
            training,
            directory=directory,
            seed=seed,
            fingerprint=fingerprint,
            track=run,
            report=report,
            num_workers=stage.params.loaders,
        )
    return float(result.history[-1]["train/loss"])


def load_segmenter(
    stage: Stage[Params], prepared: Prepared, task: str, model: str, seed: int, cases: int | None = None
) -> nn.Module:
    """A trained network, on the device that there is; `UserError` where it is missing, damaged or of other params."""
    of = "multi_organ" if task == "multi_organ" else "brachytherapy"
    network = build(stage.params, model, 1 + len(stage.params.classes(of)), seed)
    load_weights(run_folder(stage, task, model, seed, cases) / "best.safetensors", network)
    return network.to("cuda" if torch.cuda.is_available() else "cpu").eval()
