"""Readings of many sites over time: reading, checking, filling, splitting, scaling, and sliding windows.

The steps, each of which can be used alone:

    series = read_hdf5(path, null_value=0)              # or read_npz, or a Series of one's own arrays
    series = on_regular_grid(series)                    # time gaps become missing steps
    values = forward_fill(series.values, series.observed)
    splits = chronological_splits(len(values))
    scaler = Scaler.fit(values[splits.train])           # on the train part only
    train = sliding_windows(scaler.transform(values), values[..., 0], steps=splits.train, input_steps=12, horizon=12)
    inputs, targets, observed = train[[4, 2, 0]]        # copies these three windows, and nothing else

Files: METR-LA and PEMS-BAY as published (HDF5 as `DataFrame.to_hdf` writes it), PEMS03/04/07/08 (NPZ with `data`),
and windows as DCRNN's scripts write them (NPZ with `x` and `y`).
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import ArrayLike, NDArray

from shared.config import UserError

if TYPE_CHECKING:
    import h5py
    from torch import Tensor
    from torch.utils.data import TensorDataset

Float32Array = NDArray[np.float32]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Series:
    """Readings `values` [T, N, F], which of them were `observed` [T, N], their `times` [T] and the `sites`' names [N].

    Missing readings may hold anything, NaN included. `times` is None where a file has none.
    """

    values: Float32Array
    observed: Mask
    times: NDArray[np.datetime64] | None
    sites: tuple[str, ...]

    def __post_init__(self) -> None:
        values, observed = self.values, self.observed
        if values.ndim != 3 or observed.shape != values.shape[:2] or len(self.sites) != values.shape[1]:
            raise UserError(
                f"values [T, N, F], observed [T, N] and sites [N] do not fit: {values.shape}, {observed.shape}, "
                f"{len(self.sites)} sites"
            )
        if self.times is not None and self.times.shape != values.shape[:1]:
            raise UserError(f"there are {len(values)} steps of values, but times of shape {self.times.shape}")
        bad = observed & ~np.isfinite(values).all(axis=2)
        if bad.any():
            step, site = np.argwhere(bad)[0]
            raise UserError(
                f"{int(bad.sum())} readings that count as observed are not finite, the first at step {step} of "
                f"{self.sites[site]}: mark them as missing in `observed`"
            )


# --- Time -------------------------------------------------------------------------------------------------------------


def time_step(times: NDArray[np.datetime64]) -> np.timedelta64:
    """The distance of two steps: the smallest there is.

    `UserError` for fewer than two steps, missing times, and times that repeat or go back.
    """
    if len(times) < 2:
        raise UserError(f"a time series needs at least two steps (given: {len(times)})")
    if np.isnat(times).any():
        raise UserError(f"step {int(np.isnat(times).argmax())} has no time: drop the row or mend its time stamp")
    distances = np.diff(times)
    wrong = distances <= np.timedelta64(0)
    if wrong.any():
        first = int(wrong.argmax())
        what = "repeats" if times[first + 1] == times[first] else "goes back"
        raise UserError(
            f"time must increase, but {what} at step {first + 1}: {times[first]} is followed by {times[first + 1]}. "
            "Sort the rows by time and drop those that are there twice"
        )
    return distances.min()


def time_gaps(times: NDArray[np.datetime64]) -> list[tuple[int, int]]:
    """Where steps are missing: (index of the first step after the gap, number of missing steps).

    `UserError` also where a step lies off the grid that the smallest distance spans.
    """
    step = time_step(times)
    steps, rest = np.divmod(np.diff(times), step)
    if (rest != np.timedelta64(0)).any():
        first = int((rest != np.timedelta64(0)).argmax())
        raise UserError(
            f"times must lie on a grid of {step}, but {times[first]} is followed by {times[first + 1]}: "
            "resample the series first"
        )
    return [(int(index) + 1, int(steps[index]) - 1) for index in np.flatnonzero(steps > 1)]


def on_regular_grid(series: Series, *, max_missing_fraction: float = 0.5) -> Series:
    """The series with every missing step put in, as one at which nothing was observed.

    `UserError` where more than `max_missing_fraction` of the steps would be such: then the grid is the wrong one.
    """
    if series.times is None:
        return series
    gaps = time_gaps(series.times)
    if not gaps:
        return series
    step = time_step(series.times)
    times = np.arange(series.times[0], series.times[-1] + step, step)
    missing = 1 - len(series.times) / len(times)
    if missing > max_missing_fraction:
        raise UserError(
            f"{len(gaps)} gaps leave out {100 * missing:.0f} % of the steps of {step}: cut the series into pieces, "
            "or resample it to a coarser step"
        )
    kept = ((series.times - times[0]) // step).astype(int)
    values = np.full((len(times), *series.values.shape[1:]), np.nan, np.float32)
    observed = np.zeros((len(times), series.values.shape[1]), bool)
    values[kept], observed[kept] = series.values, series.observed
    return Series(values, observed, times, series.sites)


# --- Missing readings -------------------------------------------------------------------------------------------------


def forward_fill(values: ArrayLike, observed: ArrayLike, *, sites: Sequence[str] | None = None) -> NDArray[Any]:
    """Repeat each site's last observed reading where it is missing; before its first one, repeat that.

    `values` [T, N] or [T, N, F], `observed` [T, N]. Looks into the future only before a site's first reading.
    `UserError` names the sites that were never observed: drop them.
    """
    values, observed = np.asarray(values), np.asarray(observed, dtype=bool)
    if observed.ndim != 2 or values.shape[:2] != observed.shape:
        raise UserError(f"values {values.shape} and observed {observed.shape} must agree in steps and sites")
    never = np.flatnonzero(~observed.any(axis=0))
    if len(never):
        names = ", ".join(str(sites[index] if sites is not None else index) for index in never[:5])
        more = f" and {len(never) - 5} more" if len(never) > 5 else ""
        raise UserError(f"no reading was observed in the whole series at {names}{more}: leave these sites out")
    steps = np.arange(len(observed))[:, None]
    last = np.maximum.accumulate(np.where(observed, steps, -1), axis=0)
    source = np.where(last >= 0, last, observed.argmax(axis=0))
    return values[source, np.arange(observed.shape[1])]


# --- Splits and scaling -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Splits:
    """Three spans of steps, in the order of time and without a step in between."""

    train: slice
    validation: slice
    test: slice


def chronological_splits(num_steps: int, fractions: tuple[float, float, float] = (0.7, 0.1, 0.2)) -> Splits:
    """Cut `num_steps` into train, validation and test by time; borders are rounded to whole steps."""
    if len(fractions) != 3 or min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-9:
        raise UserError(f"the three fractions must be positive and add up to 1 (given: {fractions})")
    first, second = round(num_steps * fractions[0]), round(num_steps * (fractions[0] + fractions[1]))
    if not 0 < first < second < num_steps:
        raise UserError(f"{num_steps} steps are too few for splits of {fractions}: each needs at least one")
    return Splits(slice(0, first), slice(first, second), slice(second, num_steps))


@dataclass(frozen=True)
class Scaler:
    """A feature's scaling, z = (x - `offset`) / `scale`, one pair a feature (the last axis)."""

    offset: NDArray[np.float64]
    scale: NDArray[np.float64]

    @classmethod
    def fit(cls, values: ArrayLike, observed: ArrayLike | None = None) -> Scaler:
        """Mean and standard deviation over steps and sites of `values` [T, N, F], the train part.

        With `observed` [T, N], of the observed readings alone. A feature that does not vary keeps its scale.
        """
        values = np.asarray(values, dtype=np.float64)
        rows = values.reshape(-1, values.shape[-1]) if observed is None else values[np.asarray(observed, dtype=bool)]
        if not len(rows):
            raise UserError("the train part has no observed reading to fit a scaling to")
        if not np.isfinite(rows).all():
            raise UserError("a scaling needs finite values: fill the missing ones first, or give `observed`")
        spread = rows.std(axis=0)
        return cls(rows.mean(axis=0), np.where(spread > 1e-12, spread, 1.0))

    def transform(self, values: ArrayLike) -> Float32Array:
        return ((np.asarray(values, dtype=np.float64) - self.offset) / self.scale).astype(np.float32)

    def inverse(self, values: ArrayLike) -> Float32Array:
        return (np.asarray(values, dtype=np.float64) * self.scale + self.offset).astype(np.float32)


