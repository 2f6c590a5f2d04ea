"""The real data of papers: what is there, fetching it, checking it."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

from pipelines.papers import find_papers, load_paper
from pipelines.runner import import_paper
from shared.config import UserError
from shared.data import fetch, listing, print_statuses, verify


def print_listing(root: Path) -> None:
    """Print, for every paper, its official files and which of them are here; a paper that cannot be read is named."""
    for folder in find_papers(root):
        try:
            statuses = listing(folder.name, load_paper(folder).data)
        except UserError as error:
            print(f"{folder.name}: {error}")
            continue
        if statuses:
            print_statuses(folder.name, statuses)
        else:
            print(f"{folder.name}: no official files; it runs on embedded data")


def fetch_paper(folder: Path, only: Sequence[str] | None = None) -> list[Path]:
    """Download a paper's official files (those named in `only`, by default all) and convert them where it says how."""
    sources = load_paper(folder).data
    if not any(source.files for source in sources):
        raise UserError(f"{folder.name} lists no files to download in its paper.yaml: it runs on embedded data")
    convert = None
    if (folder / "data.py").is_file():
        convert = getattr(importlib.import_module(f"{import_paper(folder)}.data"), "convert", None)
    paths = fetch(folder.name, sources, only=only, convert=convert)
    print(f"{len(paths)} file(s) in {paths[0].parent}")
    return paths


def verify_paper(folder: Path) -> int:
    """Check a paper's files against their checksums and print the states; returns 1 if one is missing or corrupt."""
    statuses = verify(folder.name, load_paper(folder).data)
    print_statuses(folder.name, statuses)
    return int(any(status.state in ("missing", "corrupt") for status in statuses))
