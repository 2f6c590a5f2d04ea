"""Trains one model on every equation of the profile, its seeds side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from shared.config import Stage, UserError
from shared.evaluation.metrics import nrmse
from shared.evaluation.scores import code_digest
from shared.files import write_json
from shared.tracking import start_run
from shared.training import Job, Moment, fit, run_jobs
from shared.training.parallel import Report

from . import data
from .baselines import model_like, parse_name
from .config import Experiment, Params, split_name
from .losses import autoregressive_steps, cape_loss, equation_residual, gradient_penalty, rollout, rollout_loss

# What a checkpoint depends on: one made by other code is not continued.
TRAINING_CODE = ("baselines.py", "losses.py", "model.py", "train.py")


def train(stage: Stage[Params]) -> None:
    """Train `stage.model` wherever the profile lists it; weights to runs/<model>/<equation>/seed<n>/."""
    if stage.model is None:
        raise UserError("train needs a model, such as: reprise run train --model fno_cape")
    parse_name(split_name(stage.model)[0])
    folder = stage.runs_dir / stage.model
    equations = [name for name, experiment in stage.params.experiments.items() if stage.model in experiment.models]
    jobs = [
        Job(f"{stage.model}, {equation}, seed {seed}", train_one, (stage, equation, seed, folder))
        for equation in equations
        for seed in stage.params.seeds
    ]
    # On a GPU one process trains one seed after the other; on CPU each core has one.
    workers = 1 if torch.cuda.is_available() else stage.params.workers
    results = run_jobs(jobs, workers=workers, threads=stage.params.threads)
    best = {job.label: result for job, result in zip(jobs, results, strict=True)}
    write_json(folder / "summary.json", {"model": stage.model, "best_validation_nrmse": best})


def train_one(stage: Stage[Params], equation: data.EquationName, seed: int, folder: Path, report: Report) -> float:
    """Train one seed on one equation and return its best validation error."""
    experiment = stage.params.experiments[equation]
    training_set = data.load(stage.data_dir, equation, "train")
    validation_set = data.load(stage.data_dir, equation, "validation")
    torch.manual_seed(seed)
    model = model_like(training_set, split_name(str(stage.model))[0], experiment.network)
    settings = experiment.model_dump(mode="json", exclude={"models"})
    code = code_digest(stage.folder, TRAINING_CODE)
    fingerprint = json.dumps([settings, stage.model, training_set.attrs["digest"], code])
    name = f"{stage.model} · {equation} · seed {seed}"
    parent = stage.run.id if stage.run else None
    tags = {"model": str(stage.model), "equation": equation, "seed": str(seed), "profile": stage.profile}
    with start_run(
        stage.slug, name, parent=parent, params=settings | {"seed": seed}, tags=tags, system_metrics=True
    ) as run:
        run.log_dataset(
            f"{equation}/train", training_set.attrs["digest"], source=training_set.attrs["source"], context="train"
        )
        result = fit(
            model,
            TensorDataset(torch.from_numpy(training_set.u), torch.from_numpy(training_set.parameters)),
            Objective(stage, equation, training_set),
            experiment.training,
            directory=folder / equation / f"seed{seed}",
            seed=seed,
            fingerprint=fingerprint,
            validate=Validation(validation_set),
            monitor="validation/nrmse",
            track=run,
            report=report,
        )
        run.log({"validation/best_nrmse": result.best_value or float("nan")}, step=result.best_epoch + 1)
    return float(result.best_value or float("nan"))


class Objective:
    """What a batch of trajectories costs a model at a moment of the training: the paper's losses and its curriculum."""

    def __init__(self, stage: Stage[Params], equation: data.EquationName, training_set: data.EquationData) -> None:
        self.experiment: Experiment = stage.params.experiments[equation]
        network, self.schedule = split_name(str(stage.model))
        self.residual = None
        variant = parse_name(network)[1]
        if variant.startswith("pino"):
            name = equation + variant.removeprefix("pino")
            self.residual = equation_residual(name, float(training_set.times[1] - training_set.times[0]))
        self.lowest = torch.from_numpy(training_set.parameters.min(axis=0))
        self.highest = torch.from_numpy(training_set.parameters.max(axis=0))

    def __call__(self, model: nn.Module, batch: tuple[Tensor, ...], moment: Moment) -> Mapping[str, Tensor]:
        frames, parameters = batch
        experiment = self.experiment
        has_cape = hasattr(model, "cape")
        if has_cape and moment.epoch < experiment.warmup_epochs:
            return cape_loss(model, frames, parameters, experiment.noise)
        terms = rollout_loss(
            model,
            frames,
            parameters,
            autoregressive_steps=autoregressive_steps(
                self.schedule, moment.epoch, moment.epochs, experiment.warmup_epochs, frames.shape[1]
            ),
            push_forward=self.schedule == "push_forward",
            guess_weight=experiment.guess_weight,
            noise=experiment.noise,
            residual=self.residual,
            residual_weight=experiment.physics_weight,
        )
        if has_cape and experiment.gradient_penalty:
            lowest, highest = self.lowest.to(frames.device), self.highest.to(frames.device)
            penalty = gradient_penalty(model, frames[:, 0], lowest, highest, experiment.gradient_penalty)
            terms |= {"loss": terms["loss"] + penalty, "gradient_penalty": penalty}
        return terms


class Validation:
    """nRMSE of the free-running rollout over the validation set, which picks the checkpoint."""

    def __init__(self, validation_set: data.EquationData) -> None:
        self.frames = torch.from_numpy(validation_set.u)
        self.parameters = torch.from_numpy(validation_set.parameters)

    def __call__(self, model: nn.Module) -> dict[str, float]:
        device = next(model.parameters()).device
        truth, given = self.frames.to(device), model.frames_in
        predicted = rollout(model, truth[:, :given], self.parameters.to(device), truth.shape[1] - given)
        return {"validation/nrmse": nrmse(predicted, truth[:, given:]).mean().item()}
