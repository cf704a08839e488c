"""The training views of one photo: cropped, scaled, encoded, and shown to the user."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trainer.branches.protocol import Branch
from trainer.config.train_config import TrainConfig
from trainer.files import Unreadable, unreadable
from trainer.photos.geometry import DIMMED, bucket, crops, cut, load_mask, square, to_pixels
from trainer.photos.picture_file import open_picture
from trainer.training.seeds import derive

# What a user can do about a photo that is missing, and about one that is there and broken.
PUT_COPY = "Put a copy in its place and resume the tune"
PUT_BACK = f"{PUT_COPY}; if it is deleted, training goes on without it"
MASKS = ("face", "subject")
Kind = Literal["photo", "face", "class"]


@dataclass(frozen=True)
class Picture:
    """One picture to train on. `name` is the user's name for it."""

    path: Path
    caption: str
    name: str
    kind: Kind = "photo"


@dataclass(frozen=True)
class View:
    """One crop of a picture, encoded; it may be mirrored.

    mean, std (1, C, H/f, W/f): of the latents' distribution; every step draws a new sample. size: the family's size
    conditioning. masks: loss weights (1, 1, H/f, W/f) of mean 1; there is no entry "none".
    """

    mean: Tensor
    std: Tensor
    size: dict[str, Tensor]
    masks: dict[str, Tensor]


@dataclass(frozen=True)
class Sample:
    """One picture at one resolution, with all its views; each step trains one of them."""

    picture: Picture
    views: list[View]

    @property
    def shape(self) -> tuple[int, int]:
        """(H/f, W/f)"""
        height, width = self.views[0].mean.shape[-2:]
        return height, width


@dataclass(frozen=True)
class Opened:
    """A decoded picture with its existing masks."""

    picture: Picture
    image: Image.Image
    masks: dict[str, Image.Image]


def encode_and_show(
    branch: Branch, picture: Picture, config: TrainConfig, folder: Path, target: Path
) -> tuple[list[Sample], list[dict[str, object]]]:
    """Encode a picture at all resolutions, and write its views to `target`; class pictures are not shown.

    folder: the tune's `dataset/`. The picture is decoded once, and freed before this returns.
    """
    opened = read(picture, folder)
    samples = [encode(branch, opened, resolution, config) for resolution in config.resolution]
    if picture.kind == "class":
        return samples, []
    return samples, [show(branch, opened, resolution, config, target) for resolution in config.resolution]


def encode(branch: Branch, opened: Opened, resolution: int, config: TrainConfig) -> Sample:
    """Encode a picture at one resolution in all its views."""
    picture, image, masks = opened.picture, opened.image, opened.masks
    size = trained_size(branch, image, resolution, config)
    mirrorings = (False, True) if config.flip and picture.kind != "face" else (False,)
    views = []
    for box in crops(image.size, size, config.crops, derive(config.seed, 0, f"crops of {picture.path.name}")):
        for mirrored in mirrorings:
            mean, std = branch.encode_images(to_pixels(cut(image, box, size, mirrored))[None])
            scale = size[0] / (box[2] - box[0])
            left = image.width - box[2] if mirrored else box[0]
            corner = (round(box[1] * scale), round(left * scale))
            size_condition = branch.encode_size((image.height, image.width), corner, (size[1], size[0]))
            weights = {
                name: to_weights(cut(mask, box, size, mirrored), mean, config.mask_floor)
                for name, mask in masks.items()
            }
            views.append(View(mean, std, size_condition, weights))
    return Sample(picture, views)


def show(branch: Branch, opened: Opened, resolution: int, config: TrainConfig, target: Path) -> dict[str, object]:
    """Write the first view of a picture to `target`, with what the loss ignores dimmed; returns its description."""
    picture, image, masks = opened.picture, opened.image, opened.masks
    size = trained_size(branch, image, resolution, config)
    box = crops(image.size, size, 1, 0)[0]
    pixels = cut(image, box, size, False)
    if mask := masks.get(config.mask):
        dark = pixels.point(lambda value: value * DIMMED)
        pixels = Image.composite(pixels, dark, cut(mask, box, size, False))
    file = f"{picture.path.stem}-{size[0]}x{size[1]}.jpg"
    pixels.save(target / file, quality=90)
    arguments = {"file": file, "name": picture.name, "kind": picture.kind, "caption": picture.caption}
    return arguments | {"width": size[0], "height": size[1], "mask": config.mask if mask else None}


def read(picture: Picture, folder: Path) -> Opened:
    """A picture with its masks from `folder/masks`; class pictures have none. Raises Unreadable."""
    try:
        image = open_picture(picture.path, "RGB")
    except (FileNotFoundError, Unreadable) as problem:
        why = problem if isinstance(problem, Unreadable) else unreadable(picture.path, problem)
        raise Unreadable(f"{picture.name}: {why}. {PUT_BACK}") from None
    if picture.kind == "class":
        return Opened(picture, image, {})
    files = {kind: mask_file(folder, picture, kind) for kind in MASKS}
    masks = {kind: load_mask(file, image.size) for kind, file in files.items() if file.exists()}
    return Opened(picture, image, masks)


def trained_size(branch: Branch, image: Image.Image, resolution: int, config: TrainConfig) -> tuple[int, int]:
    """(width, height) in pixels."""
    if config.buckets:
        return bucket(image.size, resolution, branch.size_multiple)
    side = square(resolution, branch.size_multiple)
    return side, side


def mask_file(folder: Path, picture: Picture, kind: str) -> Path:
    return folder / "masks" / kind / f"{picture.path.stem}.png"


def to_weights(mask: Image.Image, latents: Tensor, floor: float) -> Tensor:
    """Loss weights (1, 1, H/f, W/f) of mean 1; weights outside the mask are `floor` times those inside."""
    height, width = latents.shape[-2:]
    small = torch.from_numpy(np.asarray(mask.resize((width, height), Image.Resampling.BOX), np.float32).copy()) / 255
    weights = floor + (1 - floor) * small
    if not weights.any():  # the mask is outside this crop
        weights = torch.ones_like(weights)
    return (weights / weights.mean())[None, None].to(latents.device)


def write_picture(image: Image.Image, file: Path) -> None:
    """Write a picture atomically."""
    file.parent.mkdir(exist_ok=True)
    partial = file.with_suffix(".partial")
    try:
        image.save(partial, "PNG")
        partial.rename(file)
    finally:
        partial.unlink(missing_ok=True)  # incomplete after an error
