"""Models that were trained for a few steps, and how far their pictures are apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

FAMILIES = ["sd15", "sdxl1", "flux1"]
# In the default run; the other families, which take the same code, are long.
ROUNDING = 1e-4
SOME = ["sd15", *(pytest.param(family, marks=pytest.mark.long) for family in FAMILIES[1:])]


def picture(pipeline: Any, text: str = "a photo of ohwx dog") -> Tensor:
    """The latents of a picture of a fixed seed, which say more than its pixels."""
    generator = torch.Generator().manual_seed(0)
    latents: Tensor = pipeline(
        text, height=64, width=64, num_inference_steps=2, generator=generator, output_type="latent"
    ).images
    return latents


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())
