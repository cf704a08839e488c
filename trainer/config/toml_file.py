"""A cache of parsed TOML files. The only reader of TOML."""

from __future__ import annotations

import copy
import tomllib
from pathlib import Path
from typing import Any

Table = dict[str, Any]  # of a TOML; its values are checked where they are used
_parsed: dict[Path, tuple[tuple[int, int], Table]] = {}


def read_toml(file: Path) -> Table:
    """The content of a TOML, as a copy that the caller may change.

    A file is parsed again after its modification time or its size has changed. Raises OSError for a file that cannot
    be read, ValueError for one that is not TOML in UTF-8.
    """
    status = file.stat()
    version = status.st_mtime_ns, status.st_size
    known = _parsed.get(file)
    if known is None or known[0] != version:
        known = version, tomllib.loads(file.read_text("utf-8"))
        _parsed[file] = known
    return copy.deepcopy(known[1])
