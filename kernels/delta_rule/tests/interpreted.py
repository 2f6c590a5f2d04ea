"""Checks of the Triton path in Triton's interpreter, on CPU tensors: `TRITON_INTERPRET=1 pytest interpreted.py`.

The variable counts only before triton is first imported, which other tests may have done; so `test_gpu.py` runs this
file in a process of its own. `relative_errors` also serves the native tests there, and imports triton only when called.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from kernels.delta_rule.reference import delta_rule_reference

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}


def inputs(
    length: int,
    key_dim: int,
    value_dim: int,
    *,
    batch: int = 1,
    heads: int = 1,
    num_sequences: int | None = None,
    repeats: int = 1,
    largest_beta: float = 2.0,
) -> list[Tensor]:
    """q, k, v, β and the initial state in float64; q and k of length one, each key `repeats` times in a row."""
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    k = functional.normalize(normal(batch, length, heads, key_dim), dim=-1)
    return [
        functional.normalize(normal(batch, length, heads, key_dim), dim=-1),
        k[:, torch.arange(length) // repeats],
        normal(batch, length, heads, value_dim),
        largest_beta * torch.rand(batch, length, heads, generator=generator, dtype=torch.float64),
        normal(num_sequences or batch, heads, key_dim, value_dim),
    ]


def relative_errors(
    tensors: list[Tensor | None],
    dtype: torch.dtype,
    *,
    chunk_size: int | None = None,
    bounds: list[int] | None = None,
    device: str = "cpu",
) -> dict[str, float]:
    """‖x - reference‖ / ‖reference‖ of the outputs and all gradients, against the float64 recurrence."""
    from kernels.delta_rule.gpu import delta_rule_gpu

    q, k, v, beta, state = tensors
    # What the reference sees is what the kernels see: rounding the inputs is no error of theirs.
    rounded = [x.to(device, dtype) for x in (q, k, v, beta)]
    if state is not None:
        rounded.append(state.to(device, torch.promote_types(dtype, torch.float32)))
    cu_seqlens = None if bounds is None else torch.tensor(bounds, device=device)
    scale = 1.5 * q.shape[-1] ** -0.5
    exact = [x.double().requires_grad_() for x in rounded]
    given = [x.clone().requires_grad_() for x in rounded]
    results = delta_rule_gpu(
        *given[:4], scale, None if state is None else given[4], True, cu_seqlens, chunk_size=chunk_size
    )
    expected = delta_rule_reference(
        *exact[:4],
        scale=scale,
        initial_state=None if state is None else exact[4],
        output_final_state=True,
        cu_seqlens=cu_seqlens,
    )
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator).to(device, x.dtype) for x in results]
    gradients = torch.autograd.grad(results, given, weights)
    expected_gradients = torch.autograd.grad(expected, exact, [w.double() for w in weights])
    names = ["o", "final state", "dq", "dk", "dv", "dbeta", "d initial state"][: 2 + len(given)]
    pairs = zip((*results, *gradients), (*expected, *expected_gradients), strict=True)
    return {name: ((x.double() - y).norm() / y.norm()).item() for name, (x, y) in zip(names, pairs, strict=True)}


def assert_close(errors: dict[str, float], tolerance: float) -> None:
    """All errors within the tolerance (NaN is not)."""
    assert not {name: error for name, error in errors.items() if not error <= tolerance}


@pytest.fixture(autouse=True)
def _round_to_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter truncates to bfloat16, with twice the error of a GPU, which rounds to nearest."""
    from triton import language as tl
    from triton.runtime import interpreter

    cast = interpreter.InterpreterBuilder.cast_impl

    def rounding_cast(self: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar != tl.float32 or target.scalar != tl.bfloat16:
            return cast(self, source, target)
        bits = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16().view(torch.int16).numpy()
        return interpreter.TensorHandle(bits.view(np.uint16), tl.bfloat16)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "cast_impl", rounding_cast)


@pytest.mark.parametrize(
    ("length", "key_dim", "value_dim", "batch", "heads", "chunk_size", "repeats", "dtype"),
    [
        (1, 12, 24, 2, 2, None, 1, torch.float32),
        (17, 12, 24, 2, 1, 16, 1, torch.float32),
        (40, 33, 17, 1, 1, 16, 1, torch.float32),
        (70, 64, 64, 1, 1, 32, 1, torch.float32),
        (70, 33, 17, 1, 1, 64, 5, torch.float32),
        (40, 33, 17, 1, 1, 16, 5, torch.float16),
        (40, 33, 17, 1, 1, 16, 5, torch.bfloat16),
        (17, 12, 24, 1, 2, None, 1, torch.bfloat16),
        (70, 64, 64, 1, 1, 64, 1, torch.bfloat16),
    ],
)
def test_values_and_gradients_are_those_of_the_recurrence(
    length: int,
    key_dim: int,
    value_dim: int,
    batch: int,
    heads: int,
    chunk_size: int | None,
    repeats: int,
    dtype: torch.dtype,
) -> None:
    tensors = inputs(length, key_dim, value_dim, batch=batch, heads=heads, repeats=repeats)
    assert_close(relative_errors(tensors, dtype, chunk_size=chunk_size), TOLERANCE[dtype])


