"""Make the base of branch fast: draw pictures, train the VAE, then the text encoder and the UNet; write the folder.

    uv run python -m benchmarks.fast_base.train WORK     # resumes from a state in WORK; the base is WORK/base

All data is drawn here from seeds: no photos and no pretrained weights are used.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.fast_base import base, measure, scenes, textures, vae

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for pictures, states, log and the base")
    parser.add_argument("--settings", type=Path, default=HERE / "settings.toml")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    settings, work, device = tomllib.loads(options.settings.read_text()), options.work, torch.device(options.device)
    work.mkdir(parents=True, exist_ok=True)
    seed, side = settings["pictures"]["seed"], settings["pictures"]["side"]

    leaves = drawn(work / "leaves.npy", draw_leaves, settings["pictures"]["leaves"], seed, side)
    autoencoder = vae.train_vae(leaves, settings["vae"], seed, work, device)
    pictures = drawn(work / "scenes.npy", draw_scene, settings["pictures"]["scenes"], seed, side)
    shown = [scenes.decide(np.random.default_rng((seed, number))) for number in range(len(pictures))]
    latents = encoded(work / "latents.npy", autoencoder, pictures, device)

    unseen = measure.held_back(settings["base"]["judged"], seed)

    def judge(pipeline: Any) -> dict[str, float]:
        rendered = measure.render(pipeline, [caption for caption, _ in unseen], measure.STEPS, measure.GUIDANCE)
        return measure.score(rendered, [scene for _, scene in unseen])

    pipeline = base.train_base(latents, shown, autoencoder, settings, seed, work, device, judge)
    write(pipeline, options.settings, work)


def drawn(file: Path, draw: Callable[[Any], Any], count: int, seed: int, side: int) -> Tensor:
    """`count` pictures as (N, 3, H, W), 8 bits, drawn on all cores, or from `file` if it exists."""
    if not file.exists():
        with multiprocessing.Pool() as pool:
            pictures = pool.map(draw, [(seed, side, number) for number in range(count)], chunksize=50)
        np.save(file, np.stack(pictures))
    return torch.from_numpy(np.load(file)).permute(0, 3, 1, 2)


def draw_leaves(job: tuple[int, int, int]) -> Any:
    seed, side, number = job
    return textures.dead_leaves(np.random.default_rng((seed, number)), bank(seed), side)


def draw_scene(job: tuple[int, int, int]) -> Any:
    """The picture of the scene for these numbers."""
    seed, side, number = job
    rng = np.random.default_rng((seed, number))
    return scenes.render(rng, scenes.decide(rng), bank(seed), side)


@torch.no_grad()
def encoded(file: Path, autoencoder: Any, pictures: Tensor, device: torch.device) -> Tensor:
    """The latents of pictures (N, 3, H, W), 8 bits, as (N, 4, h, w), half precision; from `file` if it exists."""
    if not file.exists():
        latents = [autoencoder.encode(vae.to_pixels(batch, device)).latent_dist.mode() for batch in pictures.split(64)]
        np.save(file, torch.cat(latents).half().cpu().numpy())
    return torch.from_numpy(np.load(file))


def write(pipeline: Any, settings: Path, work: Path) -> None:
    """Write WORK/base: a diffusers folder in half precision, with the settings and the log."""
    folder = work / "base"
    pipeline.to("cpu", torch.float16).save_pretrained(folder, safe_serialization=True)
    shutil.copy(settings, folder / "settings.toml")
    shutil.copy(work / "log.jsonl", folder / "log.jsonl")
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(json.dumps({"base": str(folder), "megabytes": round(size / 1e6, 1)}))


_banks: dict[int, textures.Textures] = {}


def bank(seed: int) -> textures.Textures:
    """The bank of this process."""
    if seed not in _banks:
        _banks[seed] = textures.Textures(seed)
    return _banks[seed]


if __name__ == "__main__":
    main()
