"""States to resume from: written atomically, and used for rollback when a run diverges."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from trainer.config.train_config import TrainConfig
from trainer.contract.disk import check_room
from trainer.files import Unreadable, discard, steps_in, whole_folder
from trainer.training.run_inputs import RunInputs, changes
from trainer.training.state_check import (
    MANIFEST_FILE,
    SCHEMA,
    STATE_FILE,
    Manifest,
    NotUsable,
    Parameters,
    check,
    other_settings,
    sha256,
)

STATES_KEPT = 2
UNKNOWN = RunInputs()


class Diverged(Exception):
    """The loss, or a weight, is no longer a finite number. `step` is the first step that shows it, from 0."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


@dataclass(frozen=True)
class Begun:
    """Where a run begins. step: finished steps. halvings: of the learning rate. messages: for the user."""

    step: int
    halvings: int
    messages: list[str] = field(default_factory=list)


def begin(
    states: Path,
    optimizer: torch.optim.Optimizer,
    params: Parameters,
    config: TrainConfig,
    inputs: RunInputs = UNKNOWN,
    lost: bool = False,
) -> Begun:
    """Load the newest state that is whole and of this run; without one, save the state before the first step.

    lost: whether the run has had states. The messages say which states were not used and why, and what has changed
    since the state was saved. Raises Unreadable for states that this program is not allowed to read: they are not
    replaced.
    """
    if states.exists() and not states.is_dir():
        raise Unreadable(f"{states.name} in the tune's folder is a file, where a folder should be; move it away")
    found, unused = newest(states, optimizer, params, config, inputs)
    why = "; ".join(f"that of step {step}: {reason}" for step, reason in unused.items())
    if found is None:
        save(states, 0, optimizer, params, config, inputs=inputs)
        again = f"training begins again at step 0 of {config.steps}"
        if unused:
            return Begun(0, 0, [f"{again}, because no saved state can be used ({why})"])
        return Begun(0, 0, [f"{again}, because its saved states are missing"] if lost else [])
    folder, facts = found
    load(folder, optimizer, params)
    goes_on = f"training goes on at step {facts.step} of {config.steps}"
    messages = [f"{goes_on}, because a later saved state cannot be used ({why})"] if unused else []
    if different := changes(facts.inputs_then(), inputs) + other_settings(facts, config):
        listed = "; ".join(different)
        messages.append(f"{goes_on}, with changes ({listed}): the model will differ from that of an uninterrupted run")
    return Begun(facts.step, facts.halvings, messages)


def go_back(
    states: Path,
    optimizer: torch.optim.Optimizer,
    params: Parameters,
    config: TrainConfig,
    inputs: RunInputs = UNKNOWN,
) -> int:
    """Load the newest state; returns its step. Raises Unreadable if no state can be read."""
    optimizer.state.clear()
    found, unused = newest(states, optimizer, params, config, inputs)
    if found is None:
        why = "; ".join(unused.values()) or "there is none"
        raise Unreadable(f"the run cannot go back to a saved state ({why}). Resume the tune: it begins again at step 0")
    load(found[0], optimizer, params)
    return found[1].step


def save(
    states: Path,
    step: int,
    optimizer: torch.optim.Optimizer,
    params: Parameters,
    config: TrainConfig,
    halvings: int = 0,
    inputs: RunInputs = UNKNOWN,
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
        file = folder / STATE_FILE
        save_file(tensors, file)
        facts = {"schema": SCHEMA, "step": step, "sha256": sha256(file), "halvings": halvings}
        facts |= {"torch": torch.__version__, "config": config.model_dump(mode="json")}
        (folder / MANIFEST_FILE).write_text(json.dumps(facts | {"inputs": inputs.model_dump()}))
    # States beyond this step are from before a rollback; if kept, they would displace the valid ones.
    whole = [folder for folder in steps_in(states) if folder.name <= f"step-{step:06d}"]
    for folder in steps_in(states):
        if folder not in whole[-STATES_KEPT:]:
            discard(folder)


def newest(
    states: Path, optimizer: torch.optim.Optimizer, params: Parameters, config: TrainConfig, inputs: RunInputs
) -> tuple[tuple[Path, Manifest] | None, dict[int, str]]:
    """The newest state that is whole and of this run, and why later ones are not used, by their steps."""
    unused: dict[int, str] = {}
    for folder in reversed(steps_in(states)):
        try:
            return (folder, check(folder, optimizer, params, config, inputs)), unused
        except NotUsable as problem:
            unused[int(folder.name.removeprefix("step-"))] = str(problem)
    return None, unused


@torch.no_grad()
def load(folder: Path, optimizer: torch.optim.Optimizer, params: Parameters) -> None:
    """Load the weights and moments of a state that was checked."""
    with safe_open(folder / STATE_FILE, "pt") as tensors:
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
