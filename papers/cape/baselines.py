"""The networks that CAPE stands in front of, and the variants it is compared with.

A model's name is its base, `fno`, `unet` or `mpnn`, and a suffix: none (one frame in, parameters unknown), `_pino`
(the same network, trained with the residual of the equation as well; `_pino_official` with that of the published code),
`_conditional` (parameters as constant channels), `_two_frames` (two frames in, from which the speed of change can be
read) or `_cape`.
"""

from __future__ import annotations

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional

from shared.config import Strict, UserError
from shared.nn import FNO1d, FNO2d, UNet1d, UNet2d, constant_channels

from .data import EquationData
from .model import CAPE, CAPEModel, condition

BASES = ("fno", "unet", "mpnn")
VARIANTS = ("", "pino", "pino_official", "conditional", "two_frames", "cape")


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

    `frames_in` frames of history; with `conditional` the parameters come along as constant channels.
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

    `x` `[batch, in_channels, n]`, whose last channels are the present state, and λ `[batch, num_parameters]`, to the
    next `time_window` states `[batch, time_window·out_channels, n]`, in order of time. Every layer:

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
    """One layer of `MessagePassingSolver`: new features from h `[batch, n, hidden]`.

    u `[batch, n, channels]` and λ `[batch, n, num_parameters]` are what else the messages hold.
    """

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
            raise UserError(
                f"{self.neighbors} neighbors on each side need more than {2 * self.neighbors} points, not {n}"
            )
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
        length = (hidden - 15) // stride + 1
        if length >= time_window:
            return nn.Sequential(
                nn.Conv1d(1, 8, 15, stride), nn.SiLU(), nn.Conv1d(8, channels, length - time_window + 1)
            )
    raise UserError(
        f"a message-passing solver with {hidden} features can decode at most {max(hidden - 14, 0)} frames at once, "
        f"not {time_window}: raise mpnn_hidden or lower mpnn_time_window"
    )


def build_model(
    name: str, settings: ModelSettings, *, channels: int, num_parameters: int, grid_shape: tuple[int, ...]
) -> Baseline | CAPEModel:
    """Build a model by name, e.g. `fno_cape`; the names are in this module's docstring.

    `channels` of the state, `num_parameters` of the equation, and the grid in one or two dimensions, to which models
    with CAPE are tied. Attributes `frames_in` and `frames_out` of the result say how many frames a call takes and
    gives: `model(history [batch, frames_in·channels, *grid], parameters [batch, num_parameters])` returns the
    prediction `[batch, frames_out·channels, *grid]` and CAPE's guess `[batch, channels, *grid]` or None.
    """
    base, variant = parse_name(name)
    _check_sizes(base, variant, settings, grid_shape)
    equation = {"channels": channels, "num_parameters": num_parameters, "grid_shape": grid_shape}
    if variant == "cape":
        return _build(base, variant, getattr(settings, _WIDTHS[base]), settings, **equation)
    width = getattr(settings, _BASE_WIDTHS[base]) or base_width_matching(base, settings, **equation)
    return _build(base, variant, width, settings, **equation)


def model_like(example: EquationData, name: str, settings: ModelSettings) -> Baseline | CAPEModel:
    """Build a model for the channels, parameters and grid of a data set."""
    channels, *grid_shape = example.u.shape[2:]
    num_parameters = example.parameters.shape[1]
    return build_model(name, settings, channels=channels, num_parameters=num_parameters, grid_shape=tuple(grid_shape))


def base_width_matching(
    base: str, settings: ModelSettings, *, channels: int, num_parameters: int, grid_shape: tuple[int, ...]
) -> int:
    """The width without CAPE at which `base` comes closest to the parameter count of the same base with CAPE."""

    def count(variant: str, width: int) -> int:
        with torch.device("meta"):
            return num_weights(_build(base, variant, width, settings, channels, num_parameters, grid_shape))

    width = getattr(settings, _WIDTHS[base])
    target = count("cape", width)
    while count("", width) < target:
        width += 1
    return min(width - 1, width, key=lambda candidate: abs(count("", candidate) - target)) if width > 1 else width


