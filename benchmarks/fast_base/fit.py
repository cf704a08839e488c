"""One optimizer loop for both stages: seeded by the step, so a resumed run equals an uninterrupted one."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LOG_EVERY = 50


def fit(
    stage: str,
    modules: nn.ModuleDict,
    loss: Callable[[torch.Generator], Tensor],
    settings: dict[str, Any],
    seed: int,
    folder: Path,
    judge: Callable[[], dict[str, float]],
) -> None:
    """Train `modules` and leave the moving average of their weights in them.

    settings: `lr` is for all modules without their own, NAME_lr. loss(generator) draws a batch and returns its loss;
    judge() measures the averaged weights at every save. State and log are in `folder`; training resumes from a state
    there.
    """
    weights = dict(modules.named_parameters())
    groups = [
        {"params": list(module.parameters()), "peak": settings.get(f"{name}_lr", settings["lr"])}
        for name, module in modules.items()
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=settings["lr"], betas=(0.9, 0.99), weight_decay=settings["weight_decay"], fused=True
    )
    average = {name: weight.detach().clone() for name, weight in weights.items()}
    done, seconds, state = 0, 0.0, folder / f"{stage}.pt"
    if state.exists():
        kept = torch.load(state, map_location=next(iter(weights.values())).device, weights_only=True)
        put(weights, kept["weights"])
        put(average, kept["average"])
        optimizer.load_state_dict(kept["optimizer"])
        done, seconds = kept["step"], kept["seconds"]
    start, losses = time.perf_counter() - seconds, []
    while done < settings["steps"]:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate(done, settings["warmup_steps"], settings["steps"])
        value = loss(torch.Generator().manual_seed(seed * 1_000_003 + done))
        value.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(list(weights.values()), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done += 1
        losses.append(value.detach())
        with torch.no_grad():  # a short average at the beginning, a long one later
            keep = min(settings["ema"], (1 + done) / (10 + done))
            torch._foreach_lerp_(list(average.values()), list(weights.values()), 1 - keep)
        if done % settings["save_every"] == 0 or done == settings["steps"]:
            seconds = time.perf_counter() - start
            facts = {"weights": weights, "average": average, "optimizer": optimizer.state_dict()}
            partial = state.with_suffix(".partial")
            torch.save({**facts, "step": done, "seconds": seconds}, partial)
            partial.replace(state)
            raw = {name: weight.detach().clone() for name, weight in weights.items()}
            put(weights, average)
            with torch.no_grad():
                note(folder, stage, done, seconds, {"loss": mean(losses), **judge()})
            losses.clear()
            put(weights, raw)
        elif done % LOG_EVERY == 0:
            note(folder, stage, done, time.perf_counter() - start, {"loss": mean(losses[-LOG_EVERY:])})
    put(weights, average)


def put(target: dict[str, Any], source: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, weight in target.items():
            weight.copy_(source[name])


def mean(values: list[Tensor]) -> float:
    return float(torch.stack(values).mean())


def rate(step: int, warmup: int, steps: int) -> float:
    """A linear warm-up, then half a cosine down to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def note(folder: Path, stage: str, step: int, seconds: float, facts: dict[str, float]) -> None:
    """Append a line to the log, and print it."""
    rounded = {key: round(value, 4) for key, value in facts.items()}
    line = json.dumps({"stage": stage, "step": step, "seconds": round(seconds, 1), **rounded})
    print(line, flush=True)
    with (folder / "log.jsonl").open("a") as log:
        log.write(line + "\n")
