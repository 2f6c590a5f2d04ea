"""Starts and stops the process that delivers tracking records, and waits for it, but not for long."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from shared.tracking.spool import database_path, enabled, logger, pending, public_uri, spool_root, tracking_uri

# Loading MLflow and making the tables of a new database take seconds, on a busy machine many: that is no dead server.
STARTUP_SECONDS = 60.0
LOCAL_SECONDS = 60.0


@dataclass(frozen=True)
class SyncReport:
    """What a delivery did: runs delivered, runs still pending and why, and records that the store will never take."""

    delivered: int
    pending: int
    error: str | None = None
    refused: tuple[str, ...] = ()


@contextmanager
def deliver(timeout: float = 5.0) -> Iterator[None]:
    """Deliver the records of the block's runs while it runs, in a process of its own.

    When the block ends, waits as long as the delivery gets on, and gives up when a server has done nothing for
    `timeout` seconds or has just failed: then warns, and the records wait for the next delivery or `sync`.
    """
    if not enabled():
        yield
        return
    uri = tracking_uri()
    root = spool_root()
    with tempfile.TemporaryFile() as complaints, _start(root, uri, complaints) as process:
        try:
            yield
        finally:
            error, refused = _stop(process, complaints, timeout if database_path(uri) is None else LOCAL_SECONDS)
            _warn(uri, error, len(pending(root, public_uri(uri))) if error is not None else 0, refused)


def sync(timeout: float | None = None) -> SyncReport:
    """Deliver all that waits to the store in force, also what was meant for another one.

    Gives up when the store has done nothing for `timeout` seconds, by default 60. Runs that are going on are delivered
    as far as they are.
    """
    if not enabled():
        return SyncReport(0, 0)
    uri = tracking_uri()
    root = spool_root()
    before = pending(root)
    if not before:
        return SyncReport(0, 0)
    with tempfile.TemporaryFile() as complaints, _start(root, uri, complaints, "--everything") as process:
        error, refused = _stop(process, complaints, LOCAL_SECONDS if timeout is None else timeout)
    left = pending(root) if error is not None else []
    return SyncReport(len(set(before) - set(left)), len(left), error if left else None, tuple(refused))


def _start(root: Path, uri: str, complaints: IO[bytes], *options: str) -> subprocess.Popen[bytes]:
    """Start the delivering process, its standard error going to the file `complaints`."""
    environment = os.environ | {
        "MLFLOW_TRACKING_URI": uri,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "GIT_PYTHON_REFRESH": "quiet",
    }
    # -P: the working directory is a paper's folder, whose modules must not shadow a library's.
    # A session of its own: Ctrl-C in the terminal ends the stage, not the delivery of its last records.
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "shared.tracking.store", str(root), *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=complaints,
        env=environment,
        start_new_session=True,
    )


def _stop(process: subprocess.Popen[bytes], complaints: IO[bytes], patience: float) -> tuple[str | None, list[str]]:
    """Tell the process to finish and wait while it gets on; what kept it from delivering, and what was refused."""
    try:
        with suppress(BrokenPipeError):
            # A word, since the pipe stays open where a forked worker has inherited it.
            process.stdin.write(b"stop\n")
            process.stdin.flush()
        report = _read_report(process, patience)
    finally:
        process.kill()
    if report is None:
        return f"no answer within {patience:g} s", []
    if not report:
        complaints.seek(0)
        lines = complaints.read().decode(errors="replace").strip().splitlines()
        return f"the delivering process failed: {lines[-1] if lines else 'it said nothing'}", []
    return report["error"], report["refused"]


def _read_report(process: subprocess.Popen[bytes], patience: float) -> dict | None:
    """The process's last word; empty if it ended without one, None if it was silent for longer than `patience`."""
    output = process.stdout.fileno()
    received = b""
    deadline = time.monotonic() + STARTUP_SECONDS
    while select.select([output], [], [], max(0.0, deadline - time.monotonic()))[0]:
        data = os.read(output, 1 << 16)
        if not data:
            return {}
        deadline = time.monotonic() + patience
        received += data
        *lines, received = received.split(b"\n")
        for line in lines:
            if line.startswith(b"{"):
                return json.loads(line)
    return None


def _warn(uri: str, error: str | None, num_pending: int, refused: list[str]) -> None:
    store = public_uri(uri)
    if refused:
        logger.warning(
            "tracking: %s refused %d record(s), which are dropped; the first: %s", store, len(refused), refused[0]
        )
    if num_pending:
        logger.warning(
            "tracking: %d run(s) not delivered to %s (%s); the records are kept, `reprise track sync` sends them",
            num_pending,
            store,
            error,
        )
