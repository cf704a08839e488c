"""Quality of the base, measured from pixels: colour and place of the main thing, and the VAE's PSNR on photos.

    uv run python -m benchmarks.fast_base.measure              # the base in the repository
    uv run python -m benchmarks.fast_base.measure FOLDER

The score on drawn pictures of the same captions is printed too: it is the upper limit.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from numpy.typing import NDArray

from benchmarks.fast_base import scenes, vae
from benchmarks.fast_base.scenes import COLOURS, PLACES, Scene
from benchmarks.fast_base.textures import Floats, Pixels, Textures
from benchmarks.photos import SUBJECTS, read_photos

BASE = Path(__file__).parents[2] / "trainer/branches/fast_base"
SEED = 2026
STEPS = 20
GUIDANCE = 3.0
DISC = 0.2  # radius of the disc where the thing is expected, as a share of the side
BRIGHTNESS = (0.55, 0.7, 0.85, 1.0, 1.15)  # shades of a named colour
LAB_WEIGHTS = np.array([0.4, 1.0, 1.0])  # light and shade change lightness more than hue


def to_lab(rgb: Floats) -> Floats:
    """sRGB (..., 3) in [0, 1] -> CIE L*a*b* (D65; IEC 61966-2-1 and CIE 15)."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    matrix = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = linear @ matrix.T / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    lab = np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1)
    return lab.astype(np.float32)


SHADES = [(name, np.clip(np.array(rgb) * bright, 0, 1)) for name, rgb in COLOURS.items() for bright in BRIGHTNESS]
SHADES_LAB = to_lab(np.stack([rgb for _, rgb in SHADES]).astype(np.float32)) * LAB_WEIGHTS
NAMES = list(COLOURS)
NAME_OF_SHADE = np.array([NAMES.index(name) for name, _ in SHADES])


def name_colours(picture: Pixels) -> NDArray[np.int64]:
    """Index in COLOURS of each pixel, (H, W), by the nearest shade."""
    lab = to_lab(picture.astype(np.float32) / 255) * LAB_WEIGHTS
    return NAME_OF_SHADE[((lab[:, :, None] - SHADES_LAB) ** 2).sum(axis=-1).argmin(axis=-1)]


def disc(place: str, side: int) -> NDArray[np.bool_]:
    x, y = PLACES[place]
    rows, columns = (np.mgrid[0:side, 0:side] + 0.5) / side
    return np.hypot(columns - x, rows - y) < DISC


def colour_right(picture: Pixels, scene: Scene) -> bool:
    """Whether the caption's colour has the largest excess at the caption's place: share there minus share elsewhere."""
    named, there = name_colours(picture), disc(scene.place, len(picture))
    excess = [np.mean(named[there] == index) - np.mean(named[~there] == index) for index in range(len(NAMES))]
    return NAMES[int(np.argmax(excess))] == scene.colour


def place_right(picture: Pixels, scene: Scene) -> bool:
    """Whether the caption's place has the largest share of the caption's colour, and more than 0.1."""
    found = name_colours(picture) == NAMES.index(scene.colour)
    shares = {place: float(found[disc(place, len(picture))].mean()) for place in PLACES}
    return max(shares, key=lambda place: shares[place]) == scene.place and shares[scene.place] > 0.1


def score(pictures: Sequence[Pixels], shown: Sequence[Scene]) -> dict[str, float]:
    """Shares of pictures with the right colour, the right place, and both."""
    marks = [(colour_right(p, scene), place_right(p, scene)) for p, scene in zip(pictures, shown, strict=True)]
    colour, place = np.mean(marks, axis=0)
    return {"colour": float(colour), "place": float(place), "both": float(np.mean([a and b for a, b in marks]))}


def held_back(count: int, seed: int = SEED) -> list[tuple[str, Scene]]:
    """Captions and scenes with combinations of thing, colour and place that are not in the training data."""
    rng = np.random.default_rng(seed)
    chosen = [scenes.decide(rng, for_measure=True) for _ in range(count)]
    return [(scenes.caption(rng, scene, everything=True), scene) for scene in chosen]


def render(pipeline: Any, captions: Sequence[str], steps: int, guidance: float, seed: int = SEED) -> list[Pixels]:
    """A picture of each caption, (64, 64, 3)."""
    pictures: list[Pixels] = []
    for start in range(0, len(captions), 10):
        some = list(captions[start : start + 10])
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(some))]
        images = pipeline(
            some, num_inference_steps=steps, guidance_scale=guidance, generator=generators, output_type="np"
        ).images
        pictures += [np.round(image * 255).astype(np.uint8) for image in images]
    return pictures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, nargs="?", default=BASE)
    parser.add_argument("--captions", type=int, default=200)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    options = parser.parse_args()
    pipeline = StableDiffusionPipeline.from_pretrained(options.base, dtype=torch.float32, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    unseen = held_back(options.captions)
    shown = [scene for _, scene in unseen]

    textures = Textures(SEED)
    drawn = [scenes.render(np.random.default_rng(SEED + i), scene, textures, 64) for i, scene in enumerate(shown)]
    rendered = render(pipeline, [caption for caption, _ in unseen], options.steps, options.guidance)
    print(f"{'':28} colour  place  both")
    for name, pictures in (("drawn (the ceiling)", drawn), ("rendered", rendered)):
        print(f"{name:28}" + "".join(f"{value:7.1%}" for value in score(pictures, shown).values()))
    if SUBJECTS.is_dir():
        photos = torch.from_numpy(np.stack([photo for photos in read_photos().values() for photo in photos]))
        ratio = vae.psnr(pipeline.vae, photos.permute(0, 3, 1, 2))
        print(f"VAE: {ratio:.2f} dB on {len(photos)} photos at 64 px")


if __name__ == "__main__":
    main()
