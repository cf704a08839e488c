"""A long-lived child process that runs the functions of a module: what breaks, hangs or leaks costs only that child."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from typing import Any

START_SECONDS = 180.0  # imports, on a machine that may be busy


class Broke(Exception):
    """The child ended in the middle of this work, and so did the one that tried it again."""


class NotStarted(RuntimeError):
    """The child does not even begin: a library is missing, for one."""


class Closed(Exception):
    """The app is ending; no child works any more."""


class Child:
    """One process that works for whoever calls, one call at a time. It is started when first needed, and again when
    it has died or was ended because a call took too long; it ends with the app, also when that is killed."""

    def __init__(self, module: str, purpose: str) -> None:
        """module: its name, for only the child imports it; its function `begin` is run first. purpose: of the process,
        for messages."""
        self._module = module
        self._purpose = purpose
        self._turn = threading.Lock()
        self._pool: ProcessPoolExecutor | None = None
        self._closed = False

    def warm(self) -> None:
        """Start the process in the background, so that the first call need not wait for it."""
        threading.Thread(target=self._try, daemon=True).start()

    def run(self, seconds: float, function: str, *args: Any) -> Any:
        """What a function of the module returns or raises.

        Raises TimeoutError where it takes longer than so many seconds (the child is ended then), Broke where it ends
        the child twice, NotStarted, Closed.
        """
        with self._turn:
            for _ in range(2):  # the child may have been killed while it was idle, which is not this call's fault
                try:
                    return self._running().submit(call, self._module, function, *args).result(timeout=seconds)
                except TimeoutError:
                    self._stop()
                    raise
                except BrokenProcessPool:
                    self._stop()
            raise Broke

    def start(self) -> None:
        """Start the process, unless it runs. Raises NotStarted, Closed."""
        with self._turn:
            self._running()

    def close(self) -> None:
        """End the process now, also in the middle of its work."""
        self._closed = True
        self._kill()
        with self._turn:
            self._stop()

    def _try(self) -> None:
        with suppress(NotStarted, Closed):  # whoever needs it is told
            self.start()

    def _running(self) -> ProcessPoolExecutor:
        """The child, which has its own time to start: on a busy machine that may take longer than a call may."""
        if self._closed:
            raise Closed
        if self._pool is None:
            _wait_for_cv2()
            self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
            try:
                self._pool.submit(begin, self._module).result(timeout=START_SECONDS)
            except Exception as problem:
                self._stop()
                if self._closed:
                    raise Closed from None
                reason = f"not within {START_SECONDS:g} s" if isinstance(problem, TimeoutError) else problem
                raise NotStarted(f"the process that {self._purpose} did not start: {reason}") from problem
        return self._pool

    def _kill(self) -> None:
        if pool := self._pool:
            for process in list((pool._processes or {}).values()):
                process.kill()  # one that hangs in a decoder hears nothing gentler

    def _stop(self) -> None:
        self._kill()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None


def _wait_for_cv2() -> None:
    """Return when no other thread is importing cv2, or after the time that a start may take: an import may fail.

    While it is imported, its folder is in `sys.path`. A child that starts then gets this path, takes `cv2/typing` for
    Python's `typing`, and dies.
    """
    deadline = time.monotonic() + START_SECONDS
    # cv2 sets this name before it changes the path, and deletes it afterwards.
    while hasattr(sys, "OpenCV_LOADER") and time.monotonic() < deadline:
        time.sleep(0.01)


def begin(module: str) -> None:
    """Run first in the child."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the app, which ends its children
    threading.Thread(target=_end_with_parent, daemon=True).start()
    importlib.import_module(module).begin()


def call(module: str, function: str, *args: Any) -> Any:
    """Run in the child."""
    return getattr(importlib.import_module(module), function)(*args)


def _end_with_parent() -> None:
    """A pool's child waits for work for ever, also when its parent was killed."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)
