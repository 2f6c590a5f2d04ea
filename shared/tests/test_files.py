from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from shared.files import atomic_path, remove_unfinished, write_json, write_text


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "note.txt"
    write_text(path, "one")
    write_text(path, "two ν")
    assert path.read_text(encoding="utf-8") == "two ν"
    assert os.listdir(path.parent) == ["note.txt"]


def test_a_failed_write_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "note.txt"
    write_text(path, "one")

    def write_half_and_fail() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("hal")
            raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_half_and_fail()
    assert path.read_text() == "one"
    assert os.listdir(tmp_path) == ["note.txt"]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    kept = [tmp_path / ".gitignore", tmp_path / "deep" / "scores.csv"]
    for path in kept:
        write_text(path, "whole")
    writing = atomic_path(tmp_path / "deep" / "scores.csv")
    temporary = writing.__enter__()  # the process dies here
    assert temporary.exists()
    remove_unfinished(tmp_path)
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(kept)


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        write_text(tmp_path / "note.txt", "x")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "note.txt").stat().st_mode) == 0o640


def test_json_refuses_what_no_reader_would_take(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"β": 0.1})
    assert (tmp_path / "a.json").read_text() == '{\n  "β": 0.1\n}\n'
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "b.json", {"x": float("nan")})
