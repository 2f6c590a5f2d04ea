"""The command `reprise`: what it offers, its messages and its exit statuses."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

import pipelines.cli
import pipelines.runner
from pipelines.cli import main
from shared.config import UserError


@pytest.fixture
def reprise(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    monkeypatch.setenv("NO_COLOR", "1")
    return Command(monkeypatch, capsys)


class Command:
    """Runs `reprise` in this process: exit status, standard output, standard error."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        self.monkeypatch.setattr(sys, "argv", ["reprise", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        output = self.capsys.readouterr()
        return int(end.value.code or 0), output.out, output.err


def failing_with(error: BaseException) -> object:
    def run_stage(*_: object) -> None:
        raise error

    return run_stage


def test_help_lists_every_command(reprise: Command) -> None:
    status, output, _ = reprise("--help")
    assert status == 0
    listed = {line.split()[1] for line in output.splitlines() if line.startswith("│ ") and len(line.split()) > 2}
    assert {"run", "verdict", "new", "board", "doctor", "ui", "data", "track"} <= listed
    for group, commands in {"data": {"list", "fetch", "verify"}, "track": {"sync"}}.items():
        _, output, _ = reprise(group, "--help")
        assert all(f" {command} " in output for command in commands)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nosuch"], "No such command 'nosuch'"),
        (["run"], "Missing argument"),
        (["run", "train", "--modell", "fno"], "No such option: --modell"),
        (["new"], "Missing argument"),
    ],
)
def test_misuse_ends_with_status_2(reprise: Command, arguments: list[str], words: str) -> None:
    status, _, message = reprise(*arguments)
    assert status == 2
    assert words in message
    assert "--help" in message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["verdict", "nosuch"], "error: there is no paper 'nosuch'; there are "),
        (
            ["verdict", "papers/cape", "--profile", "nosuch"],
            "params.yaml: there is no profile 'nosuch'; choose one of small",
        ),
        (["new", "my-paper"], "error: 'my-paper' cannot be the name of a paper's folder"),
        (["new", "mine", "--from", "nosuch"], "error: there is no paper 'nosuch' to copy"),
        (["data", "fetch", "nosuch"], "error: there is no paper 'nosuch'"),
        (["data", "fetch", "cape", "--only", "nosuch"], "error: 'cape' has no file 'nosuch'; there are: "),
        (["data", "verify", "nosuch"], "error: there is no paper 'nosuch'"),
    ],
)
def test_mistakes_end_with_status_1_and_a_message(
    reprise: Command, root: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    monkeypatch.chdir(root)
    status, _, message = reprise(*arguments)
    assert status == 1
    assert words in message
    assert "Traceback" not in message


def test_ctrl_c_says_how_to_go_on(reprise: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipelines.runner, "run_stage", failing_with(KeyboardInterrupt()))
    status, _, message = reprise("run", "train")
    assert status == 130
    assert message.strip() == "error: stopped; run the same command again to continue where it was"


def test_a_full_disk_is_a_message(reprise: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    error = OSError(28, "No space left on device", "/data/scores.csv")
    monkeypatch.setattr(pipelines.runner, "run_stage", failing_with(error))
    status, _, message = reprise("run", "evaluate")
    assert status == 1
    assert message.startswith("error: No space left on device (/data/scores.csv): nothing was left half-written")


def test_a_mistake_is_a_message_and_a_defect_a_traceback(reprise: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipelines.runner, "run_stage", failing_with(UserError("no such stage")))
    assert reprise("run", "x") == (1, "", "error: no such stage\n")
    monkeypatch.setattr(pipelines.runner, "run_stage", failing_with(ZeroDivisionError("a defect")))
    monkeypatch.setattr(sys, "argv", ["reprise", "run", "x"])
    with pytest.raises(ZeroDivisionError, match="a defect"):
        main()


def test_ui_prints_links_and_serves_on_this_machine_only(
    reprise: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def links(base_url: str) -> dict[str, dict[str, str]]:
        return {name: {"runs": f"{base_url}/{name}/runs", "charts": f"{base_url}/{name}/charts"} for name in "ba"}

    started: list[list[str]] = []
    monkeypatch.setattr("shared.tracking.experiment_links", links)
    monkeypatch.setattr(os, "execv", lambda _, command: started.append(command))
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    status, output, _ = reprise("ui", "--port", "5007")
    assert status == 0
    assert output.split() == [
        *("a", "runs:", "http://127.0.0.1:5007/a/runs", "charts:", "http://127.0.0.1:5007/a/charts"),
        *("b", "runs:", "http://127.0.0.1:5007/b/runs", "charts:", "http://127.0.0.1:5007/b/charts"),
    ]
    (command,) = started
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert command[command.index("--port") + 1] == "5007"
    assert command[command.index("--backend-store-uri") + 1] == f"sqlite:///{tmp_path}/mlflow.db"
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"


def test_data_list_and_verify(reprise: Command, root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(root)
    monkeypatch.setenv("REPRISE_DATA", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    status, output, _ = reprise("data", "list")
    assert status == 0
    assert "1D_Advection_Sols_beta0.1.hdf5" in output
    assert "missing" in output
    assert reprise("data", "verify", "cape")[0] == 1
    (tmp_path / "cape").mkdir()
    (tmp_path / "cape" / "1D_Advection_Sols_beta0.1.hdf5").write_bytes(b"something else")
    status, output, _ = reprise("data", "verify", "papers/cape")
    assert status == 1
    (line,) = [line for line in output.splitlines() if "1D_Advection_Sols_beta0.1.hdf5" in line]
    assert "corrupt" in line
