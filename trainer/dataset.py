"""The training set: pictures and captions, encoded once and kept on the device.

It is made from a tune's folder:

    images/NAME.jpg|png          the photos; NAME.txt beside one is its caption
    dataset/restored/NAME.jpg    the photo with its faces restored, which is trained in its place
    dataset/faces/NAME-face.*    face crops, a second set (presets that ask for a face set)
    dataset/masks/face/NAME.png  what the loss looks at, white on black, of the size of the picture of that name;
    dataset/masks/subject/...    masks/face has those of the face crops, too
    dataset/seen/                written here: every picture as it is trained, and seen.json with the captions
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from trainer.branches import Branch
from trainer.files import whole_folder
from trainer.memory import placed
from trainer.presets import TrainConfig
from trainer.schema import default_caption

Image.MAX_IMAGE_PIXELS = None  # the intake has checked that, by the setting

BUCKETS_PER_SIDE = 16  # sides of pictures differ by a sixteenth of the resolution: 64 px at 1024, as everywhere
MAX_STRETCH = 2.0  # the longest bucket's side, in resolutions: 2 x 1/2
DIMMED = 0.3  # of its brightness is left of what the loss does not look at, on the page
FACE_SUFFIX = "-face"
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
class MicroBatch:
    """Samples of one shape that go through the denoiser together.

    latents, noise (B, C, H/f, W/f); timesteps (B,); mask (B, 1, H/f, W/f) or None. The loss of the step is the sum of
    `share` times the loss of each sample, over all its micro-batches.
    """

    latents: Tensor
    cond: dict[str, Tensor]
    noise: Tensor
    timesteps: Tensor
    mask: Tensor | None
    share: float
    last: bool = True  # of its step


class Dataset:
    """Everything that is trained on, encoded.

    captions: the distinct ones, the empty one last. cond: what they are encoded to, one entry (1, ...) each; None while
    that is trained as well, and captions are encoded anew in each step.
    """

    def __init__(
        self, samples: list[Sample], captions: list[str], cond: list[dict[str, Tensor]] | None, config: TrainConfig
    ) -> None:
        self.samples = [sample for sample in samples if sample.picture.kind != "class"]
        self.prior = [sample for sample in samples if sample.picture.kind == "class"]
        self.captions = captions
        self.cond = cond
        self._config = config

    def names(self, step: int) -> list[str]:
        """The pictures of a step, by the names that the user knows."""
        return sorted({sample.picture.name for sample, _ in self._drawn(step)})

    def batches(self, branch: Branch, step: int) -> Iterator[MicroBatch]:
        """The samples of one step, those of one shape together, at most `micro_batch` of them at a time.

        Everything is a function of the seed and the step, and what is drawn for a sample does not depend on those
        beside it: a resumed run draws what the first one would have, and a smaller micro-batch sums to the same step.
        """
        config = self._config
        drawn = self._drawn(step)
        dice = torch.Generator().manual_seed(derive(config.seed, step, "caption dropout"))
        dropped = (torch.rand(len(drawn), generator=dice) < config.caption_dropout).tolist()
        turns = torch.randint(2**31, (len(drawn),), generator=dice).tolist()
        mask = self._mask(step)
        if step < config.text_steps:
            self.cond = None  # again, where a run went back to before they came to rest
        elif self.cond is None:  # from here on, what is encoded stays the same
            with torch.no_grad():
                self.cond = [branch.encode_prompts([caption]) for caption in self.captions]
        groups: dict[tuple[tuple[int, int], float], list[int]] = {}
        for place, (sample, share) in enumerate(drawn):
            groups.setdefault((sample.shape, share), []).append(place)
        size = config.micro_batch
        parts = [(share, of[at : at + size]) for (_, share), of in groups.items() for at in range(0, len(of), size)]
        for number, (share, places) in enumerate(parts, 1):
            views = [drawn[place][0].views[turns[place] % len(drawn[place][0].views)] for place in places]
            captions = ["" if dropped[place] else drawn[place][0].picture.caption for place in places]
            chances = [self._chance(branch, view, step, place) for view, place in zip(views, places, strict=True)]
            latents, noise, timesteps = (torch.cat(values) for values in zip(*chances, strict=True))
            cond, masks = self._conditions(branch, captions, views), self._masks(views, mask)
            yield MicroBatch(latents, cond, noise, timesteps, masks, share, number == len(parts))

    def _drawn(self, step: int) -> list[tuple[Sample, float]]:
        """The samples of a step, each with its share of the loss."""
        batch, seed = self._config.batch, self._config.seed
        drawn = [(row, 1 / batch) for row in in_turn(seed, self.samples, step * batch, batch)]
        if self.prior:
            share = self._config.prior_weight / batch
            drawn += [
                (row, share) for row in in_turn(derive(seed, 0, "class pictures"), self.prior, step * batch, batch)
            ]
        return drawn

    def _mask(self, step: int) -> str:
        """Which mask the step has: every so often the whole subject's in place of the face's."""
        widen = self._config.mask_widen
        widened = math.floor((step + 1) * widen) > math.floor(step * widen)
        return "subject" if widened else self._config.mask

    def _chance(self, branch: Branch, view: View, step: int, place: int) -> tuple[Tensor, Tensor, Tensor]:
        """What is drawn for one sample: latents and noise (1, C, H/f, W/f), timesteps (1,)."""
        seed = derive(self._config.seed, step, f"noise {place}")
        generator = torch.Generator(view.mean.device).manual_seed(seed)
        fresh = torch.randn(view.mean.shape, generator=generator, device=view.mean.device)
        latents = view.mean + view.std * fresh
        return (latents, *branch.draw(latents, generator))

    def _conditions(self, branch: Branch, captions: list[str], views: list[View]) -> dict[str, Tensor]:
        if self.cond is None:
            distinct = list(dict.fromkeys(captions))  # most often one: each is encoded once
            rows = [distinct.index(caption) for caption in captions]
            cond = {key: value[rows] for key, value in branch.encode_prompts(distinct).items()}
        else:
            said = [self.cond[self.captions.index(caption)] for caption in captions]
            cond = {key: torch.cat([one[key] for one in said]) for key in said[0]}
        return cond | {key: torch.cat([view.size[key] for view in views]) for key in views[0].size}

    @staticmethod
    def _masks(views: list[View], mask: str) -> Tensor | None:
        """A view without this mask counts as a whole."""
        if not any(mask in view.masks for view in views):
            return None
        return torch.cat([view.masks.get(mask, torch.ones_like(view.mean[:, :1])) for view in views])


def build(
    branch: Branch,
    pictures: Sequence[Picture],
    prompts: Sequence[str],
    config: TrainConfig,
    folder: Path,
    keep: Collection[str] = (),
) -> tuple[Dataset, list[dict[str, Tensor]]]:
    """Encode each picture and each caption once, and write the pictures as they are trained to `folder/seen`.

    folder: the tune's `dataset/`. prompts: texts that will be rendered while training; what they are encoded to is
    returned beside the set. Encoders are on the device only while they encode; afterwards the text encoders are
    dropped, but for those to `keep`.
    """
    encoders = list(branch.text_encoders.values())
    captions = [*dict.fromkeys(picture.caption for picture in pictures if picture.caption), ""]
    with torch.no_grad(), placed(branch.device, *encoders):
        cond = [branch.encode_prompts([caption]) for caption in captions]
        said = [branch.encode_prompts([prompt]) for prompt in prompts]
    branch.keep_text_encoders(keep)
    with whole_folder(folder / "seen") as partial, placed(branch.device, branch.vae):
        asked = [(picture, resolution) for picture in pictures for resolution in config.resolution]
        samples = [encode(branch, picture, resolution, config, folder) for picture, resolution in asked]
        shown = [show(branch, *one, config, folder, partial) for one in asked if one[0].kind != "class"]
        (partial / "seen.json").write_text(json.dumps(shown, indent=1))
    return Dataset(samples, captions, None if config.text_steps else cond, config), said


def encode(branch: Branch, picture: Picture, resolution: int, config: TrainConfig, folder: Path) -> Sample:
    """Encode a picture at one resolution in all its views."""
    image, masks = read(picture, folder)
    size = trained_size(branch, image, resolution, config)
    mirrorings = (False, True) if config.flip and picture.kind != "face" else (False,)
    views = []
    for box in crops(image.size, size, config.crops, derive(config.seed, 0, f"crops of {picture.path.name}")):
        for mirrored in mirrorings:
            mean, std = branch.encode_images(to_pixels(cut(image, box, size, mirrored))[None])
            scale = size[0] / (box[2] - box[0])
            left = image.width - box[2] if mirrored else box[0]
            corner = (round(box[1] * scale), round(left * scale))
            told = branch.encode_size((image.height, image.width), corner, (size[1], size[0]))
            weights = {
                name: to_weights(cut(mask, box, size, mirrored), mean, config.mask_floor)
                for name, mask in masks.items()
            }
            views.append(View(mean, std, told, weights))
    return Sample(picture, views)


def show(
    branch: Branch, picture: Picture, resolution: int, config: TrainConfig, folder: Path, target: Path
) -> dict[str, object]:
    """Write what the first view of a picture looks like into `target`, what the loss leaves out dimmed; and say so."""
    image, masks = read(picture, folder)
    size = trained_size(branch, image, resolution, config)
    box = crops(image.size, size, 1, 0)[0]
    pixels = cut(image, box, size, False)
    if mask := masks.get(config.mask):
        dark = pixels.point(lambda value: value * DIMMED)
        pixels = Image.composite(pixels, dark, cut(mask, box, size, False))
    file = f"{picture.path.stem}-{size[0]}x{size[1]}.jpg"
    pixels.save(target / file, quality=90)
    told = {"file": file, "name": picture.name, "kind": picture.kind, "caption": picture.caption}
    return told | {"width": size[0], "height": size[1], "mask": config.mask if mask else None}


def read(picture: Picture, folder: Path) -> tuple[Image.Image, dict[str, Image.Image]]:
    """A picture, and those masks that lie in `folder/masks`; class pictures have none."""
    with Image.open(picture.path) as opened:
        image = opened.convert("RGB")
    if picture.kind == "class":
        return image, {}
    files = {kind: mask_file(folder, picture, kind) for kind in MASKS}
    return image, {kind: load_mask(file, image.size) for kind, file in files.items() if file.exists()}


def trained_size(branch: Branch, image: Image.Image, resolution: int, config: TrainConfig) -> tuple[int, int]:
    """(width, height) in pixels."""
    if config.buckets:
        return bucket(image.size, resolution, branch.size_multiple)
    side = square(resolution, branch.size_multiple)
    return side, side


def square(resolution: int, multiple: int) -> int:
    """The largest side up to `resolution` that is a multiple; at least one."""
    return max(multiple, resolution // multiple * multiple)


def bucket(size: tuple[int, int], resolution: int, multiple: int) -> tuple[int, int]:
    """The (width, height) that is nearest in aspect to `size` and has at most resolution^2 pixels.

    Sides are multiples of `multiple` and of a sixteenth of the resolution, from a half to twice the resolution.
    """
    step = multiple * max(1, round(resolution / BUCKETS_PER_SIDE / multiple))
    widths = range(step, round(MAX_STRETCH * resolution) + 1, step)
    sizes = [(width, resolution**2 // width // step * step) for width in widths if 2 * width >= resolution]
    side = square(resolution, step)  # is not among them where the resolution is not a multiple of the step
    known = [(side, side), *(one for one in sizes if resolution <= 2 * one[1] <= 2 * MAX_STRETCH * resolution)]
    aspect = math.log(size[0] / size[1])
    return min(known, key=lambda one: abs(math.log(one[0] / one[1]) - aspect))


def crops(
    image: tuple[int, int], size: tuple[int, int], count: int, seed: int
) -> list[tuple[float, float, float, float]]:
    """`count` boxes (left, top, right, bottom) of the aspect of `size`, as large as the image allows; centred first.

    Fewer where the image has that very aspect, and there is nothing to choose.
    """
    scale = min(image[0] / size[0], image[1] / size[1])
    width, height = size[0] * scale, size[1] * scale
    slack = max(0.0, image[0] - width), max(0.0, image[1] - height)  # rounding leaves less than none at times
    dice = torch.Generator().manual_seed(seed)
    places = [0.5, *torch.rand(count - 1, generator=dice).tolist()] if max(slack) >= 1 else [0.5]
    return [(slack[0] * at, slack[1] * at, slack[0] * at + width, slack[1] * at + height) for at in places]


def cut(
    image: Image.Image, box: tuple[float, float, float, float], size: tuple[int, int], mirrored: bool
) -> Image.Image:
    """A box of an image at a size in pixels; resampled with Lanczos, never stretched."""
    pixels = image.resize(size, Image.Resampling.LANCZOS, box=box)
    return ImageOps.mirror(pixels) if mirrored else pixels


def to_pixels(image: Image.Image) -> Tensor:
    """(3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.asarray(image, np.float32).copy()).permute(2, 0, 1) / 127.5 - 1


