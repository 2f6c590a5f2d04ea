"""Trains the populations that are compared, networks side by side in processes, or many in one computation."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from shared.config import Stage, UserError
from shared.evaluation.scores import code_digest
from shared.files import write_json
from shared.tracking import start_run
from shared.training import Job, run_jobs
from shared.training.parallel import Report

from . import data
from .config import OF_GRAPHS, STAGES, GraphModule, Params
from .learn import Recipe, Record, Task, derived_seed, learn
from .symbolic.interpreter import Graph

# What a training depends on: one made by other code is not continued.
TRAINING_CODE = ("learn.py", "model.py", "train.py")


@dataclass(frozen=True)
class Member:
    """A network of a population: the graph's id (none for the baseline), the training set and the replicate."""

    population: str
    graph: str | None
    training_set: int
    replicate: int

    @property
    def label(self) -> str:
        graph = f", graph {self.graph[:8]}" if self.graph else ""
        return f"{self.population}{graph}, training set {self.training_set}, replicate {self.replicate}"

    def seed(self, first: int) -> int:
        """Variants of `ssn` start from the same weights and see puzzles in the same order; so does a longer baseline.

        What stands beside them in a comparison, one graph in many replicates, does not.
        """
        kind = "one_graph" if self.population == "one_graph" else "population"
        return derived_seed(first, kind, self.graph, self.training_set, self.replicate)


def train(stage: Stage[Params]) -> None:
    """Train the populations of `stage.model`, one of `STAGES`; records to runs/<stage>/<population>/<group>/."""
    if stage.model not in STAGES:
        raise UserError(f"train needs one of {', '.join(STAGES)}, such as --model ssn (given: {stage.model})")
    graphs = load_graphs(stage)
    jobs = [
        Job(f"{population}, {number + 1} of {len(groups)}", train_group, (stage, population, number, group, graphs))
        for population in STAGES[stage.model]
        if population in stage.params.populations
        for groups in [group_members(stage.params, population, graphs)]
        for number, group in enumerate(groups)
    ]
    # On a GPU one process trains one group after the other; on CPU each core has one.
    workers = 1 if torch.cuda.is_available() else stage.params.workers
    trained = run_jobs(jobs, workers=workers, threads=stage.params.threads) if jobs else []
    write_json(stage.runs_dir / stage.model / "summary.json", {"networks": sum(trained)})


def load_graphs(stage: Stage[Params]) -> dict[str, Graph]:
    """The graphs of population `ssn` by id: the official ones, or those that the evolution came up with."""
    evolved = stage.params.graphs == "evolved"
    return data.load_graphs((stage.runs_dir / "evolution" if evolved else stage.data_dir) / data.GRAPHS)


def members(params: Params, population: str, graphs: Mapping[str, Graph]) -> list[Member]:
    """All networks of a population."""
    settings = params.populations[population]
    chosen: Sequence[str | None] = [None]
    if population == "one_graph":
        chosen = [data.typical_graph(graphs)]
    elif population in OF_GRAPHS:
        # Evenly from the sorted ids, so that a few graphs are a choice of the same kind as all.
        names = sorted(graphs)
        chosen = [names[i * len(names) // settings.graphs] for i in range(settings.graphs)]
    return [
        Member(population, graph, training_set, replicate)
        for graph in chosen
        for training_set in range(params.data.training_sets)
        for replicate in range(settings.replicates)
    ]


def group_members(params: Params, population: str, graphs: Mapping[str, Graph]) -> list[list[Member]]:
    """The networks of a population in groups that are trained together, graphs of like size in one group."""
    everyone = sorted(
        members(params, population, graphs),
        key=lambda member: 0 if member.graph is None else graphs[member.graph].next_id,
    )
    size = params.training.networks_at_once
    return [everyone[start : start + size] for start in range(0, len(everyone), size)]


def graph_module_of(params: Params, population: str) -> GraphModule:
    """The graph module of a population: the profile's, or a variant of it."""
    changes = {
        "ssn_dedup_edges": {"dedup_edges": True},
        "ssn_intended_grid": {"positions": "as_intended"},
    }
    return params.graph_module.model_copy(update=changes.get(population, {}))


def recipe_of(params: Params, population: str) -> Recipe:
    epochs = params.populations[population].epochs
    return Recipe(params.network, graph_module_of(params, population), params.training, epochs)


def group_folder(stage: Stage[Params], population: str, number: int) -> Path:
    """Where the records of a group lie."""
    family = next(name for name, populations in STAGES.items() if population in populations)
    return stage.runs_dir / family / population / f"group{number}"


def train_group(
    stage: Stage[Params],
    population: str,
    number: int,
    group: Sequence[Member],
    graphs: Mapping[str, Graph],
    report: Report,
) -> int:
    """Train the networks of a group together; returns how many they are."""
    tasks = [
        Task(
            member.label,
            graphs[member.graph] if member.graph else None,
            member.training_set,
            member.seed(stage.params.seed),
        )
        for member in group
    ]
    tags = [
        {"model": population, "graph": member.graph or "none", "training_set": str(member.training_set)}
        | {"replicate": str(member.replicate)}
        for member in group
    ]
    train_tracked(
        stage, tasks, tags, recipe_of(stage.params, population), group_folder(stage, population, number), report
    )
    return len(group)


def train_tracked(
    stage: Stage[Params],
    tasks: Sequence[Task],
    tags: Sequence[Mapping[str, str]],
    recipe: Recipe,
    directory: Path,
    report: Report | None = None,
) -> list[Record]:
    """Train networks together, each in a tracked run of its own under that of the stage."""
    puzzles = data.load(stage.data_dir)
    with ExitStack() as stack:
        tracks = []
        for task, own in zip(tasks, tags, strict=True):
            run = stack.enter_context(
                start_run(
                    stage.slug,
                    task.label,
                    parent=stage.run.id if stage.run else None,
                    params=recipe.describe() | {"seed": task.seed},
                    tags={"profile": stage.profile, **own},
                )
            )
            run.log_dataset(f"training set {task.training_set}", puzzles.digest, puzzles.source, "train")
            tracks.append(run)
        return learn(
            tasks,
            puzzles,
            recipe,
            directory=directory,
            fingerprint=code_digest(stage.folder, TRAINING_CODE),
            tracks=tracks,
            report=report,
        )


def results(stage: Stage[Params], population: str, graphs: Mapping[str, Graph]) -> Iterator[tuple[Member, Record]]:
    """The members of a trained population with their records; `UserError` where some are missing."""
    for number, group in enumerate(group_members(stage.params, population, graphs)):
        path = group_folder(stage, population, number) / "finished.json"
        try:
            records = json.loads(path.read_text(encoding="utf-8"))["records"]
        except FileNotFoundError:
            raise UserError(f"{path} is missing: train the populations first (dvc repro)") from None
        yield from zip(group, records, strict=True)
