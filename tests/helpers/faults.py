"""What can be wrong with a file that the program reads: its bytes, its values, or what lies in its place."""

from __future__ import annotations

import copy
import json
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

DEEP = 100_000  # brackets, one in the other: deeper than any parser goes
HUGE = 10**400  # a whole number that no float holds
WRONG: tuple[object, ...] = (None, True, 7, -1.5, 1e999, HUGE, "x", "\ud800", "../../x", [], [None], {}, {"a": {}})

# A whole file in place of the good one. JSON and TOML alike.
CONTENTS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda good: b"",
    "cut": lambda good: good[: len(good) // 2],
    "not UTF-8": lambda good: b"\xff\xfe" + good[:20] + b"\xe4",
    "zeros": lambda good: bytes(len(good)),
    "null": lambda good: b"null",
    "a number": lambda good: b"7",
    "a text": lambda good: b'"text"',
    "a lone surrogate": lambda good: rb'"\ud800"',
    "an empty list": lambda good: b"[]",
    "a list of null": lambda good: b"[null]",
    "a list of lists": lambda good: b"[[1, [2]]]",
    "a list of numbers": lambda good: b"[1, 2]",
    "an empty object": lambda good: b"{}",
    "an object": lambda good: b'{"a": {"b": [1]}}',
    "brackets that open": lambda good: b"[" * DEEP,
    "brackets": lambda good: b"[" * DEEP + b"]" * DEEP,
    "braces": lambda good: b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "not finite": lambda good: b"[1e999, NaN, -Infinity]",
    "5000 digits": lambda good: b"[" + b"9" * 5000 + b"]",
}


INSTEAD = ("a folder", "a link to itself")


def instead_of(file: Path, fault: str) -> None:
    """Put a folder, or a link that leads to itself, in the place of a file."""
    remove(file)
    if fault == "a folder":
        (file / "inside").mkdir(parents=True)
    else:
        file.symlink_to(file)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def spoiled(good: Any, wrong_values: Sequence[object] = WRONG) -> Iterator[tuple[str, Any]]:
    """Copies of a JSON value: in each, one value in it is taken out, or is another one of a wrong type or size."""
    for path in list(paths(good)):
        name = ".".join(map(str, path))
        for wrong in wrong_values:
            changed = copy.deepcopy(good)
            inner(changed, path)[path[-1]] = wrong
            yield f"{name}={wrong!r:.20}", changed
        if isinstance(path[-1], str):
            changed = copy.deepcopy(good)
            del inner(changed, path)[path[-1]]
            yield f"no {name}", changed


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where each value in a JSON value is; of a list only the first one is looked at."""
    children: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        children = list(value.items())
    elif isinstance(value, list):
        children = list(enumerate(value))[:1]
    for key, child in children:
        yield (*path, key)
        yield from paths(child, (*path, key))


def inner(value: Any, path: tuple[Any, ...]) -> Any:
    """The object or list that holds the value at a path."""
    for key in path[:-1]:
        value = value[key]
    return value


def as_json(value: object) -> bytes:
    return json.dumps(value).encode()


def safetensors(header: object, data: bytes = b"") -> bytes:
    """A safetensors file with this header; bytes are taken as they are."""
    text = header if isinstance(header, bytes) else as_json(header)
    return struct.pack("<Q", len(text)) + text + data
