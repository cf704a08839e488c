"""The app starts itself again, in the same process: after an error of the device that a process cannot survive."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from trainer.settings import Settings

OPEN_FILES = Path("/dev/fd")  # of this process, by number


def command_again(command: Sequence[str], settings: Settings, device: str) -> list[str]:
    """What starts this program again as it runs now. command: as Python was called. device: that is in use.

    Of an option that is there twice, the last one counts. A free port becomes the one that was taken, and `auto` the
    device: a card that is lost must not make the CPU train for days. What is done once at a start is not done again.
    """
    options = ["--port", str(settings.port), "--device", device, "--no-open", "--no-demo"]
    given = list(command[1:])
    return [sys.executable, *given] if given[-len(options) :] == options else [sys.executable, *given, *options]


def start_again(settings: Settings, device: str) -> NoReturn:
    """Put a new run of this program into the place of this one; it has the same process id. Port and lock are free."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    for file in list(OPEN_FILES.iterdir()):
        if int(file.name) > sys.stderr.fileno():
            close_at_exec(int(file.name))
    os.execv(sys.executable, command_again(sys.orig_argv, settings, device))  # noqa: S606  # as it was started


def close_at_exec(descriptor: int) -> None:
    """Python's files close by themselves; a driver's would stay open, and hold the memory of the card."""
    try:
        os.set_inheritable(descriptor, False)
    except OSError:  # it was the one that the folder was listed with
        return
