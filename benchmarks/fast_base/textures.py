"""Surfaces and dead leaves: pictures with the statistics of photos, but without objects.

Natural pictures have spectra near 1/f and occluding parts of every size; the dead leaves model has both (Lee, Mumford &
Huang 2001, "Occlusion models for natural images"). The VAE is trained on these pictures alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Floats = NDArray[Any]  # float32, or float64 in between
Pixels = NDArray[np.uint8]

BANK_SIDE = 256
SUPERSAMPLING = 2  # drawn larger by this factor and shrunk, like a lens and a sensor


class Textures:
    """A bank of noise fields, from which surfaces are cut. Fields are (256, 256), mean 0, deviation 1, periodic."""

    def __init__(self, seed: int, count: int = 96) -> None:
        rng = np.random.default_rng(seed)
        self._fields = [self._field(rng) for _ in range(count)]

    @staticmethod
    def _field(rng: np.random.Generator) -> Floats:
        """Noise of spectrum 1/f^a, stretched in a random direction: a from 0.4 (grain, gravel) to 2.2 (cloud)."""
        fy, fx = np.meshgrid(np.fft.fftfreq(BANK_SIDE), np.fft.fftfreq(BANK_SIDE), indexing="ij")
        angle, stretch = rng.uniform(0, np.pi), 2 ** rng.choice([0, 0, 0, 1, 2, 3]) * 1.0
        along = (fx * np.cos(angle) + fy * np.sin(angle)) * np.sqrt(stretch)
        across = (fy * np.cos(angle) - fx * np.sin(angle)) / np.sqrt(stretch)
        frequency = np.maximum(np.hypot(along, across), 1.0 / BANK_SIDE)
        spectrum = frequency ** -rng.uniform(0.4, 2.2) * np.exp(2j * np.pi * rng.random(frequency.shape))
        field = np.fft.ifft2(spectrum).real
        return ((field - field.mean()) / field.std()).astype(np.float32)

    def cut(self, rng: np.random.Generator, height: int, width: int) -> Floats:
        """A piece of a random field, (height, width)."""
        field = self._fields[rng.integers(len(self._fields))]
        top, left = rng.integers(BANK_SIDE, size=2)
        rows, columns = (top + np.arange(height)) % BANK_SIDE, (left + np.arange(width)) % BANK_SIDE
        piece = field[np.ix_(rows, columns)]
        return piece if rng.random() < 0.5 else piece[:, ::-1]

    def surface(self, rng: np.random.Generator, height: int, width: int, colour: Floats, roughness: float) -> Floats:
        """A piece of a material, (height, width, 3) in [0, 1]: `colour` with uneven light; roughness: its deviation."""
        shade = roughness * self.cut(rng, height, width)
        if rng.random() < 0.15:
            shade = shade + roughness * pattern(rng, height, width)
        picture = colour * (1.0 + shade)[..., None]
        if rng.random() < 0.3:  # rust, stains, petals: the hue changes too
            picture += 0.3 * roughness * self.cut(rng, height, width)[..., None] * rng.normal(size=3)
        return picture.astype(np.float32)


def pattern(rng: np.random.Generator, height: int, width: int) -> Floats:
    """Stripes, tiles or dots, (height, width) from -1 to 1."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    angle, period = rng.uniform(0, np.pi), rng.uniform(5, 40)
    u = (x * np.cos(angle) + y * np.sin(angle)) / period
    v = (y * np.cos(angle) - x * np.sin(angle)) / period
    kind = rng.integers(4)
    if kind == 0:
        wave = np.sin(2 * np.pi * u)
    elif kind == 1:
        wave = np.sign(np.sin(2 * np.pi * u))
    elif kind == 2:
        wave = np.sign(np.sin(2 * np.pi * u) * np.sin(2 * np.pi * v))
    else:
        wave = np.where(np.hypot(u % 1 - 0.5, v % 1 - 0.5) < 0.3, 1.0, -1.0)
    return wave.astype(np.float32)


def natural_colours(rng: np.random.Generator, count: int) -> Floats:
    """Colours that match, (count, 3) in [0, 1]: photos have little chroma and few hues."""
    light = rng.beta(1.1, 1.1, size=(count, 1))
    hues = rng.normal(size=(rng.integers(1, 4), 3))
    hues -= hues.mean(axis=1, keepdims=True)
    strength = rng.gamma(1.2, 0.09, size=(count, 1)) * rng.choice([0.3, 1.0, 1.0, 2.0])
    colours = light + strength * hues[rng.integers(len(hues), size=count)] * (0.3 + light)
    return np.clip(colours, 0.01, 0.99).astype(np.float32)


