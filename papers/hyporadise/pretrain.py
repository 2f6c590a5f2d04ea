"""Pretrains the decoder-only language model on general text: one model, with which all tunings begin."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from shared.config import Stage
from shared.data.text import windows
from shared.evaluation.scores import code_digest
from shared.files import write_json
from shared.tracking import start_run
from shared.training import Job, run_jobs
from shared.training.language import TokenValidation, train_language_model
from shared.training.parallel import Report

from . import data
from .config import Params
from .data import Prepared
from .model import PromptedLanguageModel

PRETRAINING_CODE = ("model.py", "pretrain.py")


def pretrain(stage: Stage[Params]) -> None:
    """Weights go to runs/pretrained/; a profile that tunes no such model leaves the folder empty."""
    params = stage.params
    needed = bool(params.models_of("decoder_only"))
    jobs = [Job("language model", pretrain_one, (stage, params.seed))] if needed else []
    losses = run_jobs(jobs, workers=1, threads=params.threads) if jobs else []
    write_json(pretrained_folder(stage) / "summary.json", {"validation_loss": losses})


def pretrained_folder(stage: Stage[Params]) -> Path:
    """Where the pretrained weights lie."""
    return stage.runs_dir / "pretrained"


def build(params: Params, prepared: Prepared, seed: int, *, first_only: bool = False) -> PromptedLanguageModel:
    """The decoder-only model with weights drawn from a seed."""
    settings = params.decoder_only
    torch.manual_seed(seed)
    return PromptedLanguageModel(
        settings,
        prepared.tokenizer,
        max_tokens=settings.max_tokens,
        num_hypotheses=1 if first_only else params.num_hypotheses,
        count_prompt=settings.training.loss_on_prompt,
    )


def text_windows(
    prepared: Prepared, model: PromptedLanguageModel, context: int, repeats: int = 1
) -> dict[str, torch.Tensor]:
    """Windows of the general text, an end between its sentences; of every twenty sentences the last is held out.

    With `repeats` each sentence stands so many times in a row, as in a list whose hypotheses and transcript agree.
    """
    parts = {}
    for split in ("train", "validation"):
        chosen = [s for i, s in enumerate(prepared.sentences) if (i % 20 == 19) == (split == "validation")]
        # A line break is one byte that no pair of these texts reaches over, so that all are encoded at once.
        (line_break,) = model.tokenizer.encode("\n").tolist()
        tokens = model.tokenizer.encode("".join(f" {sentence}\n" for sentence in chosen))
        sentences = np.split(tokens, np.flatnonzero(tokens == line_break) + 1)[:-1]
        said = []
        for sentence in sentences:
            behind = [model.end] if repeats == 1 else [*[model.separator] * (repeats - 2), model.mark, model.end]
            said += [np.append(sentence[:-1], token) for token in behind]
        parts[split] = torch.from_numpy(windows(np.concatenate(said), context))
    return parts


def pretrain_one(stage: Stage[Params], seed: int, report: Report) -> float:
    """Pretrain from a seed and return the validation loss, in nats a token."""
    params, prepared = stage.params, data.load(stage.data_dir)
    settings = params.decoder_only
    model = build(params, prepared, seed)
    parts = text_windows(prepared, model, settings.context, settings.repeats)
    described = settings.model_dump(mode="json", exclude={"training", "low_rank", "low_rank_learning_rate"})
    identity = json.dumps([described, seed, prepared.digest, code_digest(stage.folder, PRETRAINING_CODE)])
    with start_run(
        stage.slug,
        "language model · pretraining",
        parent=stage.run.id if stage.run else None,
        params=described | {"seed": seed, "parameters": model.network.num_parameters()},
        tags={"model": "pretrained", "seed": str(seed), "profile": stage.profile},
    ) as run:
        result = train_language_model(
            model.network,
            parts["train"],
            TokenValidation(parts["validation"][:512], settings.pretraining.batch_size),
            settings.pretraining,
            directory=pretrained_folder(stage),
            seed=seed,
            fingerprint=identity,
            track=run,
            report=report,
        )
    return float(result.best_value or float("nan"))
