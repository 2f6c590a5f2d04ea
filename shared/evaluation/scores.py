"""The tidy table of scores, and the metrics.json that is derived from it.

One row is one measured number. `model, dataset, metric, seed, value` come first; further columns, such as `time`,
`parameter` or `item` (the index of a test item), tell the rows of a curve apart and are blank elsewhere.
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
import math
import os
import platform
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.config import Stage, UserError, read_yaml
from shared.files import atomic_path, write_json

if TYPE_CHECKING:
    import pandas as pd

SCORE_COLUMNS = ("model", "dataset", "metric", "seed", "value")
NAMES = ("model", "dataset", "metric")

NOT_CODE = {"tests", "data", "runs", "results", "__pycache__"}


def write_scores(path: Path, frame: pd.DataFrame) -> None:
    """Write scores.csv: checked, in an order of its own, every digit kept, so that equal runs give equal files.

    Values that are not finite are kept (a run that diverged is a result). `UserError` for missing columns, blank names,
    seeds that are not whole numbers, and rows that agree in everything but their value.
    """
    table = _checked(frame, str(path))
    keys = [column for column in table.columns if column != "value"]
    table = table.sort_values(keys, kind="stable", na_position="first")
    for column in table.select_dtypes("floating"):
        # Python's repr: the shortest text that reads back as the same number.
        table[column] = [None if column != "value" and math.isnan(v) else repr(float(v)) for v in table[column]]
    with atomic_path(path) as temporary:
        table.to_csv(temporary, index=False, lineterminator="\n", encoding="utf-8")


def read_scores(path: Path) -> pd.DataFrame:
    """Read scores.csv; further columns become numbers where all their entries are numbers.

    `UserError` where the file is missing, cut off or not a table of scores.
    """
    import pandas as pd

    again = "run the paper's evaluate stage again to make it anew"
    try:
        text = path.read_text(encoding="utf-8")
        frame = pd.read_csv(io.StringIO(text), dtype=str, keep_default_na=False)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: run the paper in this profile first (dvc repro)") from None
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a table of scores ({error}): {again}") from None
    if not text.endswith("\n") or frame.isna().any(axis=None):
        raise UserError(f"{path} is cut off: {again}")
    if not isinstance(frame.index, pd.RangeIndex):
        # pandas takes what stands before too few column names for an index.
        raise UserError(f"{path} is not a table of scores (rows are longer than the header): {again}")
    for column in frame.columns.difference(list(NAMES)):
        try:
            numbers = frame[column].replace("", "nan").astype(float)
        except ValueError:
            if column in SCORE_COLUMNS:
                raise UserError(f"{path}: column {column!r} holds something that is not a number: {again}") from None
            frame[column] = frame[column].replace("", None)
        else:
            if column == "value" and (frame[column] == "").any():
                raise UserError(f"{path} has a row without a value: {again}")
            frame[column] = numbers
    return _checked(frame, str(path)).reset_index(drop=True)


def further_columns(frame: pd.DataFrame) -> list[str]:
    """The columns beyond `SCORE_COLUMNS`."""
    return [column for column in frame.columns if column not in SCORE_COLUMNS]


def overall(frame: pd.DataFrame, *, chosen: tuple[str, ...] = ()) -> pd.DataFrame:
    """The rows that stand for a model's whole result, without those of its curves.

    Where a model's metric on a data set has rows with all further columns blank, these are its result, and the rows
    with an entry (a time, a parameter, an item) are details of it. Where it has none, all of its rows are. Columns in
    `chosen` do not count as further ones: the caller has picked their entries already.
    """
    columns = [column for column in further_columns(frame) if column not in chosen]
    is_detail = frame[columns].notna().any(axis=1)
    only_details = is_detail.groupby([frame[name] for name in NAMES]).transform("all")
    return frame[~is_detail | only_details]


def summarize(frame: pd.DataFrame) -> dict[str, dict[str, dict[str, float | None]]]:
    """Means over seeds of the overall rows, as {dataset: {metric: {model: mean}}}; None where a mean is not finite."""
    means: dict[str, dict[str, dict[str, float | None]]] = {}
    # Items and seeds need not be balanced, so the seeds' own means come first.
    by_seed = overall(frame).groupby(["dataset", "metric", "model", "seed"])["value"].agg(_mean)
    for (dataset, metric, model), value in by_seed.groupby(level=[0, 1, 2]).agg(_mean).items():
        means.setdefault(dataset, {}).setdefault(metric, {})[model] = float(value) if math.isfinite(value) else None
    return means


def write_metrics(stage: Stage, frame: pd.DataFrame, data_source: str, *, device: str | None = None) -> None:
    """Write metrics.json of a stage's profile: means, and all that tells where and from what they came.

    `data_source` says in a few words what the scores were measured on; it begins with `real` for recorded data and
    with `generated` for a stand-in. Run time and memory are summed and maximized over the records that the stages of
    this profile left in runs/timing/, and over this process.
    """
    wall_time, peak_memory = _cost(stage)
    sections = read_yaml(stage.folder / "params.yaml")
    metrics = {
        "profile": stage.profile,
        "data_source": data_source,
        "means": summarize(frame),
        "versions": _versions(),
        "device": device or device_name(),
        "wall_time_seconds": round(wall_time, 1),
        "peak_memory_mib": round(peak_memory, 1),
        "digest": {"code": code_digest(stage.folder), "params": params_digest(sections[stage.profile])},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_json(stage.results_dir / "metrics.json", metrics)


def code_digest(folder: Path, modules: Collection[str] | None = None) -> str:
    """SHA-256 of what a folder's Python code says: comments, docstrings and layout do not count, tests neither.

    With `modules`, such as `["model.py", "train.py"]`, of these alone.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py"), key=lambda path: path.relative_to(folder).as_posix()):
        name = path.relative_to(folder)
        if NOT_CODE.isdisjoint(name.parts[:-1]) and (modules is None or name.as_posix() in modules):
            try:
                said = _meaning(path.read_text(encoding="utf-8"))
            except SyntaxError as error:
                raise UserError(f"{path} is not valid Python (line {error.lineno}: {error.msg})") from None
            digest.update(f"{name.as_posix()}\n{said}\n".encode())
    return digest.hexdigest()


