"""The content of the files in a tune's folder, which the program writes and a disk or a user may damage."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from trainer.contract.photos import Photo
from trainer.files import Unreadable, read_json_lines

FINITE = ConfigDict(strict=True, allow_inf_nan=False)
Count = Annotated[int, Field(ge=0, lt=2**31)]


class SeenPicture(BaseModel):
    """A picture as it is trained, from `dataset/seen/seen.json`. file: its name in the same folder."""

    model_config = FINITE

    file: Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
    name: str
    kind: str
    caption: str
    width: Count
    height: Count
    mask: str | None


class LogLine(BaseModel):
    """A line of `log.jsonl`: an event of a run, or a reading of its loss."""

    model_config = FINITE

    step: Count
    loss: float = 0.0
    lr: float | None = None
    peak_gib: float | None = None
    seconds: float | None = None


class Asked(BaseModel):
    """The part of `request.json` that is read: the hyperparameters that the request set."""

    model_config = FINITE

    args: str | None


class PreparedPhoto(Photo):
    """A verdict in `dataset/prepared.json`, with what the photo was and what was made of it.

    sha256: of the photo in `images/`; "": not known, in files of older versions. made: path in `dataset/` -> sha256.
    """

    sha256: str = ""
    made: dict[str, str] = {}


SEEN = TypeAdapter(list[SeenPicture])
ASKED = TypeAdapter(Asked)
VERDICTS = TypeAdapter(list[PreparedPhoto])
NAMES = TypeAdapter(list[str])
OBJECT = TypeAdapter(dict[str, object])


def read_log(file: Path) -> list[dict[str, Any]]:
    """The valid lines of a run's log. Raises FileNotFoundError; Unreadable if there is none in the file."""
    lines = read_json_lines(file)
    good = [line for line in lines if _is_line(line)]
    if not good and file.stat().st_size:
        raise Unreadable(f"{file.name} cannot be read: it holds no line of a run")
    return good


def _is_line(line: object) -> bool:
    try:
        LogLine.model_validate(line)
    except ValidationError:
        return False
    return True
