"""Defaults of a branch <- preset <- request -> TrainConfig. The only reader of TOML; no default stands in code."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trainer.branches import BRANCHES, PLANNED
from trainer.schema import InvalidRequest, nearest, words


class TrainConfig(BaseModel):
    """Everything that decides how a model is trained; the words of `args`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    steps: int = Field(ge=1, le=10_000, description="optimizer steps")
    batch: int = Field(ge=1, le=64, description="photos per step")
    lr: float = Field(gt=0, le=1, description="learning rate of the denoiser")
    text_encoder_lr: float = Field(ge=0, le=1, description="learning rate of the text encoder; 0 leaves it alone")
    rank: int = Field(ge=1, le=512, description="inner width of the adapters")
    alpha: float = Field(gt=0, le=1024, description="scale of the adapters, times rank")
    targets: Literal["attention", "all"] = Field(description="which linear layers of the denoiser get adapters")
    resolution: int = Field(ge=32, le=2048, multiple_of=8, description="side of the training pictures, in pixels")
    seed: int = Field(ge=0, lt=2**32, description="of weights, order and noise")
    schedule: Literal["constant", "cosine", "linear"] = Field(description="of the learning rate, after warm-up")
    warmup_steps: int = Field(ge=0, description="steps in which the learning rate rises from 0")
    weight_decay: float = Field(ge=0, le=1, description="of AdamW")
    max_grad_norm: float = Field(gt=0, description="gradients are clipped to this norm")
    min_snr: float = Field(ge=0, le=100, description="gamma of min-SNR weighting; 0: none")
    caption_dropout: float = Field(ge=0, le=1, description="share of samples that see no caption")
    save_every: int = Field(ge=1, description="steps between two states to resume from")


STEP_RULE = ("steps_per_photo", "min_steps", "max_steps")  # what a TOML has in place of `steps`


@dataclass(frozen=True)
class RenderConfig:
    """What a prompt gets that does not say: sampling steps, guidance, width and height in pixels."""

    steps: int
    cfg_scale: float
    w: int
    h: int
    fixed_size: int | None = None  # a base that knows one size renders this many pixels on the longer side


@dataclass(frozen=True)
class BaseRow:
    """A base model by its number in the hosted service's gallery (0: it has none there)."""

    title: str
    repository: str
    id: int = 0


def branch_table(folder: Path, branch: str) -> dict[str, Any]:
    """The TOML of a branch."""
    return tomllib.loads((folder / f"{branch}.toml").read_text("utf-8"))


def base_rows(folder: Path, branch: str) -> list[BaseRow]:
    """The hub repositories that a branch may start from; the first one is its default."""
    return [BaseRow(**row) for row in branch_table(folder, branch).get("base", [])]


def render_config(folder: Path, branch: str) -> RenderConfig:
    return RenderConfig(**branch_table(folder, branch)["render"])


def default_token(folder: Path, branch: str) -> str:
    return str(branch_table(folder, branch)["token"])


def default_model_type(folder: Path, branch: str) -> str:
    return str(branch_table(folder, branch)["model_type"])


def list_presets(folder: Path) -> list[str]:
    """Every TOML in the folder that is not named after a branch: the project's presets and a user's own."""
    return sorted(path.stem for path in folder.glob("*.toml") if path.stem not in (*BRANCHES, *PLANNED))


def resolve(
    folder: Path,
    *,
    branch: str,
    model_type: str,
    preset: str | None,
    photos: int,
    steps: int | None,
    args: str | None,
) -> TrainConfig:
    """The one place where hyper-parameters are decided. `photos` is the number of training pictures.

    Raises InvalidRequest naming the field that is wrong.
    """
    values: dict[str, Any] = dict(branch_table(folder, branch)[model_type])
    if preset is not None:
        values |= overlay(folder / f"{preset}.toml", model_type)
    asked = parse_args(args)
    if "steps" in asked and steps is not None:
        raise InvalidRequest({"args": ["steps is given twice: as steps and in args; leave one of them out"]})
    per_photo, least, most = (values.pop(key) for key in STEP_RULE)
    values["steps"] = steps if steps is not None else min(max(per_photo * photos, least), most)
    try:
        config = TrainConfig(**{**values, **asked})
    except ValidationError as error:
        problems: dict[str, list[str]] = {}
        for problem in error.errors():
            word = str(problem["loc"][0])
            field = "args" if word in asked else "steps" if word == "steps" and steps is not None else "preset"
            problems.setdefault(field, []).append(f"{word}: {problem['msg']}")
        raise InvalidRequest(problems) from None
    # A photo twice in one batch is a smaller batch, paid in full.
    return config if "batch" in asked else config.model_copy(update={"batch": min(config.batch, photos)})


def overlay(file: Path, model_type: str) -> dict[str, Any]:
    """What a preset says about a model type. Raises InvalidRequest for a TOML that is broken or has an unknown key."""
    known = {*TrainConfig.model_fields, *STEP_RULE} - {"steps"}
    try:
        table = tomllib.loads(file.read_text("utf-8")).get(model_type, {})
    except ValueError as problem:
        raise InvalidRequest({"preset": [f"{file.name} cannot be read: {problem}"]}) from None
    if not isinstance(table, dict):
        raise InvalidRequest({"preset": [f"{file.name}: {model_type} must be a table, [{model_type}]"]})
    problems = [f"{file.name} has an unknown key {key!r}{nearest(key, known)}" for key in table if key not in known]
    problems += [
        f"{file.name}: {key} must be a whole number" for key in STEP_RULE if type(table.get(key, 0)) is not int
    ]
    if problems:
        raise InvalidRequest({"preset": problems})
    return dict(table)


def parse_args(args: str | None) -> dict[str, str]:
    """`rank=32 lr=2e-4` -> {"rank": "32", "lr": "2e-4"}. Raises InvalidRequest for what is not a known word."""
    asked: dict[str, str] = {}
    problems = []
    for word in (args or "").split():
        key, equals, value = word.partition("=")
        if not equals or not value:
            problems.append(f"{word!r} is not key=value")
        elif key not in TrainConfig.model_fields:
            problems.append(f"unknown word {key!r}{nearest(key, TrainConfig.model_fields)}")
        elif key in asked:
            problems.append(f"{key} is given twice")
        else:
            asked[key] = value
    if problems:
        raise InvalidRequest({"args": [*problems, f"known words: {words(TrainConfig.model_fields)}"]})
    return asked


def as_args(config: TrainConfig) -> str:
    """The configuration as `key=value` words, ready to be sent again as `args`."""
    # repr: the shortest digits that read back as the very same number
    return " ".join(f"{key}={str(value).removesuffix('.0')}" for key, value in config)
