"""Fourier layers and Fourier neural operators in one and two dimensions.

Li et al., "Fourier Neural Operator for Parametric Partial Differential Equations" (2021), in the shape that PDEBench
(Takamoto et al., 2022) uses as a baseline.

Public tensors are `[batch, channels, *grid]`. Inside, the layers work grid-first, `[*grid, batch, channels]`: a
transform along the grid is then one matrix product over the flattened batch and channels, a pointwise convolution is
one over the flattened grid and batch, and nothing is copied between the two. On one CPU thread a training step takes
about 0.6 of its time with the FFT (see benchmarks/models.py).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from shared.config import UserError

Method = Literal["auto", "fft", "dft"]

# Matrix products with the truncated transform compute only the modes that are kept, the FFT all of them. Measured on
# CPU on lines of 16 to 1024 points and squares of 16² to 128², the products win up to here and lose from about 40.
MOST_MODES_FOR_DFT = 24


class SpectralConv1d(nn.Module):
    """Fourier layer: linear map of the lowest `modes` Fourier coefficients of every channel.

    `[batch, in_channels, n]` to `[batch, out_channels, n]`, any n with modes ≤ n/2 + 1. Li et al. (2021), section 4.
    `weight[0] + i·weight[1]` is the complex weight `[modes, in_channels, out_channels]`, held as real numbers.

    `method` chooses how the same map is computed: "fft", "dft" (products with truncated transform matrices), or
    "auto" by the number of modes.
    """

    def __init__(self, in_channels: int, out_channels: int, modes: int, method: Method = "auto") -> None:
        super().__init__()
        self.modes = _positive("modes", modes)
        self.method = _known_method(method)
        self.weight = nn.Parameter(_complex_uniform(modes, in_channels, out_channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.grid_first(x.permute(2, 0, 1)).permute(1, 2, 0)

    def grid_first(self, x: Tensor) -> Tensor:
        """The layer on `[n, batch, in_channels]`, to `[n, batch, out_channels]`."""
        n = x.shape[0]
        if self.modes > n // 2 + 1:
            raise UserError(f"{self.modes} Fourier modes on {n} points: at most {n // 2 + 1}; lower modes or refine")
        with _no_autocast(x):
            x, weight = _promote(x, self.weight)
            apply = _spectral_dft_1d if _use_dft(self.method, self.modes) else _spectral_fft_1d
            return apply(x, weight)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[2]}, {self.weight.shape[3]}, modes={self.modes}, method={self.method!r}"


class SpectralConv2d(nn.Module):
    """Fourier layer in two dimensions: the first and last `modes` rows of kx, the first `modes` columns of ky.

    `[batch, in_channels, nx, ny]` to `[batch, out_channels, nx, ny]`, any grid with modes ≤ nx, modes ≤ ny/2 + 1.
    `weight[0] + i·weight[1]` is the complex weight `[2·modes, modes, in_channels, out_channels]`. Where 2·modes > nx
    both blocks hold the middle rows, and the block of the last rows counts, as in the published implementation.
    """

    def __init__(self, in_channels: int, out_channels: int, modes: int, method: Method = "auto") -> None:
        super().__init__()
        self.modes = _positive("modes", modes)
        self.method = _known_method(method)
        self.weight = nn.Parameter(_complex_uniform(2 * modes, modes, in_channels, out_channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.grid_first(x.permute(2, 3, 0, 1)).permute(2, 3, 0, 1)

    def grid_first(self, x: Tensor) -> Tensor:
        """The layer on `[nx, ny, batch, in_channels]`, to `[nx, ny, batch, out_channels]`."""
        nx, ny = x.shape[:2]
        if self.modes > min(nx, ny // 2 + 1):
            raise UserError(
                f"{self.modes} Fourier modes on {nx}×{ny} points: at most {min(nx, ny // 2 + 1)}; "
                "lower modes or refine the grid"
            )
        weight = self.weight
        if 2 * self.modes > nx:
            weight = torch.cat([weight[:, : nx - self.modes], weight[:, self.modes :]], dim=1)
        with _no_autocast(x):
            x, weight = _promote(x, weight)
            apply = _spectral_dft_2d if _use_dft(self.method, self.modes) else _spectral_fft_2d
            return apply(x, weight)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[3]}, {self.weight.shape[4]}, modes={self.modes}, method={self.method!r}"


class _FNO(nn.Module):
    """What the one- and the two-dimensional operator share; see `FNO1d`."""

    dimensions: int
    spectral_conv: type[SpectralConv1d] | type[SpectralConv2d]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        width: int = 20,
        modes: int = 12,
        num_layers: int = 4,
        projection_width: int = 128,
        padding: int = 2,
        method: Method = "auto",
    ) -> None:
        super().__init__()
        self.padding = padding
        self.lift = nn.Linear(in_channels + self.dimensions, width)
        self.spectral = nn.ModuleList(self.spectral_conv(width, width, modes, method) for _ in range(num_layers))
        self.pointwise = nn.ModuleList(nn.Linear(width, width) for _ in range(num_layers))
        self.project = nn.Sequential(
            nn.Linear(width, projection_width), nn.GELU(), nn.Linear(projection_width, out_channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        grid_axes, grid_shape = range(self.dimensions), x.shape[2:]
        x = torch.cat([x, _coordinates(x)], dim=1)
        x = self.lift(x.permute(*range(2, 2 + self.dimensions), 0, 1))
        x = functional.pad(x, (0, 0, 0, 0) + (0, self.padding) * self.dimensions)
        for index, (spectral, pointwise) in enumerate(zip(self.spectral, self.pointwise, strict=True)):
            x = spectral.grid_first(x) + pointwise(x)
            if index < len(self.spectral) - 1:
                x = functional.gelu(x)
        x = x[tuple(slice(size) for size in grid_shape)]
        return self.project(x).permute(-2, -1, *grid_axes)


class FNO1d(_FNO):
    """Fourier neural operator on a line, `[batch, in_channels, n]` to `[batch, out_channels, n]`.

    Grid coordinate appended; linear lift to `width`; `padding` zeros at the end of the domain; `num_layers` times a
    Fourier layer plus a pointwise one, GELU except after the last; padding removed; two linear layers with GELU.
    PDEBench's settings are the defaults. Works at any resolution with modes ≤ (n + padding)/2 + 1.
    """

    dimensions = 1
    spectral_conv = SpectralConv1d


class FNO2d(_FNO):
    """Fourier neural operator on a rectangle, `[batch, in_channels, nx, ny]` to `[batch, out_channels, nx, ny]`.

    As `FNO1d`, with both coordinates appended and both axes padded at their end.
    """

    dimensions = 2
    spectral_conv = SpectralConv2d


def _coordinates(x: Tensor) -> Tensor:
    """Cell centers of the unit interval or square as channels, `[batch, dimensions, *grid]` for `x` of that grid."""
    axes = [(torch.arange(n, device=x.device, dtype=x.dtype) + 0.5) / n for n in x.shape[2:]]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).expand(x.shape[0], *[-1] * (x.ndim - 1))


def _complex_uniform(*shape: int) -> Tensor:
    """Real and imaginary parts uniform in [0, 1/(in_channels·out_channels)), stacked first."""
    return torch.rand(2, *shape) / (shape[-1] * shape[-2])


# The functions below take x `[*grid, batch, in]` and weight `[2, *modes, in, out]`, and return `[*grid, batch, out]`.


def _spectral_fft_1d(x: Tensor, weight: Tensor) -> Tensor:
    n, modes = x.shape[0], weight.shape[1]
    spectrum = torch.fft.rfft(x, dim=0)[:modes] @ torch.complex(*weight.unbind())
    return torch.fft.irfft(spectrum, n=n, dim=0)


def _spectral_dft_1d(x: Tensor, weight: Tensor) -> Tensor:
    (n, batch, in_channels), (_, modes, _, out_channels) = x.shape, weight.shape
    analysis, rotated_analysis, synthesis = _dft_matrices(n, modes, x.device, x.dtype)
    x = x.reshape(n, batch * in_channels)
    # Real and imaginary parts are rows of one product, so that (a + ib)(c + id) = (a + ib)c + (−b + ia)d needs two.
    spectrum = (analysis @ x).view(modes, 2 * batch, in_channels)
    rotated_spectrum = (rotated_analysis @ x).view(modes, 2 * batch, in_channels)
    real, imaginary = weight.unbind()
    product = torch.baddbmm(spectrum @ real, rotated_spectrum, imaginary)
    return (synthesis @ product.view(2 * modes, batch * out_channels)).view(n, batch, out_channels)


def _spectral_fft_2d(x: Tensor, weight: Tensor) -> Tensor:
    (nx, ny), (rows, columns) = x.shape[:2], weight.shape[1:3]
    last = min(columns, nx)
    first = rows - last
    spectrum = torch.fft.rfft2(x, dim=(0, 1))[:, :columns]
    kept = torch.cat([spectrum[:first], spectrum[nx - last :]]) @ torch.complex(*weight.unbind())
    gap = kept.new_zeros(nx - rows, *kept.shape[1:])
    # One axis after the other: the real transform of an array without Hermitian symmetry is only then well defined.
    spectrum = torch.fft.ifft(torch.cat([kept[:first], gap, kept[first:]]), dim=0)
    return torch.fft.irfft(spectrum, n=ny, dim=1)


def _spectral_dft_2d(x: Tensor, weight: Tensor) -> Tensor:
    (nx, ny, batch, in_channels), (_, rows, columns, _, out_channels) = x.shape, weight.shape
    analysis, _, synthesis = _dft_matrices(ny, columns, x.device, x.dtype)
    analysis_x, synthesis_x = _complex_dft_matrices(nx, rows - columns, columns, x.device, x.dtype)
    # [nx, ny, b·c] → [nx, (ky, part), b·c] → [(kx, part), ky·b·c]
    spectrum = torch.bmm(analysis.expand(nx, -1, -1), x.reshape(nx, ny, batch * in_channels))
    spectrum = spectrum.view(nx, columns, 2, -1).transpose(1, 2).reshape(2 * nx, columns * batch * in_channels)
    spectrum = (analysis_x @ spectrum).view(rows, 2, columns, batch, in_channels)
    real, imaginary = spectrum.unbind(1)
    weight_real, weight_imaginary = weight.unbind()
    product = torch.stack(
        [
            real @ weight_real - imaginary @ weight_imaginary,
            real @ weight_imaginary + imaginary @ weight_real,
        ],
        dim=1,
    )
    product = synthesis_x @ product.view(2 * rows, columns * batch * out_channels)
    product = product.view(nx, 2, columns, -1).transpose(1, 2).reshape(nx, 2 * columns, batch * out_channels)
    return torch.bmm(synthesis.expand(nx, -1, -1), product).view(nx, ny, batch, out_channels)


@lru_cache(maxsize=64)
def _dft_matrices(n: int, modes: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Truncated real transform of n points: analysis, i times analysis, and synthesis.

    The analysis is `[2·modes, n]`, rows (mode, real or imaginary part); the synthesis `[n, 2·modes]` is the inverse
    transform of a spectrum that is zero above the modes kept.
    """
    with torch.inference_mode(False):
        angle = _angles(torch.arange(modes), n)
        analysis = torch.stack([angle.cos(), -angle.sin()], dim=1)
        rotated = torch.stack([angle.sin(), angle.cos()], dim=1)
        # Every mode stands for its mirror image too, except the mean and the Nyquist mode, which are their own.
        multiplicity = torch.full((modes, 1, 1), 2.0, dtype=torch.float64)
        multiplicity[0] = 1
        if 2 * (modes - 1) == n:
            multiplicity[-1] = 1
        synthesis = (multiplicity / n * analysis).view(2 * modes, n).T
        matrices = (analysis.view(2 * modes, n), rotated.view(2 * modes, n), synthesis)
        return tuple(matrix.contiguous().to(device, dtype) for matrix in matrices)


