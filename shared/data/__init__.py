"""Real data: where it lies, how it gets there, and whether it is still what it was."""

from __future__ import annotations

from shared.data.fetch import (
    DataFile,
    DataSource,
    FileStatus,
    data_folder,
    dataset_digest,
    fetch,
    file_digest,
    listing,
    locate,
    print_statuses,
    verify,
)

__all__ = [
    "DataFile",
    "DataSource",
    "FileStatus",
    "data_folder",
    "dataset_digest",
    "fetch",
    "file_digest",
    "listing",
    "locate",
    "print_statuses",
    "verify",
]
