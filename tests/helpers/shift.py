"""TUNEBOOTH_TEST_SHIFT=1: numbers lie elsewhere in memory than usual, as they may on another machine.

Kernels work on 64 bytes at a time, and some sum in another order where a tensor does not begin at a multiple of that.
Loaded weights are views of their file, so that where they lie depends on the length of the file's header. Nothing here
imports torch.
"""

from __future__ import annotations

import random
import sys
import zlib
from pathlib import Path
from typing import Any

import safetensors

LINE = 64  # bytes
PREFIX = 8  # bytes of a file before its header; they hold the header's length


def shift_files() -> None:
    """From now on, each safetensors file that this process writes has its tensors off a multiple of 64 bytes.

    How far is a matter of the header: a copy of a file lies as the file does, and another file elsewhere.
    """
    assert "safetensors.torch" not in sys.modules, "it has taken the plain function already"
    plain = safetensors.serialize_file

    def serialize_file(tensors: Any, filename: Any, metadata: Any = None) -> None:
        plain(tensors, filename, metadata=metadata)
        shift(Path(filename))

    safetensors.serialize_file = serialize_file


def shift(file: Path) -> None:
    """Lengthen a file's header by spaces, which the format allows."""
    content = file.read_bytes()
    begin = PREFIX + int.from_bytes(content[:PREFIX], "little")
    header, tensors = content[PREFIX:begin], content[begin:]
    # 8, 16, ... or 56 bytes beyond a multiple of 64: the widest numbers, int64, must begin at a multiple of 8.
    target = 8 * (1 + zlib.crc32(header) % 7)
    header += b" " * ((target - begin) % LINE)
    file.write_bytes(len(header).to_bytes(PREFIX, "little") + header + tensors)


def odd_buffers(name: str) -> list[bytearray]:
    """Buffers of odd sizes: while they are kept, what is allocated after them lies elsewhere."""
    chance = random.Random(name)  # the same for each run of a test
    return [bytearray(2 * chance.randrange(1, 4096) + 1) for _ in range(1000)]
