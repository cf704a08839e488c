"""Face analysis, and the preparation of photos before training: closeups, restored faces, masks, verdicts.

The networks run in a child process (`faces.py`): a model that crashes does not end the app, and photos can be checked
while a tune trains. This module decides what the child does, and reads its answers. No torch.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from trainer.config.kinds import kind_of
from trainer.config.train_config import TrainConfig
from trainer.contract.errors import AnalysisUnavailable, InvalidRequest
from trainer.contract.photos import Photo, ProgressCallback, no_progress
from trainer.library import weights
from trainer.library.weights import Unavailable, Weights
from trainer.names import IDENTITY_FILE
from trainer.photos.found import Found, Made, Task, masks_of, put_into_verdict
from trainer.photos.subject import (
    SAME,
    STRANGER,
    choose,
    doubts,
    drop_faceless,
    drop_unusable,
    mean,
    not_people,
    of_one_person,
)
from trainer.photos.subprocess_worker import Closed, NotStarted, SubprocessWorker, WorkerCrashed
from trainer.settings import Settings

FIND_SECONDS = 60.0  # for one photo; a third of a second is usual
PREPARE_SECONDS = 120.0  # for one photo, plus RESTORE_SECONDS for each face
RESTORE_SECONDS = 60.0  # for one face; three are usual on a CPU


class PhotoAnalyzer:
    """The child process that analyzes photos, and the requests to it."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._worker_process = SubprocessWorker("trainer.photos.faces", "analyzes photos")

    def warm(self) -> None:
        """Start the child process; its imports take some seconds."""
        self._worker_process.warm()

    def close(self) -> None:
        self._worker_process.close()

    def prepare(
        self,
        folder: Path,
        photos: Sequence[Photo],
        config: TrainConfig,
        name: str,
        restore: bool,
        progress: ProgressCallback = no_progress,
        fetch: bool = True,
    ) -> tuple[list[Photo], list[str]]:
        """Analyze the photos in `folder/images` and write `folder/dataset`; returns verdicts and general warnings.

        name: the class name. restore: `training_face_correct`. fetch: whether missing large weights are downloaded;
        else a warning names them. `progress` may raise, to stop between two photos. Raises AnalysisUnavailable where a
        photo crashes the subprocess.
        """
        photos = [photo.model_copy(deep=True) for photo in photos]
        kept = [photo for photo in photos if not photo.dropped]
        people = kind_of(name) == "person"
        warnings: list[str] = []
        found: dict[str, list[Found]] = {}
        if people:
            found, warnings = self._find(folder / "images", kept, progress)
        subjects = self._judge(kept, found, name, self._same())
        for photo in kept:
            if photo.same_person is False:
                photo.notes.append(f"{STRANGER}: no closeup is made of this face")
        if people and found:
            warnings += drop_faceless(kept, config)
        if restore and not people:
            warnings.append(not_people("training_face_correct", name))
        kept = [photo for photo in kept if not photo.dropped]
        tools, messages = self._tools(config, people, restore and bool(found), fetch, progress)
        warnings += messages
        if not (people or tools or masks_of(config)):
            return photos, warnings
        for number, photo in enumerate(kept):
            progress("photos are prepared", number, len(kept))
            self._make(folder, photo, config, name, found.get(photo.file, []), subjects.get(photo.file, []), tools)
        progress("photos are prepared", len(kept), len(kept))
        return photos, warnings

    def identify(
        self, folder: Path, photos: Sequence[Photo], name: str, progress: ProgressCallback = no_progress
    ) -> tuple[list[Photo], list[str]]:
        """Write the identity of the person in `folder/images` to `folder/model/faceid.safetensors`.

        The identity is the mean over the main faces, of length 1. Returns verdicts and warnings; photos without a face
        or of another person are dropped. name: the class name. `progress` may raise, to stop between two photos. Raises
        InvalidRequest where no photo shows the person's face, AnalysisUnavailable where there is no face detection.
        """
        if not of_one_person(name):
            raise InvalidRequest({"name": [f"a faceid is of one person (man, woman, ...), and {name} is not"]})
        photos = [photo.model_copy(deep=True) for photo in photos]
        kept = [photo for photo in photos if not photo.dropped]
        try:
            detector = weights.obtain(self._settings, weights.DETECTOR, progress=progress)
            recognizer = weights.obtain_identifier(self._settings, progress)
            self._worker_process.start()
        except (Unavailable, NotStarted) as problem:
            raise AnalysisUnavailable(f"face detection is not available: {problem}") from problem
        same = SAME[recognizer.name]
        found = self._detect(folder / "images", kept, detector, recognizer, progress)
        subjects = self._judge(kept, found, name, same)
        warnings = drop_unusable(kept, subjects)
        faces = {photo.file: subjects[photo.file][0] for photo in kept if not photo.dropped}
        if not faces:
            raise InvalidRequest({"images": [f"{photo.name}: {photo.dropped}" for photo in photos]})
        warnings += doubts([photo for photo in kept if photo.file in faces], faces, same)
        if recognizer.name != weights.ARCFACE.name:
            warnings.append(
                f"{weights.ARCFACE.name} is not available here, so {recognizer.name} was used: the published"
                " adapters do not know its identities"
            )
        identity = mean([face.identity or () for face in faces.values()])
        facts = {"recognizer": recognizer.name, "photos": str(len(faces))}
        try:
            self._worker_process.run(FIND_SECONDS, "save_identity", identity, folder / "model" / IDENTITY_FILE, facts)
        except (TimeoutError, WorkerCrashed, NotStarted, OSError, ValueError) as problem:
            message = why_of(problem)
            raise AnalysisUnavailable(f"the identity could not be written: {message}") from problem
        return photos, warnings

    # For rendered pictures and the input pictures of prompts

    def faces(self, picture: Path, progress: ProgressCallback = no_progress) -> list[Found]:
        """The faces of a picture, largest first. Raises AnalysisUnavailable."""
        with self._unavailable("face detection is not available"):
            detector = weights.obtain(self._settings, weights.DETECTOR, progress=progress)
            found: list[Found] = self._worker_process.run(FIND_SECONDS, "find", picture, detector, None)
        return found

    def restore(
        self, picture: Path, faces: Sequence[Found], strength: float, progress: ProgressCallback = no_progress
    ) -> None:
        """Restore faces in a picture's file. strength: as `args restore_strength`. Raises AnalysisUnavailable."""
        with self._unavailable("faces cannot be restored"):
            restorer = weights.obtain(self._settings, weights.RESTORER, progress=progress)
            seconds = FIND_SECONDS + RESTORE_SECONDS * len(faces)
            self._worker_process.run(
                seconds, "trainer.photos.restore:restore_all", picture, list(faces), restorer, strength
            )

    def mask(self, picture: Path, words: str, progress: ProgressCallback = no_progress) -> bytes | None:
        """Mask of what the words name, as PNG, white on black; None: not found. Raises AnalysisUnavailable."""
        with self._unavailable("segmentation by text is not available"):
            segmenter = weights.obtain(self._settings, *weights.SEGMENTER, progress=progress)
            png: bytes | None = self._worker_process.run(
                PREPARE_SECONDS, "trainer.photos.masks:mask_png", picture, words, segmenter
            )
        return png

    @contextmanager
    def _unavailable(self, message: str) -> Iterator[None]:
        """Raise what stops the child process as AnalysisUnavailable, with this message."""
        try:
            yield
        except TimeoutError:
            raise AnalysisUnavailable(f"{message}: it takes too long") from None
        except WorkerCrashed:
            raise AnalysisUnavailable(f"{message}: its process crashed") from None
        except (Unavailable, NotStarted, OSError, RuntimeError) as problem:
            raise AnalysisUnavailable(f"{message}: {problem}") from problem

    def show(self, folder: Path, photo: Photo, config: TrainConfig) -> None:
        """Put previews of the training pictures into a verdict, as data URLs."""
        if photo.dropped:
            return
        with naming(photo):
            self._show(folder / "dataset", folder / "images" / photo.file, photo, config)

    def _show(self, dataset: Path, whole: Path, photo: Photo, config: TrainConfig) -> None:
        stem, mask = whole.stem, dataset / "masks" / config.mask
        better = dataset / "restored" / f"{stem}.jpg"
        photo.seen = self._preview(better if better.exists() else whole, mask / f"{stem}.png", config)
        if photo.cropped:
            closeup = dataset / "faces" / f"{stem}-face.jpg"
            photo.closeup = self._preview(closeup, mask / f"{closeup.stem}.png", config)

    def _preview(self, picture: Path, mask: Path, config: TrainConfig) -> str:
        mask_file = mask if mask.exists() else None
        jpeg = self._worker_process.run(
            FIND_SECONDS, "preview", picture, mask_file, config.resolution[-1], config.buckets
        )
        return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"

    def _find(
        self, images: Path, photos: list[Photo], progress: ProgressCallback
    ) -> tuple[dict[str, list[Found]], list[str]]:
        """File of each photo -> its faces; empty, with a warning, where there is no detector."""
        try:
            detector = weights.obtain(self._settings, weights.DETECTOR, progress=progress)
            recognizer = weights.find_recognizer(self._settings)
            self._worker_process.start()
        except (Unavailable, NotStarted) as problem:
            return {}, [f"face detection was skipped: {problem}"]
        return self._detect(images, photos, detector, recognizer, progress), []

    def _detect(
        self, images: Path, photos: list[Photo], detector: Path, recognizer: Path | None, progress: ProgressCallback
    ) -> dict[str, list[Found]]:
        """File of each photo -> its faces."""
        found = {}
        for number, photo in enumerate(photos):
            progress("faces are detected", number, len(photos))
            with naming(photo):
                found[photo.file] = self._worker_process.run(
                    FIND_SECONDS, "find", images / photo.file, detector, recognizer
                )
        progress("faces are detected", len(photos), len(photos))
        return found

    def _judge(
        self, photos: list[Photo], found: dict[str, list[Found]], name: str, same: float | None
    ) -> dict[str, list[Found]]:
        """Put the faces into the verdicts; returns file of each photo -> the faces of the subject.

        same: the least likeness of two faces of one person; None: not known.
        """
        seen = [photo for photo in photos if photo.file in found]
        subjects, known = choose(seen, [found[photo.file] for photo in seen], name, same)
        for photo, faces, is_same in zip(seen, subjects, known, strict=True):
            photo.faces = [face.in_verdict(main=face in faces and is_same is not False) for face in found[photo.file]]
            photo.same_person = is_same
        return {
            photo.file: [] if is_same is False else faces
            for photo, faces, is_same in zip(seen, subjects, known, strict=True)
        }

    def _same(self) -> float | None:
        recognizer = weights.find_recognizer(self._settings)
        return SAME[recognizer.name] if recognizer else None

    def _tools(
        self, config: TrainConfig, people: bool, restore: bool, fetch: bool, progress: ProgressCallback
    ) -> tuple[dict[str, Path], list[str]]:
        """Purpose -> weights that are needed in addition to the detector; and warnings for missing ones."""
        wanted: dict[str, tuple[Weights, ...]] = {}
        if restore:
            wanted["restorer"] = (weights.RESTORER,)
        if "subject" in masks_of(config):
            wanted |= {"matting": (weights.MATTING,)} if people else {"segmenter": weights.SEGMENTER}
        effect_if_missing = {
            "restorer": "faces are not restored",
            "matting": "no mask of the subject is made and the whole picture is trained",
        }
        effect_if_missing["segmenter"] = effect_if_missing["matting"]
        tools, messages = {}, []
        for tool, files in wanted.items():
            try:
                file = (
                    weights.obtain(self._settings, *files, progress=progress)
                    if fetch
                    else weights.find(self._settings, *files)
                )
                if file:
                    tools[tool] = file
                else:
                    size = round(sum(one.megabytes for one in files))
                    messages.append(f"{files[0].what} is not here yet: {size} MB are fetched when a tune needs it")
            except Unavailable as problem:
                messages.append(f"{effect_if_missing[tool]}: {problem}")
        return tools, messages

    def _make(
        self,
        folder: Path,
        photo: Photo,
        config: TrainConfig,
        name: str,
        faces: list[Found],
        subject: list[Found],
        tools: dict[str, Path],
    ) -> None:
        """Let the child process prepare one photo, and put the result into its verdict."""
        task = Task(
            folder / "images" / photo.file,
            folder / "dataset",
            name,
            faces,
            subject,
            closeup=config.face_set and bool(subject),
            mask_face="face" in masks_of(config) and bool(subject),
            strength=config.restore_strength,
            **tools,
        )
        if not task.empty:
            with naming(photo):
                made: Made = self._worker_process.run(PREPARE_SECONDS + RESTORE_SECONDS * len(faces), "prepare", task)
            put_into_verdict(photo, task, made)
        for kind in sorted(masks_of(config) - set(photo.masks)):
            photo.notes.append(f"no mask of the {kind}: the whole picture is trained")


def why_of(problem: Exception) -> str:
    """The reason of an error of the child process."""
    missing = "there is not enough memory" if isinstance(problem, MemoryError) else "the process gave no reason"
    return str(problem) or missing


@contextmanager
def naming(photo: Photo) -> Iterator[None]:
    """Raise what the child process raises as AnalysisUnavailable, with the photo's name in the message."""
    try:
        yield
    except TimeoutError as problem:
        raise AnalysisUnavailable(f"{photo.name} took too long to analyze; leave it out") from problem
    except WorkerCrashed as problem:
        raise AnalysisUnavailable(f"{photo.name} crashed the process that analyzes photos; leave it out") from problem
    except NotStarted as problem:
        raise AnalysisUnavailable(str(problem)) from problem
    except Closed:
        raise
    except Exception as problem:  # the edge of a process: the child may raise anything
        raise AnalysisUnavailable(f"{photo.name} could not be analyzed: {why_of(problem)}") from problem
