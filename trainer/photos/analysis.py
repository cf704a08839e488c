"""What is seen in photos, and what is made of them before training: faces, closeups, restored faces, masks, verdicts.

The looking itself happens in a child process (`faces.py`), so that a model that breaks costs no app, and so that photos
can be checked while a tune trains. Here it is decided what is asked for, and what the answers mean. No torch.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from trainer.config.kinds import kind_of
from trainer.config.train_config import TrainConfig
from trainer.contract.errors import AnalysisUnavailable, InvalidRequest
from trainer.contract.photos import Face, Photo, ProgressCallback, no_progress
from trainer.contract.run_files import NAMES
from trainer.files import Unreadable, printable, read_json, write_whole
from trainer.library import weights
from trainer.library.weights import Unavailable, Weights
from trainer.names import IDENTITY_FILE
from trainer.photos.found import Found, Made, Task, masks_of, put_down
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

FIND_SECONDS = 60.0  # of one photo; a third of a second is usual
PREPARE_SECONDS = 120.0  # and for each face that is restored some more
RESTORE_SECONDS = 60.0  # three are usual on a CPU
MADE = ("restored", "faces", "masks")  # folders of `dataset/`


class PhotoAnalyzer:
    """The child process that analyzes photos, and what is asked of it."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._worker_process = SubprocessWorker("trainer.photos.faces", "analyzes photos")

    def warm(self) -> None:
        """Start the child: its imports take some seconds."""
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
        """Look at the photos of `folder/images` and write `folder/dataset`; the verdicts, and warnings for all.

        name: the class name. restore: `training_face_correct`. fetch: whether large weights that are missing are
        fetched; else a warning says that they would be. `progress` may raise, to stop between two
        photos. Raises AnalysisUnavailable where a photo crashes the subprocess.
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
        """Look at the photos of `folder/images` and write who is on them to `folder/model/faceid.safetensors`.

        That is the mean of the identities of the main faces, of length 1. Returns the verdicts and what to warn of;
        photos without a face, and those of another person, are dropped. name: the class name. `progress` may raise, to
        stop between two photos. Raises InvalidRequest where no photo shows who it is, AnalysisUnavailable
        where face detection is not available.
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
        found = self._look(folder / "images", kept, detector, recognizer, progress)
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
            message = str(problem) or type(problem).__name__
            raise AnalysisUnavailable(f"the identity could not be written: {message}") from problem
        return photos, warnings

    # Of pictures that were rendered, or that a prompt starts from

    def faces(self, picture: Path, progress: ProgressCallback = no_progress) -> list[Found]:
        """The faces of a picture, largest first. Raises CannotLook."""
        with self._able("face detection is not available"):
            detector = weights.obtain(self._settings, weights.DETECTOR, progress=progress)
            found: list[Found] = self._worker_process.run(FIND_SECONDS, "find", picture, detector, None)
        return found

    def restore(
        self, picture: Path, faces: Sequence[Found], strength: float, progress: ProgressCallback = no_progress
    ) -> None:
        """Restore these faces of a picture, in its file; strength: as `args restore_strength`. Raises CannotLook."""
        with self._able("faces cannot be restored"):
            restorer = weights.obtain(self._settings, weights.RESTORER, progress=progress)
            seconds = FIND_SECONDS + RESTORE_SECONDS * len(faces)
            self._worker_process.run(
                seconds, "trainer.photos.restore:restore_all", picture, list(faces), restorer, strength
            )

    def mask(self, picture: Path, words: str, progress: ProgressCallback = no_progress) -> bytes | None:
        """A PNG of where the thing of this name is in a picture, white on black; None: nowhere. Raises CannotLook."""
        with self._able("segmentation by text is not available"):
            segmenter = weights.obtain(self._settings, *weights.SEGMENTER, progress=progress)
            png: bytes | None = self._worker_process.run(
                PREPARE_SECONDS, "trainer.photos.masks:mask_png", picture, words, segmenter
            )
        return png

    @contextmanager
    def _able(self, otherwise: str) -> Iterator[None]:
        """What keeps the child process from working."""
        try:
            yield
        except TimeoutError:
            raise AnalysisUnavailable(f"{otherwise}: it takes too long") from None
        except WorkerCrashed:
            raise AnalysisUnavailable(f"{otherwise}: its process crashed") from None
        except (Unavailable, NotStarted, OSError, RuntimeError) as problem:
            raise AnalysisUnavailable(f"{otherwise}: {problem}") from problem

    def show(self, folder: Path, photo: Photo, config: TrainConfig) -> None:
        """Put pictures of what the trainer sees into a verdict, as data URLs."""
        if photo.dropped:
            return
        with breaking(photo):
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
        """The faces of each photo by its file; nothing, and why, where there is no detector."""
        try:
            detector = weights.obtain(self._settings, weights.DETECTOR, progress=progress)
            recognizer = weights.find_recognizer(self._settings)
            self._worker_process.start()
        except (Unavailable, NotStarted) as problem:
            return {}, [f"face detection was skipped: {problem}"]
        return self._look(images, photos, detector, recognizer, progress), []

    def _look(
        self, images: Path, photos: list[Photo], detector: Path, recognizer: Path | None, progress: ProgressCallback
    ) -> dict[str, list[Found]]:
        """The faces of each photo by its file."""
        found = {}
        for number, photo in enumerate(photos):
            progress("faces are detected", number, len(photos))
            with breaking(photo):
                found[photo.file] = self._worker_process.run(
                    FIND_SECONDS, "find", images / photo.file, detector, recognizer
                )
        progress("faces are detected", len(photos), len(photos))
        return found

    def _judge(
        self, photos: list[Photo], found: dict[str, list[Found]], name: str, same: float | None
    ) -> dict[str, list[Found]]:
        """Put the faces into the verdicts; returns those of each photo that are the subject.

        same: the likeness from which two faces are one person; None: not known.
        """
        seen = [photo for photo in photos if photo.file in found]
        subjects, known = choose(seen, [found[photo.file] for photo in seen], name, same)
        for photo, faces, is_same in zip(seen, subjects, known, strict=True):
            photo.faces = [
                Face(
                    box=tuple(round(side) for side in face.box),  # type: ignore[arg-type]
                    score=round(face.score, 3),
                    sharpness=round(face.sharpness, 1),
                    main=face in faces and is_same is not False,
                )
                for face in found[photo.file]
            ]
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
        """The weights that are needed beside the detector, by what they do, and what lacks."""
        wanted: dict[str, tuple[Weights, ...]] = {}
        if restore:
            wanted["restorer"] = (weights.RESTORER,)
        if "subject" in masks_of(config):
            wanted |= {"matting": (weights.MATTING,)} if people else {"segmenter": weights.SEGMENTER}
        lost = {
            "restorer": "faces are not restored",
            "matting": "no mask of the subject is made and the whole picture is trained",
        }
        lost["segmenter"] = lost["matting"]
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
                messages.append(f"{lost[tool]}: {problem}")
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
        """Let the child make what is wanted of one photo, and put down what came of it."""
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
            with breaking(photo):
                made: Made = self._worker_process.run(PREPARE_SECONDS + RESTORE_SECONDS * len(faces), "prepare", task)
            put_down(photo, task, made)
        for kind in sorted(masks_of(config) - set(photo.masks)):
            photo.notes.append(f"no mask of the {kind}: the whole picture is trained")


