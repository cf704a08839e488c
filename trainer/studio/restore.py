"""Rows for what is on disk already: with the number that a folder has, and the state that it is in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from trainer.studio.columns import encode
from trainer.studio.store import Store


def restore(store: Store, table: Literal["tunes", "prompts"], row_id: int | None, values: Mapping[str, object]) -> int:
    """Insert a row that has ended already; no job and no callback comes of it. Returns its number.

    row_id: None takes a new number.
    """
    columns = {"id": row_id} | encode(values)
    with store.transaction() as db:
        cursor = db.execute(
            f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})",
            list(columns.values()),
        )
    assert cursor.lastrowid is not None
    return cursor.lastrowid
