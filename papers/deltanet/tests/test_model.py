"""The layer against the paper's equations, and what the arms and hybrids are made of."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from shared.config import UserError
from shared.nn.attention import Attention
from shared.nn.delta_net import DeltaNet
from shared.nn.mamba import Mamba

from ..model import (
    HYBRIDS,
    MIXERS,
    MODELS,
    ModelSettings,
    attention_layers,
    build_mixer,
    build_model,
    num_state_elements,
)

SETTINGS = ModelSettings(hidden_size=16, num_layers=6, num_heads=2, feed_forward_size=24, state_size=4, window=5)


def built(name: str, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    return build_model(name, SETTINGS.model_copy(update=changes), vocab_size=11)


# --- The layer --------------------------------------------------------------------------------------------------------


def directly(layer: DeltaNet, x: Tensor, feature_map: str, norm: str) -> Tensor:
    """Section 3.3, one token, head and channel after the other: x [T, d] to y [T, d]."""
    length, heads = len(x), layer.num_heads

    def convolved(projected: Tensor, index: int) -> Tensor:
        if layer.convolution is None:
            return projected
        weight = layer.convolution[index].weight
        width = weight.shape[1]
        out = torch.zeros_like(projected)
        for t in range(length):
            for lag in range(width):
                if t - lag >= 0:
                    out[t] += weight[:, width - 1 - lag] * projected[t - lag]
        return out

    def normalized(features: Tensor) -> Tensor:
        total = (features**2).sum().add(1e-6).sqrt() if norm == "l2" else features.abs().sum()
        return features / total

    maps = {
        "silu": lambda x: x / (1 + (-x).exp()),
        "relu": lambda x: x.clamp(min=0),
        "elu": lambda x: torch.where(x > 0, x + 1, x.exp()),
    }
    q, k, v = (
        convolved(x @ projection.weight.T, index)
        for index, projection in enumerate((layer.query, layer.key, layer.value))
    )
    beta = 1 / (1 + (-(x @ layer.beta.weight.T)).exp())
    outputs = []
    for head in range(heads):
        part = slice(head * q.shape[1] // heads, (head + 1) * q.shape[1] // heads)
        state = x.new_zeros(q[:, part].shape[1], v[:, part].shape[1])
        rows = []
        for t in range(length):
            key, query = (normalized(maps[feature_map](tensor[t, part])) for tensor in (k, q))
            value = maps["silu"](v[t, part])
            identity = torch.eye(len(key), dtype=x.dtype)
            state = (identity - beta[t, head] * key.outer(key)) @ state + beta[t, head] * key.outer(value)
            read = state.T @ query / math.sqrt(len(query))
            rows.append(read / (read**2).mean().add(1e-5).sqrt() * layer.norm.weight)
        outputs.append(torch.stack(rows))
    return torch.cat(outputs, dim=1) @ layer.output.weight.T


@pytest.mark.parametrize(
    ("name", "feature_map", "norm"),
    [
        ("deltanet", "silu", "l2"),
        ("deltanet_no_conv", "silu", "l2"),
        ("deltanet_l1_elu", "elu", "l1"),
        ("deltanet_l2_elu", "elu", "l2"),
        ("deltanet_l2_relu", "relu", "l2"),
    ],
)
def test_layers_are_the_papers_equations(name: str, feature_map: str, norm: str) -> None:
    torch.manual_seed(0)
    layer = build_mixer(name, SETTINGS, layer=0).double()
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    with torch.no_grad():
        y = layer(x)[0]
        expected = torch.stack([directly(layer, sequence, feature_map, norm) for sequence in x])
    assert (y - expected).norm() / expected.norm() < 1e-9
    assert (layer.convolution is None) == (name == "deltanet_no_conv")


def test_the_norm_is_what_keeps_the_transition_a_contraction() -> None:
    """Eigenvalues of I − β k kᵀ: one is 1 − β ‖k‖², with a square that the paper's print lacks, all others are 1."""
    key, beta = torch.tensor([0.3, -1.2, 0.5], dtype=torch.float64), 0.7
    eigenvalues = torch.linalg.eigvalsh(torch.eye(3, dtype=torch.float64) - beta * key.outer(key))
    expected = torch.tensor([1 - beta * key.square().sum().item(), 1, 1], dtype=torch.float64)
    torch.testing.assert_close(eigenvalues, expected)
    assert eigenvalues.abs().max() <= 1 + 1e-12
    unit = functional.normalize(key, dim=0)
    assert torch.linalg.eigvalsh(torch.eye(3, dtype=torch.float64) - unit.outer(unit))[0].abs() < 1e-12


# --- Arms and hybrids -------------------------------------------------------------------------------------------------


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", ["deltanet_l1_elu", "deltanet_l2_elu", "deltanet_l2_relu"])
def test_ablations_differ_in_nothing_that_is_trained(name: str) -> None:
    plain, arm = built("deltanet"), built(name)
    for (of_plain, weight), (of_arm, other) in zip(plain.named_parameters(), arm.named_parameters(), strict=True):
        assert of_plain == of_arm
        assert torch.equal(weight, other)
    tokens = torch.arange(8)[None]
    assert not torch.allclose(plain(tokens), arm(tokens))


