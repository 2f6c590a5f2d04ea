"""Trains a model and its variants on text and on associative recall, all seeds side by side."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from shared.config import Stage, UserError
from shared.evaluation.scores import code_digest
from shared.files import write_json
from shared.tracking import start_run
from shared.training import Job, run_jobs
from shared.training.language import LanguageTraining, TokenValidation, train_language_model
from shared.training.parallel import Report

from . import data
from .config import Params
from .model import build_model, check_arm

# What a checkpoint depends on: one made by other code is not continued.
TRAINING_CODE = ("model.py", "train.py")


def train(stage: Stage[Params]) -> None:
    """Train `stage.model` and its variants wherever the profile lists them, at every learning rate that is tried.

    Weights go to runs/<model>/<task>/<arm>/seed<n>/rate<r>/, and which of the rates the validation picks to
    chosen.json beside them.
    """
    if stage.model is None:
        raise UserError("train needs a model, such as: reprise run train --model gla")
    check_arm(stage.model)
    tries = [
        (task, arm, seed, rate)
        for task, arm in stage.params.tasks_of(stage.model)
        for seed in stage.params.seeds
        for rate in stage.params.experiment(task).rates()
    ]
    jobs = [
        Job(f"{arm}, {task}, seed {seed}, rate {rate:g}", train_one, (stage, task, arm, seed, rate))
        for task, arm, seed, rate in tries
    ]
    # On a GPU one process trains one seed after the other; on CPU each core has one.
    workers = 1 if torch.cuda.is_available() else stage.params.workers
    results = run_jobs(jobs, workers=workers, threads=stage.params.threads) if jobs else []
    losses = dict(zip(tries, results, strict=True))
    # A profile need not list any variant of a model, whose folder the pipeline wants all the same.
    family_folder(stage, stage.model).mkdir(parents=True, exist_ok=True)
    for task, arm, seed in dict.fromkeys(key[:3] for key in tries):
        of_rates = {rate: losses[task, arm, seed, rate] for rate in stage.params.experiment(task).rates()}
        rate = min(of_rates, key=of_rates.__getitem__)
        chosen = {"learning_rate": rate, "validation_loss": of_rates[rate]}
        write_json(seed_folder(stage, task, arm, seed) / "chosen.json", chosen)


def family_folder(stage: Stage[Params], arm: str) -> Path:
    """Where the trainings of a model and all its variants lie."""
    return stage.runs_dir / arm.partition("_")[0]


def seed_folder(stage: Stage[Params], task: str, arm: str, seed: int) -> Path:
    """Where the trainings of an arm from one seed lie, each in the `rate_folder` of its learning rate."""
    return family_folder(stage, arm) / task / arm / f"seed{seed}"


def rate_folder(rate: float) -> str:
    """The name of the folder of a learning rate."""
    return f"rate{rate:g}"


@dataclass(frozen=True)
class Problem:
    """What an arm is trained on and how: examples for `train_language_model`, recipe, and where they come from."""

    examples: Tensor | tuple[Tensor, Tensor]
    validation: Tensor | tuple[Tensor, Tensor]
    settings: LanguageTraining
    segment_length: int | None
    data: data.Text | data.Recall


def problem_of(stage: Stage[Params], task: str, arm: str) -> Problem:
    """The problem of an arm: all have the same but for the length of sequences, in which two arms differ.

    Text is validated in windows of the common context.
    """
    if task == "mqar":
        recall = data.load_recall(stage.data_dir)
        return Problem(
            recall.examples["train"], recall.examples["validation"], stage.params.mqar.training, None, recall
        )
    language, text = stage.params.language, data.load_text(stage.data_dir)
    return Problem(
        text.windows("train", language.length_of(arm)),
        text.windows("validation", language.context),
        language.training_of(arm),
        language.segment_of(arm),
        text,
    )


def train_one(stage: Stage[Params], task: str, arm: str, seed: int, rate: float, report: Report) -> float:
    """Train one seed of an arm on a task and return its best validation loss, in nats a token."""
    experiment, problem = stage.params.experiment(task), problem_of(stage, task, arm)
    torch.manual_seed(seed)
    model = build_model(arm, experiment.network, problem.data.vocab_size)
    recipe = problem.settings.model_copy(update={"learning_rate": rate})
    settings = {"network": experiment.network, "training": recipe}
    settings = {name: part.model_dump(mode="json") for name, part in settings.items()}
    tags = {"model": arm, "task": task, "seed": str(seed), "profile": stage.profile}
    with start_run(
        stage.slug,
        f"{arm} · {task} · seed {seed} · rate {rate:g}",
        parent=stage.run.id if stage.run else None,
        params=settings | {"seed": seed, "parameters": model.num_parameters()},
        tags=tags,
        system_metrics=True,
    ) as run:
        run.log_dataset(f"{task}/train", problem.data.digest, source=problem.data.source, context="train")
        result = train_language_model(
            model,
            problem.examples,
            TokenValidation(problem.validation, experiment.validation_batch_size),
            recipe,
            directory=seed_folder(stage, task, arm, seed) / rate_folder(rate),
            seed=seed,
            fingerprint=json.dumps([settings, arm, problem.data.digest, code_digest(stage.folder, TRAINING_CODE)]),
            segment_length=problem.segment_length,
            track=run,
            report=report,
        )
        best = float(result.best_value or float("nan"))
        run.log({"validation/best_loss": best}, step=result.best_epoch + 1)
    return best
