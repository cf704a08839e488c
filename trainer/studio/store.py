"""The SQLite database: tunes, prompts and the queue. No other module imports sqlite3; no business rules.

The web side and the worker communicate through it. Each thread has its own connection.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal, TypedDict, Unpack, cast, overload

from trainer.clock import now
from trainer.contract.disk import DiskProblem
from trainer.contract.rows import CallbackRow, ExportRow, PromptRow, TuneRow
from trainer.studio.columns import Row, decode, encode
from trainer.studio.connection import Connections

Table = Literal["tunes", "prompts", "exports"]
RUNNING: dict[Table, str] = {"tunes": "training", "prompts": "rendering", "exports": "exporting"}
PAGE = ("limit", "offset", "before_id", "oldest_first")  # parameters of `Query` that are not columns


class Query(TypedDict, total=False):
    """The parameters of `find`: the page of the result, and values that columns must have (None: any).

    name: one class name, or several of which one must match.
    """

    limit: int
    offset: int
    before_id: int | None
    oldest_first: bool
    tune_id: int | None
    title: str | None
    name: str | Sequence[str] | None
    token: str | None
    branch: str | None
    model_type: str | None
    status: str | None
    format: str | None
    request_key: str | None
    body_digest: str | None


class InUse(Exception):
    """Another process uses this outputs folder."""


@dataclass(frozen=True)
class Job:
    """A job: train a tune, render a prompt, or make an export.

    tune_id: None for a prompt on a base.
    """

    id: int
    tune_id: int | None
    prompt_id: int | None
    attempts: int
    export_id: int | None = None

    @property
    def target(self) -> tuple[Table, int]:
        """The table and the id of the row that the job is for."""
        if self.export_id is not None:
            return "exports", self.export_id
        if self.prompt_id is not None:
            return "prompts", self.prompt_id
        assert self.tune_id is not None, "the table has a check for it"
        return "tunes", self.tune_id


class Store:
    """The database of one outputs folder, held by one process at a time."""

    def __init__(self, outputs: Path) -> None:
        """Open or create `outputs/tunebooth.db`. Raises InUse if another process has it open."""
        self._lock_file = (outputs / ".lock").open("a+")
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock_file.seek(0)
            raise InUse(f"{outputs} is in use by process {self._lock_file.read().strip()}") from None
        self._lock_file.truncate(0)
        with suppress(OSError):  # on a full disk the lock works too; only the process number is missing
            os.write(self._lock_file.fileno(), str(os.getpid()).encode())
        self._connections = Connections(outputs / "tunebooth.db", outputs / ".lock")
        self.changed = threading.Event()  # set when there may be a new job
        self.hold = ""  # why the queue waits; in memory, because the disk may be full
        self.verified: dict[Path, tuple[int, int]] = {}  # model files whose checksum is right: size, mtime

    def close(self) -> None:
        self._lock_file.close()

    @property
    def _db(self) -> sqlite3.Connection:
        return self._connections.own

    def missing(self) -> DiskProblem | None:
        """The file of the outputs folder that was removed or replaced while the app runs, if any."""
        return self._connections.missing()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """A transaction; a nested one joins the outer one. Raises DiskProblem."""
        with self._connections.transaction() as db:
            yield db

    def add_tune(self, values: Mapping[str, object]) -> int:
        """Insert a tune and its job, in one transaction; the caller's `transaction()` may add its prompts."""
        with self.transaction() as db:
            tune_id = self._insert("tunes", values)
            db.execute("INSERT INTO jobs (tune_id) VALUES (?)", (tune_id,))
        return tune_id

    def add_ready_tune(self, values: Mapping[str, object], **ended: object) -> int:
        """Insert a tune that needs no training; `ended`: its result. As for other tunes, its callback becomes due."""
        with self.transaction():
            tune_id = self._insert("tunes", values)
            self.update("tunes", tune_id, status="trained", **ended)
        return tune_id

    def add_prompt(self, values: Mapping[str, object]) -> int:
        """Insert a prompt and its job, in one transaction."""
        with self.transaction() as db:
            prompt_id = self._insert("prompts", values)
            db.execute("INSERT INTO jobs (tune_id, prompt_id) VALUES (?, ?)", (values.get("tune_id"), prompt_id))
        return prompt_id

    def add_export(self, tune_id: int, format_: str) -> None:
        """Insert an export and its job, in one transaction."""
        with self.transaction() as db:
            export_id = self._insert("exports", {"tune_id": tune_id, "format": format_})
            db.execute("INSERT INTO jobs (tune_id, export_id) VALUES (?, ?)", (tune_id, export_id))

    def _insert(self, table: Table, values: Mapping[str, object]) -> int:
        created_at = now()
        row = encode({**values, "status": "queued", "created_at": created_at, "updated_at": created_at})
        idempotency_columns = ", ".join("?" * len(row))
        with self.transaction() as db:
            cursor = db.execute(
                f"INSERT INTO {table} ({', '.join(row)}) VALUES ({idempotency_columns})", list(row.values())
            )
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def update(self, table: Table, row_id: int, **values: object) -> None:
        """Change columns of one row, and its `updated_at`."""
        row = encode({**values, "updated_at": now()})
        with self.transaction() as db:
            db.execute(f"UPDATE {table} SET {', '.join(f'{k} = ?' for k in row)} WHERE id = ?", [*row.values(), row_id])

    @overload
    def get(self, table: Literal["tunes"], row_id: int) -> TuneRow | None: ...
    @overload
    def get(self, table: Literal["prompts"], row_id: int) -> PromptRow | None: ...
    @overload
    def get(self, table: Literal["exports"], row_id: int) -> ExportRow | None: ...
    def get(self, table: Table, row_id: int) -> Row | None:
        if not 0 < row_id < 2**63:  # not an integer of SQLite
            return None
        row = self._db.execute(f"SELECT * FROM {table} WHERE id = ?", (row_id,)).fetchone()
        return decode(row) if row else None

    @overload
    def find(self, table: Literal["tunes"], **query: Unpack[Query]) -> list[TuneRow]: ...
    @overload
    def find(self, table: Literal["prompts"], **query: Unpack[Query]) -> list[PromptRow]: ...
    @overload
    def find(self, table: Literal["exports"], **query: Unpack[Query]) -> list[ExportRow]: ...
    def find(self, table: Table, **query: Unpack[Query]) -> Sequence[Row]:
        """Rows whose columns equal the given values (None: any), newest first."""
        limit, offset, before_id = query.get("limit", -1), query.get("offset", 0), query.get("before_id")
        wanted = {key: value for key, value in query.items() if key not in PAGE and value is not None}
        choices = {
            key: [value] if isinstance(value, str | int) else list(cast(Sequence[object], value))
            for key, value in wanted.items()
        }
        conditions = [f"{key} IN ({', '.join('?' * len(values))})" for key, values in choices.items()]
        conditions += ["id < ?"] if before_id is not None else []
        where = f"WHERE {' AND '.join(conditions)}" if conditions else ""
        values = [*chain(*choices.values()), *([before_id] if before_id is not None else []), limit, offset]
        order = "ASC" if query.get("oldest_first") else "DESC"
        rows = self._db.execute(f"SELECT * FROM {table} {where} ORDER BY id {order} LIMIT ? OFFSET ?", values)
        return [decode(row) for row in rows]

    def delete(self, table: Table, row_id: int) -> None:
        """Delete a tune with its prompts, or one prompt; and their jobs and callbacks."""
        with self.transaction() as db:
            db.execute(f"DELETE FROM {table} WHERE id = ?", (row_id,))

    def claim(self) -> Job | None:
        """Mark the oldest job as running and return it; None: the queue is empty.

        The job of a killed process is the oldest one again.
        """
        with self.transaction() as db:
            row = db.execute("SELECT * FROM jobs ORDER BY id LIMIT 1").fetchone()
            if row is None:
                return None
            job = Job(**row)
            db.execute("UPDATE jobs SET attempts = attempts + 1 WHERE id = ?", (job.id,))
            table, row_id = job.target
            db.execute(
                f"UPDATE {table} SET status = ?, started_training_at = COALESCE(started_training_at, ?), updated_at = ?"
                " WHERE id = ?",
                (RUNNING[table], now(), now(), row_id),
            )
        return job

    def made_headway(self, job: Job) -> None:
        """Reset the count of attempts, after a state was saved: a later crash is a new one."""
        with self.transaction() as db:
            db.execute("UPDATE jobs SET attempts = 1 WHERE id = ?", (job.id,))

    def put_back(self, job: Job) -> None:
        """Requeue a job at its old place because the app ends; this does not count as an attempt."""
        table, row_id = job.target
        with self.transaction() as db:
            self.update(table, row_id, status="queued")
            db.execute("UPDATE jobs SET attempts = 0 WHERE id = ?", (job.id,))

    def is_queued(self, job: Job) -> bool:
        """Whether a job is in the queue: it has not ended and was not canceled or deleted."""
        return self._db.execute("SELECT 1 FROM jobs WHERE id = ?", (job.id,)).fetchone() is not None

    def cancel_wanted(self, table: Table, row_id: int) -> bool:
        """Whether the row was canceled or deleted. One indexed read, fast enough for every step."""
        row = self._db.execute(f"SELECT cancel FROM {table} WHERE id = ?", (row_id,)).fetchone()
        return row is None or bool(row[0])

    def finish(self, job: Job, status: str, **values: object) -> None:
        """Record the result of a job and remove it from the queue, in one transaction.

        The prompts of a tune that was not trained end as well.
        """
        table, row_id = job.target
        with self.transaction() as db:
            self.update(table, row_id, status=status, cancel=0, **values)
            db.execute("DELETE FROM jobs WHERE id = ?", (job.id,))
            if table == "tunes" and status != "trained":
                why = str(values.get("error") or f"it is {status}")
                self.end_prompts(row_id, "canceled" if status == "canceled" else "failed", why)

    def end_prompts(self, tune_id: int, status: str, why: str) -> None:
        """End the queued prompts of a tune that was not trained. why: as words after a colon."""
        with self.transaction() as db:
            db.execute("DELETE FROM jobs WHERE tune_id = ? AND prompt_id IS NOT NULL", (tune_id,))
            db.execute(
                "UPDATE prompts SET status = ?, error = ?, updated_at = ? WHERE tune_id = ? AND status = 'queued'",
                (status, f"the tune was not trained: {why}", now(), tune_id),
            )

    def take_off_queue(self, tune_id: int) -> bool:
        """Remove a tune's job before it runs. Returns False if it runs or has ended."""
        with self.transaction() as db:
            queued = db.execute("SELECT 1 FROM tunes WHERE id = ? AND status = 'queued'", (tune_id,)).fetchone()
            if queued:
                db.execute("DELETE FROM jobs WHERE tune_id = ? AND prompt_id IS NULL AND export_id IS NULL", (tune_id,))
                self.update("tunes", tune_id, status="canceled")
                self.end_prompts(tune_id, "canceled", "it is canceled")
            return queued is not None

    def requeue_tune(self, tune_id: int) -> None:
        """Queue a tune that ended without a model, and its prompts, again, at the end of the queue."""
        with self.transaction() as db:
            self.update("tunes", tune_id, status="queued", cancel=0, error=None, progress={}, eta=None)
            db.execute("INSERT INTO jobs (tune_id) VALUES (?)", (tune_id,))
            # All prompts will end again, and this callback will be due again.
            db.execute("DELETE FROM callbacks WHERE tune_id = ? AND kind = 'prompts'", (tune_id,))
            for prompt in self.find("prompts", tune_id=tune_id, oldest_first=True):
                if prompt["status"] in ("failed", "canceled"):
                    self.update("prompts", prompt["id"], status="queued", error=None)
                    db.execute("INSERT INTO jobs (tune_id, prompt_id) VALUES (?, ?)", (tune_id, prompt["id"]))

    def recover(self) -> None:
        """At start: requeue the jobs that a stopped process was running, at their old places."""
        with self.transaction() as db:
            for table, running in RUNNING.items():
                db.execute(f"UPDATE {table} SET status = 'queued' WHERE status = ?", (running,))

    # Callbacks

    def callbacks(self, place_id: int) -> list[CallbackRow]:
        """The callbacks of a tune or base and its prompts, newest first."""
        found = self._db.execute(
            "SELECT * FROM callbacks WHERE tune_id = ?1"
            " OR prompt_id IN (SELECT id FROM prompts WHERE tune_id IS NULL AND base_id = ?1) ORDER BY id DESC",
            (place_id,),
        )
        return [cast(CallbackRow, dict(row)) for row in found]

    def waiting_callbacks(self) -> list[CallbackRow]:
        """The callbacks that are to be posted, now or later; ordered by due_at."""
        found = self._db.execute("SELECT * FROM callbacks WHERE due_at IS NOT NULL ORDER BY due_at, id")
        return [cast(CallbackRow, dict(row)) for row in found]

    def prompts_under(
        self,
        place_id: int | None,
        limit: int = -1,
        offset: int = 0,
        before_id: int | None = None,
        text: str | None = None,
    ) -> list[PromptRow]:
        """The prompts of a tune (and those on bases that name it first), or of a base; newest first.

        place_id None: all prompts. text: must be in the prompt's text, in upper or lower case.
        """
        found = self._db.execute(
            "SELECT * FROM prompts WHERE (?1 IS NULL OR ?1 IN (tune_id, base_id, lora_id))"
            " AND (?2 IS NULL OR id < ?2) AND (?3 IS NULL OR instr(lower(text), lower(?3)))"
            " ORDER BY id DESC LIMIT ?4 OFFSET ?5",
            (place_id, before_id, text, limit, offset),
        )
        return [cast(PromptRow, decode(row)) for row in found]

    def dependents(self, tune_id: int) -> list[TuneRow]:
        """The tunes that have this tune as their base and have not expired, oldest first."""
        found = self._db.execute(
            "SELECT * FROM tunes WHERE base_id = ? AND status != 'expired' ORDER BY id", (tune_id,)
        )
        return [cast(TuneRow, decode(row)) for row in found]

    def queue_length(self) -> int:
        return int(self._db.execute("SELECT COUNT(*) FROM jobs").fetchone()[0])
