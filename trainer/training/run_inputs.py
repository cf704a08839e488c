"""What a run is trained with, as its states keep it; and what has changed since a state was saved, in words."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from pydantic import BaseModel
from torch import nn

from trainer.branches.protocol import Branch
from trainer.training.views import MASKS, Picture, mask_file

NUMBERS = 16  # of each tensor: another model differs in nearly all of its tensors
LISTED = 3  # names in a message


class TrainedPicture(BaseModel):
    """A picture of the training set. sha256: of its file. masks: kind -> sha256 of the file."""

    name: str
    sha256: str
    caption: str
    masks: dict[str, str] = {}


class RunInputs(BaseModel):
    """What a run is trained with; empty values are not known, as in the states of older versions.

    tune: its number. base: digest of the base's weights. earlier: digest of the LoRA on it. pictures: by kind and file
    name. class_pictures: digest of all. software: torch's version. device: what computes, with its number format.
    """

    tune: int | None = None
    base: str = ""
    earlier: str | None = None
    pictures: dict[str, TrainedPicture] = {}
    class_pictures: str | None = None
    software: str = ""
    device: str = ""


def inputs_of(
    tune_id: int, base: str, earlier: Path | None, branch: Branch, pictures: Sequence[Picture], dataset: Path
) -> RunInputs:
    """base: `weights_digest`, from before anything was put on the base. dataset: the tune's `dataset/`."""
    drawn = [digest_of(picture.path) for picture in pictures if picture.kind == "class"]
    return RunInputs(
        tune=tune_id,
        base=base,
        earlier=digest_of_model(earlier) if earlier else "",
        pictures={
            f"{picture.kind} {picture.path.stem}": trained_picture(picture, dataset)
            for picture in pictures
            if picture.kind != "class"
        },
        class_pictures=hashlib.sha256(" ".join(drawn).encode()).hexdigest() if drawn else "",
        software=f"torch {torch.__version__}",
        device=device_name(branch),
    )


def trained_picture(picture: Picture, dataset: Path) -> TrainedPicture:
    files = {kind: mask_file(dataset, picture, kind) for kind in MASKS}
    masks = {kind: digest_of(file) for kind, file in files.items() if file.is_file()}
    name = f"the closeup of {picture.name}" if picture.kind == "face" else picture.name
    return TrainedPicture(name=name, sha256=digest_of(picture.path), caption=picture.caption, masks=masks)


def device_name(branch: Branch) -> str:
    kind = branch.device.type
    name = torch.cuda.get_device_name(branch.device) if kind == "cuda" else kind
    return f"{name} in {str(branch.dtype).removeprefix('torch.')}"


def weights_digest(branch: Branch) -> str:
    """A digest of the weights of a base, from a few numbers of each tensor.

    They are compared as bfloat16: the digest depends neither on the format that they are loaded in, nor on the layout
    of their files.
    """
    digest = hashlib.sha256()
    for name, part in sorted(branch.pipeline.components.items()):
        if not isinstance(part, nn.Module):
            continue
        for key, weight in sorted(part.named_parameters()):
            values = weight.detach().reshape(-1)
            chosen = values[:: max(1, len(values) // NUMBERS)][:NUMBERS].to("cpu", torch.bfloat16)
            digest.update(f"{name}.{key} {tuple(weight.shape)}".encode())
            digest.update(chosen.contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def digest_of_model(model: Path) -> str:
    """The digest of a LoRA: of a file, or of all files in the `model/` of a tune."""
    files = sorted(model.glob("*.safetensors")) if model.is_dir() else [model]
    return hashlib.sha256(" ".join(map(digest_of, files)).encode()).hexdigest()


def digest_of(file: Path) -> str:
    """The sha256 of a file; "" for what cannot be read, which another part of the run reports."""
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError:
        return ""


def other_base(before: RunInputs, now: RunInputs) -> str | None:
    """Why weights that were trained with other inputs do not belong to this run; None: they do."""
    if before.tune is not None and now.tune is not None and before.tune != now.tune:
        return f"it is of tune {before.tune}"
    if before.base and now.base and before.base != now.base:
        return "the base has other weights than then"
    if before.earlier is not None and now.earlier is not None and before.earlier != now.earlier:
        return "the LoRA that the run starts from is another one than then"
    return None


def changes(before: RunInputs, now: RunInputs) -> list[str]:
    """What else differs, in words: training can go on all the same."""
    found = picture_changes(before.pictures, now.pictures) if before.pictures else []
    if before.class_pictures is not None and before.class_pictures != (now.class_pictures or ""):
        found.append("the class pictures were changed")
    for then, today in ((before.software, now.software), (before.device, now.device)):
        if then and today and then != today:
            found.append(f"{then} then, {today} now")
    return found


def picture_changes(before: Mapping[str, TrainedPicture], now: Mapping[str, TrainedPicture]) -> list[str]:
    both = [(before[key], now[key]) for key in before if key in now]
    lost, new = ([one.name for key, one in mine.items() if key not in other] for mine, other in (
        (before, now), (now, before)
    ))  # fmt: skip
    changed = [one.name for then, one in both if then.sha256 != one.sha256]
    found = [
        f"{listing(names)} {state[len(names) > 1]}"
        for names, state in (
            (lost, ("is no longer trained", "are no longer trained")),
            (new, ("is new", "are new")),
            (changed, ("was changed", "were changed")),
        )
        if names
    ]
    others = {
        "caption": [one.name for then, one in both if then.caption != one.caption],
        "mask": [one.name for then, one in both if then.masks != one.masks],
    }
    return found + [f"the {what} of {listing(names)} was changed" for what, names in others.items() if names]


def listing(names: Sequence[str]) -> str:
    """`a.jpg, b.jpg, c.jpg and 4 more`"""
    rest = len(names) - LISTED
    if rest > 0:
        return f"{', '.join(names[:LISTED])} and {rest} more"
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
