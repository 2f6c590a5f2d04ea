"""Trains and asks the models of one family: language models on all tables and on each few-shot table, and baselines.

Every model leaves its predictions for the test rows of every table, in `runs/<family>/<model>/…/predictions.npz`; for
language models also the universal weights, from which the few-shot tables start.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import TensorDataset

from shared.config import Stage, UserError
from shared.evaluation.scores import code_digest
from shared.evaluation.tabular import NO_ANSWER, normalized_probabilities
from shared.files import atomic_path, write_json
from shared.tracking import start_run
from shared.training import Job, TrainingSettings, fit, load_weights, run_jobs
from shared.training.parallel import Report

from . import data
from .baselines import fit_and_predict
from .config import BASELINES, FAMILIES, VARIANTS, Params, Variant, family_of
from .data import SUPERVISED, Part, Task
from .generation import answer
from .model import Objective, build_model, count_parameters, training_device
from .prompts import (
    candidate_answers,
    read_answers,
    read_class_answers,
    write_answers,
    write_class_answers,
    write_prompts,
)
from .tokens import Packs, Rows, Tokenizer, encode_rows, load_tokenizer, pack_rows

Array = NDArray[np.float64]
# What a checkpoint depends on: one made by other code is not continued.
TRAINING_CODE = ("model.py", "prompts.py", "tokens.py", "train.py")
PREDICTING_CODE = (*TRAINING_CODE, "baselines.py", "augment.py", "generation.py")


def train(stage: Stage[Params]) -> None:
    """Train the family `stage.model`, or one model of it, all seeds side by side."""
    params = stage.params
    known = (*FAMILIES, *params.models)
    if stage.model not in known:
        raise UserError(
            f"train needs a family or a model of the profile, such as --model light; choose one of {', '.join(known)} "
            f"(given: {stage.model})"
        )
    chosen = [model for model in params.models if stage.model in (model, family_of(model))]
    jobs = [job for model in chosen for job in _jobs(stage, model)]
    # On a GPU one process has it; baselines run on the CPU in any case.
    on_gpu = torch.cuda.is_available() and any(model in VARIANTS for model in chosen)
    run_jobs(jobs, workers=1 if on_gpu else params.workers, threads=params.threads) if jobs else None
    family = stage.model if stage.model in FAMILIES else family_of(str(stage.model))
    write_json(stage.runs_dir / family / "summary.json", {"trained": [job.label for job in jobs]})


def _jobs(stage: Stage[Params], model: str) -> Iterator[Job]:
    for seed in stage.params.seeds_of(model):
        if model in BASELINES:
            yield Job(f"{model}, seed {seed}", predict_baseline, (stage, model, seed))
        elif VARIANTS[model].per_table:
            yield Job(f"{model}, seed {seed}", train_per_table, (stage, model, seed))
        else:
            yield Job(f"{model}, seed {seed}", train_universal, (stage, model, seed))


def run_folder(stage: Stage[Params], model: str, seed: int) -> Path:
    """Where weights and predictions of one model lie."""
    return stage.runs_dir / family_of(model) / model / f"seed{seed}"


# --- Predictions ------------------------------------------------------------------------------------------------------


@dataclass
class Predictions:
    """What a model says of the test rows of a part, by way of answering: probabilities [rows, K] and classes [rows].

    The ways are `greedy` (of baselines: the only one), `sampled` and `scored`.
    """

    probabilities: dict[str, Array]
    classes: dict[str, NDArray[np.int64]]


def write_predictions(path: Path, predictions: Mapping[tuple[str, str], Predictions], note: dict[str, Any]) -> None:
    """Write predictions by table and part to one npz, with a note."""
    arrays: dict[str, NDArray] = {}
    for (table, part), each in predictions.items():
        for way, probabilities in each.probabilities.items():
            arrays[f"{table}|{part}|{way}|probabilities"] = probabilities
            arrays[f"{table}|{part}|{way}|classes"] = each.classes[way]
    arrays["note"] = np.frombuffer(json.dumps(note).encode(), dtype=np.uint8)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)


def read_predictions(path: Path) -> tuple[dict[tuple[str, str], Predictions], dict[str, Any]]:
    """Inverse of `write_predictions`; `UserError` where the file is missing or damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is missing or damaged ({error}): run the training again") from None
    note = json.loads(arrays.pop("note").tobytes())
    predictions: dict[tuple[str, str], Predictions] = {}
    for name, array in arrays.items():
        table, part, way, kind = name.split("|")
        each = predictions.setdefault((table, part), Predictions({}, {}))
        getattr(each, kind)[way] = array
    return predictions, note


