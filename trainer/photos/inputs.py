"""Input pictures of prompts: uploads and URLs -> upright RGB files."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from trainer.contract.errors import InvalidRequest
from trainer.contract.photos import ProgressCallback, Upload, no_progress
from trainer.contract.prompts import PICTURES, PromptRequest
from trainer.files import PARTIAL, fsync, move_folder
from trainer.photos.decoder import Decoder
from trainer.photos.urls import fetch_all
from trainer.settings import Settings


@contextmanager
def fetch_inputs(
    settings: Settings,
    decoder: Decoder,
    requests: Sequence[PromptRequest],
    within: str | None = None,
    progress: ProgressCallback = no_progress,
) -> Iterator[dict[int, Path]]:
    """Fetch and decode the pictures of prompts; yields number of the request -> folder with `input_image.*` and so on.

    The caller keeps a folder with `move_into_place`; the others are removed at the end. within: the parameter that has
    the list of requests, for messages; None: there is one request. Raises InvalidRequest that names every bad picture.
    """
    wanted = [(number, name) for number, one in enumerate(requests) for name in PICTURES if of(one, name) is not None]
    if not wanted:
        yield {}
        return
    work = settings.outputs / "incoming" / f"{PARTIAL}{uuid.uuid4().hex[:12]}"
    problems: dict[str, list[str]] = {}
    try:
        for number, name in wanted:
            folder = work / str(number)
            folder.mkdir(parents=True, exist_ok=True)
            given = of(requests[number], name)
            field = f"{name}_url" if isinstance(given, str) else name
            try:
                upload = _upload(settings, given, folder, progress)
                decoder.decode(upload.path, folder / name, upload.name)
            except InvalidRequest as invalid:
                message = "; ".join(one for all_ in invalid.problems.values() for one in all_)
            except ValueError as problem:
                message = f"{upload.name} {problem}"
            else:
                message = ""
            if message:
                problems.setdefault(within or field, []).append(f"{number}.{field}: {message}" if within else message)
            shutil.rmtree(folder / "fetched", ignore_errors=True)
        if problems:
            raise InvalidRequest(problems)
        yield {number: work / str(number) for number, _ in wanted}
    finally:
        shutil.rmtree(work, ignore_errors=True)


def of(request: PromptRequest, name: str) -> Upload | str | None:
    """A picture of a request: an upload, or a URL."""
    given: Upload | str | None = getattr(request, name)
    return getattr(request, f"{name}_url") if given is None else given


def _upload(settings: Settings, given: Upload | str | None, folder: Path, progress: ProgressCallback) -> Upload:
    if isinstance(given, str):
        (folder / "fetched").mkdir()
        return fetch_all(settings, [given], folder / "fetched", progress)[0]
    assert given is not None, "only pictures of the request are fetched"
    size = given.path.stat().st_size
    if size > settings.max_image_mb * 2**20:
        raise ValueError(f"has {size / 2**20:.1f} MB; at most {settings.max_image_mb} MB are allowed")
    return given


def move_into_place(folder: Path, target: Path) -> None:
    """Move a folder of pictures to its final place."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(target, ignore_errors=True)  # left by a crash before the commit; its number is used again
    for path in folder.iterdir():
        fsync(path)
    move_folder(folder, target)
    fsync(target.parent)


def find(folder: Path, name: str) -> Path | None:
    """A picture of a prompt; None: it has none. folder: of its pictures."""
    return next(folder.glob(f"{name}.*"), None)
