from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from kernels.short_convolution import short_convolution
from kernels.short_convolution.reference import short_convolution_reference


def example(batch: int, length: int, channels: int, width: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(length)
    shapes = {
        "x": (batch, length, channels),
        "weight": (channels, width),
        "bias": (channels,),
        "initial_state": (batch, channels, width - 1),
    }
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def test_by_hand() -> None:
    x = torch.tensor([1.0, 10.0, 100.0]).view(1, 3, 1)
    weight = torch.tensor([[2.0, 3.0]])
    y, state = short_convolution(x, weight, output_final_state=True)
    assert y.flatten().tolist() == [3.0, 32.0, 320.0]
    assert state.tolist() == [[[100.0]]]
    y, _ = short_convolution(x, weight, initial_state=torch.tensor([[[5.0]]]), bias=torch.tensor([0.5]))
    assert y.flatten().tolist() == [13.5, 32.5, 320.5]


@pytest.mark.parametrize(
    ("length", "width", "activation"), [(1, 4, "silu"), (2, 4, None), (7, 4, "silu"), (5, 1, None), (9, 3, "silu")]
)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)]
)
def test_values_state_and_gradients_are_the_reference(
    length: int, width: int, activation: str | None, dtype: torch.dtype, tolerance: float
) -> None:
    given = {name: tensor.to(dtype) for name, tensor in example(2, length, 3, width).items()}
    inputs = {name: tensor.clone().requires_grad_() for name, tensor in given.items()}
    wide = {name: tensor.double().requires_grad_() for name, tensor in given.items()}
    y, state = short_convolution(**inputs, activation=activation, output_final_state=True)
    expected = short_convolution_reference(**wide, activation=activation)
    assert y.dtype == state.dtype == dtype
    upstream = [torch.randn(tensor.shape).to(dtype) for tensor in (y, state)]
    gradients = torch.autograd.grad((y, state), list(inputs.values()), upstream)
    reference = torch.autograd.grad(expected, list(wide.values()), [tensor.double() for tensor in upstream])
    for result, exact in zip((y, state, *gradients), (*expected, *reference), strict=True):
        assert (result.double() - exact).norm() <= tolerance * exact.norm()


def test_is_a_causal_grouped_convolution() -> None:
    given = example(2, 6, 3, 4)
    expected = functional.conv1d(functional.pad(given["x"].mT, (3, 0)), given["weight"][:, None], groups=3).mT
    torch.testing.assert_close(short_convolution(given["x"], given["weight"])[0], expected)


def test_gradcheck() -> None:
    given = [tensor.requires_grad_() for tensor in example(2, 3, 2, 4).values()]

    def run(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return short_convolution(x, weight, bias=bias, activation="silu", initial_state=state, output_final_state=True)

    assert torch.autograd.gradcheck(run, given)


@pytest.mark.parametrize("pieces", [[1] * 9, [2, 3, 4], [8, 1]])
def test_handing_the_state_over_changes_nothing(pieces: list[int]) -> None:
    given = example(2, 9, 3, 4)
    whole, final = short_convolution(**given, output_final_state=True)
    state, outputs = given.pop("initial_state"), []
    for piece in given.pop("x").split(pieces, dim=1):
        y, state = short_convolution(piece, **given, initial_state=state, output_final_state=True)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole)
    assert torch.equal(state, final)


@pytest.mark.parametrize("with_state", [True, False])
def test_packed_sequences_do_not_see_each_other(with_state: bool) -> None:
    given = example(3, 7, 2, 4)
    states = given.pop("initial_state")
    if not with_state:
        states = None
    lengths, rows = [2, 7, 4], given.pop("x")
    packed = torch.cat([row[:length] for row, length in zip(rows, lengths, strict=True)])[None]
    y, final = short_convolution(
        packed,
        **given,
        initial_state=states,
        output_final_state=True,
        cu_seqlens=torch.tensor([0, 2, 9, 13]),
    )
    for index, (piece, length) in enumerate(zip(y.split(lengths, dim=1), lengths, strict=True)):
        state = None if states is None else states[[index]]
        alone, alone_final = short_convolution(
            rows[[index], :length], **given, initial_state=state, output_final_state=True
        )
        torch.testing.assert_close(piece, alone)
        assert torch.equal(final[[index]], alone_final)


def test_clear_errors() -> None:
    x, weight = torch.randn(2, 5, 3), torch.randn(3, 4)
    with pytest.raises(ValueError, match=r"\[batch, length, channels\]"):
        short_convolution(x[0], weight)
    with pytest.raises(ValueError, match=r"weight \[3, width\]"):
        short_convolution(x, weight.T)
    with pytest.raises(ValueError, match=r"initial_state \[2, 3, 3\]"):
        short_convolution(x, weight, initial_state=torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="silu"):
        short_convolution(x, weight, activation="relu")
    with pytest.raises(TypeError, match="floating-point"):
        short_convolution(x.long(), weight)
    with pytest.raises(ValueError, match="batch 1"):
        short_convolution(x, weight, cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="rise from 0 to the length 5"):
        short_convolution(x[:1], weight, cu_seqlens=torch.tensor([0, 4]))
    with pytest.raises(TypeError, match="integers"):
        short_convolution(x[:1], weight, cu_seqlens=torch.tensor([0.0, 5.0]))
    with pytest.raises(ValueError, match="meta"):
        short_convolution(x, weight.to("meta"))
