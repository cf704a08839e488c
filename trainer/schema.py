"""What goes in and out: tunes, prompts, their states, and the errors. No torch, no I/O."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    ValidationError,
    model_validator,
)

from trainer.branches import BRANCHES
from trainer.methods import METHODS

TuneStatus = Literal["queued", "training", "trained", "failed", "canceled", "expired"]
PromptStatus = Literal["queued", "rendering", "rendered", "failed", "canceled"]
ENDED = ("trained", "rendered", "failed", "canceled", "expired")


class InvalidRequest(Exception):
    """A request that cannot be carried out, and why: {field: [message, ...]}. REST answers it with 422."""

    def __init__(self, problems: Mapping[str, list[str]]) -> None:
        self.problems = dict(problems)
        super().__init__("\n".join(f"{field}: {'; '.join(messages)}" for field, messages in problems.items()))


class NotFound(Exception):
    """There is no such thing. REST answers it with 404."""


class Conflict(Exception):
    """Not in this state. REST answers it with 409."""


class CannotLook(Exception):
    """A photo that cannot be looked at, and why. REST answers it with 503; a tune fails."""


Tell = Callable[[str, int, int], None]  # tell("photos are decoded", 3, 20): how far a request has come


def untold(_what: str, _done: int, _of: int) -> None:
    """For callers that do not wait to hear."""


def words(names: Iterable[str]) -> str:
    """a, b, c"""
    return ", ".join(sorted(names))


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'steps'?)` where a known name looks like it, else nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def default_caption(token: str, class_name: str) -> str:
    """What a photo without a caption of its own is called; the hosted service's words."""
    subject = f"{token} {class_name}"
    return subject if "style" in class_name.lower() else f"A photo of {subject}"


def _blank_is_none(value: Any) -> Any:
    """Forms cannot say null: they send an empty field."""
    return None if isinstance(value, str) and not value.strip() else value


def _no_control_characters(value: Any) -> Any:
    if isinstance(value, str):
        if any(ord(c) < 32 and c not in "\t\n" for c in value):
            raise ValueError("must not contain control characters")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError("must be valid Unicode (it has a lone surrogate)") from None
    return value


Text = Annotated[str, BeforeValidator(_no_control_characters)]
OptionalBool = Annotated[bool | None, BeforeValidator(_blank_is_none)]


def _in_one_line(value: str) -> str:
    if "\n" in value:
        raise ValueError("must not contain line breaks")
    return value


def _is_address(value: str) -> str:
    if not re.match(r"https?://[^/?#\s]", value):
        raise ValueError("must be an address that begins with http:// or https://")
    return value


Address = Annotated[Annotated[Text, Field(max_length=2048), AfterValidator(_is_address)] | None,
                    BeforeValidator(_blank_is_none)]  # fmt: skip


def _text(max_length: int) -> Any:
    """An optional text of at most so many characters."""
    return Annotated[Annotated[Text, Field(max_length=max_length)] | None, BeforeValidator(_blank_is_none)]


def _number(low: float, high: float, kind: type = int) -> Any:
    """An optional number within limits; forms send it as a string."""

    def parse(value: Any) -> Any:
        value = _blank_is_none(value)
        if isinstance(value, bool):
            raise ValueError(f"must be a number from {low} to {high}")
        return value

    bounded = (
        Annotated[kind, Field(ge=low, le=high, allow_inf_nan=False)]
        if kind is float
        else Annotated[kind, Field(ge=low, le=high)]
    )
    return Annotated[bounded | None, BeforeValidator(parse)]  # type: ignore[valid-type]


