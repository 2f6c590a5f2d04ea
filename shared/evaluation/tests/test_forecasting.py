"""Masked errors against scikit-learn and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import mean_absolute_error, mean_absolute_percentage_error, root_mean_squared_error

from shared.evaluation.forecasting import (
    block_means,
    error_by_step,
    masked_mae,
    masked_mape,
    masked_rmse,
    percentile_mape,
    window_percentage_errors,
)


@pytest.fixture
def forecast() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    target = generator.uniform(0.1, 1, (20, 3, 4))
    return target + 0.1 * generator.standard_normal(target.shape), target


def test_without_a_mask_they_are_scikit_learns(forecast: tuple[np.ndarray, np.ndarray]) -> None:
    prediction, target = forecast
    flat = target.ravel(), prediction.ravel()
    assert masked_mae(prediction, target) == pytest.approx(mean_absolute_error(*flat))
    assert masked_rmse(prediction, target) == pytest.approx(root_mean_squared_error(*flat))
    assert masked_mape(prediction, target) == pytest.approx(100 * mean_absolute_percentage_error(*flat))


def test_masks_leave_out_what_they_mark(forecast: tuple[np.ndarray, np.ndarray]) -> None:
    prediction, target = forecast
    mask = np.random.default_rng(1).random(target.shape) < 0.6
    flat = target[mask], prediction[mask]
    assert masked_mae(prediction, target, mask) == pytest.approx(mean_absolute_error(*flat))
    assert masked_rmse(prediction, target, mask) == pytest.approx(root_mean_squared_error(*flat))
    assert masked_mape(prediction, target, mask) == pytest.approx(100 * mean_absolute_percentage_error(*flat))
    nulls = np.where(mask, target, 0)
    assert masked_mae(prediction, nulls, null_value=0) == pytest.approx(mean_absolute_error(*flat))
    unknown = np.where(mask, target, np.nan)
    assert masked_rmse(prediction, unknown, null_value=math.nan) == pytest.approx(root_mean_squared_error(*flat))
    # The form of the literature's code: errors times mask over its mean.
    weights = mask / mask.mean()
    assert masked_mae(prediction, target, mask) == pytest.approx((np.abs(prediction - target) * weights).mean())


def test_by_hand() -> None:
    prediction, target = np.array([[1.0, 2.0], [3.0, 5.0]]), np.array([[2.0, 2.0], [0.0, 4.0]])
    assert masked_mae(prediction, target) == 5 / 4
    assert masked_rmse(prediction, target) == pytest.approx(math.sqrt(11 / 4))
    # Zero targets have no percentage: (1/2 + 0 + 1/4) / 3.
    assert masked_mape(prediction, target) == pytest.approx(25)
    assert masked_mape(prediction, target, null_value=None) == pytest.approx(25)
    assert masked_mape(prediction, target, smallest=2) == pytest.approx(25)
    assert masked_mae(prediction, target, null_value=0) == pytest.approx(2 / 3)


def test_percentage_of_the_windows_95th_percentile() -> None:
    target = np.array([np.arange(101.0), np.full(101, 2.0), np.zeros(101)])
    prediction = target + np.array([[19.0], [1.0], [5.0]])
    # 19 of 95, then 1 of 2; a window without a positive target has no percentage.
    assert percentile_mape(prediction, target) == pytest.approx((20 + 50) / 2)
    mask = np.ones(target.shape, bool)
    mask[0] = False
    assert percentile_mape(prediction, target, mask) == pytest.approx(50)
    assert np.isnan(window_percentage_errors(prediction, target)[2]).all()


def test_where_nothing_counts() -> None:
    nothing = np.zeros((2, 3))
    assert math.isnan(masked_mae(nothing, nothing, null_value=0))
    assert math.isnan(masked_rmse(nothing, nothing, np.zeros((2, 3), bool)))
    assert math.isnan(masked_mape(nothing, nothing))
    assert math.isnan(percentile_mape(nothing + 1, nothing + 1, np.zeros((2, 3), bool)))


def test_errors_by_step(forecast: tuple[np.ndarray, np.ndarray]) -> None:
    prediction, target = forecast
    mask = np.random.default_rng(2).random(target.shape) < 0.5
    mask[:, 2] = False
    curves = error_by_step(prediction, target, mask)
    for step in range(2):
        kept = prediction[:, step], target[:, step], mask[:, step]
        assert curves["mae"][step] == pytest.approx(masked_mae(*kept))
        assert curves["rmse"][step] == pytest.approx(masked_rmse(*kept))
    assert np.isnan(curves["rmse"][2])


def test_blocks_of_windows() -> None:
    errors = np.arange(14.0)[:, None] * np.ones((14, 2))
    errors[1, 0] = np.nan
    assert block_means(errors, 4) == pytest.approx([11 / 7, 5.5, 9.5, 12.5])  # two windows are half a block
    assert block_means(errors[:13], 4) == pytest.approx([11 / 7, 5.5, 10])  # one is less, and joins the last block
    assert block_means(errors, 100) == pytest.approx([181 / 27])


@pytest.mark.parametrize("metric", [masked_mae, masked_rmse, masked_mape, percentile_mape])
def test_what_cannot_be_compared(metric: object) -> None:
    with pytest.raises(ValueError, match="must have one shape"):
        metric(np.zeros((1, 3, 4, 1)), np.zeros((4, 3)))
    with pytest.raises(ValueError, match="mask"):
        metric(np.zeros((4, 3)), np.zeros((4, 3)), np.ones(3, bool))
    with pytest.raises(ValueError, match="not a number"):
        metric(np.zeros((1, 2)), np.array([[1.0, np.nan]]))
    with pytest.raises(ValueError, match=r"\[windows, horizon, sites\]"):
        error_by_step(np.zeros((2, 2)), np.zeros((2, 2)))
    with pytest.raises(ValueError, match="positive"):
        block_means(np.zeros(3), 0)
