"""The thread that works: claims a job, runs it, records how it ended. The one broad handler lives here."""

from __future__ import annotations

import logging
import threading

from trainer.photos.looker import Looker
from trainer.settings import Settings
from trainer.studio.store import Store
from trainer.work.errors import explain

log = logging.getLogger("tunebooth.worker")
POLL_SECONDS = 2.0
STORE_RETRY_SECONDS = 10.0


class Worker:
    """One thread, one job at a time, oldest first."""

    def __init__(self, settings: Settings, store: Store, looker: Looker) -> None:
        self._settings = settings
        self._store = store
        self._looker = looker
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="worker", daemon=True)

    def start(self) -> None:
        self._store.recover()
        self._thread.start()

    def stop(self, timeout_s: float = 60.0) -> None:
        """Finish the current step, save its state and end; the job goes on at the next start."""
        self._stopping.set()
        self._store.changed.set()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        bench = None
        try:
            # The slow imports, before anybody waits for them.
            from diffusers.utils import logging as diffusers_logging
            from transformers.utils import logging as transformers_logging

            from trainer.device import leave_a_core_free, pick_device
            from trainer.work.bench import Bench

            for library in (diffusers_logging, transformers_logging):  # the page has a progress bar of its own
                library.disable_progress_bar()
                library.set_verbosity_error()

            leave_a_core_free()
            device = pick_device(self._settings.device)
            bench = Bench(self._settings, self._store, self._looker, device, self._stopping)
        except Exception as error:
            log.exception("nothing can be trained here")
            unable = f"nothing can be trained here: {explain(error)}"
        while not self._stopping.is_set():
            self._store.changed.clear()
            try:
                job = self._store.claim()
                if job is None:
                    self._store.changed.wait(POLL_SECONDS)
                elif bench is None:
                    self._store.finish(job, "failed", error=unable)
                else:
                    bench.run(job)
            except Exception:  # the store itself: a full disk, for one; the job is still in it
                log.exception("the state of a job could not be stored; trying again")
                self._stopping.wait(STORE_RETRY_SECONDS)
