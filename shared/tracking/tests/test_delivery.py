"""Records on their way to MLflow: what arrives, what waits, and what a bad store costs."""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run, ViewType
from mlflow.exceptions import MlflowException

from shared.tracking import deliver, experiment_links, open_run, start_run, sync
from shared.tracking import spool as records
from shared.tracking.store import Delivery


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store whose tables are made once."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"
    MlflowClient(uri).search_experiments()
    return uri


@pytest.fixture
def client(database: str, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    """The store in force; tests tell their runs apart by their experiments."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    return MlflowClient(database)


@pytest.fixture
def delivery(spool: Path, client: MlflowClient) -> Delivery:
    """A delivery in this process, which starts faster than one in its own."""
    return Delivery(spool, client.tracking_uri)


@pytest.fixture
def hanging_server() -> Iterator[str]:
    """A server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def runs_of(client: MlflowClient, experiment: str) -> dict[str, Run]:
    found = client.get_experiment_by_name(experiment)
    if found is None:
        return {}
    runs = client.search_runs([found.experiment_id], run_view_type=ViewType.ALL)
    assert len({run.info.run_name for run in runs}) == len(runs), "a run was created twice"
    return {run.info.run_name: run for run in runs}


def test_everything_arrives(client: MlflowClient, spool: Path, tmp_path: Path) -> None:
    table = tmp_path / "scores.csv"
    table.write_text("model,value\nfno,1\n")
    with deliver():
        with start_run("whole", "stage", params={"profile": "small"}, experiment_description="# Read me") as stage:
            stage.log_table(table)
            with start_run("whole", "seed 0", parent=stage.id, description="A *seed*.", tags={"model": "fno"}) as run:
                for step in range(1500):
                    run.log({"train/loss": 1 / (step + 1)}, step)
                run.log({"bad name!": math.nan}, 0)
                run.log_params({f"p{i}": "x" * 9000 for i in range(120)})
                run.log_dataset("advection", "d" * 64, "https://example.org/data", "train")
                run.log_artifact(table, "figures")
        with open_run(stage.id) as again:
            again.set_tags({"claim C1": "holds"})
    assert not records.folders(spool)

    runs = runs_of(client, "whole")
    parent, child = runs["stage"], runs["seed 0"]
    experiment = client.get_experiment_by_name("whole")
    assert experiment.tags["mlflow.note.content"] == "# Read me"
    assert parent.info.status == child.info.status == "FINISHED"
    assert parent.data.params == {"profile": "small"}
    assert parent.data.tags["claim C1"] == "holds"
    assert [artifact.path for artifact in client.list_artifacts(parent.info.run_id)] == ["scores.csv"]
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert child.data.tags["mlflow.note.content"] == "A *seed*."
    assert child.data.tags["model"] == "fno"
    assert len(child.data.params) == 120
    losses = client.get_metric_history(child.info.run_id, "train/loss")
    assert [metric.step for metric in losses] == list(range(1500))
    assert losses[3].value == 0.25
    assert math.isnan(child.data.metrics["bad name_"])
    assert [used.dataset.name for used in child.inputs.dataset_inputs] == ["advection"]
    assert [artifact.path for artifact in client.list_artifacts(child.info.run_id, "figures")] == ["figures/scores.csv"]

    links = experiment_links("http://127.0.0.1:5000/")["whole"]
    assert links["runs"].startswith(f"http://127.0.0.1:5000/#/experiments/{experiment.experiment_id}/runs?")
    assert links["charts"] != links["runs"]


def test_a_run_is_followed_while_it_goes_on(client: MlflowClient, delivery: Delivery, spool: Path) -> None:
    with start_run("live", "run") as run:
        assert delivery.round()
        assert runs_of(client, "live")["run"].info.status == "RUNNING"
        assert records.pending(spool) == []
        run.log({"loss": 0.5}, 1)
        run.set_tags({"written": "at once, and what was logged before it"})
        assert len(records.pending(spool)) == 1
        assert delivery.round()
        assert runs_of(client, "live")["run"].data.metrics == {"loss": 0.5}
    assert delivery.round()
    assert runs_of(client, "live")["run"].info.status == "FINISHED"
    assert records.folders(spool) == []


def test_a_killed_writer_loses_no_more_than_its_last_second(client: MlflowClient, spool: Path) -> None:
    code = (
        "import os, signal, time\n"
        "from shared.tracking import spool, start_run\n"
        "spool.FLUSH_SECONDS = 0.01\n"
        "run = start_run('killed', 'run')\n"
        "for step in range(100): run.log({'loss': 1.0 * step}, step)\n"
        "time.sleep(0.5)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    with open(records.folders(spool)[0] / records.EVENTS, "ab") as file:
        file.write(b'{"event": "metrics", "val')
    report = sync()
    assert (report.delivered, report.pending, report.error) == (1, 0, None)
    run = runs_of(client, "killed")["run"]
    assert run.info.status == "KILLED"
    assert len(client.get_metric_history(run.info.run_id, "loss")) == 100


def test_a_killed_stage_is_delivered_by_the_process_it_leaves(client: MlflowClient, spool: Path) -> None:
    code = (
        "import os, signal\n"
        "from shared.tracking import deliver, start_run\n"
        "with deliver(), start_run('left', 'run') as run:\n"
        "    run.set_tags({'last': 'words'})\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    deadline = time.monotonic() + 60
    while records.folders(spool) and time.monotonic() < deadline:
        time.sleep(0.05)
    run = runs_of(client, "left")["run"]
    assert run.data.tags["last"] == "words"
    assert run.info.status == "KILLED"


@pytest.mark.parametrize("interruption", ["log_batch", "set_terminated"])
def test_an_interrupted_delivery_repeats_nothing(
    interruption: str, client: MlflowClient, delivery: Delivery, spool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = f"interrupted {interruption}"
    with start_run(experiment, "run", params={"a": 1}) as run:
        run.log({"loss": 1.0}, 0)
    original = getattr(MlflowClient, interruption)

    def fail(*arguments: object, **keywords: object) -> None:
        original(*arguments, **keywords)
        raise MlflowException("the connection broke after the store had done its part")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, interruption, fail)
        assert not delivery.round()
    assert "connection broke" in delivery.error
    assert Delivery(spool, client.tracking_uri).round()
    run_id = runs_of(client, experiment)["run"].info.run_id
    assert len(client.get_metric_history(run_id, "loss")) == 1


def test_what_the_store_refuses_does_not_hold_up_the_rest(client: MlflowClient, delivery: Delivery) -> None:
    with start_run("refused", "run", params={"seed": 1}) as run:
        run.log_params({"seed": 2})
    with open_run(run.id) as again:
        again.log_params({"seed": 3, "other": 4})
    with open_run("unknown") as nobody:
        nobody.set_tags({"a": "b"})
    assert delivery.round()
    assert runs_of(client, "refused")["run"].data.params == {"seed": "1", "other": "4"}
    assert len(delivery.refused) == 2
    assert "unknown" in delivery.refused[1]


def test_a_deleted_experiment_is_restored(client: MlflowClient, delivery: Delivery) -> None:
    experiment = client.create_experiment("deleted")
    client.delete_experiment(experiment)
    start_run("deleted", "run").finish()
    assert delivery.round()
    assert "run" in runs_of(client, "deleted")


def test_two_deliveries_share_the_work(client: MlflowClient, spool: Path) -> None:
    with deliver(), deliver(), start_run("shared", "stage") as stage:
        for seed in range(5):
            with start_run("shared", f"seed {seed}", parent=stage.id) as run:
                run.log({"loss": 1.0}, 0)
    runs = runs_of(client, "shared")
    assert len(runs) == 6
    assert {run.data.tags.get("mlflow.parentRunId") for name, run in runs.items() if name != "stage"} == {
        runs["stage"].info.run_id
    }
    assert records.folders(spool) == []


def test_a_run_under_delivery_elsewhere_waits(delivery: Delivery, spool: Path) -> None:
    start_run("locked", "run").finish()
    with records.locked(records.folders(spool)[0]) as held:
        assert held
        assert not delivery.round()
    assert delivery.error is None
    assert delivery.round()


def test_a_child_waits_for_its_parent(client: MlflowClient, delivery: Delivery, spool: Path) -> None:
    with start_run("family", "parent") as parent:
        start_run("family", "child", parent=parent.id).finish()
        with records.locked(records.folders(spool)[0]):
            assert not delivery.round()
        assert runs_of(client, "family") == {}
        assert delivery.round()
    runs = runs_of(client, "family")
    assert runs["child"].data.tags["mlflow.parentRunId"] == runs["parent"].info.run_id


def test_a_file_that_a_crash_emptied_is_removed(delivery: Delivery, spool: Path) -> None:
    start_run("emptied", "run").finish()
    (records.folders(spool)[0] / records.EVENTS).write_bytes(b"")
    assert delivery.round()
    assert records.folders(spool) == []


def test_a_dead_server_costs_a_warning_and_sync_delivers_later(
    client: MlflowClient, spool: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        dead = f"http://me:secret@127.0.0.1:{server.getsockname()[1]}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", dead)
    with deliver(), start_run("dead", "run") as run:
        run.log({"loss": 1.0}, 0)
    assert "1 run(s) not delivered" in caplog.text
    assert "connection refused" in caplog.text
    assert "reprise track sync" in caplog.text
    assert "secret" not in caplog.text
    assert len(records.pending(spool)) == 1

    monkeypatch.setenv("MLFLOW_TRACKING_URI", client.tracking_uri)
    assert Delivery(spool, client.tracking_uri).round()
    assert runs_of(client, "dead") == {}, "a run goes to another store only by an explicit sync"
    assert sync().delivered == 1
    assert runs_of(client, "dead")["run"].data.metrics == {"loss": 1.0}


def test_a_hanging_server_costs_a_warning(
    hanging_server: str,
    client: MlflowClient,
    spool: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", hanging_server)
    with deliver(timeout=0.5), start_run("hanging", "run") as run:
        run.log({"loss": 1.0}, 0)
    assert "no answer within 0.5 s" in caplog.text
    assert hanging_server in caplog.text
    assert len(records.pending(spool)) == 1

    delivery = Delivery(spool, client.tracking_uri, everything=True)
    assert delivery.round()
    assert "run" in runs_of(client, "hanging")


def test_sync_says_why_nothing_went(spool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.getsockname()[1]}")
    start_run("nowhere", "run").finish()
    report = sync(timeout=2.0)
    assert (report.delivered, report.pending) == (0, 1)
    assert report.error == "connection refused"


def test_links_need_no_database(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/none.db")
    assert experiment_links() == {}
    assert os.listdir(tmp_path) == []
