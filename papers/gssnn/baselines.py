"""What networks are compared with besides the encoder alone: three controls that the paper lacks.

Each is fitted to one training set and asked about the puzzles for evaluation; none has a seed. The baseline of the
paper, the encoder with a logit, is `model.Baseline`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shared.config import UserError

from .data import LAYOUTS, Puzzles

CONTROLS = ("majority", "layout", "linear")
# The linear model sees this many cells a side, and picks its penalty among these by leaving one puzzle out.
LINEAR_GRID = 16
LINEAR_PENALTIES = (1.0, 10.0, 100.0, 1000.0, 10000.0)


def fit_predict(name: str, puzzles: Puzzles, training_set: int) -> NDArray[np.bool_]:
    """Answers of a control, fitted to one training set, to the puzzles for evaluation.

    `majority` answers what most training puzzles have; `layout` does so for each kind of panel apart, and knows nothing
    else of a puzzle; `linear` is a ridge classifier on the picture, averaged down to 16 × 16.
    """
    own, asked = puzzles.training_set(training_set), puzzles.evaluation
    label = puzzles.label[own] > 0
    if name == "majority":
        return np.full(len(puzzles.label[asked]), label.mean() > 0.5)
    if name == "layout":
        layout = puzzles.layout[own]
        # A layout that was never seen gets the majority.
        shares = [
            label[layout == kind].mean() if (layout == kind).any() else label.mean() for kind in range(len(LAYOUTS))
        ]
        return np.array(shares)[puzzles.layout[asked]] > 0.5
    if name == "linear":
        return _linear(_cells(puzzles)[own], label, _cells(puzzles)[asked])
    raise UserError(f"unknown control {name!r}; choose one of {', '.join(CONTROLS)}")


def _cells(puzzles: Puzzles) -> NDArray[np.float64]:
    """Pictures averaged down to at most `LINEAR_GRID` cells a side, one row a puzzle, from −1 to 1."""
    count, size, _ = puzzles.images.shape
    grid = min(LINEAR_GRID, size)
    blocks = puzzles.images.astype(np.float64).reshape(count, grid, size // grid, grid, size // grid)
    return blocks.mean(axis=(2, 4)).reshape(count, -1) / 127.5 - 1


def _linear(inputs: NDArray[np.float64], label: NDArray[np.bool_], asked: NDArray[np.float64]) -> NDArray[np.bool_]:
    from sklearn.linear_model import RidgeClassifierCV

    if label.all() or not label.any():
        return np.full(len(asked), label.all())
    return RidgeClassifierCV(LINEAR_PENALTIES).fit(inputs, label).predict(asked)
