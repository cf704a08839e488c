"""Photo analyzers of the tests: they share one child process, whose start takes seconds and which keeps no settings."""

from __future__ import annotations

import atexit
from functools import cache

from trainer.photos.analysis import PhotoAnalyzer
from trainer.photos.subprocess_worker import SubprocessWorker
from trainer.settings import Settings


@cache
def _child() -> SubprocessWorker:
    child = SubprocessWorker("trainer.photos.faces", "analyzes photos")
    atexit.register(child.close)
    return child


class SharedAnalyzer(PhotoAnalyzer):
    """An analyzer whose child goes on when it is closed."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._worker_process = _child()

    def close(self) -> None:
        """The child is used by others."""
