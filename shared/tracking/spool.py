"""Where tracking records wait on disk, and what they look like.

Each run writes to a folder of its own, `<spool>/<time of opening>-<random>/`:

    events.jsonl     one JSON object a line, only ever appended to; its writer holds a lock on it while it lives
    files/           copies of the artifacts
    progress.json    how far the delivery came, and to which run of which store
    lock             held by the process that delivers

The folder is removed when its writer has ended and everything in it was delivered.
"""

from __future__ import annotations

import atexit
import fcntl
import json
import logging
import os
import shutil
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from shared.config import repo_root
from shared.files import write_json

logger = logging.getLogger("reprise.tracking")

Event = dict[str, Any]

EVENTS, PROGRESS, LOCK, FILES = "events.jsonl", "progress.json", "lock", "files"
CHUNK_BYTES = 1 << 18
FLUSH_SECONDS = 1.0


def enabled() -> bool:
    """Whether runs are tracked: not under `REPRISE_TRACKING=off`, nor by later processes of a distributed run."""
    return os.environ.get("REPRISE_TRACKING", "").lower() != "off" and int(os.environ.get("RANK", 0)) == 0


def spool_root() -> Path:
    """The folder in which records wait: `$REPRISE_SPOOL`, by default `.reprise/tracking` in the repository."""
    value = os.environ.get("REPRISE_SPOOL")
    return Path(value).expanduser().resolve() if value else repo_root() / ".reprise" / "tracking"


def tracking_uri() -> str:
    """The MLflow store in force: `$MLFLOW_TRACKING_URI`, by default `mlflow.db` in the repository.

    A relative SQLite path counts from the repository, since the stages of a pipeline run in different folders.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    database = database_path(uri)
    if database is None or database.is_absolute():
        return uri
    return f"sqlite:///{repo_root() / database}"


def database_path(uri: str) -> Path | None:
    """The file of a SQLite URI, None for any other store."""
    prefix = "sqlite:///"
    return Path(uri.removeprefix(prefix).partition("?")[0]) if uri.startswith(prefix) else None


def public_uri(uri: str) -> str:
    """`uri` without user name and password: what may be printed and written to files."""
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if "@" in parts.netloc else uri


def now() -> int:
    """The time in milliseconds since 1970, as MLflow counts it."""
    return time.time_ns() // 1_000_000


class Writer:
    """Appends the events of one run to a new folder of the spool.

    What is written is in the operating system's hands at once, so that SIGKILL does not lose it. Metrics, of which a
    loop has many, are first collected and written once a second by a thread: encoding each of them where it arises
    would cost some 40 µs among a training step's cold caches, a few when many follow one another. A disk that fails
    costs a warning and the records, never the run.
    """

    def __init__(self, first: Event) -> None:
        self._descriptor: int | None = None
        self._mutex = threading.Lock()
        self._metrics: deque[tuple[int, int, dict[str, float]]] = deque()
        self._closed = threading.Event()
        self._num_files = 0
        try:
            stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime()) + f"-{time.time_ns() % 1_000_000_000:09d}"
            self._folder = spool_root() / f"{stamp}-{uuid.uuid4().hex[:8]}"
            self._folder.mkdir(parents=True)
            # Under its final name the file is locked and has its first event: an unlocked one has lost its writer.
            opening = self._folder / f"{EVENTS}.opening"
            self._descriptor = os.open(opening, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o644)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
            self.write(first)
            opening.rename(self._folder / EVENTS)
        except OSError as error:
            self._give_up(error)
            return
        threading.Thread(target=self._flush_regularly, name="tracking", daemon=True).start()
        atexit.register(self.flush)

    def add_metrics(self, step: int, values: dict[str, float]) -> None:
        """Append numbers at a step, within a second."""
        if self._descriptor is not None:
            self._metrics.append((now(), step, values))

    def write(self, event: Event) -> None:
        """Append one event, after the metrics that were added before it."""
        with self._mutex:
            self._write([*self._take_metrics(), event])

    def flush(self) -> None:
        """Write the metrics collected so far."""
        with self._mutex:
            self._write(self._take_metrics())

    def keep(self, path: Path) -> str | None:
        """Copy a file or folder into the spool; its place there, None if that failed."""
        if self._descriptor is None:
            return None
        with self._mutex:
            place = f"{FILES}/{self._num_files}/{path.name}"
            self._num_files += 1
        try:
            target = self._folder / place
            target.parent.mkdir(parents=True)
            if path.is_dir():
                shutil.copytree(path, target)
            else:
                shutil.copyfile(path, target)
        except OSError as error:
            logger.warning("tracking: %s was not kept as an artifact (%s)", path, error)
            return None
        return place

    def close(self) -> None:
        """Let go of the file; what is written afterwards is dropped."""
        self._closed.set()
        self.flush()
        atexit.unregister(self.flush)
        with self._mutex:
            if self._descriptor is not None:
                # Closing alone would leave the lock with a forked child that inherited the descriptor.
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)
                os.close(self._descriptor)
                self._descriptor = None

    def _flush_regularly(self) -> None:
        while not self._closed.wait(FLUSH_SECONDS):
            self.flush()

    def _take_metrics(self) -> list[Event]:
        events = []
        # A deque, since another thread may be adding to it.
        while self._metrics:
            time, step, values = self._metrics.popleft()
            events.append({"event": "metrics", "time": time, "step": step, "values": values})
        return events

    def _write(self, events: list[Event]) -> None:
        if self._descriptor is None or not events:
            return
        data = "".join(json.dumps(event) + "\n" for event in events).encode()
        try:
            if os.write(self._descriptor, data) < len(data):
                raise OSError("the disk is full")
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        logger.warning("tracking: this run is not recorded any further (%s)", error)
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


@dataclass(frozen=True)
class Progress:
    """How far a folder was delivered: to byte `offset` of its events, into run `run_id` of the store `uri`."""

    uri: str
    run_id: str | None = None
    offset: int = 0


def folders(root: Path) -> list[Path]:
    """The folders of the spool that hold records, oldest first."""
    return sorted(path.parent for path in root.glob(f"*/{EVENTS}"))


def read_events(folder: Path, offset: int) -> Iterator[tuple[list[Event], int]]:
    """The events after `offset` in chunks, each with the offset behind it.

    A last line without its end was torn by a crash, or is being written; it is left alone, as are unreadable lines.
    """
    with open(folder / EVENTS, "rb") as file:
        file.seek(offset)
        while lines := file.readlines(CHUNK_BYTES):
            if not lines[-1].endswith(b"\n"):
                lines.pop()
            if not lines:
                return
            offset += sum(map(len, lines))
            yield [event for line in lines if (event := _parse(line)) is not None], offset


def first_event(folder: Path) -> Event | None:
    """The event that opened the folder's run, None if a crash of the machine lost it."""
    with open(folder / EVENTS, "rb") as file:
        event = _parse(file.readline())
    return event if event is not None and event.get("event") in ("start", "open") else None


