"""The evolution of programs: train a network on every program's graph, keep those that learn best, find what they have
in common, and search for more with it.

An iteration trains, sorts by training accuracy, keeps the survivors and archives the rest, compresses the survivors,
which grows the library, and explores until the population is full again. The first population comes from an exploration
with the ten primitives. After the last iteration's exploration the newest programs are not trained, as in the official
run.

The state is written after every phase, and every training and exploration keeps its own, so that an evolution that was
stopped goes on in the middle of an iteration. Each seed evolves by itself, on the training set of its number.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shared.config import Stage
from shared.evaluation.scores import code_digest
from shared.files import write_json
from shared.training import Job, run_jobs
from shared.training.parallel import Report

from . import data
from .config import Evolution, Params
from .learn import Recipe, Task, derived_seed
from .symbolic import compression, search
from .symbolic.interpreter import Graph, run
from .symbolic.library import Library, estimate_weights
from .symbolic.terms import Term, inline, mass, parse, size
from .train import TRAINING_CODE, train_tracked

PHASES = ("train", "select", "explore")
# An exploration writes how far it is once in so many seconds.
CHECKPOINT_SECONDS = 5.0


def evolve(stage: Stage[Params]) -> None:
    """Evolve programs from every seed; runs/evolution/seed<n>.json, and graphs.jsonl for the populations compared."""
    settings = stage.params.evolution
    folder = stage.runs_dir / "evolution"
    if settings is None:
        write_json(folder / "summary.json", {"seeds": []})
        return
    jobs = [Job(f"evolution, seed {seed}", evolve_one, (stage, settings, seed)) for seed in settings.seeds]
    workers = 1 if torch.cuda.is_available() else stage.params.workers
    run_jobs(jobs, workers=workers, threads=stage.params.threads)
    if stage.params.graphs == "evolved":
        wanted = stage.params.populations["ssn"].graphs or 0
        data.write_graphs(folder / data.GRAPHS, evolved_graphs(stage, settings, wanted))
    write_json(folder / "summary.json", {"seeds": list(settings.seeds)})


@dataclass
class State:
    """Where an evolution stands: the iteration (from 1) and the phase that comes next; what lives and what lived.

    `population` are programs; `accuracies` those of the last training, in the same order, as (train, eval). `archive`
    and `history` are records: a dropped program each, and what every iteration came to.
    """

    iteration: int
    phase: str
    library: Library
    population: list[Term]
    accuracies: list[tuple[float, float]]
    archive: list[dict[str, Any]]
    history: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        return {
            "iteration": self.iteration,
            "phase": self.phase,
            "library": self.library.to_json(),
            "population": [describe(program) for program in self.population],
            "accuracies": self.accuracies,
            "archive": self.archive,
            "history": self.history,
        }

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> State:
        library = Library.from_json(record["library"])
        return cls(
            iteration=record["iteration"],
            phase=record["phase"],
            library=library,
            population=[parse(one["program"], library) for one in record["population"]],
            accuracies=[(train, held_out) for train, held_out in record["accuracies"]],
            archive=record["archive"],
            history=record["history"],
        )


def describe(program: Term) -> dict[str, Any]:
    """A program, its size with the library and without it, and its graph, as a record."""
    graph = graph_of(program)
    return {"id": identifier(program), "program": str(program), "size": size(program), "mass": mass(program)} | {
        "graph": graph.to_json()
    }


def graph_of(program: Term) -> Graph:
    graph = run(program)
    if graph is None:
        raise ValueError(f"{program} builds a trivial graph, which no exploration admits")
    return graph


def identifier(program: Term) -> str:
    """A digest of the program without its library, the same before and after compression."""
    return hashlib.sha256(str(inline(program)).encode()).hexdigest()[:16]


def evolve_one(stage: Stage[Params], settings: Evolution, seed: int, report: Report) -> None:
    """Evolve from one seed, or go on where that was stopped."""
    path = stage.runs_dir / "evolution" / f"seed{seed}.json"
    recipe = Recipe(stage.params.network, stage.params.graph_module, stage.params.training, (settings.epochs,))
    identity = _identity(stage, settings, recipe, seed)
    state = _resumed(path, identity)
    if state is None:
        library = Library.initial()
        found = explore_resumably(path, f"{identity} 0", library, [], settings)
        state = State(1, "train", library, [one.program for one in found.found], [], [], [])
        state.history.append(summary(state, found, added=0) | {"iteration": 0})
        write_json(path, {"identity": identity, **state.to_json()})
    while state.iteration <= settings.iterations:
        done = state.iteration - 1 + PHASES.index(state.phase) / len(PHASES)
        report(done / settings.iterations, f"iteration {state.iteration}: {state.phase}")
        if state.phase == "train":
            state.accuracies = train_population(stage, state, seed, recipe)
            state.phase = "select"
        elif state.phase == "select":
            select(state, settings)
            state.phase = "explore"
        else:
            explore(state, settings, path, identity)
            state.iteration, state.phase = state.iteration + 1, "train"
        write_json(path, {"identity": identity, **state.to_json()})


def train_population(stage: Stage[Params], state: State, seed: int, recipe: Recipe) -> list[tuple[float, float]]:
    """Train a fresh network on every program's graph; (training, evaluation) accuracy of each."""
    training_set = seed % stage.params.data.training_sets
    tasks = [
        Task(
            f"evolution {seed}, iteration {state.iteration}, program {identifier(program)[:8]}",
            graph_of(program),
            training_set,
            derived_seed(stage.params.seed, "evolution", seed, state.iteration, identifier(program)),
        )
        for program in state.population
    ]
    # Graphs of like size beside each other, which are padded less.
    order = sorted(range(len(tasks)), key=lambda i: (tasks[i].graph.next_id if tasks[i].graph else 0, i))
    accuracies: dict[int, tuple[float, float]] = {}
    at_once = stage.params.training.networks_at_once
    folder = stage.runs_dir / "evolution" / f"seed{seed}" / f"iteration{state.iteration}"
    for start in range(0, len(order), at_once):
        group = order[start : start + at_once]
        tags = [
            {"model": "evolution", "program": str(state.population[i]), "iteration": str(state.iteration)}
            for i in group
        ]
        records = train_tracked(stage, [tasks[i] for i in group], tags, recipe, folder / f"group{start // at_once}")
        for i, record in zip(group, records, strict=True):
            accuracies[i] = (record["train_accuracy"][-1], record["eval_accuracy"][-1])
    return [accuracies[i] for i in range(len(tasks))]


