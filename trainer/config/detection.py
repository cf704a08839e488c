"""How the files of a family are recognized: the table [detect] of its TOML."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from trainer.config.toml_file import Table, read_toml


@dataclass(frozen=True)
class Keys:
    """Conditions on the header of a safetensors file. has: each pattern matches the beginning of a key.

    sizes: pattern -> the last dimension of a tensor whose key it matches. lacks: patterns that match no key.
    """

    has: tuple[re.Pattern[str], ...]
    sizes: Mapping[re.Pattern[str], int]
    lacks: tuple[re.Pattern[str], ...] = ()


@dataclass(frozen=True)
class LoraRule:
    """Conditions on the layers of a LoRA; all must hold. Patterns match the beginning of a layer's name.

    has: each pattern matches a layer. lacks: none matches. sizes: pattern -> input and output width (None: any); of the
    layers that a pattern matches one has that size, and at least one pattern matches. sure: only this family has such
    layers; else the rule means "maybe mine".
    """

    has: tuple[re.Pattern[str], ...]
    lacks: tuple[re.Pattern[str], ...]
    sizes: Mapping[re.Pattern[str], tuple[int | None, int | None]]
    sure: bool


@dataclass(frozen=True)
class LoraRules:
    """How a LoRA of a family is recognized. never: patterns of layers that the family does not have.

    metadata: patterns; each is searched in the metadata, one `name=value` a line, in small letters.
    """

    rules: tuple[LoraRule, ...]
    never: tuple[re.Pattern[str], ...]
    metadata: tuple[re.Pattern[str], ...]


@dataclass(frozen=True)
class OtherFamily:
    """A family that the program does not have, whose LoRAs are refused by its name.

    pipeline: its diffusers class.
    """

    title: str
    pipeline: str
    loras: LoraRules


@dataclass(frozen=True)
class Refusal:
    """A model of the family's architecture that cannot be used.

    config: settings of the denoiser in a diffusers folder. keys: of a single file; None: the refusal is for folders.
    unless_configured: it is for single files whose sidecar does not configure the denoiser. because: the message.
    """

    because: str
    config: Mapping[str, object]
    keys: Keys | None
    unless_configured: bool = False


@dataclass(frozen=True)
class Detection:
    """How a folder, a single file or a LoRA file of a family is recognized.

    pipeline: the class that a diffusers folder names. denoiser: the folder of the model that is trained. files:
    conditions on a single file of the original release, of which one is enough; none: single files are not read.
    channels: a pattern for the key of the first layer in such a file, and one for the last layer, or its number of
    channels; models for inpainting and editing have more input than output channels. known: a pattern for the keys of
    the denoiser, and one for those of them that the loader has a place for. prediction: whether files and schedulers
    say what the denoiser predicts. whole_file: whether a single file also holds the text encoders and the VAE. loras:
    the rules for LoRAs, of which one is enough.
    """

    pipeline: str
    denoiser: str
    files: tuple[Keys, ...]
    channels: tuple[re.Pattern[str], re.Pattern[str] | int] | None
    known: tuple[re.Pattern[str], re.Pattern[str]] | None
    prediction: bool
    whole_file: bool
    loras: LoraRules
    refusals: tuple[Refusal, ...]


def detection(table: Table) -> Detection:
    """The detection of a family, from its table [detect]. Raises ValueError if the table is broken."""
    try:
        return _detection(table)
    except (AttributeError, LookupError, TypeError, ValueError, re.error) as problem:
        raise ValueError(f"[detect] cannot be used ({problem})") from None


def _detection(table: Table) -> Detection:
    file = table.get("file")
    first, last = file["channels"] if file else ("", 0)
    known = [re.compile(pattern) for pattern in file.get("known", [])] if file else []
    return Detection(
        pipeline=_text(table["pipeline"]),
        denoiser=_text(table["denoiser"]),
        files=tuple(_keys(row) for row in [file, *file.get("or", [])]) if file else (),
        channels=(re.compile(first), re.compile(last) if isinstance(last, str) else last) if file else None,
        known=(known[0], known[1]) if known else None,
        prediction=bool(table.get("prediction", False)),
        whole_file=file.get("whole", True) if file else True,
        loras=_lora_rules(table),
        refusals=tuple(_refusal(row) for row in table.get("refuse", [])),
    )


def _refusal(row: Table) -> Refusal:
    """`has` and `lacks` are one pattern each."""
    keys = {name: [row[name]] for name in ("has", "lacks") if name in row} | {"sizes": row.get("sizes", {})}
    return Refusal(
        _text(row["because"]),
        dict(row.get("config", {})),
        _keys(keys) if any(keys.values()) else None,
        bool(row.get("unless_configured", False)),
    )


@cache
def other_families() -> tuple[OtherFamily, ...]:
    """The families in other_families.toml. They are part of the program."""
    rows = read_toml(Path(__file__).with_name("other_families.toml"))["family"]
    return tuple(OtherFamily(row["title"], row["pipeline"], _lora_rules(row)) for row in rows)


def _lora_rules(table: Table) -> LoraRules:
    facts = table.get("lora_file", {})
    rules = tuple(
        LoraRule(
            has=_patterns(row.get("has", [])),
            lacks=_patterns(row.get("lacks", [])),
            sizes={re.compile(pattern): _sizes(size) for pattern, size in row.get("sizes", {}).items()},
            sure=bool(row.get("sure", False)),
        )
        for row in table.get("loras", [])
    )
    return LoraRules(rules, _patterns(facts.get("never", [])), _patterns(facts.get("metadata", [])))


def _sizes(size: int | list[int]) -> tuple[int | None, int | None]:
    """A number is the input width; a list has the input and the output width."""
    return (size, None) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _patterns(texts: list[str]) -> tuple[re.Pattern[str], ...]:
    return tuple(map(re.compile, texts))


def _keys(row: Table) -> Keys:
    sizes = {re.compile(pattern): size for pattern, size in row.get("sizes", {}).items()}
    return Keys(_patterns(row.get("has", [])), sizes, _patterns(row.get("lacks", [])))


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value
