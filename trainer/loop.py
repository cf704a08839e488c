"""The training loop. It knows no model family and no model type."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from trainer.branches import Branch
from trainer.dataset import Dataset
from trainer.files import discard, whole_folder
from trainer.presets import TrainConfig

READ_LOSS_EVERY = 10  # reading a number from the device waits for it
STATES_KEPT = 2
SCHEMA = 1


class Report(Protocol):
    """How a job tells where it is. One call serves progress, ETA, log line and cancel."""

    def stage(self, stage: str) -> None: ...

    def step(self, step: int, steps: int, loss: float | None = None) -> bool:
        """`step` steps are done; `loss` is their mean since it was last given. False: save and stop."""
        ...

    def saved(self, step: int) -> None:
        """A state to resume from is on disk."""
        ...

    def resumed(self, step: int) -> None:
        """Training goes on after this step."""
        ...


class Diverged(Exception):
    """The loss is no longer a finite number."""


def train(
    branch: Branch,
    groups: list[dict[str, Any]],
    data: Dataset,
    config: TrainConfig,
    report: Report,
    states: Path,
) -> bool:
    """Run `config.steps` optimizer steps, going on from the newest whole state in `states`.

    groups: parameter groups of `Method.attach`. Returns False when the report said to stop: the state is saved then.
    Raises Diverged on a non-finite loss; no state with a non-finite value is ever written.
    """
    optimizer = torch.optim.AdamW(
        [{"params": group["params"], "lr": group["lr"]} for group in groups],
        weight_decay=config.weight_decay,
        fused=True,
    )
    names = [name for group in groups for name in group["names"]]
    params = [param for group in groups for param in group["params"]]
    done = resume(states, optimizer, dict(zip(names, params, strict=True)), config)
    report.resumed(done)
    losses: list[Tensor] = []
    keep_going = report.step(done, config.steps)
    while done < config.steps and keep_going:
        scale = lr_scale(done, config)
        for group, described in zip(optimizer.param_groups, groups, strict=True):
            group["lr"] = described["lr"] * scale
        latents, cond, generator = data.batch(branch, config, done)
        loss = branch.loss(latents, cond, generator, config).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(params, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        done += 1
        last, save_now = done == config.steps, done % config.save_every == 0
        mean = read(losses, done) if last or save_now or done % READ_LOSS_EVERY == 0 else None
        keep_going = report.step(done, config.steps, mean)
        if last or save_now or not keep_going:
            read(losses, done)
            save(states, done, optimizer, dict(zip(names, params, strict=True)), config)
            report.saved(done)
    return done == config.steps


def read(losses: list[Tensor], step: int) -> float | None:
    """The mean of the losses since the last reading, which are then forgotten. None: there were none."""
    if not losses:
        return None
    mean = torch.stack(losses).mean().item()
    losses.clear()
    if not math.isfinite(mean):
        raise Diverged(f"the loss became {mean} before step {step}")
    return mean


def lr_scale(step: int, config: TrainConfig) -> float:
    """Factor of the learning rate for step 0, 1, ...: a linear warm-up, then the schedule down to 0 (or constant)."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    shapes: dict[str, Callable[[], float]] = {
        "constant": lambda: 1.0,
        "linear": lambda: 1.0 - progress,
        "cosine": lambda: 0.5 * (1.0 + math.cos(math.pi * progress)),
    }
    return shapes[config.schedule]()


def save(
    states: Path,
    step: int,
    optimizer: torch.optim.Optimizer,
    params: dict[str, torch.nn.Parameter],
    config: TrainConfig,
) -> None:
    """Write `states/step-000123/`: weights and moments, then a manifest with their digest. Keeps the newest two."""
    tensors: dict[str, Tensor] = {}
    for name, param in params.items():
        tensors[f"weight/{name}"] = param.detach().cpu().contiguous()
        for key, value in optimizer.state[param].items():
            tensors[f"{key}/{name}"] = value.detach().cpu().contiguous()
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise Diverged(f"a weight became infinite or not a number before step {step}")
    with whole_folder(states / f"step-{step:06d}") as folder:
        file = folder / "state.safetensors"
        save_file(tensors, file)
        facts = {"schema": SCHEMA, "step": step, "sha256": sha256(file), "torch": torch.__version__}
        (folder / "manifest.json").write_text(json.dumps(facts | {"config": config.model_dump()}))
    # What lies beyond this step could not be resumed from; kept, it would push out the states that can.
    whole = [folder for folder in sorted(states.glob("step-??????")) if folder.name <= f"step-{step:06d}"]
    for folder in states.glob("step-??????"):
        if folder not in whole[-STATES_KEPT:]:
            discard(folder)


def resume(
    states: Path, optimizer: torch.optim.Optimizer, params: dict[str, torch.nn.Parameter], config: TrainConfig
) -> int:
    """Load the newest state that is whole and of this configuration; returns its step, 0 where there is none."""
    for folder in sorted(states.glob("step-??????"), reverse=True):
        file, facts = folder / "state.safetensors", manifest(folder)
        expected = {"schema": SCHEMA, "step": int(folder.name.removeprefix("step-")), "config": config.model_dump()}
        same_run = expected.items() <= facts.items()
        if not same_run or not file.exists() or facts.get("sha256") != sha256(file):
            continue
        with safe_open(file, "pt") as tensors, torch.no_grad():
            for name, param in params.items():
                param.copy_(tensors.get_tensor(f"weight/{name}"))
                optimizer.state[param] = {
                    "step": tensors.get_tensor(f"step/{name}").to(param.device),  # fused AdamW wants it there
                    "exp_avg": tensors.get_tensor(f"exp_avg/{name}").to(param.device),
                    "exp_avg_sq": tensors.get_tensor(f"exp_avg_sq/{name}").to(param.device),
                }
        return int(facts["step"])
    return 0


def manifest(folder: Path) -> dict[str, Any]:
    """What a state says about itself; nothing where that cannot be read."""
    try:
        facts = json.loads((folder / "manifest.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
