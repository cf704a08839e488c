"""Film looks: color grading and grain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageFilter
from scipy.interpolate import PchipInterpolator

from trainer.rendering.pixels import Array, Picture

if TYPE_CHECKING:
    from trainer.config.looks import FilmLook

LUMA = np.array([0.2126, 0.7152, 0.0722], np.float32)  # of red, green and blue (ITU-R BT.709)
TABLE = 33  # points on a side of a look's table, as is common for colour tables
GRAIN = 0.01  # deviation in mid-tones, for values 0 to 1, as in the hosted service
FINE, COARSE = 0.8, 0.6  # shares of the two scales; their squares sum to 1
COARSE_PX = 3


def grade(image: Picture, look: FilmLook) -> Picture:
    """A picture in the colours of a film, by a colour table with linear interpolation."""
    blue, green, red = np.meshgrid(*[np.linspace(0, 1, TABLE, dtype=np.float32)] * 3, indexing="ij")
    table = developed(np.stack([red, green, blue], axis=-1), look)
    return image.convert("RGB").filter(ImageFilter.Color3DLUT(TABLE, table.ravel().tolist()))


def developed(colours: Array, look: FilmLook) -> Array:
    """Colours (..., 3), sRGB from 0 to 1 -> the colours of a film."""
    mixed = colours @ np.array(look.matrix, np.float32).T
    grey = (mixed @ LUMA)[..., None]
    mixed = np.clip(grey + look.saturation * (mixed - grey), 0, 1)
    channels = [curve(points, mixed[..., place]) for place, points in enumerate(look.curves)]
    shown: Array = np.clip(np.stack(channels, axis=-1), 0, 1)
    return shown


def curve(points: Sequence[Sequence[float]], x: Array) -> Array:
    """A curve through points (x, y), x rising: cubic, and monotone where the points are (Fritsch and Butland 1984)."""
    xs, ys = np.array(points, np.float64).T
    y: Array = PchipInterpolator(xs, ys)(np.clip(x, xs[0], xs[-1]))
    return y


def grain(image: Picture, seed: int) -> Picture:
    """Film grain: Gaussian noise in the luminance at two scales, strongest in mid-tones, none in black and white.

    The same seed gives the same grain; the picture's mean does not change.
    """
    pixels = np.asarray(image.convert("RGB"), np.float32)
    height, width = pixels.shape[:2]
    generator = np.random.default_rng(seed)
    fine = generator.standard_normal((height, width), np.float32)
    clumps = generator.standard_normal((-(-height // COARSE_PX), -(-width // COARSE_PX)), np.float32)
    coarse = np.asarray(Image.fromarray(clumps).resize((width, height), Image.Resampling.BICUBIC))
    coarse = coarse / (float(coarse.std()) or 1.0)  # interpolation has made it weaker
    luma = pixels @ LUMA / 255
    strength = 4 * luma * (1 - luma)
    noise = FINE * fine + COARSE * coarse
    noise -= (noise * strength).sum() / (float(strength.sum()) or 1.0)
    grainy = pixels + (255 * GRAIN * strength * noise)[..., None]
    return Image.fromarray(np.clip(np.rint(grainy), 0, 255).astype(np.uint8))
