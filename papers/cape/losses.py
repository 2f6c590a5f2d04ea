"""Training objectives of the paper: rollouts, the curriculum, the residual of the equation, the gradient penalty.

Frames are `[batch, time, channels, *grid]`; a model is called as described in model.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from shared.config import UserError

from .model import CAPEModel

Schedule = Literal["tanh", "linear", "teacher_forcing", "autoregressive", "push_forward"]
Residual = Callable[[Tensor, Tensor, Tensor], Tensor]

ADIABATIC_INDEX = 5 / 3


def relative_l2(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean over the batch of ‖prediction − target‖₂ / ‖target‖₂, all other axes flattened."""
    return _relative_l2(prediction[:, None], target[:, None])


def _relative_l2(prediction: Tensor, target: Tensor) -> Tensor:
    """Sum over time of `relative_l2` of `[batch, time, channels, *grid]`."""
    error = torch.linalg.vector_norm((prediction - target).flatten(2), dim=2)
    norm = torch.linalg.vector_norm(target.flatten(2), dim=2).clamp_min(torch.finfo(target.dtype).tiny)
    return (error / norm).mean(dim=0).sum()


def autoregressive_steps(schedule: Schedule, epoch: int, epochs: int, warmup: int, num_frames: int) -> int:
    """How many frames of a rollout are predicted from the network's own output in this epoch, t_ar.

    "tanh" and "linear" go from pure teacher forcing (1: only the first frame follows its true predecessor in any case)
    to pure autoregression (`num_frames`) between the epochs `warmup` and `epochs`, with s = (epoch − warmup) /
    (epochs − warmup): t_ar = clip(int(num_frames · ½(1 + tanh((s − ½)/0.2))), 1, num_frames), or int(num_frames · s).
    `num_frames` counts the first frame too. The others are constant; "push_forward" is a way of training of its own
    (see `rollout_loss`) and counts as 1.
    """
    if schedule not in get_args(Schedule):
        raise UserError(f"unknown schedule {schedule!r}; choose one of {', '.join(get_args(Schedule))}")
    if not 0 <= warmup < epochs:
        raise UserError(f"warm-up must leave epochs to train in (given: {warmup} of {epochs} epochs)")
    if schedule in ("teacher_forcing", "push_forward"):
        return 1
    if schedule == "autoregressive":
        return num_frames
    progress = (epoch - warmup) / (epochs - warmup)
    share = progress if schedule == "linear" else 0.5 * (1 + math.tanh((progress - 0.5) / 0.2))
    return min(max(int(num_frames * share), 1), num_frames)


def rollout_loss(
    model: nn.Module,
    frames: Tensor,
    parameters: Tensor,
    *,
    autoregressive_steps: int = 1,
    push_forward: bool = False,
    guess_weight: float = 0.0,
    noise: float = 0.0,
    residual: Residual | None = None,
    residual_weight: float = 1.0,
) -> dict[str, Tensor]:
    """The training objective of a batch of trajectories, every frame counted once:

        Σ_t rel(prediction_t, u_t) + guess_weight · Σ_t rel(guess_t, u_t) + residual_weight · Σ_t mean(residual_t²)

    `frames` `[batch, time, channels, *grid]` and `parameters` `[batch, num_parameters]`. The first
    `autoregressive_steps` predictions form a chain through which gradients run to its beginning; those after it start
    from true frames. With `push_forward` each frame is predicted from a prediction, made without gradient, of the
    frames before it (Brandstetter et al., 2022), and `autoregressive_steps` is not used. `noise` is the standard
    deviation of what is added to all inputs. `residual(previous, current, parameters)` is the equation's, for PINO.

    Predictions from true frames do not depend on one another and are made in one call: the same loss, faster. Only
    batch normalization notices, whose statistics are then taken over these frames together.

    Returns scalars: `loss`, `prediction`, and `guess` and `residual` where there are such.
    """
    first = model.frames_in
    if frames.shape[1] <= first:
        raise UserError(f"a rollout needs more than the {first} frames that the model takes in, not {frames.shape[1]}")
    if push_forward:
        with torch.no_grad():
            _, predictions, _ = _forced(model, frames, parameters, first, noise)
        previous, prediction, guess = _forced(
            model, torch.cat([frames[:, :first], predictions], dim=1), parameters, first, noise
        )
    else:
        previous, prediction, guess = _chain(model, frames, parameters, autoregressive_steps, noise)
        start = first + prediction.shape[1]
        if start < frames.shape[1]:
            forced = _forced(model, frames, parameters, start, noise)
            previous, prediction = torch.cat([previous, forced[0]], dim=1), torch.cat([prediction, forced[1]], dim=1)
            guess = None if guess is None or forced[2] is None else torch.cat([guess, forced[2]], dim=1)
    target = frames[:, first:]
    terms = {"prediction": _relative_l2(prediction, target)}
    loss = terms["prediction"]
    if guess is not None:
        terms["guess"] = _relative_l2(guess, target)
        loss = loss + guess_weight * terms["guess"]
    if residual is not None:
        # The mean over the batch, space and equations, summed over time.
        terms["residual"] = residual(previous, prediction, parameters).square().mean() * prediction.shape[1]
        loss = loss + residual_weight * terms["residual"]
    return {"loss": loss, **terms}


