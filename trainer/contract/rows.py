"""The rows of the database as the store returns them: JSON columns are parsed, others are SQLite's values.

broken: the JSON columns that cannot be read; they are empty in the row.
"""

from __future__ import annotations

from typing import NotRequired, TypedDict

from pydantic import JsonValue

from trainer.contract.states import PromptStatus, TuneStatus


class PhotoRow(TypedDict):
    """A `Photo` as JSON: the keys that are read without a `Photo`."""

    name: str
    file: str
    dropped: NotRequired[str | None]


class ProgressRow(TypedDict, total=False):
    """A `Progress` as JSON; empty before the job starts."""

    stage: str
    step: int
    steps: int
    loss: float | None
    seconds_per_step: float | None


class TuneValues(TypedDict):
    """The columns of a tune that come from its request."""

    title: str
    name: str
    token: str | None
    branch: str
    model_type: str | None
    method: str
    preset: str | None
    base_tune_id: int | None
    base_id: int
    steps: int | None
    args: str | None
    face_crop: bool | None
    training_face_correct: bool
    auto_extend: bool
    callback: str | None
    prompts_callback: str | None
    characteristics: dict[str, str]
    warnings: list[str]


class TuneRow(TuneValues):
    """A row of `tunes`. photos: each a `Photo` as JSON. files: names in `model/`, the most widely supported first."""

    id: int
    photos: list[PhotoRow]
    files: list[str]
    status: TuneStatus
    cancel: int
    progress: ProgressRow
    error: str | None
    eta: str | None
    created_at: str
    updated_at: str
    started_training_at: str | None
    trained_at: str | None
    expires_at: str | None
    request_key: str | None
    request_digest: str | None
    body_digest: str | None
    broken: NotRequired[list[str]]


class PromptToRender(TypedDict):
    """The columns of a prompt that rendering reads. attributes: the parameters that are not columns.

    parsed: the parsed text (see parsed_text.py); None in rows of older versions.
    """

    text: str
    negative_prompt: str | None
    num_images: int
    seed: int | None
    steps: int | None
    cfg_scale: float | None
    w: int | None
    h: int | None
    callback: str | None
    attributes: dict[str, JsonValue]
    parsed: dict[str, JsonValue] | None


class PromptRow(PromptToRender):
    """A row of `prompts`. named: (kind, id, weight) of each model in its text; None: not resolved yet.

    tune_id: of the tune whose folder has its files; None: the base's folder. base_id: the base that it was posted to;
    None: it was posted to its tune. lora_id: the first tune that the text of a prompt on a base names.
    """

    id: int
    tune_id: int | None
    base_id: int | None
    lora_id: int | None
    liked_at: str | None
    files: list[str]
    status: PromptStatus
    cancel: int
    progress: ProgressRow
    error: str | None
    warnings: list[str]
    kept: dict[str, JsonValue]
    named: list[tuple[str, int, float]] | None
    created_at: str
    updated_at: str
    started_training_at: str | None
    trained_at: str | None
    request_key: str | None
    request_digest: str | None
    body_digest: str | None
    broken: NotRequired[list[str]]


class ExportRow(TypedDict):
    """A row of `exports`: a trained model in another format."""

    id: int
    tune_id: int
    format: str
    files: list[str]
    status: str
    cancel: int
    error: str | None
    created_at: str
    updated_at: str
    started_training_at: str | None
    broken: NotRequired[list[str]]


class CallbackRow(TypedDict):
    """A row of `callbacks`. due_at: the time of the next attempt; None: no more attempts.

    delay: the planned seconds between the last attempt and due_at.
    """

    id: int
    tune_id: int | None
    prompt_id: int | None
    kind: str
    url: str
    created_at: str
    attempts: int
    due_at: str | None
    delay: float
    arrived_at: str | None
    answer: str | None
