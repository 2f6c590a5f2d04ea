"""The arms against the paper's equations, written out step by step, and what makes them differ."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from shared.config import UserError
from shared.nn.language_model import LanguageModel
from shared.training.language import next_token_loss

from ..model import ARMS, ModelSettings, build_model

VOCAB = 11
SETTINGS = ModelSettings(hidden_size=32, num_layers=2, num_heads=4)
GATES = ("gla", "gla_scalar", "gla_constant", "gla_no_gate")


def model_of(arm: str, **changes: Any) -> LanguageModel:
    """A model in double precision, with weights so large that every part of it shows in the output."""
    torch.manual_seed(0)
    model = build_model(arm, SETTINGS.model_copy(update=changes), VOCAB).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "log_a" not in name.lower():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


def tokens_of(length: int) -> Tensor:
    return torch.randint(VOCAB, (2, length), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("arm", ARMS)
def test_no_arm_sees_the_future(arm: str) -> None:
    model, tokens = model_of(arm), tokens_of(20)
    changed = tokens.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % VOCAB
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :12], after[:, :12])
    assert not torch.allclose(before[:, 12:], after[:, 12:])


@pytest.mark.parametrize("arm", ARMS)
def test_a_sequence_in_pieces_is_the_sequence(arm: str) -> None:
    """The forward pass of truncated backpropagation, and of decoding."""
    model, tokens = model_of(arm), tokens_of(12)
    state, pieces = None, []
    for piece in tokens.split([5, 1, 6], dim=1):
        logits, state = model(piece, state=state, keep_state=True)
        pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens))


def test_truncated_backpropagation_has_the_loss_of_the_whole_and_another_gradient() -> None:
    tokens = tokens_of(33)
    gradients = {}
    for segment_length in (None, 8):
        model = model_of("gla")
        loss = next_token_loss(model, tokens[:, :-1], tokens[:, 1:], segment_length)
        loss.backward()
        gradients[segment_length] = (loss.detach(), model.blocks[0].mixer.key.weight.grad)
    torch.testing.assert_close(gradients[None][0], gradients[8][0])
    assert not torch.allclose(gradients[None][1], gradients[8][1], rtol=1e-3)


# --- The layer and the block ------------------------------------------------------------------------------------------


def log_gates(arm: str, layer: nn.Module, x: Tensor, num_heads: int, key_size: int, normalizer: float) -> Tensor:
    """log α [B, T, H, K] of the rows of the paper's Table 4."""
    shape = (*x.shape[:2], num_heads, key_size)
    if arm == "gla_no_gate":
        return x.new_zeros(shape)
    if arm == "gla_constant":
        gamma = 1 - 2.0 ** (-5 - torch.arange(num_heads, dtype=x.dtype))
        return gamma.log()[:, None].expand(shape)
    logits = layer.gate(x)
    alpha = torch.sigmoid(logits) ** (1 / normalizer)
    return alpha.log()[..., None].expand(shape) if arm == "gla_scalar" else alpha.log().view(shape)


