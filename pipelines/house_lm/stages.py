"""What a stage of the pipeline does: trains models side by side, tests them, tracks both."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pipelines.house_lm.config import Mixture, Params
from pipelines.house_lm.train import train
from shared.data.house_corpora import make_stream, mix
from shared.data.house_lexicon import load_lexicon
from shared.data.house_text import load_words
from shared.evaluation.abilities import (
    Bigram,
    ability_rows,
    language_rows,
    measure_language,
    write_gates,
)
from shared.files import write_text
from shared.lm.model import HouseModel
from shared.training.parallel import Job, Report, run_jobs

EXPERIMENT = "house_lm"
BIGRAM_DOCUMENTS = 10_000


def train_seeds(
    folder: Path,
    profile: str,
    params: Params,
    name: str,
    size: str,
    seeds: Sequence[int],
    *,
    workers: int | None = None,
) -> None:
    """Train the seeds of a mixture side by side, each tracked as a run; tables to `results/<profile>/`."""
    from shared import tracking

    mixture = params.of_size(size).mixture(name)
    tags = {"mixture": name, "size": size, "profile": profile}
    title, recipe = f"{name} · {size} · {profile}", mixture.model_dump(mode="json", exclude={"abilities"})
    with tracking.deliver(), tracking.start_run(EXPERIMENT, title, params=recipe, tags=tags) as stage:
        jobs = [
            Job(f"{name}, {size}, seed {seed}", _train_and_track, (folder, profile, params, name, size, seed, stage.id))
            for seed in seeds
        ]
        # On a GPU one process trains one seed after the other; on CPU each core has one.
        run_jobs(jobs, workers=1 if torch.cuda.is_available() else workers, threads=params.threads)


def _train_and_track(
    folder: Path, profile: str, params: Params, name: str, size: str, seed: int, parent: str, report: Report
) -> None:
    from shared import tracking

    tags = {"mixture": name, "size": size, "seed": str(seed), "profile": profile}
    title = f"{name} · {size} · seed {seed}"
    with tracking.start_run(EXPERIMENT, title, parent=parent, tags=tags, system_metrics=True) as run:
        model, rows = train_and_test(params, name, size, seed, folder / "models", track=run, report=report)
        steps = json.loads((model / "training.json").read_text(encoding="utf-8"))["steps"]
        run.log({f"{row['ability']}/{row['metric']}": row["value"] for row in rows}, step=steps)
        passed = {f"{row['ability']}/{row['metric']}": row["passed"] for row in rows if row["passed"] is not None}
        run.set_tags({f"gate/{name}": value for name, value in passed.items()})
        run.log_table(model / "gates.csv")
    table = folder / "results" / profile / name / f"{size}-seed{seed}.csv"
    write_text(table, (model / "gates.csv").read_text(encoding="utf-8"))


def train_and_test(
    params: Params,
    name: str,
    size: str,
    seed: int,
    models: Path,
    *,
    track: Any = None,
    report: Report | None = None,
) -> tuple[Path, list[dict[str, Any]]]:
    """Train a model (see `train`) and write `gates.csv` beside it; returns its folder and the table's rows."""
    params = params.of_size(size)
    folder = train(params, name, size, seed, models, track=track, report=report)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tested = measured(HouseModel.load(folder).to(device), params.mixture(name), params, seed)
    rows = [{"mixture": name, "size": size, "seed": seed} | row for row in tested]
    write_gates(folder / "gates.csv", rows)
    return folder, rows


def measured(model: HouseModel, mixture: Mixture, params: Params, seed: int) -> list[dict[str, Any]]:
    """Rows of gates.csv: what a trained model can do, beside a bigram model of the same training data."""
    if not mixture.abilities:
        return []
    data = mixture.data
    if data.kind == "documents":
        lexicon = load_lexicon(data.lexicon)
        tokens = mix(data.weights, BIGRAM_DOCUMENTS, make_stream(seed, "train", "bigram"), lexicon)
        bigram = Bigram(tokens, len(lexicon.vocabulary))
        return ability_rows(model, bigram, mixture.abilities, lexicon, count=params.test_documents, seed=seed)
    words = load_words(data.corpus, data.vocab_size)
    rows = []
    for part, stream in words.test.items():
        values = measure_language(
            model, words.train, stream, data.vocab_size, length=mixture.length, count=params.test_documents
        )
        rows += language_rows(values, f"language_{part}")
    return rows