def mask_file(folder: Path, picture: Picture, kind: str) -> Path:
    return folder / "masks" / kind / f"{picture.path.stem}.png"


def without_mask(pictures: Sequence[Picture], folder: Path, config: TrainConfig) -> list[str]:
    """What the configuration asks for and `dataset/` does not have, in words."""
    wanted = {config.mask} | ({"subject"} if config.mask_widen else set())
    told = []
    for kind in sorted(wanted - {"none"}):
        names = sorted({picture.name for picture in pictures if not mask_file(folder, picture, kind).exists()})
        if names:
            told.append(f"no mask of the {kind} for {', '.join(names)}: the whole picture is trained")
    if config.face_set and not any(picture.kind == "face" for picture in pictures):
        told.append("no face crops: only the photos themselves are trained")
    return told


def load_mask(file: Path, size: tuple[int, int]) -> Image.Image:
    """A mask as grey picture. Raises ValueError where it is not of its picture's size, or all black."""
    with Image.open(file) as opened:
        mask = opened.convert("L")
    if mask.size != size:
        ours, theirs = (f"{width} x {height}" for width, height in (mask.size, size))
        raise ValueError(f"the mask {file.name} has {ours} pixels, its picture {theirs}")
    if not mask.getbbox():
        raise ValueError(f"the mask {file.name} is all black: nothing would be learned")
    return mask


