"""Upscaling of pictures with a super-resolution network, in tiles.

Pictures are PIL images in RGB. No function changes its arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from trainer.device import release
from trainer.rendering.pixels import Array, Picture, grey

if TYPE_CHECKING:
    from spandrel import ImageModelDescriptor

SMALL = 512 * 512  # pixels: the hosted service enlarges smaller pictures four times, others twice
LEAST_TILE = 64  # px; a card without room for this has no room for the model

# Errors of safetensors, torch and spandrel for a damaged file.
UNREADABLE = (
    ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, OSError, RuntimeError, SafetensorError,
    TypeError, UnpicklingError, ValueError,
)  # fmt: skip


@dataclass(frozen=True)
class Upscaler:
    """A super-resolution network: (1, 3, H, W) of 0 to 1 -> (1, 3, H * scale, W * scale)."""

    name: str
    network: ImageModelDescriptor
    scale: int
    multiple: int  # tiles start at multiples of this many px, because the network groups pixels


def upscaler(file: Path, device: torch.device) -> Upscaler:
    """Load a super-resolution model (a state dict in .pth or .safetensors) onto a device.

    ESRGAN (Wang et al. 2018, arXiv 1809.00219), Real-ESRGAN (2021, arXiv 2107.10833) and others that spandrel
    recognizes by their weights. Raises ValueError for a damaged file or another kind of model.
    """
    from spandrel import ImageModelDescriptor, ModelLoader, UnsupportedModelError  # seconds; few prompts need it

    try:
        if file.suffix == ".safetensors":
            state = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
        network = ModelLoader().load_from_state_dict(state)
    except UnsupportedModelError as problem:
        raise ValueError(f"{file.name} is no upscaler: its weights are of no model that spandrel knows") from problem
    except UNREADABLE as problem:
        raise ValueError(f"{file.name} cannot be read as an upscaler: {problem}") from problem
    channels = (network.input_channels, network.output_channels)
    if not isinstance(network, ImageModelDescriptor) or network.purpose != "SR" or network.scale < 2:
        raise ValueError(
            f"{file.name} is no upscaler but a model for {network.purpose} of scale {network.scale}; what is wanted is"
            " single-image super-resolution of scale 2 or more, such as RealESRGAN_x4plus.pth"
        )
    if channels != (3, 3):
        raise ValueError(f"{file.name} turns {channels[0]} channels into {channels[1]}; pictures have 3 (RGB)")
    network.to(device, dtype_for(network, device)).eval()
    network.model.requires_grad_(False)
    return Upscaler(file.name, network, network.scale, network.size_requirements.multiple_of)


def dtype_for(network: ImageModelDescriptor, device: torch.device) -> torch.dtype:
    """On a card, float16 (rounds less than bfloat16) or what the model supports; float32 elsewhere."""
    if device.type == "cuda" and network.supports_half:
        return torch.float16
    if device.type == "cuda" and network.supports_bfloat16 and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float32


def sr_factor(width: int, height: int) -> int:
    """The factor of `super_resolution` for a picture of this size: the hosted service's rule."""
    return 4 if width * height < SMALL else 2


