"""Occupancy of truck-parking sites every ten minutes, the graph between them, and a generated stand-in.

Official data lie in `$REPRISE_DATA/regt_gcn/`, for the whole of March 2022:

    tpims_0322_available.csv.gz    time, then one column a site: available spaces as reported, -37 … 847
    tpims_0322_fresh.csv.gz        the same shape: 1 = reported, 0 = filled in by the source, partly from a wrong site
    sites.csv                      site_id, state, nearest_city_km, owner_private, n_amenity, capacity, latitude,
                                   longitude
    link_{IA,KS,KY,OH,WI}_data.csv source index, source id, target index, target id, driving time [s]; no header

`reprise data fetch regt_gcn` downloads the repository's archives and converts them into this layout (`convert`).

Missing steps of time are put in as missing readings. Edges to sites that are not in the table are dropped (two sites of
the official Ohio list), unless that would be more than half of them.

Two unit systems, both with the eight features of `FEATURES`, of which the last is the target:

* `clean`: readings that were not reported are missing and repeat the site's last one; the ratio available/capacity is
  clipped to [0, 1], and the target is the occupancy, 1 - ratio. Inputs are standardized with mean and deviation of the
  train part. Readings that were filled in are inputs, but neither trained on nor scored.
* `paper`: as the published code has it. Readings are as the source filled them, the ratio available/capacity is not
  clipped (-0.7 … 2) and is itself the target. Every feature is scaled to [0, 1] across the sites of one snapshot,
  targets included: features that are equal at all sites, the three of time, become 0, and the target's scale is known
  only once the snapshot is. Filled readings count.
"""

from __future__ import annotations

import hashlib
import tarfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from shared.config import Stage, UserError
from shared.data.fetch import locate
from shared.data.spatiotemporal import (
    Scaler,
    Series,
    Splits,
    Windows,
    chronological_splits,
    forward_fill,
    on_regular_grid,
    sliding_windows,
)
from shared.files import atomic_path

from .config import INPUT_STEPS, STEP_MINUTES, DataSettings, Params

if TYPE_CHECKING:
    import pandas as pd

Float32Array = NDArray[np.float32]
Split = Literal["train", "validation", "test"]

FEATURES = ("week_of_month", "weekday", "hour", "nearest_city_km", "private", "amenities", "capacity", "occupancy")
REGIONS = ("IA", "KS", "KY", "OH", "WI")
REACH_KM = 40.0
EARTH_RADIUS_KM = 6371.0088
# Two sites on both sides of a road share their coordinates; a weight of 0 would be no edge.
SHORTEST_KM = 0.1
PLACEHOLDER_TIME = "2022-03-01T00:00:00Z"


# --- What models are given --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Graph:
    """Sites and the edges between them; in every matrix entry [i, j] is the weight of the edge from j to i, 0 = none.

    `adjacency` [N, N] float32 is the state-wide graph, weights are distances in km. `regions` are five [N, N] float32,
    one a region, weights are driving times in seconds. `region_of_node` [N] is the index of a site's region, or -1.
    """

    adjacency: Float32Array
    regions: tuple[Float32Array, ...]
    region_of_node: NDArray[np.int64]

    @property
    def num_nodes(self) -> int:
        return len(self.adjacency)

    def random_regions(self, seed: int) -> tuple[Float32Array, ...]:
        """RanT-GCN's groups: a random permutation cut in as many blocks; the state-wide edges inside each block."""
        blocks = np.array_split(np.random.default_rng(seed).permutation(self.num_nodes), len(self.regions))
        regions = []
        for block in blocks:
            inside = np.isin(np.arange(self.num_nodes), block)
            regions.append(self.adjacency * np.outer(inside, inside).astype(np.float32))
        return tuple(regions)


