"""Pictures of the class, drawn by the base, for prior preservation (Ruiz et al. 2022, arXiv 2208.12242)."""

from __future__ import annotations

from pathlib import Path

import torch

from trainer.branches.loading import autocast
from trainer.branches.protocol import Branch
from trainer.config.branch_file import RenderConfig
from trainer.config.train_config import TrainConfig
from trainer.contract.disk import check_room
from trainer.contract.report import Report
from trainer.device import placed
from trainer.files import Unreadable
from trainer.library.bases import Base
from trainer.library.header import read_header
from trainer.library.prediction import Prediction, read_prediction
from trainer.library.versions import changed_at, content_digest
from trainer.library.weight_format import scales_of
from trainer.photos.picture_file import open_picture
from trainer.training.views import Picture, write_picture

PNG_BYTES_PER_PIXEL = 2  # of photos


def class_pictures(
    branch: Branch, base: Base, name: str, config: TrainConfig, defaults: RenderConfig, cache: Path, report: Report
) -> list[Picture] | None:
    """Draw the class pictures of a run, or find those of an earlier one.

    They are kept for later tunes on a base with the same content, and for the same class and resolution. base: with a
    local path. None: the report asked to stop.
    """
    caption, side = f"a photo of {name}", config.resolution[0]
    folder = folder_of(base, f"{name.lower().replace(' ', '-')}-{side}", cache / "class")
    files = [folder / f"{number:04d}.png" for number in range(config.prior_images)]
    missing = [file for file in files if not is_picture(file, side)]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        check_room(folder, len(missing) * side**2 * PNG_BYTES_PER_PIXEL, "class pictures")
        everything = [branch.denoiser, branch.vae, *branch.text_encoders.values()]
        with torch.no_grad(), placed(branch.device, *everything), autocast(branch.device, branch.dtype):
            inputs = branch.prompt_inputs(*(branch.encode_prompts([text]) for text in (caption, "")))
            for number, file in enumerate(missing):
                if not report.step(number, len(missing)):
                    return None
                image = branch.pipeline(
                    **inputs,
                    width=side,
                    height=side,
                    num_inference_steps=defaults.steps,
                    guidance_scale=defaults.cfg_scale,
                    generator=torch.Generator().manual_seed(int(file.stem)),
                ).images[0]
                write_picture(image, file)
    return [Picture(file, caption, f"class picture {file.stem}", "class") for file in files]


def is_picture(file: Path, side: int) -> bool:
    """Whether a file is a whole square picture of this side."""
    try:
        return open_picture(file, "RGB").size == (side, side)
    except (FileNotFoundError, Unreadable):
        return False


def folder_of(base: Base, what: str, cache: Path) -> Path:
    """The folder of the class pictures of a base, named by the content of the files that drew them.

    An earlier version named it by the base's number: that folder is renamed, unless the base was changed after its
    pictures, or was read in another way by that version.
    """
    read = read_of(base)
    folder, earlier = cache / f"{content_digest(read)[:32]}-{what}", cache / f"{base.id}-{what}"
    if not folder.exists() and earlier.is_dir():
        drawn = min((file.stat().st_mtime for file in earlier.glob("*.png")), default=0.0)
        if changed_at(read) < drawn and not (base.path and read_otherwise_before(base.path)):
            earlier.rename(folder)
    return folder


def read_of(base: Base) -> list[Path]:
    """The files and folders that a base is read from: its weights, the LoRA on it, the parts that its file lacks."""
    paths = [path for path in (base.path, base.model) if path is not None]
    return paths + (read_of(base.rest) if base.rest else [])


def read_otherwise_before(path: Path) -> bool:
    """Whether earlier versions read a single file wrong: they saw neither markers of the prediction nor scales."""
    if not path.is_file():
        return False
    return bool(scales_of(read_header(path))) or read_prediction(path) != Prediction()
