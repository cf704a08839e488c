"""The photos of ten subjects next to the repository, as the measurements of branch fast use them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

SUBJECTS = Path(__file__).parents[2] / "shared" / "data" / "subjects"
SIDE = 64

# Class names of the data set (DreamBooth, CC BY 4.0), by folder.
CLASSES = {
    "backpack_dog": "backpack",
    "bear_plushie": "stuffed animal",
    "cat2": "cat",
    "clock": "clock",
    "colorful_sneaker": "sneaker",
    "dog": "dog",
    "dog6": "dog",
    "monster_toy": "toy",
    "rc_car": "toy",
    "teapot": "teapot",
}


def files(subject: str) -> list[Path]:
    return sorted((SUBJECTS / subject).glob("*.jpg"))


def read_photo(file: Path) -> NDArray[np.uint8]:
    """A photo's middle square, (64, 64, 3)."""
    upright = ImageOps.exif_transpose(Image.open(file)).convert("RGB")
    return np.asarray(ImageOps.fit(upright, (SIDE, SIDE), Image.Resampling.LANCZOS))


def read_photos() -> dict[str, list[NDArray[np.uint8]]]:
    """Each subject's photos."""
    return {subject: [read_photo(file) for file in files(subject)] for subject in CLASSES}
