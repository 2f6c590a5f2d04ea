from __future__ import annotations

import math

import pytest
import torch

from ..reference import gla_reference
from .common import FORMS, inputs


def test_two_tokens_by_hand() -> None:
    # One head, K = 2, V = 1, gates exp(g) = (1/2, 1) and (1/4, 1/2).
    q = torch.tensor([[1.0, 0.0], [1.0, 2.0]], dtype=torch.float64).view(1, 2, 1, 2)
    k = torch.tensor([[1.0, 1.0], [2.0, 0.0]], dtype=torch.float64).view(1, 2, 1, 2)
    v = torch.tensor([3.0, 5.0], dtype=torch.float64).view(1, 2, 1, 1)
    g = torch.tensor([[0.5, 1.0], [0.25, 0.5]], dtype=torch.float64).log().view(1, 2, 1, 2)
    initial_state = torch.tensor([4.0, 8.0], dtype=torch.float64).view(1, 1, 2, 1)
    o, state = gla_reference(q, k, v, g, scale=1.0, initial_state=initial_state, output_final_state=True)
    # S_1 = (2 + 3, 8 + 3) = (5, 11) and S_2 = (5/4 + 10, 11/2) = (11.25, 5.5).
    torch.testing.assert_close(o.flatten(), torch.tensor([5.0, 11.25 + 11.0], dtype=torch.float64))
    torch.testing.assert_close(state.flatten(), torch.tensor([11.25, 5.5], dtype=torch.float64))


def test_without_a_gate_it_is_causal_attention_without_softmax() -> None:
    values = inputs("none")
    o, _ = gla_reference(values["q"], values["k"], values["v"])
    scores = torch.einsum("bthk,bshk->bhts", values["q"], values["k"]).tril() / math.sqrt(5)
    torch.testing.assert_close(o, torch.einsum("bhts,bshv->bthv", scores, values["v"]))


def test_a_constant_gate_is_retention() -> None:
    values = inputs("constant", length=6)
    o, _ = gla_reference(values["q"], values["k"], values["v"], values["g"])
    steps = torch.arange(6)[:, None] - torch.arange(6)
    decay = (values["g"].exp()[:, None, None] ** steps).tril()
    scores = torch.einsum("bthk,bshk->bhts", values["q"], values["k"]) * decay / math.sqrt(5)
    torch.testing.assert_close(o, torch.einsum("bhts,bshv->bthv", scores, values["v"]))


def test_a_closed_gate_forgets_all() -> None:
    values = inputs("vector")
    closed = torch.full_like(values["g"], -torch.inf)
    o, _ = gla_reference(**{**values, "g": closed})
    weight = (values["q"] * values["k"]).sum(-1, keepdim=True) / math.sqrt(5)
    torch.testing.assert_close(o, weight * values["v"])


@pytest.mark.parametrize("form", FORMS)
def test_its_gradient_is_that_of_finite_differences(form: str) -> None:
    values = inputs(form, batch=1, length=4, heads=2, key_dim=2, value_dim=2)
    names, leaves = zip(*((name, value.requires_grad_()) for name, value in values.items()), strict=True)

    def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return gla_reference(**dict(zip(names, tensors, strict=True)), output_final_state=True)

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)
