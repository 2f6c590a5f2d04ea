"""The untrained memory against what each rule does by hand."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from ..mechanism import (
    MechanismSettings,
    random_pairs,
    recall_error,
    recall_errors,
    write_additive,
    write_by_delta_rule,
    write_with_decay,
)

KEYS = torch.eye(4, dtype=torch.float64)[None, :3]
VALUES = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]]], dtype=torch.float64)
OTHERS = torch.tensor([[[0.0, 1.0], [5.0, 0.0], [0.0, 0.0]]], dtype=torch.float64)


def test_rules_by_hand() -> None:
    """Orthonormal keys, the first of which is bound anew."""
    again, other = KEYS[:, :1], OTHERS[:, :1]
    states = {
        "additive": write_additive(again, other, write_additive(KEYS, VALUES)),
        "decay": write_with_decay(again, other, write_with_decay(KEYS, VALUES, decay=0.5), decay=0.5),
        "one": write_by_delta_rule(again, other, write_by_delta_rule(KEYS, VALUES, beta=1.0), beta=1.0),
        "half": write_by_delta_rule(again, other, write_by_delta_rule(KEYS, VALUES, beta=0.5), beta=0.5),
    }
    expected = {
        "additive": [[1.0, 1.0], [0.0, 2.0], [3.0, 4.0]],
        "decay": [[0.125, 1.0], [0.0, 0.5], [1.5, 2.0]],
        "one": [[0.0, 1.0], [0.0, 2.0], [3.0, 4.0]],
        "half": [[0.25, 0.5], [0.0, 1.0], [1.5, 2.0]],
    }
    for rule, rows in expected.items():
        recalled = (KEYS @ states[rule])[0]
        torch.testing.assert_close(recalled, torch.tensor(rows, dtype=torch.float64), msg=rule)


def test_recall_error_is_relative() -> None:
    state = write_additive(KEYS, VALUES)
    torch.testing.assert_close(recall_error(state, KEYS, VALUES), torch.zeros(1, dtype=torch.float64))
    # Half of each value is missing.
    torch.testing.assert_close(recall_error(state / 2, KEYS, VALUES), torch.full((1,), 0.5, dtype=torch.float64))


@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_the_delta_rule_is_a_step_of_gradient_descent(beta: float) -> None:
    """Of size β on ½ ‖Sᵀk − v‖², with keys that are not orthogonal."""
    keys, values, _ = random_pairs(5, 3, seed=1)
    state = torch.zeros(3, 3, dtype=torch.float64)
    for key, value in zip(keys, values, strict=True):
        state.requires_grad_()
        loss = 0.5 * (state.T @ key - value).square().sum()
        state = (state - beta * torch.autograd.grad(loss, state)[0]).detach()
    torch.testing.assert_close(write_by_delta_rule(keys[None], values[None], beta=beta)[0], state)


def test_random_pairs() -> None:
    keys, values, others = random_pairs(7, 5, seed=3)
    torch.testing.assert_close(keys.norm(dim=-1), torch.ones(7, dtype=torch.float64))
    assert not torch.allclose(values, others)
    assert torch.equal(random_pairs(7, 5, seed=3)[1], values)
    assert not torch.equal(random_pairs(7, 5, seed=4)[1], values)


def test_rows() -> None:
    settings = MechanismSettings(dimension=16, num_pairs=(2, 4), num_seeds=5)
    table = pd.DataFrame(recall_errors(settings))
    assert len(table) == 4 * 2 * 5 * 3
    assert set(table.dataset) == {"mechanism/bound", "mechanism/overwritten", "mechanism/other"}
    means = table.groupby(["dataset", "model"]).value.mean()
    # What was written last is there as it was written: the very last pair exactly, those before it nearly so.
    assert means["mechanism/overwritten", "delta_rule"] < 0.2
    # Additive rules return the sum of the old and the new value.
    assert means["mechanism/overwritten", "additive"] > 0.8
    assert means["mechanism/overwritten", "delta_rule_half"] > means["mechanism/overwritten", "delta_rule"]
