from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from shared.config import UserError
from shared.nn import GatedLinearAttention, LinearAttention, Retention, ShortConvolution, rotary
from shared.nn.attention import split_heads


def normalized(o: Tensor) -> Tensor:
    return o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def attention_matrix(q: Tensor, k: Tensor, log_gate: Tensor) -> Tensor:
    """The parallel form P_ts = K^(-1/2) Σ_k q_tk k_sk exp(b_tk - b_sk) for s ≤ t, b the cumulative log gate."""
    b = log_gate.cumsum(1)
    decay = torch.exp(b[:, :, None] - b[:, None])
    return torch.einsum("bthk,bshk,btshk->bhts", q, k, decay).tril() / q.shape[-1] ** 0.5


@pytest.mark.parametrize("gate", ["vector", "scalar", "constant", "none"])
def test_gated_linear_attention_is_its_parallel_form(gate: str) -> None:
    layer = GatedLinearAttention(16, 2, gate=gate, gate_low_rank=3).double()
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    q, k, v = (split_heads(projection(x), 2) for projection in (layer.query, layer.key, layer.value))
    assert (q.shape[-1], v.shape[-1]) == (4, 8)
    log_gate = torch.zeros_like(q)
    if gate == "vector":
        down, up = layer.gate
        log_gate = split_heads(functional.logsigmoid(x @ down.weight.T @ up.weight.T + up.bias) / 16, 2)
    elif gate == "scalar":
        log_gate = (functional.logsigmoid(layer.gate(x)) / 16)[..., None].expand_as(q)
    elif gate == "constant":
        log_gate = torch.tensor([1 - 2**-5, 1 - 2**-6]).double().log()[:, None].expand_as(q)
    o = normalized(torch.einsum("bhts,bshv->bthv", attention_matrix(q, k, log_gate), v)).flatten(2)
    expected = layer.output(o * functional.silu(layer.output_gate(x)))
    torch.testing.assert_close(layer(x)[0], expected, rtol=0, atol=1e-12)


def test_gates_begin_slow() -> None:
    layer = GatedLinearAttention(8, 2)
    nn.init.zeros_(layer.gate[1].bias)
    nn.init.zeros_(layer.gate[1].weight)
    torch.testing.assert_close(layer.log_gate(torch.randn(1, 3, 8)).exp(), torch.full((1, 3, 2, 2), 0.5 ** (1 / 16)))


def test_no_gate_is_linear_attention_with_normalized_heads() -> None:
    gated = GatedLinearAttention(12, 3, expand_key=1.0, gate="none", output_gate=False).double()
    plain = LinearAttention(12, 3).double()
    for name in ("query", "key", "value"):
        getattr(plain, name).weight.data = getattr(gated, name).weight.data
    plain.output.weight.data = torch.eye(12).double()
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    expected = gated.output(normalized(split_heads(plain(x)[0], 3)).flatten(2))
    torch.testing.assert_close(gated(x)[0], expected, rtol=0, atol=1e-12)


def test_short_convolution_stands_behind_the_projections() -> None:
    layer = GatedLinearAttention(8, 2, gate="none", short_convolution=3, output_gate=False).double()
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    padded = functional.pad(x, (0, 0, 2, 0))
    q, k, v = (
        functional.silu(sum(projection(padded)[:, j : j + 5] * conv.weight[:, j] for j in range(3)))
        for projection, conv in zip((layer.query, layer.key, layer.value), layer.convolution, strict=True)
    )
    q, k, v = (split_heads(t, 2) for t in (q, k, v))
    o = torch.einsum("bhts,bshv->bthv", attention_matrix(q, k, torch.zeros_like(q)), v)
    torch.testing.assert_close(layer(x)[0], layer.output(normalized(o).flatten(2)), rtol=0, atol=1e-12)


def test_retention_is_its_parallel_form() -> None:
    layer, x = Retention(8, 2).double(), torch.randn(2, 6, 8, dtype=torch.float64)
    q, k, v = (split_heads(projection(x), 2) for projection in (layer.query, layer.key, layer.value))
    assert v.shape[-1] == 8
    log_gate = torch.tensor([1 - 1 / 32, 1 - 1 / 64]).double().log()[:, None].expand_as(q)
    o = torch.einsum("bhts,bshv->bthv", attention_matrix(rotary(q), rotary(k), log_gate), v)
    expected = layer.output(normalized(o).flatten(2) * functional.silu(layer.output_gate(x)))
    torch.testing.assert_close(layer(x)[0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("feature_map", ["elu", "relu"])
def test_normalized_linear_attention_averages_its_values(feature_map: str) -> None:
    layer, x = LinearAttention(8, 2, feature_map=feature_map, normalize=True), torch.randn(2, 6, 8)
    phi = {"elu": lambda t: functional.elu(t) + 1, "relu": torch.relu}[feature_map]
    q, k, v = (split_heads(projection(x), 2) for projection in (layer.query, layer.key, layer.value))
    weights = torch.einsum("bthk,bshk->bhts", phi(q), phi(k)).tril()
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(2e-6)
    expected = layer.output(torch.einsum("bhts,bshv->bthv", weights, v).flatten(2))
    torch.testing.assert_close(layer(x)[0], expected)


def test_layer_has_about_four_times_the_square_of_its_width() -> None:
    layer = GatedLinearAttention(1024, 4)
    count = sum(parameter.numel() for parameter in layer.parameters())
    assert count == 4 * 1024**2 + 16 * (1024 + 512) + 512 + 256


def test_short_convolution_module_begins_uniform() -> None:
    module = ShortConvolution(500, 4, bias=True)
    assert module.weight.abs().max() <= 0.5
    assert module.weight.std().item() == pytest.approx(0.5 / 3**0.5, rel=0.1)
    assert module.bias.abs().max() <= 0.5


def test_clear_errors() -> None:
    with pytest.raises(UserError, match="vector, scalar, constant or none"):
        GatedLinearAttention(8, 2, gate="fine")
    with pytest.raises(UserError, match="5 heads"):
        GatedLinearAttention(8, 5)
    with pytest.raises(UserError, match="whole number"):
        GatedLinearAttention(9, 3)
    with pytest.raises(UserError, match="width of at least 1"):
        GatedLinearAttention(8, 2, short_convolution=0)
    with pytest.raises(UserError, match="odd"):
        Retention(6, 2)
    with pytest.raises(UserError, match="identity, elu or relu"):
        LinearAttention(8, 2, feature_map="exp")
    with pytest.raises(UserError, match="choose feature_map"):
        LinearAttention(8, 2, normalize=True)
