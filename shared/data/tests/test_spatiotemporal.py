"""Windows are the right steps and no copies, nothing leaks between splits, and bad series are named."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from shared.config import UserError
from shared.data.spatiotemporal import (
    Scaler,
    Series,
    chronological_splits,
    forward_fill,
    on_regular_grid,
    read_hdf5,
    read_npz,
    read_npz_windows,
    sliding_windows,
    time_gaps,
    time_step,
)

NUM_STEPS, NUM_SITES = 40, 3


def counted() -> tuple[np.ndarray, np.ndarray]:
    """Features and target that say where they are: target[t, n] = 10 t + n."""
    target = (10 * np.arange(NUM_STEPS)[:, None] + np.arange(NUM_SITES)).astype(np.float32)
    return np.stack([target, -target], axis=2), target


def times(*steps: int) -> np.ndarray:
    return np.datetime64("2022-03-01T00:00") + np.array(steps) * np.timedelta64(10, "m")


# --- windows ---


def test_windows_hold_the_steps_before_and_after() -> None:
    features, target = counted()
    windows = sliding_windows(features, target, steps=slice(10, 20), input_steps=4, horizon=3)
    assert windows.first_targets.tolist() == list(range(10, 18))
    for index, first in enumerate(windows.first_targets):
        np.testing.assert_array_equal(windows.inputs[index], features[first - 4 : first])
        np.testing.assert_array_equal(windows.targets[index], target[first : first + 3])


def test_windows_are_views_and_batches_are_copies() -> None:
    features, target = counted()
    windows = sliding_windows(features, target, steps=slice(0, NUM_STEPS), input_steps=6, horizon=2, stride=3)
    assert np.shares_memory(windows.inputs, features)
    assert np.shares_memory(windows.targets, target)
    tensors = windows.tensors()
    assert tensors[0].data_ptr() == features.ctypes.data
    inputs, targets, observed = windows[[2, 0]]
    assert inputs.shape == (2, 6, NUM_SITES, 2)
    assert observed.all()
    inputs[:] = targets[:] = 0
    assert features[12, 0, 0] == 120
    batch = windows.dataset()[torch.tensor([1, 3])]
    np.testing.assert_array_equal(batch[0][1].numpy(), features[9:15])


def test_targets_never_cross_the_border_of_a_split() -> None:
    features, target = counted()
    splits = chronological_splits(NUM_STEPS, (0.5, 0.25, 0.25))
    used = {}
    for name in ("train", "validation", "test"):
        windows = sliding_windows(features, target, steps=getattr(splits, name), input_steps=4, horizon=5)
        used[name] = {step for first in windows.first_targets for step in range(first, first + 5)}
    assert used == {"train": set(range(4, 20)), "validation": set(range(20, 30)), "test": set(range(30, 40))}


def test_windows_that_span_a_gap_are_left_out() -> None:
    features, target = counted()
    windows = sliding_windows(features, target, steps=slice(0, 20), input_steps=2, horizon=2, after_gaps=[10])
    # Steps 9 and 10 are no neighbors: a window may end with 9 or begin with 10.
    assert windows.first_targets.tolist() == [2, 3, 4, 5, 6, 7, 8, 12, 13, 14, 15, 16, 17, 18]
    np.testing.assert_array_equal(windows.inputs[7], features[10:12])


def test_the_mask_follows_the_targets() -> None:
    features, target = counted()
    observed = np.ones(target.shape, bool)
    observed[12, 1] = False
    windows = sliding_windows(features, target, steps=slice(10, 20), input_steps=4, horizon=3, observed=observed)
    assert [tuple(index) for index in np.argwhere(~windows.observed)] == [(0, 2, 1), (1, 1, 1), (2, 0, 1)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"horizon": 11}, "no window of 4 \\+ 11 steps has its targets in steps 10 to 20"),
        ({"stride": 0}, "must be positive"),
        ({"after_gaps": range(40)}, "all windows span a gap"),
        ({"observed": np.ones((3, 3), bool)}, "do not fit"),
    ],
)
def test_impossible_windows(changes: dict, words: str) -> None:
    features, target = counted()
    with pytest.raises(UserError, match=words):
        sliding_windows(features, target, **{"steps": slice(10, 20), "input_steps": 4, "horizon": 3} | changes)


def test_values_that_are_not_finite_are_refused() -> None:
    features, target = counted()
    features[3, 0, 1] = np.nan
    with pytest.raises(UserError, match="fill the missing ones first"):
        sliding_windows(features, target, steps=slice(10, 20), input_steps=4, horizon=3)


# --- splits, scaling, filling ---


def test_splits_are_in_order_and_complete() -> None:
    splits = chronological_splits(4464)
    assert (splits.train.stop, splits.validation.stop, splits.test.stop) == (3125, 3571, 4464)
    assert (splits.train.start, splits.validation.start, splits.test.start) == (0, 3125, 3571)
    with pytest.raises(UserError, match="too few"):
        chronological_splits(2)
    with pytest.raises(UserError, match="add up to 1"):
        chronological_splits(100, (0.7, 0.2, 0.2))


def test_scaling_is_fitted_on_what_it_is_given_alone() -> None:
    values = np.array([[[1.0, 5.0]], [[3.0, 5.0]], [[1000.0, 7.0]]])
    scaler = Scaler.fit(values[:2])
    np.testing.assert_allclose(scaler.transform(values)[:, 0], [[-1, 0], [1, 0], [998, 2]])
    np.testing.assert_allclose(scaler.inverse(scaler.transform(values)), values)
    observed = np.array([[True], [True], [False]])
    np.testing.assert_allclose(Scaler.fit(values, observed).offset, scaler.offset)
    with pytest.raises(UserError, match="no observed reading"):
        Scaler.fit(values, np.zeros((3, 1), bool))
    with pytest.raises(UserError, match="finite"):
        Scaler.fit(np.full((2, 1, 1), np.nan))


def test_filling_by_hand() -> None:
    nan = np.nan
    values = np.array([[nan, 1.0], [2.0, nan], [nan, nan], [4.0, 5.0]])
    filled = forward_fill(values, np.isfinite(values))
    np.testing.assert_array_equal(filled, [[2, 1], [2, 1], [2, 1], [4, 5]])
    np.testing.assert_array_equal(forward_fill(values[..., None], np.isfinite(values))[..., 0], filled)


def test_sites_that_were_never_observed_are_named() -> None:
    with pytest.raises(UserError, match="at Elkhart: leave these sites out"):
        forward_fill(np.zeros((3, 2)), [[1, 0], [0, 0], [1, 0]], sites=["Taylor", "Elkhart"])


# --- time ---


def test_gaps_become_missing_steps() -> None:
    values = np.arange(8, dtype=np.float32).reshape(4, 2, 1)
    series = Series(values, np.ones((4, 2), bool), times(0, 1, 4, 5), ("a", "b"))
    assert time_gaps(series.times) == [(2, 2)]
    regular = on_regular_grid(series)
    assert time_gaps(regular.times) == []
    assert regular.observed.any(axis=1).tolist() == [True, True, False, False, True, True]
    filled = forward_fill(regular.values, regular.observed)
    assert filled[:, 0, 0].tolist() == [0, 2, 2, 2, 4, 6]
    with pytest.raises(UserError, match="1 gaps leave out 33 % of the steps"):
        on_regular_grid(series, max_missing_fraction=0.2)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (times(0, 1, 1, 2), "repeats at step 2"),
        (times(0, 2, 1), "goes back at step 2"),
        (times(0), "at least two steps"),
        (np.array(["2022-03-01", "NaT"], "datetime64[m]"), "step 1 has no time"),
    ],
)
def test_times_that_do_not_increase(given: np.ndarray, words: str) -> None:
    with pytest.raises(UserError, match=words):
        time_step(given)


def test_times_off_the_grid() -> None:
    crooked = times(0, 1, 2, 4)
    crooked[-1] += np.timedelta64(3, "m")
    with pytest.raises(UserError, match="lie on a grid of 10 minutes"):
        time_gaps(crooked)


def test_a_series_says_what_does_not_fit() -> None:
    with pytest.raises(UserError, match="do not fit"):
        Series(np.zeros((4, 2, 1), np.float32), np.ones((4, 3), bool), None, ("a", "b"))
    with pytest.raises(UserError, match="times of shape"):
        Series(np.zeros((4, 2, 1), np.float32), np.ones((4, 2), bool), times(0, 1), ("a", "b"))
    values = np.zeros((4, 2, 1), np.float32)
    values[1, 1] = np.nan
    with pytest.raises(UserError, match="not finite, the first at step 1 of b"):
        Series(values, np.ones((4, 2), bool), None, ("a", "b"))


# --- files ---


def write_pandas_table(path: Path, *, kind: str, unit: str, key: str = "df") -> np.ndarray:
    """What `DataFrame.to_hdf` writes for a table with columns of two types, without PyTables."""
    speeds = np.array([[60.0, 0.0, 30.0], [61.0, 55.0, np.nan], [62.0, 54.0, 31.0]])
    with h5py.File(path, "w") as file:
        group = file.create_group(key)
        group["axis0"] = np.array([b"773869", b"767541", b"767542"])
        group["axis1"] = times(0, 1, 2).astype(f"datetime64[{unit}]").view(np.int64)
        group["axis1"].attrs["kind"] = np.bytes_(kind)
        group["block0_items"] = np.array([b"767542", b"773869"])
        group["block0_values"] = speeds[:, [2, 0]]
        group["block1_items"] = np.array([b"767541"])
        group["block1_values"] = speeds[:, [1]].astype(np.int64)
    return speeds


@pytest.mark.parametrize(("kind", "unit"), [("datetime64", "ns"), ("datetime64[us]", "us")])
def test_hdf5_as_metr_la_is_published(tmp_path: Path, kind: str, unit: str) -> None:
    speeds = write_pandas_table(tmp_path / "metr-la.h5", kind=kind, unit=unit)
    series = read_hdf5(tmp_path / "metr-la.h5", null_value=0)
    assert series.sites == ("773869", "767541", "767542")
    np.testing.assert_array_equal(series.values[..., 0], speeds.astype(np.float32))
    np.testing.assert_array_equal(series.times, times(0, 1, 2))
    assert series.observed.tolist() == [[True, False, True], [True, True, False], [True, True, True]]
    assert read_hdf5(tmp_path / "metr-la.h5").observed[0, 1]


def test_hdf5_that_cannot_be_read(tmp_path: Path) -> None:
    write_pandas_table(tmp_path / "table.h5", kind="datetime64", unit="ns", key="speed")
    with pytest.raises(UserError, match="no table 'df'; it has speed"):
        read_hdf5(tmp_path / "table.h5")
    (tmp_path / "cut.h5").write_bytes((tmp_path / "table.h5").read_bytes()[:500])
    for name in ("cut.h5", "none.h5"):
        with pytest.raises(UserError, match="missing, damaged"):
            read_hdf5(tmp_path / name)
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file.create_group("df")["values"] = np.zeros(3)
    with pytest.raises(UserError, match="fixed format"):
        read_hdf5(tmp_path / "other.h5")


def test_npz_as_pems_is_published(tmp_path: Path) -> None:
    data = np.ones((5, 2, 3))
    data[1, 0, 0], data[2, 1, 2] = 0, np.nan
    np.savez(tmp_path / "PEMS04.npz", data=data)
    series = read_npz(tmp_path / "PEMS04.npz", null_value=0)
    assert series.values.shape == (5, 2, 3)
    assert [tuple(index) for index in np.argwhere(~series.observed)] == [(1, 0), (2, 1)]
    with pytest.raises(UserError, match="no array x, y; it has data"):
        read_npz_windows(tmp_path / "PEMS04.npz")


def test_npz_windows_as_dcrnn_writes_them(tmp_path: Path) -> None:
    x, y = np.random.default_rng(0).random((6, 12, 2, 2)), np.zeros((6, 3, 2, 2))
    y[..., 0] = 7
    y[4, 1, 0, 0] = 0
    np.savez(tmp_path / "train.npz", x=x, y=y)
    windows = read_npz_windows(tmp_path / "train.npz", null_value=0)
    inputs, targets, observed = windows[4:]
    assert inputs.shape == (2, 12, 2, 2)
    assert targets[0, 0].tolist() == [7, 7]
    assert np.argwhere(~observed).tolist() == [[0, 1, 0]]
    np.savez(tmp_path / "bad.npz", x=x, y=y[:5])
    with pytest.raises(UserError, match="do not fit"):
        read_npz_windows(tmp_path / "bad.npz")
    (tmp_path / "text.npz").write_text("no zip")
    with pytest.raises(UserError, match="not an NPZ file"):
        read_npz(tmp_path / "text.npz")
