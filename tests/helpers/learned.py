"""Whether a LoRA has learned its photos, by stock diffusers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from tests.helpers.app import App

TRIPLES = 64


def assert_learned(app: App, tune: dict[str, Any], base: Path) -> None:
    """With stock diffusers alone: the file loads, it changes a picture, and the loss on fixed triples is lower."""
    folder = app.outputs / "tunes" / str(tune["id"])
    pipeline = StableDiffusionPipeline.from_pretrained(base, torch_dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    before, picture_before = triples_loss(pipeline, folder), picture(pipeline)
    pipeline.load_lora_weights(folder / "model", weight_name="lora.safetensors")
    after, picture_after = triples_loss(pipeline, folder), picture(pipeline)
    assert after < before
    assert np.abs(picture_after - picture_before).max() > 2 / 255


def picture(pipeline: Any) -> np.ndarray:
    options = {"width": 64, "height": 64, "num_inference_steps": 4, "output_type": "np"}
    return np.asarray(pipeline("ohwx dog", generator=torch.Generator().manual_seed(0), **options).images[0])


@torch.no_grad()
def triples_loss(pipeline: Any, folder: Path) -> float:
    """Mean squared error of what is predicted, over 64 fixed (photo, noise, timestep) triples."""
    pixels = []
    for photo in sorted((folder / "images").glob("*.jpg")):
        image = Image.open(photo)
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        square = image.crop((left, top, left + side, top + side)).resize((64, 64), Image.Resampling.LANCZOS)
        pixels.append(torch.from_numpy(np.array(square, np.float32)).permute(2, 0, 1) / 127.5 - 1)
    latents = pipeline.vae.encode(torch.stack(pixels)).latent_dist.mean * pipeline.vae.config.scaling_factor
    generator = torch.Generator().manual_seed(123)
    latents = latents[torch.arange(TRIPLES) % len(latents)]
    noise = torch.randn(latents.shape, generator=generator)
    timesteps = torch.randint(1000, (TRIPLES,), generator=generator)
    captions = ["A photo of ohwx dog"] * TRIPLES
    tokens = pipeline.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    hidden = pipeline.text_encoder(tokens.input_ids)[0]
    noisy = pipeline.scheduler.add_noise(latents, noise, timesteps)
    predicted = pipeline.unet(noisy, timesteps, hidden, return_dict=False)[0]
    velocity = pipeline.scheduler.config.prediction_type == "v_prediction"
    target = pipeline.scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
    return float(((predicted - target) ** 2).mean())