def test_without_an_initial_state_it_is_zero() -> None:
    *tensors, _state = inputs(20, 12, 24)
    assert_close(relative_errors([*tensors, None], torch.float32, chunk_size=16), 1e-5)


@pytest.mark.parametrize("chunk_size", [16, 64])
def test_one_key_over_and_over_keeps_the_inverse_exact(chunk_size: int) -> None:
    """All keys equal and β near 1, where the entries of (I + L)⁻¹ cancel the most."""
    tensors = inputs(50, 12, 24, repeats=50)
    tensors[3] = 1 - 0.01 * tensors[3]
    assert_close(relative_errors(tensors, torch.float32, chunk_size=chunk_size), 1e-5)


def test_beta_zero_leaves_the_state_alone_and_has_a_gradient() -> None:
    tensors = inputs(20, 12, 24)
    tensors[3][:, ::2] = 0
    assert_close(relative_errors(tensors, torch.float32, chunk_size=16), 1e-5)


def test_sequences_laid_end_to_end_do_not_see_each_other() -> None:
    tensors = inputs(38, 12, 16, num_sequences=4)
    assert_close(relative_errors(tensors, torch.float32, chunk_size=16, bounds=[0, 1, 5, 22, 38]), 1e-5)


def test_inputs_need_not_be_contiguous() -> None:
    from kernels.delta_rule.gpu import delta_rule_gpu

    tensors = [x.float() for x in inputs(17, 12, 24, heads=2)]
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    assert not any(x.is_contiguous() for x in strided)
    for x, y in zip(*(delta_rule_gpu(*x[:4], 1.0, x[4], True) for x in (tensors, strided)), strict=True):
        assert torch.equal(x, y)


def test_a_final_state_alone_can_be_differentiated() -> None:
    from kernels.delta_rule.gpu import delta_rule_gpu

    q, k, v, beta, _state = (x.float() for x in inputs(17, 12, 24))
    k.requires_grad_()
    (gradient,) = torch.autograd.grad(delta_rule_gpu(q, k, v, beta, 1.0, None, True)[1].sum(), k)
    (expected,) = torch.autograd.grad(delta_rule_reference(q, k, v, beta, output_final_state=True)[1].sum(), k)
    torch.testing.assert_close(gradient, expected)


def test_gradients_have_the_types_of_their_inputs() -> None:
    from kernels.delta_rule.gpu import delta_rule_gpu

    q, k, v, beta, state = inputs(5, 12, 24)
    leaves = [q.half(), k.half(), v.half(), beta.float(), state]
    leaves = [x.requires_grad_() for x in leaves]
    o, final_state = delta_rule_gpu(*leaves[:4], 1.0, leaves[4], True, chunk_size=16)
    assert (o.dtype, final_state.dtype) == (torch.float16, torch.float32)
    gradients = torch.autograd.grad(o.sum() + final_state.sum(), leaves)
    assert [x.dtype for x in gradients] == [x.dtype for x in leaves]


def test_float64_takes_the_path_that_has_it() -> None:
    tensors = inputs(20, 12, 24)
    assert_close(relative_errors(tensors, torch.float64, chunk_size=16), 1e-10)


def test_inputs_that_do_not_fit_are_named() -> None:
    from kernels.delta_rule.gpu import delta_rule_gpu

    q, k, v, beta, _state = (x.float() for x in inputs(4, 257, 16))
    with pytest.raises(ValueError, match=r"up to 256.*given: 257"):
        delta_rule_gpu(q, k, v, beta, 1.0)
    q, k = q[..., :16], k[..., :16]
    with pytest.raises(ValueError, match=r"chunk_size.*16, 32, 64.*given: 48"):
        delta_rule_gpu(q, k, v, beta, 1.0, chunk_size=48)
    with pytest.raises(TypeError, match=r"one dtype.*float16"):
        delta_rule_gpu(q, k.half(), v, beta, 1.0)


def test_torch_compile_sees_one_graph() -> None:
    from kernels.delta_rule.gpu import delta_rule_gpu

    def run(*x: Tensor) -> list[Tensor]:
        return [*delta_rule_gpu(*x[:4], 1.0, x[4], True, chunk_size=16)]

    tensors = [x.float().requires_grad_() for x in inputs(5, 12, 24)]
    results, expected = (f(*tensors) for f in (torch.compile(run, fullgraph=True, backend="aot_eager"), run))
    for values in (results, expected):
        values.extend(torch.autograd.grad(values[0].sum() + values[1].sum(), tensors))
    torch.testing.assert_close(results, expected)


@pytest.mark.parametrize("output_final_state", [False, True])
def test_shapes_that_tracing_is_told_are_those_of_the_results(output_final_state: bool) -> None:
    """torch.compile lays out what follows by them, without a run."""
    from kernels.delta_rule.gpu import delta_rule_backward, delta_rule_forward

    q, k, v, beta, state = (x.float() for x in inputs(1, 12, 24))
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    initial_state = state if output_final_state else None
    arguments = (q, k, v, beta, initial_state, None, 1.0, output_final_state, 16)
    torch.library.opcheck(delta_rule_forward, arguments, test_utils=checks)
    inverse = delta_rule_forward(*arguments)[2]
    arguments = (q, k, v, beta, inverse, initial_state, None, v, initial_state, 1.0, 16)
    torch.library.opcheck(delta_rule_backward, arguments, test_utils=checks[:2])
