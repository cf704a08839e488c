"""Requests and answers of the child process that analyzes photos."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from trainer.config.train_config import TrainConfig
from trainer.contract.photos import Face, Photo

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Found:
    """A face in a photo: box (left, top, right, bottom) and landmarks (eyes, nose, corners of the mouth) in pixels.

    identity: a vector of length 1; None without recognition weights.
    """

    box: Box
    score: float
    landmarks: tuple[tuple[float, float], ...]
    sharpness: float
    identity: tuple[float, ...] | None = None

    @property
    def area(self) -> float:
        left, top, right, bottom = self.box
        return (right - left) * (bottom - top)

    def in_verdict(self, main: bool) -> Face:
        """The face as a verdict has it. main: whether it is the subject."""
        left, top, right, bottom = map(round, self.box)
        box = (left, top, right, bottom)
        return Face(box=box, score=round(self.score, 3), sharpness=round(self.sharpness, 1), main=main)


@dataclass(frozen=True)
class Task:
    """Work on one photo, written to `folder` (the tune's `dataset/`). Weights that are None skip their part."""

    photo: Path
    folder: Path
    name: str
    faces: list[Found]
    subject: list[Found]
    closeup: bool = False
    mask_face: bool = False
    restorer: Path | None = None
    strength: float = 1.0
    matting: Path | None = None
    segmenter: Path | None = None

    @property
    def empty(self) -> bool:
        return not (self.closeup or self.mask_face or self.restorer or self.matting or self.segmenter)


@dataclass
class Made:
    """The results for one photo."""

    closeup: bool = False
    restored: int = 0
    masks: list[str] = field(default_factory=list)


def put_into_verdict(photo: Photo, task: Task, made: Made) -> None:
    """Put the results for a photo into its verdict."""
    photo.cropped, photo.restored, photo.masks = made.closeup, made.restored > 0, made.masks
    if task.closeup and not made.closeup:
        photo.notes.append("the face is too small for a closeup")
    if task.restorer and task.faces and not made.restored:
        photo.notes.append("sharp and large enough: nothing to restore")
    if made.restored:
        photo.notes.append(f"{made.restored} face{'s' if made.restored > 1 else ''} restored")


def masks_of(config: TrainConfig) -> set[str]:
    """The masks that a configuration uses."""
    return ({config.mask} | ({"subject"} if config.mask_widen else set())) - {"none"}
