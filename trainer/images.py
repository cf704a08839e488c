"""Intake: uploads and URLs become upright 8-bit sRGB files, decoded in a limited child process.

Decoders have bugs (reference: Pillow's own security handbook); a photo that breaks one costs that child, not the app.
"""

from __future__ import annotations

import multiprocessing
import shutil
import threading
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from trainer import decode
from trainer.files import PARTIAL
from trainer.schema import InvalidRequest, Photo, Upload
from trainer.settings import Settings
from trainer.urls import fetch_all

MAX_CAPTION_BYTES = 10_000
START_SECONDS = 120.0  # for the child: some imports, on a machine that may be busy


class Decoder:
    """One long-lived child process that decodes photos, with limits of memory and time."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._pool: ProcessPoolExecutor | None = None

    def warm(self) -> None:
        """Start the child, so that the first request need not wait for it."""
        threading.Thread(target=self._start, daemon=True).start()

    def _start(self) -> None:
        with self._lock:
            self._running()

    def close(self) -> None:
        with self._lock:
            self._stop()

    def decode(self, source: Path, target: Path, name: str) -> Photo:
        """Write `source` as an upright RGB file, `target` with a suffix. Raises ValueError saying what is wrong."""
        with self._lock:
            for _ in range(2):  # the child may have been killed while it was idle, which is not this photo's fault
                try:
                    future = self._running().submit(
                        decode.decode, source, target, name, self._settings.max_megapixels * 1_000_000
                    )
                    return future.result(timeout=self._settings.decode_seconds)
                except TimeoutError:
                    self._stop()
                    raise ValueError(f"could not be decoded within {self._settings.decode_seconds:g} s") from None
                except BrokenProcessPool:
                    self._stop()
                except MemoryError:
                    raise ValueError("needs too much memory to be decoded") from None
            raise ValueError("broke the decoder; it is damaged, or made to do so")

    def _running(self) -> ProcessPoolExecutor:
        """The child, which has its own time to start: on a busy machine that may take longer than a photo may."""
        if self._pool is None:
            self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=decode.limit)
            try:
                self._pool.submit(decode.warm).result(timeout=START_SECONDS)
            except TimeoutError:
                self._stop()
                raise RuntimeError(
                    f"the process that decodes photos did not start within {START_SECONDS:g} s"
                ) from None
        return self._pool

    def _stop(self) -> None:
        if self._pool is not None:
            for process in list((self._pool._processes or {}).values()):
                process.kill()  # one that hangs in a decoder hears nothing gentler
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None


@contextmanager
def intake(
    settings: Settings, decoder: Decoder, uploads: Sequence[Upload], image_urls: list[str]
) -> Iterator[tuple[Path, list[Photo]]]:
    """Fetch, check and convert all photos of a request; yields a folder with `images/` in it, and the verdicts.

    The folder is the caller's to rename away; whatever is left of it at the end is removed. `.txt` files are captions,
    paired with the photo of the same base name. Raises InvalidRequest naming every bad file.
    """
    work = settings.outputs / "incoming" / f"{PARTIAL}{uuid.uuid4().hex[:12]}"
    images, fetched = work / "images", work / "fetched"
    images.mkdir(parents=True)
    try:
        if image_urls:
            fetched.mkdir()
            uploads = [*uploads, *fetch_all(settings, image_urls, fetched)]
        photos = _convert(settings, decoder, uploads, images)
        shutil.rmtree(fetched, ignore_errors=True)
        yield work, photos
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _convert(settings: Settings, decoder: Decoder, uploads: Sequence[Upload], folder: Path) -> list[Photo]:
    captions = {PurePosixPath(u.name).stem: u for u in uploads if u.name.lower().endswith(".txt")}
    photos, problems = [], []
    pictures = [upload for upload in uploads if not upload.name.lower().endswith(".txt")]
    if not pictures:
        problems.append("must contain at least one image")
    if len(pictures) > settings.max_images:
        problems.append(f"must contain at most {settings.max_images} images, got {len(pictures)}")
        pictures = []
    for number, upload in enumerate(pictures):
        size = upload.path.stat().st_size
        try:
            if size == 0:
                raise ValueError("is empty")
            if size > settings.max_image_mb * 2**20:
                raise ValueError(f"has {size / 2**20:.1f} MB; at most {settings.max_image_mb} MB are allowed")
            target = folder / f"{number:03d}"
            photos.append(decoder.decode(upload.path, target, upload.name))
            if caption := captions.pop(PurePosixPath(upload.name).stem, None):
                target.with_suffix(".txt").write_text(_caption(caption), "utf-8")
        except ValueError as problem:
            problems.append(f"{upload.name} {problem}")
    problems += [f"{upload.name} is a caption without an image of the same name" for upload in captions.values()]
    if problems:
        raise InvalidRequest({"images": problems})
    return photos


def _caption(upload: Upload) -> str:
    data = upload.path.read_bytes()
    if len(data) > MAX_CAPTION_BYTES:
        raise ValueError(f"has a caption of more than {MAX_CAPTION_BYTES} bytes")
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise ValueError("has a caption that is not UTF-8 text") from None
