"""Both unit systems by hand, the graphs, the stand-in's correlation, the converter, and bad files."""

from __future__ import annotations

import gzip
import io
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shared.config import UserError

from .. import data
from ..config import DataSettings

SITES = {"IA1": 20, "IA2": 10, "KS1": 8, "KY1": 5, "OH1": 40, "WI1": 10, "MN1": 12}
GENERATED = DataSettings(source="generated", days=6, sites_per_region=(4, 3, 2, 2, 2))


def parking(num_steps: int = 30) -> data.Parking:
    """Seven sites, one outside of the regions, whose available spaces count up with time."""
    capacity = np.array(list(SITES.values()), float)
    available = (np.arange(num_steps)[:, None] % 4 + np.arange(len(SITES))).astype(np.float32)
    observed = np.ones(available.shape, bool)
    observed[5, 0] = False
    available[5, 0] = 19  # filled in by the source
    available[6, 3] = 12  # more than the capacity of 5
    available[7, 1] = -3
    times = np.datetime64("2022-03-01T00:00") + np.arange(num_steps) * np.timedelta64(10, "m")
    static = np.stack([np.arange(7.0) + 1, np.arange(7.0) % 2, np.full(7, 3.0), capacity], axis=1)
    positions = np.array([[42.0, -93.0], [42.1, -93.0], [38, -98], [37, -85], [40, -82], [44, -90], [np.nan, np.nan]])
    nothing = np.zeros((0, 3))
    edges = (np.array([[0, 1, 600.0]]), nothing, nothing, nothing, nothing)
    series = data.Series(available[..., None], observed, times, tuple(SITES))
    return data.Parking(series, static, positions, np.array([0, 0, 1, 2, 3, 4, -1]), edges, "test")


# --- units ---


def test_clean_units_by_hand() -> None:
    prepared = data.build(parking(), DataSettings(units="clean"))
    assert prepared.sites == ("IA1", "IA2", "KS1", "KY1", "OH1", "WI1")
    assert prepared.target[0, 0] == 1  # none of 20 available
    assert prepared.target[3, 0] == pytest.approx(1 - 3 / 20)
    assert not prepared.observed[5, 0]
    assert prepared.target[5, 0] == prepared.target[4, 0]  # repeats the last reading, not the source's 19
    assert prepared.target[6, 3] == 0
    assert prepared.target[7, 1] == 1
    np.testing.assert_allclose(prepared.unscale_target(prepared.features[..., -1]), prepared.target, atol=1e-6)
    train = prepared.splits.train
    counted = prepared.features[train][prepared.observed[train]]
    np.testing.assert_allclose(counted[:, 3:].mean(axis=0)[[0, 1, 3, 4]], 0, atol=1e-5)
    np.testing.assert_allclose(counted[:, -1].std(), 1, atol=1e-5)


def test_clean_scaling_does_not_see_the_test_part() -> None:
    original = parking()
    values = original.available.values.copy()
    values[25:] = 0
    changed = replace(original, available=replace(original.available, values=values))
    one, other = (data.build(each, DataSettings(units="clean")) for each in (original, changed))
    assert (one.target_offset, one.target_scale) == (other.target_offset, other.target_scale)
    np.testing.assert_array_equal(one.features[:24], other.features[:24])


def test_paper_units_by_hand() -> None:
    prepared = data.build(parking(), DataSettings(units="paper", sites="all"))
    ratio = parking().available.values[..., 0] / np.array(list(SITES.values()))
    low, high = ratio.min(axis=1), ratio.max(axis=1)
    np.testing.assert_allclose(prepared.target, (ratio - low[:, None]) / (high - low)[:, None], rtol=1e-5)
    assert prepared.observed.all()
    assert prepared.target.min() == 0
    assert prepared.target.max() == 1
    # Time is equal at all sites, and vanishes; so do the amenities, of which all sites here have three.
    assert not prepared.features[..., [0, 1, 2, 5]].any()
    np.testing.assert_array_equal(prepared.features[..., -1], prepared.target)
    offset, span = prepared.snapshots.T[..., None]
    np.testing.assert_allclose(prepared.target * span + offset, ratio, rtol=1e-4, atol=1e-5)


