"""States to resume from: written atomically, checked, and used for rollback when a run diverges."""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path

import torch
from pydantic import BaseModel, Field, TypeAdapter
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from trainer.config.train_config import TrainConfig
from trainer.contract.disk import check_room
from trainer.files import discard, read_for_show, read_json, steps_in, whole_folder

STATES_KEPT = 2
SCHEMA = 2
# Hyper-parameters that are newer than this schema: a state without them had these values.
ADDED_LATER = {
    "optimizer": "adamw", "trained_dtype": "float32", "on_top": "continue", "tokens": 0, "token_lr": 0.0,
    "token_share": 0.0,
}  # fmt: skip
Parameters = dict[str, torch.Tensor]


class Manifest(BaseModel):
    """What `manifest.json` says of a state."""

    schema_: int = Field(alias="schema")
    step: int
    sha256: str
    halvings: int = Field(0, ge=0)
    config: dict[str, object]


MANIFEST = TypeAdapter(Manifest)


class Diverged(Exception):
    """The loss, or a weight, is no longer a finite number. `step` is the first step that shows it, from 0."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


def begin(states: Path, optimizer: torch.optim.Optimizer, params: Parameters, config: TrainConfig) -> tuple[int, int]:
    """Load the newest whole state; without one, save the state before the first step.

    Returns the finished steps, and how often the learning rate was halved.
    """
    if found := resume(states, optimizer, params, config):
        return found
    save(states, 0, optimizer, params, config)
    return 0, 0


def go_back(states: Path, optimizer: torch.optim.Optimizer, params: Parameters, config: TrainConfig) -> int:
    """Load the newest state; returns its step. Raises RuntimeError if no state can be read."""
    optimizer.state.clear()
    found = resume(states, optimizer, params, config)
    if found is None:
        raise RuntimeError(f"no state in {states} can be read: the run cannot go back. Resume the tune to start again")
    return found[0]


def save(
    states: Path,
    step: int,
    optimizer: torch.optim.Optimizer,
    params: Parameters,
    config: TrainConfig,
    halvings: int = 0,
) -> None:
    """Write `states/step-000123/`: weights and moments, then a manifest with their digest. Keeps the newest two.

    Raises Diverged for a value that is not finite, DiskProblem where there is no room for it.
    """
    tensors: dict[str, Tensor] = {}
    for name, param in params.items():
        tensors[f"weight/{name}"] = param.detach().cpu().contiguous()
        for key, value in optimizer.state[param].items():
            tensors[f"{key}/{name}"] = value.detach().cpu().contiguous()
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise Diverged(f"a weight was not a finite number after step {step}", step - 1)
    check_room(states, sum(tensor.nbytes for tensor in tensors.values()), f"the state of step {step}")
    with whole_folder(states / f"step-{step:06d}") as folder:
        file = folder / "state.safetensors"
        save_file(tensors, file)
        facts = {"schema": SCHEMA, "step": step, "sha256": sha256(file), "halvings": halvings}
        facts |= {"torch": torch.__version__, "config": config.model_dump(mode="json")}
        (folder / "manifest.json").write_text(json.dumps(facts))
    # States beyond this step are from before a rollback; if kept, they would displace the valid ones.
    whole = [folder for folder in steps_in(states) if folder.name <= f"step-{step:06d}"]
    for folder in steps_in(states):
        if folder not in whole[-STATES_KEPT:]:
            discard(folder)


def resume(
    states: Path, optimizer: torch.optim.Optimizer, params: Parameters, config: TrainConfig
) -> tuple[int, int] | None:
    """Load the newest state that is complete and has this configuration.

    Returns its step and the number of halvings of the learning rate; None where there is no such state.
    """
    wanted = config.model_dump(mode="json")
    for folder in reversed(steps_in(states)):
        file, facts = folder / "state.safetensors", manifest(folder)
        if facts is None or (facts.schema_, f"step-{facts.step:06d}") != (SCHEMA, folder.name):
            continue
        if ADDED_LATER | facts.config != wanted or not file.is_file() or facts.sha256 != sha256(file):
            continue
        with safe_open(file, "pt") as tensors, torch.no_grad():
            moments: dict[str, list[str]] = {}
            for key, _, name in (key.partition("/") for key in tensors.keys()):  # noqa: SIM118
                if key != "weight":
                    moments.setdefault(name, []).append(key)
            for name, param in params.items():
                param.copy_(tensors.get_tensor(f"weight/{name}"))
                # None where a layer never had a gradient, such as the last layer of SDXL's first encoder, which is
                # not used.
                optimizer.state[param] = {
                    key: tensors.get_tensor(f"{key}/{name}").to(param.device) for key in moments.get(name, [])
                }
        return facts.step, facts.halvings
    return None


def manifest(folder: Path) -> Manifest | None:
    """The manifest of a state; None: it cannot be read."""
    return read_for_show(folder / "manifest.json", partial(read_json, content=MANIFEST))


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
