"""Checks of the Triton path in Triton's interpreter, on CPU tensors: `TRITON_INTERPRET=1 pytest interpreted.py`.

The variable counts only before triton is first imported, which other tests may have done; so `test_gpu.py` runs this
file in a process of its own. `relative_errors` also serves the native tests there, and imports triton only when called.
"""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor

from kernels.linear_attention.reference import gla_reference

Gate = Literal["none", "constant", "scalar", "vector"]
GATES: tuple[Gate, ...] = ("none", "constant", "scalar", "vector")
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}


def inputs(
    gate: Gate,
    length: int,
    key_dim: int,
    value_dim: int,
    *,
    batch: int = 1,
    heads: int = 1,
    num_sequences: int | None = None,
    depth: float | None = None,
) -> list[Tensor | None]:
    """q, k, v, g and the initial state in float64; `depth` d draws log gates from -d·u², u uniform."""
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    gate_shape = {"constant": (heads,), "scalar": (batch, length, heads), "vector": (batch, length, heads, key_dim)}
    g = None
    if gate != "none" and depth is None:
        g = torch.nn.functional.logsigmoid(normal(*gate_shape[gate]))
    elif gate != "none":
        g = -depth * torch.rand(gate_shape[gate], generator=generator, dtype=torch.float64).square()
    return [
        normal(batch, length, heads, key_dim),
        normal(batch, length, heads, key_dim),
        normal(batch, length, heads, value_dim),
        g,
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
    from kernels.linear_attention.gpu import gla_gpu

    q, k, v, g, state = tensors
    rounded = [None if x is None else x.to(device, dtype) for x in (q, k, v, g)]
    # What the reference sees is what the kernels see: rounding the inputs is no error of theirs.
    rounded.append(state.to(device, torch.promote_types(dtype, torch.float32)))
    cu_seqlens = None if bounds is None else torch.tensor(bounds, device=device)
    scale = 1.5 * q.shape[-1] ** -0.5
    exact = [None if x is None else x.double().requires_grad_() for x in rounded]
    given = [None if x is None else x.clone().requires_grad_() for x in rounded]
    results = gla_gpu(*given[:4], scale, given[4], True, cu_seqlens, chunk_size=chunk_size)
    expected = gla_reference(
        *exact[:4], scale=scale, initial_state=exact[4], output_final_state=True, cu_seqlens=cu_seqlens
    )
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator).to(device, x.dtype) for x in results]
    gradients = torch.autograd.grad(results, [x for x in given if x is not None], weights)
    expected_gradients = torch.autograd.grad(
        expected, [x for x in exact if x is not None], [w.double() for w in weights]
    )
    inputs_given = zip(("q", "k", "v", "g", "initial state"), exact, strict=True)
    names = ["o", "final state", *(f"d {name}" for name, x in inputs_given if x is not None)]
    pairs = zip((*results, *gradients), (*expected, *expected_gradients), strict=True)
    return {name: ((x.double() - y).norm() / y.norm()).item() for name, (x, y) in zip(names, pairs, strict=True)}


def assert_close(errors: dict[str, float], tolerance: float) -> None:
    """All errors within the tolerance (NaN is not)."""
    assert not {name: error for name, error in errors.items() if not error <= tolerance}


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(
    ("length", "key_dim", "value_dim", "batch", "heads", "chunk_size", "dtype"),
    [
        (1, 12, 24, 2, 2, None, torch.float32),
        (17, 33, 17, 1, 1, 16, torch.float64),
        (40, 64, 64, 1, 1, 32, torch.float32),
        (33, 12, 24, 1, 1, None, torch.float16),
        (17, 12, 24, 1, 1, 16, torch.bfloat16),
    ],
)
def test_values_and_gradients_are_those_of_the_recurrence(
    gate: Gate,
    length: int,
    key_dim: int,
    value_dim: int,
    batch: int,
    heads: int,
    chunk_size: int | None,
    dtype: torch.dtype,
) -> None:
    tensors = inputs(gate, length, key_dim, value_dim, batch=batch, heads=heads)
    # The interpreter truncates to bfloat16 where a GPU rounds, which doubles the error.
    tolerance = TOLERANCE[dtype] * (2 if dtype == torch.bfloat16 else 1)
    assert_close(relative_errors(tensors, dtype, chunk_size=chunk_size), tolerance)