class Request(BaseModel):
    """Names that are not known are refused, with the nearest known one."""

    model_config = ConfigDict(extra="forbid")

    _ignored: dict[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="wrap")
    @classmethod
    def _set_aside(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Leave out what is null, and what the hosted service takes and we do not act on."""
        if not isinstance(data, dict):
            raise ValueError("must be an object")
        aside = [name for name in data if name in cls.accepted()]
        null = [name for name in data if name in cls.model_fields and data[name] is None]
        request = handler({name: value for name, value in data.items() if name not in (*aside, *null)})
        request._ignored = {name: data[name] for name in aside if data[name] is not None}
        return request

    @property
    def ignored(self) -> dict[str, Any]:
        """What was set aside, by its name."""
        return self._ignored

    @classmethod
    def accepted(cls) -> tuple[str, ...]:
        return ()

    @classmethod
    def parameters(cls) -> list[str]:
        """The names that a request may have, in order."""
        return list(cls.model_fields)


REFERENCE = re.compile(r"<(lora|faceid):([^:<>]+)(?::([^:<>]*))?>")
NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)")
MOST_WEIGHT = 10.0  # a model at ten times its strength draws noise


def references(text: str) -> tuple[str, list[tuple[str, str, float]]]:
    """A prompt without its `<lora:NAME:WEIGHT>` and `<faceid:NAME:WEIGHT>`, and these: (lora, name, weight).

    Without a weight it is 1. Raises InvalidRequest for a weight that is no number, or out of range.
    """
    found, problems = [], []
    for kind, name, weight in REFERENCE.findall(text):
        if weight and not NUMBER.fullmatch(weight.strip()):
            problems.append(f"<{kind}:{name}:{weight}>: the weight must be a number, as 1, 0.7 or -0.5")
        elif weight and abs(float(weight)) > MOST_WEIGHT:
            problems.append(f"<{kind}:{name}:{weight}>: the weight must be from -{MOST_WEIGHT:g} to {MOST_WEIGHT:g}")
        else:
            found.append((kind, name.strip(), float(weight or 1)))
    if problems:
        raise InvalidRequest({"text": problems})
    return re.sub(r" {2,}", " ", REFERENCE.sub("", text)).strip() if found else text, found


SCHEDULERS = (
    "euler", "euler_a", "dpm++2m", "dpm++2m_karras", "dpm++sde", "dpm++sde_karras", "lcm", "tcd",
)  # fmt: skip
ASPECT_RATIOS = ("1:1", "16:9", "9:16", "21:9", "9:21", "3:2", "2:3", "5:4", "4:5", "4:3", "3:4")
AR = {"1:1": "1:1", "portrait": "3:4", "16:9": "16:9", "landscape": "4:3"}  # the hosted service's older words
CONTROLS = ("canny", "depth", "pose", "tile", "lineart")
HOSTED_CONTROLS = (  # taken there, and not rendered here
    "composition", "reference", "segroom", "ipadapter", "hed", "mlsd", "qr", "relight", "style", "blur", "gray",
    "low_quality",
)  # fmt: skip
DENOISING_STRENGTH = 0.8  # the hosted service's default


def _one_of(names: Iterable[str], lower: bool = True) -> Any:
    """An optional word out of a list."""
    known = tuple(names)

    def check(value: str | None) -> str | None:
        if value is None:
            return None
        word = value.strip().lower() if lower else value.strip()
        if word not in known:
            raise ValueError(f"must be one of {', '.join(known)}, got {value!r}{nearest(word, known)}")
        return word

    return Annotated[_text(64), AfterValidator(check)]


def _enlarged(value: Any) -> Any:
    """The hosted service's older word for super-resolution says by how much."""
    return True if isinstance(value, str) and value.strip().lower() in ("x2", "x4") else _blank_is_none(value)


class PromptRequest(Request):
    """One prompt: what to render."""

    text: Annotated[Text, Field(min_length=1, max_length=10_000)]
    negative_prompt: _text(10_000) = None  # type: ignore[valid-type]
    num_images: _number(1, 8) = None  # type: ignore[valid-type]
    seed: _number(0, 2**32 - 1) = None  # type: ignore[valid-type]
    steps: _number(1, 100) = None  # type: ignore[valid-type]
    cfg_scale: _number(0, 15, float) = None  # type: ignore[valid-type]
    w: _number(64, 2048) = None  # type: ignore[valid-type]
    h: _number(64, 2048) = None  # type: ignore[valid-type]
    callback: Address = None
    aspect_ratio: _one_of(ASPECT_RATIOS) = None  # type: ignore[valid-type]
    ar: _one_of(AR) = None  # type: ignore[valid-type]
    scheduler: _one_of(SCHEDULERS) = None  # type: ignore[valid-type]
    use_lpw: OptionalBool = None
    lora_scale: _number(-5, 5, float) = None  # type: ignore[valid-type]
    style: _text(64) = None  # type: ignore[valid-type]
    color_grading: _text(64) = None  # type: ignore[valid-type]
    film_grain: OptionalBool = None
    super_resolution: Annotated[bool | None, BeforeValidator(_enlarged)] = None
    hires_fix: OptionalBool = None
    inpaint_faces: OptionalBool = None
    face_correct: OptionalBool = None
    face_swap: OptionalBool = None
    input_image: Any = Field(None, exclude=True)
    input_image_url: _text(2048) = None  # type: ignore[valid-type]
    mask_image: Any = Field(None, exclude=True)
    mask_image_url: _text(2048) = None  # type: ignore[valid-type]
    denoising_strength: _number(0, 1, float) = None  # type: ignore[valid-type]
    controlnet: _one_of((*CONTROLS, *HOSTED_CONTROLS)) = None  # type: ignore[valid-type]
    controlnet_conditioning_scale: _number(0, 1, float) = None  # type: ignore[valid-type]
    controlnet_txt2img: OptionalBool = None

    @classmethod
    def accepted(cls) -> tuple[str, ...]:
        return ("prompt_expansion", "backend_version", "resolution")

    @model_validator(mode="after")
    def _goes_together(self) -> PromptRequest:
        for name in ("w", "h"):
            value = getattr(self, name)
            if value is not None and value % 8:
                raise ValueError(f"{name} must be a multiple of 8")
        for name in ("input_image", "mask_image"):
            if getattr(self, name) is not None and getattr(self, f"{name}_url") is not None:
                raise ValueError(f"{name} and {name}_url are two pictures; leave one of them out")
        return self

    @property
    def has_input(self) -> bool:
        """Whether it starts from a picture."""
        return self.input_image is not None or self.input_image_url is not None

    @property
    def has_mask(self) -> bool:
        return self.mask_image is not None or self.mask_image_url is not None


PICTURES = ("input_image", "mask_image")  # of a prompt: files, in a request and in the prompt's folder
# What a prompt's row has columns for; the rest is its `attributes`.
COLUMNS = ("text", "negative_prompt", "num_images", "seed", "steps", "cfg_scale", "w", "h", "callback")


def attributes_of(request: PromptRequest) -> dict[str, Any]:
    """What was asked for beside the columns of a prompt's row; pictures are not among it."""
    beside = {name for name in PromptRequest.model_fields if name not in (*COLUMNS, *PICTURES)}
    return {name: value for name, value in request.model_dump(include=beside).items() if value is not None}


def prompt_of(row: Mapping[str, Any]) -> PromptRequest:
    """The request of a prompt's row in the store."""
    beside = {name: value for name, value in row["attributes"].items() if name not in PICTURES}  # those are files now
    return PromptRequest(**{name: row[name] for name in COLUMNS}, **beside)


class Echo(BaseModel):
    """What the hosted service's prompt object tells of attributes; of prompts older than they are here, too."""

    super_resolution: bool = False
    ar: _text(32) = "1:1"  # type: ignore[valid-type]
    controlnet_conditioning_scale: _number(0, 1, float) = None  # type: ignore[valid-type]
    controlnet_txt2img: bool = False
    denoising_strength: _number(0, 1, float) = None  # type: ignore[valid-type]


ClassName = Annotated[Text, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9 ]*[A-Za-z0-9][A-Za-z0-9 ]*$")]
Title = Annotated[Text, Field(min_length=1, max_length=255), AfterValidator(_in_one_line)]
Characteristics = Annotated[
    dict[Annotated[Text, Field(max_length=64)], Annotated[Text, Field(max_length=1000)]], Field(max_length=1000)
]
ImageUrls = list[Annotated[Text, Field(min_length=1, max_length=2048)]]


class TuneRequest(Request):
    """The tune parameters, in the order of the product document; then ours."""

    name: ClassName
    title: Title
    images: list[Any] = []
    image_urls: ImageUrls = []
    callback: Address = None
    branch: _text(64) = None  # type: ignore[valid-type]
    steps: _number(1, 10_000) = None  # type: ignore[valid-type]
    token: _text(32) = None  # type: ignore[valid-type]
    face_crop: OptionalBool = None
    training_face_correct: OptionalBool = None
    base_tune_id: _number(1, 2**53) = None  # type: ignore[valid-type]
    model_type: _text(64) = None  # type: ignore[valid-type]
    auto_extend: OptionalBool = None
    preset: _text(64) = None  # type: ignore[valid-type]
    characteristics: Characteristics = {}
    prompts_attributes: list[PromptRequest] = []
    args: _text(1000) = None  # type: ignore[valid-type]
    prompts_callback: Address = None

    @classmethod
    def accepted(cls) -> tuple[str, ...]:
        return ("resolution", "is_api")


class TuneChange(Request):
    """What can be changed of a tune that is there."""

    title: Title = ""
    name: ClassName = ""
    auto_extend: OptionalBool = None
    characteristics: Characteristics = {}


class CheckRequest(Request):
    """What a check of photos may be told: the tune parameters that decide what becomes of them."""

    name: Annotated[ClassName | None, BeforeValidator(_blank_is_none)] = None
    images: list[Any] = []
    image_urls: ImageUrls = []
    branch: _text(64) = None  # type: ignore[valid-type]
    face_crop: OptionalBool = None
    training_face_correct: OptionalBool = None
    base_tune_id: _number(1, 2**53) = None  # type: ignore[valid-type]
    model_type: _text(64) = None  # type: ignore[valid-type]
    preset: _text(64) = None  # type: ignore[valid-type]
    args: _text(1000) = None  # type: ignore[valid-type]

    @classmethod
    def accepted(cls) -> tuple[str, ...]:
        return tuple(
            name for name in (*TuneRequest.model_fields, *TuneRequest.accepted()) if name not in cls.model_fields
        )

    def as_tune(self) -> TuneRequest:
        """The tune that these photos would be for; a LoRA where nothing else is said."""
        given = self.model_dump(exclude={"images"}, exclude_none=True)
        if self.model_type == "faceid":  # which looks at them as a LoRA does
            del given["model_type"]
        return TuneRequest(**{"name": "photo", "title": "check", "model_type": "lora", **given})


R = TypeVar("R", bound=Request)

MESSAGES = {  # pydantic's own words name its types; these name what the API takes
    "missing": "is required",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_parsing": "must be a number",
    "list_type": "must be a list",
    "dict_type": "must be an object of names and texts",
    "string_type": "must be a text",
}


def parse_request(model: type[R], data: Any) -> R:
    """Check a request against its schema. Raises InvalidRequest with all problems at once."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problems: dict[str, list[str]] = {}
        for problem in error.errors():
            field = str(problem["loc"][0]) if problem["loc"] else "base"
            inner = ".".join(str(part) for part in problem["loc"][1:])
            problems.setdefault(field, []).append((f"{inner}: " if inner else "") + _message(model, problem))
        raise InvalidRequest(problems) from None


def _message(model: type[Request], problem: Any) -> str:
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "extra_forbidden":
        known = PromptRequest if problem["loc"][0] == "prompts_attributes" else model
        return f"unknown parameter{nearest(str(problem['loc'][-1]), known.parameters())}"
    if kind == "string_pattern_mismatch":
        return "only English letters, numbers and spaces allowed"
    if kind in ("string_too_short", "too_short"):
        return "must not be empty"
    if kind == "string_too_long" or (kind == "too_long" and isinstance(problem["input"], str)):
        return f"must have at most {context['max_length']} characters"
    if kind == "too_long":
        return f"must have at most {context['max_length']} entries, got {context['actual_length']}"
    if kind in ("greater_than_equal", "less_than_equal"):
        bound = context.get("ge", context.get("le"))
        return f"must be {'at least' if 'ge' in context else 'at most'} {bound}, got {problem['input']}"
    return MESSAGES.get(kind, str(problem["msg"]).removeprefix("Value error, "))


def check_branch(branch: str) -> str:
    """The branch, if there is one of that name. Raises InvalidRequest."""
    if branch not in BRANCHES:
        raise InvalidRequest(
            {"branch": [f"unknown branch {branch!r}{nearest(branch, BRANCHES)}; known: {words(BRANCHES)}"]}
        )
    return branch


def check_model_type(model_type: str, branch: str, known: Sequence[str], why_not: Mapping[str, str]) -> None:
    """Raises InvalidRequest unless a branch has the model type. why_not: the reasons for those that it has not."""
    if model_type not in METHODS:
        close = nearest(model_type, METHODS)
        raise InvalidRequest({"model_type": [f"unknown model_type {model_type!r}{close}; known: {words(METHODS)}"]})
    if model_type not in known:
        why = f": {why_not[model_type]}" if model_type in why_not else ""
        raise InvalidRequest({"model_type": [f"{branch} has no {model_type}{why}; it has {words(known)}"]})


@dataclass(frozen=True)
class Upload:
    """A file that came in: the name it had and where its bytes are now."""

    name: str
    path: Path


class Progress(BaseModel):
    """Where a running tune is. `loss` is the mean of the last steps read; `seconds_per_step` a moving average."""

    stage: str = "queued"
    step: int = 0
    steps: int = 0
    loss: float | None = None
    seconds_per_step: float | None = None


class Face(BaseModel):
    """A face that was found: its box (left, top, right, bottom) in pixels of the upright photo, and how sure that is.

    score: the detector's, 0 to 1. sharpness: variance of the Laplacian of the face at 112 px. main: it is the subject.
    """

    box: tuple[int, int, int, int]
    score: float
    sharpness: float
    main: bool = False


class Photo(BaseModel):
    """The verdict on one photo: what came, what was seen in it and what was done with it.

    Sizes are in pixels, of the upright picture. `file` is its name among the tune's images, `url` its link there;
    `seen` shows the picture as the trainer sees it, `closeup` its face crop: links for a tune, data URLs for a check.
    """

    name: str
    file: str
    width: int
    height: int
    format: str
    rotated: bool = False
    converted: str | None = Field(None, description="from which colours, as CMYK; None: it was 8-bit RGB already")
    sharpness: float | None = Field(None, description="variance of the Laplacian at a long side of 512 px")
    blurred: bool = False
    too_small: bool = False
    duplicate_of: str | None = Field(None, description="the photo that this one is, or looks almost like")
    faces: list[Face] | None = Field(None, description="None: nobody looked; only photos of people are looked at")
    same_person: bool | None = Field(None, description="None: not known; it takes recognition weights and three photos")
    cropped: bool = False
    restored: bool = False
    masks: list[str] = []
    dropped: str | None = Field(None, description="why this photo is not trained on")
    notes: list[str] = []
    url: str | None = None
    seen: str | None = None
    closeup: str | None = None


class Check(BaseModel):
    """What /photos/check answers: a verdict for each photo, and what holds for all of them."""

    photos: list[Photo]
    warnings: list[str]


class Callback(BaseModel):
    """A callback: to whom, what has come of it so far, and when it is tried again (null: not any more)."""

    id: int
    kind: Literal["tune", "prompt", "prompts"]
    prompt_id: int | None
    url: str
    created_at: str
    attempts: int
    answer: str | None
    arrived_at: str | None
    due_at: str | None


class Tune(BaseModel):
    """A tune as every door answers it: the document's keys in its order, then ours."""

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


class Prompt(BaseModel):
    """A prompt as every door answers it: the hosted service's keys in its order, then ours."""

    id: int
    callback: str | None
    trained_at: str | None
    started_training_at: str | None
    created_at: str
    updated_at: str
    tune_id: int
    text: str
    negative_prompt: str | None
    cfg_scale: float | None
    steps: int | None
    super_resolution: bool
    ar: str
    num_images: int
    seed: int | None
    controlnet_conditioning_scale: float | None
    controlnet_txt2img: bool
    denoising_strength: float | None
    url: str
    images: list[str]
    w: int | None
    h: int | None
    aspect_ratio: str | None
    scheduler: str | None
    use_lpw: bool
    lora_scale: float | None
    style: str | None
    color_grading: str | None
    film_grain: bool
    hires_fix: bool
    inpaint_faces: bool
    face_correct: bool
    face_swap: bool
    controlnet: str | None
    input_image: str | None = Field(description="a link to it, also where it came from input_image_url")
    mask_image: str | None
    thumbnails: list[str]
    contact_sheet: str | None
    preview: str | None = Field(description="what it looks like so far, while it renders")
    status: PromptStatus
    progress: Progress
    error: str | None
    user_error: str | None
    warnings: list[str]
    tunes: list[int]


Tune.model_rebuild()