def num_weights(model: nn.Module) -> int:
    """Number of trained parameters; a complex one counts twice."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def parse_name(name: str) -> tuple[str, str]:
    """Split a model's name into base and variant; `UserError` lists the names there are."""
    base, _, variant = name.partition("_")
    if base not in BASES or variant not in VARIANTS or name.endswith("_"):
        known = ", ".join(f"{base}{'_' * bool(variant)}{variant}" for base in BASES for variant in VARIANTS)
        raise UserError(f"unknown model {name!r}; choose one of {known}")
    return base, variant


_WIDTHS = {"fno": "width", "unet": "unet_features", "mpnn": "mpnn_hidden"}
_BASE_WIDTHS = {"fno": "base_width", "unet": "unet_base_features", "mpnn": "mpnn_base_hidden"}


def _check_sizes(base: str, variant: str, settings: ModelSettings, grid_shape: tuple[int, ...]) -> None:
    """Refuse what would only fail in the first training step."""
    shape = "×".join(map(str, grid_shape))
    if len(grid_shape) not in (1, 2):
        raise UserError(f"models are built for grids in 1 or 2 dimensions (given: {shape})")
    if base == "fno":
        padded = [size + settings.padding for size in grid_shape]
        largest = padded[-1] // 2 + 1 if len(padded) == 1 else min(padded[0] // 2, padded[1] // 2 + 1)
        if settings.modes > largest:
            raise UserError(f"a grid of {shape} holds at most {largest} Fourier modes: lower modes ({settings.modes})")
    if base == "unet" and any(size % 16 for size in grid_shape):
        raise UserError(f"the U-Net needs a grid whose sides are multiples of 16 (given: {shape})")
    if base == "mpnn" and (len(grid_shape) != 1 or grid_shape[0] <= 2 * settings.mpnn_neighbors):
        least = 2 * settings.mpnn_neighbors + 1
        raise UserError(f"the message-passing solver needs a line of {least} points or more (given: {shape})")
    if base == "mpnn" and variant == "cape" and settings.mpnn_time_window != 1:
        raise UserError("CAPE guesses one frame, so mpnn_cape needs mpnn_time_window: 1")


def _build(
    base: str,
    variant: str,
    width: int,
    settings: ModelSettings,
    channels: int,
    num_parameters: int,
    grid_shape: tuple[int, ...],
) -> Baseline | CAPEModel:
    if variant == "cape":
        cape = CAPE(
            channels,
            num_parameters,
            grid_shape,
            settings.cape_width,
            settings.cape_modes,
            settings.cape_kernel_size,
            settings.cape_pool,
        )
        network = _base_network(base, width, settings, 2 * channels, 2 * channels, num_parameters, grid_shape)
        return CAPEModel(network, cape, channels)
    frames_in = 2 if variant == "two_frames" else 1
    frames_out = settings.mpnn_time_window if base == "mpnn" else 1
    conditional = variant == "conditional"
    in_channels = frames_in * channels + (num_parameters if conditional else 0)
    network = _base_network(base, width, settings, in_channels, channels, num_parameters, grid_shape)
    return Baseline(network, frames_in, frames_out, conditional)


def _base_network(
    base: str,
    width: int,
    settings: ModelSettings,
    in_channels: int,
    out_channels: int,
    num_parameters: int,
    grid_shape: tuple[int, ...],
) -> nn.Module:
    if base == "mpnn":
        return MessagePassingSolver(
            in_channels,
            out_channels,
            num_parameters,
            width,
            settings.mpnn_layers,
            settings.mpnn_neighbors,
            settings.mpnn_time_window,
            settings.mpnn_time_step,
        )
    if base == "unet":
        return Unconditional((UNet1d if len(grid_shape) == 1 else UNet2d)(in_channels, out_channels, width))
    fno = FNO1d if len(grid_shape) == 1 else FNO2d
    return Unconditional(
        fno(
            in_channels,
            out_channels,
            width,
            settings.modes,
            settings.num_layers,
            settings.projection_width,
            settings.padding,
        )
    )
