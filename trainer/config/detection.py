"""How the files of a family are recognized: the table [detect] of its TOML."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from trainer.config.toml_file import Table


@dataclass(frozen=True)
class Keys:
    """What the header of a safetensors file holds. `has`: each of these patterns matches a key from its beginning on.

    sizes: pattern -> the last dimension of a tensor whose key matches it.
    """

    has: tuple[re.Pattern[str], ...]
    sizes: Mapping[re.Pattern[str], int]


@dataclass(frozen=True)
class Refusal:
    """What is of the family's architecture and still cannot be used.

    config: settings of the denoiser in a diffusers folder. has, lacks: patterns of keys in a single file. because: the
    reason, as a message.
    """

    because: str
    config: Mapping[str, object]
    has: re.Pattern[str] | None
    lacks: re.Pattern[str] | None


@dataclass(frozen=True)
class Detection:
    """What proves that a folder, a single file or a LoRA file is of a family.

    pipeline: the class that a diffusers folder names. denoiser: the folder of the model that is trained. file: a single
    file with the keys of the original release; None: none is read. channels: a pattern for the first layer's key in
    such a file, and for the last layer's, or the number of channels; models for inpainting and editing take more than
    they give. whole_file: whether a single file holds the text encoders and the VAE as well. loras: one of these is
    enough, among the keys of the adapters.
    """

    pipeline: str
    denoiser: str
    file: Keys | None
    channels: tuple[re.Pattern[str], re.Pattern[str] | int] | None
    whole_file: bool
    loras: tuple[Keys, ...]
    refusals: tuple[Refusal, ...]


def detection(table: Table) -> Detection:
    """What a table [detect] says. Raises ValueError where that cannot be used."""
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
        loras=tuple(_keys(row) for row in table.get("loras", [])),
        refusals=tuple(
            Refusal(
                _text(row["because"]), dict(row.get("config", {})), _pattern(row.get("has")), _pattern(row.get("lacks"))
            )
            for row in table.get("refuse", [])
        ),
    )


def _keys(row: Table) -> Keys:
    sizes = {re.compile(pattern): size for pattern, size in row.get("sizes", {}).items()}
    return Keys(tuple(map(re.compile, row.get("has", []))), sizes)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _pattern(text: str | None) -> re.Pattern[str] | None:
    return None if text is None else re.compile(text)
