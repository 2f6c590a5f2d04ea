"""Experiment tracking with MLflow that never makes a training run wait.

Runs write what they record to files (`spool`); a process beside the stage sends it to the MLflow store (`delivery`,
`store`). A store that is slow, hanging or down therefore costs a warning, and the records are sent later.

    with deliver():
        with start_run("cape", "train", params=params) as stage_run:
            with start_run("cape", "fno, seed 0", parent=stage_run.id, system_metrics=True) as run:
                run.log({"train/loss": loss}, step=step)

Environment: `MLFLOW_TRACKING_URI` names the store (default: `mlflow.db` in the repository), `REPRISE_SPOOL` the folder
of the files (default: `.reprise/tracking` in the repository), and `REPRISE_TRACKING=off` switches all of this off.
"""

from shared.tracking.delivery import SyncReport, deliver, sync
from shared.tracking.links import experiment_links
from shared.tracking.run import Run, open_run, start_run
from shared.tracking.spool import tracking_uri

__all__ = ["Run", "SyncReport", "deliver", "experiment_links", "open_run", "start_run", "sync", "tracking_uri"]