@lru_cache(maxsize=64)
def _complex_dft_matrices(
    n: int, first: int, last: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Complex transform of n points kept at its `first` and `last` frequencies, as real matrices on (point, part).

    Analysis `[2·(first + last), 2·n]` and synthesis `[2·n, 2·(first + last)]`, real and imaginary part alternating.
    """
    with torch.inference_mode(False):
        angle = _angles(torch.cat([torch.arange(first), torch.arange(n - last, n)]), n)
        cos, sin = angle.cos(), angle.sin()
        # exp(−iθ)(a + ib) = (a cos θ + b sin θ) + i(b cos θ − a sin θ); the transpose holds exp(+iθ).
        blocks = torch.stack([torch.stack([cos, sin], dim=-1), torch.stack([-sin, cos], dim=-1)], dim=1)
        analysis = blocks.view(2 * (first + last), 2 * n)
        return tuple(matrix.contiguous().to(device, dtype) for matrix in (analysis, analysis.T / n))


def _angles(frequencies: Tensor, n: int) -> Tensor:
    """2π k j / n for the frequencies k and points j, `[len(frequencies), n]`, in float64."""
    # Reduced modulo n in whole numbers, so that the angle stays accurate at high frequencies.
    return (frequencies[:, None] * torch.arange(n) % n).double() * (2 * torch.pi / n)


def _use_dft(method: Method, modes: int) -> bool:
    return method == "dft" or (method == "auto" and modes <= MOST_MODES_FOR_DFT)


def _promote(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Half-precision operands as float32: the transforms lose too much in it, and on CPU there is no half FFT."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    return x.to(dtype), weight.to(dtype)


def _no_autocast(x: Tensor) -> AbstractContextManager[object]:
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _positive(name: str, value: int) -> int:
    if value < 1:
        raise UserError(f"{name} must be at least 1 (given: {value})")
    return value


def _known_method(method: str) -> Method:
    if method not in ("auto", "fft", "dft"):
        raise UserError(f"unknown method {method!r} of a Fourier layer; choose auto, fft or dft")
    return method
