"""Detects the family of a folder or file by its index or header; no weights are read.

The rules of a family are in its TOML (trainer/config/detection.py).
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trainer.config.detection import Detection, Keys

MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
EDITING_MODEL = "it is a model for inpainting or editing, which has a picture as input; such models cannot be trained"
LORA_KEY = re.compile(r"\.(lora_down|lora_A|lora\.down)\.weight$")
Families = Mapping[str, Detection]  # by their names, in the order in which they are tried


def branch_of_folder(folder: Path, families: Families) -> str:
    """The family of a diffusers folder. Raises ValueError for unknown families, and for models that cannot be used."""
    index = _json_object(folder / "model_index.json")
    pipeline = str(index.get("_class_name"))
    branch = next((name for name, one in families.items() if one.pipeline == pipeline), None)
    if branch is None:
        known = ", ".join(one.pipeline for one in reversed(list(families.values())))
        raise ValueError(f"its model_index.json names {pipeline!r}; known are {known}")
    for name, entry in index.items():
        library = entry[0] if isinstance(entry, list) and entry else None
        if library not in ("diffusers", "transformers", None):
            raise ValueError(f"its {name} asks for code of {library!r}; only diffusers and transformers are loaded")
    if code := next(folder.rglob("*.py"), None):
        raise ValueError(f"it brings code ({code.name}), which is never run; take it out")
    family = families[branch]
    denoiser = _json_object(folder / family.denoiser / "config.json")
    for refusal in family.refusals:
        if refusal.config and all(denoiser.get(name) == value for name, value in refusal.config.items()):
            raise ValueError(refusal.because)
    channels = denoiser.get("in_channels")
    if channels != (denoiser.get("out_channels") or channels):
        raise ValueError(EDITING_MODEL)
    return branch


def _json_object(file: Path) -> dict[str, object]:
    try:
        content = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"its {file.name} is not a JSON object")
    return content


def branch_of_file(file: Path, families: Families) -> str:
    """The family of a single file in the layout of the original release. Raises ValueError as `branch_of_folder`."""
    header = safetensors_header(file)
    for branch, family in families.items():
        if family.file is None or not _matches(family.file, header, header):
            continue
        if family.channels is not None:
            first, last = family.channels
            out = [last] if isinstance(last, int) else _shape(header, last)[:1]
            if _shape(header, first)[1:2] != out:
                raise ValueError(EDITING_MODEL)
        for refusal in family.refusals:
            if (refusal.has and _first(refusal.has, header)) or (refusal.lacks and not _first(refusal.lacks, header)):
                raise ValueError(refusal.because)
        return branch
    raise ValueError("its tensors are of no family that is known here")


def branch_of_lora(header: Mapping[str, Any], families: Families) -> str | None:
    """The family of a LoRA; None: it is not a LoRA. Raises ValueError for an unknown family."""
    adapters = [key for key in header if LORA_KEY.search(key)]
    if not adapters:
        return None
    for branch, family in families.items():
        if any(_matches(keys, adapters, header) for keys in family.loras):
            return branch
    raise ValueError("it is a LoRA of no family that is known here")


def _matches(keys: Keys, among: Iterable[str], header: Mapping[str, Any]) -> bool:
    """Whether conditions hold: their keys are in `among`, and have the required sizes."""
    return all(_first(pattern, among) for pattern in keys.has) and all(
        any(_size(header, key)[-1:] == [size] for key in among if pattern.match(key))
        for pattern, size in keys.sizes.items()
    )


def _first(pattern: re.Pattern[str], keys: Iterable[str]) -> str | None:
    """The first key that a pattern matches."""
    return next((key for key in keys if pattern.match(key)), None)


def _shape(header: Mapping[str, Any], pattern: re.Pattern[str]) -> list[int]:
    """The shape of the first tensor whose key a pattern matches; empty if none matches."""
    key = _first(pattern, header)
    return [] if key is None else _size(header, key)


def _size(header: Mapping[str, Any], key: str) -> list[int]:
    shape = header[key].get("shape")
    return shape if isinstance(shape, list) else []


def safetensors_header(file: Path) -> dict[str, Any]:
    """The header of a safetensors file (names and shapes); also checks the length of the file.

    Layout: https://github.com/huggingface/safetensors#format. Raises ValueError for an invalid file.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
            raise ValueError("it is not a safetensors file, or a broken one")
        try:
            header = json.loads(stream.read(length))
            end = max((entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"), default=0)
            expected = 8 + length + int(end)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError, OverflowError):
            raise ValueError("it is not a safetensors file, or a broken one: its header cannot be read") from None
    if expected != size:
        raise ValueError(f"it is broken: its header speaks of {expected} bytes, it has {size}")
    return dict(header)
