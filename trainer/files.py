"""Files and folders that are complete or absent, even after a power cut; readers for files that may be broken."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json

log = logging.getLogger("tunebooth.files")
T = TypeVar("T")
STEP = re.compile("step-[0-9]{6}")
MOST_MESSAGE = 200  # characters of a parser's message
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


def move_folder(source: Path, target: Path) -> None:
    """Rename a folder. Where `target` is on another disk, by a link, it is copied; it is complete or absent too."""
    try:
        source.rename(target)
    except OSError as problem:
        if problem.errno != errno.EXDEV:
            raise
        with whole_folder(target) as partial:
            shutil.copytree(source, partial, dirs_exist_ok=True)
        shutil.rmtree(source, ignore_errors=True)


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


class Unreadable(ValueError):
    """A file that cannot be read, or whose content is wrong. The message names the file."""


def reason(problem: Exception) -> str:
    """The message of a library's error, in one line and without the path of the file."""
    if isinstance(problem, OSError):
        why = problem.strerror or str(problem) or "the system gave no reason"
    elif isinstance(problem, ValidationError):
        first = problem.errors()[0]
        why = ": ".join(filter(None, [".".join(map(str, first["loc"])), first["msg"]]))
    else:
        why = str(problem) or "the library gave no reason"
    return why[:MOST_MESSAGE]


def unreadable(file: Path, problem: Exception) -> Unreadable:
    return Unreadable(f"{printable(file.name)} cannot be read: {reason(problem)}")


def read_bytes(file: Path) -> bytes:
    """Raises FileNotFoundError; Unreadable if the file cannot be read."""
    try:
        return file.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as problem:
        raise unreadable(file, problem) from None


def read_text(file: Path) -> str:
    """A text in UTF-8. Raises as `read_bytes`."""
    try:
        return read_bytes(file).decode("utf-8")
    except UnicodeDecodeError:
        raise Unreadable(f"{printable(file.name)} cannot be read: it is not text in UTF-8") from None


def read_json(file: Path, content: TypeAdapter[T]) -> T:
    """The content of a JSON file, checked by its type. Raises as `read_bytes`.

    NaN, infinite numbers, lone surrogates and deep nesting are refused, because JSON answers cannot hold them.
    """
    try:
        return content.validate_json(read_bytes(file), strict=True)
    except ValidationError as problem:
        raise unreadable(file, problem) from None


def read_json_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, without broken lines: a crash may cut off the last one.

    Raises as `read_bytes`.
    """
    lines = []
    for text in read_bytes(file).splitlines():
        try:
            line = from_json(text, allow_inf_nan=False)
        except ValueError:
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


_logged: dict[Path, str] = {}  # the last warning about each file


def warn_once(file: Path, message: str) -> None:
    """Log a warning about a file, unless it was the last one about this file."""
    if _logged.get(file) != message:
        _logged[file] = message
        log.warning("%s (in %s)", message, printable(str(file.parent)))


def read_for_show(file: Path, read: Callable[[Path], T]) -> T | None:
    """The content of a file that is only displayed; None: it does not exist, or it is broken, which is logged."""
    try:
        return read(file)
    except FileNotFoundError:
        return None
    except Unreadable as problem:
        warn_once(file, str(problem))
        return None


def printable(name: str) -> str:
    """The name of a file as valid Unicode: bytes that are not UTF-8 are replaced."""
    return os.fsencode(name).decode("utf-8", "replace")


def steps_in(folder: Path, suffix: str = "") -> list[Path]:
    """The files or folders of a run called `step-000123` and the suffix, oldest first; empty if there is no folder."""
    try:
        found = [path for path in folder.iterdir() if path.name.endswith(suffix)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as problem:
        warn_once(folder, str(unreadable(folder, problem)))
        return []
    return sorted(path for path in found if STEP.fullmatch(path.name.removesuffix(suffix)))


def is_there(path: Path) -> bool:
    """Whether a path exists; False if that cannot be known."""
    try:
        return path.exists()
    except OSError:  # no permission, or too long a name
        return False
