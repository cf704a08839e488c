"""What the files beside a tune hold. The program writes them; a disk or a user may spoil them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from trainer.contract.photos import Photo
from trainer.files import Unreadable, read_json_lines

FINITE = ConfigDict(strict=True, allow_inf_nan=False)
Count = Annotated[int, Field(ge=0, lt=2**31)]


class SeenPicture(BaseModel):
    """A picture as it is trained, of `dataset/seen/seen.json`. file: its name beside that file."""

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
    """Of `request.json`: the hyper-parameters that the request named. The row has all of them, as they were settled."""

    model_config = FINITE

    args: str | None


SEEN = TypeAdapter(list[SeenPicture])
ASKED = TypeAdapter(Asked)
VERDICTS = TypeAdapter(list[Photo])
NAMES = TypeAdapter(list[str])


def read_log(file: Path) -> list[dict[str, Any]]:
    """The lines of a run's log, those left out that are none. Raises FileNotFoundError, Unreadable."""
    lines = read_json_lines(file)
    good = [line for line in lines if _is_line(line)]
    if not good and file.stat().st_size:
        raise Unreadable(f"{file.name} cannot be read: it holds no line of a run")
    return good


def _is_line(line: dict[str, Any]) -> bool:
    try:
        LogLine.model_validate(line)
    except ValidationError:
        return False
    return True