def slow_layer(arm: str, layer: nn.Module, x: Tensor, num_heads: int, normalizer: float = 16.0) -> Tensor:
    """Section 4.4 with the parallel form of the recurrence, P_ij = Σ_k Q_ik K_jk b_ik / b_jk for j ≤ i."""
    q, k, v, r = (
        projection(x).unflatten(-1, (num_heads, -1))
        for projection in (layer.query, layer.key, layer.value, layer.output_gate)
    )
    log_b = log_gates(arm, layer, x, num_heads, q.shape[-1], normalizer).cumsum(1)
    decay = (log_b[:, :, None] - log_b[:, None]).clamp(max=0).exp()
    scores = torch.einsum("bihk,bjhk,bijhk->bhij", q, k, decay).tril() * q.shape[-1] ** -0.5
    o = torch.einsum("bhij,bjhv->bihv", scores, v)
    normalized = o / (o.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * layer.norm.weight
    return layer.output((normalized * r * torch.sigmoid(r)).flatten(2))


@pytest.mark.parametrize("arm", [*GATES, "gla_8_heads", "gla_1_head"])
@pytest.mark.parametrize("normalizer", [16.0, 1.0])
def test_layers_compute_the_papers_equations(arm: str, normalizer: float) -> None:
    heads = {"gla_8_heads": 8, "gla_1_head": 1}.get(arm, 4)
    layer = model_of(arm, gate_normalizer=normalizer).blocks[0].mixer
    x = torch.randn(2, 37, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    gate = arm if arm in GATES else "gla"
    torch.testing.assert_close(layer(x)[0], slow_layer(gate, layer, x, heads, normalizer))


def test_the_block_adds_the_second_residual_to_the_first() -> None:
    """X' = Y + SwiGLU(RMSNorm(Y)), where the paper prints + X."""
    block = model_of("gla").blocks[0]
    x = torch.randn(1, 9, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def norm(values: Tensor, weight: Tensor) -> Tensor:
        return values / (values.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    y = x + slow_layer("gla", block.mixer, norm(x, block.mixer_norm.weight), 4)
    z, swiglu = norm(y, block.feed_forward_norm.weight), block.feed_forward
    expected = y + swiglu.output(functional.silu(swiglu.gate(z)) * swiglu.input(z))
    torch.testing.assert_close(block(x)[0], expected)


def test_gates_open_wide_are_no_gates() -> None:
    gated, free = model_of("gla"), model_of("gla_no_gate")
    free.load_state_dict({name: w for name, w in gated.state_dict().items() if ".mixer.gate." not in name})
    with torch.no_grad():
        for block in gated.blocks:
            block.mixer.gate[1].weight.zero_()
            block.mixer.gate[1].bias.fill_(60.0)
    torch.testing.assert_close(gated(tokens_of(30)), free(tokens_of(30)))


# --- What differs -----------------------------------------------------------------------------------------------------


def shapes(arm: str) -> dict[str, torch.Size]:
    return {name: weight.shape for name, weight in build_model(arm, SETTINGS, VOCAB).named_parameters()}


@pytest.mark.parametrize("arm", GATES)
def test_ablations_differ_in_the_gate_alone(arm: str) -> None:
    full, other = shapes("gla"), shapes(arm)
    without_gates = {name: shape for name, shape in full.items() if ".mixer.gate." not in name}
    assert {name: shape for name, shape in other.items() if ".mixer.gate." not in name} == without_gates
    assert any(".mixer.gate." in name for name in other) == (arm in ("gla", "gla_scalar"))


@pytest.mark.parametrize("arm", ["gla_long", "gla_truncated"])
def test_long_contexts_train_the_same_model(arm: str) -> None:
    torch.manual_seed(0)
    first = build_model("gla", SETTINGS, VOCAB)
    torch.manual_seed(0)
    second = build_model(arm, SETTINGS, VOCAB)
    torch.testing.assert_close(first(tokens_of(10)), second(tokens_of(10)), rtol=0, atol=0)


def test_gates_begin_at_slow_forgetting() -> None:
    """α = sigmoid(0)^(1/16) = 0.958 within what weights of 0.02 can move it."""
    torch.manual_seed(0)
    layer = build_model("gla", SETTINGS, VOCAB).blocks[0].mixer
    alpha = layer.log_gate(torch.randn(2, 50, 32)).exp()
    assert alpha.shape == (2, 50, 4, 4)
    torch.testing.assert_close(alpha, torch.full_like(alpha, 0.5 ** (1 / 16)), atol=1e-3, rtol=0)


@pytest.mark.parametrize("hidden_size", [96, 128, 384, 1024])
@pytest.mark.parametrize("arm", ["transformer", "retnet", "mamba", "hyena", "rwkv4", *GATES])
def test_arms_are_of_about_the_same_size(arm: str, hidden_size: int) -> None:
    settings = ModelSettings(hidden_size=hidden_size, num_layers=2, num_heads=4)
    with torch.device("meta"):
        counts = [sum(p.numel() for p in build_model(a, settings, VOCAB).blocks.parameters()) for a in (arm, "gla")]
    # Mamba and RWKV-4 lack the feed-forward whose size comes in steps of 256, and Hyena's filters are of a fixed size.
    lowest, highest = (0.8, 1.25) if arm in ("mamba", "rwkv4", "hyena") else (0.95, 1.05)
    assert lowest < counts[0] / counts[1] < highest


def test_unknown_arms_are_named() -> None:
    with pytest.raises(
        UserError, match="unknown model 'gla_vector'; choose one of transformer, retnet, mamba, hyena, rwkv4, gla, "
    ):
        build_model("gla_vector", SETTINGS, VOCAB)
