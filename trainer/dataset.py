"""The training set: photos and captions, encoded once and kept on the device."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trainer.branches import Branch
from trainer.presets import TrainConfig


@dataclass
class Dataset:
    """N photos as latents with their captions.

    mean, std: (N, C, H/f, W/f), of each photo's latent distribution: every step draws a fresh sample.
    cond: the captions' keyword tensors for `Branch.loss`, and last the empty caption's: (N + 1, ...) each;
    None where a text encoder is trained and captions are encoded anew in each step.
    """

    captions: list[str]
    mean: Tensor
    std: Tensor
    cond: dict[str, Tensor] | None

    def batch(
        self, branch: Branch, config: TrainConfig, step: int
    ) -> tuple[Tensor, dict[str, Tensor], torch.Generator]:
        """The samples of one step: latents (B, C, H/f, W/f), their conditions, the generator for what is drawn next.

        Everything is a function of the seed and the step, so that a resumed run draws what the first one would have.
        """
        rows = order(config.seed, len(self.captions), step * config.batch, config.batch)
        generator = torch.Generator(self.mean.device).manual_seed(derive(config.seed, step, "noise"))
        picked = torch.tensor(rows, device=self.mean.device)
        mean, std = self.mean[picked], self.std[picked]
        latents = mean + std * torch.randn(mean.shape, generator=generator, device=mean.device)
        dice = torch.Generator().manual_seed(derive(config.seed, step, "caption dropout"))
        dropped = (torch.rand(config.batch, generator=dice) < config.caption_dropout).tolist()
        empty = len(self.captions)  # its place behind the captions
        said = [empty if drop else row for row, drop in zip(rows, dropped, strict=True)]
        if self.cond is None:
            cond = branch.encode_prompts([[*self.captions, ""][place] for place in said])
        else:
            places = torch.tensor(said, device=mean.device)
            cond = {key: value[places] for key, value in self.cond.items()}
        return latents, cond, generator


def build(branch: Branch, photos: list[Path], captions: list[str], config: TrainConfig) -> Dataset:
    """Encode each photo and each caption once."""
    encoded = [branch.encode_images(load_pixels(photo, config.resolution)[None]) for photo in photos]
    cond = None
    if not config.text_encoder_lr:
        with torch.no_grad():
            cond = branch.encode_prompts([*captions, ""])
    return Dataset(captions, torch.cat([m for m, _ in encoded]), torch.cat([s for _, s in encoded]), cond)


def load_pixels(photo: Path, resolution: int) -> Tensor:
    """The centre square of a stored photo, (3, R, R) in [-1, 1]; shrunk with Lanczos, never stretched."""
    with Image.open(photo) as image:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        square = image.convert("RGB").resize(
            (resolution, resolution), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side)
        )
    return torch.from_numpy(np.asarray(square, np.float32).copy()).permute(2, 0, 1) / 127.5 - 1


def captions_for(photos: list[Path], token: str, class_name: str) -> list[str]:
    """The text of `NAME.txt` beside a photo, else what the hosted service writes: `A photo of TOKEN CLASS`."""
    subject = f"{token} {class_name}" if "style" in class_name.lower() else f"A photo of {token} {class_name}"
    texts = [photo.with_suffix(".txt") for photo in photos]
    return [text.read_text("utf-8").strip() if text.exists() else subject for text in texts]


def derive(seed: int, step: int, purpose: str) -> int:
    """A seed of its own for each use of randomness in each step, below 2^63."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def order(seed: int, photos: int, start: int, count: int) -> list[int]:
    """`count` places of an endless list that goes through all photos again and again, shuffled anew each time."""
    return [_shuffled(seed, photos, place // photos)[place % photos] for place in range(start, start + count)]


@lru_cache(maxsize=8)
def _shuffled(seed: int, photos: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(derive(seed, epoch, "order"))
    shuffled: list[int] = torch.randperm(photos, generator=generator).tolist()
    return shuffled
