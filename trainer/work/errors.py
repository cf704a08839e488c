"""Messages for unexpected errors of a job, with a remedy if one is known."""

from __future__ import annotations

import re
from pathlib import Path

from trainer.files import printable, reason

OF_TRAINING = "try args micro_batch=1 gradient_checkpointing=true, a lower resolution or a lower rank"
OF_PICTURES = "try a smaller w and h, no super_resolution or hires_fix, or no controlnet"

CLASS_NAMES = re.compile(r"^(?:[A-Za-z_][\w.]*(?:Error|Exception|Interrupt)\b:?\s*)+")  # "RuntimeError: OSError: "


def explain(error: Exception, remedy: str = OF_TRAINING) -> str:
    """An unexpected error as a message. remedy: added if the card's memory is full."""
    if isinstance(error, OSError) and isinstance(error.filename, str):
        file = Path(error.filename2 if isinstance(error.filename2, str) else error.filename)  # the second: of a rename
        return f"{printable(f'{file.parent.name}/{file.name}')} cannot be used: {reason(error)}"
    if type(error).__module__.startswith("trainer.") and str(error):
        return str(error)  # words of this program
    text = in_words(error)
    if type(error).__name__ == "OutOfMemoryError":
        return f"{text} -- the card's memory is full: {remedy}; or close what else uses the card"
    return f"unexpected error: {text}; the app's log has the details"


def in_words(error: Exception) -> str:
    """The message of a library's error without the names of exception classes, which mean nothing to a user."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return CLASS_NAMES.sub("", " ".join(text.split())) or "it gave no reason"
