"""Addresses of MLflow's pages that show a trainer something."""

from __future__ import annotations

import os

from shared.tracking.spool import database_path, tracking_uri

# Sorted by time, MLflow hides nested runs, and with them their curves; sorted by any other column it shows all runs,
# those of one user newest first.
FLAT = "orderByKey=tags.%60mlflow.user%60&orderByAsc=true"


def experiment_links(base_url: str = "http://127.0.0.1:5000") -> dict[str, dict[str, str]]:
    """For every experiment of the store in force, by name: the addresses of its table of `runs` and of its `charts`.

    The table shows the runs of stages, which unfold into those of models and seeds; the charts show all of them.
    `base_url` is where that store's pages are served. Without them MLflow opens on a page about language models.
    """
    uri = tracking_uri()
    database = database_path(uri)
    if database is not None and not database.exists():
        return {}
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    links = {}
    for experiment in sorted(MlflowClient(uri).search_experiments(), key=lambda experiment: experiment.name):
        if experiment.experiment_id != "0":  # the empty one that MLflow makes
            runs = f"{base_url.rstrip('/')}/#/experiments/{experiment.experiment_id}/runs?workflowType=machine_learning"
            links[experiment.name] = {"runs": runs, "charts": f"{runs}&compareRunsMode=CHART&{FLAT}"}
    return links
