"""Defaults of a branch <- preset <- request -> TrainConfig. The only reader of TOML; no default stands in code.

A TOML has a table for each model type, and in it, where a kind of subject wants other numbers, a table for that kind:

    [lora]              what holds for every subject
    [lora.person]       what differs for people; also: animal, style, object (everything else)
    [[lora.memory]]     in a branch's own TOML: what changes on a card with less free memory than `below_gib`

Each layer overrides the one before: [lora] and then [lora.KIND] of the branch, the same two of the preset, the request.
The other model types say what is different from [lora]: [pti] in branches and presets, [checkpoint] in branches.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from trainer.branches import BRANCHES
from trainer.methods import METHODS, WORDS
from trainer.schema import InvalidRequest, nearest, words


def _whole_numbers(value: Any) -> Any:
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
    """Everything that decides how a model is trained; the words of `args`."""

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
        description="of an earlier LoRA: go on from its weights, where rank and layers are the same; or keep it as it "
        "is and begin a new one on it. What is saved holds both"
    )
    tokens: int = Field(ge=0, le=16, description="new words that stand for the token")
    token_lr: float = Field(ge=0, le=1, description="learning rate of their embeddings")
    token_share: float = Field(ge=0, le=1, description="share of the steps in which they are trained; then they rest")
    resolution: Resolutions = Field(description="side of the training pictures in pixels; several: each photo at each")
    buckets: bool = Field(description="keep each photo's aspect ratio; else its centre square is trained")
    crops: int = Field(ge=1, le=16, description="different crops of each photo; the first is its centre")
    flip: bool = Field(description="train on mirrored photos, too")
    face_set: bool = Field(description="a second set of face crops, captioned as closeup")
    faceless: Literal["keep", "drop"] = Field(description="photos of people in which no face is found")
    restore_strength: float = Field(ge=0, le=1, description="of training_face_correct: 1 takes the restored face whole")
    mask: Literal["none", "face", "subject"] = Field(description="which part of a photo the loss looks at")
    mask_widen: float = Field(ge=0, le=1, description="share of the steps that look at the whole subject instead")
    mask_floor: float = Field(ge=0, le=1, description="weight of what lies outside the mask, where inside is 1")
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
    guidance: float = Field(ge=0, le=100, description="what a guidance-distilled model is told while it is trained")
    caption_dropout: float = Field(ge=0, le=1, description="share of samples that see no caption")
    save_every: int = Field(ge=1, description="steps between two states to resume from")
    save_dtype: Literal["float32", "float16", "bfloat16"] = Field(description="number format of the saved model")

    @property
    def text_steps(self) -> int:
        """In how many steps, from the first on, what captions are encoded to is trained as well."""
        return self.steps if self.text_encoder_lr else self.token_steps

    @property
    def token_steps(self) -> int:
        """In how many of them the new words are trained."""
        return max(1, round(self.steps * self.token_share)) if self.tokens else 0


STEP_RULE = ("steps_per_photo", "min_steps", "max_steps")  # what a TOML has in place of `steps`
KEYS = {*TrainConfig.model_fields, *STEP_RULE} - {"steps"}
PRESET_KEYS = {"branches", *METHODS}  # the top level of a preset

# What a class name is about. The people are those of the hosted service (astria-docs, "face crop"), and their plurals.
KINDS = {
    "person": {
        "man", "woman", "boy", "girl", "child", "baby", "person", "couple", "men", "women", "boys", "girls",
        "children", "people",
    },
    "animal": {
        "cat", "dog", "puppy", "kitten", "bird", "horse", "rabbit", "hamster", "animal", "pet", "parrot", "cow", "pig",
        "sheep", "goat", "fox", "bear", "fish", "turtle", "lizard", "snake", "ferret", "mouse", "duck", "chicken",
        "cats", "dogs", "puppies", "kittens", "birds", "horses", "rabbits", "animals", "pets",
    },
}  # fmt: skip
STYLE_KIND, OTHER_KIND = "style", "object"


@dataclass(frozen=True)
class RenderConfig:
    """What a prompt gets that does not say: sampling steps, guidance, width and height in pixels."""

    steps: int
    cfg_scale: float
    w: int
    h: int
    hires_strength: float = 0.4  # of the noise that hires_fix puts on the enlarged picture; 0: there is nothing to gain
    face_strength: float = 0.5  # of that which inpaint_faces puts on a face
    multiple: int = 8  # pixels of which both sides are multiples
    fixed_size: int | None = None  # a base that knows one size renders this many pixels on the longer side
    negative_prompt: bool = True  # False: the family has no use for one
    schedulers: bool = True  # False: the family has a sampler of its own
    preview: str | None = None  # the hub repository of a tiny decoder (TAESD)


@dataclass(frozen=True)
class BaseRow:
    """A base model by its number in the hosted service's gallery (0: it has none there)."""

    title: str
    repository: str
    id: int = 0
    revision: str | None = None
    variant: str | None = None  # of its weight files: `fp16` where the repository has them twice


