from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from shared.config import UserError
from shared.nn import Mamba


def test_is_its_equations() -> None:
    layer, x = Mamba(8, state_size=3, time_step_rank=2).double(), torch.randn(2, 7, 8, dtype=torch.float64)
    projected = x @ layer.input.weight.T
    u, z = projected[..., :16], projected[..., 16:]
    padded = functional.pad(u, (0, 0, 3, 0))
    conv = layer.convolution
    u = functional.silu(sum(padded[:, j : j + 7] * conv.weight[:, j] for j in range(4)) + conv.bias)
    selected = u @ layer.selection.weight.T
    delta = functional.softplus(selected[..., :2] @ layer.time_step.weight.T + layer.time_step.bias)
    B, C, A = selected[..., 2:5], selected[..., 5:], -layer.log_decay_rate.exp()
    h, outputs = torch.zeros(2, 16, 3, dtype=torch.float64), []
    for t in range(7):
        h = torch.exp(delta[:, t, :, None] * A) * h + (delta[:, t] * u[:, t])[..., None] * B[:, t, None]
        outputs.append((h * C[:, t, None]).sum(-1) + layer.skip * u[:, t])
    expected = (torch.stack(outputs, dim=1) * functional.silu(z)) @ layer.output.weight.T
    y, state = layer(x, keep_state=True)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(state["memory"], h)


def test_initialization_of_the_paper() -> None:
    layer = Mamba(64, state_size=4)
    torch.testing.assert_close(-layer.log_decay_rate.exp(), -torch.arange(1.0, 5).expand(128, 4))
    assert (layer.skip == 1).all()
    steps = functional.softplus(layer.time_step.bias)
    assert steps.min() >= 0.999e-3
    assert steps.max() <= 0.1001
    # Log-uniform: half of the steps lie below the geometric mean of the bounds.
    assert (steps < 0.01).float().mean() == pytest.approx(0.5, abs=0.15)
    assert layer.time_step.weight.shape == (128, 4)
    assert layer.time_step.weight.abs().max() <= 0.5


def test_parameters_of_the_published_layer() -> None:
    # 3·expand·d² of the projections, and what belongs to the state-space part: d = 768, E = 1536, N = 16, rank 48.
    layer = Mamba(768)
    expected = 3 * 2 * 768**2 + 1536 * (48 + 2 * 16) + 48 * 1536 + 1536 + 1536 * 16 + 1536 + 1536 * 4 + 1536
    assert sum(parameter.numel() for parameter in layer.parameters()) == expected


def test_clear_errors() -> None:
    with pytest.raises(UserError, match="state_size"):
        Mamba(8, state_size=0)
    with pytest.raises(UserError, match="time_step_rank"):
        Mamba(8, time_step_rank=0)
    with pytest.raises(UserError, match="whole number"):
        Mamba(7, expand=1.5)
