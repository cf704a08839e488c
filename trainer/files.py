"""Files and folders that are complete or absent, even after a power cut."""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

PARTIAL = ".partial-"  # in the name of every unfinished file or folder; these are deleted at start
UNCOMMITTED = f"{PARTIAL}new"  # a file in a folder that is in its place before its row is in the database
LEFTOVER = re.compile(rf"{re.escape(PARTIAL)}([0-9a-f]{{8}}|new)?$")  # only such names are ours: a user has others


def fsync(path: Path) -> None:
    """Write a file's content, or a folder's names, to the disk, so that they survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Write a folder so that `target` is complete or absent.

    Yields a temporary folder next to `target`. At the end every file in it is fsynced, the folder is renamed to
    `target` (replacing an older one) and the parent is fsynced. After an error the temporary folder is deleted.
    """
    partial = target.with_name(f"{target.name}{PARTIAL}{uuid.uuid4().hex[:8]}")
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in sorted(partial.rglob("*"), reverse=True):
            if path.is_file():
                path.chmod(0o644)  # safetensors writes 0600, which no download tool can read
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
    """Yields a list of folders. They are removed if the block raises, for example in a commit on a full disk."""
    folders: list[Path] = []
    done = False
    try:
        yield folders
        done = True
    finally:
        for folder in folders if not done else []:
            discard(folder)


def write_whole(file: Path, content: str | bytes) -> None:
    """Write a file so that it is complete or absent, even after a power cut."""
    partial = file.with_name(f"{file.name}{PARTIAL}{uuid.uuid4().hex[:8]}")
    try:
        partial.write_bytes(content if isinstance(content, bytes) else content.encode())
        fsync(partial)
        partial.rename(file)
    finally:
        partial.unlink(missing_ok=True)  # incomplete after an error
    fsync(file.parent)


def discard(folder: Path) -> None:
    """Delete a folder; what a crash leaves of it is deleted by `sweep` at start."""
    if folder.exists():
        waste = folder.with_name(f"{folder.name}{PARTIAL}{uuid.uuid4().hex[:8]}")
        folder.rename(waste)
        shutil.rmtree(waste, ignore_errors=True)


def sweep(root: Path, *, below: bool = True) -> None:
    """Delete the unfinished files and folders in `root`, left by a killed process. No link is followed.

    below: also those in its folders.
    """
    for folder, folders, files in os.walk(root):
        for name in [*folders, *files]:
            if LEFTOVER.search(name):
                remove(Path(folder, name))
        folders[:] = [name for name in folders if below and not LEFTOVER.search(name)]


def remove(path: Path) -> bool:
    """Delete a file, a folder or a link. False: it, or a part of it, is still there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
    return not os.path.lexists(path)


def read_json_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, without a last line that a crash cut off."""
    lines = []
    for text in file.read_text("utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines
