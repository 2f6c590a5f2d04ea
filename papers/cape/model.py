"""Parameter-guided channel attention (CAPE): a small module in front of an autoregressive PDE solver.

Takamoto, Alesiani and Niepert, "Learning Neural PDE Solvers with Parameter-Guided Channel Attention" (ICML 2023).

Every model of this paper is called in the same way: `model(history, parameters)` with the latest frames
`[batch, frames·channels, *grid]`, oldest first, and the parameters λ of the equation `[batch, num_parameters]`. It
returns the next state `[batch, channels, *grid]`, and CAPE's own guess of it or None.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from shared.config import UserError
from shared.nn import ChannelMask, SpectralConv1d, SpectralConv2d, per_channel, pointwise_conv


class CAPE(nn.Module):
    """Guess the next state û from the present one u and the parameters λ of the equation.

    u `[batch, channels, *grid]` and λ `[batch, num_parameters]` to û of the shape of u; one future state (ℓ = 1), as in
    all runs of the paper. Three convolutions of different reach, each with a factor from λ on every channel:

        y = GELU(Conv_k(u))
        z = m0(λ) ⊙ upsample(Spectral(pool(y))) + m1(λ) ⊙ Conv1×1(y) + m2(λ) ⊙ Depthwise_k(y) + Conv1×1(y)
        û = u + LN(P GELU(z)) in one dimension,  û = u ⊙ (1 + LN(P GELU(z))) in two

    The factors see λ in one dimension and λ/(1 + λ) in two. The layer normalization runs over space and has one weight
    a grid point: it takes the spatial mean away and ties the module to the grid it was built for. The product in two
    dimensions leaves a channel that is zero as it is.
    """

    def __init__(
        self,
        channels: int,
        num_parameters: int,
        grid_shape: tuple[int, ...],
        width: int = 64,
        modes: int = 16,
        kernel_size: int = 5,
        pool: int = 4,
    ) -> None:
        super().__init__()
        dimensions = len(grid_shape)
        if dimensions not in (1, 2):
            raise UserError(f"CAPE is defined on grids of 1 or 2 dimensions (given: {grid_shape})")
        if width % 2 or kernel_size % 2 == 0:
            raise UserError(f"CAPE needs an even width and an odd kernel size (given: {width} and {kernel_size})")
        if any(size % pool for size in grid_shape):
            raise UserError(f"CAPE averages over {pool} points, which do not divide the grid {grid_shape} evenly")
        conv, spectral = (nn.Conv1d, SpectralConv1d) if dimensions == 1 else (nn.Conv2d, SpectralConv2d)
        averaged = [size // pool for size in grid_shape]
        largest = min([*averaged[:-1], averaged[-1] // 2 + 1])
        if modes > largest:
            raise UserError(f"CAPE keeps {modes} modes, but its averaged grid has {largest}: lower cape_modes")
        half = width // 2
        self.grid_shape = tuple(grid_shape)
        self.pool = pool
        self.embed = conv(channels, half, kernel_size, padding="same", bias=False)
        self.masks = nn.ModuleList(ChannelMask(num_parameters, width, half) for _ in range(3))
        self.spectral = spectral(half, width, modes)
        self.pointwise = nn.Linear(half, width)
        self.depthwise = conv(half, width, kernel_size, padding="same", groups=half, bias=False)
        self.skip = nn.Linear(half, width)
        self.project = nn.Linear(width, channels)
        self.norm = nn.LayerNorm(self.grid_shape)

    def forward(self, u: Tensor, parameters: Tensor) -> Tensor:
        if u.shape[2:] != self.grid_shape:
            raise UserError(f"this CAPE module is tied to the grid {self.grid_shape} (given: {tuple(u.shape[2:])})")
        parameters = condition(parameters, len(self.grid_shape))
        m0, m1, m2 = (mask(parameters) for mask in self.masks)
        y = functional.gelu(_conv(self.embed, u))
        # The masked pointwise convolution and the skip are both linear in y: one convolution with a weight a sample.
        z = pointwise_conv(
            y,
            m1[:, :, None] * self.pointwise.weight + self.skip.weight,
            m1 * self.pointwise.bias + self.skip.bias,
        )
        z = torch.addcmul(z, per_channel(m2, y), _conv(self.depthwise, y))
        z = z + self._upsample(per_channel(m0, y) * self.spectral(self._average(y)))
        z = self.norm(pointwise_conv(functional.gelu(z), self.project.weight, self.project.bias))
        return u + z if len(self.grid_shape) == 1 else u * (1 + z)

    def _average(self, y: Tensor) -> Tensor:
        average = functional.avg_pool1d if len(self.grid_shape) == 1 else functional.avg_pool2d
        return average(y, self.pool)

    def _upsample(self, y: Tensor) -> Tensor:
        return functional.interpolate(y, scale_factor=self.pool, mode="nearest")


class CAPEModel(nn.Module):
    """A base network led by CAPE: u^{k+1} = Mix(Base([u^k, û^{k+1}])), Mix being a 1×1 convolution.

    `base` maps twice the channels to twice the channels. Prediction and guess are `[batch, channels, *grid]`.
    """

    frames_in = 1
    frames_out = 1

    def __init__(self, base: nn.Module, cape: CAPE, channels: int) -> None:
        super().__init__()
        self.base = base
        self.cape = cape
        self.mix = nn.Linear(2 * channels, channels)

    def forward(self, history: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        guess = self.cape(history, parameters)
        prediction = self.base(torch.cat([history, guess], dim=1), parameters)
        return pointwise_conv(prediction, self.mix.weight, self.mix.bias), guess


def condition(parameters: Tensor, dimensions: int) -> Tensor:
    """The parameters as networks see them: λ itself in one dimension, λ/(1 + λ), the sigmoid of log λ, in two."""
    return parameters if dimensions == 1 else parameters / (1 + parameters)


def _conv(conv: nn.Conv1d | nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution without bias, zero padding to the same size; on CPU in one dimension as a matrix product.

    The library's convolution with few inputs and two outputs a group takes twice as long there.
    """
    if x.device.type != "cpu" or x.ndim != 3:
        return conv(x)
    (batch, channels, n), (kernel_size,), groups = x.shape, conv.kernel_size, conv.groups
    windows = functional.pad(x, (kernel_size // 2, kernel_size // 2)).unfold(2, kernel_size, 1)
    windows = windows.permute(1, 3, 0, 2).reshape(groups, channels // groups * kernel_size, batch * n)
    weight = conv.weight.reshape(groups, conv.out_channels // groups, -1)
    return torch.bmm(weight, windows).view(-1, batch, n).transpose(0, 1)
