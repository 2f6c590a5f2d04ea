from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest

from shared.config import Stage, UserError, validate

from .. import data, solvers
from ..data import EquationSettings, check_equations, load, official_path, prepare, read_pdebench_1d, read_pdebench_2d

SMALL: dict[str, Any] = {
    "train_parameters": [0.2, 0.4],
    "unseen_parameters": [0.3, 1.0],
    "num_train": 4,
    "num_validation": 2,
    "num_test": 3,
    "num_unseen": 2,
    "num_points": 16,
    "num_frames": 6,
    "final_time": 1.0,
}
GAS: dict[str, Any] = SMALL | {
    "train_parameters": [[0.01, 0.01, 0.1], [0.1, 0.1, 0.1]],
    "unseen_parameters": [[0.05, 0.02, 0.1], [0.05, 0.05, 0.2]],
    "num_points": 8,
    "num_frames": 2,
    "final_time": 0.05,
}


def stage(folder: Path, *, seed: int = 0, workers: int = 1, **equations: dict[str, Any]) -> Stage:
    settings = {name: EquationSettings(**values) for name, values in equations.items()}
    params = SimpleNamespace(equations=settings, seed=seed, workers=workers)
    return Stage(folder=folder, name="prepare", profile="small", params=params)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- Preparing and loading --------------------------------------------------------------------------------------------


def test_splits_shapes_and_regimes(tmp_path: Path) -> None:
    prepare(stage(tmp_path, advection=SMALL, burgers=SMALL, navier_stokes=GAS))
    train = load(tmp_path / "data", "advection", "train")
    assert train.u.shape == (8, 6, 1, 16)
    assert train.u.dtype == np.float32
    np.testing.assert_array_equal(train.parameters, np.float32([[0.2]] * 4 + [[0.4]] * 4))
    np.testing.assert_allclose(train.times, [0, 0.2, 0.4, 0.6, 0.8, 1], rtol=1e-6)
    np.testing.assert_allclose(train.grid, [solvers.cell_centers(16)], rtol=1e-6)
    assert set(train.regime) == {"seen"}
    assert train.attrs["source"] == "generated"
    assert [len(load(tmp_path / "data", "burgers", split).u) for split in ("train", "validation", "test")] == [8, 4, 6]
    assert load(tmp_path / "data", "burgers", "unseen").regime.tolist() == ["interpolated"] * 2 + ["extrapolated"] * 2
    gas = load(tmp_path / "data", "navier_stokes", "unseen")
    assert gas.u.shape == (4, 2, 4, 8, 8)
    assert gas.grid.shape == (2, 8, 8)
    np.testing.assert_allclose(gas.grid[0, 3], 3.5 / 8)
    assert gas.regime.tolist() == ["interpolated"] * 2 + ["extrapolated"] * 2
    assert gas.attrs["channels"] == ("density", "pressure", "velocity_x", "velocity_y")


def test_no_sample_is_in_two_sets_and_all_obey_their_equation(tmp_path: Path) -> None:
    prepare(stage(tmp_path, advection=SMALL))
    first_frames = []
    for split in ("train", "validation", "test", "unseen"):
        loaded = load(tmp_path / "data", "advection", split)
        first_frames += [frame.tobytes() for frame in loaded.u[:, 0]]
        # At speed 1 the wave has gone round once at t = 1.
        for u, (speed,) in zip(loaded.u, loaded.parameters, strict=True):
            if speed == 1:
                np.testing.assert_allclose(u[-1], u[0], atol=1e-5)
    assert len(set(first_frames)) == len(first_frames) == 2 * (4 + 2 + 3) + 2 * 2


def test_burgers_matches_a_direct_solution_of_the_same_seed(tmp_path: Path) -> None:
    thin = SMALL | {"train_parameters": [0.002], "unseen_parameters": []}
    prepare(stage(tmp_path, burgers=thin))
    loaded = load(tmp_path / "data", "burgers", "validation")
    piece = data._pieces("burgers", EquationSettings(**thin), 0)[1]
    assert piece.refinement == 512 // 16
    generator = np.random.default_rng(piece.seed_sequence())
    initial = solvers.initial_condition_1d(generator, 2)(solvers.cell_centers(512))
    np.testing.assert_allclose(loaded.u[:, 0, 0], initial.reshape(2, 16, 32).mean(axis=2), atol=1e-6)
    np.testing.assert_array_equal(
        loaded.u[:, :, 0], solvers.solve_burgers(initial, 0.002, np.linspace(0, 1, 6), refinement=32)
    )