def dead_leaves(rng: np.random.Generator, textures: Textures, side: int) -> Pixels:
    """A picture of overlapping parts of every size, (side, side, 3)."""
    big = side * SUPERSAMPLING
    smallest, most = rng.uniform(1.5, 8) * SUPERSAMPLING, int(2 ** rng.uniform(3, 8))
    colours = natural_colours(rng, most + 1)
    roughness = 0.25 * rng.beta(1, 2)
    picture = textures.surface(rng, big, big, colours[-1], roughness)
    # Density of radii r^-3 between the smallest and the whole side; large ones first, else they hide all others.
    share = rng.random(most)
    radii = np.sort(1.0 / np.sqrt(share / smallest**2 + (1 - share) / (0.6 * big) ** 2))[::-1]
    if rng.random() < 0.5:
        rng.shuffle(radii)
    for radius, colour in zip(radii, colours, strict=False):
        stamp(rng, textures, picture, float(radius), colour, roughness * rng.uniform(0, 2))
    picture *= light(rng, big)[..., None]
    image = Image.fromarray((np.clip(picture, 0, 1) * 255).astype(np.uint8))
    if rng.random() < 0.3:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 2.0) * SUPERSAMPLING))
    small = np.asarray(image.resize((side, side), Image.Resampling.LANCZOS), np.float32)
    small += rng.normal(scale=4.0 * rng.beta(1, 3), size=small.shape)  # sensor noise
    return np.clip(small, 0, 255).astype(np.uint8)


def stamp(
    rng: np.random.Generator, textures: Textures, picture: Floats, radius: float, colour: Floats, roughness: float
) -> None:
    """Draw one part over `picture` (H, W, 3), in place, with a sharp or a soft edge, and often with a shadow."""
    big = len(picture)
    x, y = rng.uniform(-0.1, 1.1, size=2) * big
    reach = int(radius * 1.5) + 3
    left, top = int(x) - reach, int(y) - reach
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + 2 * reach, big), min(top + 2 * reach, big)
    if x0 >= x1 or y0 >= y1:
        return
    mask = Image.new("L", (x1 - x0, y1 - y0))
    draw, centre = ImageDraw.Draw(mask), np.array([x - x0, y - y0])
    corners = rng.choice([0, 0, 3, 4, 4, 4, 5, 6, 9])
    if corners == 0:
        w, h = radius * rng.uniform(0.4, 1.2, size=2)
        draw.ellipse((centre[0] - w, centre[1] - h, centre[0] + w, centre[1] + h), 255)
    else:
        angles = np.sort(rng.uniform(0, 2 * np.pi, size=corners)) if corners != 4 else ANGLES_4 + rng.uniform(0, np.pi)
        spokes = np.stack([np.cos(angles), np.sin(angles)], axis=1) * radius * rng.uniform(0.7, 1.3, size=(corners, 1))
        draw.polygon([tuple(point) for point in centre + spokes], 255)
    if rng.random() < 0.3:
        mask = mask.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 0.25 * radius + 0.6)))
    part = picture[y0:y1, x0:x1]
    if rng.random() < 0.4:  # a shadow at its side
        soft = np.asarray(mask.filter(ImageFilter.GaussianBlur(0.15 * radius + 1)), np.float32) / 255
        part *= 1 - rng.uniform(0.1, 0.6) * np.roll(soft, rng.integers(-3, 4, size=2), axis=(0, 1))[..., None]
    cover = np.asarray(mask, np.float32)[..., None] / 255
    height, width = part.shape[:2]
    surface = textures.surface(rng, height, width, colour, roughness)
    if rng.random() < 0.5:  # round: lighter on one side
        ramp = np.mgrid[0:height, 0:width].astype(np.float32)
        slope = rng.normal(size=2) * 0.25 / radius
        surface *= (1 + slope[0] * (ramp[0] - centre[1]) + slope[1] * (ramp[1] - centre[0]))[..., None].clip(0.2, 1.8)
    part += cover * (surface - part)


ANGLES_4 = np.array([0.15, 0.35, 0.65, 0.85]) * 2 * np.pi


def light(rng: np.random.Generator, side: int) -> Floats:
    """Brightness of the light on a scene, (side, side) around 1: from one side, or a bright spot in the dark."""
    y, x = np.mgrid[0:side, 0:side].astype(np.float32) / side - 0.5
    slope = rng.normal(size=2) * 0.35
    fall = 1 + slope[0] * y + slope[1] * x
    if rng.random() < 0.25:
        cy, cx = rng.uniform(-0.4, 0.4, size=2)
        fall *= 0.5 + 0.8 * np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / rng.uniform(0.05, 0.4))
    return np.clip(fall, 0.15, 1.8).astype(np.float32)
