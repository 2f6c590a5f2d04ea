"""Sends what waits in the spool to an MLflow store: the process that `delivery` starts beside a stage.

`python -m shared.tracking.store SPOOL [--everything]`, the store being `$MLFLOW_TRACKING_URI`. It delivers in rounds
until a byte or the end of its standard input tells it to stop, then once more. On standard output it says `ready` when
MLflow is loaded, `progress` whenever something was delivered after it was told to stop, and at last one JSON object
with the `error` that kept it from delivering, if any, and the records that the store `refused`.

Everything may be sent twice without harm: a run is looked up by its tag `reprise.run_id` before it is created, and
MLflow takes a metric of the same step, time and value once.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import posixpath
import re
import select
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, Experiment, InputTag, Metric, Param, RunTag, ViewType
from mlflow.exceptions import MlflowException
from mlflow.utils.validation import (
    MAX_DATASET_DIGEST_SIZE,
    MAX_ENTITY_KEY_LENGTH,
    MAX_EXPERIMENT_TAG_VAL_LENGTH,
    MAX_METRICS_PER_BATCH,
    MAX_PARAMS_TAGS_PER_BATCH,
    MAX_TAG_VAL_LENGTH,
)
from sqlalchemy.exc import SQLAlchemyError

from shared.tracking import spool
from shared.tracking.spool import Event, Progress

ROUND_SECONDS = 2.0
LONGEST_PAUSE_SECONDS = 30.0
# A store that has never answered is given little time, one that has may be busy.
FIRST_REQUEST_SECONDS, REQUEST_SECONDS = 3, 30
REFUSALS = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE"}
RUN_ID_TAG = "reprise.run_id"


class Delivery:
    """Delivers from the spool at `root` to the store at `uri`.

    Takes the runs that were meant for that store when they started, or with `everything` all that wait.
    """

    def __init__(self, root: Path, uri: str, *, everything: bool = False) -> None:
        self.error: str | None = None
        self.refused: list[str] = []
        self.on_progress: Callable[[], None] = lambda: None
        self._root = root
        self._uri = uri
        self._public_uri = spool.public_uri(uri)
        self._everything = everything
        self._client: MlflowClient | None = None
        self._experiments: dict[str, str] = {}
        self._runs: dict[str, str] = {}

    def round(self) -> bool:
        """Deliver what there is; False if some of it has to wait, be it that the store failed and `error` says how."""
        self.error = None
        done = True
        for folder in spool.folders(self._root):
            try:
                with spool.locked(folder) as held:
                    done &= held and self._deliver(folder)
            except (MlflowException, SQLAlchemyError, OSError) as error:
                self.error = _in_short(error)
                return False
        return done

    @property
    def client(self) -> MlflowClient:
        """The client, connected when there is something to send."""
        if self._client is None:
            os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(FIRST_REQUEST_SECONDS)
            client = MlflowClient(self._uri)
            client.search_experiments(max_results=1)
            os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(REQUEST_SECONDS)
            self._client = client
        return self._client

    def _deliver(self, folder: Path) -> bool:
        """Send what is new in a folder; False if its run has to wait for another one."""
        # Asked before reading: a writer that ends in between has its last events read in the next round.
        writer_lives = spool.writer_lives(folder)
        first = spool.first_event(folder)
        if first is None:
            if not writer_lives:
                shutil.rmtree(folder)
            return True
        if first["uri"] != self._public_uri and not self._everything:
            return True
        progress = spool.read_progress(folder)
        if progress is None or progress.uri != self._public_uri:
            progress = Progress(self._public_uri)
        run_id = progress.run_id
        if run_id is None:
            if self._waits_in_spool(first["run"] if first["event"] == "open" else first["parent"], folder):
                return False
            run_id = self._find_run(first["run"]) if first["event"] == "open" else self._create_run(first)
            if run_id is None:
                self.refused.append(f"what was appended to run {first['run']}, which the store does not have")
                shutil.rmtree(folder)
                return True
        ended = False
        for events, offset in spool.read_events(folder, progress.offset):
            self._send(run_id, folder, events)
            ended = ended or any(event["event"] == "end" for event in events)
            if not ended:
                spool.write_progress(folder, Progress(self._public_uri, run_id, offset))
            self.on_progress()
        if not ended and not writer_lives:
            if first["event"] == "start":
                last_sign_of_life = int((folder / spool.EVENTS).stat().st_mtime * 1000)
                self.client.set_terminated(run_id, "KILLED", last_sign_of_life)
            ended = True
        if ended:
            shutil.rmtree(folder)
        return True

    def _waits_in_spool(self, local_id: str | None, folder: Path) -> bool:
        """Whether the start of a run that this folder needs is itself still to be delivered."""
        if local_id is None or local_id in self._runs:
            return False
        for other in spool.folders(self._root):
            try:
                first = spool.first_event(other)
                progress = spool.read_progress(other)
            except FileNotFoundError:  # another delivery has just finished it
                continue
            if other != folder and first is not None and (first["event"], first["run"]) == ("start", local_id):
                if first["uri"] != self._public_uri and not self._everything:
                    return False
                return progress is None or progress.uri != self._public_uri
        return False

    def _find_run(self, local_id: str, experiment_id: str | None = None) -> str | None:
        """The store's id of a run, looked for in one experiment or in all."""
        if local_id not in self._runs:
            if experiment_id is not None:
                experiment_ids = [experiment_id]
            else:
                experiment_ids = [experiment.experiment_id for experiment in self.client.search_experiments()]
            condition = f"tags.`{RUN_ID_TAG}` = '{local_id}'"
            found = self.client.search_runs(experiment_ids, condition, ViewType.ALL, max_results=1)
            if not found:
                return None
            self._runs[local_id] = found[0].info.run_id
        return self._runs[local_id]

    def _create_run(self, start: Event) -> str:
        """The store's id of a run, created unless an interrupted delivery has done so."""
        experiment_id = self._experiment(start["experiment"], start["experiment_description"])
        run_id = self._find_run(start["run"], experiment_id)
        if run_id is None:
            tags = start["tags"] | {RUN_ID_TAG: start["run"]}
            if start["parent"] is not None and (parent_id := self._find_run(start["parent"])) is not None:
                tags["mlflow.parentRunId"] = parent_id
            tags = {_valid_name(key): value[:MAX_TAG_VAL_LENGTH] for key, value in tags.items()}
            run = self.client.create_run(experiment_id, start["time"], tags, start["name"])
            run_id = self._runs[start["run"]] = run.info.run_id
        return run_id

    def _experiment(self, name: str, description: str) -> str:
        """The id of an experiment, which is created, or restored if somebody deleted it, and described."""
        known = name in self._experiments
        if known and not description:
            return self._experiments[name]
        experiment = self.client.get_experiment_by_name(name) or self._create_experiment(name)
        if experiment.lifecycle_stage == "deleted":
            self.client.restore_experiment(experiment.experiment_id)
        # By this tag MLflow's pages treat the experiment as model training, not as an application of language models.
        wanted = {"mlflow.experimentKind": "custom_model_development"}
        if description:
            wanted["mlflow.note.content"] = description[:MAX_EXPERIMENT_TAG_VAL_LENGTH]
        for key, value in wanted.items():
            if experiment.tags.get(key) != value:
                self.client.set_experiment_tag(experiment.experiment_id, key, value)
        self._experiments[name] = experiment.experiment_id
        return experiment.experiment_id

    def _create_experiment(self, name: str) -> Experiment:
        database = spool.database_path(self._uri)
        # Beside a local database lie its artifacts; a server decides about its own.
        place = (database.resolve().parent / "mlartifacts" / name).as_uri() if database else None
        try:
            self.client.create_experiment(name, place)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # by another delivery at the same moment
                raise
        return self.client.get_experiment_by_name(name)

    def _send(self, run_id: str, folder: Path, events: Sequence[Event]) -> None:
        """Send a chunk of events, numbers and texts in batches."""
        metrics: list[Metric] = []
        params: dict[str, str] = {}
        tags: dict[str, str] = {}
        others: list[Callable[[], Any]] = []
        for event in events:
            match event["event"]:
                case "start":
                    params |= event["params"]
                case "params":
                    params = event["values"] | params
                case "tags":
                    tags |= event["values"]
                case "metrics":
                    metrics += [
                        Metric(_valid_name(name), value, event["time"], event["step"])
                        for name, value in event["values"].items()
                    ]
                case "artifact":
                    others.append(lambda e=event: self._send_artifact(run_id, folder / e["place"], e["folder"]))
                case "dataset":
                    others.append(lambda e=event: self.client.log_inputs(run_id, [_dataset(e)]))
                case "end" if event["status"] is not None:
                    others.append(lambda e=event: self.client.set_terminated(run_id, e["status"], e["time"]))
        self._send_batches(run_id, "params", [Param(_valid_name(key), value) for key, value in params.items()])
        self._send_batches(run_id, "tags", [RunTag(_valid_name(key), value) for key, value in tags.items()])
        self._send_batches(run_id, "metrics", metrics)
        for call in others:
            self._unless_refused(call)

    def _send_batches(self, run_id: str, kind: str, items: Sequence[Any]) -> None:
        size = MAX_METRICS_PER_BATCH if kind == "metrics" else MAX_PARAMS_TAGS_PER_BATCH
        for start in range(0, len(items), size):
            batch = items[start : start + size]
            try:
                self.client.log_batch(run_id, **{kind: batch})
            except MlflowException as error:
                if error.error_code not in REFUSALS:
                    raise
                # One bad entry makes MLflow refuse the batch; the others should arrive.
                for item in batch:
                    self._unless_refused(lambda item=item: self.client.log_batch(run_id, **{kind: [item]}))

    def _send_artifact(self, run_id: str, path: Path, folder: str) -> None:
        if path.exists():
            self.client.log_artifact(run_id, str(path), folder or None)
        else:
            self.refused.append(f"artifact {path.name}, whose copy is gone")

    def _unless_refused(self, call: Callable[[], Any]) -> None:
        """Call the store; a record that it will never take is noted and dropped, any other failure is raised."""
        try:
            call()
        except MlflowException as error:
            if error.error_code not in REFUSALS:
                raise
            self.refused.append(_in_short(error))


