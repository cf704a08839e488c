"""Pictures that the program itself has written: opened, or refused in words that name the file."""

from __future__ import annotations

import struct
from pathlib import Path

from PIL import Image

from trainer.files import unreadable


def open_picture(file: Path, mode: str) -> Image.Image:
    """The whole picture, in a mode as `RGB` or `L`. Raises FileNotFoundError, Unreadable."""
    try:
        with Image.open(file) as opened:
            return opened.convert(mode)
    except FileNotFoundError:
        raise
    # What Pillow's readers raise for broken files; the text of the first names a folder of this machine.
    except (OSError, SyntaxError, ValueError, LookupError, struct.error, Image.DecompressionBombError) as problem:
        known = isinstance(problem, OSError) and problem.strerror
        raise unreadable(file, problem if known else ValueError("it is no picture, or a broken one")) from problem