def upscale(
    image: Picture,
    model: Upscaler,
    factor: float | None = None,
    tile: int = 512,
    overlap: int = 32,
    watch: Callable[[int, int], object] = lambda done, tiles: None,
) -> Picture:
    """Enlarge a picture by `factor`; None: the model's scale; other factors: the model, then Lanczos.

    Works in tiles of `tile` px, each with at least `overlap` px beyond the middle of its seams; smaller tiles where the
    card has no room. watch: called after each tile with the numbers of tiles done and in all; it may raise. Raises
    ValueError for a factor not above 0, torch.OutOfMemoryError where even tiles of 64 px do not fit, RuntimeError where
    the model returns values that are not finite.
    """
    if factor is not None and not 0 < factor < math.inf:
        raise ValueError(f"the factor is {factor}; it must be above 0")
    image = image.convert("RGB")
    side = min(tile, max(image.size))
    while (enlarged := _if_room(image, model, side, overlap, watch)) is None:
        release(model.network.device)  # not earlier: the traceback of the error kept its tensors alive
        if side <= LEAST_TILE:
            raise torch.OutOfMemoryError(f"{model.name} has no room on the card, even for tiles of {side} px")
        side = max(LEAST_TILE, side // 2)
    if factor is None:
        return enlarged
    size = max(1, round(image.width * factor)), max(1, round(image.height * factor))
    return enlarged if size == enlarged.size else enlarged.resize(size, Image.Resampling.LANCZOS)


def _if_room(
    image: Picture, model: Upscaler, tile: int, overlap: int, watch: Callable[[int, int], object]
) -> Picture | None:
    """The enlarged picture; None where the card has no room for tiles of this side."""
    try:
        return _in_tiles(image, model, tile, min(overlap, tile // 4), watch)
    except torch.OutOfMemoryError:
        return None


def _in_tiles(image: Picture, model: Upscaler, tile: int, overlap: int, watch: Callable[[int, int], object]) -> Picture:
    """Tiles are joined to strips, strips to the picture; only the current tile is on the card."""
    scale, ramp = model.scale, overlap * model.scale // 2
    rows, columns = (spans(side, tile, overlap, model.multiple) for side in (image.height, image.width))
    whole = Image.new("RGB", (image.width * scale, image.height * scale))
    done, bottom_before = 0, 0
    for top, bottom in rows:
        strip = Image.new("RGB", (whole.width, (bottom - top) * scale))
        right_before = 0
        for left, right in columns:
            piece = _run(model, image.crop((left, top, right, bottom)))
            fade_in = _ramp(piece.width, (right_before - left) * scale, ramp)[None, :]
            strip.paste(piece, (left * scale, 0), grey(fade_in, piece.size))
            right_before, done = right, done + 1
            watch(done, len(rows) * len(columns))
        fade_in = _ramp(strip.height, (bottom_before - top) * scale, ramp)[:, None]
        whole.paste(strip, (0, top * scale), grey(fade_in, strip.size))
        bottom_before = bottom
    return whole


def spans(length: int, tile: int, overlap: int, multiple: int = 1) -> list[tuple[int, int]]:
    """Intervals of `tile` px that cover 0 to `length` evenly; neighbours share 2 * overlap px or more.

    They start at multiples of `multiple`, so neighbours may share up to `multiple` px less.
    """
    if length <= tile:
        return [(0, length)]
    count = math.ceil((length - 2 * overlap) / (tile - 2 * overlap))
    starts = [i * (length - tile) // (count - 1) // multiple * multiple for i in range(count)]
    return [(start, start + tile) for start in starts[:-1]] + [(starts[-1], length)]


def _ramp(length: int, shared: int, width: int) -> Array:
    """Weights (length,) of a tile along one axis: they rise linearly from 0 to 1 in the middle of the part shared with
    the tile before. The outer shared part is not used: there one tile lacks its surroundings."""
    if shared <= 0:  # the first tile
        return np.ones(length, np.float32)
    place = np.arange(length, dtype=np.float32) + 0.5 - shared / 2
    return np.clip(place / max(width, 1) + 0.5, 0, 1)


def _run(model: Upscaler, image: Picture) -> Picture:
    network = model.network
    pixels = torch.from_numpy(np.array(image)).to(network.device).permute(2, 0, 1)[None].float() / 255
    bigger: Tensor = network(pixels.to(network.dtype))
    if not torch.isfinite(bigger).all() and network.dtype != torch.float32:
        network.float()  # some models overflow in half precision; the next tiles use float32 too
        bigger = network(pixels)
    if not torch.isfinite(bigger).all():
        raise RuntimeError(f"{model.name} gave values that are not finite numbers: its file is damaged")
    return Image.fromarray((bigger[0].float() * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())
