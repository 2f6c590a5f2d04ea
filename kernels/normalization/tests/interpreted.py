"""Checks of the Triton path in Triton's interpreter, on CPU tensors: `TRITON_INTERPRET=1 pytest interpreted.py`.

Run by `test_gpu.py` in a process of its own, since the variable counts only before triton is first imported.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.normalization.reference import l2_norm_reference, rms_norm_gated_reference

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}


def relative_errors(
    shape: tuple[int, ...], dtype: torch.dtype, *, norm: str, gate: bool, weight: bool, device: str = "cpu"
) -> dict[str, float]:
    """‖x - reference‖ / ‖reference‖ of y and of all gradients, against the definition in float64."""
    from kernels.normalization.gpu import l2_norm_gpu, rms_norm_gated_gpu

    generator = torch.Generator().manual_seed(0)
    shapes = {"x": shape, **({"gate": shape} if gate else {}), **({"weight": shape[-1:]} if weight else {})}
    tensors = {name: torch.randn(s, generator=generator).to(device, dtype) for name, s in shapes.items()}
    grad_y = torch.randn(shape, generator=generator).to(device, dtype)

    def run(functions: dict[str, object], leaves: dict[str, Tensor], grad: Tensor) -> list[Tensor]:
        leaves = {name: x.detach().clone().requires_grad_() for name, x in leaves.items()}
        if norm == "l2":
            y = functions["l2"](leaves["x"], 1e-6)
        else:
            y = functions["rms"](leaves["x"], leaves.get("gate"), leaves.get("weight"), 1e-5)
        return [y, *torch.autograd.grad(y, list(leaves.values()), grad)]

    results = run({"l2": l2_norm_gpu, "rms": rms_norm_gated_gpu}, tensors, grad_y)
    exact = {name: x.double() for name, x in tensors.items()}
    expected = run({"l2": l2_norm_reference, "rms": rms_norm_gated_reference}, exact, grad_y.double())
    assert [x.dtype for x in results] == [dtype] * len(results)
    pairs = zip(("y", *tensors), results, expected, strict=True)
    return {name: ((x.double() - y).norm() / y.norm()).item() for name, x, y in pairs}


def assert_close(errors: dict[str, float], tolerance: float) -> None:
    """All errors within the tolerance (NaN is not)."""
    assert not {name: error for name, error in errors.items() if not error <= tolerance}


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((6,), torch.float32), ((3, 5, 33), torch.float32), ((70, 60), torch.float64), ((2, 9, 64), torch.float16)],
)
@pytest.mark.parametrize(("gate", "weight"), [(False, False), (True, False), (False, True), (True, True)])
def test_rms_norm_is_its_definition(shape: tuple[int, ...], dtype: torch.dtype, gate: bool, weight: bool) -> None:
    assert_close(relative_errors(shape, dtype, norm="rms", gate=gate, weight=weight), TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("shape", "dtype"), [((7,), torch.float32), ((2, 3, 33), torch.float32), ((5, 64), torch.float64)]
)
def test_l2_norm_is_its_definition(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_close(relative_errors(shape, dtype, norm="l2", gate=False, weight=False), TOLERANCE[dtype])


def test_bfloat16_is_summed_up_in_float32() -> None:
    # The interpreter truncates to bfloat16 where a GPU rounds, which doubles the error.
    errors = relative_errors((40, 256), torch.bfloat16, norm="rms", gate=True, weight=True)
    assert_close(errors, 2 * TOLERANCE[torch.bfloat16])


def test_programs_that_take_several_blocks_of_rows_miss_none(monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels.normalization import gpu

    monkeypatch.setattr(gpu, "MAX_PROGRAMS", 3)
    monkeypatch.setattr(gpu, "TILE", 64)
    assert_close(relative_errors((29, 20), torch.float32, norm="rms", gate=True, weight=True), 1e-5)


def test_zero_rows_and_zero_vectors_are_no_trouble() -> None:
    from kernels.normalization.gpu import l2_norm_gpu, rms_norm_gated_gpu

    x = torch.zeros(3, 8, requires_grad=True)
    y = l2_norm_gpu(x, 1e-6)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, torch.zeros(3, 8))
    assert torch.isfinite(gradient).all()
    weight = torch.ones(8, requires_grad=True)
    empty = rms_norm_gated_gpu(torch.zeros(0, 8), None, weight, 1e-5)
    assert empty.shape == (0, 8)
    assert torch.equal(torch.autograd.grad(empty.sum(), weight)[0], torch.zeros(8))


def test_inputs_need_not_be_contiguous_and_long_rows_take_the_other_path(monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels.normalization import gpu

    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(0)).T
    expected = rms_norm_gated_reference(x, x, None, 1e-5)
    torch.testing.assert_close(gpu.rms_norm_gated_gpu(x, x, None, 1e-5), expected)
    monkeypatch.setattr(gpu, "MAX_CHANNELS", 4)
    torch.testing.assert_close(gpu.rms_norm_gated_gpu(x, x, None, 1e-5), expected)
    torch.testing.assert_close(gpu.l2_norm_gpu(x, 1e-6), l2_norm_reference(x, 1e-6))


def test_torch_is_told_the_right_shapes() -> None:
    from kernels.normalization.gpu import normalize_backward, normalize_forward

    x, weight = torch.randn(2, 3, 8), torch.randn(8)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    for companions in ((None, None), (x.clone(), weight)):
        torch.library.opcheck(normalize_forward, (x, *companions, 8, 1e-5), test_utils=checks)
        torch.library.opcheck(normalize_backward, (x, *companions, x.clone(), 8, 1e-5), test_utils=checks[:2])
