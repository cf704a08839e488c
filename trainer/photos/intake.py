"""Intake: uploads and URLs become upright 8-bit sRGB files, decoded in limited child processes.

Decoders have bugs (reference: Pillow's own security handbook); a photo that crashes one ends the child, not the app.
"""

from __future__ import annotations

import queue
import shutil
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from trainer.contract.disk import as_problems, check_room
from trainer.contract.errors import AnalysisUnavailable, InvalidRequest
from trainer.contract.photos import Photo, ProgressCallback, Upload, no_progress
from trainer.files import PARTIAL
from trainer.photos.decode import Decoded, alike
from trainer.photos.subprocess_worker import NotStarted, SubprocessWorker, WorkerCrashed
from trainer.photos.urls import fetch_all
from trainer.settings import Settings

MAX_CAPTION_BYTES = 10_000
SAME_PICTURE = "the very same picture as"  # first words of the reason why a duplicate is dropped
CHILDREN = 2  # one photo each at a time; more would take cores from training


class Decoder:
    """The child processes that decode photos, with limits of memory and time."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._worker_processes = [SubprocessWorker("trainer.photos.decode", "decodes photos") for _ in range(CHILDREN)]
        # Last in, first out: the one that worked last is in memory.
        self._free: queue.LifoQueue[SubprocessWorker] = queue.LifoQueue()
        for child in self._worker_processes:
            self._free.put(child)

    def warm(self) -> None:
        """Start the child processes, so that the first request does not wait for them."""
        for child in self._worker_processes:
            child.warm()

    def close(self) -> None:
        for child in self._worker_processes:
            child.close()

    def decode(self, source: Path, target: Path, name: str) -> Decoded:
        """Write `source` as an upright RGB file, `target` plus suffix. Raises ValueError with the reason."""
        seconds, child = self._settings.decode_seconds, self._free.get()
        try:
            decoded: Decoded = child.run(
                seconds, "decode", source, target, name, self._settings.max_megapixels * 1_000_000
            )
        except TimeoutError:
            raise ValueError(f"could not be decoded within {seconds:g} s") from None
        except MemoryError:
            raise ValueError("needs too much memory to be decoded") from None
        except NotStarted as problem:
            raise AnalysisUnavailable(str(problem)) from problem
        except WorkerCrashed:
            raise ValueError("crashed the image decoder; it is damaged, or made to do so") from None
        finally:
            self._free.put(child)
        return decoded


@contextmanager
def intake(
    settings: Settings,
    decoder: Decoder,
    uploads: Sequence[Upload],
    image_urls: list[str],
    progress: ProgressCallback = no_progress,
) -> Iterator[tuple[Path, list[Photo]]]:
    """Fetch, check and convert all photos of a request; yields a folder with `images/` in it, and the verdicts.

    The caller may move the folder; else it is removed at the end. A `.txt` file is the caption of the photo of the same
    base name. Duplicates are kept once. Raises InvalidRequest that names every bad file, DiskProblem.
    """
    check_room(settings.outputs, sum(upload.path.stat().st_size for upload in uploads), "the photos of this request")
    work = settings.outputs / "incoming" / f"{PARTIAL}{uuid.uuid4().hex[:12]}"
    images, fetched = work / "images", work / "fetched"
    try:
        with as_problems(settings.outputs):
            images.mkdir(parents=True)
            if image_urls:
                fetched.mkdir()
                uploads = [*uploads, *fetch_all(settings, image_urls, fetched, progress)]
            photos = _convert(settings, decoder, uploads, images, progress)
            shutil.rmtree(fetched, ignore_errors=True)
            yield work, photos
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _convert(
    settings: Settings, decoder: Decoder, uploads: Sequence[Upload], folder: Path, progress: ProgressCallback
) -> list[Photo]:
    captions = {PurePosixPath(u.name).stem: u for u in uploads if u.name.lower().endswith(".txt")}
    pictures = [upload for upload in uploads if not upload.name.lower().endswith(".txt")]
    if not pictures:
        raise InvalidRequest({"images": ["must contain at least one image"]})
    if len(pictures) > settings.max_images:
        problem = f"must contain at most {settings.max_images} images, got {len(pictures)}"
        raise InvalidRequest({"images": [problem]})
    mine = [captions.pop(PurePosixPath(upload.name).stem, None) for upload in pictures]

    def convert(number: int) -> Decoded | str:
        """The photo of this number, or why it is refused."""
        try:
            return _take(settings, decoder, pictures[number], mine[number], folder / f"{number:03d}")
        except ValueError as problem:
            return f"{pictures[number].name} {problem}"

    answers: list[Decoded | str] = []
    with ThreadPoolExecutor(CHILDREN) as pool:
        for answer in pool.map(convert, range(len(pictures))):
            answers.append(answer)
            progress("photos are decoded", len(answers), len(pictures))
    problems = [answer for answer in answers if isinstance(answer, str)]
    problems += [f"{upload.name} is a caption without an image of the same name" for upload in captions.values()]
    if problems:
        raise InvalidRequest({"images": problems})
    return _name_duplicates([answer for answer in answers if isinstance(answer, Decoded)], folder)


def _take(settings: Settings, decoder: Decoder, upload: Upload, caption: Upload | None, target: Path) -> Decoded:
    size = upload.path.stat().st_size
    if size == 0:
        raise ValueError("is empty")
    if size > settings.max_image_mb * 2**20:
        raise ValueError(f"has {size / 2**20:.1f} MB; at most {settings.max_image_mb} MB are allowed")
    decoded = decoder.decode(upload.path, target, upload.name)
    if caption:
        target.with_suffix(".txt").write_text(_caption(caption), "utf-8")
    return decoded


def _name_duplicates(decoded: list[Decoded], folder: Path) -> list[Photo]:
    """Keep the first of identical pictures, and note which photos look almost alike."""
    kept: list[Decoded] = []
    for one in decoded:
        photo = one.photo
        if twin := next((other for other in kept if other.digest == one.digest), None):
            photo.duplicate_of = twin.photo.name
            photo.dropped = f"{SAME_PICTURE} {twin.photo.name}, which is trained"
            (folder / photo.file).unlink()
            caption, of_twin = ((folder / file).with_suffix(".txt") for file in (photo.file, twin.photo.file))
            if caption.exists() and not of_twin.exists():
                caption.rename(of_twin)
            caption.unlink(missing_ok=True)
            continue
        if near := next((other for other in kept if alike(other.look, one.look)), None):
            photo.duplicate_of = near.photo.name
            photo.notes.append(f"looks almost like {near.photo.name}: another view would teach more")
        kept.append(one)
    return [one.photo for one in decoded]


def _caption(upload: Upload) -> str:
    data = upload.path.read_bytes()
    if len(data) > MAX_CAPTION_BYTES:
        raise ValueError(f"has a caption of more than {MAX_CAPTION_BYTES} bytes")
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise ValueError("has a caption that is not UTF-8 text") from None
