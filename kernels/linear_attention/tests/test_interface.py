from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.tests.comparing import TOLERANCE, Run, hold, relative_error, values_and_gradients

from .. import gla, gla_step
from ..reference import gla_reference
from .common import FORMS, inputs


def with_vector_gate(q: Tensor, k: Tensor, v: Tensor, g: Tensor, initial_state: Tensor, **options: bool):  # noqa: ANN201
    return gla(q, k, v, g, initial_state=initial_state, **options)


def compiled(dynamic: bool) -> Run:
    return torch.compile(with_vector_gate, fullgraph=True, backend="aot_eager", dynamic=dynamic)


def checkpointed(q: Tensor, k: Tensor, v: Tensor, g: Tensor, initial_state: Tensor, output_final_state: bool):  # noqa: ANN201
    return checkpoint(
        gla,
        q,
        k,
        v,
        g,
        initial_state=initial_state,
        output_final_state=output_final_state,
        use_reentrant=False,
    )


@pytest.mark.parametrize(
    "run", [compiled(False), compiled(True), checkpointed], ids=["compile", "dynamic", "checkpoint"]
)
def test_compiled_and_checkpointed_runs_are_the_same(run: Run) -> None:
    values = inputs("vector", length=40)
    hold(values_and_gradients(run, values), values_and_gradients(gla, values), 1e-12)


def test_compiled_with_sequences_end_to_end() -> None:
    values = inputs("scalar", batch=1, length=40, sequences=3)
    run = torch.compile(gla, fullgraph=True, backend="aot_eager")
    bounds = torch.tensor([0, 7, 30, 40])
    expected = values_and_gradients(gla, values, cu_seqlens=bounds)
    hold(values_and_gradients(run, values, cu_seqlens=bounds), expected, 1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_the_custom_operators_keep_their_promises(form: str) -> None:
    values = inputs(form, length=20)
    arguments = (values["q"], values["k"], values["v"], values.get("g"), 0.5, values["initial_state"], None, 16, True)
    tensors = [x.requires_grad_() if isinstance(x, Tensor) else x for x in arguments]
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.reprise.gla_cpu.default, tuple(tensors), test_utils=checks)


def test_autocast_does_not_touch_the_precision() -> None:
    values = inputs("vector", length=40, dtype=torch.float32)
    expected = values_and_gradients(gla, values)

    def run(**arguments: Tensor) -> tuple[Tensor, Tensor | None]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return gla(**arguments)

    hold(values_and_gradients(run, values), expected, 0.0)


def test_under_autocast_as_in_a_layer() -> None:
    # Linear layers hand over bfloat16, the logarithm of a sigmoid stays float32.
    layer, x = nn.Linear(6, 24), torch.randn(2, 9, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        q, k, v, logits = layer(x).view(2, 9, 2, 12).split(3, dim=-1)
        g = nn.functional.logsigmoid(logits.float())
        o, state = gla(q, k, v, g, output_final_state=True)
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    expected, _ = gla_reference(*(x.double() for x in (q, k, v, g)))
    assert relative_error(o, expected) < 1e-2
    o.float().sum().backward()
    assert layer.weight.grad.isfinite().all()


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("form", FORMS)
def test_steps_one_by_one(form: str, dtype: torch.dtype) -> None:
    def steps(
        q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, initial_state: Tensor | None = None, **_: bool
    ) -> tuple[Tensor, Tensor]:
        outputs, state = [], initial_state
        for t in range(q.shape[1]):
            gate = g if g is None or g.ndim == 1 else g[:, t]
            o, state = gla_step(q[:, t], k[:, t], v[:, t], gate, state=state)
            assert o.dtype == v.dtype
            outputs.append(o)
        return torch.stack(outputs, dim=1), state

    values = inputs(form, length=9, dtype=dtype)
    hold(values_and_gradients(steps, values), values_and_gradients(gla, values), TOLERANCE[dtype])


def test_shapes_on_the_meta_device() -> None:
    values = {name: value.to("meta") for name, value in inputs("vector").items()}
    o, state = gla(**values, output_final_state=True)
    assert o.device.type == "meta"
    assert (o.shape, state.shape) == (values["v"].shape, values["initial_state"].shape)


def test_the_final_state_only_on_request() -> None:
    assert gla(**inputs("none"))[1] is None


def test_triton_is_not_imported_for_a_cpu() -> None:
    code = (
        "import sys, torch; sys.modules['triton'] = None; from kernels.linear_attention import gla;"
        "x = torch.ones(1, 2, 1, 4); gla(x, x, x)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.ones(2, 20, 5)}, ValueError, r"\[B, T, H, K\].*given: q \[2, 20, 5\]"),
        ({"k": torch.ones(2, 20, 2, 4)}, ValueError, "q and k must be"),
        ({"v": torch.ones(2, 19, 2, 3)}, ValueError, "v \\[2, 19, 2, 3\\]"),
        ({"g": torch.ones(2, 20)}, ValueError, r"g must be None, \[H\] = \[2\]"),
        ({"g": torch.ones(2, 20, 2, 3)}, ValueError, r"given: \[2, 20, 2, 3\]"),
        ({"initial_state": torch.ones(2, 2, 3, 5)}, ValueError, r"\[2, 2, 5, 3\] \(given: \[2, 2, 3, 5\]\)"),
        ({"q": torch.ones(2, 20, 2, 5, dtype=torch.int64)}, TypeError, "share one of the types"),
        ({"v": torch.ones(2, 20, 2, 3, dtype=torch.float16)}, TypeError, "v torch.float16"),
        ({"g": torch.ones(2, dtype=torch.int32)}, TypeError, "g must be float16"),
        ({"k": torch.ones(2, 20, 2, 5, device="meta")}, ValueError, "k is on meta and q on cpu"),
        ({"cu_seqlens": torch.tensor([0, 20])}, ValueError, "batch of 1"),
    ],
)
def test_bad_inputs(change: dict[str, Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        gla(**{**inputs("vector", dtype=torch.float32), **change})


@pytest.mark.parametrize("bounds", [[1, 20], [0, 19], [0, 7, 7, 20], [0, 9, 7, 20]])
def test_bad_bounds(bounds: list[int]) -> None:
    values = inputs("vector", batch=1, sequences=len(bounds) - 1)
    with pytest.raises(ValueError, match="rise from 0 to T = 20"):
        gla(**values, cu_seqlens=torch.tensor(bounds))


def test_bad_types_of_bounds() -> None:
    with pytest.raises(TypeError, match="int32 or int64"):
        gla(**inputs("vector", batch=1), cu_seqlens=torch.tensor([0.0, 20.0]))


def test_empty_inputs() -> None:
    with pytest.raises(ValueError, match="must not be empty"):
        gla(*(torch.ones(1, 0, 2, 3) for _ in range(3)))


def test_bad_steps() -> None:
    values = inputs("vector", length=1)
    q, k, v = (values[name][:, 0] for name in ("q", "k", "v"))
    with pytest.raises(ValueError, match=r"q and k must be \[B, H, K\]"):
        gla_step(values["q"], k, v, state=values["initial_state"])
    with pytest.raises(ValueError, match="the state must be"):
        gla_step(q, k, v, state=values["initial_state"][:1])
