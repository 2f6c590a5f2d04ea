from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from shared.config import Stage, Strict, UserError
from shared.evaluation.scores import (
    code_digest,
    overall,
    params_digest,
    read_scores,
    summarize,
    write_metrics,
    write_scores,
)


def table(*rows: tuple, columns: str = "") -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["model", "dataset", "metric", "seed", "value", *columns.split()])


def test_every_digit_survives_and_rows_have_one_order(tmp_path: Path) -> None:
    values = [0.1 + 0.2, 1e-300, 1 / 3, 123456789.123456789, 5.0]
    frame = table(*[("fno", "advection/seen", "nrmse", seed, value) for seed, value in enumerate(values)])
    write_scores(tmp_path / "a.csv", frame)
    write_scores(tmp_path / "b.csv", frame.sample(frac=1, random_state=0))
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    assert read_scores(tmp_path / "a.csv")["value"].tolist() == values
    write_scores(tmp_path / "c.csv", read_scores(tmp_path / "a.csv"))
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "c.csv").read_bytes()


def test_further_columns_and_values_that_are_not_finite(tmp_path: Path) -> None:
    frame = table(
        ("a", "d", "m", 0, math.nan, None, "x"),
        ("a", "d", "m", 1, math.inf, 10.0, "x"),
        ("a", "d", "m", 1, np.float32(0.5), 9.0, None),
        columns="time split",
    )
    write_scores(tmp_path / "scores.csv", frame)
    back = read_scores(tmp_path / "scores.csv")
    assert back["time"].dtype == float
    # Numbers sort as numbers: 9 before 10.
    assert back["time"].tolist()[1:] == [9.0, 10.0]
    assert math.isnan(back["value"][0])
    assert back["value"].tolist()[1:] == [0.5, math.inf]
    assert back["split"].isna().tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (table(("a", "d", "m", 0, 1.0)).drop(columns="seed"), "lack the column seed"),
        (table(("a", "d", "m", 0, 1.0), ("a", "d", "m", 0, 2.0)), "given twice, the first of them model=a"),
        (table((" ", "d", "m", 0, 1.0)), "blank model"),
        (table(("a", "d", "m", 0.5, 1.0)), "whole numbers"),
        (table(), "not one row"),
    ],
)
def test_refuses_to_write(tmp_path: Path, frame: pd.DataFrame, message: str) -> None:
    with pytest.raises(UserError, match=message):
        write_scores(tmp_path / "scores.csv", frame)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a table of scores"),
        ("model,dataset,metric,seed,value\na,d,m,0,1.5\na,d,m", "cut off"),
        ("model,dataset,metric,seed,value\na,d,m,0,1.5\na,d,m,1,2.", "cut off"),
        ("model,dataset,metric,seed,value\na,d,m,0,high\n", "not a number"),
        ("model,dataset,metric,seed,value\na,d,m,0,\n", "without a value"),
        ("model,dataset,metric,seed,value\na,d,m,0,1,2,3\n", "not a table"),
        ("name,score\nfno,1\n", "lack the columns"),
    ],
)
def test_refuses_to_read(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "scores.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_scores(path)


def test_missing_scores_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="dvc repro"):
        read_scores(tmp_path / "scores.csv")


def test_curves_do_not_count_twice() -> None:
    frame = table(
        ("a", "d", "error", 0, 1.0, None),
        ("a", "d", "error", 0, 5.0, 0.1),
        ("b", "d", "error", 0, 2.0, 0.1),
        ("b", "d", "error", 0, 4.0, 0.2),
        columns="time",
    )
    assert overall(frame)["value"].tolist() == [1.0, 2.0, 4.0]
    assert overall(frame, chosen=("time",))["value"].tolist() == [1.0, 5.0, 2.0, 4.0]
    assert summarize(frame) == {"d": {"error": {"a": 1.0, "b": 3.0}}}


