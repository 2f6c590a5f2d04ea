"""What runs write to the spool."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from shared.tracking import open_run, start_run, sync
from shared.tracking import spool as records
from shared.tracking.run import standalone_markdown
from shared.tracking.system import SystemMonitor


def events(spool: Path) -> list[dict[str, Any]]:
    return [
        event for folder in records.folders(spool) for chunk, _ in records.read_events(folder, 0) for event in chunk
    ]


def test_a_run_records_everything_in_order(spool: Path) -> None:
    with start_run("cape", "train", params={"optimizer": {"name": "adam", "betas": [0.9, 0.99]}}) as run:
        run.log({"train/loss": 0.5}, step=3)
        run.log_params({"seed": 1})
        run.set_tags({"claim": "holds"})
        run.log_dataset("advection", "abc", "generated", "train")
    start, *others = events(spool)
    assert start["experiment"] == "cape"
    assert start["run"] == run.id
    assert start["params"] == {"optimizer.name": "adam", "optimizer.betas": "[0.9, 0.99]"}
    assert [event["event"] for event in others] == ["metrics", "params", "tags", "dataset", "end"]
    assert others[0]["values"] == {"train/loss": 0.5}
    assert others[0]["step"] == 3
    assert others[-1]["status"] == "FINISHED"


@pytest.mark.parametrize(("error", "status"), [(ValueError("no"), "FAILED"), (KeyboardInterrupt(), "KILLED")])
def test_how_a_block_ends_is_the_status(spool: Path, error: BaseException, status: str) -> None:
    def fail() -> None:
        with start_run("cape", "train"):
            raise error

    with pytest.raises(type(error)):
        fail()
    tags, end = events(spool)[-2:]
    assert tags["values"] == {"error": f"{type(error).__name__}: {error}"}
    assert end["status"] == status


def test_a_run_can_be_finished_once(spool: Path) -> None:
    with start_run("cape", "train") as run:
        run.finish("KILLED")
        run.log({"loss": 1.0}, step=0)
    assert [event["event"] for event in events(spool)] == ["start", "end"]
    assert events(spool)[-1]["status"] == "KILLED"


def test_appending_leaves_the_status_alone(spool: Path) -> None:
    with open_run("0123") as run:
        run.set_tags({"claim": "holds"})
    assert run.id == "0123"
    assert events(spool)[-1]["status"] is None


def test_numbers_that_are_not_finite_are_kept(spool: Path) -> None:
    with start_run("cape", "train") as run:
        run.log({"a": math.nan, "b": math.inf}, step=0)
    values = events(spool)[1]["values"]
    assert math.isnan(values["a"])
    assert values["b"] == math.inf


def test_threads_do_not_tear_each_others_lines(spool: Path) -> None:
    with start_run("cape", "train") as run:
        threads = [
            threading.Thread(target=lambda: [run.log({"x" * 200: 1.0}, step=step) for step in range(200)])
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sum(event["event"] == "metrics" for event in events(spool)) == 800


def test_metrics_are_written_without_being_asked_for(spool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "FLUSH_SECONDS", 0.01)
    run = start_run("cape", "train")
    run.log({"loss": 1.0}, step=0)
    deadline = time.monotonic() + 30
    while len(events(spool)) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert events(spool)[1]["values"] == {"loss": 1.0}
    run.finish()


def test_a_process_that_forgets_to_finish_keeps_its_metrics(spool: Path) -> None:
    code = "from shared.tracking import start_run; start_run('cape', 'train').log({'loss': 1.0}, step=0)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert [event["event"] for event in events(spool)] == ["start", "metrics"]


def test_an_artifact_is_kept_as_it_was(spool: Path, tmp_path: Path) -> None:
    figure = tmp_path / "loss.png"
    figure.write_bytes(b"before")
    with start_run("cape", "train") as run:
        run.log_artifact(figure, "figures")
        figure.write_bytes(b"after")
        run.log_artifact(figure, "figures")
    kept = [records.folders(spool)[0] / event["place"] for event in events(spool) if event["event"] == "artifact"]
    assert [path.read_bytes() for path in kept] == [b"before", b"after"]


def test_a_missing_artifact_costs_a_warning(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    with start_run("cape", "train") as run:
        run.log_artifact(tmp_path / "none.png")
    assert "none.png" in caplog.text


def test_an_unwritable_spool_costs_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("REPRISE_SPOOL", str(tmp_path / "file"))
    with start_run("cape", "train") as run:
        run.log({"loss": 1.0}, step=0)
        run.log_artifact(tmp_path / "file")
    assert "not recorded" in caplog.text


def test_a_torn_or_spoilt_line_is_left_out(spool: Path) -> None:
    with start_run("cape", "train") as run:
        run.log({"loss": 1.0}, step=0)
    folder = records.folders(spool)[0]
    whole = (folder / records.EVENTS).read_bytes()
    (folder / records.EVENTS).write_bytes(whole + b"\x00\xff\n" + b'{"event": "metr')
    chunks = list(records.read_events(folder, 0))
    assert [event["event"] for event in chunks[0][0]] == ["start", "metrics", "end"]
    assert chunks[0][1] == len(whole) + 3


def test_reading_goes_on_where_it_stopped(spool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "CHUNK_BYTES", 300)
    with start_run("cape", "train") as run:
        for step in range(20):
            run.log({"loss": 1.0}, step=step)
    folder = records.folders(spool)[0]
    chunks = list(records.read_events(folder, 0))
    assert len(chunks) > 3
    rest = [event for chunk, _ in records.read_events(folder, chunks[1][1]) for event in chunk]
    assert rest == [event for chunk, _ in chunks[2:] for event in chunk]


def test_a_writer_lives_until_it_ends(spool: Path) -> None:
    run = start_run("cape", "train")
    folder = records.folders(spool)[0]
    assert records.writer_lives(folder)
    run.finish()
    assert not records.writer_lives(folder)


@pytest.mark.parametrize(("variable", "value"), [("REPRISE_TRACKING", "off"), ("RANK", "1")])
def test_off_records_nothing(
    variable: str, value: str, spool: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Switched off, or in a distributed run's processes other than the first."""
    monkeypatch.setenv(variable, value)
    with start_run("cape", "train", system_metrics=True) as run, open_run(run.id) as again:
        run.log({"loss": 1.0}, step=0)
        run.log_artifact(tmp_path / "none.png")
        again.set_tags({"a": "b"})
    assert not spool.exists()
    assert sync().delivered == 0