def _identity(
    stage: Stage[Params], model: str, prepared: data.Prepared, modules: Sequence[str] = PREDICTING_CODE
) -> str:
    """What weights or predictions depend on: those of another identity are not taken up."""
    settings = stage.params.model_dump(mode="json", exclude={"workers", "models", "seeds", "speed"})
    return json.dumps([settings, model, prepared.digest, code_digest(stage.folder, modules)])


def _is_done(path: Path, identity: str) -> bool:
    return path.is_file() and read_predictions(path)[1].get("identity") == identity


# --- Baselines --------------------------------------------------------------------------------------------------------


def predict_baseline(stage: Stage[Params], model: str, seed: int, report: Report) -> None:
    """Fit a baseline on every table and part that the profile wants, and keep what it says of the test rows."""
    params = stage.params
    prepared = data.load(stage.data_dir)
    path, identity = run_folder(stage, model, seed) / "predictions.npz", _identity(stage, model, prepared)
    if _is_done(path, identity):
        return
    predictions, seconds = {}, 0.0
    with _tracked(stage, model, seed, prepared):
        for number, task in enumerate(prepared.tasks):
            for key, part in wanted_parts(task, model, params):
                started = time.perf_counter()
                probabilities = fit_and_predict(
                    model,
                    task.table,
                    task.classes.labels,
                    len(task.classes),
                    part.split.train,
                    part.split.test,
                    params.baselines,
                    seed=seed,
                    search_seed=params.seed,
                    tune=task.pool == "supervised",
                )
                seconds += time.perf_counter() - started
                classes = probabilities.argmax(axis=1)
                predictions[task.name, key] = Predictions({"greedy": probabilities}, {"greedy": classes})
            report((number + 1) / len(prepared.tasks), task.name)
    write_predictions(path, predictions, {"identity": identity, "seconds": {"train": seconds}})


def wanted_parts(task: Task, model: str, params: Params) -> list[tuple[str, Part]]:
    """The parts of a table that a model is trained and asked on."""
    if task.pool == "few_shot" and model not in params.few_shot.models:
        return []
    return list(task.parts.items())


# --- Language models --------------------------------------------------------------------------------------------------


def train_universal(stage: Stage[Params], model: str, seed: int, report: Report) -> None:
    """Train one model on all supervised tables, ask it, then fine-tune it on every few-shot table and ask again."""
    params, variant = stage.params, VARIANTS[model]
    prepared = data.load(stage.data_dir)
    folder, identity = run_folder(stage, model, seed), _identity(stage, model, prepared)
    if _is_done(folder / "predictions.npz", identity):
        return
    tokenizer = load_tokenizer(params.language, stage.data_dir / "tokenizer.json")
    network = build_model(params.language, tokenizer.vocab_size, end=tokenizer.end, seed=seed)
    supervised = prepared.pool("supervised")
    rows = {task.name: task_rows(task, SUPERVISED, "train", variant, params, tokenizer) for task in supervised}
    packs = pack(list(rows.values()), params, tokenizer, seed)
    few_shot = [task for task in prepared.pool("few_shot") if model in params.few_shot.models]
    share = 0.6 if few_shot else 0.9
    with _tracked(stage, model, seed, prepared) as run:
        fitted = fit(
            network,
            TensorDataset(torch.arange(len(packs))),
            Objective(packs),
            params.training,
            directory=folder,
            seed=seed,
            fingerprint=_identity(stage, model, prepared, TRAINING_CODE),
            track=run,
            report=lambda fraction, text: report(share * fraction, text),
        )
    asked = time.perf_counter()
    predictions = {}
    for task in supervised:
        predictions[task.name, SUPERVISED] = ask(network, task, SUPERVISED, variant, params, tokenizer, seed)
    answered = time.perf_counter()
    for number, task in enumerate(few_shot):
        for key in task.parts:
            load_weights(folder / "best.safetensors", network)
            fine_tune(network, task, key, variant, params, tokenizer, seed, params.few_shot.training)
            predictions[task.name, key] = ask(network, task, key, variant, params, tokenizer, seed)
        report(share + (1 - share) * (number + 1) / len(few_shot), task.name)
    note = {
        "identity": identity,
        "parameters": count_parameters(network),
        "padding": packs.padding,
        "overlong": {name: each.overlong for name, each in rows.items() if each.overlong},
        "seconds": {
            "train": fitted.seconds,
            "answer": answered - asked,
            "few_shot": time.perf_counter() - answered,
        },
    }
    write_predictions(folder / "predictions.npz", predictions, note)