@pytest.mark.parametrize(("with_it", "without"), [("deltanet", "deltanet_no_conv"), ("gla_conv", "gla")])
def test_arms_without_convolution_lack_just_that(with_it: str, without: str) -> None:
    full, bare = shapes(built(with_it)), shapes(built(without))
    assert bare.items() <= full.items()
    assert {name for name in full if name not in bare} == {name for name in full if ".convolution." in name}


@pytest.mark.parametrize(
    ("num_layers", "sliding", "global_"),
    [(2, (1,), (1,)), (4, (1, 3), (1, 2)), (24, tuple(range(1, 24, 2)), (1, 12))],
)
def test_where_hybrids_have_attention(num_layers: int, sliding: tuple[int, ...], global_: tuple[int, ...]) -> None:
    """Every other layer; the second layer and, counted from 1, layer N/2 + 1."""
    for name, expected in (("deltanet_swa", sliding), ("deltanet_global", global_)):
        assert attention_layers(name, num_layers) == expected
        blocks = built(name, num_layers=num_layers).blocks
        for index, block in enumerate(blocks):
            assert isinstance(block.mixer, Attention if index in expected else DeltaNet)
            if index in expected:
                assert block.mixer.window == (5 if name == "deltanet_swa" else None)


def test_hybrids_have_the_layers_of_deltanet_elsewhere() -> None:
    plain, hybrid = shapes(built("deltanet")), shapes(built("deltanet_swa"))
    of_first = {name for name in plain if name.startswith(("blocks.0.", "blocks.2.", "blocks.4."))}
    assert {name for name in hybrid if name.startswith(("blocks.0.", "blocks.2.", "blocks.4."))} == of_first


def test_models_have_about_as_many_parameters() -> None:
    """Mamba's further mixers in the place of SwiGLU, and RetNet's narrow SwiGLU, see to that."""
    settings = ModelSettings(hidden_size=256, num_layers=4, num_heads=4)
    with torch.device("meta"):
        counts = {name: build_model(name, settings, 64).num_parameters() for name in MODELS}
    for name, count in counts.items():
        assert 0.95 < count / counts["transformer"] < 1.12, (name, count)
    blocks = built("mamba").blocks
    assert len(blocks) == 9  # of 6 d² = 1,536 weights, for six of 4 d² + 3 d f = 2,176
    assert all(isinstance(block.mixer, Mamba) and block.feed_forward is None for block in blocks)
    assert len(built("mamba", feed_forward_size=0).blocks) == SETTINGS.num_layers


@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_causal_and_depends_on_the_past(name: str) -> None:
    model = built(name).eval()
    tokens = torch.randint(11, (1, 12), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[0, 8] = (changed[0, 8] + 1) % 11
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :8], after[:, :8])
    # Logits begin small: the difference is held against the spread of the logits.
    assert (before[:, 9:] - after[:, 9:]).abs().max() > 1e-5 * before.std()


def test_the_autoencoder_knows_of_a_sequence_what_its_last_output_says() -> None:
    torch.manual_seed(0)
    model = build_model("deltanet", SETTINGS.model_copy(update={"max_length": 9}), 11, reconstruct=True)
    tokens = torch.randint(11, (2, 9))
    with torch.no_grad():
        logits, last = model(tokens), model.encoder.features(tokens)[0][:, -1]
        for place in range(9):
            torch.testing.assert_close(logits[:, place], model.decoder(last + model.places[place]))
    assert logits.shape == (2, 9, 11)
    assert num_state_elements(model(tokens, keep_state=True)[1]) == 6 * (2 * 8 * 8 + 3 * 16 * 3)
    decoder = 9 * 16 + 16 * 32 + 32 + 32 * 11 + 11
    assert model.num_parameters() == model.encoder.num_parameters() + decoder


def test_unknown_models_are_refused() -> None:
    with pytest.raises(UserError, match=r"unknown model 'deltanett'; choose one of transformer, .*deltanet_global"):
        build_model("deltanett", SETTINGS, 11)
    assert set(MODELS) == {*MIXERS, *HYBRIDS}


@pytest.mark.parametrize("changes", [{"hidden_size": 20, "num_heads": 3}, {"gla_num_heads": 3}])
def test_heads_that_do_not_divide(changes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be a multiple of four times 3 heads"):
        ModelSettings.model_validate(SETTINGS.model_dump() | changes)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # Layers × heads × K × V, and three histories of three tokens for the convolutions.
        ("deltanet", 6 * (2 * 8 * 8 + 3 * 16 * 3)),
        ("deltanet_no_conv", 6 * 2 * 8 * 8),
        ("gla", 6 * 2 * 4 * 8),
        ("retnet", 6 * 2 * 8 * 16),
        ("linear_attention", 6 * 2 * 8 * 8),
        # Keys and values of all tokens.
        ("transformer", 6 * 2 * 10 * 16),
        # The long convolution's inputs, and the short one's last two: a product, or a value and the keys' products.
        ("hyena", 6 * (10 * 16 + 2 * 3 * 16)),
        # Of nine layers; 32 channels with 4 numbers each, and the last three inputs.
        ("mamba", 9 * (32 * 4 + 32 * 3)),
    ],
)
def test_state_sizes(name: str, expected: int) -> None:
    with torch.no_grad():
        state = built(name)(torch.zeros(3, 10, dtype=torch.int64), keep_state=True)[1]
    assert num_state_elements(state) == expected
