"""What happens to pictures after diffusion: enlarging, film looks, grain, and putting re-rendered parts back.

Pictures are PIL images in RGB, masks are PIL images in L: 255 is repainted, 0 stays. No function changes what it gets.
Boxes are (left, top, right, bottom) in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from safetensors.torch import load_file
from scipy.interpolate import PchipInterpolator
from torch import Tensor
from torch.nn import functional

from trainer import memory

if TYPE_CHECKING:
    from trainer.presets import FilmLook

Array = np.ndarray[Any, np.dtype[Any]]
Picture = Image.Image
Box = tuple[float, float, float, float]
Square = tuple[int, int, int, int]

SMALL = 512 * 512  # pixels below which the hosted service enlarges four times, and from which on twice
LEAST_TILE = 64  # px; a card without room for this has none for the model either
LUMA = np.array([0.2126, 0.7152, 0.0722], np.float32)  # of red, green and blue (ITU-R BT.709)
TABLE = 33  # points on a side of a look's table, as colour tables commonly have
GRAIN = 0.01  # deviation in mid-tones, of 1: the hosted service's
FINE, COARSE = 0.8, 0.6  # shares of the two scales; their squares sum to 1
COARSE_PX = 3
FACE_MARGIN = 1.8  # side of the square around a face, of the face's longer side: the hosted service's
FACE_SHARES = 0.003, 0.3  # of the picture: smaller and larger faces are not re-rendered there either
EDGE = 0.1  # of the square's side: over this width it fades into the picture


# Enlarging


@dataclass(frozen=True)
class Upscaler:
    """A network that enlarges: (1, 3, H, W) of 0 to 1 -> (1, 3, H * scale, W * scale)."""

    name: str
    network: Any  # spandrel's ImageModelDescriptor
    scale: int
    multiple: int  # tiles start at multiples of this many px, as the network groups pixels


def upscaler(file: Path, device: torch.device) -> Upscaler:
    """Read a super-resolution model, a state dict in .pth or .safetensors, onto a device.

    ESRGAN (Wang et al. 2018, arXiv 1809.00219), Real-ESRGAN (2021, arXiv 2107.10833) and what else spandrel tells by
    its weights. Raises ValueError for a file that is broken or another kind of model.
    """
    from spandrel import ImageModelDescriptor, ModelLoader, UnsupportedModelError  # seconds, and few prompts need it

    try:
        if file.suffix == ".safetensors":
            state = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
        network = ModelLoader().load_from_state_dict(state)
    except UnsupportedModelError as problem:
        raise ValueError(f"{file.name} is no upscaler: its weights are of no model that spandrel knows") from problem
    except Exception as problem:  # broken files make the libraries raise anything
        raise ValueError(f"{file.name} cannot be read as an upscaler: {type(problem).__name__}: {problem}") from problem
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


def dtype_for(network: Any, device: torch.device) -> torch.dtype:
    """float16 on a card, which rounds pictures less than bfloat16; what the model supports; float32 elsewhere."""
    if device.type == "cuda" and network.supports_half:
        return torch.float16
    if device.type == "cuda" and network.supports_bfloat16 and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float32


def sr_factor(width: int, height: int) -> int:
    """By how much `super_resolution` enlarges a picture of this size: the hosted service's rule."""
    return 4 if width * height < SMALL else 2


