"""The training set: pictures and captions, encoded once and kept on the device.

It is built from a tune's folder:

    images/NAME.jpg|png          the photos; NAME.txt next to one is its caption
    dataset/restored/NAME.jpg    the photo with its faces restored, which is trained in its place
    dataset/faces/NAME-face.*    face crops, a second set (presets that ask for a face set)
    dataset/masks/face/NAME.png  which pixels count in the loss, white on black, of the picture's size; masks/face
    dataset/masks/subject/...    also has those of the face crops
    dataset/seen/                written here: every picture as it is trained, and seen.json with the captions
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from trainer.branches.protocol import Branch
from trainer.config.kinds import default_caption
from trainer.config.train_config import TrainConfig
from trainer.device import placed
from trainer.files import Unreadable, read_text, whole_folder
from trainer.photos.geometry import FACE_SUFFIX
from trainer.training.seeds import derive
from trainer.training.views import Picture, Sample, View, encode_and_show, mask_file

Image.MAX_IMAGE_PIXELS = None  # the intake has checked the size


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
    """All training data, encoded.

    captions: the distinct ones, the empty one last. cond: their encodings, one entry (1, ...) each; None while text
    encoders or tokens are trained: then captions are encoded in each step.
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
        """The pictures of a step, by the user's names."""
        return sorted({sample.picture.name for sample, _ in self._drawn(step)})

    def batches(self, branch: Branch, step: int) -> Iterator[MicroBatch]:
        """The samples of one step, grouped by shape, at most `micro_batch` at a time.

        All random numbers depend only on the seed, the step and the sample's place, not on other samples: a resumed
        run draws the same numbers, and a smaller micro-batch sums to the same step.
        """
        config = self._config
        drawn = self._drawn(step)
        rng = torch.Generator().manual_seed(derive(config.seed, step, "caption dropout"))
        dropped = (torch.rand(len(drawn), generator=rng) < config.caption_dropout).tolist()
        view_index = torch.randint(2**31, (len(drawn),), generator=rng).tolist()
        mask = self._mask(step)
        if step < config.text_steps:
            self.cond = None  # also after a rollback to such a step
        elif self.cond is None:  # from here on the encodings are constant
            with torch.no_grad():
                self.cond = [branch.encode_prompts([caption]) for caption in self.captions]
        groups: dict[tuple[tuple[int, int], float], list[int]] = {}
        for place, (sample, share) in enumerate(drawn):
            groups.setdefault((sample.shape, share), []).append(place)
        size = config.micro_batch
        parts = [(share, of[at : at + size]) for (_, share), of in groups.items() for at in range(0, len(of), size)]
        for number, (share, places) in enumerate(parts, 1):
            views = [drawn[place][0].views[view_index[place] % len(drawn[place][0].views)] for place in places]
            captions = ["" if dropped[place] else drawn[place][0].picture.caption for place in places]
            draws = [self._draw_noise(branch, view, step, place) for view, place in zip(views, places, strict=True)]
            latents, noise, timesteps = (torch.cat(values) for values in zip(*draws, strict=True))
            cond, masks = self._conditions(branch, captions, views), self._masks(views, mask)
            yield MicroBatch(latents, cond, noise, timesteps, masks, share, number == len(parts))

    def _drawn(self, step: int) -> list[tuple[Sample, float]]:
        """The samples of a step, each with its share of the loss."""
        batch, seed = self._config.batch, self._config.seed
        drawn = [(row, 1 / batch) for row in epoch_order(seed, self.samples, step * batch, batch)]
        if self.prior:
            share = self._config.prior_weight / batch
            drawn += [
                (row, share) for row in epoch_order(derive(seed, 0, "class pictures"), self.prior, step * batch, batch)
            ]
        return drawn

    def _mask(self, step: int) -> str:
        """The mask of a step: in a share `mask_widen` of the steps, the whole subject's in place of the face's."""
        widen = self._config.mask_widen
        widened = math.floor((step + 1) * widen) > math.floor(step * widen)
        return "subject" if widened else self._config.mask

    def _draw_noise(self, branch: Branch, view: View, step: int, place: int) -> tuple[Tensor, Tensor, Tensor]:
        """The random draw for one sample: latents and noise (1, C, H/f, W/f), timesteps (1,)."""
        seed = derive(self._config.seed, step, f"noise {place}")
        generator = torch.Generator(view.mean.device).manual_seed(seed)
        fresh = torch.randn(view.mean.shape, generator=generator, device=view.mean.device)
        latents = view.mean + view.std * fresh
        return (latents, *branch.draw(latents, generator))

    def _conditions(self, branch: Branch, captions: list[str], views: list[View]) -> dict[str, Tensor]:
        if self.cond is None:
            distinct = list(dict.fromkeys(captions))  # usually one: each is encoded once
            rows = [distinct.index(caption) for caption in captions]
            cond = {key: value[rows] for key, value in branch.encode_prompts(distinct).items()}
        else:
            encoded = [self.cond[self.captions.index(caption)] for caption in captions]
            cond = {key: join([one[key] for one in encoded]) for key in encoded[0]}
        return cond | {key: torch.cat([view.size[key] for view in views]) for key in views[0].size}

    @staticmethod
    def _masks(views: list[View], mask: str) -> Tensor | None:
        """In a view without this mask, all pixels count."""
        if not any(mask in view.masks for view in views):
            return None
        return torch.cat([view.masks.get(mask, torch.ones_like(view.mean[:, :1])) for view in views])


