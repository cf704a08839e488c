"""Pictures as arrays, for the steps after diffusion."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[Any]
Picture = Image.Image


def grey(weights: Array, size: tuple[int, int]) -> Picture:
    """Weights of 0 to 1, (H, W), (H, 1) or (1, W), as a mask of this size."""
    levels = np.rint(weights * 255).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(np.broadcast_to(levels, size[::-1])))
