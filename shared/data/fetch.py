"""Official data files: located under the data root, downloaded with a checksum, verified, digested for tracking.

A paper's official files lie in `$REPRISE_DATA/<slug>/<name>`, `name` as its paper.yaml gives it. Downloads continue
where a cut connection left them, in the same call and in a later one, and a file appears under its name only when it
is whole and its SHA-256 is right.
"""

from __future__ import annotations

import difflib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, Protocol

from shared.config import UserError, data_root
from shared.files import write_text

if TYPE_CHECKING:
    import requests

CHUNK_BYTES = 1 << 16  # a cut connection loses at most one
TIMEOUT_SECONDS = (10, 60)  # to connect, and between two chunks
RETRIES = 5
RETRIED_STATUS = {408, 425, 429, 500, 502, 503, 504}
CONVERTED = ".converted"  # holds the digest of the official files that the conversion was made from

Converter = Callable[[Path, Path], None]


class DataFile(Protocol):
    """One official file, as a paper's paper.yaml lists it; `size` is in bytes."""

    @property
    def name(self) -> str: ...
    @property
    def url(self) -> str | None: ...
    @property
    def sha256(self) -> str | None: ...
    @property
    def md5(self) -> str | None: ...
    @property
    def size(self) -> int | None: ...


class DataSource(Protocol):
    """Where a paper's data comes from; `gate` says how to apply where the files are not for anyone to download."""

    @property
    def name(self) -> str: ...
    @property
    def url(self) -> str | None: ...
    @property
    def gate(self) -> str | None: ...
    @property
    def files(self) -> Sequence[DataFile]: ...


State = Literal["ok", "present", "missing", "corrupt", "unknown"]


@dataclass(frozen=True)
class FileStatus:
    """An official file as it lies on this disk.

    `state` is `missing`; `corrupt` (size or checksum differ); `present` (there, not hashed); `ok` (checksum right) or
    `unknown` (there, but paper.yaml records no checksum to hold it against). Sizes are in bytes.
    """

    source: str
    name: str
    path: Path
    state: State
    size: int | None
    expected_size: int | None
    detail: str = ""


# ---------------------------------------------------------------------------------------------------- where it lies


def data_folder(folder_name: str) -> Path:
    """The folder of one paper's real data, `$REPRISE_DATA/<folder_name>`, whether or not it exists."""
    return _inside(data_root(), folder_name)


def locate(folder_name: str, filename: str) -> Path:
    """The path of a real data file that exists; `UserError` says how to get one that does not."""
    path = _inside(data_folder(folder_name), filename)
    if not path.exists():
        raise UserError(
            f"{path} is missing. Run 'reprise data fetch {folder_name}', or put the file there by hand, "
            "or point REPRISE_DATA to the folder that holds your data sets."
        )
    return path


def _inside(folder: Path, name: str) -> Path:
    """`folder / name`, refusing names that lead out of the folder."""
    path = folder / name
    if not name or path == folder or Path(os.path.normpath(path)) != path or not path.is_relative_to(folder):
        raise UserError(f"{name!r} is not the name of a file inside {folder}: give a relative path without '..'")
    return path


# ------------------------------------------------------------------------------------------------ what is in it


