"""Intake: uploads and URLs become upright 8-bit sRGB files, decoded in limited child processes.

Decoders have bugs (reference: Pillow's own security handbook); a photo that crashes one ends the child, not the app.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from trainer.contract.disk import as_problems, check_room
from trainer.contract.errors import InvalidRequest
from trainer.contract.photos import Photo, ProgressCallback, Upload, no_progress
from trainer.files import PARTIAL
from trainer.photos.captions import OTHER_NOTE, caption_warnings, pair, write_caption
from trainer.photos.decode import Decoded, alike
from trainer.photos.decoder import CHILDREN, Decoder
from trainer.photos.sorting import Sorted, left_out_notes, sort_uploads
from trainer.photos.unpacking import unpack_zips
from trainer.photos.urls import fetch_all
from trainer.settings import Settings

SAME_PICTURE = "the very same picture as"  # first words of the reason why a duplicate is dropped


@dataclass(frozen=True)
class Taken:
    """The photos of a request. folder: `images/` is in it. warnings: what was left out, and how captions were read."""

    folder: Path
    photos: list[Photo]
    warnings: list[str]


@contextmanager
def intake(
    settings: Settings,
    decoder: Decoder,
    uploads: Sequence[Upload],
    image_urls: list[str],
    progress: ProgressCallback = no_progress,
) -> Iterator[Taken]:
    """Fetch, unpack, check and convert all photos of a request.

    The caller may move the folder; else it is removed at the end. A `.txt` file is the caption of the photo of the same
    base name. Duplicates are kept once. Leftovers of file managers and phones are left out. Raises InvalidRequest that
    names every bad file, DiskProblem.
    """
    check_room(settings.outputs, sum(upload.path.stat().st_size for upload in uploads), "the photos of this request")
    work = settings.outputs / "incoming" / f"{PARTIAL}{uuid.uuid4().hex[:12]}"
    images, fetched, unpacked = work / "images", work / "fetched", work / "unpacked"
    try:
        with as_problems(settings.outputs):
            for folder in (images, fetched, unpacked):
                folder.mkdir(parents=True)
            if image_urls:
                uploads = [*uploads, *fetch_all(settings, image_urls, fetched, progress, zips=True)]
            found = unpack_zips(settings, decoder, sort_uploads(uploads), unpacked, progress)
            photos, warnings = _convert(settings, decoder, found, images, progress)
            for folder in (fetched, unpacked):
                shutil.rmtree(folder, ignore_errors=True)
            yield Taken(work, photos, warnings)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _convert(
    settings: Settings, decoder: Decoder, found: Sorted, folder: Path, progress: ProgressCallback
) -> tuple[list[Photo], list[str]]:
    """The verdicts on the photos, and warnings. Raises InvalidRequest."""
    pictures = found.photos
    paired = pair(pictures, found.captions, found.left_out)

    def convert(number: int) -> Decoded | str:
        """The photo of this number, or why it is refused."""
        try:
            return _take(settings, decoder, pictures[number], paired.mine[number], folder / f"{number:03d}")
        except ValueError as problem:
            return f"{pictures[number].full_name} {problem}"

    answers: list[Decoded | str] = []
    with ThreadPoolExecutor(CHILDREN) as pool:
        for answer in pool.map(convert, range(len(pictures))):
            answers.append(answer)
            progress("photos are decoded", len(answers), len(pictures))
    problems = [answer for answer in answers if isinstance(answer, str)]
    problems += [f"{upload.full_name} is a caption without an image of the same name" for upload in paired.homeless]
    if problems := [*found.refused, *problems, *paired.refused]:
        raise InvalidRequest({"images": problems})
    photos = _name_duplicates([answer for answer in answers if isinstance(answer, Decoded)], folder)
    warnings = left_out_notes([*found.left_out, *paired.left_out])
    return photos, [*warnings, *caption_warnings(photos, paired.shared)]


def _take(settings: Settings, decoder: Decoder, upload: Upload, caption: Upload | None, target: Path) -> Decoded:
    size = upload.path.stat().st_size
    if size == 0:
        raise ValueError("is empty")
    if size > settings.max_image_mb * 2**20:
        raise ValueError(f"has {size / 2**20:.1f} MB; at most {settings.max_image_mb} MB are allowed")
    decoded = decoder.decode(upload.path, target, upload.name)
    if caption:
        write_caption(caption, decoded.photo, target.with_suffix(".txt"))
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
            elif caption.exists() and caption.read_bytes() != of_twin.read_bytes():
                photo.notes.append(f"{OTHER_NOTE} {twin.photo.name}")
            caption.unlink(missing_ok=True)
            continue
        if near := next((other for other in kept if alike(other.look, one.look)), None):
            photo.duplicate_of = near.photo.name
            photo.notes.append(f"looks almost like {near.photo.name}: another view would teach more")
        kept.append(one)
    return [one.photo for one in decoded]