def kind_of(name: str) -> str:
    """What a class name is about: person, animal, style or object. `name` may have several words."""
    if "style" in name.lower():  # as `schema.default_caption` has it
        return STYLE_KIND
    spoken = set(name.lower().split())
    return next((kind for kind, known in KINDS.items() if spoken & known), OTHER_KIND)


def branch_table(folder: Path, branch: str) -> dict[str, Any]:
    """The TOML of a branch."""
    return tomllib.loads((folder / f"{branch}.toml").read_text("utf-8"))


def base_rows(folder: Path, branch: str) -> list[BaseRow]:
    """The hub repositories that a branch may start from; the first one is its default."""
    return [BaseRow(**row) for row in branch_table(folder, branch).get("base", [])]


def render_config(folder: Path, branch: str) -> RenderConfig:
    return RenderConfig(**branch_table(folder, branch)["render"])


@dataclass(frozen=True)
class Style:
    """What a style makes of a prompt: `prompt` has the user's in place of {prompt}; `negative` is added to theirs."""

    prompt: str
    negative: str = ""


def styles(folder: Path) -> dict[str, Style]:
    """The styles of prompts by their names."""
    return {name: Style(**table) for name, table in looks(folder, "styles").items()}


@dataclass(frozen=True)
class FilmLook:
    """How a film shows colours, all from 0 to 1: a matrix, then a saturation, then a tone curve for each channel.

    curves: points (x, y) of red, green and blue, x rising. matrix: 3 x 3, a row for each channel of the result.
    """

    curves: tuple[tuple[tuple[float, float], ...], ...]
    saturation: float
    matrix: tuple[tuple[float, float, float], ...]


def film_looks(folder: Path) -> dict[str, FilmLook]:
    """The looks that `color_grading` chooses from, by their names."""
    return {
        name: FilmLook(
            curves=tuple(tuple((x, y) for x, y in row[channel]) for channel in ("red", "green", "blue")),
            saturation=row["saturation"],
            matrix=tuple((red, green, blue) for red, green, blue in row["matrix"]),
        )
        for name, row in looks(folder, "film").items()
    }


def looks(folder: Path, name: str) -> dict[str, Any]:
    """A TOML of what can be done to a picture's look; an empty one where a user's folder has none."""
    file = folder / "looks" / f"{name}.toml"
    return tomllib.loads(file.read_text("utf-8")) if file.exists() else {}


def pack_tables(*folders: Path) -> dict[str, dict[str, Any] | str]:
    """The TOMLs of the packs in some folders by their names; of one that cannot be read, why not."""
    tables: dict[str, dict[str, Any] | str] = {}
    for file in (file for folder in folders for file in sorted(folder.glob("*.toml"))):
        try:
            tables[file.stem] = tomllib.loads(file.read_text("utf-8"))
        except (OSError, ValueError, RecursionError) as problem:
            tables[file.stem] = f"{file.name} cannot be read: {problem}"
    return tables


@dataclass(frozen=True)
class ControlRow:
    """The hub repository of a control model; the names are those of `BaseRow`."""

    repository: str
    revision: str | None = None
    variant: str | None = None


