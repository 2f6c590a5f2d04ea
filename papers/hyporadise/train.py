"""Trains the correctors of one family, all seeds side by side, and has each transcribe the test lists.

A training leaves, in runs/<family>/<model>/seed<n>/, its weights, `transcripts.json` with a transcript a test list, and
`costs.json` with what training and decoding took.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from shared.config import Stage, UserError
from shared.evaluation.scores import code_digest
from shared.files import write_json
from shared.nn.low_rank import add_low_rank, parameter_counts
from shared.tracking import start_run
from shared.training import FitResult, Job, Moment, fit, load_weights, run_jobs
from shared.training.loop import MetricLog
from shared.training.parallel import Report

from . import data
from .baselines import rerank
from .batching import Groups, in_order
from .checkpoints import PublishedModel
from .config import FAMILIES, Checkpoint, CorrectorTraining, Params, family_of
from .data import Lists, Prepared
from .model import Corrector, PointerGenerator, PromptedLanguageModel
from .pretrain import build, pretrained_folder

TRAINING_CODE = ("batching.py", "checkpoints.py", "model.py", "pretrain.py", "prompts.py", "train.py")


def train(stage: Stage[Params]) -> None:
    """Train the family `stage.model`, or one model of the profile, and transcribe the test lists with it."""
    params = stage.params
    known = [*FAMILIES, *params.models, *params.checkpoints]
    if stage.model not in known:
        raise UserError(
            f"train needs a family or a model, such as --model {known[0]}; choose one of {', '.join(known)}"
        )
    family = stage.model if stage.model in FAMILIES else family_of(str(stage.model))
    models = params.models_of(family) if stage.model in FAMILIES else (str(stage.model),)
    jobs = [Job(f"{model}, seed {seed}", train_one, (stage, model, seed)) for model in models for seed in params.seeds]
    # On a GPU one process trains one model after the other; on CPU each core has one.
    workers = 1 if torch.cuda.is_available() else params.workers
    losses = run_jobs(jobs, workers=workers, threads=params.threads) if jobs else []
    summary = {job.label: loss for job, loss in zip(jobs, losses, strict=True)}
    write_json(stage.runs_dir / family / "summary.json", {"validation_loss": summary})


def run_folder(stage: Stage[Params], model: str, seed: int) -> Path:
    """Where weights and transcripts of one training lie."""
    return stage.runs_dir / family_of(model) / model / f"seed{seed}"


@dataclass(frozen=True)
class Plan:
    """A corrector that is ready to be trained, and its recipe; None where nothing is trained."""

    corrector: Corrector
    training: CorrectorTraining | None
    trained_parameters: int
    settings: dict[str, Any]


def plan(stage: Stage[Params], model: str, seed: int, prepared: Prepared) -> Plan:
    """Build a model of the profile."""
    params = stage.params
    torch.manual_seed(seed)
    match family_of(model):
        case "encoder_decoder":
            settings = params.encoder_decoder
            corrector: Corrector = PointerGenerator(
                settings,
                prepared.vocabulary(settings.vocabulary_size),
                params.num_hypotheses,
                first_only=model.endswith("1best"),
                copy=not model.endswith("no_copy"),
            )
            training = settings.training
        case "decoder_only":
            settings = params.decoder_only
            corrector = build(params, prepared, seed, first_only=model.endswith("1best"))
            load_weights(pretrained_folder(stage) / "best.safetensors", corrector.network)
            training = settings.training
            if model.startswith("lm_lora"):
                torch.manual_seed(seed)
                add_low_rank(corrector.network, **settings.low_rank.model_dump())
                training = training.model_copy(update={"learning_rate": settings.low_rank_learning_rate})
        case "reranker":
            settings = params.reranker
            corrector = PromptedLanguageModel(
                settings, prepared.tokenizer, max_tokens=params.decoder_only.max_tokens, num_hypotheses=0
            )
            training = settings.training
        case _:
            settings = params.checkpoints[model]
            corrector = PublishedModel(settings)
            training = settings.training
    trained = parameter_counts(corrector.network).trained
    return Plan(corrector, training, trained, settings.model_dump(mode="json"))


def train_one(stage: Stage[Params], model: str, seed: int, report: Report) -> float:
    """Train one seed of a model, transcribe the test lists, and return its validation loss."""
    prepared, params = data.load(stage.data_dir), stage.params
    made = plan(stage, model, seed, prepared)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    made.corrector.network.to(device)
    folder = run_folder(stage, model, seed)
    identity = json.dumps(
        [made.settings, model, seed, params.seed, prepared.digest, code_digest(stage.folder, TRAINING_CODE)]
    )
    tags = {"model": model, "seed": str(seed), "profile": stage.profile}
    with start_run(
        stage.slug,
        f"{model} · seed {seed}",
        parent=stage.run.id if stage.run else None,
        params=made.settings | {"seed": seed, "trained_parameters": made.trained_parameters},
        tags=tags,
    ) as run:
        run.log_dataset("lists", prepared.digest, source=prepared.index["source"], context="train")
        costs: dict[str, float] = {"trained_parameters": made.trained_parameters}
        loss = float("nan")
        if made.training is not None:
            result, costs_of_training = fit_corrector(
                made.corrector, prepared.lists, made.training, folder, seed, identity, run, report
            )
            costs |= costs_of_training
            loss = float(result.best_value if result.best_value is not None else float("nan"))
        started = time.perf_counter()
        outputs = transcribe(made.corrector, model, prepared.lists, params)
        costs["lists_per_second"] = len(prepared.lists["test"]) * len(outputs) / (time.perf_counter() - started)
    write_json(folder / "transcripts.json", outputs)
    write_json(folder / "costs.json", costs)
    write_json(folder / "run.json", {"run_id": run.id})
    return loss if loss == loss else 0.0


def fit_corrector(
    corrector: Corrector,
    lists: dict[str, Lists],
    training: CorrectorTraining,
    directory: Path,
    seed: int,
    identity: str,
    track: MetricLog | None = None,
    report: Report | None = None,
) -> tuple[FitResult, dict[str, float]]:
    """Train on pairs grouped by length; the weights with the lowest validation loss are kept. Also returns costs."""
    pairs = {split: corrector.pairs(lists[split].nbest, lists[split].references) for split in ("train", "validation")}
    groups = Groups(pairs["train"].lengths, training.batch_size, seed)

    def loss(network: nn.Module, batch: tuple[Tensor, ...], moment: Moment) -> dict[str, Tensor]:
        rows = groups.rows(moment.epoch, int(batch[0]))
        return {"loss": corrector.loss(network, pairs["train"], rows, training.label_smoothing)}

    result = fit(
        corrector.network,
        TensorDataset(torch.arange(len(groups))),
        loss,
        training.loop_settings(len(groups)),
        directory=directory,
        seed=seed,
        fingerprint=identity,
        validate=partial(mean_loss, corrector, pairs["validation"], training.batch_size),
        track=track,
        report=report,
    )
    seen = result.epochs * len(pairs["train"].lengths)
    return result, {
        "training_seconds": result.seconds,
        "pairs_per_second": seen / result.seconds,
        "tokens_per_second": result.epochs * float(pairs["train"].lengths.sum()) / result.seconds,
    }


def mean_loss(corrector: Corrector, pairs: Any, batch_size: int, network: nn.Module) -> dict[str, float]:
    """Cross-entropy a token over all pairs, without label smoothing."""
    total, count = 0.0, 0
    for rows in in_order(pairs.lengths, batch_size):
        counted = int(pairs.counted[rows].sum())
        total += float(corrector.loss(network, pairs, rows, 0.0)) * counted
        count += counted
    return {"validation/loss": total / count}


def transcribe(corrector: Corrector, model: str, lists: dict[str, Lists], params: Params) -> dict[str, list[str]]:
    """Transcripts of the test lists by name of the model; one that is prompted has one a number of demonstrations."""
    if family_of(model) == "reranker":
        texts, _ = rerank(
            lists["validation"],
            lists["test"],
            partial(corrector.log_probs, batch_size=params.decoding.batch_size),
            params.reranking.weights,
        )
        return {model: texts}
    settings = params.checkpoints.get(model)
    if settings is None or settings.tuning != "prompted":
        return {model: corrector.correct(lists["test"].nbest, params.decoding)}
    return prompted(corrector, model, settings, lists, params)


def prompted(
    corrector: PublishedModel, model: str, settings: Checkpoint, lists: dict[str, Lists], params: Params
) -> dict[str, list[str]]:
    """Transcripts after so many demonstrations, which are the first training lists of the same domain that differ."""
    out = {}
    for count in settings.demonstrations:
        texts = [""] * len(lists["test"])
        for domain in dict.fromkeys(lists["test"].domains):
            rows = lists["test"].rows_of(domain)
            corrector.demonstrations = choose_demonstrations(lists["train"], domain, count)
            answers = corrector.correct([lists["test"].nbest[row] for row in rows], params.decoding)
            for row, answer in zip(rows, answers, strict=True):
                texts[row] = answer
        out[f"{model}/{count}"] = texts
    return out


def choose_demonstrations(train: Lists, domain: str, count: int) -> list[tuple[list[str], str]]:
    """The first training pairs of a domain whose first hypothesis is wrong: others would show nothing."""
    rows = train.rows_of(domain)
    wrong = [row for row in rows if train.nbest[row][0] != train.references[row]]
    if len(wrong) < count:
        raise UserError(f"{domain} has {len(wrong)} training lists with an error, fewer than {count} demonstrations")
    return [(train.nbest[row], train.references[row]) for row in wrong[:count]]
