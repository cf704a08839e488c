"""Masks of the subject: people, faces, and objects named by a text."""

from __future__ import annotations

import io
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from trainer.photos import geometry
from trainer.photos.found import Box, Task
from trainer.photos.nets import load

if TYPE_CHECKING:
    from facexlib.matting.modnet import MODNet
    from transformers import CLIPSegForImageSegmentation, CLIPTokenizer

MASK_MARGIN = 0.15  # of the box on each side: the detector's boxes end at chin and brow
MATTING_PX = 512  # MODNet's reference size, of the shorter side; a multiple of 32
WORDS_PX = 352  # CLIPSeg's
LEAST_SHARE = 0.005  # of the picture: a smaller mask counts as not found


def masks(task: Task, image: Image.Image, boxes: list[Box]) -> dict[str, Image.Image | None]:
    """The masks of a task, white on black, of the image's size; None where nothing was found."""
    drawn: dict[str, Image.Image | None] = {}
    if task.mask_face:
        drawn["face"] = mask_boxes(boxes, image.size) if boxes else None
    if task.matting:
        drawn["subject"] = mask_people(image, task.matting)
    if task.segmenter:
        drawn["subject"] = mask_words(image, task.name, task.segmenter)
    return drawn


def mask_boxes(boxes: list[Box], size: tuple[int, int]) -> Image.Image:
    mask = Image.new("L", size)
    for left, top, right, bottom in boxes:
        aside, above = MASK_MARGIN * (right - left), MASK_MARGIN * (bottom - top)
        ImageDraw.Draw(mask).rectangle((left - aside, top - above, right + aside, bottom + above), fill=255)
    return mask


def mask_people(image: Image.Image, weights: Path) -> Image.Image:
    """Mask of people by MODNet (Ke et al. 2020, arXiv 2011.11961)."""
    scale = MATTING_PX / min(image.size)
    width, height = (max(32, round(side * scale / 32) * 32) for side in image.size)
    pixels = geometry.to_pixels(image.resize((width, height), Image.Resampling.BILINEAR))[None]
    with torch.no_grad():
        matte = load_matting(weights)(pixels, True)[2][0, 0]
    return grey(matte, image.size)


@lru_cache(maxsize=1)
def load_matting(weights: Path) -> MODNet:
    from facexlib.matting.modnet import MODNet

    return load(MODNet(backbone_pretrained=False), weights)


def mask_words(image: Image.Image, words: str, weights: Path) -> Image.Image | None:
    """Mask of what the words name, by CLIPSeg (Lüddecke and Ecker 2021, arXiv 2112.10003); None: not found.

    Its probabilities are vague at the edges and rarely reach 1: the mask rises from 0 at a fifth of the largest to 1 at
    three fifths.
    """
    tokenizer, model = load_segmenter(weights.parent)
    pixels = geometry.to_pixels(image.resize((WORDS_PX, WORDS_PX), Image.Resampling.BILINEAR)) / 2 + 0.5
    mean, deviation = (torch.tensor(values)[:, None, None] for values in IMAGENET)
    tokens = tokenizer([words], return_tensors="pt")
    with torch.no_grad():
        answer = model(**tokens, pixel_values=((pixels - mean) / deviation)[None])
    likely = answer.logits.reshape(WORDS_PX, WORDS_PX).sigmoid()
    if likely.max() < 0.2:
        return None
    return grey(((likely / likely.max() - 0.2) / 0.4).clamp(0, 1), image.size)


def mask_png(picture: Path, words: str, weights: Path) -> bytes | None:
    """`mask_words` of a file, as a PNG."""
    with Image.open(picture) as opened:
        mask = mask_words(opened.convert("RGB"), words, weights)
    if mask is None:
        return None
    stream = io.BytesIO()
    mask.save(stream, "PNG")
    return stream.getvalue()


IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and deviation of CLIPSeg's preprocessing


@lru_cache(maxsize=1)
def load_segmenter(folder: Path) -> tuple[CLIPTokenizer, CLIPSegForImageSegmentation]:
    from transformers import CLIPSegForImageSegmentation, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    model = CLIPSegForImageSegmentation.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    return tokenizer, model.eval().requires_grad_(False)


def grey(mask: Tensor, size: tuple[int, int]) -> Image.Image:
    """A mask (H, W) of 0 to 1 as a picture of this size."""
    pixels = (mask.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    return Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR)
