"""Exports: a trained model in another format, made at the first `GET /tunes/ID/model?format=`."""

from __future__ import annotations

import zipfile
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from trainer.branches.protocol import Branch, load_branch
from trainer.config import train_config
from trainer.contract.disk import check_room
from trainer.contract.rows import TuneRow
from trainer.files import whole_folder
from trainer.library.bases import Base
from trainer.methods import checkpoint, lora, new_tokens
from trainer.names import CHECKPOINT_FILE, CHECKPOINT_FORMAT
from trainer.settings import Settings

DIFFUSERS_ZIP = "diffusers.zip"


def export_tune(tune: TuneRow, base: Base, format_: str, settings: Settings) -> str:
    """Write `outputs/tunes/ID/exports/FORMAT/`. Returns the file for download, relative to `exports/`.

    tune: the row of a trained tune. base: the tune as a base. This uses RAM, not the card.
    """
    folder = settings.outputs / "tunes" / str(tune["id"])
    dtype = getattr(torch, train_config.parse_args(tune["args"])["save_dtype"])
    branch = load_branch(base, torch.device("cpu"), settings.outputs / "cache", dtype)
    if base.model is not None:
        lora.apply(branch, base.model, 1.0)
        new_tokens.remove(branch.pipeline)  # a checkpoint cannot hold them; they stay in their own file
        lora.merge(branch.pipeline)
    parts = [part for part in branch.pipeline.components.values() if isinstance(part, nn.Module)]
    size = dtype.itemsize * sum(weight.numel() for part in parts for weight in part.parameters())
    copies = 1 if format_ == CHECKPOINT_FORMAT else 2  # the folder, and the file that it is packed into
    check_room(folder, copies * size, f"the model as {format_}")
    with whole_folder(folder / "exports" / format_) as partial:
        if format_ == CHECKPOINT_FORMAT:
            file = CHECKPOINT_FILE
            checkpoint.write(branch, partial / file, dtype, facts_of(folder / "model" / tune["files"][0], branch))
        else:
            file = DIFFUSERS_ZIP
            write_diffusers(branch, partial, dtype)
    return f"{format_}/{file}"


def facts_of(file: Path, branch: Branch) -> dict[str, str]:
    """The metadata of a saved LoRA, for a whole model."""
    with safe_open(file, "pt") as tensors:
        facts = dict(tensors.metadata() or {})
    kept = {key: value for key, value in facts.items() if not key.startswith("ss_network_")}
    return kept | {"modelspec.architecture": branch.metadata["modelspec.architecture"]}


def write_diffusers(branch: Branch, folder: Path, dtype: torch.dtype) -> None:
    """Write the pipeline as a zipped diffusers folder, which a browser can download."""
    for part in branch.pipeline.components.values():
        if isinstance(part, nn.Module):
            part.to(dtype)
    work = folder / "diffusers"
    branch.pipeline.save_pretrained(work)
    with zipfile.ZipFile(folder / DIFFUSERS_ZIP, "w", zipfile.ZIP_STORED) as packed:  # weights do not compress
        for path in sorted(work.rglob("*")):
            packed.write(path, path.relative_to(work))
            if path.is_file():
                path.unlink()