# --- Windows ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Windows:
    """Pairs of past and future: `inputs` [W, P, N, F], `targets` and `observed` [W, H, N] (was the target observed?).

    All three are views on the series, overlapping in memory; to index them copies the chosen windows. `first_targets`
    [W] are the steps of the windows' first targets.
    """

    inputs: Float32Array
    targets: Float32Array
    observed: Mask
    first_targets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.first_targets)

    def __getitem__(self, index: Any) -> tuple[Float32Array, Float32Array, Mask]:
        """Copies of the windows at `index`, an integer, slice, list or array of indices."""
        return np.array(self.inputs[index]), np.array(self.targets[index]), np.array(self.observed[index])

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs, targets and observed as tensors on the same memory; do not write to them."""
        import torch

        return tuple(torch.from_numpy(array) for array in (self.inputs, self.targets, self.observed))

    def dataset(self) -> TensorDataset:
        """The tensors as a data set, whose batches are one gather each; on a GPU the windows are laid out in full."""
        from torch.utils.data import TensorDataset

        return TensorDataset(*self.tensors())


def sliding_windows(
    features: Float32Array,
    target: Float32Array,
    *,
    steps: slice,
    input_steps: int,
    horizon: int,
    observed: Mask | None = None,
    stride: int = 1,
    after_gaps: Sequence[int] = (),
) -> Windows:
    """All windows whose targets lie in `steps`, every `stride`-th of them, without copying the series.

    `features` [T, N, F], `target` [T, N], `observed` [T, N] (default: all). A window's inputs are the `input_steps`
    steps before its targets and may reach back before `steps`: at that time they are known. Its targets never cross
    the border of `steps`. Windows that would span a gap are left out; `after_gaps` holds the first step after each one
    (see `time_gaps`). `UserError` where no window fits, or values are not finite.
    """
    features, target = np.ascontiguousarray(features, np.float32), np.ascontiguousarray(target, np.float32)
    observed = np.ones(target.shape, bool) if observed is None else np.ascontiguousarray(observed, bool)
    if features.ndim != 3 or target.shape != features.shape[:2] or observed.shape != target.shape:
        raise UserError(
            f"features [T, N, F], target [T, N] and observed [T, N] do not fit: {features.shape}, {target.shape}, "
            f"{observed.shape}"
        )
    if min(input_steps, horizon, stride) < 1:
        raise UserError(f"input_steps, horizon and stride must be positive: {input_steps}, {horizon}, {stride}")
    start, stop, step = steps.indices(len(target))
    first, last = max(start, input_steps), stop - horizon
    if step != 1 or first > last:
        raise UserError(
            f"no window of {input_steps} + {horizon} steps has its targets in steps {start} to {stop} of "
            f"{len(target)}: take longer splits or a shorter horizon"
        )
    if not (np.isfinite(features).all() and np.isfinite(target).all()):
        raise UserError("the windows would hold values that are not finite: fill the missing ones first (forward_fill)")

    # Made from the whole series, so that window w begins at step w; what `steps` leaves out is cut off afterwards.
    inputs = sliding_window_view(features, input_steps, axis=0, writeable=True).transpose(0, 3, 1, 2)
    targets = sliding_window_view(target, horizon, axis=0, writeable=True).transpose(0, 2, 1)
    seen = sliding_window_view(observed, horizon, axis=0, writeable=True).transpose(0, 2, 1)
    starts = np.arange(first, last + 1, stride)
    chosen: slice | NDArray[np.int64] = slice(first, last + 1, stride)
    past: slice | NDArray[np.int64] = slice(first - input_steps, last + 1 - input_steps, stride)
    spanning = np.zeros(len(starts), bool)
    for gap in after_gaps:
        spanning |= (starts - input_steps < gap) & (gap < starts + horizon)
    if spanning.all():
        raise UserError(f"all windows span a gap in time ({len(after_gaps)} gaps): see on_regular_grid")
    if spanning.any():
        # Irregular positions cannot be a view.
        starts = starts[~spanning]
        chosen, past = starts, starts - input_steps
    return Windows(inputs[past], targets[chosen], seen[chosen], starts)


# --- Files ------------------------------------------------------------------------------------------------------------


def read_hdf5(path: Path, *, key: str = "df", null_value: float | None = None) -> Series:
    """Read a table of times and sites as `DataFrame.to_hdf(path, key=key)` writes it (METR-LA, PEMS-BAY; [T, N, 1]).

    The layout is read directly, without PyTables: `axis0` (sites), `axis1` (times), and blocks of columns
    `block{i}_items`, `block{i}_values`. Readings that are NaN or equal `null_value` (0 in METR-LA) count as missing.
    """
    import h5py

    try:
        with h5py.File(path, "r") as file:
            keys = [name for name in file if isinstance(file[name], h5py.Group)]
            if key not in keys:
                raise UserError(f"{path} has no table {key!r}; it has {', '.join(keys) or 'none'}")
            return _read_table(path, file[key], null_value)
    except (OSError, KeyError, ValueError) as error:
        raise UserError(
            f"{path} is missing, damaged, or not a table in pandas's fixed format ({error}); "
            "fetch it again, or write it with DataFrame.to_hdf(path, key='df', format='fixed')"
        ) from None


def _read_table(path: Path, group: h5py.Group, null_value: float | None) -> Series:
    if "axis1" not in group or "block0_values" not in group:
        raise UserError(
            f"{path}: {group.name} is not a table in pandas's fixed format; write it with "
            "DataFrame.to_hdf(path, key='df', format='fixed')"
        )
    sites, index = _names(group["axis0"]), group["axis1"]
    kind = index.attrs.get("kind", b"")
    kind = kind.decode() if isinstance(kind, bytes) else str(kind)
    times = None
    if kind.startswith("datetime64"):
        # Files of older versions of pandas do not name the unit, which was always the nanosecond.
        unit = kind.partition("[")[2].rstrip("]") or "ns"
        times = index[:].view(f"datetime64[{unit}]")
    column = {site: position for position, site in enumerate(sites)}
    values = np.full((len(index), len(sites)), np.nan, np.float32)
    number = 0
    while f"block{number}_values" in group:
        items = _names(group[f"block{number}_items"])
        values[:, [column[item] for item in items]] = group[f"block{number}_values"][:]
        number += 1
    return Series(values[:, :, None], _observed(values[:, :, None], null_value), times, sites)


def read_npz(path: Path, *, null_value: float | None = None, feature: int = 0) -> Series:
    """Read `data` [T, N, F] or [T, N] of an NPZ file (PEMS03/04/07/08), which has neither times nor names of sites.

    A site counts as missing at a step where `feature` is NaN or equals `null_value`.
    """
    data = _npz_arrays(path, "data")[0].astype(np.float32)
    values = data[:, :, None] if data.ndim == 2 else data
    if values.ndim != 3:
        raise UserError(f"{path}: data must be [T, N] or [T, N, F], not {data.shape}")
    observed = _observed(values[:, :, [feature]], null_value) & np.isfinite(values).all(axis=2)
    return Series(values, observed, None, tuple(map(str, range(values.shape[1]))))


def read_npz_windows(path: Path, *, null_value: float | None = None, feature: int = 0) -> Windows:
    """Read windows as DCRNN's scripts write them: `x` [W, P, N, F] and `y` [W, H, N, F], of which `feature` is kept.

    One file is one split; its scaling is still to be done.
    """
    x, y = (array.astype(np.float32) for array in _npz_arrays(path, "x", "y"))
    if x.ndim != 4 or y.ndim != 4 or len(x) != len(y) or x.shape[2] != y.shape[2]:
        raise UserError(f"{path}: x [W, P, N, F] and y [W, H, N, F] do not fit: {x.shape} and {y.shape}")
    targets = y[..., feature]
    observed = _observed(targets[..., None], null_value)
    return Windows(x, targets, observed, np.arange(len(x)))


def _npz_arrays(path: Path, *names: str) -> list[NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as content:
            missing = [name for name in names if name not in content]
            if missing:
                raise UserError(
                    f"{path} has no array {', '.join(missing)}; it has {', '.join(content.files) or 'none'}"
                )
            return [content[name] for name in names]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is missing, damaged or not an NPZ file of numbers ({error}); fetch it again") from None


def _observed(values: Float32Array, null_value: float | None) -> Mask:
    """Which readings [..., 0] of values [..., 1] are there: finite, and not `null_value`."""
    there = np.isfinite(values[..., 0])
    return there if null_value is None else there & ~np.isclose(values[..., 0], null_value)


def _names(labels: h5py.Dataset) -> tuple[str, ...]:
    return tuple(label.decode() if isinstance(label, bytes) else str(label) for label in labels[:])
