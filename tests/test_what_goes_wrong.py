"""What goes wrong, and what then: a clear message, an exit status other than 0, nothing half-written, a way on.

Every test runs the real command in a throw-away repository, on a copy of a paper that was run to its end at tiny size.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import yaml

from shared.files import unfinished
from tests.repository import Repository, edit_yaml, keep_models

MODEL = "fno_cape"
TRAIN = ("train", "--model", MODEL)
STAGES = {"prepare": ("prepare",), "train": TRAIN, "evaluate": ("evaluate",)}
COPIES = itertools.count()
# Long enough for a machine that is busy with other tests.
PATIENCE_SECONDS = 120


@pytest.fixture(scope="module")
def repository(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Repository:
    return Repository(root, tmp_path_factory.mktemp("wrong") / "repository")


@pytest.fixture(scope="module")
def finished(repository: Repository) -> Path:
    """A paper with one model that nothing disturbed."""
    folder = repository.add("cape", "finished")
    keep_models(folder, MODEL)
    edit_yaml(folder / "params.yaml", _last_long_enough_to_be_interrupted)
    repository.run_pipeline(folder)
    return folder


@pytest.fixture
def paper(finished: Path) -> Iterator[Path]:
    """A copy of the finished paper, data, checkpoints and results included."""
    folder = finished.with_name(f"copy_{next(COPIES)}")
    shutil.copytree(finished, folder)
    yield folder
    shutil.rmtree(folder)


def _last_long_enough_to_be_interrupted(content: Any) -> None:
    tiny = content["tiny"]
    tiny["seeds"] = [0, 1]
    # Burgers' equation at such viscosities is solved on 512 cells or more.
    tiny["equations"]["burgers"] |= {"train_parameters": [0.001, 0.002, 0.004], "unseen_parameters": []}
    for experiment in tiny["experiments"].values():
        experiment["training"] |= {"epochs": 20}
    for profile in set(content) - {"profile", "tiny"}:
        del content[profile]


def refused(repository: Repository, folder: Path, *command: str, **environment: str) -> str:
    """Run a command that must fail in an orderly way; returns its message."""
    result = repository.run(*command, cwd=folder, check=False, **environment)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    assert len(re.findall("^error: ", result.stderr, re.MULTILINE)) == 1
    assert unfinished(folder) == []
    return " ".join(result.stderr.split())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def scores(folder: Path) -> bytes:
    return (folder / "results" / "tiny" / "scores.csv").read_bytes()


# --- Mistakes in what was typed ---------------------------------------------------------------------------------------


def _misspell(content: Any) -> None:
    training = content["tiny"]["experiments"]["advection"]["training"]
    training["learning_rte"] = training.pop("learning_rate")


def _impossible(content: Any) -> None:
    content["tiny"]["equations"]["burgers"]["num_train"] = -3


def _no_such_model(content: Any) -> None:
    content["tiny"]["experiments"]["burgers"]["models"] = ["fno_cap"]


def _no_such_profile(content: Any) -> None:
    content["profile"] = "tinny"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (_misspell, ["params.yaml, section 'tiny'", "learning_rte: unknown key; allowed here:", "learning_rate"]),
        (_impossible, ["params.yaml, section 'tiny'", "burgers.num_train: ", "greater than or equal to 1", "-3"]),
        (_no_such_model, ["burgers.models: unknown model 'fno_cap'; choose one of fno"]),
        (_no_such_profile, ["params.yaml: there is no profile 'tinny'; choose one of tiny"]),
    ],
)
def test_mistakes_in_params(repository: Repository, paper: Path, edit: Callable[[Any], None], words: list[str]) -> None:
    before = contents(paper / "results")
    edit_yaml(paper / "params.yaml", edit)
    message = refused(repository, paper, "reprise", "run", "evaluate")
    assert [word for word in words if word not in message] == []
    assert contents(paper / "results") == before


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("run", "trian"), ["has no stage 'trian' (did you mean 'train'?)", "evaluate, prepare, train"]),
        (("run", "train", "--model", "fno_cap"), ["unknown model 'fno_cap'; choose one of fno"]),
        (("run", "train"), ["train needs a model, such as: reprise run train --model"]),
        (("verdict", "finishd"), ["there is no paper 'finishd' (did you mean finished?); there are "]),
    ],
)
def test_mistakes_in_commands(repository: Repository, paper: Path, command: tuple[str, ...], words: list[str]) -> None:
    message = refused(repository, paper, "reprise", *command)
    assert [word for word in words if word not in message] == []


def test_a_stage_outside_of_a_paper(repository: Repository) -> None:
    message = refused(repository, repository.folder, "reprise", "run", "prepare")
    assert "is not the folder of a paper: run this in" in message


# --- Data -------------------------------------------------------------------------------------------------------------


def _delete(path: Path) -> None:
    path.unlink()


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _corrupt(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [_delete, _truncate, _corrupt])
def test_damaged_prepared_data(repository: Repository, paper: Path, damage: Callable[[Path], None]) -> None:
    path = paper / "data" / "advection" / "train_0.2.npz"
    shutil.rmtree(paper / "runs" / MODEL)
    damage(path)
    message = refused(repository, paper, "reprise", "run", *TRAIN)
    assert str(path) in message
    assert "run the stage again with: reprise run prepare" in message


def test_damaged_prepared_data_is_made_again(repository: Repository, paper: Path, finished: Path) -> None:
    for damage, name in [(_delete, "train_0.2"), (_truncate, "train_1.0"), (_corrupt, "test_0.2")]:
        damage(paper / "data" / "advection" / f"{name}.npz")
    repository.run("reprise", "run", "prepare", cwd=paper)
    assert contents(paper / "data") == contents(finished / "data")


def test_official_data(repository: Repository, paper: Path, tmp_path: Path) -> None:
    """Missing, then cut off, then right."""

    def use_official(content: Any) -> None:
        settings = content["tiny"]["equations"]["advection"]
        settings |= {
            "source": "pdebench",
            "data_folder": "official",
            "train_parameters": [0.2],
            "unseen_parameters": [],
        }

    edit_yaml(paper / "params.yaml", use_official)
    path = tmp_path / "official" / "1D_Advection_Sols_beta0.2.hdf5"
    command = ("reprise", "run", "prepare")
    message = refused(repository, paper, *command, REPRISE_DATA=str(tmp_path))
    assert f"{path} is missing; get it with: reprise data fetch official" in message

    path.parent.mkdir()
    times = np.linspace(0, 0.5, 6, dtype=np.float32)
    with h5py.File(path, "w") as file:
        file["tensor"] = np.random.default_rng(0).standard_normal((8, 6, 64), dtype=np.float32)
        file["x-coordinate"] = (np.arange(64, dtype=np.float32) + 0.5) / 64
        file["t-coordinate"] = times
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    message = refused(repository, paper, *command, REPRISE_DATA=str(tmp_path))
    assert f"{path} is missing, truncated or not one of PDEBench's files" in message
    assert "fetch it again with: reprise data fetch official" in message

    path.write_bytes(whole)
    repository.run(*command, cwd=paper, REPRISE_DATA=str(tmp_path))
    assert (paper / "data" / "advection" / "index.json").is_file()


def test_a_diverging_loss(repository: Repository, paper: Path, finished: Path) -> None:
    def too_fast(content: Any) -> None:
        for experiment in content["tiny"]["experiments"].values():
            experiment["training"]["learning_rate"] = 1e30

    params = (paper / "params.yaml").read_text()
    edit_yaml(paper / "params.yaml", too_fast)
    shutil.rmtree(paper / "runs" / MODEL)
    message = refused(repository, paper, "reprise", "run", *TRAIN)
    assert f"{MODEL}, advection, seed " in message
    assert "the loss became nan in step " in message
    assert "Lower learning_rate or set gradient_clip in params.yaml" in message
    assert not (paper / "runs" / MODEL / "summary.json").exists()

    (paper / "params.yaml").write_text(params)
    repository.run("reprise", "run", *TRAIN, cwd=paper)
    summary = Path("runs", MODEL, "summary.json")
    assert (paper / summary).read_bytes() == (finished / summary).read_bytes()


# --- Disks ------------------------------------------------------------------------------------------------------------


def _clear(paper: Path, stage: str) -> None:
    """Remove what a stage has made, but for results, which a stage replaces."""
    if stage != "evaluate":
        shutil.rmtree(paper / {"prepare": "data", "train": f"runs/{MODEL}"}[stage])


@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk(repository: Repository, paper: Path, finished: Path, stage: str) -> None:
    _clear(paper, stage)
    results = contents(paper / "results")
    # Files of more than 1 KiB cannot be written, which an operating system reports as it does a full disk.
    limited = ("bash", "-c", 'ulimit -f 1; exec "$@"', "bash")
    message = refused(repository, paper, *limited, "reprise", "run", *STAGES[stage])
    assert "File too large" in message
    assert "run" in message.partition("File too large")[2], "what to do next comes after what happened"
    assert contents(paper / "results") == results
    repository.run("reprise", "run", *STAGES[stage], cwd=paper)
    assert scores(paper) == scores(finished)


@pytest.mark.parametrize("stage", STAGES)
def test_an_unwritable_place(repository: Repository, paper: Path, stage: str) -> None:
    place = paper / {"prepare": "data", "train": f"runs/{MODEL}", "evaluate": "results"}[stage]
    shutil.rmtree(place)
    place.write_text("a file where a folder is needed")
    message = refused(repository, paper, "reprise", "run", *STAGES[stage])
    assert str(place) in message
    assert "Not a directory" in message or "File exists" in message
    assert place.read_text() == "a file where a folder is needed"


# --- Interruptions ----------------------------------------------------------------------------------------------------


def _ctrl_c(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGINT)


def _kill_all(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGKILL)


def _kill_the_parent(process: subprocess.Popen[str]) -> None:
    process.kill()


def interrupt(repository: Repository, paper: Path, stage: str, stop: Callable[..., None], sign: str) -> str:
    """Start a stage, stop it as soon as a file matches `sign`, wait for its last process; returns what it said."""
    process = repository.start("reprise", "run", *STAGES[stage], cwd=paper)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not any(paper.glob(sign)):
        assert process.poll() is None, f"{stage} ended before it got so far: {process.communicate()[0]}"
        assert time.monotonic() < deadline, f"{stage} wrote nothing that matches {sign}"
        time.sleep(0.005)
    stop(process)
    # The pipe ends with the last process that holds it: nothing goes on in the background.
    output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == (130 if stop is _ctrl_c else -signal.SIGKILL), output
    return output


@pytest.mark.parametrize("stop", [_ctrl_c, _kill_all, _kill_the_parent])
def test_interrupted_stages_continue(
    repository: Repository, paper: Path, finished: Path, stop: Callable[..., None]
) -> None:
    """Every stage is stopped in its middle and run again; in the end the scores are those of the undisturbed run."""
    results = paper / "results" / "tiny"
    for place in (paper / "data", paper / "runs" / MODEL, results):
        shutil.rmtree(place)
    middles = {
        "prepare": ("data/*/[a-z]*.npz", paper / "data" / "burgers" / "index.json"),
        "train": (f"runs/{MODEL}/*/*/last.safetensors", paper / "runs" / MODEL / "summary.json"),
        "evaluate": ("results/tiny/scores.csv", results / "models.png"),
    }
    for stage, (sign, last) in middles.items():
        output = interrupt(repository, paper, stage, stop, sign)
        assert not last.exists(), f"{stage} was at its end already"
        if stop is _ctrl_c:
            assert "error: stopped; run the same command again to continue where it was" in output
            # Workers that were just starting to prepare data may still say where they stopped.
            assert "Traceback" not in output or stage == "prepare"
            assert unfinished(paper) == []
        if stage == "train":
            kept = {path: path.stat().st_mtime_ns for path in paper.glob(f"runs/{MODEL}/*/*/finished.json")}
        # SIGKILL may hit while a file is being written.
        next(paper.glob(sign)).with_name(".half-abcd1234.npz").write_bytes(b"half")
        repository.run("reprise", "run", *STAGES[stage], cwd=paper)
        assert last.exists()
        assert unfinished(paper) == []
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "seeds that were finished are not trained again"
    assert contents(paper / "data") == contents(finished / "data")
    assert scores(paper) == scores(finished)


def test_evaluate_replaces_old_results_whole(repository: Repository, paper: Path) -> None:
    """Killed between its first result and its last, evaluate leaves each file either old or new."""
    results = paper / "results" / "tiny"
    before = contents(results)
    (results / "scores.csv").unlink()
    interrupt(repository, paper, "evaluate", _kill_all, "results/tiny/scores.csv")
    after = {name: content for name, content in contents(results).items() if not name.startswith(".")}
    assert set(after) == set(before)
    assert after["scores.csv"] == before["scores.csv"]


def test_a_stage_runs_once_at_a_time(repository: Repository, paper: Path, finished: Path) -> None:
    """Two trainings of one model would write the same checkpoints; so would one that outlived a killed `dvc repro`."""
    shutil.rmtree(paper / "runs" / MODEL)
    first = repository.start("reprise", "run", *TRAIN, cwd=paper)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not any((paper / "runs" / MODEL).glob("*/*/*.safetensors")):
        assert time.monotonic() < deadline
        assert first.poll() is None
        time.sleep(0.005)
    os.killpg(first.pid, signal.SIGSTOP)
    try:
        result = repository.run("reprise", "run", *TRAIN, cwd=paper, check=False)
    finally:
        os.killpg(first.pid, signal.SIGCONT)
    assert result.returncode == 1
    assert f"error: train@{MODEL} of {paper.name} is running already: wait for its end, or stop" in result.stderr
    output, _ = first.communicate(timeout=PATIENCE_SECONDS)
    assert first.returncode == 0, output
    summary = Path("runs", MODEL, "summary.json")
    assert (paper / summary).read_bytes() == (finished / summary).read_bytes()


# --- A paper that cannot be read --------------------------------------------------------------------------------------


def test_a_broken_ledger_is_named_and_others_go_on(repository: Repository, paper: Path, finished: Path) -> None:
    (paper / "paper.yaml").write_text("title: [unclosed\n")
    repository.run("reprise", "verdict", "papers/finished")
    message = refused(repository, paper, "reprise", "verdict")
    assert f"{paper / 'paper.yaml'} is not valid YAML" in message
    board = repository.run("reprise", "board")
    assert f"warning: {paper.name}: papers/{paper.name}/paper.yaml is not valid YAML" in board.stderr
    readme = (repository.folder / "README.md").read_text()
    title = yaml.safe_load((finished / "paper.yaml").read_text())["title"]
    assert title in readme
    assert paper.name in readme