def params_digest(section: Mapping[str, Any]) -> str:
    """SHA-256 of one profile's section of params.yaml; the order of its keys does not count."""
    text = json.dumps(section, sort_keys=True, separators=(",", ":"), ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def device_name() -> str:
    """The GPU that torch would use, or the processor and the number of cores that this process may use."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"CPU, {cores} cores ({_processor()})"


def _checked(frame: pd.DataFrame, where: str) -> pd.DataFrame:
    """A copy with the standard columns first, names as text and seeds as integers."""
    missing = [column for column in SCORE_COLUMNS if column not in frame.columns]
    if missing:
        raise UserError(
            f"{where}: scores lack the column{'s' * (len(missing) > 1)} {', '.join(missing)}; they need "
            f"{', '.join(SCORE_COLUMNS)} and have {', '.join(map(str, frame.columns)) or 'none'}"
        )
    if frame.empty:
        raise UserError(f"{where}: there are no scores, not one row")
    table = frame[[*SCORE_COLUMNS, *further_columns(frame)]].copy()
    for name in NAMES:
        if table[name].isna().any() or (table[name].astype(str).str.strip() == "").any():
            raise UserError(f"{where}: a score has a blank {name}")
        table[name] = table[name].astype(str)
    if table["seed"].isna().any() or (table["seed"].astype(float) % 1 != 0).any():
        raise UserError(f"{where}: seeds must be whole numbers (0 for what has no seed)")
    table["seed"] = table["seed"].astype(int)
    table["value"] = table["value"].astype(float)
    keys = [column for column in table.columns if column != "value"]
    duplicates = table[table.duplicated(keys)]
    if not duplicates.empty:
        first = ", ".join(f"{key}={duplicates.iloc[0][key]}" for key in keys)
        raise UserError(f"{where}: {len(duplicates)} scores are given twice, the first of them {first}")
    return table


def _mean(values: pd.Series) -> float:
    # pandas skips nan by default, which would hide a run that diverged.
    return values.mean(skipna=False)


def _cost(stage: Stage) -> tuple[float, float]:
    """Seconds in all and the greatest memory in MiB, of the stages that ran and of this process."""
    import psutil

    records = [record for record in _timing_records(stage) if record.get("stage") != stage.name]
    seconds = [float(record["wall_time_seconds"]) for record in records]
    memory = [float(record["peak_memory_mib"]) for record in records if record.get("peak_memory_mib") is not None]
    own_seconds = time.time() - psutil.Process().create_time()
    return sum(seconds) + own_seconds, max([*memory, _own_peak_memory()])


def _own_peak_memory() -> float:
    import resource

    # Kibibytes on Linux, bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def _timing_records(stage: Stage) -> Iterator[dict[str, Any]]:
    for path in sorted((stage.runs_dir / "timing" / stage.profile).glob("*.json")):
        try:
            yield json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise UserError(f"{path} is cut off or damaged ({error}): delete it and run its stage again") from None


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("torch", "numpy", "reprise"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@lru_cache(maxsize=1024)
def _meaning(code: str) -> str:
    """What Python code says, as text. A file is asked about once a profile, and copied papers share most of theirs."""
    return _canonical(ast.parse(code))


def _canonical(node: Any) -> str:
    """A syntax tree as text that is the same on every Python version: empty fields and docstrings are left out."""
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = []
    # Leaves are written here instead of in a call of their own: there are a hundred thousand in a few papers.
    for name in node._fields:
        value = getattr(node, name, None)
        if isinstance(value, ast.AST):
            fields.append(f"{name}={_canonical(value)}")
        elif isinstance(value, list):
            items = value[1:] if name == "body" and _has_docstring(node) else value
            if value:
                fields.append(f"{name}=[{','.join([_canonical(item) for item in items])}]")
        elif value is not None:
            fields.append(f"{name}={value!r}")
    return f"{type(node).__name__}({','.join(fields)})"


def _has_docstring(node: ast.AST) -> bool:
    if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return False
    first = node.body[0] if node.body else None
    return isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
