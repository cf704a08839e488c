"""Databases of every earlier version are brought up: no row is lost, doubled jobs are removed, a backup is kept."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from trainer.settings import Settings
from trainer.studio.migrations import MIGRATIONS
from trainer.studio.store import Store

TUNE: dict[str, Any] = {
    "title": "Rex", "name": "dog", "branch": "fast", "method": "lora", "base_id": 1, "training_face_correct": 0,
    "auto_extend": 0, "characteristics": {}, "photos": [], "warnings": [], "created_at": "", "updated_at": "",
}  # fmt: skip
PROMPT: dict[str, Any] = {"text": "a dog", "num_images": 1, "warnings": [], "created_at": "", "updated_at": ""}
VERSIONS = range(1, len(MIGRATIONS))


def insert(db: sqlite3.Connection, table: str, **values: Any) -> None:
    row = {key: json.dumps(value) if isinstance(value, dict | list) else value for key, value in values.items()}
    db.execute(f"INSERT INTO {table} ({', '.join(row)}) VALUES ({', '.join('?' * len(row))})", list(row.values()))


def old_database(file: Path, version: int) -> None:
    """Tunes that wait, ended and were deleted, with prompts, doubled jobs, callbacks and exports."""
    with closing(sqlite3.connect(file)) as db:
        for number, script in enumerate(MIGRATIONS[:version], 1):
            db.executescript(f"BEGIN; {script} PRAGMA user_version={number}; COMMIT;")
        for status in ("trained", "queued", "training", "failed"):
            insert(db, "tunes", **TUNE, status=status)
        for tune, status in ((1, "rendered"), (1, "queued"), (2, "queued"), (2, "queued")):
            insert(db, "prompts", **PROMPT, tune_id=tune, status=status)
        doubled = ((2, None), (2, None), (2, None), (2, 3), (2, 3), (3, None), (1, 2), (1, None), (2, 4))
        for tune, prompt in doubled if version < 6 else ((2, None), (2, 3), (3, None), (1, 2), (2, 4)):
            insert(db, "jobs", tune_id=tune, prompt_id=prompt)  # from version 6 on, the schema allows no doubled one
        db.execute("DELETE FROM jobs WHERE prompt_id = 4")
        db.execute("DELETE FROM prompts WHERE id = 4")  # the newest number, which does not come again
        if version >= 2:
            for kind, prompt in (("tune", None), ("prompt", 1)):
                insert(
                    db, "callbacks", tune_id=1, prompt_id=prompt, kind=kind, url="https://example.com", created_at=""
                )
        if version >= 3:
            insert(db, "exports", tune_id=1, format="kohya", status="queued", created_at="", updated_at="")
            insert(db, "jobs", tune_id=1, export_id=1)
            insert(db, "prompts", **PROMPT, tune_id=1, status="rendered", base_id=666678)
        if version >= 6:
            insert(db, "checksums", tune_id=1, path="model/lora.safetensors", sha256="0" * 64)
        db.commit()


def everything(db: sqlite3.Connection, table: str) -> list[dict[str, Any]]:
    db.row_factory = sqlite3.Row
    return [dict(row) for row in db.execute(f"SELECT * FROM {table} ORDER BY id")]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_database_of_an_earlier_version_loses_nothing(settings: Settings, version: int) -> None:
    file = settings.outputs / "tunebooth.db"
    old_database(file, version)
    tables = ["tunes", "prompts", *(["callbacks"] if version >= 2 else []), *(["exports"] if version >= 3 else [])]
    with closing(sqlite3.connect(file)) as db:
        before = {table: everything(db, table) for table in tables}
    store = Store(settings.outputs)
    with store.transaction() as db:
        for table, rows in before.items():
            now = everything(db, table)
            assert [{key: row[key] for key in old if key != "args"} for old, row in zip(rows, now, strict=True)] == [
                {key: value for key, value in row.items() if key != "args"} for row in rows
            ], table
        jobs = [(job["tune_id"], job["prompt_id"], job["export_id"]) for job in everything(db, "jobs")]
    exports = [(1, None, 1)] if version >= 3 else []
    assert jobs == [(2, None, None), (2, 3, None), (3, None, None), (1, 2, None), *exports]
    prompts = 5 if version >= 3 else 4
    assert store.add_prompt({**PROMPT, "tune_id": 1}) == prompts + 1
    with store.transaction() as db:
        assert db.execute("PRAGMA foreign_key_check").fetchall() == []
        assert db.execute("PRAGMA foreign_keys").fetchone()[0] == 1
    with pytest.raises(sqlite3.IntegrityError), store.transaction() as db:
        db.execute("INSERT INTO jobs (tune_id) VALUES (2)")  # it has one
    store.close()


@pytest.mark.parametrize("version", VERSIONS)
def test_a_backup_is_made_before(settings: Settings, version: int) -> None:
    file = settings.outputs / "tunebooth.db"
    old_database(file, version)
    with closing(sqlite3.connect(file)) as db:
        before = list(db.iterdump())
    Store(settings.outputs).close()
    backup = settings.outputs / f"tunebooth.db.version-{version}"
    with closing(sqlite3.connect(backup)) as db:
        assert list(db.iterdump()) == before
        assert db.execute("PRAGMA user_version").fetchone()[0] == version
    Store(settings.outputs).close()
    assert sorted(path.name for path in settings.outputs.glob("tunebooth.db*")) == [file.name, backup.name]


def test_a_migration_that_fails_changes_nothing(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    file = settings.outputs / "tunebooth.db"
    old_database(file, len(MIGRATIONS) - 1)
    with closing(sqlite3.connect(file)) as db:
        before = list(db.iterdump())
    broken = [*MIGRATIONS[:-1], MIGRATIONS[-1] + "INSERT INTO nothing VALUES (1);"]
    monkeypatch.setattr("trainer.studio.migrations.MIGRATIONS", broken)
    with pytest.raises(RuntimeError, match="nothing"):
        Store(settings.outputs)
    with closing(sqlite3.connect(file)) as db:
        assert list(db.iterdump()) == before
    monkeypatch.undo()
    store = Store(settings.outputs)
    assert store.queue_length() == 5
    store.close()


def test_no_prompt_of_an_earlier_version_is_liked(settings: Settings) -> None:
    old_database(settings.outputs / "tunebooth.db", 6)
    store = Store(settings.outputs)
    assert [row["liked_at"] for row in store.find("prompts")] == [None] * 4
    with store.transaction() as db:
        assert [row["path"] for row in db.execute("SELECT * FROM checksums")] == ["model/lora.safetensors"]
    store.close()
