"""The story of one tune, top to bottom: photos -> captions -> load -> encode -> attach -> loop -> save -> check."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from trainer import dataset, loop, presets
from trainer.bases import Base
from trainer.branches import load_branch
from trainer.files import whole_folder
from trainer.loop import Report
from trainer.methods import get_method
from trainer.settings import Settings


class BadArtefact(Exception):
    """What was saved is not what a trained model looks like."""


def train_tune(
    tune: dict[str, Any], base: Base, settings: Settings, device: torch.device, report: Report
) -> list[str] | None:
    """Train a tune whose photos lie in `outputs/tunes/ID/images`, and write `model/`.

    tune: its row in the store. Returns the names of the files to keep, the most widely read one first; None when the
    report said to stop: the state to go on from is on disk then. Starting and resuming are the same call.
    """
    folder = settings.outputs / "tunes" / str(tune["id"])
    config = presets.TrainConfig(**presets.parse_args(tune["args"]))
    (folder / "config.json").write_text(json.dumps({"base": base.title, **config.model_dump()}, indent=1))
    photos = [folder / "images" / photo["file"] for photo in tune["photos"]]
    captions = dataset.captions_for(photos, tune["token"], tune["name"])

    report.stage("loading")
    branch = load_branch(base, device, settings.outputs / "cache")
    method = get_method(tune["method"])

    report.stage("encoding")
    with torch.random.fork_rng():
        torch.manual_seed(dataset.derive(config.seed, 0, "adapters"))
        groups = method.attach(branch, config)
    data = dataset.build(branch, photos, captions, config)

    report.stage("training")
    if not loop.train(branch, groups, data, config, report, folder / "state"):
        return None

    report.stage("saving")
    metadata = {
        "modelspec.title": tune["title"],
        "modelspec.trigger_phrase": f"{tune['token']} {tune['name']}",
        "tunebooth.base": base.title,
        "tunebooth.args": presets.as_args(config),
    }
    with whole_folder(folder / "model") as model:
        files = method.save(branch, model, config, metadata)
        for file in files:
            check_file(model / file)
    return files


def check_file(file: Path) -> None:
    """Raises BadArtefact unless every tensor of a saved file is finite and some are not zero."""
    with safe_open(file, "pt") as tensors:
        values = [tensors.get_tensor(name) for name in tensors.keys()]  # noqa: SIM118
    if not values or not all(torch.isfinite(value).all() for value in values):
        raise BadArtefact(f"{file.name} holds values that are not finite numbers")
    if not any(value.any() for value in values if value.dim() > 1):
        raise BadArtefact(f"{file.name} holds nothing but zeros")


def pick_device(wanted: str) -> torch.device:
    """`auto`: the first CUDA card, else Apple's GPU, else the CPU. Raises RuntimeError for one that is not there."""
    if wanted != "auto":
        device = torch.device(wanted)
        torch.empty(1, device=device)  # fails now and in words, not in the middle of the first tune
        return device
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def leave_a_core_free() -> None:
    """Torch's threads take all cores but one, which is the page's and the API's.

    They spin while they wait for each other: with another busy process (a browser) beside as many threads as cores, a
    step of branch fast took 600 ms instead of 80 ms on two cores; with one thread it takes 80 ms either way.
    """
    torch.set_num_threads(max(1, torch.get_num_threads() - 1))
