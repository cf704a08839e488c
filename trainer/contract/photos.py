"""Uploaded files, and the verdict on one photo."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

ProgressCallback = Callable[[str, int, int], None]  # progress("photos are decoded", 3, 20)


def no_progress(_what: str, _done: int, _of: int) -> None:
    """For callers that show no progress."""


@dataclass(frozen=True)
class Upload:
    """An uploaded file: its original name, and the path of its bytes. within: the zip and the folder it came in."""

    name: str
    path: Path
    within: str = ""

    @property
    def full_name(self) -> str:
        """The name for messages: `photos.zip/beach/1.jpg`."""
        return f"{self.within}/{self.name}" if self.within else self.name


class Face(BaseModel):
    """A detected face. box: (left, top, right, bottom) in pixels of the upright photo.

    score: the detector's, 0 to 1. sharpness: variance of the Laplacian of the face at 112 px. main: it is the subject.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    box: tuple[int, int, int, int]
    score: float
    sharpness: float
    main: bool = False


class Photo(BaseModel):
    """The verdict on one photo: its properties, what was found in it and what was done with it.

    Sizes are in pixels, of the upright picture. file: its name among the tune's images. url: its link. seen: the
    picture as it is trained. closeup: its face crop. The last two are links for a tune, data URLs for a check.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    name: str
    file: str
    width: int
    height: int
    format: str
    rotated: bool = False
    converted: str | None = Field(None, description="the original colours, such as CMYK; None: 8-bit RGB")
    sharpness: float | None = Field(None, description="variance of the Laplacian at a long side of 512 px")
    blurred: bool = False
    too_small: bool = False
    duplicate_of: str | None = Field(None, description="the photo that this one equals or almost equals")
    faces: list[Face] | None = Field(
        None, description="None: face detection was skipped; it runs on photos of people only"
    )
    same_person: bool | None = Field(None, description="None: not known; it needs recognition weights and three photos")
    cropped: bool = False
    restored: bool = False
    masks: list[str] = []
    dropped: str | None = Field(None, description="why this photo is not trained on")
    notes: list[str] = []
    url: str | None = None
    seen: str | None = None
    closeup: str | None = None


class Check(BaseModel):
    """The answer of /photos/check: a verdict for each photo, and warnings about the whole set."""

    photos: list[Photo]
    warnings: list[str]
