from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from shared.config import UserError
from shared.nn import (
    Attention,
    DeltaNet,
    GatedLinearAttention,
    LanguageModel,
    LinearAttention,
    Mamba,
    Retention,
    SwiGLU,
    detach_state,
)

MIXERS: dict[str, Callable[[], nn.Module]] = {
    "attention": lambda: Attention(16, 2),
    "windowed attention": lambda: Attention(16, 2, window=5),
    "gla": lambda: GatedLinearAttention(16, 2),
    "gla, convolution": lambda: GatedLinearAttention(16, 2, short_convolution=4),
    "gla, scalar": lambda: GatedLinearAttention(16, 2, gate="scalar"),
    "gla, constant": lambda: GatedLinearAttention(16, 2, gate="constant", output_gate=False),
    "gla, none": lambda: GatedLinearAttention(16, 2, gate="none"),
    "retention": lambda: Retention(16, 2),
    "linear attention": lambda: LinearAttention(16, 2),
    "linear attention, normalized": lambda: LinearAttention(16, 2, feature_map="elu", normalize=True),
    "delta net": lambda: DeltaNet(16, 2),
    "delta net, l1": lambda: DeltaNet(16, 2, short_convolution=None, feature_map="elu", norm="l1", output_gate=True),
    "delta net, negative": lambda: DeltaNet(16, 2, allow_negative_eigenvalues=True),
    "mamba": lambda: Mamba(16, state_size=4),
}


def small_model(mixer: Callable[[], nn.Module], **options: object) -> LanguageModel:
    torch.manual_seed(1)
    model = LanguageModel(11, 16, 2, lambda _: mixer(), feed_forward_size=24, **options).double()
    with torch.no_grad():
        for parameter in model.parameters():
            # Larger than at the beginning of training, so that every part of a layer shows in the outputs.
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def in_pieces(model: LanguageModel, tokens: Tensor, pieces: list[int]) -> Tensor:
    state, outputs = None, []
    for piece in tokens.split(pieces, dim=1):
        logits, state = model(piece, state, keep_state=True)
        outputs.append(logits)
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize("name", MIXERS)
def test_decoding_and_segments_are_the_parallel_forward(name: str) -> None:
    model, tokens = small_model(MIXERS[name]), torch.randint(11, (2, 21))
    with torch.no_grad():
        expected = model(tokens)
        for pieces in ([1] * 21, [16, 5], [7, 1, 13], [20, 1]):
            torch.testing.assert_close(in_pieces(model, tokens, pieces), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", MIXERS)
def test_gradients_reach_back_through_a_state_that_is_handed_over(name: str) -> None:
    model, tokens = small_model(MIXERS[name]), torch.randint(11, (2, 12))
    parameters = dict(model.named_parameters())
    expected = torch.autograd.grad(model(tokens).square().sum(), list(parameters.values()))
    gradients = torch.autograd.grad(in_pieces(model, tokens, [7, 1, 4]).square().sum(), list(parameters.values()))
    for parameter, gradient, reference in zip(parameters, gradients, expected, strict=True):
        assert (gradient - reference).norm() <= 1e-8 * reference.norm(), parameter


@pytest.mark.parametrize("name", MIXERS)
def test_later_tokens_change_no_earlier_output(name: str) -> None:
    model, tokens = small_model(MIXERS[name]), torch.randint(11, (1, 20))
    changed = tokens.clone()
    changed[0, 13] = (changed[0, 13] + 1) % 11
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    torch.testing.assert_close(after[:, :13], before[:, :13], rtol=0, atol=1e-12)
    assert ((after[:, 13:] - before[:, 13:]).abs().amax(-1) > 1e-9).sum() > 1


@pytest.mark.parametrize("name", MIXERS)
def test_autocast_stays_near(name: str) -> None:
    model, tokens = small_model(MIXERS[name]).float(), torch.randint(11, (2, 12))
    with torch.no_grad():
        expected = model(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        first, state = model(tokens[:, :11], keep_state=True)
        logits = torch.cat([first, model(tokens[:, 11:], state)], dim=1)
    assert (logits - expected).norm() < 0.1 * expected.norm()
    logits.float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("name", ["attention", "gla, convolution", "delta net", "mamba"])
def test_checkpointed_blocks_give_the_same_loss_and_gradients(name: str) -> None:
    plain, checkpointed = small_model(MIXERS[name]), small_model(MIXERS[name], checkpoint_blocks=True)
    tokens = torch.randint(11, (2, 9))
    for model in (plain, checkpointed):
        logits, state = model(tokens, keep_state=True)
        (logits.square().sum() + model(tokens, detach_state(state)).square().sum()).backward()
    for expected, parameter in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad)


def test_truncated_backpropagation_stops_at_a_detached_state() -> None:
    model = small_model(MIXERS["delta net"])
    tokens = torch.randint(11, (1, 8))
    _, state = model(tokens, keep_state=True)
    assert state[0]["memory"].requires_grad
    cut = detach_state(state)
    assert not cut[0]["memory"].requires_grad
    assert torch.equal(cut[0]["convolution"][2], state[0]["convolution"][2])
    assert detach_state({"position": 3, "none": [None]}) == {"position": 3, "none": [None]}


def test_blocks_are_pre_norm_and_residual() -> None:
    model = LanguageModel(7, 16, 1, lambda _: Attention(16, 2), tie_embeddings=False).double()
    tokens = torch.randint(7, (2, 5))
    block, x = model.blocks[0], model.embedding(tokens)

    def norm(x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    x = x + block.mixer(norm(x))[0]
    x = x + block.feed_forward(norm(x))
    torch.testing.assert_close(model(tokens), norm(x) @ model.head.weight.T)


def test_swiglu_by_definition() -> None:
    layer, x = SwiGLU(4, 6), torch.randn(3, 4)
    gate = x @ layer.gate.weight.T
    expected = (gate * torch.sigmoid(gate) * (x @ layer.input.weight.T)) @ layer.output.weight.T
    torch.testing.assert_close(layer(x), expected)


def test_initialization() -> None:
    model = LanguageModel(200, 64, 2, lambda index: Mamba(64) if index else GatedLinearAttention(64, 2))
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding) and module is not model.blocks[1].mixer.time_step:
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.2)
            assert getattr(module, "bias", None) is None or (module.bias == 0).all()
    assert functional.softplus(model.blocks[1].mixer.time_step.bias).max() <= 0.1001
    # A model of random weights predicts about uniformly.
    loss = functional.cross_entropy(model(torch.randint(200, (4, 16))).flatten(0, 1), torch.randint(200, (64,)))
    assert loss.item() == pytest.approx(math.log(200), abs=0.1)


