"""Parameter-guided channel attention (CAPE): a small module in front of an autoregressive PDE solver.

Takamoto, Alesiani and Niepert, "Learning Neural PDE Solvers with Parameter-Guided Channel Attention" (ICML 2023).

Every model of this paper is called in the same way: `model(history, parameters)` with the latest frames
`[batch, frames·channels, *grid]`, oldest first, and the parameters λ of the equation `[batch, num_parameters]`. It
returns the next state `[batch, channels, *grid]`, and CAPE's own guess of it or None.
"""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional

from shared.config import UserError
from shared.nn import ChannelMask, SpectralConv1d, SpectralConv2d, per_channel


class CAPE(nn.Module):
    """Guess the next state û from the present one u and the parameters λ of the equation (section 3.2, figure 2).

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
        largest = min(grid_shape[0] if dimensions == 2 else math.inf, grid_shape[-1] // 2 + pool) // pool
        if modes > largest:
            raise UserError(f"CAPE keeps {modes} modes, but its averaged grid has {largest}: lower cape_modes")
        half, padding = width // 2, kernel_size // 2
        self.grid_shape = tuple(grid_shape)
        self.pool = pool
        self.embed = conv(channels, half, kernel_size, padding=padding, bias=False)
        self.masks = nn.ModuleList(ChannelMask(num_parameters, width, half) for _ in range(3))
        self.spectral = spectral(half, width, modes)
        self.pointwise = conv(half, width, 1)
        self.depthwise = conv(half, width, kernel_size, padding=padding, groups=half, bias=False)
        self.skip = conv(half, width, 1)
        self.project = conv(width, channels, 1)
        self.norm = nn.LayerNorm(self.grid_shape)

    def forward(self, u: Tensor, parameters: Tensor) -> Tensor:
        if u.shape[2:] != self.grid_shape:
            raise UserError(f"this CAPE module is tied to the grid {self.grid_shape} (given: {tuple(u.shape[2:])})")
        parameters = condition(parameters, len(self.grid_shape))
        y = functional.gelu(self.embed(u))
        m0, m1, m2 = (per_channel(mask(parameters), u) for mask in self.masks)
        z = m1 * self.pointwise(y) + m2 * self.depthwise(y) + self.skip(y)
        z = z + self._upsample(m0 * self.spectral(self._average(y)))
        z = self.norm(self.project(functional.gelu(z)))
        return u + z if len(self.grid_shape) == 1 else u * (1 + z)

    def _average(self, y: Tensor) -> Tensor:
        average = functional.avg_pool1d if len(self.grid_shape) == 1 else functional.avg_pool2d
        return average(y, self.pool)

    def _upsample(self, y: Tensor) -> Tensor:
        return functional.interpolate(y, scale_factor=self.pool, mode="nearest")


class CAPEModel(nn.Module):
    """A base network led by CAPE: u^{k+1} = Mix(Base([u^k, û^{k+1}])), with Mix a 1×1 convolution (section 3.1).

    `base` maps twice the channels to twice the channels.
    """

    frames_in = 1
    frames_out = 1

    def __init__(self, base: nn.Module, cape: CAPE, channels: int) -> None:
        super().__init__()
        self.base = base
        self.cape = cape
        self.mix = (nn.Conv1d if len(cape.grid_shape) == 1 else nn.Conv2d)(2 * channels, channels, 1)
