"""Errors of predicted fields.

Fields are [batch, time, channels, *space] with one or two axes of space. Every metric returns one number a sample,
frame and channel, [batch, time, channels], so that the caller decides what to average: over all of it for a headline
number, over all but time for a curve. Definitions follow PDEBench (Takamoto et al. 2022, arXiv 2210.07182, appendix B),
taken a sample at a time. Frames that were given to the model, the initial ones, do not belong in.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Wavenumbers in units of the domain's fundamental: low [0, 4), middle [4, 12), high [12, inf).
FOURIER_BANDS = {"low": (0.0, 4.0), "middle": (4.0, 12.0), "high": (12.0, math.inf)}


def rmse(prediction: Tensor, target: Tensor) -> Tensor:
    """Root of the mean squared error over space."""
    return _root_mean_square(_error(prediction, target))


def nrmse(prediction: Tensor, target: Tensor) -> Tensor:
    """Error normalized by the target: sqrt(mean_x (prediction - target)^2) / sqrt(mean_x target^2).

    Not finite where the target is zero all over.
    """
    return rmse(prediction, target) / _root_mean_square(target)


def conserved_rmse(prediction: Tensor, target: Tensor) -> Tensor:
    """Error of the spatial mean, which the equations conserve: |mean_x prediction - mean_x target|."""
    return _error(prediction, target).flatten(3).mean(dim=3).abs()


def max_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Largest absolute error over space."""
    return _error(prediction, target).flatten(3).abs().amax(dim=3)


def boundary_rmse(prediction: Tensor, target: Tensor) -> Tensor:
    """Root of the mean squared error over the cells at the boundary, each counted once."""
    error = _error(prediction, target)
    on_boundary = torch.zeros(error.shape[3:], dtype=torch.bool, device=error.device)
    for axis in range(on_boundary.ndim):
        on_boundary.index_fill_(axis, torch.tensor([0, error.shape[3 + axis] - 1], device=error.device), True)
    return error[..., on_boundary].square().mean(dim=3).sqrt()


def fourier_rmse(prediction: Tensor, target: Tensor, low: float, high: float) -> Tensor:
    """Root mean squared error that lies in the wavenumbers low <= |k| < high.

    By Parseval's theorem the squares over bands that cover all wavenumbers add up to the squared RMSE. (PDEBench
    averages over the wavenumbers of a band, which makes bands of unequal width comparable a mode; here they add up.)
    """
    error = _error(prediction, target)
    shape = error.shape[3:]
    axes = tuple(range(3, error.ndim))
    power = torch.fft.fftn(error, dim=axes, norm="forward").abs().square()
    wavenumbers = _radial_wavenumbers(shape, error.device)
    in_band = (wavenumbers >= low) & (wavenumbers < high)
    return power[..., in_band].sum(dim=3).sqrt()


def field_metrics(prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
    """All metrics of this module by name, each [batch, time, channels]."""
    metrics = {
        "nrmse": nrmse(prediction, target),
        "rmse": rmse(prediction, target),
        "conserved_rmse": conserved_rmse(prediction, target),
        "max_error": max_error(prediction, target),
        "boundary_rmse": boundary_rmse(prediction, target),
    }
    for name, (low, high) in FOURIER_BANDS.items():
        metrics[f"fourier_rmse_{name}"] = fourier_rmse(prediction, target, low, high)
    return metrics


def _error(prediction: Tensor, target: Tensor) -> Tensor:
    if prediction.shape != target.shape or prediction.ndim not in (4, 5):
        raise ValueError(
            f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} must both be "
            "[batch, time, channels, *space] with one or two axes of space"
        )
    return prediction - target


def _root_mean_square(field: Tensor) -> Tensor:
    return field.flatten(3).square().mean(dim=3).sqrt()


def _radial_wavenumbers(shape: torch.Size, device: torch.device) -> Tensor:
    """|k| of every mode of an FFT over `shape`, in units of the domain's fundamental wavenumber."""
    axes = [torch.fft.fftfreq(size, 1 / size, device=device, dtype=torch.float64) for size in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).square().sum(dim=0).sqrt()
