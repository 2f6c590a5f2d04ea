from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from shared.config import UserError
from shared.nn import hyena
from shared.nn.hyena import Hyena, ImplicitFilter, causal_convolution, multi_head_convolution
from shared.nn.language_model import LanguageModel, detach_state

SMALL = {"filter_width": 5, "filter_layers": 3, "filter_bands": 2}
KINDS = {"order 2": {}, "order 3": {"order": 3}, "heads": {"num_heads": 2}}


def layer(hidden_size: int = 6, max_length: int = 20, **options: int) -> Hyena:
    return Hyena(hidden_size, max_length=max_length, **SMALL, **options).double()


def direct(z: Tensor, h: Tensor) -> Tensor:
    """The convolution token by token; z `[…, C, T]`, h `[C, T]`."""
    length = z.shape[-1]
    outputs = [sum(h[..., t - s] * z[..., s] for s in range(t + 1)) for t in range(length)]
    return torch.stack(outputs, dim=-1)


@pytest.mark.parametrize("length", [1, 2, 7, 16])
def test_convolution_is_the_direct_sum(length: int) -> None:
    z, h = torch.randn(2, 3, length, dtype=torch.float64), torch.randn(3, length, dtype=torch.float64)
    expected = direct(z, h)
    torch.testing.assert_close(causal_convolution(z, h), expected, rtol=0, atol=1e-12)
    for last in {1, length // 2 + 1, length}:
        torch.testing.assert_close(causal_convolution(z, h, last), expected[..., -last:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("last", [1, 3, 6])
def test_gradients_of_the_convolution(last: int) -> None:
    z = torch.randn(2, 3, 2, 6, dtype=torch.float64, requires_grad=True)
    h = torch.randn(3, 1, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z, h: causal_convolution(z, h, last), (z, h))


def test_convolution_of_half_precision_sums_in_float32() -> None:
    z, h = torch.randn(4, 50).bfloat16(), torch.randn(4, 50).bfloat16()
    y = causal_convolution(z, h)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), direct(z.float(), h.float()), rtol=2**-8, atol=1e-4)


def test_filter_is_its_formula() -> None:
    filters = ImplicitFilter(3, 10, width=4, num_layers=3, num_bands=2, sine_frequency=2.0).double()
    t = torch.arange(7, dtype=torch.float64) / 10
    features = torch.stack(
        [t, torch.ones(7), (2 * math.pi * t).cos(), torch.zeros(7), (2 * math.pi * t).sin()], dim=1
    ).double()
    first, second = filters.layers
    x = torch.sin(2 * (features @ first.weight.T + first.bias))
    x = torch.sin(2 * (x @ second.weight.T + second.bias))
    expected = (x @ filters.last.weight.T).T
    # Windows of 1 % after 1.5 times the maximum length in the first filter and after 0.3 times it in the last.
    expected[0] *= 0.01 ** (t / 1.5)
    expected[2] *= 0.01 ** (t / 0.3)
    expected[:, 0] += filters.skip
    h = filters(7)
    torch.testing.assert_close(h[[0, 2]], expected[[0, 2]], rtol=0, atol=1e-12)


def test_filters_do_not_depend_on_the_length() -> None:
    filters = ImplicitFilter(3, 16).double()
    torch.testing.assert_close(filters(5), filters(16)[:, :5], rtol=0, atol=1e-14)


def test_is_its_equations() -> None:
    mixer, x = layer(order=3), torch.randn(2, 9, 6, dtype=torch.float64)
    projected = functional.pad(mixer.input(x), (0, 0, 2, 0))
    conv = mixer.convolution
    projected = sum(projected[:, j : j + 9] * conv.weight[:, j] for j in range(3)) + conv.bias
    x3, x2, x1, v = projected.chunk(4, dim=-1)
    h1, h2 = mixer.filter(9).chunk(2)
    z = x1 * v
    z = x2 * direct(z.mT, h1).mT
    z = x3 * direct(z.mT, h2).mT
    torch.testing.assert_close(mixer(x)[0], mixer.output(z), rtol=0, atol=1e-12)


@pytest.mark.parametrize("products_up_to", [0, math.inf])
@pytest.mark.parametrize("length", [1, 4, 9])
def test_heads_are_convolved_outer_products(
    products_up_to: float, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hyena, "PRODUCTS_UP_TO", products_up_to)
    k, v, h = (torch.randn(*shape, 9, dtype=torch.float64) for shape in ((2, 3, 4), (2, 3, 4), (3,)))
    q = torch.randn(2, 3, 4, length, dtype=torch.float64)
    outer = torch.einsum("bmit,bmjt->bijmt", k, v)
    expected = torch.einsum("bmit,bijmt->bmjt", q, direct(outer, h)[..., -length:])
    torch.testing.assert_close(multi_head_convolution(q, k, v, h), expected, rtol=0, atol=1e-12)
    one = [t[:1].clone().requires_grad_() for t in (q, k, v)]
    assert torch.autograd.gradcheck(multi_head_convolution, (*one, h.requires_grad_()))


@pytest.mark.parametrize("products_up_to", [0, 2])
def test_heads_of_one_channel_are_the_plain_layer(products_up_to: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hyena, "PRODUCTS_UP_TO", products_up_to)
    plain, heads = layer(), layer(num_heads=6)
    heads.load_state_dict(plain.state_dict())
    x = torch.randn(2, 11, 6, dtype=torch.float64)
    torch.testing.assert_close(heads(x)[0], plain(x)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_is_causal(options: dict[str, int]) -> None:
    mixer, x = layer(**options), torch.randn(2, 12, 6, dtype=torch.float64)
    changed = x.clone()
    changed[:, 7:] = 100 * torch.randn(2, 5, 6, dtype=torch.float64)
    before, after = mixer(x)[0], mixer(changed)[0]
    torch.testing.assert_close(after[:, :7], before[:, :7], rtol=0, atol=1e-10)
    assert (after[:, 7:] - before[:, 7:]).abs().min() > 1e-6


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("lengths", [[1] * 8, [5, 3], [1, 4, 1, 2]])
def test_continues_from_its_state(options: dict[str, int], lengths: list[int]) -> None:
    mixer, x = layer(**options), torch.randn(2, 8, 6, dtype=torch.float64)
    pieces, state = [], None
    for piece in x.split(lengths, dim=1):
        y, state = mixer(piece, state, keep_state=True)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, dim=1), mixer(x)[0], rtol=0, atol=1e-12)
    assert mixer(x)[1] is None