def cape_loss(model: CAPEModel, frames: Tensor, parameters: Tensor, noise: float = 0.0) -> dict[str, Tensor]:
    """The objective of the warm-up epochs, Σ_t rel(guess_t, u_t) from true frames; the base network is left alone."""
    target = frames[:, 1:]
    states = _noisy(frames[:, :-1].flatten(0, 1), noise)
    guess = model.cape(states, parameters.repeat_interleave(target.shape[1], dim=0))
    loss = _relative_l2(guess.unflatten(0, target.shape[:2]), target)
    return {"loss": loss, "guess": loss}


@torch.no_grad()
def rollout(model: nn.Module, first_frames: Tensor, parameters: Tensor, num_steps: int) -> Tensor:
    """Run a model freely on its own output: `[batch, num_steps, channels, *grid]` after the first frames given.

    `first_frames` `[batch, time, channels, *grid]` holds at least the frames that the model takes in; its last ones
    are used. Call `model.eval()` before.
    """
    if first_frames.shape[1] < model.frames_in:
        raise UserError(f"the model takes {model.frames_in} frames in, but {first_frames.shape[1]} were given")
    history, states = first_frames[:, -model.frames_in :], []
    for _ in range(math.ceil(num_steps / model.frames_out)):
        prediction, _ = _call(model, history, parameters)
        states.append(prediction)
        history = torch.cat([history, prediction], dim=1)[:, -model.frames_in :]
    return torch.cat(states, dim=1)[:, :num_steps]


def gradient_penalty(
    model: nn.Module,
    state: Tensor,
    lowest: Tensor,
    highest: Tensor,
    weight: float = 5.16e-4,
    target: float = 4.58,
) -> Tensor:
    """weight · E[(‖∂(Σ prediction)/∂λ̃‖ − target)²] with λ̃ uniform between lowest/2 and 2·highest (paper: 1D).

    `state` is the history of the first step, `[batch, channels, *grid]`; `lowest` and `highest` `[num_parameters]`
    are the bounds of λ in the training set.
    """
    low, high = lowest / 2, 2 * highest
    parameters = low + (high - low) * torch.rand(state.shape[0], low.numel(), dtype=state.dtype, device=state.device)
    prediction, _ = model(state, parameters.requires_grad_())
    # Samples do not see each other, so that the gradient of the sum over the batch holds each sample's own.
    (gradient,) = torch.autograd.grad(prediction.sum(), parameters, create_graph=True, allow_unused=True)
    if gradient is None:
        raise UserError("the gradient penalty needs a model that is told the parameters, such as fno_cape")
    return weight * (torch.linalg.vector_norm(gradient, dim=1) - target).square().mean()


def equation_residual(equation: str, time_step: float) -> Residual:
    """The residual of an equation by name, for `rollout_loss`: r(previous, current, parameters), zero for a solution.

    States are `[batch, …, channels, *grid]` on the periodic unit interval or square, `time_step` apart. Differences
    are central in space and time, hence of second order; over the long steps between saved frames they are coarse.
    "burgers_official" is the published code's, with +ν u_xx where the equation holds −(ν/π) u_xx.
    """
    if equation not in _RATES:
        raise UserError(f"there is no residual for {equation!r}; choose one of {', '.join(_RATES)}")
    conserved, divergence = _RATES[equation]

    def residual(previous: Tensor, current: Tensor, parameters: Tensor) -> Tensor:
        change = (conserved(current) - conserved(previous)) / time_step
        return change + divergence((previous + current) / 2, parameters)

    return residual


def _advection(u: Tensor, parameters: Tensor) -> Tensor:
    (speed,) = _parameters(parameters, u)
    return speed * _derivative(u, -1)


def _burgers(u: Tensor, parameters: Tensor) -> Tensor:
    (viscosity,) = _parameters(parameters, u)
    return _derivative(u.square() / 2, -1) - viscosity / torch.pi * _second_derivative(u)


def _burgers_official(u: Tensor, parameters: Tensor) -> Tensor:
    (viscosity,) = _parameters(parameters, u)
    return _derivative(u.square() / 2, -1) + viscosity * _second_derivative(u)


