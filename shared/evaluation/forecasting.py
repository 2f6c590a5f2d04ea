"""Masked errors of forecasts, as the traffic-forecasting literature defines them (Li et al. 2018, DCRNN, section 4.1).

Predictions and targets are arrays of any one shape, such as [windows, horizon, sites]. A mean runs over the readings
that count: those where `mask` is true, and, with `null_value`, those where the target is not that value (0 marks a
missing reading in METR-LA) or not NaN (`null_value=nan`). All three metrics share this mask. The literature's code
multiplies errors by the mask divided by its mean, which is the same number; where nothing counts, it says 0, which is
the best possible score for a forecast that was never tested. Here it is `nan`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def masked_mae(
    prediction: ArrayLike, target: ArrayLike, mask: ArrayLike | None = None, *, null_value: float | None = None
) -> float:
    """Mean absolute error, mean |prediction - target|, in the target's units; nan where nothing counts."""
    return _mean(np.abs(_errors(prediction, target, mask, null_value)[0]))


def masked_rmse(
    prediction: ArrayLike, target: ArrayLike, mask: ArrayLike | None = None, *, null_value: float | None = None
) -> float:
    """Root of the mean squared error, sqrt(mean (prediction - target)²), over all that counts together.

    It is not the mean over windows or sites of their own RMSE, which is never larger.
    """
    return float(np.sqrt(_mean(_errors(prediction, target, mask, null_value)[0] ** 2)))


def masked_mape(
    prediction: ArrayLike,
    target: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    null_value: float | None = 0.0,
    smallest: float = 0.0,
) -> float:
    """Mean absolute percentage error, 100 · mean |prediction - target| / |target|, in percent.

    Targets of zero have no percentage and never count; nor do those up to `smallest` in magnitude, a common remedy for
    targets near zero, which otherwise make up the whole mean.
    """
    errors, targets = _errors(prediction, target, mask, null_value)
    counts = np.abs(targets) > smallest
    return 100 * _mean(np.abs(errors[counts]) / np.abs(targets[counts]))


def percentile_mape(
    prediction: ArrayLike, target: ArrayLike, mask: ArrayLike | None = None, *, percentile: float = 95.0
) -> float:
    """Mean absolute error in percent of a high target, 100 · mean(|prediction - target| / P95 of the window's targets).

    Shapes [windows, …]; the percentile is taken over each window's own targets that count. It is bounded where targets
    are near zero, and about 1.1 to 2 times smaller than `masked_mape`, with which it must not be compared.
    Windows whose percentile is not positive do not count. Source: published code of Tamaru et al. 2024
    (arXiv 2401.12920), where it is called MAPE.
    """
    errors = window_percentage_errors(prediction, target, mask, percentile=percentile)
    return _mean(errors[np.isfinite(errors)])


def window_percentage_errors(
    prediction: ArrayLike, target: ArrayLike, mask: ArrayLike | None = None, *, percentile: float = 95.0
) -> Array:
    """The terms of `percentile_mape`, in the shape of the target; nan for what does not count."""
    prediction, target, counts = _checked(prediction, target, mask, None)
    rows = np.where(counts, target, np.nan).reshape(len(target), -1)
    high = np.full(len(rows), np.nan)
    some = counts.reshape(len(target), -1).any(axis=1)
    if some.any():
        high[some] = np.nanpercentile(rows[some], percentile, axis=1)
    high = np.where(high > 0, high, np.nan).reshape(-1, *(1,) * (target.ndim - 1))
    return np.where(counts, 100 * np.abs(prediction - target) / high, np.nan)


def error_by_step(
    prediction: ArrayLike, target: ArrayLike, mask: ArrayLike | None = None, *, null_value: float | None = None
) -> dict[str, Array]:
    """`mae` and `rmse` of every step ahead, each [horizon], from arrays [windows, horizon, sites]."""
    prediction, target, counts = _checked(prediction, target, mask, null_value)
    if target.ndim != 3:
        raise ValueError(f"errors by step need arrays [windows, horizon, sites], not of shape {target.shape}")
    number = counts.sum(axis=(0, 2))
    errors = np.where(counts, prediction - target, 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mae = np.abs(errors).sum(axis=(0, 2)) / number
        rmse = np.sqrt((errors**2).sum(axis=(0, 2)) / number)
    return {"mae": mae, "rmse": rmse}


def block_means(errors: ArrayLike, block_length: int) -> Array:
    """Mean over blocks of `block_length` consecutive windows of errors [windows, …], nan aside; [blocks].

    Neighboring windows overlap and are no independent test items; blocks longer than a window hardly overlap, and can
    be resampled. A last block that is shorter than half a block is joined to the one before it.
    """
    values = np.asarray(errors, dtype=np.float64)
    if block_length < 1:
        raise ValueError(f"block_length must be positive, not {block_length}")
    rows = values.reshape(len(values), -1)
    counts = np.isfinite(rows).sum(axis=1)
    sums = np.nansum(rows, axis=1)
    starts = np.arange(0, len(rows), block_length)
    if len(starts) > 1 and len(rows) - starts[-1] < block_length / 2:
        starts = starts[:-1]
    number = np.add.reduceat(counts, starts)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.add.reduceat(sums, starts) / number


def _errors(
    prediction: ArrayLike, target: ArrayLike, mask: ArrayLike | None, null_value: float | None
) -> tuple[Array, Array]:
    """Errors and targets that count, each flat."""
    prediction, target, counts = _checked(prediction, target, mask, null_value)
    return (prediction - target)[counts], target[counts]


def _checked(
    prediction: ArrayLike, target: ArrayLike, mask: ArrayLike | None, null_value: float | None
) -> tuple[Array, Array, NDArray[np.bool_]]:
    """Both sides in double precision, and which readings count.

    Shapes must be equal: broadcasting would compare every forecast with targets that are not its own.
    """
    prediction, target = np.asarray(prediction, dtype=np.float64), np.asarray(target, dtype=np.float64)
    if prediction.shape != target.shape or target.ndim == 0:
        raise ValueError(f"prediction {prediction.shape} and target {target.shape} must have one shape")
    counts = np.ones(target.shape, bool) if mask is None else np.asarray(mask, dtype=bool)
    if counts.shape != target.shape:
        raise ValueError(f"mask {counts.shape} and target {target.shape} must have one shape")
    if null_value is not None:
        counts = counts & (~np.isnan(target) if np.isnan(null_value) else ~np.isclose(target, null_value))
    if np.isnan(target[counts]).any():
        raise ValueError("targets that count are not a number: leave them out with mask or null_value=nan")
    return prediction, target, counts


def _mean(values: Array) -> float:
    return float(values.mean()) if values.size else float("nan")
