"""A disk of a few megabytes, to be filled: a tmpfs."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

FILLER = "filler"


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """A file system of this size at `folder`. Skips the test where mounting is not allowed."""
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={megabytes}m", "none"]
    try:
        subprocess.run(["mount", *options, str(folder)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as problem:
        pytest.skip(f"no file system can be mounted here: {problem}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, leave: int = 0) -> Path:
    """Write a file that leaves so many bytes free, at most. Removing it makes room again."""
    filler = folder / FILLER
    with filler.open("wb", buffering=0) as file:
        left = shutil.disk_usage(folder).free - leave
        while left > 0:
            left -= file.write(bytes(min(left, 2**16)))
    return filler
