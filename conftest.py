"""Set up what every test relies on: one thread, no tracking server, no network."""

from __future__ import annotations

import os
from pathlib import Path

# Before torch is imported anywhere: tests run side by side, and threads that compete ruin them all.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DVC_NO_ANALYTICS", "true")
# Here and not in a fixture: those of a module or session run before any of a test.
os.environ["REPRISE_TRACKING"] = "off"

import pytest


@pytest.fixture(autouse=True)
def _isolated_tracking(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that track on purpose never touch the repository's own store."""
    monkeypatch.setenv("REPRISE_SPOOL", str(tmp_path_factory.mktemp("spool")))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return Path(__file__).parent
