"""Builds and starts everything behind the guard: store, decoder, worker, page."""

from __future__ import annotations

import logging
import sys
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.contract.disk import DiskProblem
from trainer.files import remove, sweep
from trainer.settings import Settings
from trainer.studio.store import InUse, Store

if TYPE_CHECKING:
    from fastapi import FastAPI

log = logging.getLogger("tunebooth")
IN_USE_EXIT_CODE = 75  # EX_TEMPFAIL: another process uses this outputs folder


def check_secrets(settings: Settings) -> None:
    """End the process with a message where the key or the secret of links cannot be read."""
    try:
        settings.check_secrets()
    except RuntimeError as problem:
        sys.exit(f"Tunebooth: {problem}.")


def open_store(outputs: Path) -> Store:
    """The database of an outputs folder.

    If it cannot be opened, the process ends with a message: exit code 75 if another process uses the folder, 1 if the
    database is damaged, is of a newer version, or cannot be read or written.
    """
    try:
        return Store(outputs)
    except InUse as problem:
        print(f"Tunebooth: {problem}. Stop it, or give this one another --outputs.", file=sys.stderr)
        sys.exit(IN_USE_EXIT_CODE)
    except (RuntimeError, DiskProblem) as problem:
        sys.exit(f"Tunebooth: {problem}.")


class Studio:
    """Everything behind the guard. `/health` answers while this is imported and started."""

    def __init__(self, settings: Settings, store: Store, on_device_lost: Callable[[str], object]) -> None:
        """on_device_lost: called with the name of the device after a fatal error of it; the app must restart."""
        from trainer.photos.analysis import PhotoAnalyzer
        from trainer.work.worker import Worker

        self._settings = settings
        self._store = store
        self._analyzer = PhotoAnalyzer(settings)
        self._worker = Worker(settings, store, self._analyzer, on_device_lost)

    def load(self) -> FastAPI:
        """Build the web app."""
        from trainer.photos.decoder import Decoder
        from trainer.studio.deletions import remove_leftovers
        from trainer.studio.expiry import expiry_loop
        from trainer.studio.folders import find_orphans, keep_prompt_numbers, orphans_note
        from trainer.studio.rows import Services
        from trainer.studio.webhooks import WebhookSender
        from trainer.web import page, spool  # `import gradio` takes longest
        from trainer.web.rest import create_app

        keep_prompt_numbers(self._store, self._settings.outputs)
        remove_leftovers(self._settings.outputs, self._store)
        if note := orphans_note(find_orphans(self._store, self._settings.outputs), self._settings.outputs):
            log.warning("%s", note)
        sweep(self._settings.weights)
        self._decoder = Decoder(self._settings)
        self._services = Services(self._settings, self._store, self._decoder, self._analyzer)
        self._webhook_sender = WebhookSender(self._services)
        self._expiry_loop = expiry_loop(self._settings, self._store)
        app = page.mount(create_app(self._services), self._services)
        self._forgetting_loop = spool.forgetting_loop()
        return app

    def begin(self) -> None:
        """Start the worker, after the page is up: the import of torch would delay it."""
        self._decoder.warm()
        self._worker.start()
        self._webhook_sender.start()
        self._expiry_loop.start()
        self._forgetting_loop.start()
        if self._settings.open:
            webbrowser.open(self._settings.base_url)
        if self._settings.demo:
            from trainer.studio.demo import queue_demo

            queue_demo(self._services)

    def close(self) -> None:
        """Requeue a running job after its state is saved, and release the outputs folder."""
        self._worker.stop()
        self._webhook_sender.close()
        self._expiry_loop.close()
        self._forgetting_loop.close()
        remove(self._settings.outputs / "incoming")
        self._analyzer.close()
        self._decoder.close()
        self._store.close()
