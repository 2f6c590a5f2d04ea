"""Runs: what training and evaluation record."""

from __future__ import annotations

import getpass
import json
import re
import subprocess
import sys
import uuid
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from shared.tracking.spool import Writer, enabled, now, public_uri, tracking_uri
from shared.tracking.system import SystemMonitor

Status = Literal["FINISHED", "FAILED", "KILLED"]


class Run:
    """An open run. As a context manager it ends FINISHED, FAILED on an exception, KILLED on Ctrl-C or SIGKILL.

    Its methods return at once, never raise because of the store, and may be called from several threads.
    """

    def __init__(self, run_id: str, writer: Writer | None, *, reopened: bool = False) -> None:
        self.id = run_id
        self._writer = writer
        self._reopened = reopened
        self._monitor: SystemMonitor | None = None

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record numbers at a step; name them with groups, such as `train/loss`: MLflow makes a section of each."""
        if self._writer is not None:
            self._writer.add_metrics(int(step), {name: float(value) for name, value in metrics.items()})

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record parameters, nested ones as `outer.inner`; a parameter keeps the first value it is given."""
        self._write("params", values=_flatten(params))

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Set or change tags."""
        self._write("tags", values={name: str(value) for name, value in tags.items()})

    def log_artifact(self, path: Path | str, folder: str = "") -> None:
        """Attach a copy of a file or folder as it is now, under `folder` (such as `figures`)."""
        if self._writer is not None and (place := self._writer.keep(Path(path))) is not None:
            self._write("artifact", place=place, folder=folder)

    def log_table(self, path: Path | str) -> None:
        """Attach a CSV table, which MLflow's artifact view shows as a table."""
        self.log_artifact(path)

    def log_dataset(self, name: str, digest: str, source: str, context: str) -> None:
        """Record a data set that the run used.

        `source` is an address or says how the data was generated, `context` what it was used for, such as `train`.
        """
        self._write("dataset", name=name, digest=digest, source=source, context=context)

    def finish(self, status: Status = "FINISHED") -> None:
        """End the run; a second call changes nothing."""
        self._end(status)

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._reopened:
            # What is appended to a run says nothing about how the run itself ended.
            self._end(None)
        elif error is None:
            self._end("FINISHED")
        else:
            self.set_tags({"error": f"{type(error).__name__}: {error}"})
            self._end("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")

    def watch_system(self, interval: float = 10.0) -> None:
        """Record the machine's and the process's load every `interval` seconds until the run ends."""
        if self._writer is not None and self._monitor is None:
            self._monitor = SystemMonitor(self.log, interval)

    def _write(self, event: str, **fields: Any) -> None:
        if self._writer is not None:
            self._writer.write({"event": event, **fields})

    def _end(self, status: Status | None) -> None:
        if self._monitor is not None:
            self._monitor.stop()
            self._monitor = None
        if self._writer is not None:
            self._write("end", time=now(), status=status)
            self._writer.close()
            self._writer = None


def start_run(
    experiment: str,
    name: str,
    *,
    parent: str | None = None,
    description: str | None = None,
    params: Mapping[str, Any] | None = None,
    tags: Mapping[str, str] | None = None,
    experiment_description: str | None = None,
    system_metrics: bool = False,
) -> Run:
    """Start a run of `experiment`, nested under the run whose `id` is `parent`.

    Descriptions are Markdown: `description` is the run's, `experiment_description` (a README, say) the experiment's.
    `system_metrics` adds the machine's load to the run.
    """
    run_id = uuid.uuid4().hex
    if not enabled():
        return Run(run_id, None)
    all_tags = {name: str(value) for name, value in (tags or {}).items()} | _source_tags()
    if description:
        all_tags["mlflow.note.content"] = description
    run = Run(
        run_id,
        Writer(
            {
                "event": "start",
                "run": run_id,
                "uri": public_uri(tracking_uri()),
                "time": now(),
                "experiment": experiment,
                "name": name,
                "parent": parent,
                "params": _flatten(params or {}),
                "tags": all_tags,
                "experiment_description": standalone_markdown(experiment_description or ""),
            }
        ),
    )
    if system_metrics:
        run.watch_system()
    return run


def open_run(run_id: str) -> Run:
    """Append to an earlier run, such as the verdict to a run that was evaluated; its status stays as it is.

    If the store knows no run of that id by then, what was appended is dropped with a warning.
    """
    if not enabled():
        return Run(run_id, None, reopened=True)
    first = {"event": "open", "run": run_id, "uri": public_uri(tracking_uri()), "time": now()}
    return Run(run_id, Writer(first), reopened=True)


def standalone_markdown(text: str) -> str:
    """A README without what only works beside its files: images, relative links and comments."""
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)|<img\b[^>]*>", "", text)
    text = re.sub(r"(?<!!)\[([^\]]+)\]\((?!https?://|mailto:)[^)]*\)", r"\1", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in params.items():
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        elif isinstance(value, (list, tuple)):
            flat[f"{prefix}{key}"] = json.dumps(value, default=str)
        else:
            flat[f"{prefix}{key}"] = str(value)
    return flat


@lru_cache(maxsize=1)
def _source_tags() -> dict[str, str]:
    """Which command of which commit by whom, in MLflow's own tags."""
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    tags = {"mlflow.source.name": command, "mlflow.source.type": "LOCAL"}
    try:
        tags["mlflow.user"] = getpass.getuser()
    except (OSError, KeyError, ImportError):  # a container's user without a name
        tags["mlflow.user"] = "unknown"
    try:
        describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        commit = subprocess.run(describe, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git, or not in a repository with commits
        return tags
    tags["mlflow.source.git.commit"] = commit.removesuffix("-dirty")
    tags["mlflow.source.git.dirty"] = str(commit.endswith("-dirty")).lower()
    return tags
