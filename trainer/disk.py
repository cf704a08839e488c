"""Room on the disk: how much is free, whether something fits, and what the errors of a full or broken disk mean."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

RESERVE_BYTES = 16 * 2**20  # stay free: the database and the logs need some at any time
FULL = {errno.ENOSPC, errno.EDQUOT}
BROKEN = {errno.EIO, errno.EROFS}
# As libraries say it that are not written in Python: safetensors, torch.
OS_ERROR = re.compile(r"\(os error (\d+)\)")
SQLITE_FULL, SQLITE_BUSY = ("SQLITE_FULL",), ("SQLITE_BUSY", "SQLITE_LOCKED")
SQLITE_BROKEN = ("SQLITE_IOERR", "SQLITE_READONLY", "SQLITE_CANTOPEN")


class DiskProblem(Exception):
    """Why nothing more can be written, in words. A job waits until that is over; REST answers 507 or 503.

    full: whether there is too little room. needed: bytes that must fit into `folder` before a job goes on, for `what`.
    remedy: what the user can do, where that is not what it is for every such problem.
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
        """What a request is told that is refused because of it."""
        usual = "Free some room there and send it again" if self.full else "Send it again later"
        return f"{self}. {self.remedy or usual}."


def free_bytes(folder: Path) -> int:
    """What may still be written on the disk of a folder, which need not be there yet."""
    return shutil.disk_usage(next(there for there in (folder, *folder.absolute().parents) if there.exists())).free


def check_room(folder: Path, needed: int, what: str) -> None:
    """Raises DiskProblem unless so many bytes fit on the disk of a folder, and the reserve stays.

    what: what they are needed for.
    """
    free = free_bytes(folder)
    if free < needed + RESERVE_BYTES:
        message = (
            f"the disk of {folder} has {as_text(free)} free, and about {as_text(needed + RESERVE_BYTES)} are needed for"
            f" {what}"
        )
        raise DiskProblem(message, folder, full=True, needed=needed, what=what)


def problem_of(error: BaseException, folder: Path) -> DiskProblem | None:
    """What an error says about the disk, if it, or an error that led to it, comes from there. folder: of the app."""
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
    """Errors of the system that come from a full or broken disk are raised as DiskProblem. folder: that is written."""
    try:
        yield
    except OSError as error:
        if problem := problem_of(error, folder):
            raise problem from error
        raise


def problem_of_database(name: str, folder: Path) -> DiskProblem | None:
    """What an error of SQLite says about the disk, or about other programs. name: as SQLITE_FULL. folder: its own."""
    if name.startswith(SQLITE_FULL):
        message = f"the disk of {folder} is full: {as_text(free_bytes(folder))} are free, too little for the database"
        return DiskProblem(message, folder, full=True)
    if name.startswith(SQLITE_BUSY):
        return DiskProblem(f"the database in {folder} is in use by another program", folder)
    if name.startswith(SQLITE_BROKEN):
        return DiskProblem(f"the database in {folder} cannot be read or written ({name})", folder)
    return None


def chain(error: BaseException) -> Iterator[BaseException]:
    """An error, and those that led to it."""
    seen: set[int] = set()
    left: list[BaseException | None] = [error]
    while left:
        one = left.pop(0)
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            yield one
            left += [one.__cause__, one.__context__]


def number_in(text: str) -> int | None:
    """The number of the system's error that a message names, if it is one of a disk."""
    if found := OS_ERROR.search(text):
        return int(found[1])
    return next((number for number in (errno.ENOSPC, errno.EDQUOT, errno.EIO) if os.strerror(number) in text), None)


def as_text(size: int) -> str:
    """Bytes as people read them: 12 MB, 3.4 GB. Less than a megabyte counts as one."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{max(1, round(size / 1e6))} MB" if size else "0 MB"