@pytest.mark.parametrize("name", MIXERS)
def test_model_from_the_meta_device_begins_as_any_other(name: str) -> None:
    def build() -> LanguageModel:
        return LanguageModel(11, 16, 2, lambda _: MIXERS[name]())

    with torch.device("meta"):
        model = build()
    model.to_empty(device="cpu")
    torch.manual_seed(3)
    model.reset_parameters()
    expected = build()
    torch.manual_seed(3)
    expected.reset_parameters()
    tokens = torch.randint(11, (1, 6))
    assert torch.equal(model(tokens), expected(tokens))


def test_tied_embeddings_count_once() -> None:
    def build(tied: bool) -> LanguageModel:
        return LanguageModel(50, 8, 1, lambda _: LinearAttention(8, 2), feed_forward_size=0, tie_embeddings=tied)

    assert build(True).num_parameters() == 50 * 8 + 4 * 8**2 + 2 * 8
    assert build(False).num_parameters() == build(True).num_parameters() + 50 * 8
    assert len(build(True).state_dict()) == 1 + 4 + 2


def feed_forward_parameters(hidden_size: int) -> int:
    return 3 * hidden_size * 256 * math.ceil(8 * hidden_size / 3 / 256)


@pytest.mark.parametrize(("hidden_size", "tied", "nominal"), [(1024, True, 340e6), (2048, False, 1.3e9)])
def test_published_sizes_of_gla(hidden_size: int, tied: bool, nominal: float) -> None:
    d = hidden_size
    with torch.device("meta"):
        model = LanguageModel(32000, d, 24, lambda _: GatedLinearAttention(d, 4), tie_embeddings=tied)
    # W_q and W_k are d·d/2; W_v, W_r and W_o d²; the gate has rank 16 and a bias; a norm of V = d/4.
    layer = 4 * d**2 + 16 * (d + d // 2) + d // 2 + d // 4
    embeddings = 32000 * d * (1 if tied else 2)
    assert model.num_parameters() == embeddings + 24 * (layer + feed_forward_parameters(d) + 2 * d) + d
    assert model.num_parameters() == pytest.approx(nominal, rel=0.06)


@pytest.mark.parametrize(
    ("hidden_size", "num_heads", "tied", "nominal"), [(1024, 8, True, 340e6), (2048, 16, False, 1.3e9)]
)
def test_published_sizes_of_delta_net(hidden_size: int, num_heads: int, tied: bool, nominal: float) -> None:
    d = hidden_size
    with torch.device("meta"):
        model = LanguageModel(32000, d, 24, lambda _: DeltaNet(d, num_heads), tie_embeddings=tied)
    # Four projections, β, three convolutions of width 4, a norm of V = 128.
    layer = 4 * d**2 + d * num_heads + 3 * 4 * d + 128
    embeddings = 32000 * d * (1 if tied else 2)
    assert model.num_parameters() == embeddings + 24 * (layer + feed_forward_parameters(d) + 2 * d) + d
    assert model.num_parameters() == pytest.approx(nominal, rel=0.06)


def test_hybrids_choose_the_mixer_by_layer() -> None:
    model = LanguageModel(11, 16, 4, lambda index: Attention(16, 2, window=5) if index % 2 else DeltaNet(16, 2))
    assert [type(block.mixer) for block in model.blocks] == [DeltaNet, Attention] * 2
    tokens = torch.randint(11, (1, 9))
    with torch.no_grad():
        torch.testing.assert_close(in_pieces(model, tokens, [4, 5]), model(tokens), rtol=0, atol=1e-5)


def test_learns_to_repeat() -> None:
    model = LanguageModel(8, 16, 1, lambda _: GatedLinearAttention(16, 2), feed_forward_size=32)
    tokens = torch.arange(8).repeat(4, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        loss = functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3


def test_clear_errors() -> None:
    model = LanguageModel(11, 16, 2, lambda _: LinearAttention(16, 2))
    with pytest.raises(UserError, match="int64"):
        model(torch.randn(2, 3))
    with pytest.raises(UserError, match=r"\[batch, length\]"):
        model(torch.randint(11, (3,)))
    with pytest.raises(UserError, match="2 layers and the state 1"):
        model(torch.randint(11, (1, 3)), [None])
    with pytest.raises(UserError, match="num_layers"):
        LanguageModel(11, 16, 0, lambda _: LinearAttention(16, 2))
    with pytest.raises(UserError, match="feed_forward_size"):
        LanguageModel(11, 16, 1, lambda _: LinearAttention(16, 2), feed_forward_size=-1)
