from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from shared.config import UserError

from ..baselines import ModelSettings, build_model
from ..losses import (
    autoregressive_steps,
    cape_loss,
    equation_residual,
    gradient_penalty,
    relative_l2,
    rollout,
    rollout_loss,
)

SETTINGS = ModelSettings(
    width=4, modes=3, num_layers=2, projection_width=8, mpnn_hidden=16, mpnn_layers=1, cape_width=4, cape_modes=2
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def make(name: str, settings: ModelSettings = SETTINGS) -> nn.Module:
    return build_model(name, settings, channels=1, num_parameters=1, grid_shape=(16,)).double()


def make_batch(num_frames: int = 6, batch: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, num_frames, 1, 16).double(), torch.rand(batch, 1).double() + 0.1


def test_relative_l2_by_hand() -> None:
    target = torch.tensor([[[3.0, 4.0]], [[0.0, 2.0]]])
    prediction = torch.tensor([[[3.0, 1.0]], [[0.0, 2.0]]])
    assert relative_l2(prediction, target).item() == pytest.approx((3 / 5 + 0) / 2)
    assert relative_l2(torch.zeros_like(target), target).item() == pytest.approx(1)


@pytest.mark.parametrize(
    ("schedule", "epoch", "expected"),
    [
        # 103 epochs, 3 of warm-up: s = 0, ½, ¾, 1; ½(1 + tanh(5(s − ½))) = 0.0067, ½, 0.9241, 0.9933
        ("tanh", 3, 1),
        ("tanh", 53, 20),
        ("tanh", 78, 37),
        ("tanh", 103, 40),
        ("tanh", 0, 1),
        ("linear", 3, 1),
        ("linear", 28, 10),
        ("linear", 53, 20),
        ("linear", 103, 41),
        ("linear", 0, 1),
        ("teacher_forcing", 90, 1),
        ("push_forward", 90, 1),
        ("autoregressive", 0, 41),
    ],
)
def test_schedules_by_hand(schedule: str, epoch: int, expected: int) -> None:
    assert autoregressive_steps(schedule, epoch, epochs=103, warmup=3, num_frames=41) == expected


@pytest.mark.parametrize("schedule", ["tanh", "linear"])
def test_schedules_never_go_back_and_stay_in_range(schedule: str) -> None:
    steps = [autoregressive_steps(schedule, epoch, 30, 2, 21) for epoch in range(31)]
    assert steps == sorted(steps)
    assert 1 <= steps[0] < steps[-1] <= 21


def test_unknown_schedule_and_endless_warmup_are_named() -> None:
    with pytest.raises(UserError, match="choose one of tanh, linear"):
        autoregressive_steps("cosine", 0, 10, 1, 20)
    with pytest.raises(UserError, match="warm-up must leave epochs"):
        autoregressive_steps("tanh", 0, 10, 10, 20)


def step_by_step(model: nn.Module, frames: Tensor, parameters: Tensor, autoregressive: int, weight: float) -> Tensor:
    """The training loop of the paper as it is written: one frame after the other, t counting from the first."""
    window = frames[:, : model.frames_in]
    loss = torch.zeros((), dtype=frames.dtype)
    for step, t in enumerate(range(model.frames_in, frames.shape[1]), start=1):
        prediction, guess = model(window.flatten(1, 2), parameters)
        loss = loss + relative_l2(prediction, frames[:, t])
        if guess is not None:
            loss = loss + weight * relative_l2(guess, frames[:, t])
        window = torch.cat([window, prediction[:, None]], dim=1)[:, 1:]
        if step >= autoregressive:
            window = frames[:, t - model.frames_in + 1 : t + 1]
    return loss


@pytest.mark.parametrize("name", ["fno", "fno_two_frames", "fno_conditional", "fno_cape"])
@pytest.mark.parametrize("autoregressive", [1, 3, 6])
def test_batched_teacher_forcing_is_the_loop_step_by_step(name: str, autoregressive: int) -> None:
    model, (frames, parameters) = make(name), make_batch()
    slow = step_by_step(model, frames, parameters, autoregressive, weight=0.3)
    slow_gradients = torch.autograd.grad(slow, list(model.parameters()))
    fast = rollout_loss(model, frames, parameters, autoregressive_steps=autoregressive, guess_weight=0.3)["loss"]
    fast_gradients = torch.autograd.grad(fast, list(model.parameters()))
    torch.testing.assert_close(fast, slow)
    for quick, reference in zip(fast_gradients, slow_gradients, strict=True):
        torch.testing.assert_close(quick, reference)


def test_gradients_run_through_the_whole_rollout() -> None:
    model, (frames, parameters) = make("fno"), make_batch()
    frames.requires_grad_()
    for steps, reaches in ((5, True), (1, False)):
        prediction = rollout_loss(model, frames, parameters, autoregressive_steps=steps)["prediction"]
        first_only = rollout_loss(model, frames[:, :2], parameters)["prediction"]
        (gradient,) = torch.autograd.grad(prediction - first_only, frames)
        assert bool(gradient[:, 0].abs().max() > 1e-12) == reaches


class _Speed(nn.Module):
    """A linear model with `frames_out` frames a call: the state grows by the parameter every frame."""

    frames_in = 1

    def __init__(self, frames_out: int = 1) -> None:
        super().__init__()
        self.frames_out = frames_out
        self.seen: list[Tensor] = []

    def forward(self, history: Tensor, parameters: Tensor) -> tuple[Tensor, None]:
        self.seen.append(history.detach())
        steps = torch.arange(1, self.frames_out + 1, dtype=history.dtype)
        return history[:, -1:] + (parameters * steps)[..., None], None


@pytest.mark.parametrize("frames_out", [1, 2, 3])
@pytest.mark.parametrize("autoregressive", [1, 2, 5])
def test_bundles_of_frames_are_cut_at_the_end_of_the_data(frames_out: int, autoregressive: int) -> None:
    frames = torch.arange(6.0).view(1, 6, 1, 1).expand(2, -1, -1, 4) + 1
    terms = rollout_loss(_Speed(frames_out), frames, torch.ones(2, 1), autoregressive_steps=autoregressive)
    assert terms["loss"].item() == pytest.approx(0, abs=1e-6)
    off = rollout_loss(_Speed(frames_out), frames, torch.full((2, 1), 1.5), autoregressive_steps=5)
    assert off["loss"].item() == pytest.approx(sum(0.5 * t / (t + 1) for t in range(1, 6)))


def test_push_forward_predicts_from_predictions_made_without_gradient() -> None:
    frames = torch.arange(4.0).view(1, 4, 1, 1).expand(1, -1, -1, 2) + 1
    model = _Speed()
    rollout_loss(model, frames, torch.full((1, 1), 1.5), push_forward=True)
    # Truth 1 2 3 4; each from the frame before it: 2.5 3.5 4.5; these, except the last, are the second call's input.
    assert model.seen[0][:, 0, 0].tolist() == [1, 2, 3]
    assert model.seen[1][:, 0, 0].tolist() == [1, 2.5, 3.5]
    parameters = torch.full((1, 1), 1.5, requires_grad=True)
    loss = rollout_loss(_Speed(), frames, parameters, push_forward=True)["loss"]
    # Errors 0.5, 1, 1 over 2, 3, 4; the parameter counts in the second step only.
    assert loss.item() == pytest.approx(0.5 / 2 + 1 / 3 + 1 / 4)
    assert torch.autograd.grad(loss, parameters)[0].item() == pytest.approx(1 / 2 + 1 / 3 + 1 / 4)


def test_noise_has_its_size_and_reaches_every_input() -> None:
    frames = torch.zeros(50, 5, 1, 16) + 1
    model = _Speed()
    rollout_loss(model, frames, torch.zeros(50, 1), autoregressive_steps=2, noise=0.1)
    first, second, forced = model.seen
    assert (first - 1).std().item() == pytest.approx(0.1, rel=0.1)
    assert (second - first).std().item() == pytest.approx(0.1, rel=0.1)
    assert (forced - 1).std().item() == pytest.approx(0.1, rel=0.1)


def test_cape_loss_trains_cape_alone_from_true_frames() -> None:
    model, (frames, parameters) = make("fno_cape"), make_batch()
    loss = cape_loss(model, frames, parameters)["loss"]
    expected = sum(relative_l2(model.cape(frames[:, t], parameters), frames[:, t + 1]) for t in range(5))
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert model.cape.project.weight.grad.any()
    assert all(parameter.grad is None for parameter in model.base.parameters())


@pytest.mark.parametrize("frames_out", [1, 3])
def test_rollout_runs_on_its_own_output(frames_out: int) -> None:
    states = rollout(_Speed(frames_out), torch.zeros(1, 1, 1, 2), torch.full((1, 1), 2.0), num_steps=4)
    assert states[0, :, 0, 0].tolist() == [2, 4, 6, 8]


def test_rollout_of_two_frames_keeps_their_order() -> None:
    model, (frames, parameters) = make("fno_two_frames"), make_batch()
    states = rollout(model, frames[:, :2], parameters, num_steps=2)
    second = model(torch.cat([frames[:, 1], states[:, 0]], dim=1), parameters)[0]
    torch.testing.assert_close(states[:, 1], second)
    assert not states.requires_grad


def test_too_few_frames_are_named() -> None:
    model, (frames, parameters) = make("fno_two_frames"), make_batch()
    with pytest.raises(UserError, match="takes 2 frames in, but 1 were given"):
        rollout(model, frames[:, :1], parameters, 3)
    with pytest.raises(UserError, match="more than the 2 frames"):
        rollout_loss(model, frames[:, :2], parameters)


class _Quadratic(nn.Module):
    def forward(self, history: Tensor, parameters: Tensor) -> tuple[Tensor, None]:
        return history * parameters.square().sum(dim=1)[:, None, None], None


def test_gradient_penalty_by_hand() -> None:
    # Σ output = (Σ u) |λ|² has the gradient norm 2 |Σ u| |λ|; equal bounds ½·4 = 2·1 make λ̃ = (2, 2) certain.
    state = torch.ones(3, 1, 5)
    penalty = gradient_penalty(_Quadratic(), state, torch.tensor([4.0, 4.0]), torch.tensor([1.0, 1.0]), 0.5, target=4.0)
    assert penalty.item() == pytest.approx(0.5 * (2 * 5 * math.sqrt(8) - 4) ** 2, rel=1e-6)


def test_gradient_penalty_draws_in_range_and_trains_cape() -> None:
    model, (frames, _) = make("fno_cape"), make_batch()
    drawn = []
    model.register_forward_pre_hook(lambda _, inputs: drawn.append(inputs[1].detach()))
    state = frames[:, 0].repeat(100, 1, 1)
    gradient_penalty(model, state, torch.tensor([0.2]).double(), torch.tensor([4.0]).double()).backward()
    assert 0.1 <= drawn[0].min() < 0.3
    assert 7.5 < drawn[0].max() <= 8
    assert model.cape.masks[0][0].weight.grad.any()


def test_gradient_penalty_of_a_model_without_parameters_is_named() -> None:
    with pytest.raises(UserError, match="told the parameters"):
        gradient_penalty(make("fno"), torch.randn(2, 1, 16).double(), torch.ones(1).double(), torch.ones(1).double())


def cells(n: int) -> Tensor:
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


def test_advection_residual_vanishes_on_the_solution_at_second_order() -> None:
    def residual(n: int, speed: float) -> float:
        u0, u1 = (torch.sin(2 * torch.pi * (cells(n) - 0.5 * t))[None, None] for t in (0, 1 / n))
        return equation_residual("advection", 1 / n)(u0, u1, torch.tensor([[speed]]).double()).abs().max().item()

    assert residual(128, 0.5) < 0.01
    assert residual(64, 0.5) / residual(128, 0.5) == pytest.approx(4, rel=0.05)
    assert residual(128, 1.0) > 1


def test_burgers_residual_vanishes_on_a_travelling_wave_and_the_published_one_does_not() -> None:
    # u = c − ν' w tanh-shaped front moving at its mean speed, ν' = ν/π; flat, and so periodic, away from the front.
    viscosity, speed, drop, n, time_step = 0.1, 0.3, 1.0, 1024, 1e-3

    def front(t: float) -> Tensor:
        return (speed - drop * torch.tanh(drop * (cells(n) - 0.5 - speed * t) * torch.pi / (2 * viscosity)))[None, None]

    inner = slice(n // 4, 3 * n // 4)
    parameters = torch.tensor([[viscosity]]).double()
    size = (front(time_step) - front(0)).abs().max() / time_step
    right = equation_residual("burgers", time_step)(front(0), front(time_step), parameters)[..., inner].abs().max()
    published = equation_residual("burgers_official", time_step)(front(0), front(time_step), parameters)
    assert right < 2e-3 * size
    assert published[..., inner].abs().max() > size


def test_navier_stokes_residual_vanishes_on_a_drifting_density_wave() -> None:
    # Constant pressure and velocity carry any density along, at every viscosity.
    def state(t: float, n: int) -> Tensor:
        x, y = torch.meshgrid(cells(n), cells(n), indexing="ij")
        density = 2 + torch.sin(2 * torch.pi * (x - 0.3 * t)) * torch.cos(2 * torch.pi * (y + 0.2 * t))
        others = [torch.full_like(density, value) for value in (1.5, 0.3, -0.2)]
        return torch.stack([density, *others])[None]

    def residual(n: int) -> float:
        parameters = torch.tensor([[0.1, 0.1, 1.0]]).double()
        return equation_residual("navier_stokes", 1 / n)(state(0, n), state(1 / n, n), parameters).abs().max().item()

    assert residual(64) < 0.01
    assert residual(32) / residual(64) == pytest.approx(4, rel=0.1)


def test_navier_stokes_stress_is_weighted_with_density_and_direction() -> None:
    # Shear flow vy(x): the momentum along y loses η ∂x(ρ ∂x vy), here with ρ = 2 and vy = sin 2πx.
    n, shear = 128, 0.05
    wave = torch.sin(2 * torch.pi * cells(n))[:, None].expand(n, 4)
    one = torch.ones_like(wave)
    state = torch.stack([2 * one, one, 0 * one, wave])[None]
    residual = equation_residual("navier_stokes", 1.0)(state, state, torch.tensor([[shear, 0.7, 0.0]]).double())
    expected = 2 * shear * (2 * torch.pi) ** 2 * wave
    torch.testing.assert_close(residual[0, 2], expected, rtol=0, atol=0.01)
    assert residual[0, :2].abs().max() < 1e-9
    # Longitudinal flow vx(x) feels 4/3 η + ζ.
    state = torch.stack([2 * one, one, wave, 0 * one])[None]
    inviscid = equation_residual("navier_stokes", 1.0)(state, state, torch.zeros(1, 3).double())
    residual = equation_residual("navier_stokes", 1.0)(state, state, torch.tensor([[shear, 0.7, 0.0]]).double())
    expected = 2 * (4 / 3 * shear + 0.7) * (2 * torch.pi) ** 2 * wave
    torch.testing.assert_close((residual - inviscid)[0, 1], expected, rtol=0, atol=0.3)


def test_residual_enters_the_loss_with_its_weight() -> None:
    model, (frames, parameters) = make("fno_pino"), make_batch()
    physics = equation_residual("advection", 0.1)
    plain = rollout_loss(model, frames, parameters, autoregressive_steps=6)
    terms = rollout_loss(model, frames, parameters, autoregressive_steps=6, residual=physics, residual_weight=0.5)
    torch.testing.assert_close(terms["loss"], plain["loss"] + 0.5 * terms["residual"])
    states = torch.cat([frames[:, :1], rollout(model, frames[:, :1], parameters, 5)], dim=1)
    by_frame = [physics(states[:, t], states[:, t + 1], parameters).square().mean() for t in range(5)]
    torch.testing.assert_close(terms["residual"], sum(by_frame))


def test_unknown_equation_is_named() -> None:
    with pytest.raises(UserError, match="choose one of advection, burgers, burgers_official, navier_stokes"):
        equation_residual("heat", 0.1)
