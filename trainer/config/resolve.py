"""Branch defaults <- preset <- request -> TrainConfig. All defaults are in TOML, none in code."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from trainer.config.branch_file import branch_table
from trainer.config.kinds import KINDS, OTHER_KIND, STYLE_KIND, kind_of
from trainer.config.toml_file import Table, read_toml
from trainer.config.train_config import TrainConfig, parse_args, value_problem
from trainer.contract.errors import InvalidRequest, nearest, words
from trainer.files import Unreadable
from trainer.names import DEFAULT_METHOD, METHODS, MODEL_TYPES, WORDS

STEP_RULE = ("steps_per_photo", "min_steps", "max_steps")  # the keys of a TOML that decide `steps`
KEYS = {*TrainConfig.model_fields, *STEP_RULE} - {"steps"}
RANDOM_SEED = ("-1", "random")  # a seed is drawn; the answer's `args` have it
SEEDS = 2**32
PRESET_KEYS = {"branches", *METHODS}  # the top level of a preset


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
    """Decide the hyper-parameters. name: the class name. photos: the number of photos.

    Face crops are for people only; they are added if `face_crop`, else the preset, else `face_crop_default` says so.
    Raises InvalidRequest with the invalid fields.
    """
    kind, table = kind_of(name), branch_table(folder, branch)
    values = layer(table[DEFAULT_METHOD], kind) | layer(table[model_type], kind)
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
    per_photo, least, most = (step_rule(branch, key, values.pop(key, None)) for key in STEP_RULE)
    values["steps"] = steps if steps is not None else min(max(per_photo * photos, least), most)
    asked |= {"seed": str(secrets.randbelow(SEEDS))} if asked.get("seed") in RANDOM_SEED else {}
    try:
        config = TrainConfig(**{**values, **asked})
    except ValidationError as error:
        problems: dict[str, list[str]] = {}
        for problem in error.errors():
            word = str(problem["loc"][0])
            field = "args" if word in asked else "steps" if word == "steps" and steps is not None else "preset"
            where = "" if preset or field != "preset" else f"{branch}.toml: "
            problems.setdefault(field, []).append(f"{where}{value_problem(word, problem)}")
        raise InvalidRequest(problems) from None
    meaningless = [(word, f"on {branch}") for word in table.get("without", []) if getattr(config, word)]
    meaningless += [
        (word, f"for {model_type}") for word, of in WORDS.items() if getattr(config, word) and model_type not in of
    ]
    messages = [(word, f"{word} has no meaning {where}; leave it out") for word, where in meaningless]
    lacking = [word for word, of in WORDS.items() if not getattr(config, word) and model_type in of]
    messages += [(word, f"{word} must not be 0") for word in lacking]
    if config.trained_dtype == "bfloat16" and config.optimizer != "adafactor":
        messages.append(("trained_dtype", "trained_dtype=bfloat16 needs optimizer=adafactor, which rounds at random"))
    messages += contradictions(config, asked, values)
    if messages:
        field = "args" if asked.keys() & {word for word, _ in messages} else "preset"
        raise InvalidRequest({field: [message for _, message in messages]})
    # A photo that is twice in a batch costs twice and teaches once.
    return config if "batch" in asked else config.model_copy(update={"batch": min(config.batch, photos)})


def contradictions(config: TrainConfig, asked: Mapping[str, str], values: Table) -> list[tuple[str, str]]:
    """(word, message) for each word of `args` that contradicts the run.

    values: those that hold without `args`. A word that repeats them is not meant as a change: the `args` of an answer
    can be sent again.
    """
    warmup = config.warmup_steps
    if "warmup_steps" not in asked or warmup <= config.steps or warmup == values["warmup_steps"]:
        return []
    return [("warmup_steps", f"warmup_steps={warmup} is longer than the run of {config.steps} steps")]


def step_rule(branch: str, key: str, value: object) -> int:
    """A number of the rule for steps. Raises InvalidRequest where neither branch nor preset has it."""
    if type(value) is not int:
        raise InvalidRequest({"branch": [f"{branch} cannot be used: {key} in {branch}.toml must be a whole number"]})
    return value


def layer(table: Table, kind: str) -> Table:
    """The values of a model type's table; those for the kind of subject override the others."""
    plain = {key: value for key, value in table.items() if key in KEYS}
    return {**plain, **table.get(kind, {})}


def overlay(file: Path, branch: str, model_type: str, kind: str) -> Table:
    """The values of a preset. Raises InvalidRequest for an invalid TOML, an unknown key or another branch's preset."""
    try:
        preset = read_toml(file)
    except FileNotFoundError:
        raise InvalidRequest({"preset": [f"there is no {file.name} any more"]}) from None
    except Unreadable as problem:
        raise InvalidRequest({"preset": [str(problem)]}) from None
    problems = unknown(file, preset, PRESET_KEYS)
    branches = preset.get("branches", [branch])
    if not isinstance(branches, list) or not all(isinstance(one, str) for one in branches):
        problems.append(f'{file.name}: branches must be a list of names, as ["{branch}"]')
    elif branch not in branches:
        problems.append(f"{file.stem} is a preset for {words(preset['branches'])}, not for {branch}")
    for section in PRESET_KEYS & preset.keys() - {"branches"}:
        problems += section_problems(file, section, preset[section])
    if problems:
        raise InvalidRequest({"preset": problems})
    plain = layer(preset.get(DEFAULT_METHOD, {}), kind) if MODEL_TYPES[model_type].adapter else {}  # pti is a LoRA, too
    return plain | layer(preset.get(model_type, {}), kind)


def section_problems(file: Path, section: str, table: object) -> list[str]:
    """The errors in the table of a model type; its values are checked after they are merged."""
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


def unknown(file: Path, table: Table, known: set[str]) -> list[str]:
    return [f"{file.name} has an unknown key {key!r}{nearest(key, known)}" for key in table if key not in known]


def fit(
    folder: Path, config: TrainConfig, *, branch: str, model_type: str, asked: str | None, free_gib: float
) -> TrainConfig:
    """The configuration for a card with this much free memory; values from `args` stay unchanged.

    Each row of [[MODEL_TYPE.memory]] applies, in order, if the memory is below its `below_gib`. Afterwards micro_batch
    is from 1 to batch.
    """
    changes: Table = {}
    for row in branch_table(folder, branch).get(model_type, {}).get("memory", []):
        if free_gib < row["below_gib"]:
            changes |= {key: value for key, value in row.items() if key != "below_gib"}
    if "resolution" in changes:  # never larger than before
        sides = (min(side, changes["resolution"]) for side in config.resolution)
        changes["resolution"] = tuple(dict.fromkeys(sides))
    wanted = parse_args(asked)
    if wanted.get("optimizer", "adafactor") != "adafactor":  # only adafactor rounds at random
        changes.pop("trained_dtype", None)
    fitted = config.model_dump() | {key: value for key, value in changes.items() if key not in wanted}
    try:
        return TrainConfig(**fitted | {"micro_batch": min(fitted["micro_batch"] or config.batch, config.batch)})
    except (TypeError, ValidationError) as problem:
        message = f"{branch} cannot be used: [[{model_type}.memory]] of {branch}.toml has a wrong value ({problem})"
        raise InvalidRequest({"branch": [message]}) from None