def test_the_load_is_reported_under_mlflows_names() -> None:
    reports: list[dict[str, float]] = []
    monitor = SystemMonitor(lambda values, step: reports.append(dict(values)), interval=60.0)
    monitor.stop()
    assert len(reports) == 1
    assert reports[0]["system/process_memory_megabytes"] > 1
    assert 0 <= reports[0]["system/cpu_utilization_percentage"] <= 100


def test_credentials_are_not_written_down(spool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@mlflow.example.org/path")
    start_run("cape", "train").finish()
    assert events(spool)[0]["uri"] == "https://mlflow.example.org/path"
    assert "secret" not in json.dumps(events(spool))


def test_a_relative_database_counts_from_the_repository(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "papers" / "cape").mkdir(parents=True)
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.chdir(tmp_path / "papers" / "cape")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///team.db")
    assert records.tracking_uri() == f"sqlite:///{tmp_path}/team.db"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert records.tracking_uri() == f"sqlite:///{tmp_path}/mlflow.db"


def test_a_readme_loses_what_works_only_beside_its_files() -> None:
    readme = "# T\n\n![figure](a.png)\n\n<!-- results -->See [data](data.py), [paper](https://arxiv.org/abs/1).\n"
    assert standalone_markdown(readme) == "# T\n\nSee data, [paper](https://arxiv.org/abs/1)."


def test_training_code_does_not_load_mlflow() -> None:
    code = "import sys, shared.tracking; sys.exit(any(name in sys.modules for name in ('mlflow', 'torch', 'pandas')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
