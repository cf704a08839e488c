"""The states of tunes and prompts, their progress and their callbacks."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

TuneStatus = Literal["queued", "training", "trained", "failed", "canceled", "expired"]
PromptStatus = Literal["queued", "rendering", "rendered", "failed", "canceled"]
ENDED = ("trained", "rendered", "failed", "canceled", "expired")


class Progress(BaseModel):
    """The progress of a job. loss: the mean of the steps since the last reading. seconds_per_step: a moving average."""

    model_config = ConfigDict(allow_inf_nan=False)

    stage: str = "queued"
    step: int = 0
    steps: int = 0
    loss: float | None = None
    seconds_per_step: float | None = None


class Callback(BaseModel):
    """A callback: its address, the result of the last attempt, and the time of the next one (null: none)."""

    id: int
    kind: Literal["tune", "prompt", "prompts"]
    prompt_id: int | None
    url: str
    created_at: str
    attempts: int
    answer: str | None
    arrived_at: str | None
    due_at: str | None
