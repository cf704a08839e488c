"""What a running job reports, and how it learns that it is to stop."""

from __future__ import annotations

from typing import Protocol


class Report(Protocol):
    """How a job tells where it is. One call serves progress, ETA, log line and cancel."""

    def stage(self, stage: str) -> None: ...

    def step(self, step: int, steps: int, loss: float | None = None, lr: float | None = None) -> bool:
        """`step` steps are done; `loss` is their mean since it was last given. False: save and stop."""
        ...

    def saved(self, step: int) -> None:
        """A state to resume from is on disk."""
        ...

    def resumed(self, step: int) -> None:
        """Training goes on after this step."""
        ...

    def warn(self, message: str) -> None:
        """Something that the user should know, and that does not end the job."""
        ...
