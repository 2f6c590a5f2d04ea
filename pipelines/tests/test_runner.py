"""Finding a paper and its stage, and what is recorded of a run."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines import runner
from pipelines.runner import describe_stage, find_stage, flatten, import_paper, run_stage
from shared.config import Strict, UserError

CONFIG = """
from shared.config import Strict

class Inner(Strict):
    rate: float = 0.5

class Params(Strict):
    width: int
    inner: Inner = Inner()
"""
DATA = """
def prepare(stage):
    stage.data_dir.mkdir()
    (stage.data_dir / "seen.txt").write_text(f"{stage.slug} {stage.name} {stage.profile} {stage.params.width}")
"""
TRAIN = """
import time
from shared.config import UserError

def train(stage):
    if stage.model == "wrong":
        raise UserError("no such model")
    held = bytearray(64 * 2**20)
    time.sleep(0.6)  # longer than the memory is sampled every so often
    del held
"""
FILES = {
    "__init__.py": "",
    "config.py": CONFIG,
    "data.py": DATA,
    "train.py": TRAIN,
    "params.yaml": "profile: small\nsmall: {width: 3}\nlarge: {width: 30}\n",
    "dvc.yaml": "stages:\n  prepare: {cmd: reprise run prepare}\n  train: {cmd: reprise run train}\n",
}


@pytest.fixture
def paper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A paper of two stages in a repository of its own, importable as `papers.toy`."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    kept = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "papers"}
    for name in kept:
        del sys.modules[name]
    folder = tmp_path / "papers" / "toy"
    folder.mkdir(parents=True)
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "papers" / "__init__.py").touch()
    for name, text in FILES.items():
        (folder / name).write_text(text)
    yield folder
    for name in [name for name in sys.modules if name.split(".")[0] == "papers"]:
        del sys.modules[name]
    sys.modules |= kept


def test_a_stage_is_described_as_in_dvc_yaml(tmp_path: Path) -> None:
    (tmp_path / "dvc.yaml").write_text(
        "stages:\n"
        "  prepare: {cmd: x, desc: Make the data}\n"
        "  train: {foreach: [a], do: {cmd: x, desc: 'Train ${item}'}}\n"
        "  evaluate: {cmd: x}\n"
    )
    described = [describe_stage(tmp_path, "prepare"), describe_stage(tmp_path, "train", "a")]
    assert described == ["Make the data", "Train a"]
    assert describe_stage(tmp_path, "evaluate") is None
    assert describe_stage(tmp_path, "unlisted") is None


def test_flatten() -> None:
    class Inner(Strict):
        sizes: tuple[int, ...] = (1, 2)

    class Outer(Strict):
        rate: float = 0.1
        inner: Inner = Inner()
        by_name: dict[str, Inner] = {"a": Inner(sizes=(3,))}  # noqa: RUF012 (pydantic copies defaults)

    assert flatten(Outer()) == {"rate": 0.1, "inner.sizes": [1, 2], "by_name.a.sizes": [3]}
    assert flatten({"a": {"b": {"c": None}}, "d": 1}) == {"a.b.c": None, "d": 1}
    assert flatten({}) == {}


def test_a_stage_is_told_where_and_with_what_it_runs(paper: Path) -> None:
    run_stage(paper, "prepare")
    assert (paper / "data" / "seen.txt").read_text() == "toy prepare small 3"


def test_time_and_memory_are_recorded(paper: Path) -> None:
    run_stage(paper, "train", "plain")
    record = json.loads((paper / "runs" / "timing" / "small" / "train@plain.json").read_text())
    assert (record["stage"], record["model"]) == ("train", "plain")
    assert len(record["run_id"]) == 32
    assert record["wall_time_seconds"] >= 0.6
    assert record["peak_memory_mib"] > 64


def test_a_stage_that_failed_leaves_no_record(paper: Path) -> None:
    with pytest.raises(UserError, match="no such model"):
        run_stage(paper, "train", "wrong")
    assert not (paper / "runs" / "timing").exists()
    run_stage(paper, "train", "plain")


def test_unfinished_files_of_a_killed_run_are_cleared_away(paper: Path) -> None:
    left = [paper / place / ".weights-a1b2c3d4.bin" for place in ("runs/plain", "results/small")]
    kept = [paper / "runs" / "plain" / name for name in (".hidden", "weights-a1b2c3d4.bin")]
    for path in (*left, *kept):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    run_stage(paper, "prepare")
    assert [path for path in left if path.exists()] == []
    assert [path for path in kept if not path.exists()] == []


def test_unfinished_files_stay_while_another_stage_runs(paper: Path) -> None:
    unfinished = paper / "runs" / "plain" / ".weights-a1b2c3d4.bin"
    unfinished.parent.mkdir(parents=True)
    unfinished.touch()
    (paper / "runs" / "locks").mkdir()
    with open(paper / "runs" / "locks" / "any", "a") as of_another:
        runner.fcntl.flock(of_another, runner.fcntl.LOCK_SH)
        run_stage(paper, "prepare")
    assert unfinished.exists()


def test_a_stage_that_runs_already_is_refused(paper: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (paper / "runs" / "locks").mkdir(parents=True)
    with open(paper / "runs" / "locks" / "prepare", "a") as of_another:
        runner.fcntl.flock(of_another, runner.fcntl.LOCK_EX)
        with pytest.raises(UserError, match="prepare of toy is running already: wait for its end"):
            run_stage(paper, "prepare")
        # The other processes of a distributed run are no second run.
        monkeypatch.setenv("RANK", "1")
        run_stage(paper, "prepare")


def test_unknown_stages_list_the_known(paper: Path) -> None:
    with pytest.raises(
        UserError, match=r"toy has no stage 'prepair' \(did you mean 'prepare'\?\); .*: prepare, train$"
    ):
        find_stage(paper, import_paper(paper), "prepair")
    with pytest.raises(UserError, match=r"toy has no stage 'xyz'; its dvc\.yaml has: prepare, train"):
        run_stage(paper, "xyz")
    (paper / "dvc.yaml").unlink()
    with pytest.raises(UserError, match=r"dvc\.yaml is missing"):
        find_stage(paper, import_paper(paper), "xyz")


def test_a_stage_outside_of_a_paper(paper: Path) -> None:
    for folder in (paper.parent, paper.parents[1], paper / "tests"):
        with pytest.raises(UserError, match=r"is not the folder of a paper: run this in .*papers/<name>"):
            run_stage(folder, "prepare")


def test_folders_that_are_no_python_names(paper: Path) -> None:
    folder = paper.rename(paper.with_name("my-paper"))
    with pytest.raises(UserError, match="the folder name 'my-paper' is no Python name: use letters"):
        run_stage(folder, "prepare")


def test_unknown_profiles_and_wrong_params(paper: Path) -> None:
    (paper / "params.yaml").write_text("profile: smal\nsmall: {width: 3}\n")
    with pytest.raises(UserError, match="there is no profile 'smal'; choose one of small"):
        run_stage(paper, "prepare")
    (paper / "params.yaml").write_text("profile: small\nsmall: {width: 3, inner: {rat: 1}}\n")
    with pytest.raises(UserError, match=r"(?s)section 'small' is not valid.*inner\.rat: unknown key; .*: rate"):
        run_stage(paper, "prepare")
    assert not (paper / "data").exists()


def test_measuring_survives_an_error() -> None:
    measured: dict[str, float] = {}

    def fail() -> None:
        nonlocal measured
        with runner._measured() as measured:
            time.sleep(0.01)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert measured["wall_time_seconds"] >= 0.01
    assert measured["peak_memory_mib"] > 0
