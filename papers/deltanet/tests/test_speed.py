"""That what is timed computes the same, and which rows come out."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from .. import speed
from ..model import ModelSettings
from ..speed import ModelSpeed, OperatorSpeed, chunk, operator_times, recurrent, throughput

CPU = torch.device("cpu")


def test_recurrence_and_chunks_agree() -> None:
    inputs = tuple(tensor.double() for tensor in speed._inputs(70, 2, 8, CPU, torch.float64))
    for tensor in inputs:
        tensor.requires_grad_()
    outputs = [function(*inputs) for function in (recurrent, chunk)]
    assert (outputs[0] - outputs[1]).norm() / outputs[0].norm() < 1e-9
    gradients = [torch.autograd.grad(output.square().sum(), inputs) for output in outputs]
    for step_by_step, chunkwise in zip(*gradients, strict=True):
        assert (step_by_step - chunkwise).norm() / step_by_step.norm() < 1e-8


def test_attention_gives_every_input_a_gradient() -> None:
    inputs = speed._inputs(8, 2, 4, CPU, torch.float32)
    for tensor in inputs:
        tensor.requires_grad_()
    output = speed.attention(*inputs)
    assert output.shape == inputs[2].shape
    assert all(g is not None for g in torch.autograd.grad(output.sum(), inputs))


def test_rows_of_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"recurrent": 0.6, "chunk": 0.2, "attention": 0.1}
    monkeypatch.setattr(speed, "rounds", lambda cases, repeats: [seconds] * repeats)
    settings = OperatorSpeed(lengths=(8, 16, 32), head_dims=(4, 8), hidden_size=8)
    table = pd.DataFrame(operator_times(settings, CPU))
    assert len(table) == 2 * 3 * 2 * 3 * (3 + 1)
    times = table[table.metric.eq("milliseconds")]
    assert times.groupby("model").value.unique().map(list).to_dict() == {
        name: [1000 * taken] for name, taken in seconds.items()
    }
    speedups = table[table.metric.eq("speedup")]
    assert set(speedups.model) == {"head_dim_4", "head_dim_8"}
    assert set(speedups.dataset) == {"speed/forward", "speed/forward+backward"}
    assert speedups.value.to_list() == pytest.approx([3.0] * len(speedups))


def test_rows_of_the_models() -> None:
    network = ModelSettings(hidden_size=8, num_layers=2, num_heads=1, feed_forward_size=0)
    settings = ModelSpeed(models=("gla", "deltanet"), network=network, vocab_size=7, tokens=16, lengths=(8, 16))
    table = pd.DataFrame(throughput(settings, CPU))
    assert table.groupby(["model", "length"]).seed.apply(list).to_list() == [[0, 1, 2]] * 4
    assert (table.value > 0).all()


@pytest.mark.parametrize(
    ("schema", "changes", "words"),
    [
        (OperatorSpeed, {"head_dims": [32, 48]}, "48"),
        (OperatorSpeed, {"lengths": [8, 16]}, "at least 3"),
        (ModelSpeed, {"lengths": [8, 12]}, "12"),
        (ModelSpeed, {"models": ["deltanett"]}, "unknown model 'deltanett'; choose among transformer"),
        (ModelSpeed, {"models": ["gla", "gla"]}, "listed twice"),
    ],
)
def test_impossible_settings(schema: type, changes: dict, words: str) -> None:
    valid = {
        OperatorSpeed: {"lengths": [8, 16, 32], "head_dims": [32]},
        ModelSpeed: {
            "models": ["gla"],
            "network": {"hidden_size": 8, "num_layers": 1, "num_heads": 1},
            "tokens": 16,
            "lengths": [8],
        },
    }
    with pytest.raises(ValueError, match=words):
        schema.model_validate(valid[schema] | changes)
