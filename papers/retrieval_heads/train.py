"""The models that are looked into. Nothing is trained for the paper itself: this stage sees that its models are there.

House models come from pipelines/house_lm, where DVC trains them for all papers. Only at tiny size small stand-ins are
trained here, in seconds, so that the pipeline can be run anywhere, and a copy of this folder by itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from shared.config import Stage
from shared.data.house_corpora import make_stream, mix, pack
from shared.data.house_lexicon import load_lexicon
from shared.evaluation.abilities import Bigram, ability_rows, read_gates, write_gates
from shared.files import write_json
from shared.lm.model import HouseConfig, HouseModel
from shared.training import Job, run_jobs
from shared.training.parallel import Report

from .config import Params
from .subjects import house_models, model_folder

# What claims are gated by, and what stand-ins are trained on.
GATES = ("induction", "needle_3", "colored_objects")
KINDS = {"ind": 1.0, "needle": 1.0, "co": 1.0}
LENGTH, BATCH_SIZE, LEARNING_RATE, GATE_DOCUMENTS = 96, 8, 1e-3, 20


def train(stage: Stage[Params]) -> None:
    """Train stand-ins where the profile asks for them; list the models and what they can do in runs/models/."""
    params = stage.params
    if params.house and params.house.stand_in_steps:
        jobs = [Job(f"stand-ins, seed {seed}", train_stand_ins, (stage, seed)) for seed in params.seeds]
        run_jobs(jobs, workers=params.workers, threads=params.threads)
    listed: list[dict[str, Any]] = []
    for model, seed in house_models(stage):
        rows = read_gates(model_folder(stage, model.name, seed))
        gates = {row["ability"]: row["value"] for row in rows if row["metric"] == "accuracy"}
        listed.append({"model": model.name, "seed": seed, "accuracy": gates})
    write_json(stage.runs_dir / "models" / "models.json", listed)


def train_stand_ins(stage: Stage[Params], seed: int, report: Report) -> None:
    """Train the base for a few steps, and the others from it for as many."""
    house = stage.params.house
    lexicon = load_lexicon("embedded")
    torch.manual_seed(seed)
    model = HouseModel(HouseConfig.of_size(house.size, len(lexicon.vocabulary)))
    base = model.state_dict()
    bigram = Bigram(mix(KINDS, 200, make_stream(seed, "train", "bigram"), lexicon), len(lexicon.vocabulary))
    for number, settings in enumerate(house.models):
        model.load_state_dict(base)
        fit(model, house.stand_in_steps, seed, settings.name)
        base = {name: value.clone() for name, value in model.state_dict().items()} if number == 0 else base
        folder = model_folder(stage, settings.name, seed)
        model.save(folder, lexicon.vocabulary)
        rows = ability_rows(model.eval(), bigram, GATES, lexicon, count=GATE_DOCUMENTS, seed=seed)
        about = {"mixture": settings.name, "size": house.size, "seed": seed}
        write_gates(Path(folder) / "gates.csv", [about | row for row in rows])
        report((number + 1) / len(house.models), settings.name)


def fit(model: HouseModel, steps: int, seed: int, name: str) -> None:
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
