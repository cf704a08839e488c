"""The files that decide how a tune is trained; a broken one is an error, because values are not guessed."""

from __future__ import annotations

from pathlib import Path

from trainer.contract.photos import Photo
from trainer.contract.rows import TuneRow
from trainer.contract.run_files import ASKED, VERDICTS
from trainer.files import Unreadable, read_json, unreadable


def prepared(file: Path, tune: TuneRow) -> list[Photo]:
    """The verdicts on a tune's photos, from `dataset/prepared.json`. Raises Unreadable."""
    try:
        photos = read_json(file, VERDICTS)
    except FileNotFoundError as problem:
        raise unreadable(file, problem) from None
    except Unreadable as problem:
        raise Unreadable(f"{problem}. Delete it, and resume: the photos are analyzed again") from None
    if [photo.file for photo in photos] != [photo["file"] for photo in tune["photos"]]:
        message = "prepared.json is not about the photos of this tune. Delete it, and resume: they are analyzed again"
        raise Unreadable(message)
    return photos


def asked_args(file: Path) -> str | None:
    """The parameter args of the request, from `request.json`. Raises Unreadable."""
    try:
        return read_json(file, ASKED).args
    except (FileNotFoundError, Unreadable) as problem:
        why = f"{problem}" if isinstance(problem, Unreadable) else "request.json is missing"
        raise Unreadable(f"{why}. It holds what was asked for in args: put it back, or create the tune again") from None
