"""The JSON columns of the database: written, and read with the types that they must have."""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Mapping
from typing import cast

from pydantic import ConfigDict, JsonValue, TypeAdapter, ValidationError
from pydantic_core import from_json

from trainer.contract.parsed_text import of_row
from trainer.contract.photos import Photo
from trainer.contract.rows import ExportRow, PromptRow, TuneRow
from trainer.contract.states import Progress
from trainer.files import reason

log = logging.getLogger("tunebooth.store")
Row = TuneRow | PromptRow | ExportRow
STRICT = ConfigDict(strict=True, allow_inf_nan=False)
COLUMNS: dict[str, tuple[TypeAdapter[object], object]] = {  # the type of each, and the value used for a broken one
    "characteristics": (TypeAdapter(dict[str, str], config=STRICT), {}),
    "photos": (TypeAdapter(list[Photo]), []),
    "files": (TypeAdapter(list[str], config=STRICT), []),
    "progress": (TypeAdapter(Progress), {}),
    "warnings": (TypeAdapter(list[str], config=STRICT), []),
    "kept": (TypeAdapter(dict[str, JsonValue], config=STRICT), {}),
    "attributes": (TypeAdapter(dict[str, JsonValue], config=STRICT), {}),
    "named": (TypeAdapter(list[tuple[str, int, float]], config=STRICT), None),  # null: not looked up yet
    "parsed": (TypeAdapter(dict[str, JsonValue], config=STRICT), None),  # null: not parsed yet
}
FOR_SHOW = ("progress", "warnings", "kept")  # a job does without them
_logged: set[tuple[int, str, str]] = set()


def encode(values: Mapping[str, object]) -> dict[str, object]:
    """Values as SQLite keeps them."""
    return {key: json.dumps(value) if key in COLUMNS else value for key, value in values.items()}


def decode(row: sqlite3.Row) -> Row:
    """A row with its JSON columns parsed. `broken` names those that cannot be read, which are left empty."""
    decoded: dict[str, object] = {}
    broken = []
    for key in row.keys():  # noqa: SIM118
        value = row[key]
        if key in COLUMNS:
            kind, empty = COLUMNS[key]
            try:
                value = from_json(value, allow_inf_nan=False)
                if value is not None or empty is not None:
                    kind.validate_json(row[key])
                if key == "parsed" and value:
                    of_row(value)
            except (ValidationError, ValueError, TypeError, LookupError, AttributeError) as problem:
                _warn(int(row["id"]), key, reason(problem))
                value = empty.copy() if isinstance(empty, dict | list) else empty
                broken += [] if key in FOR_SHOW else [key]
        decoded[key] = value
    return cast(Row, decoded | ({"broken": broken} if broken else {}))


def _warn(row_id: int, column: str, problem: str) -> None:
    """Write it into the log, once for each value."""
    if (row_id, column, problem) not in _logged:
        _logged.add((row_id, column, problem))
        log.warning("the database has a broken column %s in row %s: %s", column, row_id, problem)