def to_weights(mask: Image.Image, latents: Tensor, floor: float) -> Tensor:
    """Loss weights (1, 1, H/f, W/f) of mean 1, `floor` times as much outside as inside."""
    height, width = latents.shape[-2:]
    small = torch.from_numpy(np.asarray(mask.resize((width, height), Image.Resampling.BOX), np.float32).copy()) / 255
    weights = floor + (1 - floor) * small
    if not weights.any():  # the mask lies outside this crop
        weights = torch.ones_like(weights)
    return (weights / weights.mean())[None, None].to(latents.device)


def find_pictures(
    folder: Path, names: dict[str, str], token: str, class_name: str, config: TrainConfig
) -> list[Picture]:
    """The pictures of a tune: its photos, and their face crops where the configuration asks for them.

    folder: `outputs/tunes/ID`. names: file name of each photo -> what the user calls it.
    """
    photos = [folder / "images" / file for file in names]
    captions = captions_for(photos, token, class_name)
    better = [folder / "dataset" / "restored" / f"{photo.stem}.jpg" for photo in photos]
    pictures = [
        Picture(restored if restored.exists() else photo, caption, names[photo.name])
        for photo, restored, caption in zip(photos, better, captions, strict=True)
    ]
    if config.face_set:
        faces = folder / "dataset" / "faces"
        pictures += [
            Picture(crop, f"closeup {picture.caption}".strip(), picture.name, "face")
            for picture in pictures
            for crop in sorted(faces.glob(f"{picture.path.stem}{FACE_SUFFIX}.*"))
        ]
    return pictures


