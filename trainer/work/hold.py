"""The queue on hold: while the disk is full or the database is locked, jobs wait instead of failing."""

from __future__ import annotations

import logging
import time

from trainer.contract.disk import DiskProblem, check_room
from trainer.studio.store import Job, Store

log = logging.getLogger("tunebooth.worker")
LOOK_SECONDS = 2.0  # between two checks
MOST_DOUBLINGS = 7  # of that, if the check finds no problem and the job fails in the same way again


class Hold:
    """Why the queue waits, and until when. `store.hold` has the reason for answers, page and /health."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._problem: DiskProblem | None = None
        self._met: Job | None = None  # the job that failed
        self._job: Job | None = None  # the same job, until it is back in the queue
        self._next_look = 0.0  # of the monotonic clock
        self._seen = False  # whether a check found the problem
        self._unseen = 0  # consecutive holds in which no check found it

    def begin(self, problem: DiskProblem, job: Job | None) -> None:
        """Start to wait. job: the one that failed, if any; it goes back to its place in the queue."""
        self._problem, self._met, self._job, self._seen = problem, job, job, False
        self._next_look = time.monotonic() + LOOK_SECONDS * 2**self._unseen
        self._tell(problem)
        log.warning("%s", self._store.hold)
        try:
            self._put_back()
        except DiskProblem:  # the database cannot be written either: try at the next check
            self._seen = True

    def is_over(self) -> bool:
        """Whether the queue may continue. While it waits, this checks again every few seconds."""
        if self._problem is None:
            return True
        if time.monotonic() < self._next_look:
            return False
        self._next_look = time.monotonic() + LOOK_SECONDS
        try:
            self._put_back()
            # A canceled or deleted job does not block the others; each checks its own need when it begins.
            if self._problem.full and (self._met is None or self._store.is_queued(self._met)):
                what = self._problem.what or "what is to be written"
                check_room(self._problem.folder, self._problem.needed, what)
        except DiskProblem as problem:
            self._seen = True
            self._tell(problem)
            return False
        self._unseen = 0 if self._seen else min(self._unseen + 1, MOST_DOUBLINGS)
        self._problem, self._store.hold = None, ""
        log.info("the queue goes on")
        return True

    def note_end(self) -> None:
        """A job has ended without a disk problem."""
        self._unseen = 0

    def _put_back(self) -> None:
        """Put the job back into the queue. Raises DiskProblem."""
        if self._job is None:
            return
        if self._store.cancel_wanted(*self._job.target):
            self._store.finish(self._job, "canceled")
        else:
            self._store.put_back(self._job)
        self._job = None

    def _tell(self, problem: DiskProblem) -> None:
        usual = (
            "Delete tunes or other files there; it goes on by itself" if problem.full else "It tries again by itself"
        )
        self._store.hold = f"The queue waits: {problem}. {problem.remedy or usual}."
