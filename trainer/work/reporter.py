"""Writes the progress of a running job to the store, to the tune's log and to TensorBoard."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.clock import now, stamp
from trainer.contract.rows import ProgressRow
from trainer.contract.run_files import read_log
from trainer.files import read_for_show, unreadable, warn_once, write_whole
from trainer.settings import Settings
from trainer.studio.store import Job, Store

if TYPE_CHECKING:
    import torch
    from torch.utils.tensorboard import SummaryWriter

STORE_EVERY_SECONDS = 0.5  # for progress: each write waits for the disk
PACE_MEMORY = 0.9  # weight of the earlier average in the moving average of seconds per step


class Reporter:
    """Writes progress to the store and lines to the tune's log; reports whether the job may continue."""

    def __init__(
        self, settings: Settings, store: Store, job: Job, stopping: threading.Event, device: torch.device
    ) -> None:
        self._store, self._job = store, job
        self._stopping = stopping
        self._device = device
        self._table, self._row = job.target
        folder = settings.outputs / self._table / str(self._row)  # only tunes have a folder and a log
        self._log = folder / "log.jsonl"
        self._board = tensorboard(folder / "tensorboard") if settings.tensorboard and self._table == "tunes" else None
        self._began = time.monotonic()
        self._stored_at = self._stepped = 0.0
        self.progress: ProgressRow = {
            "stage": "queued",
            "step": 0,
            "steps": 0,
            "loss": None,
            "seconds_per_step": None,
        }

    def stage(self, stage: str) -> None:
        self.progress["stage"] = stage
        self._store_progress()

    def step(self, step: int, steps: int, loss: float | None = None, lr: float | None = None) -> bool:
        """See `Report.step`."""
        from trainer.device import peak_gib

        at = time.monotonic()
        if self._stepped and step:
            pace, took = self.progress["seconds_per_step"], at - self._stepped
            self.progress["seconds_per_step"] = took if pace is None else PACE_MEMORY * pace + (1 - PACE_MEMORY) * took
        self._stepped = at
        self.progress |= {"step": step, "steps": steps}
        if loss is not None:
            self.progress["loss"] = loss
            peak = peak_gib(self._device)
            line = {"step": step, "loss": round(loss, 6), "lr": lr, "peak_gib": round(peak, 3)}
            self._write(line | {"seconds": round(at - self._began, 3)})
            if self._board:
                for name, value in {"loss": loss, "lr": lr, "peak_gib": peak}.items():
                    self._board.add_scalar(name, value, step)
                self._board.flush()
        if at - self._stored_at > STORE_EVERY_SECONDS or step == steps:
            self._store_progress()
        return self.may_continue()

    def may_continue(self) -> bool:
        """False: the app ends, or a user canceled the job."""
        return not (self._stopping.is_set() or self._store.cancel_wanted(self._table, self._row))

    def saved(self, step: int) -> None:
        self._store.made_headway(self._job)
        self._stepped = time.monotonic()  # the time of saving does not count as a step's

    def warn(self, message: str) -> None:
        """Add a warning to the tune or prompt, unless it has it already."""
        assert self._table != "exports", "an export has no warnings"
        row = self._store.get(self._table, self._row)
        if row is not None and message not in row["warnings"]:
            self._store.update(self._table, self._row, warnings=[*row["warnings"], message])

    def resumed(self, step: int) -> None:
        """Log the step that the run resumes from, and delete the lines of later steps, which are repeated."""
        kept = [line for line in read_for_show(self._log, read_log) or () if line["step"] <= step]
        if self._log.is_file():
            write_whole(self._log, "".join(json.dumps(line) + "\n" for line in kept))
        self._write({"step": step, "event": "resumed" if step else "started", "at": now()})

    def _store_progress(self) -> None:
        self._stored_at = time.monotonic()
        if self._table == "tunes":
            self._store.update("tunes", self._row, progress=self.progress, eta=self._eta())
        elif self._table == "prompts":
            self._store.update("prompts", self._row, progress=self.progress)

    def _eta(self) -> str | None:
        pace = self.progress["seconds_per_step"]
        if pace is None:
            return None
        return stamp(datetime.now(UTC) + timedelta(seconds=pace * (self.progress["steps"] - self.progress["step"])))

    def _write(self, line: Mapping[str, object]) -> None:
        try:
            with self._log.open("a") as file:
                file.write(json.dumps(line) + "\n")
        except (IsADirectoryError, PermissionError) as problem:  # the log is only displayed: the run continues
            warn_once(self._log, str(unreadable(self._log, problem)))


def tensorboard(folder: Path) -> SummaryWriter:
    """A writer of TensorBoard files. Raises RuntimeError if the package is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise RuntimeError(
            "the setting tensorboard needs the package of that name: `uv pip install tensorboard`"
        ) from None
    return SummaryWriter(str(folder))
