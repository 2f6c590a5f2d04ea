"""The networks that CAPE stands in front of, and the variants it is compared with.

A model's name is its base, `fno`, `unet` or `mpnn`, and a suffix: none (one frame in, parameters unknown), `_pino`
(the same network, trained with the residual of the equation as well), `_conditional` (parameters as constant
channels), `_two_frames` (two frames in, from which the speed of change can be read) or `_cape`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional

from shared.config import Strict, UserError
from shared.nn import FNO1d, FNO2d, UNet1d, UNet2d, constant_channels

from .model import CAPE, CAPEModel, condition

BASES = ("fno", "unet", "mpnn")
VARIANTS = ("", "pino", "conditional", "two_frames", "cape")


class ModelSettings(Strict):
    """Sizes of the networks; the defaults are the paper's in one dimension.

    Each base has a width with CAPE and one without; where the latter is None it is chosen so that the whole model has
    as many parameters as the one with CAPE (the paper: FNO 20 with CAPE against 36 in 1D and 28 in 2D).
    """

    width: PositiveInt = 20
    base_width: PositiveInt | None = None
    modes: PositiveInt = 12
    num_layers: PositiveInt = 4
    projection_width: PositiveInt = 128
    padding: int = Field(default=2, ge=0)
    unet_features: PositiveInt = 32
    unet_base_features: PositiveInt | None = None
    mpnn_hidden: PositiveInt = 128
    mpnn_base_hidden: PositiveInt | None = None
    mpnn_layers: PositiveInt = 6
    mpnn_neighbors: PositiveInt = 3
    mpnn_time_window: PositiveInt = 1
    mpnn_time_step: PositiveFloat = 0.05
    cape_width: PositiveInt = 64
    cape_modes: PositiveInt = 16
    cape_kernel_size: PositiveInt = 5
    cape_pool: PositiveInt = 4


class Baseline(nn.Module):
    """A base network alone, called as every model here: `(history, parameters)` to `(prediction, None)`.

    `frames_in` frames of history; with `conditional` the parameters are appended as constant channels.
    """

    def __init__(self, base: nn.Module, frames_in: int = 1, frames_out: int = 1, conditional: bool = False) -> None:
        super().__init__()
        self.base = base
        self.frames_in = frames_in
        self.frames_out = frames_out
        self.conditional = conditional

    def forward(self, history: Tensor, parameters: Tensor) -> tuple[Tensor, None]:
        x = constant_channels(condition(parameters, history.ndim - 2), history) if self.conditional else history
        return self.base(x, parameters), None


class Unconditional(nn.Module):
    """A network that is handed the parameters and does not look at them."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, parameters: Tensor) -> Tensor:
        return self.network(x)


