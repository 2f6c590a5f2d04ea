"""The doctor: finds what is amiss, says what to do, and has the exit status of its findings."""

from __future__ import annotations

import importlib.metadata
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

import pipelines.doctor as doctor
from pipelines.doctor import Check, diagnose, print_report
from pipelines.tests.test_board import write_paper

PYDANTIC = importlib.metadata.version("pydantic")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout in which nothing is amiss but that git knows nothing of it."""
    (tmp_path / ".dvc").mkdir()
    (tmp_path / "dvc.yaml").touch()
    (tmp_path / "constraints.txt").write_text(f"# pins\npydantic=={PYDANTIC}\nnot_installed==1.0\n")
    (tmp_path / "pyproject.toml").write_text(
        '[project]\ndependencies = ["pydantic", "no_such_package; sys_platform == \'amiga\'"]\n'
    )
    monkeypatch.setenv("REPRISE_TRACKING", "on")
    monkeypatch.setenv("REPRISE_SPOOL", str(tmp_path / "spool"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("REPRISE_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    (tmp_path / "data").mkdir()
    write_paper(tmp_path, "cape", {"small": {"C1": "holds"}})
    return tmp_path


def look(root: Path, name: str) -> Check:
    (check,) = [check for check in diagnose(root) if check.name == name]
    return check


def test_nothing_amiss(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "data/cape").mkdir()
    (root / "data/cape/advection.hdf5").touch()
    checks = diagnose(root)
    assert [check.name for check in checks if check.status == "fail"] == []
    assert print_report(checks) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "results match their code: small" in output
    assert "real data of cape" in output
    assert "0 failure(s)" in output


def test_old_python(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 2, "final", 0))
    assert (look(root, "Python").status, look(root, "Python").detail) == ("fail", "3.10.2")


def test_packages(root: Path) -> None:
    assert look(root, "packages").status == "ok"
    (root / "constraints.txt").write_text("pydantic==1.0\n")
    found = look(root, "packages")
    assert (found.status, found.detail) == ("warn", f"other than pinned: pydantic {PYDANTIC} (pinned==1.0)")
    (root / "pyproject.toml").write_text('[project]\ndependencies = ["no_such_package>=2"]\n')
    found = look(root, "packages")
    assert (found.status, found.detail) == ("fail", "not installed: no_such_package")
    (root / "constraints.txt").unlink()
    assert look(root, "packages").status == "fail"


def test_a_local_build_has_its_pinned_version(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "constraints.txt").write_text("torch==2.13.0\n")
    monkeypatch.setattr(doctor, "_version", {"torch": "2.13.0+cpu", "pydantic": "2"}.get)
    assert look(root, "packages").status == "ok"


def test_dvc(root: Path) -> None:
    (root / "dvc.yaml").unlink()
    assert look(root, "DVC").status == "fail"
    (root / ".dvc").rmdir()
    assert "dvc init" in look(root, "DVC").advice


def test_git(root: Path) -> None:
    assert look(root, "git").status == "warn"
    subprocess.run(["git", "init", "--quiet", "--initial-branch=work"], cwd=root, check=True)
    found = look(root, "git")
    assert (found.status, "work at no commit yet" in found.detail) == ("ok", True)


def test_results_older_than_their_code(root: Path) -> None:
    (root / "papers/cape/model.py").write_text("width = 36\n")
    found = look(root, "papers/cape")
    assert found.status == "warn"
    assert "results/small are older than their code" in found.detail
    assert "dvc repro papers/cape" in found.advice


def test_broken_paper_fails_and_is_named(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "papers/broken").mkdir()
    (root / "papers/broken/paper.yaml").write_text("[red]title[/red]: [unclosed\n")
    assert look(root, "papers/broken").status == "fail"
    assert look(root, "papers/cape").status == "ok"
    assert print_report(diagnose(root)) == 1
    assert "[red]title[/red]" in capsys.readouterr().out, "no file's content is taken for markup"


def test_data_root_that_is_not_there(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPRISE_DATA", str(root / "nowhere"))
    assert (look(root, "data").status, "nowhere" in look(root, "data").detail) == ("warn", True)


def test_database(root: Path) -> None:
    assert look(root, "tracking").status == "ok", "one that is not there yet will be made"
    assert not (root / "mlflow.db").exists(), "but not by the doctor"
    sqlite3.connect(root / "mlflow.db").close()
    assert look(root, "tracking").status == "ok"
    (root / "mlflow.db").write_bytes(b"no database" * 1000)
    assert look(root, "tracking").status == "fail"


def test_tracking_off_and_undelivered_runs(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "spool/one").mkdir(parents=True)
    (root / "spool/one/events.jsonl").write_text('{"event": "start", "run": "1"}\n')
    found = look(root, "tracking")
    assert (found.status, found.advice) == ("warn", "reprise track sync")
    assert "1 run(s) wait" in found.detail
    monkeypatch.setenv("REPRISE_TRACKING", "off")
    assert look(root, "tracking").status == "ok"


@pytest.fixture
def server() -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(401 if self.path == "/closed/health" else 200)

        def log_message(self, *arguments: object) -> None:
            pass

    http = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}"
    http.shutdown()
    http.server_close()


@pytest.mark.parametrize("path", ["", "/", "/closed"])
def test_server_that_answers(root: Path, monkeypatch: pytest.MonkeyPatch, server: str, path: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.replace("//", "//name:word@") + path)
    found = look(root, "tracking")
    assert found.status == "ok"
    assert "word" not in found.detail


@pytest.mark.parametrize("listening", [False, True])
def test_server_that_does_not_answer(root: Path, monkeypatch: pytest.MonkeyPatch, listening: bool) -> None:
    monkeypatch.setattr(doctor, "TIMEOUT_SECONDS", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        if listening:
            silent.listen()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        found = look(root, "tracking")
    assert (found.status, "does not answer" in found.detail) == ("warn", True)
    assert "reprise track sync" in found.advice


def test_small_or_full_machine(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "MIN_MEMORY_GIB", 10**6)
    monkeypatch.setattr(doctor, "MIN_DISK_GIB", 10**6)
    assert (look(root, "machine").status, look(root, "disk").status) == ("warn", "warn")
