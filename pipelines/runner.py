"""Runs a stage of the paper in whose folder it is called, whatever the folder's name."""

from __future__ import annotations

import difflib
import fcntl
import importlib
import importlib.util
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from shared.config import Stage, UserError, load_params, read_yaml, repo_root
from shared.files import remove_unfinished, write_json


def run_stage(folder: Path, name: str, model: str | None = None) -> None:
    """Run stage `name` of the paper in `folder`: the function of that name in `<name>.py`, or in `data.py`.

    Reads params.yaml, tracks the stage as an MLflow run, and leaves wall time and peak memory under `runs/timing/`.
    The stage `prepare` also leaves the profile's params in `data/params.json`.
    """
    # Small models are fastest on one thread; a stage that profits from more asks for them itself.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    folder = folder.resolve()
    package = import_paper(folder)
    function = find_stage(folder, package, name)
    label = f"{name}@{model}" if model else name
    schema = importlib.import_module(f"{package}.config").Params
    profile, params = load_params(folder / "params.yaml", schema)

    from shared import tracking

    title = " · ".join(part for part in (name, model, profile) if part)
    tags = {"stage": name, "profile": profile} | ({"model": model} if model else {})
    readme = folder / "README.md"
    about = readme.read_text(encoding="utf-8") if readme.exists() else None
    description = describe_stage(folder, name, model)
    with (
        _claimed(folder, label),
        tracking.deliver(),
        tracking.start_run(
            folder.name, title, description=description, experiment_description=about, params=flatten(params), tags=tags
        ) as run,
        _measured() as measured,
    ):
        stage = Stage(folder, name, profile, params, model, run)
        function(stage)
        if name == "prepare":
            # Later stages depend on the data, and through this file on the params: DVC then records these once a
            # paper instead of once a stage, which it would read again at every command.
            write_json(stage.data_dir / "params.json", params.model_dump(mode="json"))
    write_json(
        folder / "runs" / "timing" / profile / f"{label}.json",
        {"stage": name, "model": model, "run_id": run.id, **measured},
    )


def import_paper(folder: Path) -> str:
    """Make the paper's folder importable and return its package name, `papers.<folder name>`."""
    root = repo_root(folder)
    if folder.parent != root / "papers" or not (folder / "params.yaml").is_file():
        raise UserError(
            f"{folder} is not the folder of a paper: run this in {root / 'papers'}/<name>, "
            "where params.yaml and dvc.yaml are"
        )
    if not folder.name.isidentifier():
        raise UserError(f"the folder name {folder.name!r} is no Python name: use letters, digits and underscores")
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    return f"papers.{folder.name}"


def find_stage(folder: Path, package: str, name: str) -> Callable[[Stage], None]:
    """The function that runs stage `name`; an unknown stage is an error that lists the stages there are."""
    for module_name in (name, "data"):
        if (folder / f"{module_name}.py").is_file():
            function = getattr(importlib.import_module(f"{package}.{module_name}"), name, None)
            if callable(function):
                return function
    known = sorted((read_yaml(folder / "dvc.yaml") or {}).get("stages", {}))
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise UserError(f"{folder.name} has no stage {name!r}{hint}; its dvc.yaml has: {', '.join(known)}")


def describe_stage(folder: Path, name: str, model: str | None = None) -> str | None:
    """What dvc.yaml says of a stage in its `desc`; None where it says nothing."""
    stage = (read_yaml(folder / "dvc.yaml") or {}).get("stages", {}).get(name, {})
    description = stage.get("do", stage).get("desc")
    return description.replace("${item}", str(model)) if description else None


def flatten(params: Any, prefix: str = "") -> dict[str, Any]:
    """Nested params as one level with dotted keys, for tracking."""
    if hasattr(params, "model_dump"):
        params = params.model_dump(mode="json")
    if not isinstance(params, Mapping):
        return {prefix: params}
    flat: dict[str, Any] = {}
    for key, value in params.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


@contextmanager
def _claimed(folder: Path, label: str) -> Iterator[None]:
    """Refuse to run a stage twice at once, which would write the same files; clear away what killed runs left.

    Other stages of the paper may run at the same time: what lies about may then be theirs, and stays. Of a distributed
    run only the first process asks.
    """
    if int(os.environ.get("RANK", 0)) > 0:
        yield
        return
    locks = folder / "runs" / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    with open(locks / label.replace(os.sep, "_"), "a") as of_stage, open(locks / "any", "a") as of_any:
        if not _lock(of_stage):
            raise UserError(
                f"{label} of {folder.name} is running already: wait for its end, or stop that process "
                "(ps ax | grep 'reprise run'); then run this again"
            )
        if _lock(of_any):
            for place in ("data", "runs", "results"):
                remove_unfinished(folder / place)
        fcntl.flock(of_any, fcntl.LOCK_SH)
        yield


def _lock(file: IO[str]) -> bool:
    """Lock a file until it is closed here and in all forked processes; False if another process holds it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _measured() -> Iterator[dict[str, float]]:
    """Measure wall time and the peak of the resident memory of this process and its children together.

    Pages that forked children share count once per process, so the peak is an upper bound.
    """
    import psutil

    process, peak, stop = psutil.Process(), 0, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not stop.wait(0.5):
            total = 0
            for member in (process, *process.children(recursive=True)):
                try:
                    total += member.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            peak = max(peak, total)

    measured: dict[str, float] = {}
    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    started = time.perf_counter()
    try:
        yield measured
    finally:
        stop.set()
        sampler.join()
        peak = max(peak, process.memory_info().rss)
        measured |= {
            "wall_time_seconds": round(time.perf_counter() - started, 2),
            "peak_memory_mib": round(peak / 2**20, 1),
        }
