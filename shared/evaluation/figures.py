"""Figures of results as files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from shared.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save_figures(directory: Path, figures: Mapping[str, Figure], *, dpi: int = 110) -> list[Path]:
    """Write each figure to `<directory>/<name>.png`, whole or not at all, and close it; returns the files."""
    from matplotlib import pyplot as plt

    paths = []
    for name, figure in figures.items():
        path = directory / f"{name}.png"
        with atomic_path(path) as temporary:
            # No software version inside, so that equal runs give equal files.
            figure.savefig(temporary, dpi=dpi, bbox_inches="tight", metadata={"Software": None})
        plt.close(figure)
        paths.append(path)
    return paths