def writer_lives(folder: Path) -> bool:
    """Whether the process that writes to the folder is still there."""
    with open(folder / EVENTS, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def read_progress(folder: Path) -> Progress | None:
    """How far the folder was delivered; None if no delivery has begun."""
    try:
        return Progress(**json.loads((folder / PROGRESS).read_text(encoding="utf-8")))
    except (FileNotFoundError, json.JSONDecodeError, TypeError):
        return None


def write_progress(folder: Path, progress: Progress) -> None:
    """Note how far the folder was delivered."""
    write_json(folder / PROGRESS, asdict(progress))


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Hold the folder's delivery lock inside the block; False if another process holds it or has removed the folder."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except FileNotFoundError:
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = (folder / EVENTS).exists()
        except BlockingIOError:
            held = False
        yield held
    finally:
        os.close(descriptor)


def pending(root: Path, uri: str | None = None) -> list[Path]:
    """The folders with records that no store has yet; with `uri`, those of runs meant for that store."""
    return [folder for folder in folders(root) if _is_pending(folder) and (uri is None or _meant_for(folder) == uri)]


def _is_pending(folder: Path) -> bool:
    try:
        progress = read_progress(folder)
        if progress is None or progress.offset < (folder / EVENTS).stat().st_size:
            return True
        return not writer_lives(folder)
    except FileNotFoundError:  # delivered while we looked
        return False


def _meant_for(folder: Path) -> str | None:
    try:
        return (first_event(folder) or {}).get("uri")
    except FileNotFoundError:
        return None


def _parse(line: bytes) -> Event | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) else None
