"""Trains one model on every experiment of the profile that lists it, its seeds side by side."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from shared.config import Stage, UserError
from shared.evaluation.scores import code_digest
from shared.files import write_json
from shared.tracking import start_run
from shared.training import Job, run_jobs
from shared.training.language import TokenValidation, train_language_model
from shared.training.parallel import Report

from . import data
from .config import Params
from .model import MODELS, build_model

# What a checkpoint depends on: one made by other code is not continued.
TRAINING_CODE = ("model.py", "train.py")


def train(stage: Stage[Params]) -> None:
    """Train `stage.model` wherever the profile lists it; weights to runs/<model>/<experiment>/seed<n>/."""
    if stage.model is None:
        raise UserError("train needs a model, such as: reprise run train --model deltanet")
    if stage.model not in MODELS:
        raise UserError(f"unknown model {stage.model!r}; choose one of {', '.join(MODELS)}")
    folder = stage.runs_dir / stage.model
    jobs = [
        Job(f"{stage.model}, {experiment}, seed {seed}", train_one, (stage, experiment, seed, folder))
        for experiment in stage.params.trained_on(stage.model)
        for seed in stage.params.seeds
    ]
    # On a GPU one process trains one seed after the other; on CPU each core has one.
    workers = 1 if torch.cuda.is_available() else stage.params.workers
    results = run_jobs(jobs, workers=workers, threads=stage.params.threads)
    best = {job.label: result for job, result in zip(jobs, results, strict=True)}
    write_json(folder / "summary.json", {"model": stage.model, "best_validation_loss": best})


def train_one(stage: Stage[Params], experiment: data.ExperimentName, seed: int, folder: Path, report: Report) -> float:
    """Train one seed on one experiment and return its best validation loss, in nats a token."""
    settings = stage.params.experiments[experiment]
    known = data.about(stage.data_dir, experiment)
    training_set = data.load(stage.data_dir, experiment, "train")
    validation_set = data.load(stage.data_dir, experiment, "validation")
    torch.manual_seed(seed)
    model = build_model(str(stage.model), settings.network, known["vocab_size"], reconstruct=experiment == "compress")
    recipe = settings.model_dump(mode="json", exclude={"models"})
    code = code_digest(stage.folder, TRAINING_CODE)
    name = f"{stage.model} · {experiment} · seed {seed}"
    parent = stage.run.id if stage.run else None
    tags = {"model": str(stage.model), "experiment": experiment, "seed": str(seed), "profile": stage.profile}
    with start_run(
        stage.slug, name, parent=parent, params=recipe | {"seed": seed}, tags=tags, system_metrics=True
    ) as run:
        run.log_dataset(f"{experiment}/train", known["digest"], source=known["source"], context="train")
        result = train_language_model(
            model,
            training_set,
            TokenValidation(validation_set, settings.training.batch_size),
            settings.training,
            directory=folder / experiment / f"seed{seed}",
            seed=seed,
            fingerprint=json.dumps([recipe, stage.model, known["digest"], code]),
            track=run,
            report=report,
        )
    return float(result.best_value or float("nan"))
