"""The worker thread: claims a job, runs it, and waits for the next one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from trainer.clock import Loop
from trainer.contract.disk import DiskProblem
from trainer.photos.analysis import PhotoAnalyzer
from trainer.settings import Settings
from trainer.studio.store import Job, Store
from trainer.work.device_errors import DeviceLost
from trainer.work.errors import explain
from trainer.work.hold import Hold

if TYPE_CHECKING:
    from trainer.work.job_runner import JobRunner

log = logging.getLogger("tunebooth.worker")
POLL_SECONDS = 2.0
STORE_RETRY_SECONDS = 10.0


class Worker:
    """One thread, one job at a time, oldest first."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        analyzer: PhotoAnalyzer,
        on_device_lost: Callable[[str], object] = lambda device: None,
    ) -> None:
        """on_device_lost: called with the name of the device after a fatal error of it. The worker stops then."""
        self._settings = settings
        self._store = store
        self._analyzer = analyzer
        self._on_device_lost = on_device_lost
        self._runner: JobRunner | None = None
        self._unable = ""
        self._hold = Hold(store)
        self._recovered = False
        self._loop = Loop("worker", POLL_SECONDS, self._work, wake=store.changed, retry_seconds=STORE_RETRY_SECONDS)

    def start(self) -> None:
        try:
            self._recover()
        except DiskProblem as problem:
            self._hold.begin(problem, None)
        self._loop.start()

    def stop(self, timeout_s: float = 60.0) -> None:
        """Finish the current step, save its state and end; the job resumes at the next start."""
        self._loop.close(timeout_s)

    def _work(self) -> None:
        """Run all queued jobs, unless the queue is on hold."""
        if not self._hold.is_over():
            return
        job: Job | None = None
        try:
            self._recover()
            if self._runner is None and not self._unable:
                self._set_up()
            while not self._loop.stopping.is_set() and (job := self._store.claim()):
                if self._runner is None:
                    self._store.finish(job, "failed", error=self._unable)
                else:
                    self._run(self._runner, job)
                self._hold.note_end()
                job = None
        except DiskProblem as problem:
            self._hold.begin(problem, job)

    def _run(self, runner: JobRunner, job: Job) -> None:
        try:
            runner.run(job)
        except DeviceLost as lost:
            self._loop.stopping.set()  # every other job would fail in this process
            self._on_device_lost(str(lost))

    def _recover(self) -> None:
        """Once: queue the jobs again that ran when an earlier process ended."""
        if not self._recovered:
            self._store.recover()
            self._recovered = True

    def _set_up(self) -> None:
        """Do the slow imports before the first job, and choose the device."""
        try:
            from diffusers.utils import logging as diffusers_logging
            from transformers.utils import logging as transformers_logging

            from trainer.device import leave_a_core_free, pick_device
            from trainer.work.job_runner import JobRunner

            for library in (diffusers_logging, transformers_logging):  # the page has its own progress bar
                library.disable_progress_bar()
                library.set_verbosity_error()

            leave_a_core_free()
            device = pick_device(self._settings.device)
            self._runner = JobRunner(self._settings, self._store, self._analyzer, device, self._loop.stopping)
        except Exception as error:  # the edge of a thread: a broken driver or library raises any error
            log.exception("no usable device")
            self._unable = f"no usable device: {explain(error)}"
