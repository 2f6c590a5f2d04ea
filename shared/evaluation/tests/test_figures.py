from __future__ import annotations

from pathlib import Path

import matplotlib
import pytest

from shared.evaluation.figures import save_figures

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure


def line(values: list[float]) -> Figure:
    figure, axes = plt.subplots(figsize=(2, 2))
    axes.plot(values)
    return figure


def test_equal_figures_are_equal_files(tmp_path: Path) -> None:
    first, second = save_figures(tmp_path, {"first": line([1, 2]), "second": line([1, 2])})
    (other,) = save_figures(tmp_path, {"other": line([2, 1])})
    assert first == tmp_path / "first.png"
    assert first.read_bytes() == second.read_bytes() != other.read_bytes()
    assert not plt.get_fignums()


def test_a_figure_that_cannot_be_drawn_leaves_nothing(tmp_path: Path) -> None:
    figure = line([1, 2])
    figure.axes[0].set_title("$\\nosuchcommand$")
    with pytest.raises(ValueError, match="nosuchcommand"):
        save_figures(tmp_path, {"broken": figure})
    assert not list(tmp_path.iterdir())
    plt.close(figure)