@dataclass(frozen=True)
class Prepared:
    """The data of one experiment.

    `target` [T, N] is what is predicted, in the units that errors are reported in; `observed` [T, N] is False where it
    was filled in and does not count. `features` [T, N, 8] are the networks' inputs, scaled, in the order of `FEATURES`;
    the last one is the target, scaled: target = `target_offset` + `target_scale` · feature. `snapshots` [T, 2] are
    offset and span of each snapshot's ratio in paper units, else [0, 2]. `positions` [N, 2] are latitude and longitude.
    """

    graph: Graph
    features: Float32Array
    target: Float32Array
    observed: NDArray[np.bool_]
    times: NDArray[np.datetime64]
    sites: tuple[str, ...]
    positions: NDArray[np.float64]
    snapshots: NDArray[np.float64]
    fractions: tuple[float, float, float]
    target_offset: float
    target_scale: float
    attrs: dict[str, str] = field(default_factory=dict)

    @cached_property
    def splits(self) -> Splits:
        return chronological_splits(len(self.times), self.fractions)

    def windows(self, split: Split, horizon: int, stride: int = 1, *, scaled: bool = False) -> Windows:
        """Windows of six steps and `horizon` targets, which lie in `split`; `scaled` gives targets as networks do."""
        return sliding_windows(
            self.features,
            np.ascontiguousarray(self.features[..., -1]) if scaled else self.target,
            steps=getattr(self.splits, split),
            input_steps=INPUT_STEPS,
            horizon=horizon,
            observed=self.observed,
            stride=stride,
        )

    def unscale_target(self, scaled: Float32Array) -> Float32Array:
        """From a network's output to the units of `target`."""
        return (scaled * self.target_scale + self.target_offset).astype(np.float32)


# --- Preparation ------------------------------------------------------------------------------------------------------


def prepare(stage: Stage[Params]) -> None:
    """Write the data of every experiment to `data/<experiment>.npz`."""
    for name, experiment in stage.params.experiments.items():
        settings = experiment.data
        parking = (
            read_official(settings.folder) if settings.source == "official" else generate(settings, stage.params.seed)
        )
        save(stage.data_dir / f"{name}.npz", build(parking, settings))


@dataclass(frozen=True)
class Parking:
    """Readings and table of the sites before any cleaning.

    `available` spaces [T, N, 1] with what was observed; `static` [N, 4] in the order of `FEATURES` (nearest city,
    owner, amenities, capacity); `edges` one list a region of (target index, source index, seconds) rows.
    """

    available: Series
    static: NDArray[np.float64]
    positions: NDArray[np.float64]
    region_of_node: NDArray[np.int64]
    edges: tuple[NDArray[np.float64], ...]
    source: str


def build(parking: Parking, settings: DataSettings) -> Prepared:
    """Clean, scale and connect: from readings to what models are given."""
    keep = parking.region_of_node >= 0 if settings.sites == "regional" else np.ones(len(parking.static), bool)
    names = tuple(np.array(parking.available.sites)[keep].tolist())
    static = parking.static[keep]
    capacity = static[:, 3]
    empty = np.flatnonzero(~(capacity > 0))
    if len(empty):
        raise UserError(
            f"the capacity of a site must be positive, which it is not at {_listed(names, empty)}: without it there is "
            "no occupancy; mend the capacity in the table of sites, or take the site out of all files"
        )
    series = on_regular_grid(
        Series(parking.available.values[:, keep], parking.available.observed[:, keep], parking.available.times, names)
    )
    num_steps = len(series.times) if settings.days is None else settings.days * 24 * 60 // STEP_MINUTES
    if num_steps > len(series.times):
        raise UserError(
            f"days ({settings.days}) is more than there are, {len(series.times) * STEP_MINUTES / 1440:.1f}: lower it"
        )
    times, observed = series.times[:num_steps], series.observed[:num_steps]
    values = series.values[:num_steps, :, 0].astype(np.float64)
    in_paper_units = settings.units == "paper"
    if in_paper_units:
        target = forward_fill(values, np.isfinite(values), sites=names) / capacity
        observed = np.ones_like(observed)
    else:
        target = 1 - np.clip(forward_fill(values, observed, sites=names) / capacity, 0, 1)
    constant = np.broadcast_to(static, (num_steps, *static.shape))
    raw = np.concatenate([time_features(times, len(names)), constant, target[..., None]], axis=2)
    if in_paper_units:
        features, snapshots = scale_snapshots(raw)
        target, offset, scale = features[..., -1], 0.0, 1.0
    else:
        train = chronological_splits(num_steps, settings.fractions).train
        scaler = Scaler.fit(raw[train], observed[train])
        features, snapshots = scaler.transform(raw), np.zeros((0, 2))
        offset, scale = float(scaler.offset[-1]), float(scaler.scale[-1])
    graph = connect(parking, keep)
    digest = hashlib.sha256()
    for array in (features, target, observed, graph.adjacency, *graph.regions):
        digest.update(np.ascontiguousarray(array).tobytes())
    return Prepared(
        graph=graph,
        features=features.astype(np.float32),
        target=target.astype(np.float32),
        observed=observed,
        times=times,
        sites=names,
        positions=parking.positions[keep],
        snapshots=snapshots,
        fractions=settings.fractions,
        target_offset=offset,
        target_scale=scale,
        attrs={"source": parking.source, "digest": digest.hexdigest(), "units": settings.units},
    )


