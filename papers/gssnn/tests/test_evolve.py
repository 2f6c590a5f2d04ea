"""The evolution of programs: what survives, what is found, and that stopping it does not matter."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from shared.config import Stage, load_params

from .. import data
from .. import evolve as loop
from ..config import Evolution, Params
from ..evolve import State, evolve_one, identifier, load, select, stored_programs
from ..learn import Record, Task
from ..symbolic.library import Library
from ..symbolic.terms import mass, parse, size

FOLDER = Path(__file__).parents[1]
CODE = ("evolve.py", "learn.py", "model.py", "train.py")


def ignore(fraction: float, text: str) -> None:
    pass


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage[Params]:
    """The profile tiny, with trainings that are over at once: the more edges the better, up to the fourth."""
    params = load_params(FOLDER / "params.yaml", Params, "tiny")[1]
    changes = {"iterations": 2, "budget": 300_000}
    evolution = params.evolution.model_copy(update=changes)  # type: ignore[union-attr]
    params = params.model_copy(update={"evolution": evolution})
    stage = Stage(folder=tmp_path, name="evolve", profile="tiny", params=params)
    for name in CODE:
        (tmp_path / name).write_text((FOLDER / name).read_text(encoding="utf-8"), encoding="utf-8")
    data.prepare(stage)

    def trained(_: Any, tasks: Sequence[Task], *arguments: Any) -> list[Record]:
        edges = [len(task.graph.edges) for task in tasks if task.graph]
        return [{"train_accuracy": [min(n, 4) / 4], "eval_accuracy": [n / 100]} for n in edges]

    monkeypatch.setattr(loop, "train_tracked", trained)
    return stage


def settings_of(stage: Stage[Params]) -> Evolution:
    settings = stage.params.evolution
    assert settings is not None
    return settings


def final(stage: Stage[Params]) -> dict[str, Any]:
    return json.loads((stage.runs_dir / "evolution" / "seed0.json").read_text())


def test_an_evolution_from_its_first_program(stage: Stage[Params]) -> None:
    evolve_one(stage, settings_of(stage), 0, ignore)
    state = load(stage, 0)
    settings = settings_of(stage)
    assert state.iteration == settings.iterations + 1
    # The library never shrinks, the population keeps to its capacity, classes are told apart.
    sizes = [past["library_size"] for past in state.history]
    assert sizes[0] == 10
    assert sizes == sorted(sizes)
    assert sizes[-1] > 10
    assert [past["iteration"] for past in state.history] == [0, 1, 2]
    assert all(past["population"] <= settings.capacity for past in state.history)
    assert len({identifier(program) for program in state.population}) == len(state.population)
    # What the last exploration found is not trained any more.
    assert "trained" not in state.history[-1]
    assert len(state.history[0]["trained"]) == state.history[0]["population"]
    for measured_size, measured_mass in stored_programs(state):
        assert measured_size <= measured_mass


def test_an_evolution_that_is_stopped_anywhere_ends_in_the_same_state(
    stage: Stage[Params], monkeypatch: pytest.MonkeyPatch
) -> None:
    evolve_one(stage, settings_of(stage), 0, ignore)
    whole = final(stage)
    path = stage.runs_dir / "evolution" / "seed0.json"
    path.unlink()
    written = loop.write_json
    count = 0

    def stops(where: Path, record: Any) -> None:
        nonlocal count
        written(where, record)
        count += 1
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "write_json", stops)
    # The first exploration, and three phases in each of two iterations.
    for _ in range(7):
        with pytest.raises(KeyboardInterrupt):
            evolve_one(stage, settings_of(stage), 0, ignore)
    evolve_one(stage, settings_of(stage), 0, ignore)
    assert count == 7
    assert final(stage) == whole


def test_an_exploration_that_is_stopped_goes_on_where_it_was(
    stage: Stage[Params], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, library, path = settings_of(stage), Library.initial(), stage.runs_dir / "seed0.json"
    whole = loop.explore_resumably(path, "a", library, [], settings)
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    written, resumed = loop.write_json, []

    def stops(where: Path, record: Any) -> None:
        written(where, record)
        if record["programs"] > (resumed[-1] or 0):
            raise KeyboardInterrupt

    def explored(*arguments: Any, **options: Any) -> Any:
        resumed.append(options["resume"] and options["resume"]["programs"])
        return search(*arguments, **options)

    search = loop.search.explore
    monkeypatch.setattr(loop.search, "explore", explored)
    monkeypatch.setattr(loop, "write_json", stops)
    for identity in ("a", "a", "a", "b"):
        with pytest.raises(KeyboardInterrupt):
            loop.explore_resumably(path, identity, library, [], settings)
    # Each goes further than the last, and another search starts anew.
    assert resumed[0] is resumed[3] is None
    assert 0 < resumed[1] < resumed[2]
    monkeypatch.setattr(loop, "write_json", written)
    assert loop.explore_resumably(path, "b", library, [], settings) == whole
    assert not list(stage.runs_dir.glob("*.exploration.json"))


def test_another_evolution_is_not_continued(stage: Stage[Params], monkeypatch: pytest.MonkeyPatch) -> None:
    evolve_one(stage, settings_of(stage), 0, ignore)
    before = final(stage)
    changed = settings_of(stage).model_copy(update={"capacity": 6, "iterations": 1})
    other = Stage(stage.folder, "evolve", "tiny", stage.params.model_copy(update={"evolution": changed}))
    evolve_one(other, changed, 0, ignore)
    assert final(stage)["identity"] != before["identity"]
    assert final(stage)["iteration"] == 2


def test_the_best_by_training_accuracy_survive() -> None:
    library = Library.initial()
    texts = [
        "(push (add (connect identity)))",
        "(push (add (connect (next_port identity))))",
        "(push (next_port (add (connect identity))))",
    ]
    programs = [parse(text, library) for text in texts]
    accuracies = [(0.5, 0.9), (0.7, 0.1), (0.7, 0.2)]
    state = State(3, "select", library, programs, accuracies, [], [{"iteration": 2}])
    settings = load_params(FOLDER / "params.yaml", Params, "tiny")[1].evolution
    assert settings is not None
    select(state, settings)
    # Evaluation accuracy does not count; of equal ones the earlier is ahead.
    assert state.population == programs[1:]
    assert [(one["program"], one["iteration"], one["eval_accuracy"]) for one in state.archive] == [(texts[0], 3, 0.9)]
    assert [one["train_accuracy"] for one in state.history[-1]["trained"]] == [0.7, 0.7, 0.5]


def test_a_state_is_read_back() -> None:
    library = Library.initial()
    program = parse("(push (add (connect identity)))", library)
    state = State(2, "explore", library, [program], [(0.5, 0.25)], [{"a": 1}], [{"b": 2}])
    assert State.from_json(json.loads(json.dumps(state.to_json()))) == state
    described = loop.describe(program)
    assert (described["size"], described["mass"]) == (size(program), mass(program)) == (4, 4)
    assert described["graph"]["edges"] == [[0, 1, 2, 0]]