def _dataset(event: Event) -> DatasetInput:
    source = event["source"]
    kind, value = ("http", {"url": source}) if re.match(r"https?://", source) else ("local", {"uri": source})
    dataset = Dataset(event["name"], event["digest"][:MAX_DATASET_DIGEST_SIZE], kind, json.dumps(value))
    return DatasetInput(dataset, [InputTag("mlflow.data.context", event["context"])])


def _valid_name(name: str) -> str:
    """A name that MLflow takes: its characters only, shaped like a relative path, not too long."""
    return posixpath.normpath(re.sub(r"[^\w.\-/ :]", "_", name).strip("/"))[:MAX_ENTITY_KEY_LENGTH]


def _in_short(error: Exception) -> str:
    """What failed, in one line."""
    text = " ".join(str(error).split())
    if "Connection refused" in text:
        return "connection refused"
    if "timed out" in text:
        return "no answer in time"
    return text if len(text) <= 200 else f"{text[:200]}…"


def _told_to_stop(seconds: float) -> bool:
    return bool(select.select([sys.stdin], [], [], seconds)[0])


def main(arguments: Iterable[str] | None = None) -> None:
    """Deliver until told to stop."""
    parser = argparse.ArgumentParser(description="Deliver tracking records to the store $MLFLOW_TRACKING_URI.")
    parser.add_argument("spool", type=Path)
    parser.add_argument("--everything", action="store_true", help="also runs that were meant for another store")
    options = parser.parse_args(arguments)
    # MLflow prints for people; what the parent process reads goes through a channel of its own.
    channel = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    logging.disable(logging.WARNING)

    def report(line: str) -> None:
        with suppress(BrokenPipeError):  # the stage was killed; its records are delivered all the same
            os.write(channel, f"{line}\n".encode())

    report("ready")

    uri = os.environ["MLFLOW_TRACKING_URI"]
    delivery = Delivery(options.spool, uri, everything=options.everything)
    pause = 0.0
    while not _told_to_stop(pause):
        delivery.round()
        pause = min(2 * max(pause, ROUND_SECONDS), LONGEST_PAUSE_SECONDS) if delivery.error else ROUND_SECONDS
    delivery.on_progress = lambda: report("progress")
    # A server that has just failed would only keep the stage waiting; a local database may have been busy.
    attempts = 3 if spool.database_path(uri) else int(delivery.error is None)
    while attempts and not delivery.round():
        attempts -= delivery.error is not None
        time.sleep(0.2)
    report(json.dumps({"error": delivery.error, "refused": delivery.refused}))


if __name__ == "__main__":
    # Training comes first.
    os.nice(10)
    main()