def file_digest(path: Path, algorithm: str = "sha256") -> str:
    """Digest of a file's content in hexadecimal digits, by default SHA-256."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def checksum(file: DataFile) -> tuple[str, str] | None:
    """The strongest checksum that paper.yaml records of a file, as (algorithm, digest)."""
    if file.sha256:
        return "sha256", file.sha256.lower()
    return ("md5", file.md5.lower()) if file.md5 else None


def dataset_digest(paths: Path | Iterable[Path]) -> str:
    """SHA-256 over the names and contents of files and folders, for telling data sets apart in tracking.

    It does not depend on where the data lies, on the order given, or on times and permissions. Inside folders, hidden
    files (unfinished downloads among them) do not count.
    """
    given = [paths] if isinstance(paths, str | Path) else list(paths)
    entries: list[tuple[str, str]] = []
    for path in map(Path, given):
        if not path.exists():
            raise UserError(f"{path} is missing, so the data set's digest cannot be taken")
        if path.is_file():
            entries.append((path.name, file_digest(path)))
        else:
            names = (file.relative_to(path) for file in path.rglob("*") if file.is_file())
            visible = (name for name in names if not any(part.startswith(".") for part in name.parts))
            entries.extend((name.as_posix(), file_digest(path / name)) for name in visible)
    return hashlib.sha256(json.dumps(sorted(entries)).encode()).hexdigest()


def listing(folder_name: str, sources: Iterable[DataSource]) -> list[FileStatus]:
    """Which official files are there, by name and size alone (quick; `verify` reads them)."""
    folder = data_folder(folder_name)
    return [_status(folder, source, file, read=False) for source in sources for file in source.files]


def verify(folder_name: str, sources: Iterable[DataSource]) -> list[FileStatus]:
    """Read every official file again and hold its size and checksum against those recorded in paper.yaml."""
    folder = data_folder(folder_name)
    return [_status(folder, source, file, read=True) for source in sources for file in source.files]


def _status(folder: Path, source: DataSource, file: DataFile, *, read: bool) -> FileStatus:
    path = _inside(folder, file.name)
    state, size, detail = _inspect(path, file, read=read)
    return FileStatus(source.name, file.name, path, state, size, file.size, detail)


def _inspect(path: Path, file: DataFile, *, read: bool) -> tuple[State, int | None, str]:
    """State, size and an explanation of one file on disk."""
    if not path.is_file():
        return "missing", None, ""
    size = path.stat().st_size
    if file.size is not None and size != file.size:
        return "corrupt", size, f"{size} bytes, expected {file.size}"
    if not read:
        return "present", size, ""
    known = checksum(file)
    if known is None:
        return "unknown", size, f"no checksum recorded; sha256 is {file_digest(path)}"
    algorithm, expected = known
    digest = file_digest(path, algorithm)
    if digest != expected:
        return "corrupt", size, f"{algorithm} is {digest}, expected {expected}"
    return "ok", size, ""


def print_statuses(folder_name: str, statuses: Sequence[FileStatus]) -> None:
    """Print files and their states as a table."""
    from rich.console import Console
    from rich.filesize import decimal
    from rich.markup import escape
    from rich.table import Table

    colors = {"ok": "green", "present": "green", "missing": "yellow", "unknown": "yellow", "corrupt": "red"}
    table = Table(title=f"{folder_name}: {data_folder(folder_name)}", title_justify="left")
    table.add_column("file", overflow="fold")
    table.add_column("state", overflow="fold")
    table.add_column("size", justify="right", no_wrap=True)
    source = None
    for status in statuses:
        if status.source != source:
            source = status.source
            table.add_section()
            table.add_row(f"[bold]{escape(source)}[/]")
        size = status.size if status.size is not None else status.expected_size
        detail = f": {escape(status.detail)}" if status.detail else ""
        state = f"[{colors[status.state]}]{status.state}[/]{detail}"
        table.add_row(escape(status.name), state, "" if size is None else decimal(size))
    Console().print(table)


# -------------------------------------------------------------------------------------------------- how it gets there


def fetch(
    folder_name: str,
    sources: Iterable[DataSource],
    *,
    only: Sequence[str] | None = None,
    convert: Converter | None = None,
    progress: bool = True,
    retry_delay: float = 1.0,
) -> list[Path]:
    """Download the official files that are not there yet, check them, convert them, and return their paths.

    `only` names the files to take, by default all. `convert(raw_folder, target_folder)`, where the paper has one, reads
    the official files and writes the layout that the paper reads; its output joins the official files when it is
    complete, and it runs again only when they changed.
    Files of an open source are downloaded before a gated source is complained about. A failed try is repeated
    `RETRIES` times, after `retry_delay` seconds and then twice as long each time. `UserError` says what to do about a
    gate, no connection, an address that is gone, a wrong checksum, a full disk or an unwritable folder.
    """
    folder = data_folder(folder_name)
    paths: list[Path] = []
    closed: list[tuple[DataSource, Path, str]] = []
    for source, file in _chosen(folder_name, sources, only):
        path = _inside(folder, file.name)
        paths.append(path)
        # Reading gigabytes is of use only where there is a checksum to hold them against.
        state, _, detail = _inspect(path, file, read=checksum(file) is not None)
        if state in ("ok", "present"):
            continue
        if source.gate or not file.url:
            closed.append((source, path, detail or "missing"))
        else:
            _download(path, file, source, progress=progress, retry_delay=retry_delay)
    if closed:
        raise UserError(_gate_message(folder_name, closed))
    if convert is not None and paths:
        _convert(folder, paths, convert)
    return paths


def _chosen(
    folder_name: str, sources: Iterable[DataSource], only: Sequence[str] | None
) -> list[tuple[DataSource, DataFile]]:
    """The files of all sources, or those named in `only`, each with its source."""
    files = {file.name: (source, file) for source in sources for file in source.files}
    for name in only or ():
        if name not in files:
            close = difflib.get_close_matches(name, files, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise UserError(f"{folder_name!r} has no file {name!r}{hint}; there are: {', '.join(files) or 'none'}")
    return [files[name] for name in (only or files)]


def _gate_message(folder_name: str, closed: Sequence[tuple[DataSource, Path, str]]) -> str:
    lines = [f"some files of {folder_name!r} cannot be downloaded without you:"]
    # Several files share a source, which should say its piece once.
    for source in {source.name: source for source, _, _ in closed}.values():
        lines.append(f"  {source.name} ({source.url}): {source.gate or 'get the files there'}")
    lines.append("Put the files here, then run the command again:")
    lines += [f"  {path} ({state})" for _, path, state in closed]
    return "\n".join(lines)


def _convert(folder: Path, paths: Sequence[Path], convert: Converter) -> None:
    digest = dataset_digest(paths)
    record = folder / CONVERTED
    if record.is_file() and record.read_text(encoding="utf-8").strip() == digest:
        return
    with _disk_errors(folder), tempfile.TemporaryDirectory(prefix=".converting-", dir=folder) as temporary:
        target = Path(temporary)
        convert(folder, target)
        for file in sorted(file for file in target.rglob("*") if file.is_file()):
            destination = folder / file.relative_to(target)
            destination.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, destination)
        write_text(record, digest + "\n")


def _download(path: Path, file: DataFile, source: DataSource, *, progress: bool, retry_delay: float) -> None:
    import pooch

    with _disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        _require_space(path, file)
        # A file that is there but wrong is replaced only once the right one has arrived: pooch renames it into place.
        downloader = _ResumingDownloader(path, file, source, progress=progress, retry_delay=retry_delay)
        known = checksum(file)
        known_hash = ":".join(known) if known else None
        if known_hash is None:
            path.unlink(missing_ok=True)
        logger = pooch.get_logger()
        level = logger.level
        logger.setLevel("WARNING")
        try:
            pooch.retrieve(file.url, known_hash, fname=path.name, path=path.parent, downloader=downloader)
        except ValueError as error:  # pooch's only sign of a wrong checksum
            raise UserError(
                f"{file.url} arrived whole, but its checksum is not the one recorded in paper.yaml:\n  {error}\n"
                f"Nothing was kept. Run the command again; if it fails the same way, the file has changed at "
                f"{source.url or 'its source'}: check it there before you change the checksum in paper.yaml."
            ) from None
        finally:
            logger.setLevel(level)
        state, _, detail = _inspect(path, file, read=False)
        if state == "corrupt":
            path.unlink()
            raise UserError(
                f"{file.url} arrived with another size than paper.yaml records: {detail}. Nothing was kept. "
                f"Check the file at {source.url or 'its source'} before you change size in paper.yaml."
            )


def _require_space(path: Path, file: DataFile) -> None:
    part = _part_path(path)
    needed = (file.size or 0) - (part.stat().st_size if part.exists() else 0)
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"{path.name} needs {needed / 1e9:.2f} GB more, {free / 1e9:.2f} GB are free")


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Turn a full disk and an unwritable folder into messages that say what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = f"the disk that holds {folder} is full: {error.strerror}"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            reason = f"{error.filename or folder} cannot be written: {error.strerror}"
        else:
            raise
        raise UserError(
            f"{reason}. Make room or mend the permissions, or point REPRISE_DATA to another place; "
            "then run the command again, it continues where it stopped."
        ) from None


def _part_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


class _TransientError(Exception):
    """A failure that another try may get past."""


class _ResumingDownloader:
    """A pooch downloader that keeps what it has got in a part file and asks only for the rest (HTTP Range).

    That the file at the source has not changed meanwhile is told by the server, which is sent the validator (an ETag or
    a date) that it gave with the first bytes and answers with the whole file if it no longer fits (If-Range). Where it
    gave none, a part of an earlier call is continued only if a checksum will tell.
    """

    def __init__(self, path: Path, file: DataFile, source: DataSource, *, progress: bool, retry_delay: float) -> None:
        self.path, self.file, self.source = path, file, source
        self.progress, self.retry_delay = progress, retry_delay
        self.part = _part_path(path)
        self.validator_file = self.part.with_suffix(".validator")

    def __call__(self, url: str, output_file: str, pooch: Any) -> None:
        with open(self.part, "ab") as part:
            try:
                fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{self.path} is being downloaded by another process: wait for it to end") from None
            if checksum(self.file) is None and not self._validator():
                part.truncate(0)
            self._fill(url, part)
            part.flush()
            os.fsync(part.fileno())
            # Renamed while the lock is held, so that no second process takes the finished part for a beginning.
            os.replace(self.part, output_file)
            self.validator_file.unlink(missing_ok=True)

    def _validator(self) -> str:
        return self.validator_file.read_text(encoding="utf-8") if self.validator_file.is_file() else ""

    def _fill(self, url: str, part: IO[bytes]) -> None:
        for attempt in range(RETRIES + 1):
            try:
                self._receive(url, part)
                return
            except _TransientError as error:
                if attempt == RETRIES:
                    raise UserError(self._unreachable(url, str(error), part)) from None
            time.sleep(self.retry_delay * 2**attempt)

    def _receive(self, url: str, part: IO[bytes]) -> None:
        """Append to `part` what is still missing; raises `_TransientError` when the connection fails or ends early."""
        import requests
        from requests.exceptions import InvalidSchema, InvalidURL, MissingSchema

        offset = part.seek(0, os.SEEK_END)
        headers = {"Accept-Encoding": "identity", "User-Agent": "reprise"}
        if offset:
            headers["Range"] = f"bytes={offset}-"
            if validator := self._validator():
                headers["If-Range"] = validator
        try:
            with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT_SECONDS) as response:
                if response.status_code == 416:
                    part.truncate(0)
                    raise _TransientError("the server has no more bytes than were kept from an earlier try")
                if response.status_code in RETRIED_STATUS:
                    raise _TransientError(f"the server answered {response.status_code} {response.reason}")
                if response.status_code not in (200, 206):
                    raise UserError(self._refused(url, response))
                if response.status_code == 200 and offset:  # no Range support, or the file has changed
                    part.truncate(0)
                    offset = 0
                if not offset:
                    # If-Range takes no weak ETag.
                    etag = response.headers.get("ETag", "")
                    strong = etag if etag.startswith('"') else response.headers.get("Last-Modified", "")
                    write_text(self.validator_file, strong)
                length = response.headers.get("Content-Length")
                total = offset + int(length) if length else self.file.size
                with _progress_bar(self.path.name, offset, total, shown=self.progress) as advance:
                    for chunk in response.iter_content(CHUNK_BYTES):
                        part.write(chunk)
                        advance(len(chunk))
        except (InvalidURL, InvalidSchema, MissingSchema) as error:
            raise UserError(f"{url!r} in paper.yaml is not a web address: {error}") from None
        except requests.RequestException as error:
            raise _TransientError(str(error)) from None
        received = part.seek(0, os.SEEK_END)
        if length and received < total:
            raise _TransientError(f"the connection ended after {received} of {total} bytes")

    def _unreachable(self, url: str, reason: str, part: IO[bytes]) -> str:
        kept = part.seek(0, os.SEEK_END)
        again = "run the command again"
        if kept and (checksum(self.file) or self._validator()):
            again += f" (the {kept} bytes that arrived are kept, it continues from there)"
        return (
            f"{url} could not be downloaded, after {RETRIES + 1} tries: {reason}\n"
            f"Check the network connection and {again}; "
            f"or download the file on another machine and put it at {self.path}"
        )

    def _refused(self, url: str, response: requests.Response) -> str:
        return (
            f"{url}: the server answered {response.status_code} {response.reason}. The official address may have "
            f"moved or asks for a login: look at {self.source.url or 'its source'}, and either mend the url in "
            f"paper.yaml or put the file at {self.path}"
        )


@contextmanager
def _progress_bar(name: str, completed: int, total: int | None, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """A download bar on standard error, with amount, speed and time left; yields the function that moves it on."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), disable=not shown) as progress:
        task = progress.add_task(name, completed=completed, total=total)
        yield lambda amount: progress.advance(task, amount)