def upscale(
    image: Picture,
    model: Upscaler,
    factor: float | None = None,
    tile: int = 512,
    overlap: int = 32,
    watch: Callable[[int, int], object] = lambda done, tiles: None,
) -> Picture:
    """Enlarge a picture by `factor`; None: by the model's scale, other factors by Lanczos from what the model gives.

    Works in tiles of `tile` px, each of which sees at least `overlap` px beyond the middle of its seams, and starts
    again with smaller ones where a card has no room. watch: told after each tile how many of how many are done; what
    it raises goes through. Raises ValueError for a factor that is not above 0, torch.OutOfMemoryError where a tile of
    64 px has no room either, RuntimeError where the model gives no numbers.
    """
    if factor is not None and not 0 < factor < math.inf:
        raise ValueError(f"the factor is {factor}; it must be above 0")
    image = image.convert("RGB")
    side = min(tile, max(image.size))
    while (enlarged := _if_room(image, model, side, overlap, watch)) is None:
        memory.release(model.network.device)  # only here: the traceback of the error kept its tensors alive
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
    """The picture in the model's scale; None where the card has no room for tiles of this side."""
    try:
        return _in_tiles(image, model, tile, min(overlap, tile // 4), watch)
    except torch.OutOfMemoryError:
        return None


def _in_tiles(image: Picture, model: Upscaler, tile: int, overlap: int, watch: Callable[[int, int], object]) -> Picture:
    """Rows of tiles become strips, and strips the picture: only the tile at work is on the card."""
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
            strip.paste(piece, (left * scale, 0), _grey(fade_in, piece.size))
            right_before, done = right, done + 1
            watch(done, len(rows) * len(columns))
        fade_in = _ramp(strip.height, (bottom_before - top) * scale, ramp)[:, None]
        whole.paste(strip, (0, top * scale), _grey(fade_in, strip.size))
        bottom_before = bottom
    return whole


def spans(length: int, tile: int, overlap: int, multiple: int = 1) -> list[tuple[int, int]]:
    """Intervals of `tile` px that cover 0 to `length`, evenly, neighbours sharing 2 * overlap or more.

    They start at multiples of `multiple`, for which they share up to so many px less.
    """
    if length <= tile:
        return [(0, length)]
    count = math.ceil((length - 2 * overlap) / (tile - 2 * overlap))
    starts = [i * (length - tile) // (count - 1) // multiple * multiple for i in range(count)]
    return [(start, start + tile) for start in starts[:-1]] + [(starts[-1], length)]


def _ramp(length: int, shared: int, width: int) -> Array:
    """Weights (length,) of a tile along one axis: from 0 to 1, linearly, in the middle of what it shares with the tile
    before. The outer part of the shared, where either tile lacks its surroundings, is not used."""
    if shared <= 0:  # the first one
        return np.ones(length, np.float32)
    place = np.arange(length, dtype=np.float32) + 0.5 - shared / 2
    return np.clip(place / max(width, 1) + 0.5, 0, 1)


def _run(model: Upscaler, image: Picture) -> Picture:
    network = model.network
    pixels = torch.from_numpy(np.array(image)).to(network.device).permute(2, 0, 1)[None].float() / 255
    bigger: Tensor = network(pixels.to(network.dtype))
    if not torch.isfinite(bigger).all() and network.dtype != torch.float32:
        network.float()  # some cards and models overflow in half precision; it stays so for the next tiles
        bigger = network(pixels)
    if not torch.isfinite(bigger).all():
        raise RuntimeError(f"{model.name} gave values that are not finite numbers: its file is damaged")
    return Image.fromarray((bigger[0].float() * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())


# Film


def grade(image: Picture, look: FilmLook) -> Picture:
    """A picture in the colours of a film, looked up in a table that is interpolated linearly."""
    blue, green, red = np.meshgrid(*[np.linspace(0, 1, TABLE, dtype=np.float32)] * 3, indexing="ij")
    table = developed(np.stack([red, green, blue], axis=-1), look)
    return image.convert("RGB").filter(ImageFilter.Color3DLUT(TABLE, table.ravel().tolist()))


def developed(colours: Array, look: FilmLook) -> Array:
    """Colours (..., 3), RGB from 0 to 1 as sRGB encodes them, as a film shows them."""
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

    The same seed gives the same grain; the mean of the picture stays.
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


# Faces


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
    """The square around a face, `margin` times its longer side, moved into the picture (width, height).

    It is a square always: where the picture is smaller, its shorter side is the square's.
    """
    side = max(1, min(*size, round(margin * max(box[2] - box[0], box[3] - box[1]))))
    middles = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    left, top = (
        round(min(max(0.0, middle - side / 2), limit - side)) for middle, limit in zip(middles, size, strict=True)
    )
    return left, top, left + side, top + side


def paste(picture: Picture, patch: Picture, square: Square) -> Picture:
    """Put a re-rendered patch of any size back into its square, which fades into the picture.

    Pixels outside the square, and those on its edge, stay as they are.
    """
    left, top, right, bottom = square
    size = right - left, bottom - top
    across, down = (_bump(length) for length in size)
    pasted = picture.convert("RGB")
    scaled = patch.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    pasted.paste(scaled, (left, top), _grey(down[:, None] * across[None, :], size))
    return pasted


def _bump(length: int) -> Array:
    """Weights (length,): 0 at both ends, rising smoothly to 1 over a share of the length."""
    place = np.arange(length, dtype=np.float32)
    ramp = np.clip(np.minimum(place, place[::-1]) / max(1.0, EDGE * length), 0, 1)
    return ramp * ramp * (3 - 2 * ramp)


# Masks


def paste_mask(picture: Picture, original: Picture, mask: Picture) -> Picture:
    """The picture where the mask is 255, the original's own pixels where it is 0, between the two in between.

    Raises ValueError where the three differ in size.
    """
    if not picture.size == original.size == mask.size:
        sizes = ", ".join("{} x {}".format(*one.size) for one in (picture, original, mask))
        raise ValueError(f"picture, original and mask must have one size, and have {sizes} px")
    return Image.composite(picture.convert("RGB"), original.convert("RGB"), mask.convert("L"))


def grow(mask: Picture, amount: int | str) -> Picture:
    """A mask grown by so many px in all directions, diagonals too; shrunk by a negative number.

    amount: px, or a share of the mask's longer side as "5%". A shrinking mask keeps to the picture's edges. Raises
    ValueError for other words.
    """
    radius = _pixels(amount, max(mask.size))
    levels = torch.from_numpy(np.array(mask.convert("L"), np.float32))[None, None]
    if radius < 0:
        levels = 255 - levels
    reached, wanted = 0, min(abs(radius), max(mask.size))
    while reached < wanted:  # three points at this distance continue what is reached without a gap
        step = min(wanted - reached, 2 * reached + 1)
        levels = functional.max_pool2d(functional.pad(levels, (step,) * 4), 3, stride=1, dilation=step)
        reached += step
    if radius < 0:
        levels = 255 - levels
    return Image.fromarray(levels[0, 0].to(torch.uint8).numpy())


def _pixels(amount: int | str, side: int) -> int:
    """`12`, `"-3"` and `"5%"` as px."""
    text = str(amount).strip()
    try:
        return round(float(text[:-1]) / 100 * side) if text.endswith("%") else round(float(text))
    except (ValueError, OverflowError):
        raise ValueError(f"a mask cannot grow by {amount!r}: give px such as 20 or -5, or a share such as 5%") from None


def soften(mask: Picture, px: float) -> Picture:
    """A mask blurred with a Gaussian of this deviation in px, so that it reaches about twice as far. Raises ValueError
    for one below 0."""
    if not 0 <= px < math.inf:
        raise ValueError(f"a mask cannot be blurred by {px} px; it must be 0 or more")
    return mask.convert("L").filter(ImageFilter.GaussianBlur(px))


def _grey(weights: Array, size: tuple[int, int]) -> Picture:
    """Weights of 0 to 1, (H, W) or one of them 1, as a mask of this size."""
    levels = np.rint(weights * 255).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(np.broadcast_to(levels, size[::-1])))