def captions_for(photos: list[Path], token: str, class_name: str) -> list[str]:
    """The text of `NAME.txt` beside a photo, else what the hosted service writes: `A photo of TOKEN CLASS`."""
    texts = [photo.with_suffix(".txt") for photo in photos]
    subject = default_caption(token, class_name)
    return [text.read_text("utf-8").strip() if text.exists() else subject for text in texts]


def derive(seed: int, step: int, purpose: str) -> int:
    """A seed of its own for each use of randomness in each step, below 2^63."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def in_turn(seed: int, samples: list[Sample], start: int, count: int) -> list[Sample]:
    """`count` places of an endless list that goes through all samples again and again, shuffled anew each time."""
    shapes = tuple(sample.shape for sample in samples)
    rows = range(start, start + count)
    return [samples[shuffled(seed, shapes, row // len(samples))[row % len(samples)]] for row in rows]


@lru_cache(maxsize=8)
def shuffled(seed: int, shapes: tuple[tuple[int, int], ...], epoch: int) -> list[int]:
    """All places in a random order in which samples of one shape stand together: they are cheaper side by side."""
    generator = torch.Generator().manual_seed(derive(seed, epoch, "order"))
    places: list[int] = torch.randperm(len(shapes), generator=generator).tolist()
    rank: dict[tuple[int, int], int] = {}
    for place in places:  # the first of its shape decides where they stand
        rank.setdefault(shapes[place], len(rank))
    return sorted(places, key=lambda place: rank[shapes[place]])
