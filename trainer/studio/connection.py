"""Connections to the database, whose errors of disk and locks are told as `DiskProblem`."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any, Self

from trainer.disk import DiskProblem, problem_of

BUSY_SECONDS = 10.0  # so long a lock of another program is waited for


class Connection(sqlite3.Connection):
    """Autocommit; rows by name. `execute` raises DiskProblem where the disk is full, or the database is in use."""

    folder: Path

    @classmethod
    def open(cls, path: Path) -> Self:
        db = sqlite3.connect(path, isolation_level=None, timeout=BUSY_SECONDS, factory=cls)
        db.folder = path.parent
        db.row_factory = sqlite3.Row
        # WAL of SQLite 3.7.0 to 3.51.2 can corrupt the file when two connections race (sqlite.org/wal.html).
        safe_wal = sqlite3.sqlite_version_info >= (3, 51, 3)
        db.execute(f"PRAGMA journal_mode={'WAL' if safe_wal else 'DELETE'}")
        db.execute(f"PRAGMA synchronous={'FULL' if safe_wal else 'EXTRA'}")
        db.execute("PRAGMA foreign_keys=ON")
        db.execute("PRAGMA trusted_schema=OFF")
        return db

    def execute(self, *arguments: Any) -> sqlite3.Cursor:
        try:
            return super().execute(*arguments)
        except sqlite3.OperationalError as error:
            if problem := problem_of(error, self.folder):
                raise problem from error
            raise


def identity(path: Path) -> tuple[int, int] | None:
    """Which file lies at a path (device, inode); None where none can be found there."""
    try:
        found = path.stat()
    except OSError:  # it is gone, or the disk with it
        return None
    return found.st_dev, found.st_ino


def missing(outputs: Path, files: dict[Path, tuple[int, int] | None]) -> DiskProblem | None:
    """What of the outputs folder was removed, or replaced, while the app runs. files: as they were at the start."""
    for path, at_start in files.items():
        there = identity(path)
        if there == at_start:
            continue
        if there:
            what = f"the file {path.name} in {outputs} was replaced by another one"
        else:
            what = f"the folder {outputs} is gone" if not outputs.exists() else f"{path.name} is gone from {outputs}"
        remedy = "Nothing is kept there now: stop Tunebooth, put the folder back as it was, and start it again"
        return DiskProblem(f"{what} while the app was running", outputs, remedy=remedy)
    return None
