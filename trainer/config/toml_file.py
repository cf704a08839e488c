"""A cache of TOML files that were parsed and checked. The only reader of TOML."""

from __future__ import annotations

import copy
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ConfigDict

from trainer.files import Unreadable, read_text, unreadable

Table = dict[str, Any]  # of a TOML; its values are checked where they are used
CHECKED = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)  # of the classes that are made from tables
DEPTH = 16  # the deepest nesting of tables; a deeper one could not be copied
_parsed: dict[tuple[Path, Callable[[Table], object]], tuple[tuple[int, int], Table | str]] = {}


def anything(_table: Table) -> None:
    """For a TOML whose values are checked when they are used."""


def read_toml(file: Path, check: Callable[[Table], object] = anything) -> Table:
    """The content of a TOML, as a copy that the caller may change.

    A file is parsed again after its modification time or its size has changed. check: raises ValueError for a table
    that cannot be used. Raises FileNotFoundError; Unreadable if the file cannot be read or used.
    """
    try:
        status = file.stat()
    except FileNotFoundError:
        raise
    except OSError as problem:
        raise unreadable(file, problem) from None
    version = status.st_mtime_ns, status.st_size
    known = _parsed.get((file, check))
    if known is None or known[0] != version:
        known = version, _parse(file, read_text(file), check)
        _parsed[file, check] = known
    if isinstance(known[1], str):
        raise Unreadable(known[1])
    return copy.deepcopy(known[1])


def _parse(file: Path, text: str, check: Callable[[Table], object]) -> Table | str:
    """The table, or why it cannot be used."""
    try:
        table = tomllib.loads(text)
        if _is_deep(table):
            return f"{file.name} cannot be read: its tables are nested too deeply"
        check(table)
    except ValueError as problem:
        return str(unreadable(file, problem))
    except RecursionError:
        return f"{file.name} cannot be read: its brackets are nested too deeply"
    return table


def _is_deep(table: Table) -> bool:
    level: list[object] = [table]
    for _ in range(DEPTH):
        level = [
            child
            for one in level
            for child in (one.values() if isinstance(one, dict) else one if isinstance(one, list) else ())
        ]
    return bool(level)
