"""Pictures for tests, and how far apart two are."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def pixels(image: Image.Image) -> Any:
    return np.asarray(image).astype(np.int32)


def apart(one: Image.Image, other: Image.Image) -> int:
    assert one.size == other.size
    return int(np.abs(pixels(one) - pixels(other)).max())


def noise(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """A picture of which no pixel follows from its neighbours."""
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))


# Enlarging


def esrgan(ups: int = 2, channels: int = 3, width: int = 8) -> dict[str, Tensor]:
    """Random weights of an ESRGAN of one block under the names of the published Real-ESRGAN; 2 ** ups times as large.

    Their spread is such that its pictures use the whole range.
    """
    generator = torch.Generator().manual_seed(0)
    grow = 32  # spandrel takes it as given
    sizes = {"conv_first": (channels, width), "conv_body": (width, width), "conv_hr": (width, width)}
    sizes |= {f"conv_up{number + 1}": (width, width) for number in range(ups)}
    for block in (1, 2, 3):
        for number in range(5):
            out = grow if number < 4 else width
            sizes[f"body.0.rdb{block}.conv{number + 1}"] = (width + number * grow, out)
    sizes["conv_last"] = (width, 3)
    state = {}
    for name, (have, give) in sizes.items():
        state[f"{name}.weight"] = torch.randn((give, have, 3, 3), generator=generator) * (2 / (9 * have)) ** 0.5
        state[f"{name}.bias"] = torch.full((give,), 0.5 if name == "conv_last" else 0.0)
    state["conv_last.weight"] *= 0.6
    return state
