"""The hyper-parameters of a run (`TrainConfig`), and their text form, `args`."""

from __future__ import annotations

import re
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import ErrorDetails

from trainer.config.args_text import SEPARATORS, our_value, our_word, spellings, split_args
from trainer.contract.errors import InvalidRequest, nearest, words


def _whole_numbers(value: object) -> object:
    """`512`, `"512,768"` and `[512, 768]` -> a tuple."""
    if isinstance(value, str):
        return tuple(value.split(","))
    return (value,) if isinstance(value, int) else value


Resolutions = Annotated[
    tuple[Annotated[int, Field(ge=32, le=2048, multiple_of=8)], ...],
    BeforeValidator(_whole_numbers),
    Field(min_length=1, max_length=4),
]


class TrainConfig(BaseModel):
    """All hyper-parameters of a run; the words of `args`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    steps: int = Field(ge=1, le=10_000, description="optimizer steps")
    batch: int = Field(ge=1, le=64, description="pictures in each step")
    micro_batch: int = Field(ge=0, le=64, description="of these, how many at once; 0: as many as the card has room for")
    gradient_checkpointing: bool = Field(description="compute activations twice, to keep fewer of them in memory")
    lr: float = Field(gt=0, le=1, description="learning rate of the denoiser")
    text_encoder_lr: float = Field(ge=0, le=1, description="learning rate of the text encoders; 0 leaves them alone")
    optimizer: Literal["adamw", "adafactor"] = Field(
        description="adafactor: factored moments, and each gradient is used and freed within the backward pass"
    )
    trained_dtype: Literal["float32", "bfloat16"] = Field(
        description="number format of the weights that are trained; bfloat16 needs adafactor, which rounds at random"
    )
    rank: int = Field(ge=0, le=512, description="inner width of the adapters")
    alpha: float = Field(ge=0, le=1024, description="scale of the adapters, times rank")
    targets: Literal["cross_attention", "attention", "all"] = Field(
        description="which linear layers of the denoiser get adapters, or are trained themselves (checkpoint; all: "
        "every weight there); cross_attention: the keys and values of text alone (Kumari et al. 2022, arXiv "
        "2212.04488), which is the fastest and keeps the rest best"
    )
    on_top: Literal["continue", "merge"] = Field(
        description="of an earlier LoRA: continue from its weights, if rank and layers are the same; or keep it as it "
        "is and train a new one on it. The saved file holds both"
    )
    tokens: int = Field(ge=0, le=16, description="learned tokens that replace the token")
    token_lr: float = Field(ge=0, le=1, description="learning rate of their embeddings")
    token_share: float = Field(ge=0, le=1, description="share of the steps in which they are trained, at the start")
    resolution: Resolutions = Field(description="side of the training pictures in pixels; several: each photo at each")
    buckets: bool = Field(description="keep each photo's aspect ratio; else its centre square is trained")
    crops: int = Field(ge=1, le=16, description="different crops of each photo; the first is its centre")
    flip: bool = Field(description="train on mirrored photos, too")
    face_set: bool = Field(description="a second set of face crops, captioned as closeup")
    faceless: Literal["keep", "drop"] = Field(description="photos of people in which no face is found")
    restore_strength: float = Field(ge=0, le=1, description="of training_face_correct: 1 takes the restored face whole")
    mask: Literal["none", "face", "subject"] = Field(description="which part of a photo the loss counts")
    mask_widen: float = Field(ge=0, le=1, description="share of the steps with the mask of the whole subject instead")
    mask_floor: float = Field(ge=0, le=1, description="weight of the pixels outside the mask; inside it is 1")
    prior_weight: float = Field(ge=0, le=10, description="weight of the class pictures' loss; 0: prior not preserved")
    prior_images: int = Field(ge=1, le=1000, description="class pictures that the base renders for that")
    seed: int = Field(ge=0, lt=2**32, description="of weights, order and noise")
    schedule: Literal["constant", "linear", "cosine", "polynomial"] = Field(
        description="of the learning rate, after warm-up"
    )
    power: float = Field(gt=0, le=10, description="of the polynomial schedule")
    warmup_steps: int = Field(ge=0, description="steps in which the learning rate rises from 0")
    weight_decay: float = Field(ge=0, le=1, description="of AdamW")
    max_grad_norm: float = Field(
        gt=0, description="gradients are clipped to this norm; adafactor clips each update by itself"
    )
    min_snr: float = Field(ge=0, le=100, description="gamma of min-SNR weighting; 0: none")
    guidance: float = Field(ge=0, le=100, description="guidance value that a guidance-distilled model gets in training")
    caption_dropout: float = Field(ge=0, le=1, description="share of samples that see no caption")
    save_every: int = Field(ge=1, description="steps between two states to resume from")
    save_dtype: Literal["float32", "float16", "bfloat16"] = Field(description="number format of the saved model")

    @property
    def text_steps(self) -> int:
        """The number of steps, from the first on, in which the text encoders or embeddings are trained as well."""
        return self.steps if self.text_encoder_lr else self.token_steps

    @property
    def token_steps(self) -> int:
        """The number of steps, from the first on, in which the learned tokens are trained."""
        return max(1, round(self.steps * self.token_share)) if self.tokens else 0


def parse_args(args: str | None) -> dict[str, str]:
    """`rank=32 learning_rate=2e-4` -> {"rank": "32", "lr": "2e-4"}. Raises InvalidRequest for unknown words."""
    asked: dict[str, str] = {}
    pairs, strange = split_args(args or "")
    problems = [f"{word!r} is not key=value" for word in strange]
    for written, value in pairs:
        key, not_here = our_word(written), spellings()["not_here"]
        if key in not_here:
            problems.append(f"{written!r} cannot be set here; {not_here[key]}")
        elif key not in TrainConfig.model_fields:
            problems.append(
                f"unknown word {written!r}{nearest(key, [*TrainConfig.model_fields, *spellings()['words']])}"
            )
        elif not value:
            problems.append(f"{written}= has no value")
        elif key in asked:
            problems.append(f"{key} is given twice" if written == key else f"{key} is given twice: as {written}, too")
        else:
            try:
                asked[key] = our_value(key, value, decimal=TrainConfig.model_fields[key].annotation is float)
            except ValueError as problem:
                problems.append(f"{key}: {problem}")
    if problems:
        known = f"known words: {words(TrainConfig.model_fields)}"
        raise InvalidRequest({"args": [*problems, *([SEPARATORS] if strange else []), known]})
    return asked


def value_problem(word: str, problem: ErrorDetails) -> str:
    """One of pydantic's errors on a word, in our words, with the value."""
    kind, context, value = problem["type"], problem.get("ctx", {}), problem["input"]
    bounds = {"greater_than_equal": "at least", "less_than_equal": "at most", "greater_than": "more than"}
    bounds |= {"less_than": "less than"}
    if kind in bounds:
        needs = f"{bounds[kind]} {next(context[name] for name in ('ge', 'le', 'gt', 'lt') if name in context):g}"
    elif kind == "multiple_of":
        needs = f"a multiple of {context['multiple_of']}"
    elif kind == "literal_error":
        return f"{word} must be {context['expected']}, got {value!r}{nearest(str(value), _choices(word))}"
    elif kind in ("too_short", "too_long"):
        return f"{word} takes one to four numbers, separated by commas, got {len(value)}"
    elif kind.startswith("bool"):
        needs = "true or false"
    elif kind.startswith("int"):
        needs = "a whole number"
    else:
        needs = "a number"
    hint = f"; {SEPARATORS}" if isinstance(value, str) and re.search("[,;:=]", value) else ""
    return f"{word} must be {needs}, got {value!r}{hint}"


def _choices(word: str) -> tuple[str, ...]:
    return get_args(TrainConfig.model_fields[word].annotation)


def as_args(config: TrainConfig) -> str:
    """The configuration as `key=value` words, ready to be sent again as `args`."""
    return " ".join(f"{key}={_as_word(value)}" for key, value in config)


def _as_word(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).removesuffix(".0")  # str: the shortest digits that parse to the same number
