"""A bench for whatever trains: a tiny base, three pictures, a configuration, and a report that remembers."""

from __future__ import annotations

import atexit
import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trainer.branches.protocol import Branch, load_branch
from trainer.config import resolve
from trainer.config.train_config import TrainConfig
from trainer.library.bases import Base
from trainer.methods.protocol import Method, get_method
from trainer.training import dataset, loop
from trainer.training.dataset import Dataset
from trainer.training.views import Picture

# The million objects of the libraries are never garbage; looking through them takes 0.3 s each time a base is placed.
gc.freeze()
atexit.register(gc.unfreeze)

PRESETS = Path(__file__).parents[2] / "presets"
STEPS = 6


@dataclass
class RecordedReport:
    """A report that remembers what it was told, and says to stop after a step."""

    stop_at: int | None = None
    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    saved_at: list[int] = field(default_factory=list)
    resumed_at: list[int] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    on_saved: Callable[[], None] = lambda: None

    def stage(self, stage: str) -> None: ...

    def step(self, step: int, steps: int, loss: float | None = None, lr: float | None = None) -> bool:
        self.steps.append(step)
        self.losses += [] if loss is None else [loss]
        self.rates += [] if lr is None else [lr]
        return step != self.stop_at

    def saved(self, step: int) -> None:
        self.saved_at.append(step)
        self.on_saved()

    def resumed(self, step: int) -> None:
        self.resumed_at.append(step)

    def warn(self, message: str) -> None:
        self.warnings.append(message)


@dataclass
class TrainingSetup:
    """Everything that a run needs; each `start` is a fresh process as far as the loop can tell."""

    base: Path
    cache: Path
    photos: list[Path]
    config: TrainConfig
    family: str = "sd15"
    more: list[Picture] = field(default_factory=list)  # beside the photos
    model_type: str = "lora"
    earlier: Path | None = None  # a LoRA that the base stands on
    captions: tuple[str, ...] = ("a red dog", "a blue dog", "a dog")
    warnings: list[str] = field(default_factory=list)  # of the last start

    def start(self, adapters_seed: int = 0) -> Run:
        base = Base(1, self.base.name, self.family, path=self.base)
        branch = load_branch(base, torch.device("cpu"), self.cache)
        method = get_method(self.model_type)
        self.warnings = method.prepare(branch, self.config, "ohwx", "dog", self.earlier)
        pictures = [Picture(*one, one[0].name) for one in zip(self.photos, self.captions, strict=True)]
        kept = method.needed_text_encoders(branch, self.config)
        data, _ = dataset.build(branch, [*pictures, *self.more], [], self.config, self.cache / "dataset", kept)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(adapters_seed)
            groups = method.attach(branch, self.config)
        return Run(branch, groups, data, self.config, method)


@dataclass
class Run:
    branch: Branch
    groups: list[dict[str, Any]]
    data: Dataset
    config: TrainConfig
    method: Method

    def train(self, states: Path, report: RecordedReport) -> bool:
        tend = partial(self.method.after_step, self.branch)
        return loop.train(self.branch, self.groups, self.data, self.config, report, states, after_step=tend)

    def weights(self) -> dict[str, Tensor]:
        """The trained weights by name."""
        return {
            name: param.detach().clone()
            for group in self.groups
            for name, param in zip(group["names"], group["params"], strict=True)
        }


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def config_of(model_type: str = "lora", **changes: object) -> TrainConfig:
    words = {
        "steps": STEPS, "batch": 2, "lr": 1e-2, "text_encoder_lr": 0, "rank": 2, "alpha": 4, "resolution": 32,
        "schedule": "cosine", "warmup_steps": 2, "caption_dropout": 0.3, "save_every": 2, "micro_batch": 2,
        "buckets": False, "save_dtype": "float32",
    }  # fmt: skip
    if model_type == "checkpoint":
        words |= {"rank": 0, "alpha": 0, "prior_weight": 0}
    if changes.get("steps") == 1:
        words["warmup_steps"] = 1  # no longer than the run
    args = " ".join(f"{key}={value}" for key, value in (words | changes).items())
    return resolve.resolve(
        PRESETS, branch="sd15", model_type=model_type, preset=None, name="dog", photos=3, steps=None, args=args
    )


def write_photos(folder: Path) -> list[Path]:
    """Three pictures of noise around a colour each."""
    rng = np.random.default_rng(0)
    for number, colour in enumerate([(200, 30, 30), (30, 30, 200), (90, 90, 90)]):
        pixels = np.clip(rng.normal(colour, 40, (64, 64, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return sorted(folder.glob("*.png"))
