"""Masks heads while the answer is generated, and sees what becomes of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.config import Stage
from shared.data.house_lexicon import load_lexicon
from shared.files import atomic_path, write_json
from shared.lm.hooked import mean_head_output
from shared.lm.hooks import mask_heads
from shared.training import Job, run_jobs
from shared.training.parallel import Report

from .baselines import layer_matched_heads, random_heads
from .config import Checkpoint, HouseLM, Masking, Mode, Params
from .data import ANSWER_LENGTH, load_prompts
from .detect import load_scores, load_subject, recorded
from .model import KINDS, Head, Needles, cut, kind_of_answer, ranked
from .subjects import Subject, house_models

Row = dict[str, Any]


@dataclass(frozen=True)
class Condition:
    """Which heads are masked, and how: `masker` says how they were chosen, `draw` numbers random choices."""

    masker: str
    mode: Mode
    heads: tuple[Head, ...] = ()
    draw: int | None = None

    @property
    def about(self) -> Row:
        return {"model": self.masker, "mode": self.mode, "masked": len(self.heads), "draw": self.draw}


def conditions(
    score: NDArray, induction: NDArray, masking: Masking, modes: tuple[Mode, ...], seed: int
) -> Iterator[Condition]:
    """Nothing masked; K heads by retrieval score, by induction score, at random, at random in the same layers."""
    by_score, by_induction = ranked(score), ranked(induction)
    for mode in modes:
        yield Condition("unmasked", mode)
        for count in masking.counts:
            top = tuple(by_score[:count])
            yield Condition("retrieval", mode, top)
            yield Condition("induction", mode, tuple(by_induction[:count]))
            for draw in range(masking.draws):
                # The same draws in every mode.
                rng = np.random.default_rng([seed, count, draw])
                yield Condition("random", mode, tuple(random_heads(score, count, rng)), draw)
                yield Condition("layer_matched", mode, tuple(layer_matched_heads(score, top, rng)), draw)


def mask(stage: Stage[Params]) -> None:
    """Write the answers' scores under every condition to runs/mask/<model>-seed<k>.csv."""
    params, folder = stage.params, stage.runs_dir / "mask"
    folder.mkdir(parents=True, exist_ok=True)
    chosen: list[tuple[HouseLM | Checkpoint, int]] = [*house_models(stage)]
    chosen += [(model, 0) for model in (params.checkpoints.models if params.checkpoints else ())]
    jobs = [
        Job(f"{model.name}, seed {seed}", mask_one, (stage, model, seed)) for model, seed in chosen if params.masking
    ]
    workers = 1 if torch.cuda.is_available() or params.checkpoints else params.workers
    done = run_jobs(jobs, workers=workers, threads=params.threads) if jobs else []
    write_json(folder / "done.json", done)


@torch.no_grad()
def mask_one(stage: Stage[Params], model: HouseLM | Checkpoint, seed: int, report: Report) -> str:
    """All conditions on one model; house models are also asked for what needs no retrieval, or another kind of it."""
    params, masking = stage.params, stage.params.masking
    subject, found = load_subject(stage, model, seed), load_scores(stage, model.name, seed)
    whole = model.name in masking.models
    modes = masking.modes if whole else masking.modes[:1]
    chosen = list(conditions(recorded(found).mean(axis=0), found["induction"], masking, modes, seed))
    means = None
    if "mean" in modes:
        means = mean_head_output(
            subject.lm, (batch.tokens.to(subject.lm.device) for batch, _ in subject.tests("detection"))
        )
    rows: list[Row] = []
    for batch, reference in subject.tests("masking"):
        rows += needle_rows(subject, batch, reference, chosen, means)
        report(0.5, f"{batch.length} tokens")
    for kind in _other_tasks(params, model):
        rows += prompt_rows(stage, subject, kind, [c for c in chosen if c.mode == modes[0]])
    with atomic_path(stage.runs_dir / "mask" / f"{subject.label}.csv") as temporary:
        pd.DataFrame(rows).to_csv(temporary, index=False, lineterminator="\n")
    return subject.label


