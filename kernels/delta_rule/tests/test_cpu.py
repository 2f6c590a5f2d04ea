from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from kernels.tests.comparing import Run, hold, relative_error, values_and_gradients

from .. import cpu, delta_rule
from ..cpu import delta_rule_cpu
from ..reference import delta_rule_reference
from .common import hold_against_reference, inputs

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def in_chunks_of(chunk_size: int) -> Run:
    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        scale = q.shape[-1] ** -0.5
        return delta_rule_cpu(
            q, k, v, beta, scale, initial_state, output_final_state, cu_seqlens, chunk_size=chunk_size
        )

    return run


@pytest.mark.parametrize(
    ("length", "key_dim", "value_dim"),
    [(1, 12, 24), (15, 60, 64), (63, 33, 17), (64, 60, 64), (65, 12, 24), (130, 33, 17)],
)
@pytest.mark.parametrize("keys", ["random", "repeated", "collinear"])
def test_values_and_gradients_are_those_of_the_recurrence(length: int, key_dim: int, value_dim: int, keys: str) -> None:
    for dtype in DTYPES:
        hold_against_reference(delta_rule, inputs(1, length, 2, key_dim, value_dim, keys=keys, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_the_same_key_again_and_again(beta: float, dtype: torch.dtype) -> None:
    # The inverse is at its worst: with beta = 2 its entries are 2 and do not shrink away from the diagonal.
    values = inputs(1, 130, 1, 16, 16, dtype=torch.float64)
    values["k"] = values["k"][:, :1].expand_as(values["k"])
    values["beta"] = torch.full_like(values["beta"], beta)
    values = {name: x.to(dtype) for name, x in values.items()}
    hold_against_reference(in_chunks_of(64), values)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 40),
    heads=st.integers(1, 3),
    key_dim=st.integers(1, 9),
    value_dim=st.integers(1, 9),
    chunk_size=st.integers(1, 33),
    segment=st.sampled_from([1, 2**8, 2**17]),
    keys=st.sampled_from(["random", "repeated", "collinear"]),
)
def test_any_shape_chunk_and_segment(
    batch: int, length: int, heads: int, key_dim: int, value_dim: int, chunk_size: int, segment: int, keys: str
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "SEGMENT_ELEMENTS", segment)
        patch.setattr(cpu, "SEGMENT_CHUNKS", 1)
        values = inputs(batch, length, heads, key_dim, value_dim, keys=keys)
        hold_against_reference(in_chunks_of(chunk_size), values)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    chunk_size=st.sampled_from([1, 4, 7, 16]),
    segment=st.sampled_from([1, 2**8, 2**17]),
    dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_sequences_laid_end_to_end_do_not_see_each_other(
    lengths: list[int], chunk_size: int, segment: int, dtype: torch.dtype
) -> None:
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(dtype)
    values = inputs(1, sum(lengths), sequences=len(lengths))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "SEGMENT_ELEMENTS", segment)
        patch.setattr(cpu, "SEGMENT_CHUNKS", 1)
        together = values_and_gradients(in_chunks_of(chunk_size), values, cu_seqlens=cu_seqlens)
    hold(together, values_and_gradients(delta_rule_reference, values, cu_seqlens=cu_seqlens), 1e-10)
    o, states = delta_rule(**values, output_final_state=True, cu_seqlens=cu_seqlens)
    for i, (start, length) in enumerate(zip(cu_seqlens.tolist(), lengths, strict=False)):
        alone = {name: x[:, start : start + length] for name, x in values.items() if name != "initial_state"}
        expected, state = delta_rule(**alone, initial_state=values["initial_state"][i : i + 1], output_final_state=True)
        torch.testing.assert_close(o[:, start : start + length], expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(states[i : i + 1], state, rtol=1e-10, atol=1e-12)


def test_padding_does_not_carry_nan_from_one_sequence_to_another() -> None:
    values = inputs(1, 20, sequences=2)
    for name in ("q", "k", "v", "beta"):
        values[name][:, :9] = torch.nan
    o, states = delta_rule(**values, output_final_state=True, cu_seqlens=torch.tensor([0, 9, 20]))
    assert torch.isfinite(o[:, 9:]).all()
    assert torch.isfinite(states[1]).all()


def test_large_batches_are_cut_along_the_batch_and_the_sequence() -> None:
    values = inputs(20, 260, 2, 36, 64, dtype=torch.float32)
    segments = list(cpu._segments(values["q"], values["v"], None, 32))
    assert len({segment.batch.start for segment in segments}) > 2
    assert len({segment.tokens.start for segment in segments}) > 1
    hold_against_reference(delta_rule, values)


@pytest.mark.parametrize("cu_seqlens", [None, torch.tensor([0, 3, 7])])
def test_gradients_are_those_of_finite_differences(cu_seqlens: Tensor | None) -> None:
    values = inputs(1, 7, 2, 3, 2, sequences=None if cu_seqlens is None else 2)
    leaves = [x.requires_grad_() for x in values.values()]

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor | None]:
        return delta_rule_cpu(*tensors[:4], 0.7, tensors[4], True, cu_seqlens, chunk_size=3)

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("wanted", ["k", "beta", "initial_state"])
def test_gradients_of_the_final_state_alone_for_one_input_alone(wanted: str) -> None:
    def gradient(run: Run) -> Tensor:
        values = inputs()
        x = values[wanted].requires_grad_()
        return torch.autograd.grad(run(**values, output_final_state=True)[1].sum(), x)[0]

    assert relative_error(gradient(delta_rule), gradient(delta_rule_reference)) < 1e-10


