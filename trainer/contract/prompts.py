"""A prompt: the request and the answer."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, JsonValue, PrivateAttr, model_validator

from trainer.contract.fields import (
    Address,
    NumberOrNone,
    OptionalBool,
    OptionalUrl,
    OrNone,
    Request,
    Share,
    StepsOrNone,
    Text,
    Word,
    blank_is_none,
    one_of,
)
from trainer.contract.parsed_text import ParsedText, of_row, parse_text
from trainer.contract.rows import PromptToRender
from trainer.contract.states import Progress, PromptStatus

SCHEDULERS = (
    "euler", "euler_a", "dpm++2m", "dpm++2m_karras", "dpm++sde", "dpm++sde_karras", "lcm", "tcd",
)  # fmt: skip
ASPECT_RATIOS = ("1:1", "16:9", "9:16", "21:9", "9:21", "3:2", "2:3", "5:4", "4:5", "4:3", "3:4")
AR = {"1:1": "1:1", "portrait": "3:4", "16:9": "16:9", "landscape": "4:3"}  # the hosted service's older names
CONTROLS = ("canny", "depth", "pose", "tile", "lineart")
HOSTED_CONTROLS = (  # of the hosted service; accepted, not rendered
    "composition", "reference", "segroom", "ipadapter", "hed", "mlsd", "qr", "relight", "style", "blur", "gray",
    "low_quality",
)  # fmt: skip
DENOISING_STRENGTH = 0.8  # the hosted service's default

PromptText = OrNone[Annotated[Text, Field(max_length=10_000)]]
NumImages = NumberOrNone[Annotated[int, Field(ge=1, le=8)]]
Seed = NumberOrNone[Annotated[int, Field(ge=0, le=2**32 - 1)]]
SamplingSteps = StepsOrNone[Annotated[int, Field(ge=1, le=100)]]
CfgScale = NumberOrNone[Annotated[float, Field(ge=0, le=15, allow_inf_nan=False)]]
Side = NumberOrNone[Annotated[int, Field(ge=64, le=2048)]]  # of a picture, in pixels
LoraScale = NumberOrNone[Annotated[float, Field(ge=-5, le=5, allow_inf_nan=False)]]
AspectRatio = OrNone[Annotated[Text, Field(max_length=64), AfterValidator(one_of(ASPECT_RATIOS))]]
OlderAspectRatio = OrNone[Annotated[Text, Field(max_length=64), AfterValidator(one_of(AR))]]
Scheduler = OrNone[Annotated[Text, Field(max_length=64), AfterValidator(one_of(SCHEDULERS))]]
ControlNet = OrNone[Annotated[Text, Field(max_length=64), AfterValidator(one_of((*CONTROLS, *HOSTED_CONTROLS)))]]
FilingId = NumberOrNone[Annotated[int, Field(ge=0, lt=2**53)]]


def _enlarged(value: object) -> object:
    """Older requests to the hosted service name a factor; any factor means true."""
    return True if isinstance(value, str) and value.strip().lower() in ("x2", "x4") else blank_is_none(value)


class PromptRequest(Request):
    """A prompt to render."""

    text: Annotated[Text, Field(min_length=1, max_length=10_000)]
    negative_prompt: PromptText = None
    num_images: NumImages = None
    seed: Seed = None
    steps: SamplingSteps = None
    cfg_scale: CfgScale = None
    w: Side = None
    h: Side = None
    callback: Address = None
    aspect_ratio: AspectRatio = None
    ar: OlderAspectRatio = None
    scheduler: Scheduler = None
    use_lpw: OptionalBool = None
    lora_scale: LoraScale = None
    style: Word = None
    color_grading: Word = None
    film_grain: OptionalBool = None
    super_resolution: Annotated[bool | None, BeforeValidator(_enlarged)] = None
    hires_fix: OptionalBool = None
    inpaint_faces: OptionalBool = None
    face_correct: OptionalBool = None
    face_swap: OptionalBool = None
    input_image: object = Field(None, exclude=True)
    input_image_url: OptionalUrl = None
    mask_image: object = Field(None, exclude=True)
    mask_image_url: OptionalUrl = None
    denoising_strength: Share = None
    controlnet: ControlNet = None
    controlnet_conditioning_scale: Share = None
    controlnet_txt2img: OptionalBool = None

    _parsed: ParsedText | None = PrivateAttr(default=None)

    @property
    def parsed(self) -> ParsedText:
        """Its text, parsed at the first call. Raises InvalidRequest for a model that cannot be read."""
        if self._parsed is None:
            self._parsed = parse_text(self.text)
        return self._parsed

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
        """Whether it starts from an input picture."""
        return self.input_image is not None or self.input_image_url is not None

    @property
    def has_mask(self) -> bool:
        return self.mask_image is not None or self.mask_image_url is not None


class PromptChange(Request):
    """The parameters of an existing prompt that the hosted service changes: where it is filed. None has an effect."""

    pack_id: FilingId = None
    base_pack_id: FilingId = None
    orig_prompt_id: FilingId = None
    workspace_id: FilingId = None


PICTURES = ("input_image", "mask_image")  # files, in a request and in the prompt's folder
DIGESTS = "picture_digests"  # in the attributes of a row: the sha256 of each of these files
# The parameters that are columns of a prompt's row; the others are in its `attributes`.
COLUMNS = ("text", "negative_prompt", "num_images", "seed", "steps", "cfg_scale", "w", "h", "callback")


def attributes_of(request: PromptRequest) -> dict[str, JsonValue]:
    """The `attributes` of a prompt's row: the given parameters that are neither columns nor pictures."""
    names = {name for name in PromptRequest.model_fields if name not in (*COLUMNS, *PICTURES)}
    return {name: value for name, value in request.model_dump(include=names).items() if value is not None}


FILES = (*PICTURES, DIGESTS)  # in the attributes of a row, and not in a request


def prompt_of(row: PromptToRender) -> PromptRequest:
    """The request that a prompt's row holds."""
    attributes = {name: value for name, value in row["attributes"].items() if name not in FILES}
    request = PromptRequest.model_validate(
        {**{name: value for name, value in row.items() if name in COLUMNS}, **attributes}
    )
    if parsed := row["parsed"]:  # null in rows of older versions: their text is parsed at its first use
        request._parsed = of_row(parsed)
    return request


class Echo(BaseModel):
    """The attributes in the hosted service's prompt object, with defaults for prompts of older versions."""

    super_resolution: bool = False
    ar: OrNone[Annotated[Text, Field(max_length=32)]] = "1:1"
    controlnet_conditioning_scale: Share = None
    controlnet_txt2img: bool = False
    denoising_strength: Share = None


class Prompt(BaseModel):
    """A prompt as all interfaces answer it: the hosted service's keys in its order, then ours."""

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
    input_image: str | None = Field(description="a link to it, also if it was given as input_image_url")
    mask_image: str | None
    thumbnails: list[str]
    contact_sheet: str | None
    preview: str | None = Field(description="a link to the unfinished picture, while it renders")
    status: PromptStatus
    progress: Progress
    error: str | None
    user_error: str | None
    warnings: list[str]
    tunes: list[int]
    liked: bool
