"""The time in UTC, as the API writes it; and a thread that calls a function at intervals."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from datetime import UTC, datetime

log = logging.getLogger(__name__)


def now() -> str:
    """UTC, ISO 8601 with milliseconds and Z."""
    return stamp(datetime.now(UTC))


def stamp(time: datetime) -> str:
    return time.isoformat(timespec="milliseconds").replace("+00:00", "Z")


class Loop:
    """A thread that calls a function at once and then at intervals.

    An error is logged and does not end the thread; the same error again is not logged again.
    """

    def __init__(
        self,
        name: str,
        seconds: float,
        act: Callable[[], object],
        *,
        wake: threading.Event | None = None,
        retry_seconds: float | None = None,
    ) -> None:
        """name: of the thread. seconds: the wait between two calls. wake: an event that ends the wait. retry_seconds:
        the wait after an error, which only `close` ends early; None: `seconds`."""
        self.stopping = threading.Event()
        self._name = name
        self._seconds = seconds
        self._act = act
        self._wake = wake or threading.Event()
        self._retry_seconds = retry_seconds
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self, timeout_s: float | None = None) -> None:
        """Stop after the call that runs now, and wait for its end; timeout_s: at most so long."""
        self.stopping.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        last = ""
        while True:
            self._wake.clear()  # before the call: an event set during the call ends the wait
            pause = self._wake, self._seconds
            try:
                self._act()
                last = ""
            except Exception as error:  # the edge of a thread: one failure must not end it
                if repr(error) != last:
                    log.exception("the thread %s failed; it tries again", self._name)
                last = repr(error)
                if self._retry_seconds is not None:
                    pause = self.stopping, self._retry_seconds
            if not self.stopping.is_set():
                event, seconds = pause
                event.wait(seconds)
            if self.stopping.is_set():
                return
