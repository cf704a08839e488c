"""Overhead of the training loop: its time per step divided by a bare torch loop's, on the same tiny model.

Both train the same PEFT adapters of branch fast's UNet with fused AdamW, clipping and the same schedule, alternately
in one process; ours with progress, log and a check for cancel in every step. Neither saves states. The last line is
the ratio of the two minima over the rounds. Run: `uv run python -m benchmarks.overhead`
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from trainer.branches.protocol import load_branch
from trainer.config import resolve
from trainer.config.train_config import TrainConfig
from trainer.device import leave_a_core_free
from trainer.library import bases
from trainer.methods import lora
from trainer.methods.protocol import Group
from trainer.settings import read_settings
from trainer.studio import demo
from trainer.studio.store import Store
from trainer.training import dataset, loop
from trainer.training.dataset import Dataset
from trainer.training.views import Picture
from trainer.work.reporter import Reporter

WARM_UP_STEPS = 3


class Stopwatch:
    """The worker's own reporter, which also records the times when steps end."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self.step_times: list[float] = []

    def stage(self, stage: str) -> None:
        self._reporter.stage(stage)

    def step(self, step: int, steps: int, loss: float | None = None, lr: float | None = None) -> bool:
        keep_going = self._reporter.step(step, steps, loss, lr)
        self.step_times.append(time.perf_counter())
        return keep_going

    def saved(self, step: int) -> None: ...

    def resumed(self, step: int) -> None: ...

    def warn(self, message: str) -> None: ...


def ours(branch: Any, data: Dataset, config: TrainConfig, reporter: Reporter, states: Path) -> float:
    """Seconds per step of `loop.train`, after the warm-up and without the last step, which saves."""
    watch = Stopwatch(reporter)
    loop.train(branch, attach(branch, config), data, config, watch, states)
    inner = watch.step_times[WARM_UP_STEPS : config.steps]
    return (inner[-1] - inner[0]) / (len(inner) - 1)


def bare(branch: Any, data: Dataset, config: TrainConfig) -> float:
    """Seconds per step of the shortest loop that does the same."""
    groups = attach(branch, config)
    params = groups[0]["params"]
    optimizer = torch.optim.AdamW(params, lr=config.lr, weight_decay=config.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: loop.lr_scale(step, config))
    generator = torch.Generator().manual_seed(config.seed)
    assert data.cond is not None
    hidden = torch.cat([cond["encoder_hidden_states"] for cond in data.cond])
    views = [sample.views[0] for sample in data.samples]
    means, stds = torch.cat([view.mean for view in views]), torch.cat([view.std for view in views])
    caption_index = torch.tensor([data.captions.index(sample.picture.caption) for sample in data.samples])
    step_times = []
    for _ in range(config.steps - 1):
        rows = torch.randint(len(views), (config.batch,), generator=generator)
        mean, std = means[rows], stds[rows]
        latents = mean + std * torch.randn(mean.shape, generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.randint(1000, (config.batch,), generator=generator)
        noisy = branch.noise_scheduler.add_noise(latents, noise, timesteps)
        predicted = branch.denoiser(noisy, timesteps, hidden[caption_index[rows]], return_dict=False)[0]
        velocity = branch.noise_scheduler.get_velocity(latents, noise, timesteps)
        loss = ((predicted.float() - velocity) ** 2).mean(dim=(1, 2, 3)).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(params, config.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        step_times.append(time.perf_counter())
    inner = step_times[WARM_UP_STEPS:]
    return (inner[-1] - inner[0]) / (len(inner) - 1)


def attach(branch: Any, config: TrainConfig) -> list[Group]:
    """New adapters; they replace those of the round before."""
    if hasattr(branch.denoiser, "peft_config"):
        branch.pipeline.unload_lora_weights()
    return lora.attach(branch, config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    leave_a_core_free()  # as the worker does
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = read_settings(outputs=folder, models=folder / "models")
        branch = load_branch(bases.resolve(settings, None, "fast"), torch.device("cpu"), folder / "cache")
        config = resolve.resolve(
            settings.presets, branch="fast", model_type="lora", preset=None, name="toy", photos=5,
            steps=options.steps, args="save_every=100000 micro_batch=4 text_encoder_lr=0 targets=all",
        )  # fmt: skip
        pictures = [Picture(folder / f"{number}.png", "A photo of ohwx toy", str(number)) for number in range(5)]
        for number, picture in enumerate(pictures):
            demo.draw_photo(number).save(picture.path)
        data, _ = dataset.build(branch, pictures, [], config, folder / "dataset")
        store = Store(folder)
        values = {"title": "overhead", "name": "toy", "branch": "fast", "method": "lora", "base_id": 1,
                  "training_face_correct": 0, "auto_extend": 0, "characteristics": {}, "photos": [],
                  "warnings": []}  # fmt: skip
        (folder / "tunes" / str(store.add_tune(values))).mkdir(parents=True)
        job = store.claim()
        assert job is not None
        times: dict[str, list[float]] = {"ours": [], "bare": []}
        for number in range(options.rounds + 1):
            reporter = Reporter(settings, store, job, threading.Event(), branch.device)
            measured = ours(branch, data, config, reporter, folder / f"states-{number}"), bare(branch, data, config)
            if number:  # the first round warms up
                times["ours"].append(measured[0])
                times["bare"].append(measured[1])
                print(f"round {number}: ours {1000 * measured[0]:.2f} ms, bare {1000 * measured[1]:.2f} ms a step")
    print(f"ours/bare, minimum over {options.rounds} rounds: {min(times['ours']) / min(times['bare']):.3f}")


if __name__ == "__main__":
    main()