def begin_anew(dataset: Path) -> None:
    """Remove what an earlier preparation made, which did not come to its end, and keep what a user has put there."""
    if dataset.exists() and not dataset.is_dir():
        raise Unreadable("dataset in the tune's folder is a file, where a folder should be; move it away")
    dataset.mkdir(exist_ok=True)
    note = dataset / "preparing.json"  # what was there before the first preparation
    there = [file for kind in MADE for file in sorted((dataset / kind).rglob("*")) if file.is_file()]
    names = {file: printable(str(file.relative_to(dataset))) for file in there}
    if not note.exists():
        write_whole(note, json.dumps(list(names.values())))
        return
    try:
        kept = read_json(note, NAMES)
    except Unreadable as problem:
        message = "It names the masks of your own: delete dataset in the tune's folder, put them back and resume"
        raise Unreadable(f"{problem}. {message}") from None
    for file, name in names.items():
        if name not in kept:
            file.unlink()


@contextmanager
def breaking(photo: Photo) -> Iterator[None]:
    """What a photo may do to the child process, with its name in the message."""
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
    except Exception as problem:  # the edge of a process: whatever was raised in the child
        raise AnalysisUnavailable(
            f"{photo.name} could not be analyzed: {str(problem) or type(problem).__name__}"
        ) from problem
