"""One prompt while it is rendered: loaded models, parameters and progress."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image
from torch import Tensor

from trainer.branches.protocol import Branch
from trainer.config.branch_file import ControlRow
from trainer.contract.report import Report
from trainer.library.bases import Base
from trainer.photos.analysis import PhotoAnalyzer
from trainer.rendering.plan import Plan
from trainer.rendering.preview import Preview
from trainer.rendering.upscale import Upscaler

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny, ModelMixin, SchedulerMixin

RESAMPLING = Image.Resampling.LANCZOS
Picture = Image.Image


@dataclass(frozen=True)
class Lora:
    """A LoRA for the base: a file, or the `model/` of a tune, and its weight."""

    model: Path
    weight: float
    title: str


@dataclass(frozen=True)
class FaceID:
    """A person to be drawn: the `model/` of a faceid tune, the weights of the base's adapter, and its strength."""

    folder: Path
    adapter: Path
    strength: float


@dataclass(frozen=True)
class Models:
    """The models of a prompt. title: of its tune."""

    title: str
    base: Base
    loras: Sequence[Lora]  # on the base
    face: FaceID | None
    people: bool  # whether one of the models was trained on people


class Stopped(Exception):
    """The report asked to stop."""


@dataclass
class Loaded:
    """A base in memory, and everything that the next prompt may need again."""

    weights_key: tuple[object, ...]  # `Base.weights` when they were read
    branch: Branch
    scheduler: SchedulerMixin  # the base's own; the pipeline may have the one of a prompt
    decoder: AutoencoderTiny | None  # for previews (TAESD)
    loras: tuple[tuple[Path, int, int], ...] | None = ()  # files on the base, their change times, sizes; None: unknown
    weights: tuple[float, ...] = ()  # of `loras`
    texts: dict[tuple[object, ...], dict[str, Tensor]] = field(default_factory=dict)  # prompt embeddings, with `loras`
    control: tuple[ControlRow, ModelMixin] | None = None  # the last control model
    upscaler: Upscaler | None = None


@dataclass
class Job:
    """One prompt while it is rendered."""

    plan: Plan
    models: Models
    loaded: Loaded
    embeds: dict[str, Tensor]  # the prompt, encoded
    folder: Path  # for files that face analysis reads
    analyzer: PhotoAnalyzer
    report: Report
    preview: Preview
    warnings: list[str]
    enlarged: tuple[Picture, Picture] | None = None  # the last picture that was enlarged, and the result
    done: int = 0  # steps of diffusion, counted for each picture
    steps: int = 0  # steps that are known so far

    @property
    def branch(self) -> Branch:
        return self.loaded.branch

    @property
    def family(self) -> str:
        """The name of the branch."""
        return self.models.base.branch

    def report_progress(self) -> None:
        """Report the steps so far. Raises Stopped."""
        if not self.report.step(min(self.done, self.steps), self.steps):
            raise Stopped

    def watch(
        self,
        count: int,
        each: int,
        size: tuple[int, int],
        _pipeline: object,
        step: int,
        _at: object,
        now: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """Called by a pipeline after each of `each` steps of `count` pictures. Raises Stopped."""
        if not self.report.step(min(self.done + min(step + 1, each) * count, self.steps), self.steps):
            raise Stopped
        self.preview.show(now["latents"], size)
        return now

    def progress(self, what: str, _done: int = 0, _of: int = 0) -> None:
        self.report.stage(what)

    @contextmanager
    def kept(self, picture: Picture) -> Iterator[Path]:
        """A picture as a file, for the child process that analyzes it."""
        file = self.folder / "analyzed.png"
        picture.save(file, compress_level=1)
        try:
            yield file
        finally:
            file.unlink()
