from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.tests.comparing import TOLERANCE, Run, hold, relative_error, values_and_gradients

from .. import delta_rule, delta_rule_step
from ..reference import delta_rule_reference
from .common import inputs


def compiled(dynamic: bool) -> Run:
    return torch.compile(delta_rule, fullgraph=True, backend="aot_eager", dynamic=dynamic)


def checkpointed(**values: Tensor) -> tuple[Tensor, Tensor | None]:
    return checkpoint(delta_rule, use_reentrant=False, **values)


@pytest.mark.parametrize(
    "run", [compiled(False), compiled(True), checkpointed], ids=["compile", "dynamic", "checkpoint"]
)
@pytest.mark.parametrize("cu_seqlens", [None, torch.tensor([0, 7, 30, 40])], ids=["batch", "end to end"])
def test_compiled_and_checkpointed_runs_are_the_same(run: Run, cu_seqlens: Tensor | None) -> None:
    values = inputs(1, 40, sequences=None if cu_seqlens is None else 3)
    expected = values_and_gradients(delta_rule, values, cu_seqlens=cu_seqlens)
    hold(values_and_gradients(run, values, cu_seqlens=cu_seqlens), expected, 1e-12)


def test_the_custom_operators_keep_their_promises() -> None:
    values = [x.requires_grad_() for x in inputs(1, 20, sequences=2).values()]
    arguments = (*values, torch.tensor([0, 7, 20]), 0.5, 8)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.reprise.delta_rule_cpu.default, arguments, test_utils=checks)


def test_autocast_does_not_touch_the_precision_inside() -> None:
    values = inputs(1, 40, dtype=torch.float32)
    expected = values_and_gradients(delta_rule_reference, {name: x.double() for name, x in values.items()})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hold(values_and_gradients(delta_rule, values), expected, TOLERANCE[torch.float32])
        token = (values[name][:, 0] for name in ("q", "k", "v", "beta"))
        o, _ = delta_rule_step(*token, state=values["initial_state"])
    assert relative_error(o, expected["o"][:, 0]) < TOLERANCE[torch.float32]


def test_half_precision_inputs_with_beta_and_state_in_single_precision() -> None:
    values = inputs(1, 40, dtype=torch.bfloat16)
    mixed = {name: x.float() if name in ("beta", "initial_state") else x for name, x in values.items()}
    got, expected = (values_and_gradients(delta_rule, x) for x in (mixed, values))
    assert got["beta"].dtype == torch.float32
    hold(got, {name: x.double() for name, x in expected.items()}, TOLERANCE[torch.bfloat16])


def test_shapes_on_the_meta_device() -> None:
    values = {name: x.to("meta") for name, x in inputs(2, 20, 2, 5, 3).items()}
    o, state = delta_rule(**values, output_final_state=True)
    assert o.shape == (2, 20, 2, 3)
    assert state.shape == (2, 2, 5, 3)


def test_the_step_is_differentiable() -> None:
    values = inputs(1, 1)
    expected = values_and_gradients(delta_rule, values)

    def one_step(initial_state: Tensor, output_final_state: bool, **tensors: Tensor) -> tuple[Tensor, Tensor]:
        o, state = delta_rule_step(*(x[:, 0] for x in tensors.values()), state=initial_state)
        return o[:, None], state

    hold(values_and_gradients(one_step, values), expected, 1e-12)


def test_triton_is_not_needed_on_a_cpu() -> None:
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from kernels.delta_rule import delta_rule\n"
        "x = torch.ones(1, 2, 1, 4)\n"
        "print(delta_rule(x, x / 2, x, x[..., 0])[0].shape[1])"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "2"


WRONG_VALUES = {
    "q of three axes": ({"q": torch.zeros(2, 20, 10)}, "q and k must be"),
    "k of another size": ({"k": torch.zeros(2, 20, 2, 4)}, "q and k must be"),
    "v of another length": ({"v": torch.zeros(2, 19, 2, 3)}, r"given: q \[2, 20, 2, 5\]"),
    "beta with a key axis": ({"beta": torch.zeros(2, 20, 2, 1)}, r"beta must be \[B, T, H\] = \[2, 20, 2\]"),
    "a state transposed": ({"initial_state": torch.zeros(2, 2, 3, 5)}, r"= \[2, 2, 5, 3\] \(given: \[2, 2, 3, 5\]"),
    "beta elsewhere": ({"beta": torch.zeros(2, 20, 2, device="meta")}, "move them to one device"),
}


@pytest.mark.parametrize("mistake", WRONG_VALUES)
def test_wrong_shapes_and_devices_are_named(mistake: str) -> None:
    change, message = WRONG_VALUES[mistake]
    with pytest.raises(ValueError, match=message):
        delta_rule(**(inputs(dtype=torch.float32) | change))


def test_empty_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match="must not be empty"):
        delta_rule(**inputs(length=0))


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_mixed_types_are_refused(name: str) -> None:
    values = inputs(dtype=torch.float32)
    with pytest.raises(TypeError, match=f"{name} torch.bfloat16"):
        delta_rule(**(values | {name: values[name].bfloat16()}))


@pytest.mark.parametrize("name", ["beta", "initial_state"])
def test_integers_are_refused(name: str) -> None:
    values = inputs()
    with pytest.raises(TypeError, match="must be float16"):
        delta_rule(**(values | {name: values[name].long()}))


@pytest.mark.parametrize(
    ("bounds", "dtype", "error", "message"),
    [
        ([0, 20], torch.float32, TypeError, "int32 or int64"),
        ([0], torch.int64, ValueError, "num_sequences"),
        ([1, 20], torch.int64, ValueError, r"rise from 0 to T = 20 \(given: \[1, 20\]\)"),
        ([0, 19], torch.int64, ValueError, "rise from 0"),
        ([0, 7, 7, 20], torch.int64, ValueError, "rise from 0"),
    ],
)
def test_wrong_bounds_are_refused(bounds: list[int], dtype: torch.dtype, error: type[Exception], message: str) -> None:
    values = inputs(1)
    values.pop("initial_state")
    with pytest.raises(error, match=message):
        delta_rule(**values, cu_seqlens=torch.tensor(bounds, dtype=dtype))


def test_bounds_need_a_batch_of_one() -> None:
    values = inputs(2)
    values.pop("initial_state")
    with pytest.raises(ValueError, match="batch of 1"):
        delta_rule(**values, cu_seqlens=torch.tensor([0, 20]))


def test_the_step_refuses_a_sequence() -> None:
    values = inputs()
    state = values.pop("initial_state")
    with pytest.raises(ValueError, match=r"q and k must be \[B, H, K\]"):
        delta_rule_step(**values, state=state)