def test_means_are_over_seeds_and_never_hide_a_run_that_diverged() -> None:
    frame = table(
        ("a", "d", "m", 0, 1.0, 0),
        ("a", "d", "m", 0, 1.0, 1),
        ("a", "d", "m", 0, 1.0, 2),
        ("a", "d", "m", 1, 3.0, 0),
        ("b", "d", "m", 0, 3.0, 0),
        ("b", "d", "m", 1, math.nan, 0),
        columns="item",
    )
    assert summarize(frame) == {"d": {"m": {"a": 2.0, "b": None}}}


CODE = '''
"""A module."""
def double(x):  # twice
    """Double it."""
    return f"{x!r}" * 2
'''


def test_code_digest_sees_what_code_does_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(CODE)
    digest = code_digest(tmp_path)
    (tmp_path / "model.py").write_text("def double(\n        x,\n):\n    return f'{x!r}' * 2\n")
    for folder in ("tests", "data", "runs"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "other.py").write_text("x = 1\n")
    assert code_digest(tmp_path) == digest
    (tmp_path / "model.py").write_text(CODE.replace("* 2", "* 3"))
    assert code_digest(tmp_path) != digest
    (tmp_path / "model.py").rename(tmp_path / "modules.py")
    (tmp_path / "modules.py").write_text(CODE)
    assert code_digest(tmp_path) != digest
    (tmp_path / "broken.py").write_text("def (\n")
    with pytest.raises(UserError, match=r"broken\.py is not valid Python \(line 1"):
        code_digest(tmp_path)


def test_code_digest_is_the_same_on_every_python(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x: int = -1.5\n")
    text = (
        "Module(body=[AnnAssign(target=Name(id='x',ctx=Store()),annotation=Name(id='int',ctx=Load()),"
        "value=UnaryOp(op=USub(),operand=Constant(value=1.5)),simple=1)])"
    )
    assert code_digest(tmp_path) == hashlib.sha256(f"a.py\n{text}\n".encode()).hexdigest()


def test_params_digest_ignores_order_only() -> None:
    assert params_digest({"a": 1, "b": {"c": [1, 2]}}) == params_digest({"b": {"c": [1, 2]}, "a": 1})
    assert params_digest({"a": [1, 2]}) != params_digest({"a": [2, 1]})


def test_metrics_say_from_what_scores_came(tmp_path: Path) -> None:
    stage = Stage(tmp_path, "evaluate", "small", Strict())
    (tmp_path / "params.yaml").write_text("profile: small\nsmall: {epochs: 3}\nlong: {epochs: 30}\n")
    (tmp_path / "train.py").write_text("x = 1\n")
    timing = tmp_path / "runs" / "timing" / "small"
    timing.mkdir(parents=True)
    for name, seconds, memory in [("prepare", 1e6, 3e6), ("train", 2e6, None), ("evaluate", 1e9, 1e9)]:
        record = {"stage": name, "model": None, "wall_time_seconds": seconds, "peak_memory_mib": memory}
        (timing / f"{name}.json").write_text(json.dumps(record))
    write_metrics(stage, table(("a", "d", "m", 0, math.inf)), "generated: a test", device="none")

    metrics = json.loads((tmp_path / "results" / "small" / "metrics.json").read_text())
    assert metrics["means"] == {"d": {"m": {"a": None}}}
    assert (metrics["profile"], metrics["data_source"], metrics["device"]) == ("small", "generated: a test", "none")
    assert metrics["digest"] == {"code": code_digest(tmp_path), "params": params_digest({"epochs": 3})}
    assert set(metrics["versions"]) == {"python", "torch", "numpy", "reprise"}
    # The record of an earlier evaluation gives way to this one.
    assert 3e6 < metrics["wall_time_seconds"] < 1e9
    assert metrics["peak_memory_mib"] == 3e6

    (timing / "train.json").write_text('{"stage": "tr')
    with pytest.raises(UserError, match="cut off"):
        write_metrics(stage, table(("a", "d", "m", 0, 1.0)), "generated: a test", device="none")
