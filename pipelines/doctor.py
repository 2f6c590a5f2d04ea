"""Looks at the machine, the checkout and the committed results, and says what is amiss and what to do about it."""

from __future__ import annotations

import http.client
import importlib.metadata
import os
import shutil
import sqlite3
import subprocess
import sys
import tomllib
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shared.config import data_root

Status = Literal["ok", "warn", "fail"]
MIN_PYTHON = (3, 11)
MIN_MEMORY_GIB = 4
MIN_DISK_GIB = 5
TIMEOUT_SECONDS = 1.0


@dataclass(frozen=True)
class Check:
    """One thing looked at: `detail` says what was found, `advice` what to do where it is not ok."""

    name: str
    status: Status
    detail: str
    advice: str = ""


def diagnose(root: Path) -> list[Check]:
    """Check machine, packages, checkout, tracking, data and results; takes a second or two and changes nothing."""
    return [
        _python(),
        _packages(root),
        _machine(),
        _disk(root),
        _gpu(),
        _git(root),
        _dvc(root),
        _tracking(),
        _data(root),
        *_papers(root),
    ]


def print_report(checks: Sequence[Check]) -> int:
    """Print the checks as a table; returns the exit status, 1 if one failed and 0 otherwise."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    marks = {"ok": Text("✔", "green"), "warn": Text("!", "yellow"), "fail": Text("✘", "red")}
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for check in checks:
        found = Text(check.detail)
        if check.advice and check.status != "ok":
            found.append(f"\n→ {check.advice}", "yellow" if check.status == "warn" else "red")
        table.add_row(marks[check.status], check.name, found)
    console = Console()
    console.print(table)
    failures = sum(check.status == "fail" for check in checks)
    warnings = sum(check.status == "warn" for check in checks)
    console.print(f"{failures} failure(s), {warnings} warning(s)", highlight=False)
    return 1 if failures else 0


def _python() -> Check:
    found = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < MIN_PYTHON:
        return Check("Python", "fail", found, "make the environment with Python 3.11 or newer: make clean, then again")
    return Check("Python", "ok", f"{found} ({sys.executable})")


def _packages(root: Path) -> Check:
    """Direct dependencies must be there; every package that is there should have its pinned version."""
    from packaging.requirements import InvalidRequirement, Requirement

    name, advice = "packages", "pip install -c constraints.txt -e '.[dev]' in the environment (make does it)"
    try:
        lines = (root / "constraints.txt").read_text(encoding="utf-8").splitlines()
        pins = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
        project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        needed = [Requirement(line) for line in project["dependencies"]]
    except (OSError, KeyError, InvalidRequirement, tomllib.TOMLDecodeError) as error:
        return Check(name, "fail", f"constraints.txt or pyproject.toml cannot be read: {error}", "git checkout them")
    applicable = [needs for needs in needed if needs.marker is None or needs.marker.evaluate()]
    missing = [needs.name for needs in applicable if _version(needs.name) is None]
    if missing:
        return Check(name, "fail", f"not installed: {', '.join(missing)}", advice)
    installed = [(pin, _version(pin.name)) for pin in pins]
    others = [
        f"{pin.name} {found} (pinned{pin.specifier})"
        for pin, found in installed
        if found and found not in pin.specifier
    ]
    if others:
        shown = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
        return Check(name, "warn", f"other than pinned: {shown}", f"results may differ in their last digits; {advice}")
    return Check(name, "ok", f"{len(applicable)} direct dependencies, all as pinned; torch {_version('torch')}")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _machine() -> Check:
    import psutil

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = psutil.virtual_memory()
    detail = f"{cores} core(s), {memory.total / 2**30:.1f} GiB memory, {memory.available / 2**30:.1f} GiB of it free"
    if memory.available < MIN_MEMORY_GIB * 2**30:
        return Check("machine", "warn", detail, f"small profiles may take up to {MIN_MEMORY_GIB} GiB: close something")
    return Check("machine", "ok", detail)


def _disk(root: Path) -> Check:
    free = shutil.disk_usage(root).free / 2**30
    if not os.access(root, os.W_OK):
        return Check("disk", "fail", f"{root} cannot be written", "clone the repository where you may write")
    if free < MIN_DISK_GIB:
        return Check(
            "disk", "warn", f"{free:.1f} GiB free", "make room: runs and caches take a few GiB (dvc gc -w helps)"
        )
    return Check("disk", "ok", f"{free:.0f} GiB free")


def _gpu() -> Check:
    """Loading torch takes seconds, so it is asked only where there is a driver that it could use."""
    if not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")):
        return Check("GPU", "ok", "none: all profiles but 'gpu' and 'paper' run without one")
    import torch

    if not torch.cuda.is_available():
        advice = "install a build of torch for this GPU's driver, at the pinned version"
        return Check("GPU", "warn", f"there is one, but torch {torch.__version__} cannot use it", advice)
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    return Check("GPU", "ok", f"{torch.cuda.get_device_name(0)}, {memory:.0f} GiB; triton {_version('triton')}")


def _git(root: Path) -> Check:
    status = _output(root, "git", "status", "--porcelain=v1", "--branch")
    if status is None:
        return Check("git", "warn", "not a git checkout", "runs will not say which commit they came from: git clone it")
    branch, *changes = status.splitlines()
    commit = _output(root, "git", "rev-parse", "--short", "HEAD") or "no commit yet"
    detail = f"{branch.removeprefix('## ').split('...')[0]} at {commit.strip()}"
    return Check("git", "ok", f"{detail}, {len(changes)} file(s) changed or new" if changes else f"{detail}, clean")


def _output(root: Path, *command: str) -> str | None:
    """What a command prints; None if it is not there, fails or hangs."""
    try:
        run = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=5 * TIMEOUT_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout


def _dvc(root: Path) -> Check:
    if not (root / ".dvc").is_dir():
        return Check("DVC", "fail", "not initialized", "git checkout .dvc, or dvc init, in the root of the repository")
    if not (root / "dvc.yaml").is_file():
        return Check("DVC", "fail", "there is no dvc.yaml", "git checkout dvc.yaml")
    return Check("DVC", "ok", "initialized")


# ----------------------------------------------------------------------------------------------------------- tracking


def _tracking() -> Check:
    from shared.tracking.spool import database_path, enabled, pending, public_uri, spool_root, tracking_uri

    name = "tracking"
    if not enabled():
        return Check(name, "ok", "off (REPRISE_TRACKING=off)")
    uri = tracking_uri()
    database = database_path(uri)
    if database is not None:
        problem = _database_problem(database)
        advice = "mend its permissions or move it away, or set MLFLOW_TRACKING_URI to another store"
    else:
        problem = _server_problem(public_uri(uri)) if uri.startswith("http") else None
        advice = "runs go on and keep their records; when the server is back, 'reprise track sync' delivers them"
    if problem:
        return Check(name, "warn" if database is None else "fail", f"{public_uri(uri)}: {problem}", advice)
    waiting = len(pending(spool_root()))
    if waiting:
        return Check(name, "warn", f"{public_uri(uri)}; {waiting} run(s) wait for delivery", "reprise track sync")
    return Check(name, "ok", public_uri(uri))


def _database_problem(path: Path) -> str | None:
    """Why MLflow could not write to a SQLite file, found without writing to it."""
    if not path.exists():
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        return None if os.access(folder, os.W_OK) else f"{folder} cannot be written"
    if not os.access(path, os.W_OK):
        return "cannot be written"
    address = f"file:{urllib.parse.quote(str(path.absolute()))}?mode=rw"
    try:
        connection = sqlite3.connect(address, uri=True, timeout=TIMEOUT_SECONDS)
        try:
            connection.execute("select count(*) from sqlite_master").fetchone()
        finally:
            connection.close()
    except sqlite3.Error as error:
        return f"is not a database that can be read: {error}"
    return None


def _server_problem(uri: str) -> str | None:
    """Why a tracking server cannot be reached; `uri` is without user name and password."""
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=TIMEOUT_SECONDS):
            return None
    except urllib.error.HTTPError:
        return None  # it answers; whether it lets us in is told when a run is delivered
    except (OSError, ValueError, http.client.HTTPException) as error:
        return f"does not answer: {getattr(error, 'reason', error)}"


# ---------------------------------------------------------------------------------------------------- data and results


def _data(root: Path) -> Check:
    from pipelines.papers import find_papers

    folder = data_root()
    if not folder.is_dir():
        detail = f"{folder} does not exist: all papers run on embedded data"
        advice = "for real data: reprise data fetch <paper>, or point REPRISE_DATA to the folder that has it"
        # Not having real data is how everybody starts; a variable that points nowhere is a mistake.
        return Check("data", "warn" if os.environ.get("REPRISE_DATA") else "ok", detail, advice)
    here = [paper.name for paper in find_papers(root) if any((folder / paper.name).glob("*"))]
    return Check("data", "ok", f"{folder}: real data of {', '.join(here) or 'no paper'}")


def _papers(root: Path) -> Iterator[Check]:
    """Per paper: whether it can be read, and per profile whether its results match code and params."""
    from pipelines.board import collect

    for entry in collect(root):
        name = f"papers/{entry.slug}"
        if entry.error:
            yield Check(name, "fail", entry.error, "mend the file, or run the paper again where it is a result")
        stale = [result for result in entry.results if result.stale]
        if stale:
            detail = "; ".join(
                f"results/{result.profile} are older than their code: {result.stale}" for result in stale
            )
            profiles = ", ".join(result.profile for result in stale)
            advice = f"run it again (dvc repro {name}) with each of these profiles in its params.yaml: {profiles}"
            yield Check(name, "warn", detail, advice)
        elif not entry.error:
            profiles = ", ".join(result.profile for result in entry.results)
            yield Check(name, "ok", f"results match their code: {profiles}" if profiles else "not run yet")
