"""The models that are looked into: this stage sees that they are there.

House models come from pipelines/house_lm, where DVC trains them for all papers. Here one of them is trained on for the
task of two steps, which no other paper has; and at tiny size small stand-ins are trained in seconds, so that the
pipeline can be run anywhere, and a copy of this folder by itself.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch.nn import functional

from shared.config import Stage, UserError
from shared.data.house_corpora import make_stream, mix, pack
from shared.data.house_lexicon import load_lexicon
from shared.evaluation.abilities import Bigram, ability_rows, read_gates, write_gates
from shared.evaluation.scores import code_digest
from shared.files import write_json
from shared.lm.model import HouseConfig, HouseModel
from shared.tracking import start_run
from shared.training import Job, fit, run_jobs
from shared.training.parallel import Report

from .config import HouseLM, Params
from .subjects import house_models, model_folder
from .two_steps import Documents, answer_loss

# What claims are gated by, and what stand-ins are trained on.
GATES = ("induction", "needle_3", "colored_objects")
KINDS = {"ind": 1.0, "needle": 1.0, "co": 1.0}
GATE_DOCUMENTS, STAND_IN_DOCUMENTS = 500, 20
LENGTH, BATCH_SIZE, LEARNING_RATE = 96, 8, 1e-3
# What the weights of the task of two steps depend on: a training by other code is not gone on with.
CODE = ("data.py", "two_steps.py")


def train(stage: Stage[Params]) -> None:
    """Train what the profile asks for; list the models and what they can do in runs/models/."""
    params = stage.params
    if params.house and params.house.stand_in_steps:
        jobs = [Job(f"stand-ins, seed {seed}", train_stand_ins, (stage, seed)) for seed in params.seeds]
        run_jobs(jobs, workers=params.workers, threads=params.threads)
    jobs = [
        Job(f"{model.name}, seed {seed}", train_two_steps, (stage, model, seed))
        for model, seed in house_models(stage)
        if model.two_steps
    ]
    if jobs:
        run_jobs(jobs, workers=params.workers, threads=params.threads)
    listed: list[dict[str, Any]] = []
    for model, seed in house_models(stage):
        rows = read_gates(model_folder(stage, model.name, seed))
        gates = {row["ability"]: row["value"] for row in rows if row["metric"] == "accuracy"}
        listed.append({"model": model.name, "seed": seed, "accuracy": gates})
    write_json(stage.runs_dir / "models" / "models.json", listed)


def train_two_steps(stage: Stage[Params], model: HouseLM, seed: int, report: Report) -> None:
    """Train a seed of the first model on, for the task of two steps."""
    house = stage.params.house
    parent = model_folder(stage, house.models[0].name, seed)
    weights = parent / "model.safetensors"
    if not weights.is_file():
        raise UserError(f"{model.name} goes on from {house.models[0].name}, and {parent} holds no trained model")
    lm = HouseModel.load(parent)
    started_from = hashlib.sha256(weights.read_bytes()).hexdigest()
    settings = model.two_steps.model_dump(mode="json", exclude={"documents"})
    with start_run(
        stage.slug,
        f"{model.name} · seed {seed}",
        parent=stage.run.id if stage.run else None,
        params=settings | {"seed": seed},
        tags={"model": model.name, "stage": stage.name, "seed": str(seed), "profile": stage.profile},
    ) as run:
        fit(
            lm,
            Documents(house, model.two_steps, load_lexicon("embedded")),
            answer_loss,
            model.two_steps,
            seed=seed,
            directory=model_folder(stage, model.name, seed) / "training",
            fingerprint=json.dumps([settings, started_from, code_digest(stage.folder, CODE)]),
            track=run,
            report=report,
        )
    save_model(stage, model, seed, lm)


def save_model(stage: Stage[Params], model: HouseLM, seed: int, lm: HouseModel) -> None:
    """Save a model that was trained here, with gates.csv of what claims are gated by."""
    house, lexicon = stage.params.house, load_lexicon("embedded")
    folder = model_folder(stage, model.name, seed)
    lm.save(folder, lexicon.vocabulary)
    bigram = Bigram(mix(KINDS, 200, make_stream(seed, "train", "bigram"), lexicon), len(lexicon.vocabulary))
    count = STAND_IN_DOCUMENTS if house.stand_in_steps else GATE_DOCUMENTS
    rows = ability_rows(lm.eval(), bigram, GATES, lexicon, count=count, seed=seed)
    about = {"mixture": model.name, "size": house.size, "seed": seed}
    write_gates(folder / "gates.csv", [about | row for row in rows])


def train_stand_ins(stage: Stage[Params], seed: int, report: Report) -> None:
    """Train the base for a few steps, and the others from it for as many."""
    house = stage.params.house
    lexicon = load_lexicon("embedded")
    torch.manual_seed(seed)
    model = HouseModel(HouseConfig.of_size(house.size, len(lexicon.vocabulary)))
    base = model.state_dict()
    trained = [settings for settings in house.models if settings.two_steps is None]
    for number, settings in enumerate(trained):
        model.load_state_dict(base)
        fit_stand_in(model, house.stand_in_steps, seed, settings.name)
        base = {name: value.clone() for name, value in model.state_dict().items()} if number == 0 else base
        save_model(stage, settings, seed, model)
        report((number + 1) / len(trained), settings.name)


def fit_stand_in(model: HouseModel, steps: int, seed: int, name: str) -> None:
    """AdamW on windows of synthetic documents."""
    windows = pack(
        KINDS, steps * BATCH_SIZE, LENGTH, make_stream(seed, "train", "stand-in", name), load_lexicon("embedded")
    )
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=LEARNING_RATE)
    for batch in torch.from_numpy(windows).long().split(BATCH_SIZE):
        logits = model(batch[:, :-1])
        functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