def test_time_features() -> None:
    times = np.array(["2022-03-01T05:50", "2022-03-13T23:00", "2022-03-31T00:00"], "datetime64[m]")
    features = data.time_features(times, 2)
    assert features[:, 1].tolist() == [[0, 1, 5], [1, 6, 23], [4, 3, 0]]  # Tuesday, Sunday, Thursday


# --- graphs ---


def test_haversine() -> None:
    distances = data.haversine(np.array([[0.0, 0.0], [0.0, 90.0], [0.0, 0.0]]))
    assert distances[0, 1] == pytest.approx(np.pi / 2 * data.EARTH_RADIUS_KM)
    assert distances[0, 2] == 0


def test_edges_point_from_column_to_row() -> None:
    graph = data.build(parking(), DataSettings(sites="all")).graph
    assert graph.num_nodes == 7
    assert np.argwhere(graph.regions[0]).tolist() == [[0, 1]]
    assert graph.regions[0][0, 1] == 600
    assert np.argwhere(graph.adjacency).tolist() == [[0, 1], [1, 0]]
    assert graph.adjacency[0, 1] == pytest.approx(11.12, abs=0.01)
    assert graph.region_of_node.tolist() == [0, 0, 1, 2, 3, 4, -1]


def test_random_regions_are_a_partition() -> None:
    graph = data.build(data.generate(GENERATED, 0), GENERATED).graph
    dense = replace(graph, adjacency=np.ones_like(graph.adjacency))
    groups = dense.random_regions(42)
    assert [int(group.sum()) for group in groups] == [9, 9, 9, 4, 4]  # 3, 3, 3, 2 and 2 of 13 sites
    assert np.sum(groups, axis=0).max() == 1
    assert all(np.array_equal(*pair) for pair in zip(groups, dense.random_regions(42), strict=True))
    assert not np.array_equal(groups[0], dense.random_regions(43)[0])


# --- the stand-in ---


@pytest.mark.parametrize("correlation", [0.0, 0.9])
def test_shocks_correlate_as_asked_within_regions_alone(correlation: float) -> None:
    settings = DataSettings(source="generated", days=120, sites_per_region=(3, 3, 1, 1, 1))
    made = data.generate(settings.model_copy(update={"regional_correlation": correlation}), 1)
    occupancy = 1 - made.available.values[..., 0] / made.static[:, 3]
    by_slot = occupancy.reshape(120, 144, -1)
    shocks = (by_slot - np.nanmean(by_slot, axis=0)).reshape(occupancy.shape)
    inside = [np.corrcoef(_both(shocks, *pair))[0, 1] for pair in ((0, 1), (1, 2), (3, 4))]
    across = [np.corrcoef(_both(shocks, *pair))[0, 1] for pair in ((0, 3), (1, 4), (2, 5))]
    assert np.mean(inside) == pytest.approx(0.85 * correlation, abs=0.15)
    assert abs(np.mean(across)) < 0.15


def _both(values: np.ndarray, first: int, second: int) -> np.ndarray:
    pair = values[:, [first, second]]
    return pair[np.isfinite(pair).all(axis=1)].T


def test_the_stand_in_is_deterministic_and_complete() -> None:
    one, other = (data.build(data.generate(GENERATED, 3), GENERATED) for _ in range(2))
    assert one.attrs["digest"] == other.attrs["digest"]
    assert one.features.shape == (864, 13, 8)
    assert 0.9 < one.observed.mean() < 1
    assert all((region > 0).any() for region in one.graph.regions)
    assert data.build(data.generate(GENERATED, 4), GENERATED).attrs["digest"] != one.attrs["digest"]


