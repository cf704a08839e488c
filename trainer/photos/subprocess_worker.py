"""A long-lived child process that runs the functions of a module: a crash, hang or leak ends only the child."""

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
    """The child process died during this call, and so did the one that tried it again."""


class NotStarted(RuntimeError):
    """The child process did not start: for example, a library is missing."""


class Closed(Exception):
    """The app is shutting down; no child process works any more."""


class SubprocessWorker:
    """One child process for all callers, one call at a time. It starts at the first call, and again after it died or a
    call timed out. It ends with the app, also when the app is killed."""

    def __init__(self, module: str, purpose: str) -> None:
        """module: its name, because only the child imports it; its function `begin` runs first. purpose: what the
        process does, for messages."""
        self._module = module
        self._purpose = purpose
        self._turn = threading.Lock()
        self._pool: ProcessPool | None = None
        self._task: ProcessFuture[object] | None = None
        self._closed = False

    def warm(self) -> None:
        """Start the process in the background, so that the first call does not wait for it."""
        threading.Thread(target=self._try, daemon=True).start()

    def run(self, seconds: float, function: str, *args: object) -> Any:
        """Call a function of the module in the child; returns or raises what it does.

        Raises TimeoutError after so many seconds (the child is ended then), WorkerCrashed where the child died twice,
        NotStarted, Closed.
        """
        with self._turn:
            for _ in range(2):  # the child may have been killed before this call, while it was idle
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
        """End the process now, also during a call."""
        self._closed = True
        if task := self._task:
            task.cancel()
        with self._turn:
            self._stop()

    def _try(self) -> None:
        with suppress(NotStarted, Closed):  # the caller that needs it gets the error
            self.start()

    def _running(self) -> ProcessPool:
        """The running child. Its start has a limit of its own: on a busy machine it may take longer than a call may."""
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
        """Wait for the child; returns or raises what its function does.

        Pebble's own limit is not used: it begins when the child takes the task, and the child may die before that.
        """
        try:
            task = self._task = pool.schedule(function, args)
        except RuntimeError as problem:  # the child has died since its last call
            raise BrokenProcessPool from problem
        if self._closed:  # in the meantime
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
    """Wait until no other thread is importing cv2, at most as long as a start may take: the import may fail.

    During the import, its folder is in `sys.path`. A child that starts then inherits this path, imports `cv2/typing`
    instead of Python's `typing`, and dies.
    """
    deadline = time.monotonic() + START_SECONDS
    # cv2 sets this name before it changes the path, and deletes it afterwards.
    while hasattr(sys, "OpenCV_LOADER") and time.monotonic() < deadline:
        time.sleep(0.01)


def begin(module: str) -> None:
    """Run first in the child."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # ends at once: while a decoder hangs, Python runs no handler
    threading.Thread(target=_end_with_parent, daemon=True).start()
    importlib.import_module(module).begin()


def call(module: str, function: str, *args: object) -> object:
    """Run in the child."""
    elsewhere, _, name = function.rpartition(":")
    return getattr(importlib.import_module(elsewhere or module), name)(*args)


def _end_with_parent() -> None:
    """End the child when its parent was killed; else it would wait for work for ever."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)