def _other_tasks(params: Params, model: HouseLM | Checkpoint) -> tuple[str, ...]:
    """What a model is asked for beside needles."""
    if not isinstance(model, HouseLM):
        return ()
    if model.two_steps:
        return "at_once", "in_steps"
    return ("filler", "scene") if params.house and model.name == params.house.models[0].name else ()


def needle_rows(
    subject: Subject, batch: Needles, reference: str | None, chosen: list[Condition], means: Tensor | None
) -> list[Row]:
    """Scores under each condition, by depth; the prompt is read once, unmasked, for all of them."""
    tokens = batch.tokens.to(subject.lm.device)
    past = subject.lm.prefill(tokens[:, :-1])
    rows = []
    depths = batch.depth.numpy()
    for condition in chosen:
        hooks = mask_heads(condition.heads, condition.mode, means)
        made = subject.answer(tokens, hooks=hooks, past=past).tokens
        recall = subject.recall(batch, made, reference)
        values = {"recall": recall, "exact_match": exact_match(batch, made.cpu(), recall, reference)}
        if condition.draw is None:
            values |= kind_shares(subject, batch, made, recall)
        for depth in np.unique(depths):
            there = depths == depth
            item = None if reference is None else int(batch.item[0])
            cell = {"task": "needle", "length": batch.length, "depth": depth, "item": item, "tests": int(there.sum())}
            rows.append(condition.about | cell | {name: float(value[there].mean()) for name, value in values.items()})
    return rows


def exact_match(batch: Needles, made: Tensor, recall: NDArray, reference: str | None) -> NDArray:
    """Whether all tokens of the answer come first and in order; of running text, whether all its words are there."""
    if reference is not None:
        return (recall >= 1).astype(float)
    size = batch.answer.shape[1]
    padded = torch.nn.functional.pad(made[:, :size], (0, max(0, size - made.shape[1])), value=-1)
    return (padded == batch.answer).all(dim=1).double().numpy()


def kind_shares(subject: Subject, batch: Needles, made: Tensor, recall: NDArray) -> dict[str, NDArray]:
    """1 for the kind that each answer is of, 0 for the others."""
    answers = [row.cpu() for row in cut(made, subject.stop)]
    kinds = [
        kind_of_answer(batch, index, answer, float(recall[index]), subject.run) for index, answer in enumerate(answers)
    ]
    return {kind: np.array([kind == other for other in kinds], dtype=float) for kind in KINDS}


def prompt_rows(stage: Stage[Params], subject: Subject, kind: str, chosen: list[Condition]) -> Iterator[Row]:
    """The next word of a filler sentence (may it follow?), answers to questions on a scene, and those of two steps.

    Of answers in several tokens the last is judged, whatever was written before it.
    """
    batches = load_prompts(stage.data_dir, kind, subject.seed)
    counted = sum(len(batch.tokens) for batch in batches)
    length = ANSWER_LENGTH.get(kind, 1)
    pasts = [subject.lm.prefill(batch.tokens[:, :-1].to(subject.lm.device)) for batch in batches]
    for condition in chosen:
        hooks, right = mask_heads(condition.heads, condition.mode), 0
        for batch, past in zip(batches, pasts, strict=True):
            tokens = batch.tokens.to(subject.lm.device)
            made = subject.lm.generate(tokens, length, hooks=hooks, past=past).tokens.cpu()
            right += int(_is_right(kind, batch.tokens[:, -1], batch.answer, made[:, -1]).sum())
        metric = "legal_words" if kind == "filler" else "accuracy"
        yield condition.about | {"task": kind, "tests": counted, metric: right / counted}


def _is_right(kind: str, last: Tensor, answer: Tensor, made: Tensor) -> Tensor:
    if kind != "filler":
        return made == answer
    lexicon = load_lexicon("embedded")
    successors = torch.from_numpy(lexicon.filler_successors).long()
    first = int(lexicon.encode("f0")[0])
    return (successors[last - first] == made[:, None]).any(dim=1)