def control_row(folder: Path, branch: str, kind: str) -> ControlRow | None:
    """Where the control model of this kind comes from; None: the branch has none."""
    row = branch_table(folder, branch).get("control", {}).get(kind)
    return ControlRow(**row) if row else None


def annotator_row(folder: Path, name: str) -> ControlRow:
    """Where a model comes from that looks at a picture for control models: depth, people or pose.

    Raises ValueError where a user's own folder does not say.
    """
    rows = looks(folder, "annotators")
    if name not in rows:
        raise ValueError(f"looks/annotators.toml has no [{name}]; copy the one of the program into the presets folder")
    return ControlRow(**rows[name])


def default_token(folder: Path, branch: str) -> str:
    return str(branch_table(folder, branch)["token"])


def default_model_type(folder: Path, branch: str) -> str:
    return str(branch_table(folder, branch)["model_type"])


def branch_warnings(folder: Path, branch: str) -> list[str]:
    """What a user of this branch must know."""
    return list(branch_table(folder, branch).get("warnings", []))


def list_presets(folder: Path) -> list[str]:
    """Every TOML in the folder that is not named after a branch: the project's presets and a user's own."""
    return sorted(path.stem for path in folder.glob("*.toml") if path.stem not in BRANCHES)


def resolve(
    folder: Path,
    *,
    branch: str,
    model_type: str,
    preset: str | None,
    name: str,
    photos: int,
    steps: int | None,
    args: str | None,
    face_crop: bool | None = None,
    face_crop_default: bool = False,
) -> TrainConfig:
    """The one place where hyper-parameters are decided. `name` is the class name, `photos` the number of photos.

    Whether there is a set of face crops: `face_crop`, else the preset, else `face_crop_default`; only for people.
    Raises InvalidRequest naming the field that is wrong.
    """
    kind, table = kind_of(name), branch_table(folder, branch)
    values = layer(table["lora"], kind) | layer(table[model_type], kind)
    values |= {word: 0 for word, having in WORDS.items() if model_type not in having}
    values |= {"face_set": True} if face_crop_default else {}
    if preset is not None:
        values |= overlay(folder / f"{preset}.toml", branch, model_type, kind)
    if face_crop is not None:
        values["face_set"] = face_crop
    asked = parse_args(args)
    for word, given in (("steps", steps), ("face_set", face_crop)):
        if word in asked and given is not None:
            name_of = {"face_set": "face_crop"}.get(word, word)
            raise InvalidRequest({"args": [f"{word} is given twice: as {name_of} and in args; leave one of them out"]})
    if kind != "person":
        values |= {"face_set": False}
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
    meaningless = [(word, f"on {branch}") for word in table.get("without", []) if getattr(config, word)]
    meaningless += [
        (word, f"for {model_type}") for word, of in WORDS.items() if getattr(config, word) and model_type not in of
    ]
    told = [(word, f"{word} has no meaning {where}; leave it out") for word, where in meaningless]
    lacking = [word for word, of in WORDS.items() if not getattr(config, word) and model_type in of]
    told += [(word, f"{word} must not be 0") for word in lacking]
    if config.trained_dtype == "bfloat16" and config.optimizer != "adafactor":
        told.append(("trained_dtype", "trained_dtype=bfloat16 needs optimizer=adafactor, which rounds at random"))
    if told:
        field = "args" if asked.keys() & {word for word, _ in told} else "preset"
        raise InvalidRequest({field: [message for _, message in told]})
    # A photo twice in one batch is a smaller batch, paid in full.
    return config if "batch" in asked else config.model_copy(update={"batch": min(config.batch, photos)})