def test_prepared_data_survive_the_disk(tmp_path: Path) -> None:
    prepared = data.build(data.generate(GENERATED, 0), GENERATED)
    data.save(tmp_path / "clean.npz", prepared)
    loaded = data.load(tmp_path, "clean")
    assert loaded.attrs == prepared.attrs
    assert loaded.splits == prepared.splits
    np.testing.assert_array_equal(loaded.features, prepared.features)
    np.testing.assert_array_equal(loaded.graph.regions[1], prepared.graph.regions[1])
    windows = loaded.windows("test", 3)
    np.testing.assert_array_equal(windows.targets[0, 0], loaded.target[loaded.splits.test.start])
    whole = (tmp_path / "clean.npz").read_bytes()
    (tmp_path / "clean.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cut off or damaged"):
        data.load(tmp_path, "clean")
    with pytest.raises(UserError, match=r"other\.npz is missing; run the stage again"):
        data.load(tmp_path, "other")


# --- bad input ---


def changed(values: np.ndarray | None = None, **fields: object) -> data.Parking:
    original = parking()
    available = original.available if values is None else replace(original.available, values=values)
    return replace(original, **({"available": available} | fields))


def test_capacity_zero() -> None:
    static = parking().static.copy()
    static[2, 3], static[4, 3] = 0, np.nan
    with pytest.raises(UserError, match="capacity of a site must be positive, which it is not at KS1, OH1"):
        data.build(changed(static=static), DataSettings())


def test_a_site_without_any_reading() -> None:
    series = parking().available
    observed = series.observed.copy()
    observed[:, 3] = False
    with pytest.raises(UserError, match="no reading was observed in the whole series at KY1"):
        data.build(changed(available=replace(series, observed=observed)), DataSettings())


def test_time_that_goes_back_and_time_gaps() -> None:
    series = parking().available
    times = series.times.copy()
    times[4] = times[2]
    with pytest.raises(UserError, match="goes back at step 4"):
        data.build(changed(available=replace(series, times=times)), DataSettings())
    times = series.times.copy()
    times[10:] += np.timedelta64(20, "m")
    prepared = data.build(changed(available=replace(series, times=times)), DataSettings())
    assert len(prepared.times) == 32
    assert not prepared.observed[10:12].any()
    np.testing.assert_array_equal(prepared.target[11], prepared.target[9])


def test_more_days_than_there_are() -> None:
    with pytest.raises(UserError, match=r"days \(3\) is more than there are, 0.2"):
        data.build(parking(), DataSettings(days=3))


# --- official files ---


