from __future__ import annotations

import math

import torch

from .. import delta_rule_step
from ..reference import delta_rule_reference
from .common import inputs


def test_two_tokens_by_hand() -> None:
    # One head, K = 2, V = 1. The first write meets S_0 = (1, 2), the second what the first one left.
    k = torch.tensor([[1.0, 0.0], [0.6, 0.8]], dtype=torch.float64).view(1, 2, 1, 2)
    q = torch.tensor([[1.0, 1.0], [0.0, 1.0]], dtype=torch.float64).view(1, 2, 1, 2)
    v = torch.tensor([3.0, 5.0], dtype=torch.float64).view(1, 2, 1, 1)
    beta = torch.tensor([0.5, 1.0], dtype=torch.float64).view(1, 2, 1)
    initial_state = torch.tensor([1.0, 2.0], dtype=torch.float64).view(1, 1, 2, 1)
    o, state = delta_rule_reference(q, k, v, beta, scale=10.0, initial_state=initial_state, output_final_state=True)
    # u_1 = (3 - 1) / 2 = 1 and S_1 = (2, 2); u_2 = 5 - (1.2 + 1.6) = 2.2 and S_2 = (2 + 1.32, 2 + 1.76).
    torch.testing.assert_close(o.flatten(), torch.tensor([40.0, 37.6], dtype=torch.float64))
    torch.testing.assert_close(state.flatten(), torch.tensor([3.32, 3.76], dtype=torch.float64))


def test_a_step_multiplies_the_state_by_a_householder_like_matrix() -> None:
    values = inputs(batch=1, length=1, heads=1)
    _, state = delta_rule_reference(**values, output_final_state=True)
    k, v, beta = values["k"].flatten(), values["v"].flatten(), values["beta"].item()
    transition = torch.eye(5, dtype=torch.float64) - beta * torch.outer(k, k)
    expected = transition @ values["initial_state"][0, 0] + beta * torch.outer(k, v)
    torch.testing.assert_close(state[0, 0], expected)
    eigenvalues = torch.linalg.eigvalsh(transition).sort().values
    torch.testing.assert_close(eigenvalues, torch.tensor([1 - beta, 1, 1, 1, 1], dtype=torch.float64).sort().values)


def test_a_step_is_one_of_gradient_descent_on_the_recall_error() -> None:
    values = inputs(batch=1, length=1, heads=1)
    state = values["initial_state"][0, 0].clone().requires_grad_()
    error = state.T @ values["k"].flatten() - values["v"].flatten()
    (gradient,) = torch.autograd.grad(0.5 * error.square().sum(), state)
    _, after = delta_rule_reference(**values, output_final_state=True)
    torch.testing.assert_close(after[0, 0], (state - values["beta"] * gradient)[0].detach())


def test_default_scale_and_no_initial_state() -> None:
    values = inputs()
    values["initial_state"] = torch.zeros_like(values["initial_state"])
    expected, _ = delta_rule_reference(**values, scale=1 / math.sqrt(5))
    values.pop("initial_state")
    o, state = delta_rule_reference(**values)
    torch.testing.assert_close(o, expected)
    assert state is None


def test_decoding_steps_are_the_recurrence() -> None:
    values = inputs(dtype=torch.bfloat16)
    state = values.pop("initial_state").float()
    expected, final_state = delta_rule_reference(**values, initial_state=state, output_final_state=True)
    for t, token in enumerate(zip(*(x.unbind(1) for x in values.values()), strict=True)):
        o, state = delta_rule_step(*token, state=state)
        assert o.dtype == torch.bfloat16
        assert torch.equal(o, expected[:, t])
    assert torch.equal(state, final_state)


def test_its_gradient_is_that_of_finite_differences() -> None:
    values = inputs(batch=1, length=3, heads=2, key_dim=2, value_dim=2)
    leaves = [x.requires_grad_() for x in values.values()]

    def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return delta_rule_reference(*tensors[:4], initial_state=tensors[4], output_final_state=True)

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)
