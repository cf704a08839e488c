"""Free disk space: checks before large writes, and the errors of a full or broken disk as one exception."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

RESERVE_BYTES = 16 * 2**20  # always kept free, for the database and the logs
FULL = {errno.ENOSPC, errno.EDQUOT}
BROKEN = {errno.EIO, errno.EROFS}
# In the messages of libraries that are not written in Python: safetensors.
OS_ERROR = re.compile(r"\(os error (\d+)\)")
SQLITE_FULL, SQLITE_BUSY = ("SQLITE_FULL",), ("SQLITE_BUSY", "SQLITE_LOCKED")
SQLITE_BROKEN = ("SQLITE_IOERR", "SQLITE_READONLY", "SQLITE_CANTOPEN")


class DiskProblem(Exception):
    """The disk or the database cannot be written. A job then waits; REST answers 507 or 503.

    full: too little free space. needed: bytes that must fit into `folder` before the job continues. what: what is
    written. remedy: what the user can do; "": the usual remedy.
    """

    def __init__(
        self, message: str, folder: Path, *, full: bool = False, needed: int = 0, what: str = "", remedy: str = ""
    ) -> None:
        super().__init__(message)
        self.folder = folder
        self.full = full
        self.needed = needed
        self.what = what
        self.remedy = remedy

    def as_refusal(self) -> str:
        """The message for a request that is refused because of this problem."""
        usual = "Free some room there and send it again" if self.full else "Send it again later"
        return f"{self}. {self.remedy or usual}."


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of a folder. The folder may not exist yet."""
    return shutil.disk_usage(next(there for there in (folder, *folder.absolute().parents) if there.exists())).free


def check_room(folder: Path, needed: int, what: str) -> None:
    """Raises DiskProblem unless `needed` bytes and the reserve fit on the disk of a folder.

    what: what is written, for the message.
    """
    free = free_bytes(folder)
    if free < needed + RESERVE_BYTES:
        message = (
            f"the disk of {folder} has {as_text(free)} free, and about {as_text(needed + RESERVE_BYTES)} are needed for"
            f" {what}"
        )
        raise DiskProblem(message, folder, full=True, needed=needed, what=what)


def problem_of(error: BaseException, folder: Path) -> DiskProblem | None:
    """The disk problem that caused an error; None for other errors. folder: the one that is written."""
    for one in chain(error):
        if isinstance(one, DiskProblem):
            return one
        if name := getattr(one, "sqlite_errorname", ""):
            return problem_of_database(name, folder)
        number = one.errno if isinstance(one, OSError) else None
        if number is None:
            number = number_in(str(one))
        if number == errno.EFBIG:
            return DiskProblem(f"the disk of {folder} takes no file of that size", folder)
        if number in FULL:
            fullest = min((folder, Path(tempfile.gettempdir())), key=free_bytes)
            return DiskProblem(
                f"the disk of {fullest} is full: {as_text(free_bytes(fullest))} are free", fullest, full=True
            )
        if number in BROKEN:
            return DiskProblem(f"the disk of {folder} does not work: {os.strerror(number)}", folder)
    return None


@contextmanager
def as_problems(folder: Path) -> Iterator[None]:
    """Raise OSErrors of a full or broken disk as DiskProblem. folder: the one that is written."""
    try:
        yield
    except OSError as error:
        if problem := problem_of(error, folder):
            raise problem from error
        raise


def problem_of_database(name: str, folder: Path) -> DiskProblem | None:
    """The problem of an SQLite error; None for other errors. name: its name, such as SQLITE_FULL."""
    if name.startswith(SQLITE_FULL):
        message = f"the disk of {folder} is full: {as_text(free_bytes(folder))} are free, too little for the database"
        return DiskProblem(message, folder, full=True)
    if name.startswith(SQLITE_BUSY):
        return DiskProblem(f"the database in {folder} is in use by another program", folder)
    if name.startswith(SQLITE_BROKEN):
        return DiskProblem(f"the database in {folder} cannot be read or written ({name})", folder)
    return None


def chain(error: BaseException) -> Iterator[BaseException]:
    """An error and its causes."""
    seen: set[int] = set()
    left: list[BaseException | None] = [error]
    while left:
        one = left.pop(0)
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            yield one
            left += [one.__cause__, one.__context__]


def number_in(text: str) -> int | None:
    """The errno in a message, if it has one of a disk."""
    if found := OS_ERROR.search(text):
        return int(found[1])
    return next((number for number in (errno.ENOSPC, errno.EDQUOT, errno.EIO) if os.strerror(number) in text), None)


def as_text(size: int) -> str:
    """Bytes for messages: 12 MB, 3.4 GB. Less than a megabyte is shown as 1 MB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{max(1, round(size / 1e6))} MB" if size else "0 MB"
