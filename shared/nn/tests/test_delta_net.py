from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from shared.config import UserError
from shared.nn import DeltaNet
from shared.nn.attention import split_heads


def delta_net_by_definition(layer: DeltaNet, x: Tensor, feature_map: str, norm: str) -> Tensor:
    """The layer's equations, token by token."""
    phi = {"silu": functional.silu, "relu": torch.relu, "elu": lambda t: functional.elu(t) + 1}[feature_map]
    q, k, v = layer.query(x), layer.key(x), layer.value(x)
    if layer.convolution is not None:
        q, k, v = (
            functional.conv1d(functional.pad(t.mT, (conv.weight.shape[1] - 1, 0)), conv.weight[:, None], groups=16).mT
            for t, conv in zip((q, k, v), layer.convolution, strict=True)
        )
    q, k, v = split_heads(phi(q), 2), split_heads(phi(k), 2), split_heads(functional.silu(v), 2)
    order = 1 if norm == "l1" else 2
    q, k = (t / torch.linalg.vector_norm(t, order, dim=-1, keepdim=True) for t in (q, k))
    beta = torch.sigmoid(layer.beta(x)) * layer.largest_beta
    S, outputs = torch.zeros(len(x), 2, q.shape[-1], v.shape[-1], dtype=x.dtype), []
    for t in range(x.shape[1]):
        old = torch.einsum("bhkv,bhk->bhv", S, k[:, t])
        S = S + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * (v[:, t] - old))
        outputs.append(torch.einsum("bhkv,bhk->bhv", S, q[:, t]) / q.shape[-1] ** 0.5)
    o = torch.stack(outputs, dim=1)
    o = (o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(2)
    return layer.output(o if layer.output_gate is None else o * functional.silu(layer.output_gate(x)))


@pytest.mark.parametrize(
    ("feature_map", "norm", "short_convolution", "output_gate", "negative"),
    [
        ("silu", "l2", 4, False, False),
        ("silu", "l2", None, False, False),
        ("relu", "l2", 4, False, True),
        ("elu", "l2", None, True, False),
        ("elu", "l1", 3, False, False),
        ("silu", "l1", 4, True, True),
    ],
)
def test_is_its_equations(
    feature_map: str, norm: str, short_convolution: int | None, output_gate: bool, negative: bool
) -> None:
    layer = DeltaNet(
        16,
        2,
        feature_map=feature_map,
        norm=norm,
        short_convolution=short_convolution,
        output_gate=output_gate,
        allow_negative_eigenvalues=negative,
    ).double()
    # The norms' own epsilons are far below these inputs.
    x = 10 * torch.randn(2, 9, 16, dtype=torch.float64)
    expected = delta_net_by_definition(layer, x, feature_map, norm)
    torch.testing.assert_close(layer(x)[0], expected, rtol=0, atol=1e-6)


def test_expansion_sets_the_state() -> None:
    _, state = DeltaNet(16, 2, expand_key=0.5, expand_value=2.0)(torch.randn(3, 5, 16), keep_state=True)
    assert state["memory"].shape == (3, 2, 4, 16)
    assert [history.shape for history in state["convolution"]] == [(3, 8, 3), (3, 8, 3), (3, 32, 3)]


def test_negative_eigenvalues_double_beta() -> None:
    plain, negative = DeltaNet(8, 2), DeltaNet(8, 2, allow_negative_eigenvalues=True)
    negative.load_state_dict(plain.state_dict())
    x = torch.randn(1, 6, 8)
    for layer in (plain, negative):
        torch.nn.init.zeros_(layer.beta.weight)  # sigmoid = 1/2
    assert not torch.allclose(plain(x)[0], negative(x)[0])
    plain.beta.weight.data.fill_(1e6)
    x[..., 0] += 10 - x.sum(-1)  # and now sigmoid = 1
    torch.testing.assert_close(plain(x)[0], negative(x)[0])


def test_autocast() -> None:
    layer, x = DeltaNet(16, 2), torch.randn(2, 6, 16)
    for norm in ("l2", "l1"):
        layer.key_norm = norm
        exact, _ = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            y, _ = layer(x)
        assert (y.float() - exact).norm() < 0.05 * exact.norm()


def test_clear_errors() -> None:
    with pytest.raises(UserError, match="silu, relu or elu"):
        DeltaNet(8, 2, feature_map="identity")
    with pytest.raises(UserError, match="l2 or l1"):
        DeltaNet(8, 2, norm="l3")
    with pytest.raises(UserError, match="3 heads"):
        DeltaNet(8, 3)