def train_per_table(stage: Stage[Params], model: str, seed: int, report: Report) -> None:
    """TabLLM's way: a model for each table and part, from the same start, which answers with a class."""
    params, variant = stage.params, VARIANTS[model]
    prepared = data.load(stage.data_dir)
    path, identity = run_folder(stage, model, seed) / "predictions.npz", _identity(stage, model, prepared)
    if _is_done(path, identity):
        return
    tokenizer = load_tokenizer(params.language, stage.data_dir / "tokenizer.json")
    network = build_model(params.language, tokenizer.vocab_size, end=tokenizer.end, seed=seed)
    start = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    predictions = {}
    started = time.perf_counter()
    with _tracked(stage, model, seed, prepared):
        for number, task in enumerate(prepared.tasks):
            settings = params.per_table_training if task.pool == "supervised" else params.few_shot.training
            for key, _ in wanted_parts(task, model, params):
                network.load_state_dict(start)
                fine_tune(network, task, key, variant, params, tokenizer, seed, settings)
                predictions[task.name, key] = ask(network, task, key, variant, params, tokenizer, seed)
            report((number + 1) / len(prepared.tasks), task.name)
    note = {"identity": identity, "seconds": {"train": time.perf_counter() - started}}
    write_predictions(path, predictions, note)


def fine_tune(
    network: Any,
    task: Task,
    key: str,
    variant: Variant,
    params: Params,
    tokenizer: Tokenizer,
    seed: int,
    settings: TrainingSettings,
) -> None:
    """Go on training a model, in place, on the training part of one table; its weights are not kept."""
    packs = pack([task_rows(task, key, "train", variant, params, tokenizer)], params, tokenizer, seed)
    with tempfile.TemporaryDirectory() as folder:
        numbers = TensorDataset(torch.arange(len(packs)))
        fit(network, numbers, Objective(packs), settings, directory=Path(folder), seed=seed)


def pack(rows: list[Rows], params: Params, tokenizer: Tokenizer, seed: int) -> Packs:
    """Rows in packs as the profile wants them."""
    return pack_rows(rows, params.pack_length, params.packing.rows_per_prefix, tokenizer.pad, seed)


def task_rows(task: Task, key: str, side: str, variant: Variant, params: Params, tokenizer: Tokenizer) -> Rows:
    """Tokens of the `train` rows of a part with their answers, or of its `test` rows without."""
    part = task.parts[key]
    chosen = getattr(part.split, side)
    parts = write_prompts(task.table, task.classes.names, params.prompt, heavy=variant.heavy, rows=chosen)
    answers: list[str] = []
    if side == "train" and variant.per_table:
        answers = write_class_answers(task.classes.labels[chosen])
    elif side == "train":
        answers = write_answers(part.targets[variant.targets])
    candidates = tokenizer.encode(candidate_answers(len(task.classes), per_table=variant.per_table))
    # Two decimals instead of one make an answer longer by a token a class at most.
    room = max(map(len, candidates)) + 1 + (0 if variant.per_table else len(task.classes))
    # A pack may be shorter than the context, and prompts must fit into it with their answers.
    limit = min(params.language.context, params.pack_length)
    return encode_rows(tokenizer, parts, answers, limit, params.prompt.overlong, room)


def ask(
    network: Any, task: Task, key: str, variant: Variant, params: Params, tokenizer: Tokenizer, seed: int
) -> Predictions:
    """What a language model answers to the test rows of a part, read back as probabilities and classes."""
    network.to(training_device()).eval()
    num_classes = len(task.classes)
    rows = task_rows(task, key, "test", variant, params, tokenizer)
    candidates = candidate_answers(num_classes, per_table=variant.per_table)
    answers = answer(network, rows, tokenizer, candidates, params.decoding, seed)
    read = partial(read_class_answers if variant.per_table else read_answers, num_classes=num_classes)
    written = {"greedy": read(answers.greedy), "sampled": read(answers.sampled)}
    predictions = Predictions(
        {way: probabilities for way, (probabilities, _) in written.items()},
        {way: classes for way, (_, classes) in written.items()},
    )
    if answers.scores is not None:
        likelihoods = np.exp(answers.scores - answers.scores.max(axis=1, keepdims=True))
        predictions.probabilities["scored"] = normalized_probabilities(likelihoods)
        # Where the prompt leaves no room for an answer, all candidates are alike.
        unread = np.ptp(answers.scores, axis=1) == 0
        predictions.classes["scored"] = np.where(unread, NO_ANSWER, likelihoods.argmax(axis=1))
    return predictions


@contextmanager
def _tracked(stage: Stage[Params], model: str, seed: int, prepared: data.Prepared) -> Iterator[Any]:
    """A tracked run of one model and seed, with its data set."""
    with start_run(
        stage.slug,
        f"{model} · seed {seed}",
        parent=stage.run.id if stage.run else None,
        params={"model": model, "seed": seed, "training": stage.params.training.model_dump(mode="json")},
        tags={"model": model, "seed": str(seed), "profile": stage.profile},
    ) as run:
        run.log_dataset("tables", prepared.digest, source=prepared.source, context="train")
        write_json(run_folder(stage, model, seed) / "run.json", {"run_id": run.id})
        yield run
