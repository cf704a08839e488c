"""The training loop. It knows no model family and no model type."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from pathlib import Path

import torch
from torch import Tensor

from trainer.branches.protocol import Branch
from trainer.config.train_config import TrainConfig
from trainer.contract.report import Report
from trainer.methods.protocol import Group
from trainer.training import optimizers
from trainer.training.dataset import Dataset
from trainer.training.optimizers import Adafactor
from trainer.training.run_inputs import RunInputs
from trainer.training.state_check import Parameters
from trainer.training.states import UNKNOWN, Begun, Diverged, begin, go_back, save

READ_LOSS_EVERY = 10  # steps: reading a number waits for the device
MAX_HALVINGS = 2  # of the learning rate, when the loss is not finite


def train(
    branch: Branch,
    groups: list[Group],
    data: Dataset,
    config: TrainConfig,
    report: Report,
    states: Path,
    preview: Callable[[int], None] = lambda step: None,
    preview_steps: Collection[int] = (),
    after_step: Callable[[], None] = lambda: None,
    inputs: RunInputs = UNKNOWN,
    lost: bool = False,
) -> bool:
    """Run `config.steps` optimizer steps; resumes from the newest whole state in `states`. The first state is saved
    before the first step.

    groups: parameter groups of `Method.attach`. preview(n) is called after n steps for each n in `preview_steps`, also
    right after resuming, unless a value is not finite or the report asks to stop. after_step: called after each step.
    inputs, lost: see `states.begin`; its messages are warnings. Returns False when the report asked to stop: the state
    is saved then. When the loss is not finite, training returns to the last state with half the learning rate, twice at
    most; then Diverged is raised, which names the pictures of that step. No state with a non-finite value is written.
    """
    params: Parameters = {n: p for group in groups for n, p in zip(group["names"], group["params"], strict=True)}
    optimizer = optimizers.make(groups, config.optimizer, config.weight_decay, config.seed)
    done, halvings = tell(begin(states, optimizer, params, config, inputs, lost), report)
    readings: list[Tensor] = []  # loss and gradient norm of each step since the last reading, (2,) each
    if (keep_going := report.step(done, config.steps)) and done in preview_steps:
        preview(done)
    while done < config.steps and keep_going:
        rate = lr_scale(done, config) * 0.5**halvings
        set_rates(optimizer, groups, rate, done)
        readings.append(step_once(branch, data, config, done, optimizer, list(params.values())))
        after_step()
        done += 1
        last, save_now = done == config.steps, done % config.save_every == 0
        mean = None
        try:
            if last or save_now or done % READ_LOSS_EVERY == 0:
                mean = read(readings, done)
            elif done in preview_steps:
                check(readings, done)
            keep_going = report.step(done, config.steps, mean, config.lr * rate)
            if last or save_now or not keep_going:
                read(readings, done)
                save(states, done, optimizer, params, config, halvings, inputs)
                report.saved(done)
        except Diverged as problem:
            halvings += 1
            named = f"the pictures of that step were {', '.join(data.names(problem.step))}"
            if halvings > MAX_HALVINGS:
                raise Diverged(f"{problem}, at falling learning rates; {named}", problem.step) from None
            readings.clear()
            done, keep_going = go_back(states, optimizer, params, config, inputs), True
            lower = config.lr * 0.5**halvings
            report.warn(f"{problem}: it went back to step {done} and on at the learning rate {lower:.3g}; {named}")
            report.resumed(done)
            continue
        if done in preview_steps and keep_going:
            preview(done)
    return done == config.steps


def tell(begun: Begun, report: Report) -> tuple[int, int]:
    """Report where a run begins. Returns its finished steps, and how often the learning rate was halved."""
    for message in begun.messages:
        report.warn(message)
    report.resumed(begun.step)
    return begun.step, begun.halvings


def set_rates(optimizer: torch.optim.Optimizer, groups: list[Group], rate: float, step: int) -> None:
    """Set each group's learning rate times `rate`; 0 for a group from its step `until` on."""
    for group, described in zip(optimizer.param_groups, groups, strict=True):
        group["lr"] = described["lr"] * rate if step < described.get("until", math.inf) else 0.0


def step_once(
    branch: Branch,
    data: Dataset,
    config: TrainConfig,
    step: int,
    optimizer: torch.optim.Optimizer,
    params: list[Tensor],
) -> Tensor:
    """One optimizer step; returns loss and gradient norm, (2,), on the device. It does not wait for the device."""
    total = torch.zeros((), device=branch.device)
    norm = total
    for batch in data.batches(branch, step):
        losses = branch.loss(batch.latents, batch.cond, batch.noise, batch.timesteps, config, batch.mask)
        loss = losses.sum() * batch.share
        if batch.last and isinstance(optimizer, Adafactor):
            # Each gradient is used and freed as soon as it is complete; the updates are clipped one by one.
            with optimizers.released(optimizer, params) as squared:
                loss.backward()  # type: ignore[no-untyped-call]
            norm = squared.sqrt()
        else:
            loss.backward()  # type: ignore[no-untyped-call]
        total = total + loss.detach()
    if not isinstance(optimizer, Adafactor):
        norm = torch.nn.utils.clip_grad_norm_(params, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return torch.stack([total, norm])


def read(readings: list[Tensor], step: int) -> float | None:
    """The mean loss since the last reading; None: there were no steps. Clears `readings`.

    step: the number of finished steps. Raises Diverged where a loss or a gradient is not finite.
    """
    if not readings:
        return None
    values = check(readings, step)
    readings.clear()
    return float(values[:, 0].mean())


def check(readings: list[Tensor], step: int) -> Tensor:
    """The readings as (N, 2) on the CPU. Raises Diverged where one is not finite."""
    values = torch.stack(readings).cpu()
    broken = (~torch.isfinite(values).all(dim=1)).nonzero()
    if len(broken):
        first = step - len(values) + int(broken[0])
        what = "loss" if not math.isfinite(values[int(broken[0]), 0]) else "gradient"
        raise Diverged(f"the {what} was not a finite number in step {first + 1}", first)
    return values


def lr_scale(step: int, config: TrainConfig) -> float:
    """Factor of the learning rate for step 0, 1, ...: a linear warm-up, then the schedule down to 0 (or constant)."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    shapes: dict[str, Callable[[], float]] = {
        "constant": lambda: 1.0,
        "linear": lambda: 1.0 - progress,
        "cosine": lambda: 0.5 * (1.0 + math.cos(math.pi * progress)),
        "polynomial": lambda: float((1.0 - progress) ** config.power),
    }
    return shapes[config.schedule]()
