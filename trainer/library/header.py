"""The header of a safetensors file: names, shapes and metadata, checked before anything relies on them."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
LONGEST_NAME = 1000  # of a tensor; the models here have some 100 characters
# Bits of a number of each type. Types that are not listed are not checked here.
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32,
    "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
}  # fmt: skip
Size = Annotated[int, Field(ge=0, lt=2**63)]
METADATA = "__metadata__"
UNFINISHED = "it is still being copied, or the copy has broken off"


class Entry(BaseModel):
    """A tensor: the type of its numbers, its shape, and its first and last byte after the header."""

    model_config = ConfigDict(strict=True)

    dtype: str
    shape: list[Size]
    data_offsets: Annotated[list[Size], Field(min_length=2, max_length=2)]


class _Metadata(BaseModel):
    model_config = ConfigDict(strict=True)

    metadata: dict[str, str] | None = Field(None, alias=METADATA)


ENTRIES = TypeAdapter(dict[str, Entry])
OBJECT = TypeAdapter(dict[str, object])


@dataclass(frozen=True)
class Header:
    """shapes, dtypes: of each tensor, by its name. metadata: the texts in `__metadata__`, by their names."""

    shapes: Mapping[str, list[int]]
    metadata: Mapping[str, str]
    dtypes: Mapping[str, str]  # in the words of the format: F16, BF16, F8_E4M3, ...


def read_header(file: Path) -> Header:
    """The header of a safetensors file; checks that the file is as long as it says.

    Layout: https://github.com/huggingface/safetensors#format. Raises OSError; ValueError for what is not one.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if len(start) < 8 or size - 8 < length <= MAX_HEADER_BYTES:
            raise ValueError(f"it is not a safetensors file, or a broken one: {UNFINISHED}")
        if not 2 <= length <= MAX_HEADER_BYTES:
            raise ValueError("it is not a safetensors file, or a broken one")
        text = stream.read(length)
    try:
        given = OBJECT.validate_json(text)
        metadata = _Metadata.model_validate({METADATA: given.pop(METADATA, None)}).metadata
        entries = ENTRIES.validate_python(given)
    except ValidationError:
        raise ValueError("it is not a safetensors file, or a broken one: its header cannot be read") from None
    expected = 8 + length + max((entry.data_offsets[1] for entry in entries.values()), default=0)
    if expected != size:
        short = f": {UNFINISHED}" if size < expected else ""
        raise ValueError(f"it is broken: its header speaks of {expected} bytes, it has {size}{short}")
    for name, entry in entries.items():
        if len(name) > LONGEST_NAME:
            raise ValueError(f"the name of one of its tensors has {len(name)} characters; no model has such names")
        begin, end = entry.data_offsets
        if entry.dtype in BITS and math.prod(entry.shape) * BITS[entry.dtype] != (end - begin) * 8:
            raise ValueError(f"it is broken: {name[:80]} of shape {entry.shape[:8]} cannot have {end - begin} bytes")
    shapes = {name: entry.shape for name, entry in entries.items()}
    return Header(shapes, metadata or {}, {name: entry.dtype for name, entry in entries.items()})
