"""A long-lived child process that runs the functions of a module: what breaks, hangs or leaks costs only that child."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from typing import Any

from pebble import ProcessExpired, ProcessFuture, ProcessPool

START_SECONDS = 180.0  # imports, on a machine that may be busy


class WorkerCrashed(Exception):
    """The child ended in the middle of this work, and so did the one that tried it again."""


class NotStarted(RuntimeError):
    """The child does not even begin: a library is missing, for one."""


class Closed(Exception):
    """The app is ending; no child works any more."""


class SubprocessWorker:
    """One process that works for all callers, one call at a time. It is started when first needed, and again when
    it has died or was ended because a call took too long; it ends with the app, also when that is killed."""

    def __init__(self, module: str, purpose: str) -> None:
        """module: its name, for only the child imports it; its function `begin` is run first. purpose: of the process,
        for messages."""
        self._module = module
        self._purpose = purpose
        self._turn = threading.Lock()
        self._pool: ProcessPool | None = None
        self._task: ProcessFuture[object] | None = None
        self._closed = False

    def warm(self) -> None:
        """Start the process in the background, so that the first call need not wait for it."""
        threading.Thread(target=self._try, daemon=True).start()

    def run(self, seconds: float, function: str, *args: object) -> Any:
        """What a function of the module returns or raises.

        Raises TimeoutError where it takes longer than so many seconds (the child is ended then), Broke where it ends
        the child twice, NotStarted, Closed.
        """
        with self._turn:
            for _ in range(2):  # the child may have been killed while it was idle, which is not this call's fault
                pool = self._running()
                try:
                    return self._result(pool, seconds, call, self._module, function, *args)
                except TimeoutError:
                    self._stop()
                    raise
                except (ProcessExpired, BrokenProcessPool):
                    self._stop()
            raise WorkerCrashed

    def start(self) -> None:
        """Start the process, unless it runs. Raises NotStarted, Closed."""
        with self._turn:
            self._running()

    def close(self) -> None:
        """End the process now, also in the middle of its work."""
        self._closed = True
        if task := self._task:
            task.cancel()
        with self._turn:
            self._stop()

    def _try(self) -> None:
        with suppress(NotStarted, Closed):  # the caller that needs it gets the error
            self.start()

    def _running(self) -> ProcessPool:
        """The child, which has its own time to start: on a busy machine that may take longer than a call may."""
        if self._closed:
            raise Closed
        if self._pool is None:
            _wait_for_cv2()
            self._pool = ProcessPool(1, context=multiprocessing.get_context("spawn"))
            try:
                self._result(self._pool, START_SECONDS, begin, self._module)
            except Closed:
                raise
            except Exception as problem:  # the edge of a process: an import in the child may raise anything
                self._stop()
                reason = f"not within {START_SECONDS:g} s" if isinstance(problem, TimeoutError) else problem
                raise NotStarted(f"the process that {self._purpose} did not start: {reason}") from problem
        return self._pool

    def _result(self, pool: ProcessPool, seconds: float, function: Callable[..., object], *args: object) -> object:
        """What the child returns or raises.

        The limit is not Pebble's: that begins only when the child takes the task, and a child may die before it does.
        """
        try:
            task = self._task = pool.schedule(function, args)
        except RuntimeError as problem:  # the child ended since it last worked
            raise BrokenProcessPool from problem
        if self._closed:  # meanwhile
            task.cancel()
        try:
            return task.result(seconds)
        except CancelledError:
            raise Closed from None

    def _stop(self) -> None:
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()
            self._pool = self._task = None


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
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # ends it at once: in a decoder that hangs, Python runs no handler
    threading.Thread(target=_end_with_parent, daemon=True).start()
    importlib.import_module(module).begin()


def call(module: str, function: str, *args: object) -> object:
    """Run in the child."""
    elsewhere, _, name = function.rpartition(":")
    return getattr(importlib.import_module(elsewhere or module), name)(*args)


def _end_with_parent() -> None:
    """A pool's child waits for work for ever, also when its parent was killed."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)
