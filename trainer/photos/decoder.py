"""The child processes that decode photos and open zips, with limits of memory and time."""

from __future__ import annotations

import queue
from pathlib import Path
from typing import cast

from trainer.contract.errors import AnalysisUnavailable
from trainer.photos.decode import Decoded
from trainer.photos.subprocess_worker import NotStarted, SubprocessWorker, WorkerCrashed
from trainer.photos.zips import Contents, Entry
from trainer.settings import Settings

CHILDREN = 2  # one photo each at a time; more would take cores from training


class Decoder:
    """The child processes that decode photos, with limits of memory and time."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._worker_processes = [SubprocessWorker("trainer.photos.decode", "decodes photos") for _ in range(CHILDREN)]
        # Last in, first out: the one that worked last is in memory.
        self._free: queue.LifoQueue[SubprocessWorker] = queue.LifoQueue()
        for child in self._worker_processes:
            self._free.put(child)

    def warm(self) -> None:
        """Start the child processes, so that the first request does not wait for them."""
        for child in self._worker_processes:
            child.warm()

    def close(self) -> None:
        for child in self._worker_processes:
            child.close()

    def decode(self, source: Path, target: Path, name: str) -> Decoded:
        """Write `source` as an upright RGB file, `target` plus suffix. Raises ValueError with the reason."""
        most_pixels = self._settings.max_megapixels * 1_000_000
        return cast(Decoded, self._run("decoded", "decode", source, target, name, most_pixels))

    def list_zip(self, source: Path) -> Contents:
        """What is in a zip of photos. Raises ValueError with the reason."""
        return cast(Contents, self._run("opened", "trainer.photos.zips:list_zip", source))

    def unpack(self, source: Path, entry: Entry, target: Path) -> None:
        """Write an entry of a zip as a file. Raises ValueError with the reason, OSError."""
        self._run("unpacked", "trainer.photos.zips:unpack", source, entry.number, target)

    def _run(self, done: str, function: str, *args: object) -> object:
        """Call a function in a free child process; done: what it does, for messages."""
        seconds, child = self._settings.decode_seconds, self._free.get()
        try:
            result: object = child.run(seconds, function, *args)
            return result
        except TimeoutError:
            raise ValueError(f"could not be {done} within {seconds:g} s") from None
        except MemoryError:
            raise ValueError(f"needs too much memory to be {done}") from None
        except NotStarted as problem:
            raise AnalysisUnavailable(str(problem)) from problem
        except WorkerCrashed:
            raise ValueError("crashed the image decoder; it is damaged, or made to do so") from None
        finally:
            self._free.put(child)
