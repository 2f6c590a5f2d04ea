"""Finds retrieval heads: every head's score in every needle test, all heads in one pass."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from shared.config import Stage, UserError
from shared.files import atomic_path, write_json
from shared.training import Job, run_jobs
from shared.training.parallel import Report

from .baselines import induction_score
from .config import Checkpoint, HouseLM, Params
from .model import SUCCESS, copies, counted_score, retrieval_score
from .subjects import Subject, checkpoint_subject, house_models, house_subject


def detect(stage: Stage[Params]) -> None:
    """Write what each model's heads did to runs/detect/<model>-seed<k>.npz."""
    folder = stage.runs_dir / "detect"
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [Job(f"{model.name}, seed {seed}", detect_one, (stage, model, seed)) for model, seed in house_models(stage)]
    checkpoints = stage.params.checkpoints
    jobs += [Job(model.name, detect_one, (stage, model, 0)) for model in (checkpoints.models if checkpoints else ())]
    workers = 1 if torch.cuda.is_available() or checkpoints else stage.params.workers
    seconds = run_jobs(jobs, workers=workers, threads=stage.params.threads) if jobs else []
    write_json(folder / "seconds.json", {job.label: time for job, time in zip(jobs, seconds, strict=True)})


def detect_one(stage: Stage[Params], model: HouseLM | Checkpoint, seed: int, report: Report) -> float:
    """Find the heads of one model; returns the seconds that it took, without those of loading."""
    subject = load_subject(stage, model, seed)
    started = time.perf_counter()
    found = head_scores(subject, report)
    found["induction"] = induction_score(subject.lm, subject.words)
    seconds = time.perf_counter() - started
    with atomic_path(scores_path(stage, subject.name, seed)) as temporary:
        np.savez_compressed(temporary, **found)
    return round(seconds, 3)


def load_subject(stage: Stage[Params], model: HouseLM | Checkpoint, seed: int) -> Subject:
    """A model of the profile, on the GPU if there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(model, HouseLM):
        return house_subject(stage, model, seed, device)
    return checkpoint_subject(stage, model, device)


def scores_path(stage: Stage[Params], name: str, seed: int) -> Path:
    return stage.runs_dir / "detect" / f"{name}-seed{seed}.npz"


@torch.no_grad()
def head_scores(subject: Subject, report: Report | None = None) -> dict[str, NDArray]:
    """Of each test: recall, length, depth, item [tests], and every head's score by both definitions [tests, L, H].

    The prompt but for its last token runs through fused attention; then one token a step is decoded, and of each head
    only the position that it attends to most is kept. Cost: one answer a test, whatever the number of heads.
    """
    parts: dict[str, list[NDArray]] = {}
    for batch, reference in subject.tests("detection"):
        seen = subject.answer(batch.tokens, attention="argmax")
        made, attended = seen.tokens.cpu(), seen.attention_argmax.cpu()
        copied = copies(batch, made, attended)
        stop = subject.stop.cpu()
        copied &= (torch.isin(made, stop).cumsum(dim=1) == 0)[:, :, None, None]
        row = {
            "recall": subject.recall(batch, seen.tokens, reference),
            "length": np.full(len(batch), batch.length),
            "depth": batch.depth.numpy(),
            "item": batch.item.numpy(),
            "score": retrieval_score(copied, made, batch.answer).numpy(),
            "counted": counted_score(copied, batch.answer.shape[1]).numpy(),
        }
        for name, value in row.items():
            parts.setdefault(name, []).append(value)
        if report:
            report(0.5, f"{batch.length} tokens")
    return {name: np.concatenate(values) for name, values in parts.items()}


def load_scores(stage: Stage[Params], name: str, seed: int) -> dict[str, NDArray]:
    """What `detect` found of a model."""
    path = scores_path(stage, name, seed)
    if not path.is_file():
        raise UserError(f"{path} is missing: find the heads first (reprise run detect)")
    with np.load(path, allow_pickle=False) as archive:
        return {key: archive[key] for key in archive.files}


def recorded(found: dict[str, NDArray], which: str = "score") -> NDArray[np.float64]:
    """Scores [tests, L, H] in the tests that succeeded, which alone count; without any, one row of zeros."""
    scores = found[which][found["recall"] > SUCCESS]
    return scores if len(scores) else np.zeros((1, *scores.shape[1:]))
