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
from trainer.files import read_text, whole_folder
from trainer.photos.geometry import FACE_SUFFIX
from trainer.training.seeds import derive
from trainer.training.views import Picture, Sample, View, encode_and_show, mask_file

Image.MAX_IMAGE_PIXELS = None  # the intake has checked that, by the setting


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
    that is trained as well, and captions are encoded again in each step.
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
        rng = torch.Generator().manual_seed(derive(config.seed, step, "caption dropout"))
        dropped = (torch.rand(len(drawn), generator=rng) < config.caption_dropout).tolist()
        view_index = torch.randint(2**31, (len(drawn),), generator=rng).tolist()
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
            views = [drawn[place][0].views[view_index[place] % len(drawn[place][0].views)] for place in places]
            captions = ["" if dropped[place] else drawn[place][0].picture.caption for place in places]
            chances = [self._chance(branch, view, step, place) for view, place in zip(views, places, strict=True)]
            latents, noise, timesteps = (torch.cat(values) for values in zip(*chances, strict=True))
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
            encoded = [self.cond[self.captions.index(caption)] for caption in captions]
            cond = {key: join([one[key] for one in encoded]) for key in encoded[0]}
        return cond | {key: torch.cat([view.size[key] for view in views]) for key in views[0].size}

    @staticmethod
    def _masks(views: list[View], mask: str) -> Tensor | None:
        """A view without this mask counts as a whole."""
        if not any(mask in view.masks for view in views):
            return None
        return torch.cat([view.masks.get(mask, torch.ones_like(view.mean[:, :1])) for view in views])


def join(rows: Sequence[Tensor]) -> Tensor:
    """Put encoded texts together: several (B, ...) -> one.

    Where texts differ in length, (B, L, ...), they are padded with zeros at the end to the longest.
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
    """Encode each picture and each caption once, and write the pictures as they are trained to `folder/seen`.

    folder: the tune's `dataset/`. prompts: texts that will be rendered while training; what they are encoded to is
    returned beside the set. Encoders are on the device only while they encode; afterwards the text encoders are
    dropped, but for those to `keep`.
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
    """What the configuration asks for and `dataset/` does not have, as warnings."""
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
    """The text of `NAME.txt` beside a photo, else what the hosted service writes: `A photo of TOKEN CLASS`.

    Raises Unreadable for a text that is broken: another caption would train another model.
    """
    texts = [photo.with_suffix(".txt") for photo in photos]
    subject = default_caption(token, class_name)
    return [_caption(text, subject) for text in texts]


def _caption(file: Path, otherwise: str) -> str:
    try:
        return read_text(file).strip()
    except FileNotFoundError:
        return otherwise


def epoch_order(seed: int, samples: list[Sample], start: int, count: int) -> list[Sample]:
    """`count` places of an endless list that goes through all samples again and again, shuffled again each time."""
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
