"""The app restarts itself in the same process (`os.execv`) after a fatal error of the device."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from trainer.settings import Settings

OPEN_FILES = Path("/dev/fd")  # the open files of this process, by number


def restart(settings: Settings, device: str) -> NoReturn:
    """Replace this process by a new run of the program, with the same process id.

    The caller has closed the port and the outputs folder. device: that was in use.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    for file in list(OPEN_FILES.iterdir()):
        if int(file.name) > sys.stderr.fileno():
            close_at_exec(int(file.name))
    os.execv(sys.executable, restart_command(sys.orig_argv, settings, device))  # noqa: S606  # the user's own command


def restart_command(command: Sequence[str], settings: Settings, device: str) -> list[str]:
    """The command of a restart. command: how Python was called.

    The last one of equal options counts. The port stays the same, also if it was 0. So does the device: after the loss
    of a card, `auto` would train on the CPU. The browser and the demo belong to the first start only.
    """
    options = ["--port", str(settings.port), "--device", device, "--no-open", "--no-demo"]
    given = list(command[1:])
    return [sys.executable, *given] if given[-len(options) :] == options else [sys.executable, *given, *options]


def close_at_exec(descriptor: int) -> None:
    """Python opens its files so; a driver's file that stays open would keep the memory of the card."""
    try:
        os.set_inheritable(descriptor, False)
    except OSError:  # closed meanwhile, as the file of the listing is
        return
