"""A tune: the requests to create it, to change it and to check photos; and the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import BaseModel, Field

from trainer.contract.errors import InvalidRequest, nearest, words
from trainer.contract.fields import (
    Address,
    Args,
    BaseTuneId,
    Characteristics,
    ClassName,
    ImageUrls,
    OptionalBool,
    OrNone,
    Request,
    StepsOrNone,
    Text,
    Title,
    Word,
)
from trainer.contract.photos import Photo
from trainer.contract.prompts import Prompt, PromptRequest
from trainer.contract.states import Progress, TuneStatus
from trainer.names import BRANCHES, DEFAULT_METHOD, METHODS, MODEL_TYPES

TrainingSteps = StepsOrNone[Annotated[int, Field(ge=1, le=10_000)]]
Token = OrNone[Annotated[Text, Field(max_length=32)]]


class TuneRequest(Request):
    """The parameters of a tune, in the order of the product document; then ours."""

    name: ClassName
    title: Title
    images: list[object] = []
    image_urls: ImageUrls = []
    callback: Address = None
    branch: Word = None
    steps: TrainingSteps = None
    token: Token = None
    face_crop: OptionalBool = None
    training_face_correct: OptionalBool = None
    base_tune_id: BaseTuneId = None
    model_type: Word = None
    auto_extend: OptionalBool = None
    preset: Word = None
    characteristics: Characteristics = {}
    prompts_attributes: list[PromptRequest] = []
    args: Args = None
    prompts_callback: Address = None

    @classmethod
    def accepted(cls) -> tuple[str, ...]:
        return ("resolution", "is_api")

    @classmethod
    def known_at(cls, loc: Sequence[int | str]) -> list[str]:
        return (PromptRequest if loc[0] == "prompts_attributes" else cls).parameters()


class TuneChange(Request):
    """The parameters of an existing tune that can be changed."""

    title: Title = ""
    name: ClassName = ""
    auto_extend: OptionalBool = None
    characteristics: Characteristics = {}


class CheckRequest(Request):
    """The parameters of a check of photos: those of a tune that affect the verdicts."""

    name: OrNone[ClassName] = None
    images: list[object] = []
    image_urls: ImageUrls = []
    branch: Word = None
    face_crop: OptionalBool = None
    training_face_correct: OptionalBool = None
    base_tune_id: BaseTuneId = None
    model_type: Word = None
    preset: Word = None
    args: Args = None
    token: Token = None

    @classmethod
    def accepted(cls) -> tuple[str, ...]:
        return tuple(
            name for name in (*TuneRequest.model_fields, *TuneRequest.accepted()) if name not in cls.model_fields
        )

    def as_tune(self) -> TuneRequest:
        """The request of a tune with these photos; the default model type is lora."""
        given = self.model_dump(exclude={"images"}, exclude_none=True)
        known = MODEL_TYPES.get(self.model_type or "")
        if known and not known.trains:  # photos of a model type without training are checked as those of a LoRA
            del given["model_type"]
        return TuneRequest(**{"name": "photo", "title": "check", "model_type": DEFAULT_METHOD, **given})


def check_branch(branch: str) -> str:
    """The branch; raises InvalidRequest if there is none of this name."""
    if branch not in BRANCHES:
        raise InvalidRequest(
            {"branch": [f"unknown branch {branch!r}{nearest(branch, BRANCHES)}; known: {words(BRANCHES)}"]}
        )
    return branch


def check_model_type(model_type: str, branch: str, known: Sequence[str], why_not: Mapping[str, str]) -> None:
    """Raises InvalidRequest unless a branch has the model type. why_not: the reasons for missing model types."""
    if model_type not in METHODS:
        close = nearest(model_type, METHODS)
        raise InvalidRequest({"model_type": [f"unknown model_type {model_type!r}{close}; known: {words(METHODS)}"]})
    if model_type not in known:
        why = f": {why_not[model_type]}" if model_type in why_not else ""
        raise InvalidRequest({"model_type": [f"{branch} has no {model_type}{why}; it has {words(known)}"]})


class Tune(BaseModel):
    """A tune as all interfaces answer it: the document's keys in its order, then ours."""

    id: int
    title: str
    name: str
    token: str | None
    base_tune_id: int | None
    args: str | None
    steps: int | None
    face_crop: bool | None
    training_face_correct: bool
    ckpt_url: str | None
    ckpt_urls: list[str]
    eta: str | None
    trained_at: str | None
    started_training_at: str | None
    expires_at: str | None
    created_at: str
    branch: str
    model_type: str | None
    updated_at: str
    url: str
    orig_images: list[str]
    callback: str | None
    preset: str | None
    characteristics: dict[str, str]
    auto_extend: bool
    status: TuneStatus
    progress: Progress
    error: str | None
    warnings: list[str]
    photos: list[Photo]
    prompts: list[Prompt]


Tune.model_rebuild()
