"""Listing, fetching and verifying the official files of papers, from a server on this machine."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.data import fetch_paper, print_listing, verify_paper
from shared.config import UserError

CONTENT = b"0.5 0.25\n" * 100
LEDGER: dict[str, Any] = {
    "title": "A paper",
    "authors": ["A. Author"],
    "year": 2023,
    "venue": None,
    "arxiv": None,
    "code": None,
    "keywords": [],
    "data": [],
    "claims": [
        {
            "id": "C1",
            "statement": "It works",
            "place": "abstract",
            "figures": "none",
            "mark": "read",
            "untested": "not here",
        }
    ],
}


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """A server that holds the file `waves.txt`."""
    served = tmp_path / "served"
    served.mkdir()
    (served / "waves.txt").write_bytes(CONTENT)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=served))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def root(tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with a paper that has an official file, and one that has none."""
    monkeypatch.setenv("REPRISE_DATA", str(tmp_path / "real"))
    root = tmp_path / "repository"
    checksum = hashlib.sha256(CONTENT).hexdigest()
    files = [{"name": "waves.txt", "url": f"{address}/waves.txt", "sha256": checksum, "size": len(CONTENT)}]
    source = {"name": "Waves", "url": address, "licence": "CC0", "files": files}
    for name, sources in {"waves": [source], "embedded": []}.items():
        folder = root / "papers" / name
        folder.mkdir(parents=True)
        (folder / "paper.yaml").write_text(yaml.safe_dump(LEDGER | {"data": sources}))
    (root / "pyproject.toml").touch()
    return root


def test_listing_names_what_is_missing_and_what_cannot_be_read(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = root / "papers" / "broken"
    broken.mkdir()
    (broken / "paper.yaml").write_text("title: [unclosed\n")
    print_listing(root)
    output = capsys.readouterr().out
    assert "embedded: no official files; it runs on embedded data" in output
    assert f"broken: {broken / 'paper.yaml'} is not valid YAML" in output
    line = next(line for line in output.splitlines() if "waves.txt" in line)
    assert "missing" in line


def test_fetched_files_are_whole_and_verified(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = root / "papers" / "waves"
    assert verify_paper(folder) == 1
    (path,) = fetch_paper(folder)
    assert path.read_bytes() == CONTENT
    assert f"1 file(s) in {path.parent}" in capsys.readouterr().out
    assert verify_paper(folder) == 0
    path.write_bytes(CONTENT[:-1] + b"!")
    assert verify_paper(folder) == 1
    assert "corrupt" in capsys.readouterr().out


def test_a_paper_converts_its_files(root: Path) -> None:
    folder = root / "papers" / "waves"
    converter = "def convert(raw, out):\n    (out / 'first.txt').write_text((raw / 'waves.txt').read_text()[:3])\n"
    (folder / "data.py").write_text(converter)
    (folder / "params.yaml").write_text("profile: small\nsmall: {}\n")
    program = (
        "import sys; from pathlib import Path; from pipelines.data import fetch_paper; fetch_paper(Path(sys.argv[1]))"
    )
    # In a process of its own, since `papers` is imported from another place in this one.
    subprocess.run([sys.executable, "-P", "-c", program, str(folder)], check=True, cwd=root)
    assert list((root.parent / "real" / "waves").rglob("first.txt"))


def test_only_known_files_are_fetched(root: Path) -> None:
    with pytest.raises(UserError, match=r"'waves' has no file 'wave.txt' \(did you mean .*waves.txt.*\)"):
        fetch_paper(root / "papers" / "waves", ["wave.txt"])
    assert [path.name for path in fetch_paper(root / "papers" / "waves", ["waves.txt"])] == ["waves.txt"]


def test_nothing_to_fetch(root: Path) -> None:
    with pytest.raises(UserError, match="embedded lists no files to download"):
        fetch_paper(root / "papers" / "embedded")
    assert verify_paper(root / "papers" / "embedded") == 0


def test_a_wrong_checksum_keeps_nothing(root: Path) -> None:
    path = root / "papers" / "waves" / "paper.yaml"
    ledger = yaml.safe_load(path.read_text())
    ledger["data"][0]["files"][0]["sha256"] = "0" * 64
    path.write_text(yaml.safe_dump(ledger))
    with pytest.raises(UserError, match="its checksum is not the one recorded"):
        fetch_paper(path.parent)
    assert not (root.parent / "real" / "waves" / "waves.txt").exists()