def test_two_runs_are_identical_in_one_process_or_two(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "two", "other_seed")]
    prepare(stage(folders[0], advection=SMALL, burgers=SMALL))
    prepare(stage(folders[1], advection=SMALL, burgers=SMALL, workers=2))
    prepare(stage(folders[2], advection=SMALL, burgers=SMALL, seed=1))
    assert contents(folders[0]) == contents(folders[1])
    digests = [data.digest(folder / "data", "advection", "train") for folder in folders]
    assert digests[0] == digests[1] != digests[2]
    # An equation by itself, or with further parameter values, gives the same samples.
    more = SMALL | {"train_parameters": [0.7, 0.2, 0.4], "num_train": 9}
    prepare(stage(tmp_path / "more", advection=more))
    expected = load(folders[0] / "data", "advection", "train").u[:4]
    np.testing.assert_array_equal(load(tmp_path / "more" / "data", "advection", "train").u[9:13], expected)


def test_interrupted_preparation_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, written = data._write_piece, []

    def interrupted(piece: data.Piece, path: Path) -> None:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(path)
        write(piece, path)

    monkeypatch.setattr(data, "_write_piece", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(stage(tmp_path, burgers=SMALL))
    with pytest.raises(UserError, match="not to the end"):
        load(tmp_path / "data", "burgers", "train")
    kept = {path: path.stat().st_mtime_ns for path in written}
    (tmp_path / "data" / "burgers" / ".train_half-written.npz").touch()
    monkeypatch.setattr(data, "_write_piece", write)
    prepare(stage(tmp_path, burgers=SMALL))
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    prepare(stage(tmp_path / "undisturbed", burgers=SMALL))
    assert contents(tmp_path / "data") == contents(tmp_path / "undisturbed" / "data")


def test_killed_preparation_leaves_no_worker_and_continues(tmp_path: Path) -> None:
    slow = SMALL | {"num_points": 128, "num_train": 40, "train_parameters": [0.01, 0.02, 0.03, 0.04, 0.05]}
    slow |= {"unseen_parameters": []}
    script = (
        "import json, sys, pathlib\n"
        f"from {__package__}.test_data import stage, prepare\n"
        "if __name__ == '__main__':\n"
        "    prepare(stage(pathlib.Path(sys.argv[1]), workers=2, burgers=json.loads(sys.argv[2])))\n"
    )
    (tmp_path / "run.py").write_text(script)
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "run.py"), str(tmp_path), json.dumps(slow)],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
    )
    folder = tmp_path / "data" / "burgers"
    try:
        assert _eventually(lambda: any(folder.glob("[!.]*.npz")) or process.poll() is not None)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert _eventually(lambda: not _group_alive(process.pid))
    finally:
        if _group_alive(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("[!.]*.npz")}
    assert kept
    prepare(stage(tmp_path, burgers=slow))
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert load(tmp_path / "data", "burgers", "train").u.shape == (200, 6, 1, 128)


def _eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


def _group_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_changed_settings_replace_what_they_concern_only(tmp_path: Path) -> None:
    prepare(stage(tmp_path, advection=SMALL, burgers=SMALL))
    before = contents(tmp_path / "data")
    prepare(stage(tmp_path, advection=SMALL | {"num_test": 5, "train_parameters": [0.2, 0.5]}))
    after = contents(tmp_path / "data")
    assert sorted(after) == [
        "advection/index.json",
        *(f"advection/{split}_{speed}.npz" for split in ("test", "train") for speed in (0.2, 0.5)),
        *(f"advection/unseen_{speed}.npz" for speed in (0.3, 1.0)),
        *(f"advection/validation_{speed}.npz" for speed in (0.2, 0.5)),
    ]
    assert after["advection/train_0.2.npz"] == before["advection/train_0.2.npz"]
    assert after["advection/test_0.2.npz"] != before["advection/test_0.2.npz"]


@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped", "empty"])
def test_damaged_files_are_named_and_made_again(tmp_path: Path, damage: str) -> None:
    prepare(stage(tmp_path, advection=SMALL))
    before = contents(tmp_path / "data")
    path = tmp_path / "data" / "advection" / "train_0.4.npz"
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        path.write_bytes(content[:400] + bytes([content[400] ^ 1]) + content[401:])
    with pytest.raises(UserError, match=r"train_0\.4\.npz.*reprise run prepare"):
        load(tmp_path / "data", "advection", "train")
    prepare(stage(tmp_path, advection=SMALL))
    assert contents(tmp_path / "data") == before


