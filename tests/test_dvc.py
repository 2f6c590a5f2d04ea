"""Papers as users run them: `dvc repro`, copies, `dvc exp run`, two at once, and one that is broken beside others."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.repository import Repository, keep_models, set_profile

# Long enough for a machine that is busy with other tests.
PATIENCE_SECONDS = 300


@pytest.fixture(scope="module")
def repository(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """A repository with a commit and one paper of two models, `cape`, that stands at its profile `small`."""
    repository = Repository(root, tmp_path_factory.mktemp("dvc") / "repository")
    keep_models(repository.add("cape", profile="small"), "fno", "fno_cape")
    commit(repository)
    return repository


@pytest.fixture(scope="module")
def experiment(repository: Repository) -> subprocess.CompletedProcess[str]:
    """The run of `cape` in another profile than params.yaml chooses."""
    return repository.run("dvc", "exp", "run", "-S", "papers/cape/params.yaml:profile=tiny", "papers/cape")


@pytest.fixture(scope="module")
def pair(repository: Repository, experiment: object) -> list[Path]:
    """Two projects that were started from `cape`."""
    folders = []
    for name in ("one", "two"):
        said = repository.run("reprise", "new", name, "--from", "cape").stdout
        assert said.strip() == f"papers/{name} is ready: dvc repro papers/{name}"
        folders.append(repository.folder / "papers" / name)
    return folders


def commit(repository: Repository) -> None:
    repository.run("git", "add", "--all")
    identity = ("-c", "user.name=A. Reader", "-c", "user.email=reader@example.org")
    repository.run("git", *identity, "commit", "--quiet", "--message", "Papers")


def scores(folder: Path) -> bytes:
    return (folder / "results" / "tiny" / "scores.csv").read_bytes()


def stages_run(output: str) -> list[str]:
    return re.findall(r"Running stage '([^']+)'", output)


def test_a_plain_copy_runs_with_no_edit_but_the_profile(root: Path, tmp_path: Path) -> None:
    """As `cp -r papers/cape papers/mine` leaves it, without a stage of its own in the root pipeline."""
    repository = Repository(root, tmp_path / "repository")
    repository.add("cape", profile="small")
    repository.run("cp", "-r", "papers/cape", "papers/mine")
    copy = repository.folder / "papers" / "mine"
    set_profile(copy, "tiny")
    output = repository.run("dvc", "repro", "papers/mine/dvc.yaml").stdout
    stages = yaml.safe_load((copy / "dvc.yaml").read_text())["stages"]
    assert len(stages_run(output)) == len(stages) - 1 + len(stages["train"]["foreach"])
    assert (copy / "results" / "tiny" / "metrics.json").is_file()
    assert (copy / "dvc.lock").is_file()


def test_an_experiment_with_another_profile(
    repository: Repository, experiment: subprocess.CompletedProcess[str]
) -> None:
    folder = repository.folder / "papers" / "cape"
    assert stages_run(experiment.stdout) == [
        *(f"papers/cape/dvc.yaml:{stage}" for stage in ("prepare", "train@fno", "train@fno_cape", "evaluate")),
        "papers/cape",
    ]
    assert yaml.safe_load((folder / "params.yaml").read_text())["profile"] == "tiny"
    assert (folder / "results" / "tiny" / "verdict.json").is_file()
    assert "Ran experiment" in experiment.stdout


def test_a_second_run_does_nothing(repository: Repository, experiment: object) -> None:
    folder = repository.folder / "papers" / "cape"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    output = repository.run("dvc", "repro", "papers/cape").stdout
    assert stages_run(output) == []
    assert "Data and pipelines are up to date." in output
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before


def test_two_papers_at_once(repository: Repository, pair: list[Path]) -> None:
    """Both come to their end, whichever way DVC's locks fall, with the scores of the paper they were copied from."""
    processes = [repository.start("dvc", "repro", f"papers/{folder.name}") for folder in pair]
    outputs = [process.communicate(timeout=PATIENCE_SECONDS)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n\n".join(outputs)
    original = repository.folder / "papers" / "cape"
    for folder, output in zip(pair, outputs, strict=True):
        assert stages_run(output)[-1] == f"papers/{folder.name}"
        assert scores(folder) == scores(original)
        assert "up to date" in repository.run("dvc", "repro", f"papers/{folder.name}").stdout


def test_a_locked_repository(repository: Repository, experiment: object) -> None:
    """A `dvc` that holds the repository's lock for long makes others end with a message, and run when it has ended."""
    program = "import dvc.repo; dvc.repo.Repo().lock.lock(); print('locked', flush=True); input()"
    holder = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=repository.folder,
        env=repository.environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        result = repository.run("dvc", "repro", "papers/cape", check=False)
        assert result.returncode != 0
        assert "Unable to acquire lock. Most likely another DVC process is running" in result.stderr
    finally:
        holder.kill()
        holder.communicate()
    assert "up to date" in repository.run("dvc", "repro", "papers/cape").stdout


@pytest.mark.parametrize("shell", [shell for shell in ("/bin/sh", "/bin/bash") if Path(shell).exists()])
def test_ctrl_c_stops_the_whole_pipeline_and_a_rerun_completes_it(
    repository: Repository, pair: list[Path], shell: str
) -> None:
    folder = pair[0]
    shutil.rmtree(folder / "runs", ignore_errors=True)
    process = repository.start("dvc", "repro", "--force", f"papers/{folder.name}", SHELL=shell)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not any(folder.glob("runs/fno_cape/*/*/*.safetensors")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode != 0
    assert "error: stopped; run the same command again to continue where it was" in output
    # DVC runs commands through $SHELL: bash becomes the command and passes its status on, dash dies of the signal.
    assert "exited with 130" in output or f"exited with {-signal.SIGINT}" in output
    # DVC chooses the order of stages that do not depend on each other: whatever ended before is not run again.
    *ended, stopped = stages_run(output)
    assert stopped == f"papers/{folder.name}/dvc.yaml:train@fno_cape"
    again = stages_run(repository.run("dvc", "repro", f"papers/{folder.name}").stdout)
    assert stopped in again
    assert not set(ended) & set(again)
    assert scores(folder) == scores(repository.folder / "papers" / "cape")


def test_a_broken_paper_does_not_keep_the_others_from_running(repository: Repository, pair: list[Path]) -> None:
    good, broken = pair
    ledger = (broken / "paper.yaml").read_text()
    (broken / "paper.yaml").write_text("title: [unclosed\n")
    try:
        repository.run("dvc", "repro", f"papers/{good.name}")
        result = repository.run("dvc", "repro", f"papers/{broken.name}", check=False)
        assert result.returncode != 0
        assert f"error: {broken / 'paper.yaml'} is not valid YAML" in result.stderr
        board = repository.run("reprise", "board")
        assert f"warning: {broken.name}: papers/{broken.name}/paper.yaml is not valid YAML" in board.stderr
    finally:
        (broken / "paper.yaml").write_text(ledger)
    repository.run("dvc", "repro", f"papers/{broken.name}")
