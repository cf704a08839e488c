"""One photo as the trainer sees it: cropped, scaled, encoded, and shown to the user."""

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
from trainer.photos.geometry import DIMMED, bucket, crops, cut, load_mask, square, to_pixels
from trainer.training.seeds import derive

MASKS = ("face", "subject")
Kind = Literal["photo", "face", "class"]


@dataclass(frozen=True)
class Picture:
    """One picture to train on. `name` is what the user knows it by."""

    path: Path
    caption: str
    name: str
    kind: Kind = "photo"


@dataclass(frozen=True)
class View:
    """One crop of a picture, perhaps mirrored, encoded.

    mean, std (1, C, H/f, W/f): of the latents' distribution; every step draws a fresh sample. size: what the family is
    told of the picture's size. masks: which part counts, (1, 1, H/f, W/f) of mean 1; "none" is not in it.
    """

    mean: Tensor
    std: Tensor
    size: dict[str, Tensor]
    masks: dict[str, Tensor]


@dataclass(frozen=True)
class Sample:
    """One picture at one resolution, in all the views that are trained in turn."""

    picture: Picture
    views: list[View]

    @property
    def shape(self) -> tuple[int, int]:
        """(H/f, W/f)"""
        height, width = self.views[0].mean.shape[-2:]
        return height, width


@dataclass(frozen=True)
class Opened:
    """A picture, decoded, with those masks of it that there are."""

    picture: Picture
    image: Image.Image
    masks: dict[str, Image.Image]


def encode_and_show(
    branch: Branch, picture: Picture, config: TrainConfig, folder: Path, target: Path
) -> tuple[list[Sample], list[dict[str, object]]]:
    """A picture at all resolutions, and what is shown of it in `target`: nothing of a class picture.

    folder: the tune's `dataset/`. The picture is decoded once, and no longer in memory when this returns.
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
    """Write what the first view of a picture looks like into `target`, what the loss leaves out dimmed; and say so."""
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
    """A picture with its masks, which are in `folder/masks`; class pictures have none."""
    image = open_picture(picture.path, "RGB")
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
    """Loss weights (1, 1, H/f, W/f) of mean 1, `floor` times as much outside as inside."""
    height, width = latents.shape[-2:]
    small = torch.from_numpy(np.asarray(mask.resize((width, height), Image.Resampling.BOX), np.float32).copy()) / 255
    weights = floor + (1 - floor) * small
    if not weights.any():  # the mask lies outside this crop
        weights = torch.ones_like(weights)
    return (weights / weights.mean())[None, None].to(latents.device)
