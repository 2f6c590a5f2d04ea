"""Trains the networks of one family on every experiment and horizon of the profile, side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from shared.config import Stage, UserError
from shared.evaluation.scores import code_digest
from shared.files import write_json
from shared.tracking import start_run
from shared.training import Job, Moment, fit, run_jobs
from shared.training.parallel import Report

from . import data
from .config import BROADCAST, FAMILIES, INPUT_STEPS, STEP_MINUTES, Experiment, Params, family_of
from .model import build_model

# What a checkpoint depends on: one made by other code is not continued.
TRAINING_CODE = ("baselines.py", "model.py", "train.py")
EVALUATION_BATCH = 256


def train(stage: Stage[Params]) -> None:
    """Train the family `stage.model`, or one network of it; weights to runs/<family>/<model>/<experiment>/…."""
    known = [*FAMILIES, *dict.fromkeys(name for each in stage.params.experiments.values() for name in each.models)]
    if stage.model not in known:
        raise UserError(
            f"train needs a family or a model of the profile, such as --model regional; choose one of "
            f"{', '.join(known)} (given: {stage.model})"
        )
    jobs = [
        Job(
            f"{model}, {name}, {horizon * STEP_MINUTES} min, seed {seed}",
            train_one,
            (stage, name, model, horizon, seed),
        )
        for name, experiment in stage.params.experiments.items()
        for horizon in experiment.horizons
        for model in experiment.models
        if stage.model in (model, family_of(model))
        for seed in stage.params.seeds
    ]
    # On a GPU one process trains one seed after the other; on CPU each core has one.
    workers = 1 if torch.cuda.is_available() else stage.params.workers
    results = run_jobs(jobs, workers=workers, threads=stage.params.threads) if jobs else []
    best = {job.label: result for job, result in zip(jobs, results, strict=True)}
    write_json(stage.runs_dir / _family(stage.model) / "summary.json", {"best_validation_mse": best})


def run_folder(stage: Stage[Params], experiment: str, model: str, horizon: int, seed: int) -> Path:
    """Where the weights of one training lie."""
    return stage.runs_dir / family_of(model) / model / experiment / f"horizon{horizon}" / f"seed{seed}"


def make_model(experiment: Experiment, model: str, graph: data.Graph, horizon: int, seed: int) -> nn.Module:
    """The network of a training, weights drawn from `seed`; every seed of RanT-GCN draws other groups too."""
    torch.manual_seed(seed)
    settings = experiment.network
    settings = settings.model_copy(update={"decomposition_seed": settings.decomposition_seed + seed})
    return build_model(
        model.removesuffix(BROADCAST),
        graph,
        num_features=len(data.FEATURES),
        input_steps=INPUT_STEPS,
        horizon=horizon,
        settings=settings,
    )


def train_one(stage: Stage[Params], name: str, model: str, horizon: int, seed: int, report: Report) -> float:
    """Train one network at one horizon and seed and return its best validation error."""
    experiment = stage.params.experiments[name]
    prepared = data.load(stage.data_dir, name)
    network = make_model(experiment, model, prepared.graph, horizon, seed)
    windows = prepared.windows("train", horizon, experiment.train_stride, scaled=True)
    validation = prepared.windows("validation", horizon, experiment.train_stride, scaled=True)
    settings = experiment.model_dump(mode="json", include={"network", "training", "train_stride"})
    fingerprint = json.dumps(
        [settings, model, horizon, prepared.attrs["digest"], code_digest(stage.folder, TRAINING_CODE)]
    )
    tags = {"model": model, "experiment": name, "horizon": str(horizon), "seed": str(seed), "profile": stage.profile}
    with start_run(
        stage.slug,
        f"{model} · {name} · {horizon * STEP_MINUTES} min · seed {seed}",
        parent=stage.run.id if stage.run else None,
        params=settings | {"horizon": horizon, "seed": seed},
        tags=tags,
    ) as run:
        run.log_dataset(name, prepared.attrs["digest"], source=prepared.attrs["source"], context="train")
        result = fit(
            network,
            windows.dataset(),
            Objective(misaligned=model.endswith(BROADCAST)),
            experiment.training,
            directory=run_folder(stage, name, model, horizon, seed),
            seed=seed,
            fingerprint=fingerprint,
            validate=Validation(validation.dataset()),
            monitor="validation/mse",
            track=run,
            report=report,
        )
        run.log({"validation/best_mse": result.best_value or float("nan")}, step=result.best_epoch + 1)
    return float(result.best_value or float("nan"))


class Objective:
    """Mean squared error of the scaled target over the readings that were observed.

    `misaligned` takes the mean over every pair of a forecast step and a target step instead, which is what subtracting
    [1, H, N, 1] from [N, H] does in the published code for STID and STNorm.
    """

    def __init__(self, misaligned: bool = False) -> None:
        self.misaligned = misaligned

    def __call__(self, model: nn.Module, batch: tuple[Tensor, ...], moment: Moment) -> Mapping[str, Tensor]:
        inputs, targets, observed = batch
        predicted = model(inputs)
        if self.misaligned:
            predicted, targets, observed = predicted[:, :, None], targets[:, None], observed[:, None]
        weights = observed.expand_as(predicted - targets).to(predicted.dtype)
        return {"loss": (weights * (predicted - targets) ** 2).sum() / weights.sum().clamp(min=1)}


class Validation:
    """Mean squared error over the validation windows, which picks the checkpoint; the same for all networks."""

    def __init__(self, windows: TensorDataset) -> None:
        self.inputs, self.targets, self.observed = windows.tensors

    def __call__(self, model: nn.Module) -> dict[str, float]:
        device = next(model.parameters()).device
        observed = self.observed.to(device)
        errors = (predict(model, self.inputs, device) - self.targets.to(device)) ** 2
        return {"validation/mse": (errors[observed].mean() if observed.any() else errors.mean()).item()}


@torch.no_grad()
def predict(model: nn.Module, inputs: Tensor, device: torch.device) -> Tensor:
    """Forecasts [windows, horizon, N] of a network, scaled, a batch at a time."""
    return torch.cat([model(batch.to(device)) for batch in inputs.split(EVALUATION_BATCH)])


def _family(name: str | None) -> str:
    return name if name in FAMILIES else family_of(str(name))