def test_layout_in_memory_does_not_matter() -> None:
    values = inputs(2, 40)
    expected = values_and_gradients(delta_rule, values)
    strided = {name: x.transpose(0, -1).contiguous().transpose(0, -1) for name, x in values.items()}
    assert not strided["q"].is_contiguous()
    hold(values_and_gradients(delta_rule, strided), expected, 1e-12)


def test_it_is_attention_with_the_inverse_of_the_key_products() -> None:
    # o = scale · tril(Q Kᵀ) T diag(β) V with T = (I + strict_tril(diag(β) K Kᵀ))⁻¹, over the whole sequence.
    values = inputs(1, 50, 1)
    q, k, v, beta = (values[name][0, :, 0] for name in ("q", "k", "v", "beta"))
    t = torch.linalg.inv(torch.eye(50, dtype=torch.float64) + (beta[:, None] * k @ k.T).tril(-1))
    expected = 5**-0.5 * (q @ k.T).tril() @ t @ (beta[:, None] * v)
    o, _ = delta_rule(**{name: x for name, x in values.items() if name != "initial_state"})
    torch.testing.assert_close(o[0, :, 0], expected)


def orthonormal(length: int, dim: int) -> Tensor:
    """`[1, length, 1, dim]`: directions, none repeated before all were used."""
    basis = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))[0]
    return basis.repeat(-(-length // dim), 1)[:length].view(1, length, 1, dim)


def test_full_strength_recalls_the_latest_value_of_every_key_exactly() -> None:
    values = inputs(1, 45, 1, 16, 4)
    k, v = orthonormal(45, 16), values["v"]
    _, state = delta_rule(values["q"], k, v, torch.ones(1, 45, 1, dtype=torch.float64), output_final_state=True)
    # 45 = 2 · 16 + 13 writes: 13 keys were written a third time, the others twice.
    latest = torch.cat([v[0, 32:, 0], v[0, 29:32, 0]])
    torch.testing.assert_close(k[0, :16, 0] @ state[0, 0], latest)


def test_no_strength_leaves_the_state_untouched() -> None:
    values = inputs(length=40)
    values["beta"] = torch.zeros_like(values["beta"])
    o, state = delta_rule(**values, output_final_state=True, scale=2.0)
    assert torch.equal(state, values["initial_state"])
    torch.testing.assert_close(o, 2 * torch.einsum("bthk,bhkv->bthv", values["q"], state))


def test_one_write_is_read_with_its_key() -> None:
    k = functional.normalize(torch.randn(1, 1, 3, 8, dtype=torch.float64), dim=-1)
    v, beta = torch.randn(1, 1, 3, 4, dtype=torch.float64), torch.tensor([[[0.3, 1.0, 1.7]]], dtype=torch.float64)
    o, _ = delta_rule(k, k, v, beta, scale=0.5)
    torch.testing.assert_close(o, 0.5 * beta[..., None] * v)


def test_orthogonal_keys_without_repetition_make_it_linear_attention() -> None:
    values = inputs(1, 40, 1, 40, 4)
    k, v, q = orthonormal(40, 40), values["v"], values["q"]
    o, _ = delta_rule(q, k, v, torch.ones(1, 40, 1, dtype=torch.float64), scale=1.0)
    scores = torch.einsum("bthk,bshk->bhts", q, k).tril()
    torch.testing.assert_close(o, torch.einsum("bhts,bshv->bthv", scores, v))


@pytest.mark.parametrize("cut", [1, 31, 32, 50])
def test_a_sequence_can_be_continued(cut: int) -> None:
    values = inputs(length=70)

    def in_two(initial_state: Tensor, output_final_state: bool, **tensors: Tensor) -> tuple[Tensor, Tensor | None]:
        first, second = ({name: x[:, part] for name, x in tensors.items()} for part in (slice(cut), slice(cut, None)))
        before, state = delta_rule(**first, initial_state=initial_state, output_final_state=True)
        after, state = delta_rule(**second, initial_state=state, output_final_state=output_final_state)
        return torch.cat([before, after], dim=1), state

    hold(values_and_gradients(in_two, values), values_and_gradients(delta_rule, values), 1e-12)


def test_without_gradients_nothing_is_kept() -> None:
    values = inputs()
    assert delta_rule(**values)[0].grad_fn is None
    with torch.no_grad():
        assert delta_rule(**{name: x.requires_grad_() for name, x in values.items()})[0].grad_fn is None


def test_a_second_derivative_is_refused() -> None:
    values = {name: x.requires_grad_() for name, x in inputs().items()}
    (gradient,) = torch.autograd.grad(delta_rule(**values)[0].sum(), values["k"], create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        gradient.sum().backward()