class MessagePassingSolver(nn.Module):
    """Graph network on the points of a line (Brandstetter, Worrall and Welling, "Message Passing Neural PDE Solvers").

    `x` `[batch, in_channels, n]`, whose last `out_channels` are the present state, and λ `[batch, num_parameters]`, to
    the next `time_window` states `[batch, time_window·out_channels, n]`, in order of time. Every layer:

        message m_ij = MLP(h_i, h_j, u_i − u_j, x_i − x_j, λ) from each of `neighbors` points on either side
        update  h_i ← InstanceNorm(h_i + MLP(h_i, mean_j m_ij, λ)), swish in both MLPs

    The decoder convolves a point's features as if they were a time axis, and u + Δt·(1 … time_window)·change is the
    result (temporal bundling). Absolute positions are left out, so that on a periodic line, where x_i − x_j is taken
    the short way round, the solver commutes with translations; time is left out, since the equations do not hold it.

    The graph of a regular grid is the same everywhere: neighbors are found by index arithmetic, and the first layer of
    the message network, linear in its inputs, is evaluated once a point instead of once an edge. A general graph
    library would do neither, so none is used.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_parameters: int,
        hidden: int = 128,
        num_layers: int = 6,
        neighbors: int = 3,
        time_window: int = 1,
        time_step: float = 0.05,
        periodic: bool = True,
    ) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.time_window = time_window
        self.time_step = time_step
        self.embed = nn.Sequential(
            nn.Linear(in_channels + num_parameters, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU()
        )
        self.layers = nn.ModuleList(
            MessagePassing(hidden, in_channels, num_parameters, neighbors, periodic) for _ in range(num_layers)
        )
        self.decoder = _time_decoder(hidden, out_channels, time_window)

    def forward(self, x: Tensor, parameters: Tensor) -> Tensor:
        batch, _, n = x.shape
        u = x.transpose(1, 2)
        parameters = parameters[:, None].expand(-1, n, -1)
        h = self.embed(torch.cat([u, parameters], dim=-1))
        for layer in self.layers:
            h = layer(h, u, parameters)
        change = self.decoder(h.flatten(0, 1)[:, None]).view(batch, n, self.out_channels, self.time_window)
        steps = self.time_step * torch.arange(1, self.time_window + 1, device=x.device, dtype=x.dtype)
        states = u[..., -self.out_channels :, None] + steps * change
        return states.permute(0, 3, 2, 1).flatten(1, 2)


class MessagePassing(nn.Module):
    """One layer of `MessagePassingSolver`: h `[batch, n, hidden]`, u `[batch, n, channels]` and λ `[batch, n, P]` to h."""

    def __init__(self, hidden: int, channels: int, num_parameters: int, neighbors: int, periodic: bool) -> None:
        super().__init__()
        self.neighbors = neighbors
        self.periodic = periodic
        self.receive = nn.Linear(hidden + channels + num_parameters, hidden)
        self.send = nn.Linear(hidden, hidden, bias=False)
        self.distance = nn.Linear(1, hidden, bias=False)
        self.message = nn.Sequential(nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU())
        self.update = nn.Sequential(
            nn.Linear(2 * hidden + num_parameters, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU()
        )
        self.norm = nn.InstanceNorm1d(hidden)

    def forward(self, h: Tensor, u: Tensor, parameters: Tensor) -> Tensor:
        n, hidden = h.shape[1:]
        if n <= 2 * self.neighbors:
            raise UserError(f"{self.neighbors} neighbors on each side need more than {2 * self.neighbors} points, not {n}")
        offsets = torch.arange(-self.neighbors, self.neighbors + 1, device=h.device)
        offsets = offsets[offsets != 0]
        sources = torch.arange(n, device=h.device)[:, None] + offsets
        # W(h_i, h_j, u_i − u_j, x_i − x_j, λ) is a sum of what i receives, what j sends and what their distance adds.
        of_u = self.receive.weight[:, hidden : hidden + u.shape[-1]]
        received = self.receive(torch.cat([h, u, parameters], dim=-1))
        sent = self.send(h) - functional.linear(u, of_u)
        apart = self.distance((-offsets[:, None] / n).to(h.dtype))
        messages = self.message(received[:, :, None] + sent[:, sources % n] + apart)
        if self.periodic:
            mean = messages.mean(dim=2)
        else:
            inside = ((sources >= 0) & (sources < n)).to(h.dtype)[..., None]
            mean = (messages * inside).sum(dim=2) / inside.sum(dim=1)
        h = h + self.update(torch.cat([h, mean, parameters], dim=-1))
        return self.norm(h.transpose(1, 2)).transpose(1, 2)


def _time_decoder(hidden: int, channels: int, time_window: int) -> nn.Sequential:
    """Two convolutions along the features that leave `time_window` values: `[·, 1, hidden]` to `[·, channels, window]`.

    At 128 features and a window of 20 these are the kernels 15 (stride 4) and 10 of the published decoder.
    """
    for stride in (4, 3, 2, 1):
        for kernel_size in (15, 7, 3):
            length = (hidden - kernel_size) // stride + 1
            if hidden >= kernel_size and length >= time_window:
                return nn.Sequential(
                    nn.Conv1d(1, 8, kernel_size, stride), nn.SiLU(), nn.Conv1d(8, channels, length - time_window + 1)
                )
    raise UserError(
        f"a message-passing solver with {hidden} features cannot decode a window of {time_window} frames: "
        "raise mpnn_hidden or lower mpnn_time_window"
    )


def build_model(
    name: str, settings: ModelSettings, *, channels: int, num_parameters: int, grid_shape: tuple[int, ...]
) -> nn.Module:
    """Build a model by name, e.g. `fno_cape`; see the module's docstring for the names.

    `channels` of the state, `num_parameters` of the equation, and the grid in one or two dimensions, to which models
    with CAPE are tied. Attributes `frames_in` and `frames_out` of the result say how many frames a call takes and
    gives: `model(history [batch, frames_in·channels, *grid], parameters [batch, num_parameters])` returns the
    prediction `[batch, frames_out·channels, *grid]` and CAPE's guess `[batch, channels, *grid]` or None.
    """
    base, variant = _parse(name)
    if base == "mpnn" and len(grid_shape) != 1:
        raise UserError(f"the message-passing solver is built for one dimension (grid given: {grid_shape})")
    if variant == "cape" and base == "mpnn" and settings.mpnn_time_window != 1:
        raise UserError("mpnn_cape predicts one frame a call: set mpnn_time_window to 1")
    if base == "unet" and any(size % 16 for size in grid_shape):
        raise UserError(f"the U-Net needs a grid whose sides are multiples of 16 (given: {grid_shape})")
    if base == "fno":
        _check_modes(settings, grid_shape)
    width = base_width(base, settings, channels=channels, num_parameters=num_parameters, grid_shape=grid_shape)
    return _build(base, variant, width, settings, channels, num_parameters, grid_shape)


def base_width(
    base: str, settings: ModelSettings, *, channels: int, num_parameters: int, grid_shape: tuple[int, ...]
) -> dict[bool, int]:
    raise NotImplementedError