def join(rows: Sequence[Tensor]) -> Tensor:
    """Concatenate encoded texts: several (B, ...) -> one.

    Texts of different length, (B, L, ...), are padded at the end with zeros.
    """
    longest = max((row.shape[1] for row in rows if row.dim() > 1), default=0)
    short = [longest - row.shape[1] if row.dim() > 1 else 0 for row in rows]
    if not any(short):
        return torch.cat(list(rows))
    return torch.cat([pad(row, (0, 0) * (row.dim() - 2) + (0, less)) for row, less in zip(rows, short, strict=True)])


def build(
    branch: Branch,
    pictures: Sequence[Picture],
    prompts: Sequence[str],
    config: TrainConfig,
    folder: Path,
    keep: Collection[str] = (),
) -> tuple[Dataset, list[dict[str, Tensor]]]:
    """Encode each picture and each caption once, and write the training views to `folder/seen`.

    folder: the tune's `dataset/`. prompts: texts of previews; their encodings are returned with the set. Encoders are
    on the device only while they encode; then all text encoders except those in `keep` are freed.
    """
    encoders = list(branch.text_encoders.values())
    captions = [*dict.fromkeys(picture.caption for picture in pictures if picture.caption), ""]
    with torch.no_grad(), placed(branch.device, *encoders):
        cond = [branch.encode_prompts([caption]) for caption in captions]
        encoded_prompts = [branch.encode_prompts([prompt]) for prompt in prompts]
    branch.keep_text_encoders(keep)
    with whole_folder(folder / "seen") as partial, placed(branch.device, branch.vae):
        samples: list[Sample] = []
        shown: list[dict[str, object]] = []
        for picture in pictures:
            of_picture, facts = encode_and_show(branch, picture, config, folder, partial)
            samples += of_picture
            shown += facts
        (partial / "seen.json").write_text(json.dumps(shown, indent=1))
    return Dataset(samples, captions, None if config.text_steps else cond, config), encoded_prompts


def without_mask(pictures: Sequence[Picture], folder: Path, config: TrainConfig) -> list[str]:
    """Warnings for masks and face crops that the configuration needs and `dataset/` lacks."""
    wanted = {config.mask} | ({"subject"} if config.mask_widen else set())
    warnings = []
    for kind in sorted(wanted - {"none"}):
        names = sorted({picture.name for picture in pictures if not mask_file(folder, picture, kind).exists()})
        if names:
            warnings.append(f"no mask of the {kind} for {', '.join(names)}: the whole picture is trained")
    if config.face_set and not any(picture.kind == "face" for picture in pictures):
        warnings.append("no face crops: only the photos themselves are trained")
    return warnings


def find_pictures(
    folder: Path, names: dict[str, str], token: str, class_name: str, config: TrainConfig
) -> list[Picture]:
    """The pictures of a tune: its photos, and face crops where the configuration asks for them.

    folder: `outputs/tunes/ID`. names: file name of each photo -> the user's name for it.
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
    """The text of `NAME.txt` next to a photo; without it, or if it is empty, the default: `A photo of TOKEN CLASS`.

    Raises Unreadable for a text that is broken: another caption would train another model.
    """
    texts = [photo.with_suffix(".txt") for photo in photos]
    subject = default_caption(token, class_name)
    return [_caption(text, subject) for text in texts]


def _caption(file: Path, otherwise: str) -> str:
    try:
        return read_text(file).strip() or otherwise
    except FileNotFoundError:
        return otherwise
    except Unreadable as problem:
        help_ = f"Correct it, or delete it: then the caption is {otherwise!r}; and resume the tune"
        raise Unreadable(f"{problem}. {help_}") from None


def epoch_order(seed: int, samples: list[Sample], start: int, count: int) -> list[Sample]:
    """`count` samples, from place `start`, of an endless list of epochs; each epoch has all samples, shuffled."""
    shapes = tuple(sample.shape for sample in samples)
    rows = range(start, start + count)
    return [samples[shuffled(seed, shapes, row // len(samples))[row % len(samples)]] for row in rows]


@lru_cache(maxsize=8)
def shuffled(seed: int, shapes: tuple[tuple[int, int], ...], epoch: int) -> list[int]:
    """All places in a random order that keeps samples of one shape together, which makes batches cheaper."""
    generator = torch.Generator().manual_seed(derive(seed, epoch, "order"))
    places: list[int] = torch.randperm(len(shapes), generator=generator).tolist()
    rank: dict[tuple[int, int], int] = {}
    for place in places:  # the first sample of a shape decides the position of all
        rank.setdefault(shapes[place], len(rank))
    return sorted(places, key=lambda place: rank[shapes[place]])