def time_features(times: NDArray[np.datetime64], num_sites: int) -> NDArray[np.float64]:
    """Week of the month (day divided by 7, as the code has it), weekday (Monday = 0) and hour, UTC; [T, N, 3]."""
    days = times.astype("datetime64[D]")
    day_of_month = (days - times.astype("datetime64[M]")).astype(int) + 1
    weekday = (days.astype(int) + 3) % 7
    hour = (times - days).astype("timedelta64[h]").astype(int)
    columns = np.stack([day_of_month // 7, weekday, hour], axis=1).astype(float)
    return np.broadcast_to(columns[:, None], (len(times), num_sites, 3))


def scale_snapshots(raw: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Every feature scaled to [0, 1] across the sites of each step, a feature that does not vary to 0; [T, N, F].

    Also the last feature's offset and span in every step, [T, 2].
    """
    low = raw.min(axis=1, keepdims=True)
    span = raw.max(axis=1, keepdims=True) - low
    span = np.where(span > 0, span, 1.0)
    return (raw - low) / span, np.concatenate([low[..., -1], span[..., -1]], axis=1)


def connect(parking: Parking, keep: NDArray[np.bool_]) -> Graph:
    """The graph of the kept sites: state-wide edges below 40 km and along the regional ones; and the five regions."""
    num_sites = len(keep)
    regions = []
    for edges in parking.edges:
        matrix = np.zeros((num_sites, num_sites), np.float32)
        matrix[edges[:, 0].astype(int), edges[:, 1].astype(int)] = edges[:, 2]
        regions.append(matrix)
    distances = np.maximum(haversine(parking.positions), SHORTEST_KM)
    near = (distances < REACH_KM) | (np.sum(regions, axis=0) > 0)
    # Sites without coordinates have distances that are not numbers, and no edges.
    near &= ~np.eye(num_sites, dtype=bool) & np.isfinite(distances)
    adjacency = np.where(near, distances, 0).astype(np.float32)
    inside = np.ix_(keep, keep)
    return Graph(adjacency[inside], tuple(matrix[inside] for matrix in regions), parking.region_of_node[keep])


def haversine(positions: NDArray[np.float64]) -> NDArray[np.float64]:
    """Great-circle distances in km between positions [N, 2] in degrees of latitude and longitude; [N, N]."""
    latitude, longitude = np.radians(positions).T
    half = np.sin((latitude[:, None] - latitude) / 2) ** 2
    half = half + np.cos(latitude[:, None]) * np.cos(latitude) * np.sin((longitude[:, None] - longitude) / 2) ** 2
    return 2 * EARTH_RADIUS_KM * np.arcsin(np.sqrt(np.clip(half, 0, 1)))


# --- Official files ---------------------------------------------------------------------------------------------------


def read_official(folder: str) -> Parking:
    """Read the files described above; `UserError` names the file and what is wrong with it."""
    import pandas as pd

    available = _read_csv(locate(folder, "tpims_0322_available.csv.gz"))
    fresh = _read_csv(locate(folder, "tpims_0322_fresh.csv.gz"))
    sites = _read_csv(locate(folder, "sites.csv"), dtype={"site_id": str, "state": str})
    columns = {"site_id", "state", "nearest_city_km", "owner_private", "n_amenity", "capacity", "latitude", "longitude"}
    if missing := sorted(columns - set(sites.columns)):
        raise UserError(f"sites.csv lacks the columns {', '.join(missing)}: convert the official files again")
    if twice := sorted(sites.site_id[sites.site_id.duplicated()]):
        raise UserError(f"sites.csv lists {', '.join(twice)} twice: each site needs one row")
    for name, table in (("available", available), ("fresh", fresh)):
        check_sites(
            f"tpims_0322_{name}.csv.gz", [column for column in table.columns if column != "time"], sites.site_id
        )
    if not available.time.equals(fresh.time):
        raise UserError("the tables of available spaces and of freshness have different times: convert them again")
    try:
        times = pd.to_datetime(available.time, format="ISO8601", utc=True).dt.tz_localize(None).to_numpy()
        values = available[list(sites.site_id)].to_numpy(np.float32)
        observed = fresh[list(sites.site_id)].to_numpy(np.float32) > 0
    except ValueError as error:
        raise UserError(
            f"the tables of available spaces or freshness hold something else than numbers: {error}"
        ) from None
    series = Series(
        values[..., None], observed & np.isfinite(values), times.astype("datetime64[m]"), tuple(sites.site_id)
    )
    edges = [read_edges(locate(folder, f"link_{region}_data.csv"), sites.site_id) for region in REGIONS]
    return Parking(
        series,
        sites[["nearest_city_km", "owner_private", "n_amenity", "capacity"]].to_numpy(np.float64),
        sites[["latitude", "longitude"]].to_numpy(np.float64),
        np.array([REGIONS.index(state) if state in REGIONS else -1 for state in sites.state]),
        tuple(edges),
        "real: TPIMS, March 2022",
    )


def check_sites(name: str, columns: Sequence[str], sites: Sequence[str]) -> None:
    """Hold a table's columns against the table of sites."""
    unknown, missing = sorted(set(columns) - set(sites)), sorted(set(sites) - set(columns))
    if unknown or missing:
        what = (
            f"sites that sites.csv does not have: {', '.join(unknown[:5])}"
            if unknown
            else (f"no column for {', '.join(missing[:5])}, which sites.csv has")
        )
        raise UserError(f"{name} has {what}: the files must describe the same sites; convert the official files again")


def read_edges(path: Path, sites: Sequence[str]) -> NDArray[np.float64]:
    """A regional edge list as rows of (target index, source index, seconds), by site id.

    The file's own indices are those of another table. Edges to unknown sites are dropped; `UserError` where these are
    more than half, and for driving times that are not positive.
    """
    table = _read_csv(path, header=None, names=["source_index", "source", "target_index", "target", "seconds"])
    index = {site: position for position, site in enumerate(sites)}
    target, source = table.target.map(index), table.source.map(index)
    known = target.notna() & source.notna()
    if known.sum() * 2 < len(table):
        raise UserError(
            f"{path}: {len(table) - int(known.sum())} of {len(table)} edges have an end that sites.csv does not have, "
            f"such as {table[~known].iloc[0].source} to {table[~known].iloc[0].target}: it belongs to another table"
        )
    seconds = _numbers(table.seconds)
    if not (seconds > 0).all():
        row = int((~(seconds > 0)).argmax())
        raise UserError(f"{path}, line {row + 1}: a driving time must be a positive number, not {table.seconds[row]!r}")
    return np.stack([target[known], source[known], seconds[known]], axis=1).astype(np.float64)


def _read_csv(path: Path, **options: Any) -> pd.DataFrame:
    import pandas as pd

    try:
        return pd.read_csv(path, **options)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} is damaged or not a table ({error}); get it again with: reprise data fetch {path.parent.name}"
        ) from None


def _numbers(column: pd.Series) -> NDArray[np.float64]:
    import pandas as pd

    return pd.to_numeric(column, errors="coerce").to_numpy(np.float64)


def _listed(names: Sequence[str], indices: NDArray[np.int64]) -> str:
    more = f" and {len(indices) - 5} more" if len(indices) > 5 else ""
    return ", ".join(names[index] for index in indices[:5]) + more


# --- Conversion of the repository's archives --------------------------------------------------------------------------

# A node file has no header. The source calls columns 7 and 8 TRAVEL_TIME and TRAVEL_MILE, the wrong way round.
NODE_COLUMNS = (
    "index", "site_id", "reported", "week", "weekday", "hour", "nearest_city_km", "nearest_city_s", "owner_private",
    "n_amenity", "capacity", "available", "ratio",
)  # fmt: skip


def convert(raw: Path, target: Path) -> None:
    """Write the layout above from `tpims_nodes_0322.tar.xz`, `tpims_link_0322.tar.xz` and `tpims_location.csv`.

    A node file holds one snapshot. Rows with the placeholder's time stamp were filled in and are not fresh.
    """
    import io

    import pandas as pd

    available, fresh, first = {}, {}, None
    for name, content in sorted(_members(raw / "tpims_nodes_0322.tar.xz")):
        stamp = name.removeprefix("node_data_").removesuffix(".csv")
        date, _, clock = stamp.partition("T")
        try:
            table = pd.read_csv(io.BytesIO(content), header=None, names=NODE_COLUMNS).set_index("site_id")
        except ValueError as error:
            raise UserError(f"{name} in tpims_nodes_0322.tar.xz is not a table of nodes ({error})") from None
        first = table if first is None else first
        if not table.index.equals(first.index):
            raise UserError(f"{name} in tpims_nodes_0322.tar.xz has other sites than the first snapshot")
        time = f"{date}T{clock.replace('-', ':')}"
        available[time] = table.available
        fresh[time] = (table.reported != PLACEHOLDER_TIME).astype(int)
    if first is None:
        raise UserError("tpims_nodes_0322.tar.xz holds no snapshot: fetch it again")
    # Named .gz, so that pandas compresses them; no time stamp inside, so that equal tables give equal files.
    for name, columns in (("available", available), ("fresh", fresh)):
        table = pd.DataFrame(columns).T.rename_axis("time")
        table.to_csv(target / f"tpims_0322_{name}.csv.gz", compression={"method": "gzip", "mtime": 0})
    for name, content in _members(raw / "tpims_link_0322.tar.xz"):
        (target / name).write_bytes(content)
    location = _read_csv(raw / "tpims_location.csv").set_index("SITE_ID")
    sites = first[["nearest_city_km", "nearest_city_s", "owner_private", "n_amenity", "capacity"]].copy()
    sites.insert(0, "state", sites.index.str[:2])
    for column in ("MILE_MARKER", "NAME", "CITY", "LATITUDE", "LONGITUDE"):
        sites[column.lower()] = location[column].reindex(sites.index)
    sites["capacity_loc"] = location["CAPACITY"].reindex(sites.index)
    sites.to_csv(target / "sites.csv")


def _members(path: Path) -> list[tuple[str, bytes]]:
    """Names and contents of an archive's CSV files; folders are left out, and nothing is written to disk."""
    try:
        with tarfile.open(path) as archive:
            return [
                (Path(member.name).name, archive.extractfile(member).read())
                for member in archive
                if member.isfile() and member.name.endswith(".csv")
            ]
    except (OSError, tarfile.TarError, EOFError) as error:
        raise UserError(f"{path} is missing or damaged ({error}): delete it and fetch it again") from None


# --- The stand-in -----------------------------------------------------------------------------------------------------

# Where the regions' sites are scattered: the middles of the five states, in degrees.
CENTERS = ((42.0, -93.5), (38.5, -98.4), (37.5, -85.3), (40.3, -82.8), (44.5, -90.0))
SPREAD_DEGREES = 0.7
MINUTES_BETWEEN_SHOCKS_OF_HALF_SIZE = 240
SHOCK_DEVIATION = 0.15
NOISE_DEVIATION = 0.04
MISSING_FRACTION = 0.05
MEAN_OUTAGE_STEPS = 6


def generate(settings: DataSettings, seed: int) -> Parking:
    """Sites with their region's daily profile, shocks that they share with it, and noise of their own.

    Occupancy of site i in region s is level_i + swing_i · profile_s(hour) + shock_i + noise_i, clipped to [0, 1] and
    reported in whole spaces. Shocks are autoregressive of first order, shock_i = √ρ common_s + √(1 - ρ) own_i, so that
    two sites of a region correlate by ρ = `regional_correlation`; with ρ = 0 a site's neighbors say nothing about it,
    and knowing regions cannot help beyond the profile. Readings are missing in outages of about an hour.
    The draws do not depend on ρ, so that data sets of different ρ differ in nothing else.
    """
    generator = np.random.default_rng(seed)
    region = np.repeat(np.arange(len(REGIONS)), settings.sites_per_region)
    num_sites, num_steps = len(region), int(settings.days or 0) * 24 * 60 // STEP_MINUTES
    positions = np.array(CENTERS)[region] + generator.uniform(-SPREAD_DEGREES, SPREAD_DEGREES, (num_sites, 2))
    capacity = np.round(np.exp(generator.normal(3.0, 0.6, num_sites))).clip(5, 200)

    hours = np.arange(num_steps) * STEP_MINUTES / 60
    peak, sharpness = generator.uniform(0, 6, len(REGIONS)), generator.uniform(0, 0.5, len(REGIONS))
    angle = 2 * np.pi * (hours[:, None] - peak) / 24
    profile = np.cos(angle) + sharpness * np.cos(2 * angle)
    level, swing = generator.uniform(0.35, 0.65, num_sites), generator.uniform(0.1, 0.3, num_sites)
    common = autoregression(generator.standard_normal((num_steps, len(REGIONS))))
    own = autoregression(generator.standard_normal((num_steps, num_sites)))
    rho = settings.regional_correlation
    shock = np.sqrt(rho) * common[:, region] + np.sqrt(1 - rho) * own
    noise = generator.normal(0, NOISE_DEVIATION, shock.shape)
    occupancy = np.clip(level + swing * profile[:, region] + SHOCK_DEVIATION * shock + noise, 0, 1)
    available = np.round(capacity * (1 - occupancy)).astype(np.float32)
    observed = ~outages(generator, num_steps, num_sites)

    distances = haversine(positions)
    same = (region[:, None] == region) & ~np.eye(num_sites, dtype=bool)
    # Every site reaches the nearest of its region, whatever the distance.
    reachable = same & ((distances < 1.5 * REACH_KM) | (distances <= np.where(same, distances, np.inf).min(axis=1)))
    seconds = 40 * distances * generator.uniform(1.0, 1.4, distances.shape)
    edges = []
    for index in range(len(REGIONS)):
        target, source = np.nonzero(reachable & (region == index)[:, None])
        edges.append(np.stack([target, source, seconds[target, source]], axis=1))
    city_km, owner = generator.uniform(1, 120, num_sites), generator.integers(0, 2, num_sites)
    available[~observed] = np.nan
    static = np.stack([city_km, owner, generator.integers(1, 25, num_sites), capacity], axis=1)
    names = tuple(f"{REGIONS[of]}{number:03d}" for number, of in enumerate(region))
    times = np.datetime64("2022-03-01T00:00") + np.arange(num_steps) * np.timedelta64(STEP_MINUTES, "m")
    source = f"generated: daily profiles and shocks, regional correlation {rho:g}"
    return Parking(
        Series(available[..., None], observed, times, names), static, positions, region, tuple(edges), source
    )


def autoregression(innovations: NDArray[np.float64]) -> NDArray[np.float64]:
    """Stationary autoregression of first order with unit variance, started from its own distribution; [T, …]."""
    from scipy.signal import lfilter

    phi = 0.5 ** (STEP_MINUTES / MINUTES_BETWEEN_SHOCKS_OF_HALF_SIZE)
    scaled = innovations * np.sqrt(1 - phi**2)
    scaled[0] = innovations[0]
    return lfilter([1.0], [1.0, -phi], scaled, axis=0)


def outages(generator: np.random.Generator, num_steps: int, num_sites: int) -> NDArray[np.bool_]:
    """Runs of missing readings of geometric length, [T, N]; they begin anywhere but in the first step."""
    starts = generator.random((num_steps, num_sites)) < MISSING_FRACTION / MEAN_OUTAGE_STEPS
    starts[0] = False
    lengths = np.where(starts, generator.geometric(1 / MEAN_OUTAGE_STEPS, starts.shape), 0)
    ends = np.maximum.accumulate(np.where(starts, np.arange(num_steps)[:, None] + lengths, 0), axis=0)
    return np.arange(num_steps)[:, None] < ends


# --- Prepared files ---------------------------------------------------------------------------------------------------


def save(path: Path, prepared: Prepared) -> None:
    """Write prepared data as one npz file of plain arrays."""
    arrays = {
        "adjacency": prepared.graph.adjacency,
        "regions": np.stack(prepared.graph.regions),
        "region_of_node": prepared.graph.region_of_node,
        "sites": np.array(prepared.sites),
        "scale": np.array([prepared.target_offset, prepared.target_scale]),
        "fractions": np.array(prepared.fractions),
        "attrs": np.array(list(prepared.attrs.items())),
    }
    for name in ("features", "target", "observed", "times", "positions", "snapshots"):
        arrays[name] = getattr(prepared, name)
    with atomic_path(path) as temporary:
        np.savez(temporary, **arrays)


def load(data_dir: Path, experiment: str) -> Prepared:
    """Read what `prepare` wrote; `UserError` where it is missing or damaged."""
    path = Path(data_dir) / f"{experiment}.npz"
    again = "run the stage again with: reprise run prepare"
    try:
        with np.load(path, allow_pickle=False) as content:
            arrays = {name: content[name] for name in content.files}
        return Prepared(
            Graph(arrays["adjacency"], tuple(arrays["regions"]), arrays["region_of_node"]),
            **{name: arrays[name] for name in ("features", "target", "observed", "times", "positions", "snapshots")},
            sites=tuple(arrays["sites"].tolist()),
            fractions=tuple(arrays["fractions"].tolist()),
            target_offset=float(arrays["scale"][0]),
            target_scale=float(arrays["scale"][1]),
            attrs=dict(arrays["attrs"].tolist()),
        )
    except FileNotFoundError:
        raise UserError(f"{path} is missing; {again}") from None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is cut off or damaged ({error}); {again}") from None
