"""Connections to the database, one for each thread. Disk errors and lock errors are raised as `DiskProblem`."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self, cast

from trainer.contract.disk import DiskProblem, problem_of
from trainer.studio.migrations import damaged, migrate

BUSY_SECONDS = 10.0  # longest wait for a lock of another program or thread
FileId = tuple[int, int]  # device and inode


class Connection(sqlite3.Connection):
    """Autocommit, rows by name. Statements raise DiskProblem if the disk is full or the database is locked."""

    folder: Path

    @classmethod
    def open(cls, path: Path) -> Self:
        db = sqlite3.connect(path, isolation_level=None, timeout=BUSY_SECONDS, factory=cls)
        db.folder = path.parent
        db.row_factory = sqlite3.Row
        db.text_factory = lambda text: text.decode("utf-8", "replace")  # a damaged database may have other bytes
        # WAL of SQLite 3.7.0 to 3.51.2 can corrupt the file when two connections race (sqlite.org/wal.html).
        safe_wal = sqlite3.sqlite_version_info >= (3, 51, 3)
        db.execute(f"PRAGMA journal_mode={'WAL' if safe_wal else 'DELETE'}")
        db.execute(f"PRAGMA synchronous={'FULL' if safe_wal else 'EXTRA'}")
        db.execute("PRAGMA foreign_keys=ON")
        db.execute("PRAGMA trusted_schema=OFF")
        return db

    def execute(self, sql: str, values: sqlite3._Parameters = (), /) -> sqlite3.Cursor:
        with self._problems():
            return super().execute(sql, values)

    def executemany(self, sql: str, rows: Iterable[sqlite3._Parameters], /) -> sqlite3.Cursor:
        with self._problems():
            return super().executemany(sql, rows)

    @contextmanager
    def _problems(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            if problem := problem_of(error, self.folder):
                raise problem from error
            raise


class Connections:
    """The connections to one database file. It is migrated first."""

    def __init__(self, path: Path, *others: Path) -> None:
        """others: more files that must stay. Raises DiskProblem; RuntimeError for a damaged or newer database."""
        self._path = path
        self._at_start: dict[Path, FileId | None] = {}
        self._local = threading.local()
        self._writing = threading.Lock()  # one writer at a time; a lock is fair, SQLite's busy wait is not
        try:
            migrate(self.own, path)
        except sqlite3.OperationalError as error:
            raise problem_of(error, path.parent) or RuntimeError(f"{path}: {error}") from error
        except sqlite3.DatabaseError as problem:
            raise damaged(path, str(problem)) from problem
        self._at_start = {file: id_of(file) for file in (path, *others)}

    @property
    def own(self) -> Connection:
        """The connection of this thread. Raises DiskProblem if the file is missing.

        SQLite itself would write into the deleted file, or create a new one.
        """
        if problem := self.missing():
            raise problem
        if not hasattr(self._local, "db"):
            self._local.db = Connection.open(self._path)
        return cast(Connection, self._local.db)

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """See `Store.transaction`."""
        db = self.own
        if db.in_transaction:
            yield db
            return
        if not self._writing.acquire(timeout=BUSY_SECONDS):
            raise DiskProblem(f"the database in {self._path.parent} is in use", self._path.parent)
        try:
            db.execute("BEGIN IMMEDIATE")
            yield db
            db.execute("COMMIT")
        finally:
            try:
                if db.in_transaction:
                    db.execute("ROLLBACK")
            finally:
                self._writing.release()

    def missing(self) -> DiskProblem | None:
        """The file that was removed or replaced since the start, if any. Cheap enough for each request."""
        outputs = self._path.parent
        for file, at_start in self._at_start.items():
            there = id_of(file)
            if there == at_start:
                continue
            if there:
                what = f"the file {file.name} in {outputs} was replaced by another one"
            else:
                what = f"{file.name} is gone from {outputs}" if outputs.exists() else f"the folder {outputs} is gone"
            remedy = "Nothing is kept there now: stop Tunebooth, put the folder back as it was, and start it again"
            return DiskProblem(f"{what} while the app was running", outputs, remedy=remedy)
        return None


def id_of(path: Path) -> FileId | None:
    """Device and inode of a file; None if it is missing."""
    try:
        found = path.stat()
    except OSError:  # the file or the disk is missing
        return None
    return found.st_dev, found.st_ino
