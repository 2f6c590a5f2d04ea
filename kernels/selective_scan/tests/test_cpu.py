from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import kernels.selective_scan.cpu as cpu
from kernels.selective_scan import selective_scan
from kernels.selective_scan.reference import selective_scan_reference

NAMES = ("x", "delta", "A", "B", "C", "D", "initial_state")


def example(batch: int, length: int, channels: int, num_states: int, step: float = 0.3) -> list[Tensor]:
    """Inputs of the scan in the order of NAMES; `step` scales delta, and with it the strength of the decay."""
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return [
        normal(batch, length, channels),
        step * functional.softplus(normal(batch, length, channels)),
        -torch.exp(normal(channels, num_states)),
        normal(batch, length, num_states),
        normal(batch, length, num_states),
        normal(channels),
        normal(batch, channels, num_states),
    ]


def run(*inputs: Tensor) -> tuple[Tensor, Tensor]:
    return selective_scan(*inputs[:6], initial_state=inputs[6], output_final_state=True)


def test_by_hand() -> None:
    # One channel, one state: h = h/2 + x, y = 3h + 10x.
    x, ones = torch.tensor([1.0, 2.0]).view(1, 2, 1), torch.ones(1, 2, 1)
    A = torch.tensor([[-math.log(2)]])
    y, state = selective_scan(x, ones, A, ones, 3 * ones, torch.tensor([10.0]), output_final_state=True)
    torch.testing.assert_close(y.flatten(), torch.tensor([13.0, 27.5]))
    torch.testing.assert_close(state.flatten(), torch.tensor([2.5]))
    assert selective_scan(x, ones, A, ones, ones)[1] is None


@pytest.mark.parametrize("length", [1, 7, 64, 65, 131])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_values_and_gradients_are_the_reference(length: int, dtype: torch.dtype, tolerance: float) -> None:
    inputs = [tensor.to(dtype).requires_grad_() for tensor in example(2, length, 5, 3)]
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    out, expected = run(*inputs), selective_scan_reference(*wide)
    upstream = [torch.randn(tensor.shape, dtype=dtype) for tensor in out]
    gradients = torch.autograd.grad(out, inputs, upstream)
    reference = torch.autograd.grad(expected, wide, [tensor.double() for tensor in upstream])
    assert {tensor.dtype for tensor in out} == {dtype}
    for result, exact in zip((*out, *gradients), (*expected, *reference), strict=True):
        assert (result.double() - exact).norm() <= tolerance * exact.norm()


def test_bfloat16_inputs_keep_a_float32_state() -> None:
    inputs = example(2, 40, 4, 3)
    x, delta, A, B, C, D, state = inputs
    half = [tensor.bfloat16() for tensor in (x, delta, B, C)]
    out = selective_scan(
        *half[:2], A.float(), *half[2:], D.float(), initial_state=state.float(), output_final_state=True
    )
    assert (out[0].dtype, out[1].dtype) == (torch.bfloat16, torch.float32)
    for result, exact in zip(out, selective_scan_reference(*inputs), strict=True):
        assert (result.double() - exact).norm() <= 1e-2 * exact.norm()


@pytest.mark.parametrize("chunk_elements", [1, 2**18])
def test_gradcheck(chunk_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "CHUNK_ELEMENTS", chunk_elements)  # 1: chunks of 8 tokens, so that there are several
    assert torch.autograd.gradcheck(run, [tensor.requires_grad_() for tensor in example(2, 11, 2, 2)])


def test_without_skip_and_state() -> None:
    inputs = example(2, 9, 3, 2)[:5]
    y, _ = selective_scan(*inputs)
    torch.testing.assert_close(y, selective_scan_reference(*inputs, None, None)[0])


@pytest.mark.parametrize("step", [50.0, 1e4])
def test_strong_decay_stays_finite_and_exact(step: float) -> None:
    inputs = [tensor.float().requires_grad_() for tensor in example(1, 80, 3, 2, step)]
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    out, expected = run(*inputs), selective_scan_reference(*wide)
    gradients = torch.autograd.grad(out[0].sum(), inputs)
    reference = torch.autograd.grad(expected[0].sum(), wide)
    for result, exact in zip((*out, *gradients), (*expected, *reference), strict=True):
        assert result.isfinite().all()
        assert (result.double() - exact).norm() <= 1e-4 * exact.norm() + 1e-30


@pytest.mark.parametrize("pieces", [[1] * 20, [9, 11], [19, 1]])
def test_handing_the_state_over_changes_nothing(pieces: list[int]) -> None:
    x, delta, A, B, C, D, state = example(2, 20, 3, 2)
    whole, final = run(x, delta, A, B, C, D, state)
    outputs = []
    for parts in zip(*(tensor.split(pieces, dim=1) for tensor in (x, delta, B, C)), strict=True):
        y, state = run(parts[0], parts[1], A, parts[2], parts[3], D, state)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole)
    torch.testing.assert_close(state, final)


def test_operator_registration() -> None:
    x, delta, A, B, C, _, state = (tensor.requires_grad_() for tensor in example(2, 10, 3, 2))
    torch.library.opcheck(torch.ops.reprise.selective_scan.default, (x, delta, A, B, C, state))


def test_autocast_does_not_reach_the_state() -> None:
    inputs = [tensor.float() for tensor in example(2, 16, 4, 3)]
    with torch.autocast("cpu", torch.bfloat16):
        out = run(*inputs)
    for result, plain in zip(out, run(*inputs), strict=True):
        assert torch.equal(result, plain)


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("x", lambda t: t[0], ValueError, r"x \[batch, length, channels\]"),
        ("x", lambda t: t[:, :0], ValueError, "at least one token"),
        ("delta", lambda t: t[:, 1:], ValueError, r"delta \[2, 6, 3\]"),
        ("B", lambda t: t[..., :1], ValueError, r"B \[2, 6, 2\]"),
        ("D", lambda t: t.long(), TypeError, "floating-point D"),
        ("initial_state", lambda t: t.mT, ValueError, r"initial_state \[2, 3, 2\]"),
        ("C", lambda t: t.to("meta"), ValueError, "meta"),
    ],
)
def test_clear_errors(name: str, change: object, error: type[Exception], message: str) -> None:
    inputs = dict(zip(NAMES, example(2, 6, 3, 2), strict=True))
    inputs[name] = change(inputs[name])
    with pytest.raises(error, match=message):
        selective_scan(**inputs)
