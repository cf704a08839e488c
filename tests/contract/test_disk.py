"""What errors say about the disk, and how much room there is."""

from __future__ import annotations

import errno
import os
import sqlite3
from pathlib import Path

import pytest

from tests.helpers.small_disk import fill, small_disk
from trainer.contract.disk import RESERVE_BYTES, DiskProblem, as_problems, as_text, check_room, free_bytes, problem_of


def sqlite_error(name: str) -> sqlite3.OperationalError:
    error = sqlite3.OperationalError("database or disk is full")
    error.sqlite_errorname = name
    return error


def caused_by(cause: Exception) -> Exception:
    try:
        try:
            raise cause
        except type(cause):
            raise ValueError("the photo is damaged") from None
    except ValueError as error:
        return error


@pytest.mark.parametrize(
    ("error", "words", "full"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "is full", True),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), "is full", True),
        (OSError(errno.EIO, os.strerror(errno.EIO)), "Input/output error", False),
        (OSError(errno.EROFS, os.strerror(errno.EROFS)), "Read-only", False),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), "is full", True),
        (RuntimeError("I/O error: Input/output error (os error 5)"), "Input/output error", False),
        (RuntimeError("[enforce fail] write failed: No space left on device"), "is full", True),
        (sqlite_error("SQLITE_FULL"), "for the database", True),
        (sqlite_error("SQLITE_IOERR_WRITE"), "cannot be read or written", False),
        (sqlite_error("SQLITE_BUSY"), "in use by another program", False),
        (caused_by(OSError(errno.ENOSPC, "No space left on device")), "is full", True),
    ],
)
def test_errors_of_the_disk_are_told_in_words(error: Exception, words: str, full: bool, tmp_path: Path) -> None:
    problem = problem_of(error, tmp_path)
    assert problem is not None and words in str(problem) and problem.full is full
    assert problem_of(caused_by(problem), tmp_path) is problem


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOENT, "No such file or directory"),
        OSError("the hub answers 500"),
        RuntimeError("CUDA error 28"),
        sqlite_error("SQLITE_ERROR"),
        ValueError("no space"),
    ],
)
def test_other_errors_say_nothing_about_the_disk(error: Exception, tmp_path: Path) -> None:
    assert problem_of(error, tmp_path) is None
    if isinstance(error, OSError):
        with pytest.raises(OSError, match=str(error.strerror or error)), as_problems(tmp_path):
            raise error


def test_room_is_what_is_free_but_for_a_reserve(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 24) as disk:
        later = disk / "not" / "yet" / "there"
        assert free_bytes(later) == free_bytes(disk) <= 24 * 2**20
        check_room(later, free_bytes(disk) - RESERVE_BYTES, "states")  # what fits may be written
        with pytest.raises(DiskProblem, match="25 MB free, and about 25 MB are needed for states") as problem:
            check_room(later, free_bytes(disk) - RESERVE_BYTES + 1, "states")
        assert problem.value.full and problem.value.folder == later
        filler = fill(disk)
        with pytest.raises(DiskProblem, match="is full: 0 MB are free"), as_problems(disk):
            (disk / "file").write_bytes(bytes(100))
        filler.unlink()
        (disk / "file").write_bytes(bytes(100))


def test_sizes_are_told_as_people_read_them() -> None:
    assert [as_text(size) for size in (0, 1, 12_400_000, 999_999_999, 23_600_000_000)] == [
        "0 MB", "1 MB", "12 MB", "1000 MB", "23.6 GB",
    ]  # fmt: skip