def _navier_stokes_conserved(state: Tensor) -> Tensor:
    """Mass, momenta and energy from density, pressure and velocities, channels on axis −3."""
    density, pressure, vx, vy = state.unbind(-3)
    energy = pressure / (ADIABATIC_INDEX - 1) + density * (vx.square() + vy.square()) / 2
    return torch.stack([density, density * vx, density * vy, energy], dim=-3)


def _navier_stokes(state: Tensor, parameters: Tensor) -> Tensor:
    """Divergence of the fluxes, with PDEBench's stress: weighted with the density, without cross derivatives."""
    density, pressure, vx, vy = state.unbind(-3)
    shear, bulk, _ = _parameters(parameters, density)
    energy = _navier_stokes_conserved(state)[..., 3, :, :]
    along = 4 / 3 * shear + bulk
    flux_x = [
        density * vx,
        density * (vx * vx - along * _derivative(vx, -2)) + pressure,
        density * (vx * vy - shear * _derivative(vy, -2)),
        (energy + pressure) * vx - density / 2 * _derivative(along * vx.square() + shear * vy.square(), -2),
    ]
    flux_y = [
        density * vy,
        density * (vx * vy - shear * _derivative(vx, -1)),
        density * (vy * vy - along * _derivative(vy, -1)) + pressure,
        (energy + pressure) * vy - density / 2 * _derivative(along * vy.square() + shear * vx.square(), -1),
    ]
    return _derivative(torch.stack(flux_x, dim=-3), -2) + _derivative(torch.stack(flux_y, dim=-3), -1)


_RATES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "advection": (torch.Tensor.clone, _advection),
    "burgers": (torch.Tensor.clone, _burgers),
    "burgers_official": (torch.Tensor.clone, _burgers_official),
    "navier_stokes": (_navier_stokes_conserved, _navier_stokes),
}


def _parameters(parameters: Tensor, like: Tensor) -> tuple[Tensor, ...]:
    """Each parameter `[batch]` with axes of length 1, to be multiplied with `like` `[batch, …]`."""
    return parameters.reshape(parameters.shape[0], -1, *[1] * (like.ndim - 1)).unbind(1)


def _derivative(u: Tensor, axis: int) -> Tensor:
    """Central difference along a periodic axis of length 1."""
    return (u.roll(-1, axis) - u.roll(1, axis)) * (u.shape[axis] / 2)


def _second_derivative(u: Tensor) -> Tensor:
    return (u.roll(-1, -1) - 2 * u + u.roll(1, -1)) * u.shape[-1] ** 2


def _call(model: nn.Module, history: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor | None]:
    """One call on `[batch, frames_in, channels, *grid]`: `[batch, frames_out, channels, *grid]` and the guess."""
    prediction, guess = model(history.flatten(1, 2), parameters)
    return prediction.unflatten(1, (model.frames_out, -1)), guess


def _noisy(x: Tensor, noise: float) -> Tensor:
    return x + noise * torch.randn_like(x) if noise else x


def _chain(
    model: nn.Module, frames: Tensor, parameters: Tensor, num_steps: int, noise: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """At least `num_steps` predictions, at most to the end of `frames`, each call on the output of the one before it.

    Returns what each frame was predicted from, the predictions, and CAPE's guesses or None, all with a time axis.
    """
    history = frames[:, : model.frames_in]
    num_steps = min(max(num_steps, 1), frames.shape[1] - model.frames_in)
    previous, predictions, guesses = [], [], []
    for _ in range(math.ceil(num_steps / model.frames_out)):
        prediction, guess = _call(model, _noisy(history, noise), parameters)
        previous += [history[:, -1:], prediction[:, :-1]]
        predictions.append(prediction)
        guesses.append(guess)
        history = torch.cat([history, prediction], dim=1)[:, -model.frames_in :]
    end = frames.shape[1] - model.frames_in
    guess = None if guesses[0] is None else torch.stack(guesses, dim=1)
    return torch.cat(previous, dim=1)[:, :end], torch.cat(predictions, dim=1)[:, :end], guess


def _forced(
    model: nn.Module, frames: Tensor, parameters: Tensor, start: int, noise: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Predict the frames from index `start` on, all from the frames given; returns as `_chain` does."""
    num_frames = frames.shape[1]
    calls = torch.arange(start, num_frames, model.frames_out, device=frames.device)
    history = frames[:, calls[:, None] + torch.arange(-model.frames_in, 0, device=frames.device)].flatten(0, 1)
    prediction, guess = _call(model, _noisy(history, noise), parameters.repeat_interleave(len(calls), dim=0))
    previous = torch.cat([history[:, -1:], prediction[:, :-1]], dim=1)
    shape, end = (frames.shape[0], len(calls)), num_frames - start
    previous, prediction = (x.unflatten(0, shape).flatten(1, 2)[:, :end] for x in (previous, prediction))
    return previous, prediction, None if guess is None else guess.unflatten(0, shape)