def test_load_says_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="reprise run prepare"):
        load(tmp_path / "data", "burgers", "train")
    with pytest.raises(UserError, match="equations: advection, burgers, navier_stokes"):
        load(tmp_path / "data", "wave", "train")
    prepare(stage(tmp_path, burgers=SMALL | {"unseen_parameters": []}))
    with pytest.raises(UserError, match="without the split 'unseen'"):
        load(tmp_path / "data", "burgers", "unseen")
    (tmp_path / "data" / "burgers" / "index.json").write_text('{"source": ')
    with pytest.raises(UserError, match=r"index\.json is damaged"):
        load(tmp_path / "data", "burgers", "train")


def test_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="cannot write the prepared data"):
        prepare(stage(tmp_path, advection=SMALL))


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", no_space)
    with pytest.raises(UserError, match="No space left on device"):
        prepare(stage(tmp_path, advection=SMALL))
    assert not contents(tmp_path)


# --- Settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_frames": 1}, "num_frames: .*greater than or equal to 2"),
        ({"num_points": 4}, "num_points: .*greater than or equal to 8"),
        ({"final_time": 0}, "final_time: .*greater than 0"),
        ({"num_train": 0}, "num_train"),
        ({"train_parameters": []}, "train_parameters"),
        ({"train_parameters": [0.2, "fast"]}, "train_parameters"),
        ({"train_parameters": 0.2}, "train_parameters"),
        ({"train_parameters": [0.2, 0.2]}, "repeated"),
        ({"unseen_parameters": [0.4]}, "repeated"),
        ({"num_unseen": 0}, "num_unseen must be at least 1"),
        ({"source": "pdebench"}, "needs data_folder"),
        ({"source": "internet"}, "source"),
        ({"viscosity": 1}, "viscosity: unknown key"),
    ],
)
def test_impossible_settings(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        validate(EquationSettings, SMALL | change, "params.yaml")


@pytest.mark.parametrize(
    ("equation", "change", "message"),
    [
        ("burgers", {"train_parameters": [-0.1]}, "burgers: viscosity must not be negative; given: -0.1"),
        ("navier_stokes", {"train_parameters": [[0.1, -1, 0.1]]}, "bulk_viscosity must not be negative"),
        ("navier_stokes", {"train_parameters": [[0.1, 0.1, 0]]}, "mach_number must be positive"),
        ("navier_stokes", {"train_parameters": [0.1]}, "has the parameters shear_viscosity, bulk_viscosity, mach"),
        ("advection", {"train_parameters": [0.1, 2.5]}, "speed 2.5 crosses half of the domain"),
    ],
)
def test_impossible_parameters(tmp_path: Path, equation: str, change: dict[str, Any], message: str) -> None:
    settings = SMALL | {"unseen_parameters": []} | change
    with pytest.raises(ValueError, match=message):
        check_equations({equation: EquationSettings(**settings)})
    with pytest.raises(UserError, match=message):
        prepare(stage(tmp_path, **{equation: settings}))


# --- Official files ---------------------------------------------------------------------------------------------------


@pytest.fixture
def official(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tiny files of the official layout, in a data root of their own; their time axes have one entry too many."""
    monkeypatch.setenv("REPRISE_DATA", str(tmp_path / "root"))
    folder = tmp_path / "root" / "official"
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for value in (0.2, 0.4, 1.0):
        with h5py.File(folder / f"1D_Burgers_Sols_Nu{value}.hdf5", "w") as file:
            file["tensor"] = generator.normal(size=(9, 21, 64)).astype(np.float32)
            file["x-coordinate"] = np.float32(solvers.cell_centers(64))
            file["t-coordinate"] = np.linspace(0, 2.1, 22, dtype=np.float32)
    with h5py.File(folder / "2D_CFD_Rand_M0.1_Eta1e-08_Zeta1e-08_periodic_512_Train.hdf5", "w") as file:
        for key in ("density", "pressure", "Vx", "Vy"):
            file[key] = generator.normal(size=(5, 21, 16, 16)).astype(np.float32)
        for key in ("x-coordinate", "y-coordinate"):
            file[key] = np.float32(solvers.cell_centers(16))
        file["t-coordinate"] = np.linspace(0, 1.05, 22, dtype=np.float32)
    return folder


OFFICIAL = SMALL | {
    "source": "pdebench",
    "data_folder": "official",
    "unseen_parameters": [1.0],
    "num_frames": 5,
    "final_time": 2.0,
}


def test_official_1d_files(official: Path, tmp_path: Path) -> None:
    prepare(stage(tmp_path, burgers=OFFICIAL))
    with h5py.File(official / "1D_Burgers_Sols_Nu0.4.hdf5", "r") as file:
        tensor = file["tensor"][:]
    np.testing.assert_array_equal(load(tmp_path / "data", "burgers", "train").u[4:, :, 0], tensor[:4, ::5, ::4])
    validation = load(tmp_path / "data", "burgers", "validation")
    np.testing.assert_array_equal(validation.u[2:, :, 0], tensor[4:6, ::5, ::4])
    np.testing.assert_array_equal(load(tmp_path / "data", "burgers", "test").u[3:, :, 0], tensor[6:9, ::5, ::4])
    assert load(tmp_path / "data", "burgers", "unseen").regime.tolist() == ["extrapolated"] * 2
    assert validation.attrs["source"] == "pdebench"
    np.testing.assert_allclose(validation.times, [0, 0.5, 1, 1.5, 2], rtol=1e-6)
    np.testing.assert_allclose(validation.grid[0], solvers.cell_centers(64)[::4], rtol=1e-6)
    u, (x,), times = read_pdebench_1d(official / "1D_Burgers_Sols_Nu0.4.hdf5")
    assert (u.shape, x.shape, times.shape) == ((9, 21, 1, 64), (64,), (21,))


def test_official_2d_files(official: Path, tmp_path: Path) -> None:
    parameters = (1e-8, 1e-8, 0.1)
    path = official_path("official", "navier_stokes", parameters)
    u, coordinates, times = read_pdebench_2d(path, space_stride=2, time_stride=4, start=1, limit=3)
    assert u.shape == (3, 6, 4, 8, 8)
    assert [len(axis) for axis in coordinates] == [8, 8]
    np.testing.assert_allclose(times, np.linspace(0, 1, 6), rtol=1e-6)
    with h5py.File(path, "r") as file:
        np.testing.assert_array_equal(u[:, :, 2], file["Vx"][1:4, ::4, ::2, ::2])
    settings = OFFICIAL | {"train_parameters": [parameters], "unseen_parameters": [], "num_points": 8}
    settings |= {"num_train": 2, "num_validation": 1, "num_test": 2, "final_time": 1.0}
    prepare(stage(tmp_path, navier_stokes=settings))
    np.testing.assert_array_equal(
        load(tmp_path / "data", "navier_stokes", "test").u,
        read_pdebench_2d(path, space_stride=2, time_stride=5, start=3, limit=2)[0],
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_points": 24}, r"num_points must divide the 64 of .*Nu0\.2\.hdf5; given: 24"),
        ({"num_frames": 7}, "7 frames up to t = 2 are not among those"),
        ({"final_time": 5.0}, "5 frames up to t = 5 are not among those"),
        ({"num_test": 9}, "holds 9 samples; rows 6 to 15 were asked for"),
        ({"unseen_parameters": [4]}, r"1D_Burgers_Sols_Nu4\.0\.hdf5 is missing.*reprise data fetch official"),
    ],
)
def test_what_official_files_do_not_hold(official: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare(stage(tmp_path, burgers=OFFICIAL | change))


def test_damaged_official_files(official: Path, tmp_path: Path) -> None:
    path = official / "1D_Burgers_Sols_Nu0.2.hdf5"
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], b"<html>404</html>", b""):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"Nu0\.2\.hdf5 is missing, truncated or.*reprise data fetch official"):
            prepare(stage(tmp_path, burgers=OFFICIAL))
    with h5py.File(path, "w") as file:
        file["solution"] = np.zeros((2, 2, 2))
    with pytest.raises(UserError, match="not one of PDEBench's files"):
        read_pdebench_1d(path)
    with h5py.File(path, "w") as file:
        file["tensor"] = np.full((9, 21, 64), np.nan, dtype=np.float32)
        file["x-coordinate"], file["t-coordinate"] = np.zeros(64), np.linspace(0, 2, 21)
    with pytest.raises(UserError, match="not finite"):
        read_pdebench_1d(path)


def test_the_reader_is_lazy(official: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the rows and frames that are asked for are read: the official files do not fit in memory."""
    read: list[int] = []
    get_item = h5py.Dataset.__getitem__

    def counting(self: h5py.Dataset, selection: object, **options: object) -> object:
        result = get_item(self, selection, **options)
        read.append(np.size(result) if self.name == "/tensor" else 0)
        return result

    monkeypatch.setattr(h5py.Dataset, "__getitem__", counting)
    read_pdebench_1d(official / "1D_Burgers_Sols_Nu0.2.hdf5", time_stride=10, space_stride=8, limit=2)
    assert sum(read) == 2 * 3 * 64
