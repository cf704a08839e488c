"""Faces and masks: which faces are drawn again, and pasting with a soft edge."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch.nn import functional

from trainer.rendering.pixels import Array, Picture, grey

Box = tuple[float, float, float, float]
Square = tuple[int, int, int, int]
FACE_MARGIN = 1.8  # side of the square around a face, in longer sides of the face, as in the hosted service
FACE_SHARES = 0.003, 0.3  # of the picture: smaller and larger faces are not re-rendered, as in the hosted service
EDGE = 0.1  # of the square's side: width of the fade into the picture


def worth_it(box: Box, size: tuple[int, int]) -> str | None:
    """None, or why the face in this box of a picture (width, height) is not re-rendered."""
    share = max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1]) / (size[0] * size[1])
    least, most = FACE_SHARES
    if share < least:
        return f"the face is {share:.2%} of the picture, and what is below {least:.1%} is too small to be re-rendered"
    if share > most:
        return f"the face is {share:.0%} of the picture, and what is above {most:.0%} is large enough as it is"
    return None


def face_square(box: Box, size: tuple[int, int], margin: float = FACE_MARGIN) -> Square:
    """The square around a face, `margin` times the face's longer side, moved into the picture (width, height).

    Its side is at most the picture's shorter side.
    """
    side = max(1, min(*size, round(margin * max(box[2] - box[0], box[3] - box[1]))))
    middles = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    left, top = (
        round(min(max(0.0, middle - side / 2), limit - side)) for middle, limit in zip(middles, size, strict=True)
    )
    return left, top, left + side, top + side


def paste(picture: Picture, patch: Picture, square: Square) -> Picture:
    """Paste a re-rendered patch of any size into its square, with a soft edge.

    Pixels outside the square and on its edge stay unchanged.
    """
    left, top, right, bottom = square
    size = right - left, bottom - top
    across, down = (_bump(length) for length in size)
    pasted = picture.convert("RGB")
    scaled = patch.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    pasted.paste(scaled, (left, top), grey(down[:, None] * across[None, :], size))
    return pasted


def _bump(length: int) -> Array:
    """Weights (length,): 0 at both ends, rising smoothly to 1 over a share of the length."""
    place = np.arange(length, dtype=np.float32)
    ramp = np.clip(np.minimum(place, place[::-1]) / max(1.0, EDGE * length), 0, 1)
    return ramp * ramp * (3 - 2 * ramp)


def paste_mask(picture: Picture, original: Picture, mask: Picture) -> Picture:
    """Blend: the picture where the mask is 255, the original where it is 0, a mixture between.

    Raises ValueError where the three differ in size.
    """
    if not picture.size == original.size == mask.size:
        sizes = ", ".join("{} x {}".format(*one.size) for one in (picture, original, mask))
        raise ValueError(f"picture, original and mask must have one size, and have {sizes} px")
    return Image.composite(picture.convert("RGB"), original.convert("RGB"), mask.convert("L"))


def grow(mask: Picture, amount: int | str) -> Picture:
    """A mask grown by so many px in all directions, also diagonally; a negative number shrinks it.

    amount: px, or a share of the mask's longer side such as "5%". A mask does not shrink at the picture's edges. Raises
    ValueError for other texts.
    """
    radius = _pixels(amount, max(mask.size))
    levels = torch.from_numpy(np.array(mask.convert("L"), np.float32))[None, None]
    if radius < 0:
        levels = 255 - levels
    reached, wanted = 0, min(abs(radius), max(mask.size))
    while reached < wanted:  # three points at this distance leave no gap
        step = min(wanted - reached, 2 * reached + 1)
        levels = functional.max_pool2d(functional.pad(levels, (step,) * 4), 3, stride=1, dilation=step)
        reached += step
    if radius < 0:
        levels = 255 - levels
    return Image.fromarray(levels[0, 0].to(torch.uint8).numpy())


def _pixels(amount: int | str, side: int) -> int:
    """`12`, `"-3"` or `"5%"` in px."""
    text = str(amount).strip()
    try:
        return round(float(text[:-1]) / 100 * side) if text.endswith("%") else round(float(text))
    except (ValueError, OverflowError):
        raise ValueError(f"a mask cannot grow by {amount!r}: give px such as 20 or -5, or a share such as 5%") from None


def soften(mask: Picture, px: float) -> Picture:
    """A mask blurred by a Gaussian; px: its deviation; it reaches about twice as far. Raises ValueError below 0."""
    if not 0 <= px < math.inf:
        raise ValueError(f"a mask cannot be blurred by {px} px; it must be 0 or more")
    return mask.convert("L").filter(ImageFilter.GaussianBlur(px))