def select(state: State, settings: Evolution) -> None:
    """Keep the survivors, the best by training accuracy (of equal ones the earlier), and archive the rest."""
    ranked = sorted(range(len(state.population)), key=lambda i: -state.accuracies[i][0])
    state.history[-1]["trained"] = [
        {"id": identifier(state.population[i]), "train_accuracy": train, "eval_accuracy": held_out}
        for i, (train, held_out) in ((i, state.accuracies[i]) for i in ranked)
    ]
    for i in ranked[settings.survivors :]:
        train, held_out = state.accuracies[i]
        dropped = {"iteration": state.iteration, "train_accuracy": train, "eval_accuracy": held_out}
        state.archive.append(describe(state.population[i]) | dropped)
    kept = ranked[: settings.survivors]
    state.population = [state.population[i] for i in kept]
    state.accuracies = [state.accuracies[i] for i in kept]


def explore(state: State, settings: Evolution, path: Path, identity: str) -> None:
    """Compress the survivors, estimate how probable primitives are from them, and fill the population up."""
    before = len(state.library)
    state.library, survivors, _ = compression.compress(
        state.population, state.library, abstractions=settings.abstractions, max_arity=settings.max_arity
    )
    state.library = estimate_weights(state.library, survivors)
    found = explore_resumably(path, f"{identity} {state.iteration}", state.library, survivors, settings)
    state.population, state.accuracies = [one.program for one in found.found], []
    added = len(state.library) - before
    state.history.append(summary(state, found, added) | {"iteration": state.iteration})


def explore_resumably(
    path: Path, identity: str, library: Library, known: Sequence[Term], settings: Evolution
) -> search.Exploration:
    """Search, or go on where the search of that identity was stopped; how far it is lies beside the evolution."""
    path = path.with_suffix(".exploration.json")
    record = _record(path, identity)
    written = time.monotonic()

    def checkpoint(found: search.Exploration) -> None:
        nonlocal written
        if time.monotonic() - written >= CHECKPOINT_SECONDS:
            write_json(path, {"identity": identity, **found.to_json()})
            written = time.monotonic()

    limits = {"capacity": settings.capacity, "budget": settings.budget}
    found = search.explore(library, known, **limits, resume=record, checkpoint=checkpoint)
    path.unlink(missing_ok=True)
    return found


def summary(state: State, found: search.Exploration, added: int) -> dict[str, Any]:
    """What a row of `history` says of library, search and population."""
    return {
        "library_size": len(state.library),
        "library_mass": state.library.mass,
        "abstractions": added,
        "population": len(state.population),
        "new_graphs": sum(not one.known for one in found.found),
        "programs": found.programs,
    }


def load(stage: Stage[Params], seed: int) -> State:
    """The state in which the evolution of a seed ended."""
    record = json.loads((stage.runs_dir / "evolution" / f"seed{seed}.json").read_text(encoding="utf-8"))
    return State.from_json(record)


def evolved_graphs(stage: Stage[Params], settings: Evolution, wanted: int) -> dict[str, Graph]:
    """Graphs that the evolutions came up with by id, half dropped ones and half final ones, each class once a seed."""
    dropped: dict[str, Graph] = {}
    final: dict[str, Graph] = {}
    for state in (load(stage, seed) for seed in settings.seeds):
        dropped |= {one["id"]: Graph.from_json(one["graph"]) for one in state.archive}
        final |= {identifier(program): graph_of(program) for program in state.population}
    return data.choose_graphs({name: dropped[name] for name in dropped if name not in final}, final, wanted)


def stored_programs(state: State) -> Iterator[tuple[int, int]]:
    """Size and mass of all programs that an evolution leaves, final ones and archived ones."""
    yield from ((size(program), mass(program)) for program in state.population)
    yield from ((one["size"], one["mass"]) for one in state.archive)


def _identity(stage: Stage[Params], settings: Evolution, recipe: Recipe, seed: int) -> str:
    """What an evolution depends on: one begun otherwise is not continued."""
    code = ("evolve.py", *TRAINING_CODE, *_symbolic_code(stage.folder))
    parts: Sequence[Any] = [
        settings.model_dump(mode="json", exclude={"seeds"}),
        recipe.describe(),
        stage.params.seed,
        seed,
        data.load(stage.data_dir).digest,
        code_digest(stage.folder, code),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _symbolic_code(folder: Path) -> list[str]:
    names = ("types", "terms", "interpreter", "isomorphism", "library", "search", "compression")
    return [f"symbolic/{name}.py" for name in names if (folder / "symbolic" / f"{name}.py").is_file()]


def _resumed(path: Path, identity: str) -> State | None:
    record = _record(path, identity)
    return None if record is None else State.from_json(record)


def _record(path: Path, identity: str) -> dict[str, Any] | None:
    """What was written there, if it is of that identity."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return record if record.pop("identity", None) == identity else None