def test_gradients_flow_through_the_state() -> None:
    mixer, x = layer(num_heads=2), torch.randn(1, 6, 6, dtype=torch.float64, requires_grad=True)

    def in_two(x: Tensor, *, cut: bool) -> Tensor:
        first, state = mixer(x[:, :4], keep_state=True)
        second, _ = mixer(x[:, 4:], detach_state(state) if cut else state)
        return torch.cat([first, second], dim=1).square().sum()

    (whole,) = torch.autograd.grad(mixer(x)[0].square().sum(), x)
    (parts,) = torch.autograd.grad(in_two(x, cut=False), x)
    (truncated,) = torch.autograd.grad(in_two(x, cut=True), x)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-10)
    assert (truncated - whole)[:, :4].abs().max() > 1e-3


def test_number_of_parameters() -> None:
    # Projections and short convolution with biases; filter of three linear maps, sine frequencies, and skip.
    filters = (5 * 5 + 5) + (5 * 5 + 5) + 5
    for options, num_projections, num_filters in (({}, 3, 6), ({"order": 3}, 4, 12), ({"num_heads": 2}, 3, 2)):
        size = 6 * num_projections
        expected = (6 * size + size) + 4 * size + filters + 5 * num_filters + num_filters + 6 * 7
        assert sum(parameter.numel() for parameter in layer(**options).parameters()) == expected


def test_a_language_model_leaves_the_filters_their_beginning() -> None:
    mixer = LanguageModel(10, 8, 1, lambda _: Hyena(8, max_length=16)).blocks[0].mixer
    assert mixer.filter.layers[1].weight.std().item() == pytest.approx((1 / (3 * 64)) ** 0.5, rel=0.1)
    assert (mixer.filter.frequency == 14).all()
    assert mixer.input.weight.std().item() == pytest.approx(0.02, rel=0.2)


def test_autocast_does_not_round_the_filters() -> None:
    mixer, x = Hyena(8, max_length=512), torch.randn(1, 512, 8)
    expected = mixer.filter(512)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(mixer.filter(512), expected)
        y, _ = mixer(x)
    torch.testing.assert_close(y.float(), mixer(x)[0], rtol=0, atol=0.05)


def test_clear_errors() -> None:
    mixer = layer(max_length=4)
    _, state = mixer(torch.randn(1, 4, 6).double(), keep_state=True)
    with pytest.raises(UserError, match="max_length = 4 tokens"):
        mixer(torch.randn(1, 1, 6).double(), state)
    with pytest.raises(UserError, match="order of at least 2"):
        layer(order=1)
    with pytest.raises(UserError, match="multiple of num_heads"):
        layer(num_heads=4)
    with pytest.raises(UserError, match="order 2"):
        layer(order=3, num_heads=2)
    with pytest.raises(UserError, match="max_length"):
        layer(max_length=0)
    with pytest.raises(UserError, match="number of layers"):
        ImplicitFilter(3, 4, num_layers=1)
