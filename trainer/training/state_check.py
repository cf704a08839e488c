"""Whether a state is whole and of this run; if not, why, in words."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, Field, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open

from trainer.config.train_config import TrainConfig
from trainer.files import Unreadable, read_json, unreadable
from trainer.training.optimizers import moment_shapes
from trainer.training.run_inputs import RunInputs, other_base

SCHEMA = 2
MANIFEST_FILE, STATE_FILE = "manifest.json", "state.safetensors"
LISTED = 3  # differences in a message
# Hyper-parameters that are newer than this schema: a state without them had these values.
ADDED_LATER = {
    "optimizer": "adamw", "trained_dtype": "float32", "on_top": "continue", "tokens": 0, "token_lr": 0.0,
    "token_share": 0.0,
}  # fmt: skip
# Hyper-parameters that decide how a run computes and saves, and not what it learns.
MAY_CHANGE = ("micro_batch", "gradient_checkpointing", "save_every", "save_dtype")
Parameters = dict[str, torch.Tensor]


class Manifest(BaseModel):
    """What `manifest.json` says of a state. torch: the version; states of older versions have no `inputs`."""

    schema_: int = Field(alias="schema")
    step: int
    sha256: str
    halvings: int = Field(0, ge=0)
    config: dict[str, object]
    torch: object = None
    inputs: object = None

    def inputs_then(self) -> RunInputs:
        """What the run was trained with, as far as it is known."""
        try:
            return RunInputs.model_validate(self.inputs)
        except ValidationError:
            return RunInputs(software=f"torch {self.torch}" if isinstance(self.torch, str) else "")


MANIFEST = TypeAdapter(Manifest)


class NotUsable(Exception):
    """Why a state is not used."""


def check(
    folder: Path, optimizer: torch.optim.Optimizer, params: Parameters, config: TrainConfig, inputs: RunInputs
) -> Manifest:
    """The manifest of a state that is whole and of this run.

    Raises NotUsable for another state, Unreadable where this program is not allowed to read it.
    """
    file, facts = folder / STATE_FILE, read_manifest(folder / MANIFEST_FILE)
    if facts.schema_ != SCHEMA:
        raise NotUsable("another version of Tunebooth has written it")
    if f"step-{facts.step:06d}" != folder.name:
        raise NotUsable(f"it says that it is of step {facts.step}")
    if why := other_base(facts.inputs_then(), inputs):
        raise NotUsable(why)
    if different := [text for word, text in settings_then(facts, config).items() if word not in MAY_CHANGE]:
        more = f" and {len(different) - LISTED} more" if len(different) > LISTED else ""
        raise NotUsable(f"it was trained with other settings, {', '.join(different[:LISTED])}{more}")
    try:
        if not file.is_file():
            raise NotUsable(f"{file.name} is missing")
        if sha256(file) != facts.sha256:
            raise NotUsable(f"{file.name} is damaged")
        check_tensors(file, optimizer, params)
    except PermissionError as problem:
        raise forbidden(file, problem) from None
    except SafetensorError:
        raise NotUsable(f"{file.name} is damaged") from None
    return facts


def read_manifest(file: Path) -> Manifest:
    """Raises as `check`."""
    try:
        with file.open("rb"):
            pass
        return read_json(file, MANIFEST)
    except PermissionError as problem:
        raise forbidden(file, problem) from None
    except FileNotFoundError:
        raise NotUsable(f"{file.name} is missing") from None
    except (OSError, Unreadable):
        raise NotUsable(f"{file.name} is damaged") from None


def forbidden(file: Path, problem: PermissionError) -> Unreadable:
    why = unreadable(file, problem)
    return Unreadable(f"{why} (in state/{file.parent.name}). Allow Tunebooth to read it, and resume")


def settings_then(facts: Manifest, config: TrainConfig) -> dict[str, str]:
    """Each hyper-parameter that had another value when the state was saved, with both values."""
    then: dict[str, Any] = ADDED_LATER | facts.config
    now = config.model_dump(mode="json")
    absent = "not set"
    words = [word for word in {**now, **then} if then.get(word, absent) != now.get(word, absent)]
    return {word: f"{word} was {then.get(word, absent)} and is {now.get(word, absent)}" for word in words}


def other_settings(facts: Manifest, config: TrainConfig) -> list[str]:
    """Hyper-parameters that changed and do not keep a run from going on."""
    return [text for word, text in settings_then(facts, config).items() if word in MAY_CHANGE]


def check_tensors(file: Path, optimizer: torch.optim.Optimizer, params: Parameters) -> None:
    """Raises NotUsable unless a state has the weights of this run and the moments of its optimizer."""
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    with safe_open(file, "pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118
            kind, _, name = key.partition("/")
            found.setdefault(name, {})[kind] = tuple(tensors.get_slice(key).get_shape())
    if found.keys() != params.keys():
        raise NotUsable("it has the weights of other layers than this run trains")
    for name, param in params.items():
        shape = found[name].pop("weight", None)
        if shape != tuple(param.shape):
            raise NotUsable(f"its weights have other shapes than those of this run ({name})")
        # Nothing where a layer never had a gradient.
        if found[name] and found[name] != moment_shapes(optimizer, param):
            raise NotUsable("its optimizer part does not fit the optimizer of this run")


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