def layer(table: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The values of one table of a model type, with those for a kind of subject over them."""
    plain = {key: value for key, value in table.items() if key in KEYS}
    return {**plain, **table.get(kind, {})}


def model_types(folder: Path, branch: str) -> list[str]:
    """What can be trained on a branch."""
    return [method for method in METHODS if method in branch_table(folder, branch)]


def why_not(folder: Path, branch: str) -> dict[str, str]:
    """Why a branch does not have a model type, in words."""
    return dict(branch_table(folder, branch).get("why_not", {}))


def method_of(folder: Path, branch: str, model_type: str) -> str:
    """What a model type means on a branch: sdxl1 takes lora for pti, as the hosted service does."""
    return str(branch_table(folder, branch).get("instead", {}).get(model_type, model_type))


def overlay(file: Path, branch: str, model_type: str, kind: str) -> dict[str, Any]:
    """What a preset says. Raises InvalidRequest for a TOML that is broken, of another branch, or has an unknown key."""
    try:
        preset = tomllib.loads(file.read_text("utf-8"))
    except ValueError as problem:
        raise InvalidRequest({"preset": [f"{file.name} cannot be read: {problem}"]}) from None
    problems = unknown(file, preset, PRESET_KEYS)
    if branch not in preset.get("branches", [branch]):
        problems.append(f"{file.stem} is a preset for {words(preset['branches'])}, not for {branch}")
    for section in PRESET_KEYS & preset.keys() - {"branches"}:
        problems += section_problems(file, section, preset[section])
    if problems:
        raise InvalidRequest({"preset": problems})
    plain = layer(preset.get("lora", {}), kind) if model_type == "pti" else {}  # it is a LoRA, and new words
    return plain | layer(preset.get(model_type, {}), kind)


def section_problems(file: Path, section: str, table: Any) -> list[str]:
    """What is wrong with the table of a model type, in words; the values are checked when they are put together."""
    if not isinstance(table, dict):
        return [f"{file.name}: {section} must be a table, [{section}]"]
    kinds = {*KINDS, STYLE_KIND, OTHER_KIND}
    problems = unknown(file, table, KEYS | kinds)
    for kind in kinds & table.keys():
        if isinstance(table[kind], dict):
            problems += unknown(file, table[kind], KEYS)
        else:
            problems.append(f"{file.name}: {section}.{kind} must be a table, [{section}.{kind}]")
    tables = [table, *(table[kind] for kind in kinds & table.keys() if isinstance(table[kind], dict))]
    wrong = {key for one in tables for key in STEP_RULE if type(one.get(key, 0)) is not int}
    return problems + [f"{file.name}: {key} must be a whole number" for key in sorted(wrong)]


def unknown(file: Path, table: Mapping[str, Any], known: set[str]) -> list[str]:
    return [f"{file.name} has an unknown key {key!r}{nearest(key, known)}" for key in table if key not in known]


def least_gib(folder: Path, branch: str, model_type: str) -> float:
    """Free card memory below which this cannot be trained at all, in GiB."""
    return float(branch_table(folder, branch)[model_type].get("least_gib", 0))


def fit(
    folder: Path, config: TrainConfig, *, branch: str, model_type: str, asked: str | None, free_gib: float
) -> TrainConfig:
    """The configuration for a card with this much free memory; what was asked for in `args` stays as it is.

    Rows of [[MODEL_TYPE.memory]] apply in their order where the memory is below their `below_gib`. Afterwards
    micro_batch is from 1 to batch.
    """
    changes: dict[str, Any] = {}
    for row in branch_table(folder, branch)[model_type].get("memory", []):
        if free_gib < row["below_gib"]:
            changes |= {key: value for key, value in row.items() if key != "below_gib"}
    if "resolution" in changes:  # never more than there was
        sides = (min(side, changes["resolution"]) for side in config.resolution)
        changes["resolution"] = tuple(dict.fromkeys(sides))
    wanted = parse_args(asked)
    if wanted.get("optimizer", "adafactor") != "adafactor":  # nothing else rounds at random
        changes.pop("trained_dtype", None)
    fitted = config.model_dump() | {key: value for key, value in changes.items() if key not in wanted}
    return TrainConfig(**fitted | {"micro_batch": min(fitted["micro_batch"] or config.batch, config.batch)})


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
    return " ".join(f"{key}={_as_word(value)}" for key, value in config)


def _as_word(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).removesuffix(".0")  # str: the shortest digits that read back as the very same number
