"""Squares, aspect-ratio buckets and crops of a photo, and its mask: arithmetic on sizes and pictures."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from trainer.files import Unreadable
from trainer.photos.picture_file import open_picture

BUCKETS_PER_SIDE = 16  # sides are multiples of a sixteenth of the resolution: 64 px at 1024, as is common
MAX_STRETCH = 2.0  # the longest bucket is 2 x 1/2 resolutions
DIMMED = 0.3  # brightness of what the loss ignores, on the page
FACE_SUFFIX = "-face"


def square(resolution: int, multiple: int) -> int:
    """The largest multiple up to `resolution`; at least one `multiple`."""
    return max(multiple, resolution // multiple * multiple)


def bucket(size: tuple[int, int], resolution: int, multiple: int) -> tuple[int, int]:
    """The (width, height) that is nearest in aspect to `size` and has at most resolution^2 pixels.

    Sides are multiples of `multiple` and of a sixteenth of the resolution, from a half to twice the resolution.
    """
    step = multiple * max(1, round(resolution / BUCKETS_PER_SIDE / multiple))
    widths = range(step, round(MAX_STRETCH * resolution) + 1, step)
    sizes = [(width, resolution**2 // width // step * step) for width in widths if 2 * width >= resolution]
    side = square(resolution, step)  # not in `sizes` where the resolution is not a multiple of the step
    known = [(side, side), *(one for one in sizes if resolution <= 2 * one[1] <= 2 * MAX_STRETCH * resolution)]
    aspect = math.log(size[0] / size[1])
    return min(known, key=lambda one: abs(math.log(one[0] / one[1]) - aspect))


def crops(
    image: tuple[int, int], size: tuple[int, int], count: int, seed: int
) -> list[tuple[float, float, float, float]]:
    """`count` boxes (left, top, right, bottom) of the aspect of `size`, as large as the image allows; centred first.

    Fewer where the image has the same aspect: then there is only one.
    """
    scale = min(image[0] / size[0], image[1] / size[1])
    width, height = size[0] * scale, size[1] * scale
    slack = max(0.0, image[0] - width), max(0.0, image[1] - height)  # rounding may give a value below 0
    rng = torch.Generator().manual_seed(seed)
    places = [0.5, *torch.rand(count - 1, generator=rng).tolist()] if max(slack) >= 1 else [0.5]
    return [(slack[0] * at, slack[1] * at, slack[0] * at + width, slack[1] * at + height) for at in places]


def cut(
    image: Image.Image, box: tuple[float, float, float, float], size: tuple[int, int], mirrored: bool
) -> Image.Image:
    """A box of an image at a size in pixels; resampled with Lanczos, never stretched."""
    pixels = image.resize(size, Image.Resampling.LANCZOS, box=box)
    return ImageOps.mirror(pixels) if mirrored else pixels


def to_pixels(image: Image.Image) -> Tensor:
    """(3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.asarray(image, np.float32).copy()).permute(2, 0, 1) / 127.5 - 1


def load_mask(file: Path, size: tuple[int, int]) -> Image.Image:
    """A mask as grey picture. Raises Unreadable where it is broken, its size is not `size`, or it is all black."""
    mask = open_picture(file, "L")
    if mask.size != size:
        ours, theirs = (f"{width} x {height}" for width, height in (mask.size, size))
        raise Unreadable(f"the mask {file.name} has {ours} pixels, its picture {theirs}")
    if not mask.getbbox():
        raise Unreadable(f"the mask {file.name} is all black: nothing would be learned")
    return mask
