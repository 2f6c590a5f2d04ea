from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from shared.config import UserError
from shared.nn import rwkv
from shared.nn.language_model import LanguageModel, detach_state
from shared.nn.rwkv import RWKV4ChannelMix, RWKV4TimeMix, wkv


def by_its_formula(k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    """The paper's definition, term by term."""
    outputs = []
    for t in range(k.shape[1]):
        numerator, denominator = torch.exp(u + k[:, t]) * v[:, t], torch.exp(u + k[:, t])
        for i in range(t):
            weight = torch.exp(-(t - 1 - i) * w + k[:, i])
            numerator, denominator = numerator + weight * v[:, i], denominator + weight
        outputs.append(numerator / denominator)
    return torch.stack(outputs, dim=1)


def by_softmax(k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    """The same average with its weights as a softmax over the tokens, which no key can overflow."""
    t = torch.arange(k.shape[1])
    distance = (t[:, None] - t)[..., None]
    logits = k[:, None] + torch.where(distance == 0, u, -(distance - 1) * w)
    weights = logits.masked_fill(distance < 0, -math.inf).softmax(2)
    return torch.einsum("btsd,bsd->btd", weights, v)


def random_inputs(length: int, size: int = 3, *, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    k, v = (torch.randn(2, length, size, dtype=dtype) for _ in range(2))
    return k, v, torch.rand(size, dtype=dtype), torch.randn(size, dtype=dtype)


@pytest.mark.parametrize("length", [1, 2, 13])
def test_wkv_is_its_formula(length: int) -> None:
    inputs = random_inputs(length)
    y, (average, log_weight) = wkv(*inputs)
    torch.testing.assert_close(y, by_its_formula(*inputs), rtol=0, atol=1e-14)
    torch.testing.assert_close(y, by_softmax(*inputs), rtol=0, atol=1e-14)
    k, v, w, _ = inputs
    weights = torch.exp(k - torch.arange(length - 1, -1, -1)[:, None] * w)
    torch.testing.assert_close(log_weight, weights.sum(1).log())
    torch.testing.assert_close(average, (weights * v).sum(1) / weights.sum(1))


def test_wkv_by_hand() -> None:
    # Keys of log 1, log 2 and log 3, half-lives of one token, and a bonus that doubles the present.
    k = torch.tensor([1.0, 2.0, 3.0]).log()[None, :, None]
    v = torch.tensor([6.0, 12.0, 30.0])[None, :, None]
    y, _ = wkv(k, v, torch.tensor([math.log(2)]), torch.tensor([math.log(2)]))
    expected = [6, (1 * 6 + 4 * 12) / 5, (0.5 * 6 + 2 * 12 + 6 * 30) / 8.5]
    torch.testing.assert_close(y[0, :, 0], torch.tensor(expected))


@pytest.mark.parametrize("length", [1, 6])
def test_gradients_of_wkv(length: int) -> None:
    inputs = tuple(t.requires_grad_() for t in random_inputs(length))
    state = tuple(torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def flat(k: Tensor, v: Tensor, w: Tensor, u: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        y, after = wkv(k, v, w, u, initial_state=state or None)
        return y, *after

    assert torch.autograd.gradcheck(flat, inputs)
    assert torch.autograd.gradcheck(flat, (*inputs, *state))


@pytest.mark.parametrize("chunk_elements", [1, 5 * 2 * 3])
def test_gradients_over_several_chunks(chunk_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rwkv, "CHUNK_ELEMENTS", chunk_elements)
    inputs = tuple(t.requires_grad_() for t in random_inputs(33))
    y, dy = wkv(*inputs)[0], torch.randn(2, 33, 3, dtype=torch.float64)
    expected = torch.autograd.grad(by_softmax(*inputs), inputs, dy)
    for actual, wanted in zip(torch.autograd.grad(y, inputs, dy), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [100.0, 1000.0])
def test_large_keys_and_strong_decays_stay_finite(scale: float) -> None:
    inputs = [t.requires_grad_() for t in random_inputs(40, 5, dtype=torch.float32)]
    with torch.no_grad():
        inputs[0].uniform_(-scale, scale)
        inputs[2].copy_(torch.tensor([0.0, 1e-4, 1.0, 50.0, 1000.0]))
        inputs[3].copy_(torch.tensor([-scale, -1.0, 0.0, 1.0, scale]))
    y, state = wkv(*inputs)
    doubles = [t.detach().double().requires_grad_() for t in inputs]
    expected = by_softmax(*doubles)
    torch.testing.assert_close(y, expected.float(), rtol=0, atol=1e-5 * scale)
    assert all(t.isfinite().all() for t in state)
    gradients = torch.autograd.grad(y.sum(), inputs)
    for actual, wanted in zip(gradients, torch.autograd.grad(expected.sum(), doubles), strict=True):
        torch.testing.assert_close(actual, wanted.float(), rtol=0, atol=1e-5 * scale)


def test_wkv_is_an_average() -> None:
    k, v, w, u = random_inputs(30, dtype=torch.float32)
    torch.testing.assert_close(wkv(k + 7, v, w, u)[0], wkv(k, v, w, u)[0])
    torch.testing.assert_close(wkv(k, torch.full_like(v, 3.0), w, u)[0], torch.full_like(v, 3.0))


def test_half_precision_is_summed_in_float32() -> None:
    k, v, w, u = (t.bfloat16() for t in random_inputs(300))
    y, (average, _) = wkv(k, v, w, u)
    assert (y.dtype, average.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(y.float(), wkv(k.float(), v.float(), w.float(), u.float())[0], rtol=2**-8, atol=2**-9)


def test_wkv_is_an_operator_that_compilers_understand() -> None:
    inputs = [t.requires_grad_() for t in random_inputs(4)]
    state = (torch.zeros(2, 3, dtype=torch.float64), torch.full((2, 3), -math.inf, dtype=torch.float64))
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.reprise.wkv.default, (*inputs, *state), test_utils=checks)


def test_time_mix_is_its_equations() -> None:
    mixer, x = RWKV4TimeMix(6, layer=1, num_layers=3).double(), torch.randn(2, 9, 6, dtype=torch.float64)
    nn.init.uniform_(mixer.mix)
    before = torch.cat([torch.zeros(2, 1, 6), x[:, :-1]], dim=1)
    r, k, v = (
        (mu * x + (1 - mu) * before) @ linear.weight.T
        for mu, linear in zip(mixer.mix, (mixer.receptance, mixer.key, mixer.value), strict=True)
    )
    expected = (
        torch.sigmoid(r) * by_its_formula(k, v, mixer.log_decay_rate.exp(), mixer.bonus)
    ) @ mixer.output.weight.T
    torch.testing.assert_close(mixer(x)[0], expected, rtol=0, atol=1e-13)


def test_channel_mix_is_its_equations() -> None:
    mixer, x = RWKV4ChannelMix(6).double(), torch.randn(2, 9, 6, dtype=torch.float64)
    nn.init.uniform_(mixer.mix)
    before = torch.cat([torch.zeros(2, 1, 6), x[:, :-1]], dim=1)
    r, k = (mu * x + (1 - mu) * before for mu in mixer.mix)
    hidden = (k @ mixer.key.weight.T).clamp(min=0) ** 2
    expected = torch.sigmoid(r @ mixer.receptance.weight.T) * (hidden @ mixer.value.weight.T)
    torch.testing.assert_close(mixer(x)[0], expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", [RWKV4TimeMix, RWKV4ChannelMix])
def test_is_causal(kind: type[nn.Module]) -> None:
    mixer, x = kind(6).double(), torch.randn(2, 12, 6, dtype=torch.float64)
    changed = x.clone()
    changed[:, 7:] += 10
    before, after = mixer(x)[0], mixer(changed)[0]
    assert torch.equal(after[:, :7], before[:, :7])
    assert (after[:, 7:] != before[:, 7:]).any()


@pytest.mark.parametrize("kind", [RWKV4TimeMix, RWKV4ChannelMix])
@pytest.mark.parametrize("lengths", [[1] * 8, [5, 3]])
def test_continues_from_its_state(kind: type[nn.Module], lengths: list[int]) -> None:
    mixer, x = kind(6).double(), torch.randn(2, 8, 6, dtype=torch.float64)
    pieces, state = [], None
    for piece in x.split(lengths, dim=1):
        y, state = mixer(piece, state, keep_state=True)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, dim=1), mixer(x)[0], rtol=0, atol=1e-13)
    assert mixer(x)[1] is None


def test_gradients_flow_through_the_state() -> None:
    mixer, x = RWKV4TimeMix(6).double(), torch.randn(2, 8, 6, dtype=torch.float64, requires_grad=True)

    def in_two(x: Tensor, *, cut: bool) -> Tensor:
        first, state = mixer(x[:, :5], keep_state=True)
        second, _ = mixer(x[:, 5:], detach_state(state) if cut else state)
        return torch.cat([first, second], dim=1).square().sum()

    (whole,) = torch.autograd.grad(mixer(x)[0].square().sum(), x)
    (parts,) = torch.autograd.grad(in_two(x, cut=False), x)
    (truncated,) = torch.autograd.grad(in_two(x, cut=True), x)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-13)
    assert (truncated - whole)[:, :5].abs().max() > 1e-4


def test_published_beginning() -> None:
    first, last = (RWKV4TimeMix(5, layer=layer, num_layers=4) for layer in (0, 3))
    channel = torch.arange(5) / 5
    torch.testing.assert_close(first.mix, torch.stack([channel**0.5, channel, channel]))
    torch.testing.assert_close(last.mix, torch.stack([channel**0.125, channel**0.25, channel**0.25 + 0.3]))
    torch.testing.assert_close(RWKV4ChannelMix(5, layer=3, num_layers=4).mix, torch.stack([channel**0.25] * 2))
    position = torch.arange(5) / 4
    torch.testing.assert_close(first.log_decay_rate, -5 + 8 * position**0.7)
    torch.testing.assert_close(last.log_decay_rate, -5 + 8 * position**2)
    torch.testing.assert_close(first.bonus, math.log(0.3) + torch.tensor([0, 0.5, -0.5, 0, 0.5]))


def test_the_published_model_alternates_both() -> None:
    def mixer(index: int) -> nn.Module:
        return (RWKV4ChannelMix if index % 2 else RWKV4TimeMix)(8, layer=index // 2, num_layers=2)

    model = LanguageModel(11, 8, 4, mixer, feed_forward_size=0)
    # 4 d² + 5 d of a time mix, 9 d² + 2 d of a channel mix, the norms and the embedding.
    assert model.num_parameters() == 2 * (4 * 64 + 5 * 8) + 2 * (9 * 64 + 2 * 8) + 5 * 8 + 11 * 8
    tokens = torch.randint(11, (2, 7))
    model.double()
    first, state = model(tokens[:, :3], keep_state=True)
    second, _ = model(tokens[:, 3:], state, keep_state=True)
    torch.testing.assert_close(torch.cat([first, second], dim=1), model(tokens), rtol=0, atol=1e-12)


def test_checkpointing_changes_no_gradient() -> None:
    model, tokens = LanguageModel(11, 8, 2, lambda _: RWKV4TimeMix(8)), torch.randint(11, (2, 7))
    expected = torch.autograd.grad(model(tokens).square().sum(), list(model.parameters()))
    model.checkpoint_blocks = True
    actual = torch.autograd.grad(model(tokens).square().sum(), list(model.parameters()))
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


def test_clear_errors() -> None:
    for kind in (RWKV4TimeMix, RWKV4ChannelMix):
        with pytest.raises(UserError, match="layer 2 of 2"):
            kind(4, layer=2, num_layers=2)
