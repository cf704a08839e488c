"""How the files of a family are recognized: the table [detect] of its TOML."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from trainer.config.branch_file import branch_table
from trainer.config.toml_file import Table
from trainer.names import BRANCHES


@dataclass(frozen=True)
class Keys:
    """Conditions on the header of a safetensors file. has: each pattern matches the beginning of a key.

    sizes: pattern -> the last dimension of a tensor whose key it matches.
    """

    has: tuple[re.Pattern[str], ...]
    sizes: Mapping[re.Pattern[str], int]


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
    loras: conditions on the keys of a LoRA, of which one is enough.
    """

    pipeline: str
    denoiser: str
    file: Keys | None
    channels: tuple[re.Pattern[str], re.Pattern[str] | int] | None
    whole_file: bool
    loras: tuple[Keys, ...]
    refusals: tuple[Refusal, ...]


def detections(folder: Path) -> dict[str, Detection]:
    """The families that have their own files, the newest first: it is tried before the families that it resembles."""
    found = {branch: detection(folder, branch) for branch in reversed(BRANCHES)}
    return {branch: one for branch, one in found.items() if one is not None}


def detection(folder: Path, branch: str) -> Detection | None:
    """The detection of one family; None: it has no files of its own."""
    table = branch_table(folder, branch).get("detect")
    if table is None:
        return None
    file = table.get("file")
    first, last = file["channels"] if file else ("", 0)
    return Detection(
        pipeline=table["pipeline"],
        denoiser=table["denoiser"],
        file=_keys(file) if file else None,
        channels=(re.compile(first), re.compile(last) if isinstance(last, str) else last) if file else None,
        whole_file=file.get("whole", True) if file else True,
        loras=tuple(_keys(row) for row in table.get("loras", [])),
        refusals=tuple(
            Refusal(row["because"], row.get("config", {}), _pattern(row.get("has")), _pattern(row.get("lacks")))
            for row in table.get("refuse", [])
        ),
    )


def _keys(row: Table) -> Keys:
    sizes = {re.compile(pattern): size for pattern, size in row.get("sizes", {}).items()}
    return Keys(tuple(map(re.compile, row.get("has", []))), sizes)


def _pattern(text: str | None) -> re.Pattern[str] | None:
    return None if text is None else re.compile(text)
