from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shared.config import UserError
from shared.nn import Attention, rotary
from shared.nn.attention import split_heads


def attention_by_definition(layer: Attention, x: Tensor) -> Tensor:
    """Scores, mask, softmax and sum, with the whole matrix written out."""
    q, k, v = (split_heads(projection(x), layer.num_heads) for projection in (layer.query, layer.key, layer.value))
    q, k = rotary(q, 0, layer.rotary_base), rotary(k, 0, layer.rotary_base)
    scores = torch.einsum("bthk,bshk->bhts", q, k) / q.shape[-1] ** 0.5
    t = torch.arange(x.shape[1])
    distance = t[:, None] - t
    hidden = (distance < 0) | (distance >= (layer.window or x.shape[1]))
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return layer.output(torch.einsum("bhts,bshk->bthk", weights, v).flatten(2))


@pytest.mark.parametrize("window", [None, 1, 2, 3, 5, 12, 13, 100])
@pytest.mark.parametrize("pieces", [[13], [5, 8], [1] * 13, [2, 9, 1, 1]])
def test_is_masked_softmax_attention_and_continues(window: int | None, pieces: list[int]) -> None:
    layer, x = Attention(8, 2, window=window).double(), torch.randn(2, 13, 8, dtype=torch.float64)
    expected = attention_by_definition(layer, x)
    state, outputs = None, []
    for piece in x.split(pieces, dim=1):
        y, state = layer(piece, state, keep_state=True)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected, rtol=0, atol=1e-12)


def test_window_gradients_are_those_of_masked_attention() -> None:
    layer, x = Attention(8, 2, window=3).double(), torch.randn(2, 10, 8, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x)[0].square().sum(), x)
    (expected,) = torch.autograd.grad(attention_by_definition(layer, x).square().sum(), x)
    torch.testing.assert_close(gradient, expected)


def test_cache_keeps_no_more_than_the_window() -> None:
    layer, state = Attention(8, 2, window=4), None
    for step in range(1, 9):
        _, state = layer(torch.randn(1, 1, 8), state, keep_state=True)
        assert state["keys"].shape == state["values"].shape == (1, 2, min(step, 3), 4)
        assert state["position"] == step


def test_without_keep_state_there_is_none() -> None:
    assert Attention(8, 2)(torch.randn(1, 3, 8))[1] is None


def test_rotary_by_hand() -> None:
    # K = 2 turns by one radian a token.
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64).view(1, 2, 1, 2)
    expected = torch.tensor([[1.0, 0.0], [0.5403023058681398, 0.8414709848078965]], dtype=torch.float64)
    torch.testing.assert_close(rotary(x).view(2, 2), expected)


def test_rotary_products_depend_on_the_distance_only() -> None:
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)

    def product(query_position: int, key_position: int) -> Tensor:
        return (rotary(q, query_position) * rotary(k, key_position)).sum()

    torch.testing.assert_close(product(7, 3), product(1007, 1003), rtol=0, atol=1e-12)
    assert (product(7, 3) - product(7, 4)).abs() > 1e-3
    torch.testing.assert_close(rotary(q, 55).norm(), q.norm())


def test_rotary_keeps_half_precision() -> None:
    x = torch.randn(1, 3, 2, 4)
    half = rotary(x.bfloat16(), 1000)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), rotary(x, 1000), rtol=0.02, atol=0.02)


def test_clear_errors() -> None:
    with pytest.raises(UserError, match="10 and 3 heads"):
        Attention(10, 3)
    with pytest.raises(UserError, match="even"):
        Attention(6, 2)
    with pytest.raises(UserError, match="at least 1"):
        Attention(8, 2, window=0)
