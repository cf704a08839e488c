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

    sizes: pattern -> the last dimension of a tensor whose key it matches.
    """

    has: tuple[re.Pattern[str], ...]
    sizes: Mapping[re.Pattern[str], int]


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
    """A family that the program does not have, whose LoRAs are refused by its name. pipeline: its diffusers class."""

    title: str
    pipeline: str
    loras: LoraRules


@dataclass(frozen=True)
class Refusal:
    """A model of the family's architecture that cannot be used.

    config: settings of the denoiser in a diffusers folder. has, lacks: patterns of keys in a single file. because: the
    message.
    """

    because: str
    config: Mapping[str, object]
    has: re.Pattern[str] | None
    lacks: re.Pattern[str] | None


@dataclass(frozen=True)
class Detection:
    """How a folder, a single file or a LoRA file of a family is recognized.

    pipeline: the class that a diffusers folder names. denoiser: the folder of the model that is trained. file: the keys
    of a single file of the original release; None: single files are not read. channels: a pattern for the key of the
    first layer in such a file, and one for the last layer, or its number of channels; models for inpainting and editing
    have more input than output channels. whole_file: whether a single file also holds the text encoders and the VAE.
    loras: the rules for LoRAs, of which one is enough.
    """

    pipeline: str
    denoiser: str
    file: Keys | None
    channels: tuple[re.Pattern[str], re.Pattern[str] | int] | None
    whole_file: bool
    loras: LoraRules
    refusals: tuple[Refusal, ...]


def detection(table: Table) -> Detection:
    """The detection of a family, from its table [detect]. Raises ValueError if the table is broken."""
    try:
        return _detection(table)
    except (AttributeError, LookupError, TypeError, ValueError, re.error) as problem:
        raise ValueError(f"[detect] cannot be used ({type(problem).__name__}: {problem})") from None


def _detection(table: Table) -> Detection:
    file = table.get("file")
    first, last = file["channels"] if file else ("", 0)
    return Detection(
        pipeline=_text(table["pipeline"]),
        denoiser=_text(table["denoiser"]),
        file=_keys(file) if file else None,
        channels=(re.compile(first), re.compile(last) if isinstance(last, str) else last) if file else None,
        whole_file=file.get("whole", True) if file else True,
        loras=_lora_rules(table),
        refusals=tuple(
            Refusal(
                _text(row["because"]), dict(row.get("config", {})), _pattern(row.get("has")), _pattern(row.get("lacks"))
            )
            for row in table.get("refuse", [])
        ),
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
    return Keys(tuple(map(re.compile, row.get("has", []))), sizes)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _pattern(text: str | None) -> re.Pattern[str] | None:
    return None if text is None else re.compile(text)
