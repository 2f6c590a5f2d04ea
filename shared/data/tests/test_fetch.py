"""Downloads from a server on this machine that cuts connections, lies, refuses and moves files away."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from shared.config import UserError
from shared.data import data_folder, dataset_digest, fetch, file_digest, listing, locate, print_statuses, verify
from shared.data.fetch import CHUNK_BYTES, RETRIES

CONTENT = np.random.default_rng(0).bytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@dataclass(frozen=True)
class File:
    name: str
    url: str | None = None
    sha256: str | None = None
    size: int | None = None
    md5: str | None = None


@dataclass(frozen=True)
class Source:
    name: str
    files: list[File]
    url: str | None = "https://example.org/data"
    gate: str | None = None


@dataclass
class Server:
    """What the server does, and what it was asked."""

    url: str = ""
    cuts: list[int] = field(default_factory=list)  # for each coming answer: how many bytes it sends before it hangs up
    supports_range: bool = True
    etag: str = '"v1"'
    statuses: list[int] = field(default_factory=list)  # answered before any content
    ranges: list[str | None] = field(default_factory=list)


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requested = self.headers.get("Range")
            state.ranges.append(requested)
            if self.path != "/data.bin" or state.statuses:
                self.send_error(state.statuses.pop(0) if state.statuses else 404)
                return
            whole = not requested or not state.supports_range or self.headers.get("If-Range", state.etag) != state.etag
            start = 0 if whole else int(requested.removeprefix("bytes=").removesuffix("-"))
            if start >= len(CONTENT):
                self.send_error(416)
                return
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(CONTENT) - start))
            self.send_header("ETag", state.etag)
            self.end_headers()
            self.wfile.write(CONTENT[start : start + state.cuts.pop(0)] if state.cuts else CONTENT[start:])

        def log_message(self, *arguments: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
    state.url = f"http://127.0.0.1:{http.server_port}/data.bin"
    yield state
    http.shutdown()
    http.server_close()


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REPRISE_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return tmp_path / "data"


def get(*sources: Source) -> list[Path]:
    return fetch("mine", sources, progress=False, retry_delay=0)


def source(server: Server, sha256: str | None = SHA256, size: int | None = len(CONTENT)) -> Source:
    return Source("set", [File("raw/data.bin", server.url, sha256, size)])


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_downloads_once(server: Server, root: Path) -> None:
    assert get(source(server)) == [root / "mine/raw/data.bin"]
    assert (root / "mine/raw/data.bin").read_bytes() == CONTENT
    get(source(server))
    assert server.ranges == [None]
    assert files_in(root) == ["data.bin"]


def test_cut_connection_continues_where_it_was_cut(server: Server, root: Path) -> None:
    server.cuts = [CHUNK_BYTES + 10_000, 2 * CHUNK_BYTES + 10_000]
    get(source(server))
    assert (root / "mine/raw/data.bin").read_bytes() == CONTENT
    assert server.ranges == [None, f"bytes={CHUNK_BYTES}-", f"bytes={3 * CHUNK_BYTES}-"]


def test_next_call_continues_what_this_one_could_not_finish(server: Server, root: Path) -> None:
    server.cuts = [CHUNK_BYTES] + [0] * RETRIES
    with pytest.raises(UserError, match=f"{CHUNK_BYTES} bytes that arrived are kept"):
        get(source(server))
    assert listing("mine", [source(server)])[0].state == "missing"
    server.ranges.clear()
    get(source(server))
    assert (root / "mine/raw/data.bin").read_bytes() == CONTENT
    assert server.ranges == [f"bytes={CHUNK_BYTES}-"]


def test_without_checksum_a_part_of_unknown_origin_is_dropped(server: Server, root: Path) -> None:
    (root / "mine/raw").mkdir(parents=True)
    (root / "mine/raw/.data.bin.part").write_bytes(b"of another version")
    get(source(server, sha256=None))
    assert (root / "mine/raw/data.bin").read_bytes() == CONTENT
    assert server.ranges == [None]


@pytest.mark.parametrize("etag", ['"v1"', '"v2"', 'W/"weak"'])
def test_without_checksum_the_server_tells_whether_the_file_has_changed(server: Server, root: Path, etag: str) -> None:
    if etag.startswith("W"):
        server.etag = etag
    server.cuts = [CHUNK_BYTES] + [0] * RETRIES
    with pytest.raises(UserError, match="could not be downloaded"):
        get(source(server, sha256=None))
    part = root / "mine/raw/.data.bin.part"
    part.write_bytes(bytes(part.stat().st_size))  # so that it shows whether the part was kept
    server.etag = etag
    get(source(server, sha256=None))
    kept = (root / "mine/raw/data.bin").read_bytes() != CONTENT
    assert kept == (etag == '"v1"')
    assert files_in(root) == ["data.bin"]


def test_server_without_range_support_starts_again(server: Server, root: Path) -> None:
    server.supports_range, server.cuts = False, [100_000]
    get(source(server))
    assert (root / "mine/raw/data.bin").read_bytes() == CONTENT


def test_part_longer_than_the_file_starts_again(server: Server, root: Path) -> None:
    (root / "mine/raw").mkdir(parents=True)
    (root / "mine/raw/.data.bin.part").write_bytes(CONTENT + b"surplus")
    get(source(server))
    assert (root / "mine/raw/data.bin").read_bytes() == CONTENT


def test_busy_server_is_tried_again(server: Server) -> None:
    server.statuses = [503, 429]
    get(source(server))
    assert len(server.ranges) == 3


@pytest.mark.parametrize("earlier", [None, b"an earlier, wrong file"])
def test_wrong_checksum_keeps_nothing_new(server: Server, root: Path, earlier: bytes | None) -> None:
    if earlier:
        (root / "mine/raw").mkdir(parents=True)
        (root / "mine/raw/data.bin").write_bytes(earlier)
    with pytest.raises(UserError, match=r"checksum is not the one recorded(.|\n)*example\.org/data"):
        get(source(server, sha256="0" * 64))
    assert files_in(root) == (["data.bin"] if earlier else [])


def test_wrong_size_keeps_nothing(server: Server, root: Path) -> None:
    with pytest.raises(UserError, match="300000 bytes, expected 7"):
        get(source(server, sha256=None, size=7))
    assert files_in(root) == []


def test_corrupt_file_is_replaced(server: Server, root: Path) -> None:
    (root / "mine/raw").mkdir(parents=True)
    (root / "mine/raw/data.bin").write_bytes(bytes(len(CONTENT)))
    get(source(server))
    assert file_digest(root / "mine/raw/data.bin") == SHA256


def test_missing_page_says_where_to_look(server: Server, root: Path) -> None:
    with pytest.raises(UserError, match=r"answered 404(.|\n)*example\.org/data(.|\n)*put the file at .*raw/data\.bin"):
        get(Source("set", [File("raw/data.bin", server.url + ".old", SHA256)]))
    assert len(server.ranges) == 1, "a missing page is not worth another try"


def test_refused_connection_says_what_to_do() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/data.bin"
        with pytest.raises(UserError, match=r"Check the network connection(.|\n)*put it at .*data\.bin"):
            get(Source("set", [File("data.bin", url, SHA256)]))


@pytest.mark.parametrize("url", ["data.bin", "gopher://example.org/data.bin"])
def test_impossible_address(url: str) -> None:
    with pytest.raises(UserError, match="not a web address"):
        get(Source("set", [File("data.bin", url, SHA256)]))


def test_gated_source_after_the_open_ones(server: Server, root: Path) -> None:
    gated = Source("closed set", [File("closed.bin", None, SHA256)], gate="apply at the institute's page")
    with pytest.raises(UserError, match=r"apply at the institute's page(.|\n)*mine/closed\.bin"):
        get(gated, source(server))
    assert (root / "mine/raw/data.bin").exists()
    (root / "mine/closed.bin").write_bytes(CONTENT)
    assert get(gated, source(server)) == [root / "mine/closed.bin", root / "mine/raw/data.bin"]


def test_only_some_files(server: Server, root: Path) -> None:
    both = Source("set", [File("data.bin", server.url, SHA256), File("other.bin", server.url, SHA256)])
    assert fetch("mine", [both], only=["other.bin"], progress=False) == [root / "mine/other.bin"]
    assert files_in(root) == ["other.bin"]
    with pytest.raises(UserError, match=r"no file 'othr.bin' \(did you mean 'other.bin'\?\); there are: data.bin"):
        fetch("mine", [both], only=["othr.bin"], progress=False)


def test_full_disk_and_unwritable_folder(server: Server, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"disk that holds .* is full(.|\n)*REPRISE_DATA"):
        get(source(server, size=10**18))
    (root / "mine").rename(root / "aside")
    (root / "mine").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="cannot be written"):
        get(source(server))
    (root / "mine").unlink()

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="is full"):
        get(source(server))
    assert not (root / "mine/raw/data.bin").exists()


def test_two_processes_do_not_write_one_part(server: Server, root: Path) -> None:
    (root / "mine/raw").mkdir(parents=True)
    with open(root / "mine/raw/.data.bin.part", "ab") as part:
        fcntl.flock(part, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="by another process"):
            get(source(server))
    get(source(server))


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b", "", "."])
def test_names_stay_inside(name: str) -> None:
    with pytest.raises(UserError, match="relative path"):
        get(Source("set", [File(name, "http://127.0.0.1:9/x")]))
    with pytest.raises(UserError, match="relative path"):
        locate("mine", name)


def test_locate(root: Path) -> None:
    with pytest.raises(UserError, match=r"reprise data fetch mine(.|\n)*REPRISE_DATA"):
        locate("mine", "data.bin")
    (root / "mine").mkdir(parents=True)
    (root / "mine/data.bin").touch()
    assert locate("mine", "data.bin") == data_folder("mine") / "data.bin"


def test_conversion_is_whole_and_done_once(server: Server, root: Path) -> None:
    calls = []

    def convert(raw: Path, target: Path) -> None:
        calls.append(raw)
        (target / "tables").mkdir()
        (target / "tables/half.npy").write_bytes((raw / "raw/data.bin").read_bytes()[:10])
        if len(calls) == 1:
            raise UserError("the official file is not what it was")

    for expected in ("fails", "converts", "is up to date"):
        if expected == "fails":
            with pytest.raises(UserError, match="not what it was"):
                fetch("mine", [source(server)], convert=convert, progress=False)
            assert files_in(root) == ["data.bin"]
        else:
            fetch("mine", [source(server)], convert=convert, progress=False)
            assert (root / "mine/tables/half.npy").read_bytes() == CONTENT[:10]
    assert len(calls) == 2


def test_verify_tells_the_four_states_apart(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "mine").mkdir(parents=True)
    for name in ("right", "wrong", "short", "unrecorded"):
        (root / "mine" / name).write_bytes(CONTENT)
    sources = [
        Source("first", [File("right", sha256=SHA256.upper()), File("wrong", sha256="1" * 64)]),
        Source("second", [File("short", size=7), File("unrecorded"), File("absent", sha256=SHA256, size=3)]),
    ]
    assert [status.state for status in verify("mine", sources)] == ["ok", "corrupt", "corrupt", "unknown", "missing"]
    quick = listing("mine", sources)
    assert [status.state for status in quick] == ["present", "present", "corrupt", "present", "missing"]
    assert (quick[-1].source, quick[-1].size, quick[-1].expected_size) == ("second", None, 3)
    assert SHA256 in verify("mine", sources)[3].detail
    print_statuses("mine", quick)
    assert "absent" in capsys.readouterr().out


def test_dataset_digest(tmp_path: Path) -> None:
    def folder(name: str, **contents: str) -> Path:
        for file, content in contents.items():
            (tmp_path / name / "sub").mkdir(parents=True, exist_ok=True)
            (tmp_path / name / "sub" / file).write_text(content)
        return tmp_path / name

    one, other = folder("one", a="1", b="2"), folder("other", b="2", a="1")
    assert dataset_digest(one) == dataset_digest(other)
    (other / "sub/.a.part").write_text("unfinished")
    assert dataset_digest(one) == dataset_digest(other)
    assert dataset_digest(one) != dataset_digest(folder("swapped", a="2", b="1"))
    files = [one / "sub/a", one / "sub/b"]
    assert dataset_digest(files) == dataset_digest(files[::-1]) != dataset_digest(files[:1])
    with pytest.raises(UserError, match="missing"):
        dataset_digest(tmp_path / "nowhere")
