"""The interface through which a running job reports progress and learns that it must stop."""

from __future__ import annotations

from typing import Protocol


class Report(Protocol):
    """Reports of a job. One call serves progress, ETA, log line and cancel."""

    def stage(self, stage: str) -> None: ...

    def step(self, step: int, steps: int, loss: float | None = None, lr: float | None = None) -> bool:
        """`step` steps are done; `loss` is the mean since the last loss. Returns False: save and stop."""
        ...

    def saved(self, step: int) -> None:
        """The state after this step is on disk; training can resume from it."""
        ...

    def resumed(self, step: int) -> None:
        """Training continues after this step."""
        ...

    def warn(self, message: str) -> None:
        """Show a warning to the user; the job continues."""
        ...
