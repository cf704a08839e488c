"""The files that the page and the Gradio API upload: in a private folder of ours, and no longer than they are needed.

Gradio by itself keeps them in the system's folder for temporary files, for a day, each under a name that is made of its
content: two users with the same photo would share one file. Here each upload has a folder of its own, so that a file
can go when it is taken in, or when it leaves the form.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import gradio as gr
from fastapi import FastAPI, Request
from gradio.route_utils import upload_fn
from gradio.routes import file_upload_statuses
from gradio.utils import get_upload_folder
from starlette.formparsers import MultiPartException
from starlette.responses import JSONResponse, PlainTextResponse, Response

from trainer.clock import Loop
from trainer.contract.errors import InvalidRequest
from trainer.contract.photos import Upload
from trainer.files import remove

LOOK_SECONDS = 60.0
UNUSED_SECONDS = 3600.0
GONE = "is not here any more: an upload is kept for an hour after its last use; choose the file again"


def take_over(outputs: Path) -> None:
    """Make the private folder and set it as the folder of Gradio, before any part of the page is built."""
    folder = outputs.resolve() / "incoming" / "gradio"
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    os.environ.update(GRADIO_TEMP_DIR=str(folder))


def add_route(app: FastAPI, max_bytes: int) -> None:
    """Take uploads in place of Gradio's own route: each into a folder of its own, whose name cannot be guessed.

    max_bytes: of one file.
    """

    @app.post("/gradio_api/upload", include_in_schema=False)
    async def upload(request: Request, upload_id: str | None = None) -> Response:
        folder = Path(get_upload_folder()) / secrets.token_hex(16)
        status = file_upload_statuses if upload_id else None  # of the progress bar
        files = None
        try:
            files, _, _ = await upload_fn(request, str(folder), max_bytes, upload_id, upload_progress=status)
        except MultiPartException as problem:
            return PlainTextResponse(problem.message, 413 if "maximum allowed size" in problem.message else 400)
        finally:
            if files is None:  # it is too large, or the client has left
                remove(folder)
        return JSONResponse([str(file) for file in files])


def forget(paths: Iterable[Path | str]) -> None:
    """Remove uploads: they were taken in, or removed from the form. What is no upload stays."""
    for path in _uploads(paths):
        path.unlink(missing_ok=True)
        for folder in path.parents:
            if not _is_below(folder):
                break
            with suppress(OSError):  # others are in it
                folder.rmdir()


def note_use(paths: Iterable[Path | str]) -> None:
    """These uploads are needed for another hour."""
    for path in _uploads(paths):
        with suppress(FileNotFoundError):
            os.utime(path)


def check_uploads(field: str, uploads: Iterable[Upload]) -> None:
    """Note that uploads are used. field: that they are in. Raises InvalidRequest for missing ones."""
    sent = list(uploads)
    note_use(upload.path for upload in sent)
    if gone := [f"{upload.name} {GONE}" for upload in sent if not upload.path.is_file()]:
        raise InvalidRequest({field: gone})


def forget_removed(field: gr.File) -> None:
    """Remove a file when it leaves this field of the page. Called where the field is placed."""
    held = gr.State([])

    def changed(value: list[str] | str | None, before: list[str]) -> list[str]:
        now = [value] if isinstance(value, str) else value or []
        forget(set(before) - set(now))
        note_use(now)
        return now

    # Of one field's changes the browser sends the next when the one before is done: the order is kept.
    field.change(changed, [field, held], held, queue=False, show_progress="hidden", api_visibility="private")


def forgetting_loop() -> Loop:
    """A thread that removes uploads that were not used for an hour."""
    folder = Path(get_upload_folder())
    return Loop("uploads", LOOK_SECONDS, lambda: forget_unused(folder))


def forget_unused(folder: Path) -> None:
    """Remove the uploads that were last used an hour ago, and the empty files that Gradio makes at each event."""
    for path in sorted(folder.rglob("*"), reverse=True):  # what is in a folder comes before it
        with suppress(OSError):  # another thread was faster, or a folder is not empty
            age = time.time() - path.stat().st_mtime
            if path.is_dir():
                if age > LOOK_SECONDS:
                    path.rmdir()
            elif age > (LOOK_SECONDS if path.parent == folder else UNUSED_SECONDS):
                path.unlink()
            elif age < 0:  # the clock was set back: the hour begins now
                os.utime(path)


def _uploads(paths: Iterable[Path | str]) -> list[Path]:
    return [path for path in (Path(path).resolve() for path in paths) if _is_below(path)]


def _is_below(path: Path) -> bool:
    folder = Path(get_upload_folder()).resolve()
    return path != folder and path.is_relative_to(folder)
