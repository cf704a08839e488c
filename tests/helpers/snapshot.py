"""Snapshots: what an earlier version of the code made, kept as JSON files in tests/snapshots/.

`TUNEBOOTH_WRITE_SNAPSHOTS=1 pytest tests/test_snapshots.py` writes them again. Do that only where behaviour is meant to
change, and read the diff.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

SNAPSHOTS = Path(__file__).parents[1] / "snapshots"
WRITING = os.environ.get("TUNEBOOTH_WRITE_SNAPSHOTS") == "1"
SAME_MACHINE = os.environ.get("TUNEBOOTH_SAME_MACHINE") == "1"  # compare digests of bytes, too
PROSE = ("description", "summary", "title")  # of OpenAPI and JSON Schema, where they are texts
EXAMPLES = ("example", "examples", "example_input", "label")  # what Gradio calls a label is prose, too
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


def kept(name: str, made: Any) -> Any:
    """The snapshot of this name; where snapshots are written, it becomes `made` first."""
    file = SNAPSHOTS / f"{name}.json"
    if WRITING:
        file.parent.mkdir(exist_ok=True)
        file.write_text(as_text(made), "utf-8")
    return json.loads(file.read_text("utf-8"))


def as_json(value: Any) -> Any:
    """The value as JSON gives it back: tuples become lists, keys become texts."""
    return json.loads(json.dumps(value))


def as_text(value: Any) -> str:
    """JSON with a line for each entry, and lists of plain values on one line."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    return re.sub(r"\[\n[^\[\]{}]*?\n *\]", lambda found: re.sub(r"\n *", " ", found[0]), text) + "\n"


def without_prose(value: Any) -> Any:
    """A schema or description of an API without the texts that are for people."""
    if isinstance(value, list):
        return [without_prose(one) for one in value]
    if not isinstance(value, dict):
        return value
    return {
        key: without_prose(one)
        for key, one in value.items()
        if key not in EXAMPLES and not (key in PROSE and isinstance(one, str))
    }


def shape(value: Any) -> Any:
    """The keys of an answer and the JSON types of its values; the entries of a list have one shape together."""
    if isinstance(value, dict):
        return {key: shape(one) for key, one in value.items()}
    if isinstance(value, list):
        entries: Any = None
        for number, one in enumerate(value):
            entries = both(entries, shape(one)) if number else shape(one)
        return [entries] if value else []
    return {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}[type(value)]


def both(one: Any, other: Any) -> Any:
    """The shape of values that have either shape."""
    if one == other:
        return one
    if isinstance(one, dict) and isinstance(other, dict):
        return {key: both(one.get(key, "missing"), other.get(key, "missing")) for key in one | other}
    if isinstance(one, list) and isinstance(other, list):
        return [both(one[0], other[0])] if one and other else one or other
    alternatives = {part if isinstance(part, str) else json.dumps(part) for part in (one, other)}
    return " | ".join(sorted({name for part in alternatives for name in part.split(" | ")}))


def steady(value: Any, hosts: dict[str, str]) -> Any:
    """An answer without what changes from run to run, as times and signatures of links, and without messages.

    hosts: addresses that change, and what is written in their place.
    """
    if isinstance(value, dict):
        return {key: silent(key, one) or steady(one, hosts) for key, one in value.items()}
    if isinstance(value, list):
        return [steady(one, hosts) for one in value]
    if not isinstance(value, str):
        return value
    if TIME.fullmatch(value):
        return "TIME"
    for host, name in hosts.items():
        value = value.replace(host, name)
    return urlsplit(value)._replace(query="").geturl() if "signature=" in value else value


def silent(key: str, value: Any) -> str | None:
    """What stands for the messages under a key of an answer: their number, or that there is one."""
    if key in ("warnings", "notes"):
        return f"{len(value)} MESSAGES"
    return "A MESSAGE" if key in ("error", "user_error", "dropped") and value else None