@pytest.mark.parametrize("gate", ["constant", "scalar", "vector"])
@pytest.mark.parametrize("chunk_size", [16, 64])
def test_strong_gates_cost_no_precision(gate: Gate, chunk_size: int) -> None:
    """Within a chunk the decays reach exp(-500), far below the smallest float32; near 1 they keep their digits."""
    # The gradient of a constant is a sum of T terms of either sign: several heads, so that not all of it can cancel.
    tensors = inputs(gate, 36, 12, 24, heads=4 if gate == "constant" else 1, depth=50.0)
    if gate != "constant":
        tensors[3].view(-1)[7::13] = -torch.inf  # forgets all
    assert_close(relative_errors(tensors, torch.float32, chunk_size=chunk_size), 1e-5)


@pytest.mark.parametrize("gate", GATES)
def test_sequences_laid_end_to_end_do_not_see_each_other(gate: Gate) -> None:
    tensors = inputs(gate, 34, 12, 24, num_sequences=3)
    assert_close(relative_errors(tensors, torch.float32, chunk_size=16, bounds=[0, 1, 18, 34]), 1e-5)


def test_an_empty_sequence_hands_its_state_on() -> None:
    from kernels.linear_attention.gpu import gla_gpu

    q, k, v, g, state = inputs("scalar", 20, 12, 24, num_sequences=3)
    bounds = torch.tensor([0, 4, 4, 20])
    o, final_state = gla_gpu(q, k, v, g, 1.0, state, True, bounds)
    without, final_state_without = gla_gpu(q, k, v, g, 1.0, state[[0, 2]], True, bounds[[0, 1, 3]])
    torch.testing.assert_close(o, without)
    torch.testing.assert_close(final_state, torch.stack([final_state_without[0], state[1], final_state_without[1]]))


def test_inputs_need_not_be_contiguous() -> None:
    from kernels.linear_attention.gpu import gla_gpu

    q, k, v, g, state = inputs("scalar", 17, 12, 24, heads=2)
    o, final_state = gla_gpu(q, k, v, g, 1.0, state, True, None)
    others = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, g, state)]
    assert not any(x.is_contiguous() for x in others)
    strided, strided_final_state = gla_gpu(*others[:4], 1.0, others[4], True, None)
    assert torch.equal(o, strided)
    assert torch.equal(final_state, strided_final_state)


def test_a_final_state_alone_can_be_differentiated() -> None:
    from kernels.linear_attention.gpu import gla_gpu

    q, k, v, g, _ = inputs("scalar", 17, 12, 24)
    k.requires_grad_()
    (gradient,) = torch.autograd.grad(gla_gpu(q, k, v, g, 1.0, None, True, None)[1].sum(), k)
    (expected,) = torch.autograd.grad(gla_reference(q, k, v, g, output_final_state=True)[1].sum(), k)
    torch.testing.assert_close(gradient, expected)


def test_torch_compile_sees_one_graph() -> None:
    from kernels.linear_attention.gpu import gla_gpu

    def run(*x: Tensor) -> list[Tensor]:
        return [*gla_gpu(*x[:4], 1.0, x[4], True, None)]

    tensors = [x.requires_grad_() for x in inputs("constant", 5, 12, 24)]
    results, expected = (f(*tensors) for f in (torch.compile(run, fullgraph=True, backend="aot_eager"), run))
    for values in (results, expected):
        values.extend(torch.autograd.grad(values[0].sum() + values[1].sum(), tensors))
    torch.testing.assert_close(results, expected)


@pytest.mark.parametrize("gate", ["none", "scalar", "vector"])
def test_shapes_that_tracing_is_told_are_those_of_the_results(gate: Gate) -> None:
    """torch.compile lays out what follows by them, without a run."""
    from kernels.linear_attention.gpu import gla_backward, gla_forward

    q, k, v, g, state = inputs(gate, 1, 12, 24)
    arguments = (q, k, v, g, state, None)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(gla_forward, (*arguments, 1.0, gate != "none", 16), test_utils=checks)
    scores = gla_forward(*arguments, 1.0, True, 16)[2]
    torch.library.opcheck(gla_backward, (*arguments, scores, v, state, 1.0, 16), test_utils=checks[:2])
