"""The queue on hold: a disk that takes nothing more, or a database in use, makes jobs wait and fails none of them."""

from __future__ import annotations

import logging
import time

from trainer.disk import DiskProblem, check_room
from trainer.studio.store import Job, Store

log = logging.getLogger("tunebooth.worker")
LOOK_SECONDS = 2.0  # between two looks whether the queue may go on
MOST_DOUBLINGS = 7  # of that, where looking shows nothing wrong and the job meets the same problem again


class Hold:
    """Why the queue waits, and until when. `store.hold` says it to the answers, the page and /health."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._problem: DiskProblem | None = None
        self._met: Job | None = None  # the job that met it
        self._job: Job | None = None  # the same, until it is back at its place in the queue
        self._next_look = 0.0  # of the monotonic clock
        self._seen = False  # whether a look has shown the problem
        self._unseen = 0  # holds in a row that ended without

    def begin(self, problem: DiskProblem, job: Job | None) -> None:
        """Let the queue wait. job: the one that met the problem, if it was one; it goes back to its place."""
        self._problem, self._met, self._job, self._seen = problem, job, job, False
        self._next_look = time.monotonic() + LOOK_SECONDS * 2**self._unseen
        self._tell(problem)
        log.warning("%s", self._store.hold)
        try:
            self._put_back()
        except DiskProblem:  # the database has no room either: at the next look
            self._seen = True

    def is_over(self) -> bool:
        """Whether the queue may go on; where it waits, this looks again every few seconds."""
        if self._problem is None:
            return True
        if time.monotonic() < self._next_look:
            return False
        self._next_look = time.monotonic() + LOOK_SECONDS
        try:
            self._put_back()
            # The need of a canceled or deleted job holds up no other one, which checks its own when it begins.
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
        """A job has ended without a problem of this kind."""
        self._unseen = 0

    def _put_back(self) -> None:
        """Raises DiskProblem where that cannot be noted."""
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
