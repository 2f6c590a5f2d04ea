from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.tests.comparing import Run, hold, relative_error, values_and_gradients

from .. import cpu, gla
from ..cpu import gla_cpu
from ..reference import gla_reference
from .common import FORMS, hold_against_reference, inputs


def in_chunks_of(chunk_size: int) -> Run:
    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor | None = None,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        scale = q.shape[-1] ** -0.5
        return gla_cpu(q, k, v, g, scale, initial_state, output_final_state, cu_seqlens, chunk_size=chunk_size)

    return run


@pytest.mark.parametrize(
    ("length", "key_dim", "value_dim"),
    [(1, 12, 24), (15, 60, 64), (63, 33, 17), (64, 60, 64), (65, 33, 17), (130, 60, 64)],
)
@pytest.mark.parametrize(
    ("form", "normalizer"),
    [("none", 1.0), *((form, normalizer) for form in FORMS[1:] for normalizer in (0.1, 1.0, 10.0))],
)
def test_values_and_gradients_are_those_of_the_recurrence(
    form: str, length: int, key_dim: int, value_dim: int, normalizer: float
) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        values = inputs(form, 1, length, 2, key_dim, value_dim, normalizer=normalizer, dtype=dtype)
        hold_against_reference(gla, values)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    form=st.sampled_from(FORMS),
    batch=st.integers(1, 3),
    length=st.integers(1, 40),
    heads=st.integers(1, 3),
    key_dim=st.integers(1, 9),
    value_dim=st.integers(1, 9),
    chunk_size=st.sampled_from([1, 2, 4, 8, 16, 32]),
    segment=st.sampled_from([1, 2**8, 2**17]),
    normalizer=st.sampled_from([0.002, 0.1, 1.0, 16.0]),
)
def test_any_shape_chunk_and_segment(
    form: str,
    batch: int,
    length: int,
    heads: int,
    key_dim: int,
    value_dim: int,
    chunk_size: int,
    segment: int,
    normalizer: float,
) -> None:
    values = inputs(form, batch, length, heads, key_dim, value_dim, normalizer=normalizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "_SEGMENT_ELEMENTS", segment)
        hold_against_reference(in_chunks_of(chunk_size), values)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form: str) -> None:
    values = inputs(form, batch=1, length=5, heads=2, key_dim=2, value_dim=3)
    names, leaves = zip(*((name, value.requires_grad_()) for name, value in values.items()), strict=True)

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor | None]:
        return in_chunks_of(2)(**dict(zip(names, tensors, strict=True)), output_final_state=True)

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("form", ["constant", "scalar", "vector"])
@pytest.mark.parametrize("gate", ["deep", "single", "mixed", "closed"])
def test_strong_gates_stay_finite_and_exact(form: str, gate: str, dtype: torch.dtype) -> None:
    values = inputs(form, 1, 70, 2, 6, 5, dtype=dtype)
    g = values["g"]
    if gate == "deep":
        g.fill_(-1e4)
    elif gate == "single":
        g.flatten()[g.numel() // 3] = -1e4
    elif gate == "mixed":
        # Some channels forget at once, some never, the rest in between.
        gates = torch.tensor([-300.0, 0.0, -20.0, -1e-3, -1.0, -1e4, -5.0], dtype=dtype)
        g.copy_(gates.repeat(g.numel())[: g.numel()].view_as(g))
    else:
        g.fill_(-torch.inf)
    hold_against_reference(gla, values)


def test_a_strong_gate_takes_no_digits_from_its_neighbors() -> None:
    # In float32 a running sum through -1e4 would leave three digits to the gates after it.
    values = inputs("vector", 1, 64, 1, 8, 8, normalizer=10.0, dtype=torch.float32)
    values["g"][:, 20] = -1e4
    hold_against_reference(gla, values)


@pytest.mark.parametrize("size", [1, 4, 16, 64])
def test_blocks_are_as_large_as_the_gates_allow(size: int) -> None:
    gate = torch.full((2, 64, 3), -80.0 / size)
    assert cpu._block_size(gate) == size


@pytest.mark.parametrize("length", [32, 50])
def test_equal_gates_mean_the_same_in_every_form(length: int) -> None:
    constant = inputs("constant", length=length)
    scalar = {**constant, "g": constant["g"].expand(2, length, 2)}
    vector = {**constant, "g": constant["g"][:, None].expand(2, length, 2, 5)}
    results = [values_and_gradients(gla, values) for values in (constant, scalar, vector)]
    results[1]["g"] = results[1]["g"].sum((0, 1))
    results[2]["g"] = results[2]["g"].sum((0, 1, 3))
    hold(results[1], results[0], 1e-10)
    hold(results[2], results[0], 1e-10)


def test_an_open_gate_is_no_gate() -> None:
    values = inputs("vector", length=50)
    open_gate = values_and_gradients(gla, {**values, "g": torch.zeros_like(values["g"])})
    del values["g"], open_gate["g"]
    hold(open_gate, values_and_gradients(gla, values), 1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_chunk_size_changes_nothing(form: str) -> None:
    values = inputs(form, length=37)
    expected = values_and_gradients(gla, values)
    for chunk_size in (1, 8, 128):
        hold(values_and_gradients(in_chunks_of(chunk_size), values), expected, 1e-10)


def test_chunk_size_is_a_power_of_two() -> None:
    with pytest.raises(ValueError, match="power of two"):
        in_chunks_of(24)(**inputs("none"))


@pytest.mark.parametrize("form", FORMS)
def test_a_sequence_may_be_split_and_its_state_handed_over(form: str) -> None:
    def in_two(
        q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, initial_state: Tensor | None = None, **_: bool
    ) -> tuple[Tensor, Tensor | None]:
        outputs, state = [], initial_state
        for part in (slice(0, 33), slice(33, None)):
            gate = g if g is None or g.ndim == 1 else g[:, part]
            o, state = gla(q[:, part], k[:, part], v[:, part], gate, initial_state=state, output_final_state=True)
            outputs.append(o)
        return torch.cat(outputs, dim=1), state

    values = inputs(form, length=50)
    hold(values_and_gradients(in_two, values), values_and_gradients(gla, values), 1e-10)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("integers", [torch.int32, torch.int64])
def test_sequences_end_to_end_are_those_sequences_alone(form: str, integers: torch.dtype) -> None:
    values = inputs(form, 1, 90, sequences=4)
    bounds = torch.tensor([0, 1, 40, 57, 90], dtype=integers)
    hold_against_reference(in_chunks_of(16), values, cu_seqlens=bounds)
    hold_against_reference(gla, values, cu_seqlens=bounds)


def test_inputs_need_not_be_contiguous() -> None:
    values = inputs("vector", length=20)
    strided = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in values.items()}
    assert not strided["q"].is_contiguous()
    hold(values_and_gradients(gla, strided), values_and_gradients(gla, values), 1e-12)


def test_only_the_gradients_that_are_asked_for() -> None:
    values = inputs("vector")
    expected = values_and_gradients(gla_reference, values)
    values["v"].requires_grad_()
    _, state = gla(**values, output_final_state=True)
    generator = torch.Generator().manual_seed(1)
    torch.randn(values["v"].shape, generator=generator, dtype=torch.float64)
    (state * torch.randn(state.shape, generator=generator, dtype=torch.float64)).sum().backward()
    assert values["q"].grad is None
    assert values["g"].grad is None
    only_state = {**values, "q": torch.zeros_like(values["q"])}
    assert relative_error(values["v"].grad, values_and_gradients(gla_reference, only_state)["v"]) < 1e-10
    assert relative_error(values["v"].grad, expected["v"]) > 1e-3


@pytest.mark.parametrize("normalizer", [0.1, 16.0])
def test_nothing_is_kept_without_gradients(normalizer: float) -> None:
    values = inputs("vector", length=40, normalizer=normalizer)
    arguments = (values["q"], values["k"], values["v"], values["g"], 1.0, None, None, 16)
    assert cpu._gla(*arguments, False)[2].numel() == 0
    assert cpu._gla(*arguments, True)[2].numel() > 0
    values["q"].requires_grad_()
    with torch.no_grad():
        o, _ = gla(**values)
    assert not o.requires_grad


def test_a_second_derivative_is_refused() -> None:
    values = inputs("vector")
    values["q"].requires_grad_()
    o, _ = gla(**values)
    (gradient,) = torch.autograd.grad(o.square().sum(), values["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="gla has no second derivative"):
        gradient.sum().backward()


def test_nan_stays_visible() -> None:
    values = inputs("vector", length=20)
    values["g"][0, 5] = torch.nan
    o, _ = gla(**values)
    assert o[0, 5:].isnan().all()
    assert o[0, :5].isfinite().all()
