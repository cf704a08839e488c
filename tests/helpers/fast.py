"""The base of branch fast, which is part of the program."""

from __future__ import annotations

from trainer.library import bases
from trainer.library.bases import PROGRAM, Base
from trainer.settings import read_settings

FAST_ID = 1_000_000_000
FAST_FOLDER = PROGRAM / "fast_base"


def fast_base() -> Base:
    return bases.resolve(read_settings(), None, "fast")
