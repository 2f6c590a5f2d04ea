"""The controls."""

from __future__ import annotations

import numpy as np
import pytest

from shared.config import UserError

from ..baselines import CONTROLS, fit_predict
from ..data import Puzzles


def puzzles() -> Puzzles:
    """Two training sets of 12, 8 puzzles for evaluation: bright ones have the label 1, and so have nested ones."""
    generator = np.random.default_rng(0)
    label = np.concatenate([[0] * 7 + [1] * 5, [1] * 9 + [0] * 3, [0, 1] * 4]).astype(np.uint8)
    images = np.clip(generator.normal(100 + 80 * label[:, None, None], 10, size=(32, 16, 16)), 0, 255)
    return Puzzles(images.astype(np.float16), label, 3 * label, 2, 12, "generated", "")


def test_the_majority_is_that_of_the_training_set() -> None:
    assert not fit_predict("majority", puzzles(), 0).any()
    assert fit_predict("majority", puzzles(), 1).all()


@pytest.mark.parametrize("name", ["layout", "linear"])
def test_controls_find_what_they_can_see(name: str) -> None:
    known = puzzles()
    assert (fit_predict(name, known, 0) == known.label[known.evaluation]).all()


def test_a_layout_that_was_never_seen_gets_the_majority() -> None:
    known = puzzles()
    known.layout[known.evaluation] = 2
    assert not fit_predict("layout", known, 0).any()
    assert fit_predict("layout", known, 1).all()


def test_a_training_set_of_one_kind() -> None:
    known = puzzles()
    known.label[known.training_set(0)] = 1
    assert fit_predict("linear", known, 0).all()


def test_an_unknown_control() -> None:
    with pytest.raises(UserError, match=f"choose one of {', '.join(CONTROLS)}"):
        fit_predict("persistence", puzzles(), 0)