@pytest.fixture
def official(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files as `convert` writes them, made from archives as the repository has them."""
    monkeypatch.setenv("REPRISE_DATA", str(tmp_path))
    raw, target = tmp_path / "raw", tmp_path / "regt_gcn"
    raw.mkdir()
    target.mkdir()
    snapshots = {}
    for step, stamp in enumerate(("2022-03-01T00-00-00Z", "2022-03-01T00-10-00Z", "2022-03-01T00-20-00Z")):
        rows = []
        for number, (site, capacity) in enumerate(SITES.items()):
            missing = (step, site) == (1, "KS1")
            reported = data.PLACEHOLDER_TIME if missing else f"2022-03-01T00:{step}0:1{number}Z"
            rows.append(
                f"{number + 1},{site},{reported},03,1,00,12.5,900,{number % 2},4,{capacity},{step + number},0.5"
            )
        snapshots[f"0322/node_data_{stamp}.csv"] = "\n".join(rows) + "\n"
    archive(raw / "tpims_nodes_0322.tar.xz", dict(reversed(snapshots.items())))
    links = {f"link_{region}_data.csv": f"0,{region}1,1,{region}2,700\n" for region in data.REGIONS}
    links["link_IA_data.csv"] = "7,IA1,9,IA2,620\n9,IA2,7,IA1,640\n7,IA1,8,IAX,100\n"
    links |= {f"link_{region}_data.csv": f"0,{region}1,0,{region}1,1\n" for region in data.REGIONS[1:]}
    archive(raw / "tpims_link_0322.tar.xz", links)
    location = ["SITE_ID,MILE_MARKER,NAME,CITY,LATITUDE,LONGITUDE,CAPACITY"]
    location += [f"{site},,Rest area,Town,{40 + n},-9{n}.5,9" for n, site in enumerate(SITES) if site != "MN1"]
    (raw / "tpims_location.csv").write_text("\n".join(location) + "\n")
    data.convert(raw, target)
    return target


def archive(path: Path, files: dict[str, str]) -> None:
    with tarfile.open(path, "w:xz") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))


def test_archives_become_the_layout(official: Path) -> None:
    made = data.read_official("regt_gcn")
    assert made.available.sites == tuple(SITES)
    assert made.available.values[2, :, 0].tolist() == [2, 3, 4, 5, 6, 7, 8]
    assert np.argwhere(~made.available.observed).tolist() == [[1, 2]]
    assert made.static[:, 3].tolist() == list(SITES.values())
    assert made.region_of_node.tolist() == [0, 0, 1, 2, 3, 4, -1]
    # By id, not by the file's own indices, and without the edge to a site that is not there.
    assert made.edges[0].tolist() == [[1, 0, 620], [0, 1, 640]]
    assert np.isnan(made.positions[-1]).all()


def test_conversion_is_deterministic(official: Path) -> None:
    before = {path.name: path.read_bytes() for path in official.iterdir()}
    shutil.rmtree(official)
    official.mkdir()
    data.convert(official.parent / "raw", official)
    assert {path.name: path.read_bytes() for path in official.iterdir()} == before


def rewrite(path: Path, old: str, new: str) -> None:
    packed = path.suffix == ".gz"
    text = gzip.decompress(path.read_bytes()).decode() if packed else path.read_text()
    assert old in text
    text = text.replace(old, new)
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())


@pytest.mark.parametrize(
    ("name", "old", "new", "words"),
    [
        ("tpims_0322_available.csv.gz", "KS1", "KS9", "has sites that sites.csv does not have: KS9"),
        ("sites.csv", "WI1,WI,12.5,900,1,4,10,,Rest area,Town,45.0,-95.5,9.0\n", "", "does not have: WI1"),
        ("sites.csv", "IA2,IA", "IA1,IA", "lists IA1 twice"),
        ("sites.csv", "capacity,", "space,", "lacks the columns capacity"),
        ("link_IA_data.csv", "IA1,9,IA2", "XX1,9,XX2", "2 of 3 edges have an end that sites.csv does not have"),
        ("link_IA_data.csv", "640", "-5", "line 2: a driving time must be a positive number"),
        ("tpims_0322_available.csv.gz", "00:10:00", "00:15:00", "different times"),
        ("tpims_0322_fresh.csv.gz", "Z,1", "Z,yes", "something else than numbers"),
    ],
)
def test_bad_files_are_named(official: Path, name: str, old: str, new: str, words: str) -> None:
    rewrite(official / name, old, new)
    with pytest.raises(UserError, match=words):
        data.read_official("regt_gcn")


def test_missing_and_damaged_files(official: Path, tmp_path: Path) -> None:
    path = official / "tpims_0322_fresh.csv.gz"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError, match=r"fresh\.csv\.gz is damaged.*reprise data fetch regt_gcn"):
        data.read_official("regt_gcn")
    (official / "link_OH_data.csv").unlink()
    path.unlink()
    with pytest.raises(UserError, match="reprise data fetch regt_gcn"):
        data.read_official("regt_gcn")
    nodes = tmp_path / "raw" / "tpims_nodes_0322.tar.xz"
    nodes.write_bytes(nodes.read_bytes()[:60])
    with pytest.raises(UserError, match="missing or damaged"):
        data.convert(tmp_path / "raw", official)
