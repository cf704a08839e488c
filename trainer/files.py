"""Folders that are either whole or not there at all, also after a power cut."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PARTIAL = ".partial-"  # in the name of every folder that is not finished; swept at start


def fsync(path: Path) -> None:
    """Make a file's content, or a folder's names, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Write a folder so that `target` shows up complete or not at all.

    Yields a temporary folder beside `target`. At the end every file in it is fsynced, the folder is renamed to
    `target` (replacing an older one) and the parent is fsynced. On an error nothing is left.
    """
    partial = target.with_name(f"{target.name}{PARTIAL}{uuid.uuid4().hex[:8]}")
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in sorted(partial.rglob("*"), reverse=True):
            if path.is_file():
                path.chmod(0o644)  # safetensors leaves 0600 behind, which no download tool can read
            fsync(path)
        fsync(partial)
        if target.exists():
            discard(target)
        partial.rename(target)
        fsync(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def discarded_on_error() -> Iterator[list[Path]]:
    """Yields a list. The folders on it are removed where the block ends with an error, as a commit on a full disk."""
    folders: list[Path] = []
    done = False
    try:
        yield folders
        done = True
    finally:
        for folder in folders if not done else []:
            discard(folder)


def write_whole(file: Path, content: str | bytes) -> None:
    """Write a file so that it is complete or not there, also after a power cut."""
    partial = file.with_name(f"{file.name}{PARTIAL}{uuid.uuid4().hex[:8]}")
    try:
        partial.write_bytes(content if isinstance(content, bytes) else content.encode())
        fsync(partial)
        partial.rename(file)
    finally:
        partial.unlink(missing_ok=True)  # what a full disk took of it
    fsync(file.parent)


def discard(folder: Path) -> None:
    """Remove a folder; a crash half-way leaves only something that the sweep at start knows to be waste."""
    if folder.exists():
        waste = folder.with_name(f"{folder.name}{PARTIAL}{uuid.uuid4().hex[:8]}")
        folder.rename(waste)
        shutil.rmtree(waste, ignore_errors=True)


def sweep(root: Path) -> None:
    """Remove what a killed process left half-written below `root`."""
    for waste in list(root.rglob(f"*{PARTIAL}*")):
        if waste.is_dir():
            shutil.rmtree(waste, ignore_errors=True)
        else:
            waste.unlink(missing_ok=True)


def read_json_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; a last line that a crash cut off is left out."""
    lines = []
    for text in file.read_text("utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines
