"""Stable Diffusion 1.5: an epsilon- or v-predicting UNet over 8x smaller latents, one CLIP text encoder."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
)
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from trainer.branches import loading, single_file, unet
from trainer.branches.objectives import noise_and_timesteps, noise_loss
from trainer.branches.protocol import Cond, Task
from trainer.branches.single_file_keys import clip_weights, joined
from trainer.config.train_config import TrainConfig
from trainer.library.bases import Base
from trainer.library.models_folder import sidecar

CONFIG = loading.published_config("sd15")  # CompVis v1-inference.yaml, and CLIP ViT-L/14's text tower
ENCODERS: dict[str, single_file.Encoder] = {
    "text_encoder": (CLIPTextModel, "cond_stage_model.transformer.", clip_weights)
}
CONTROL_PIPELINES: dict[Task, Any] = {
    "text": StableDiffusionControlNetPipeline,
    "image": StableDiffusionControlNetImg2ImgPipeline,
    "inpaint": StableDiffusionControlNetInpaintPipeline,
}


def load(base: Base, device: torch.device, cache: Path, dtype: torch.dtype | None = None) -> SD15:
    """Load from a diffusers folder or a single file. Raises what `loading.read_base` raises."""
    dtype = dtype or loading.compute_dtype(device)
    return SD15(loading.read_base(base, dtype, cache, read_folder, read_file), device, dtype)


def read_folder(folder: Path, variant: str | None, dtype: torch.dtype, _cache: Path) -> Any:
    """Load a diffusers folder."""
    source = loading.folder_source(folder, variant)
    encoder = loading.read_text_encoder(CLIPTextModel, "text_encoder", dtype, source)
    return StableDiffusionPipeline.from_pretrained(
        **source,
        dtype={"vae": torch.float32, "default": dtype},  # SD's VAE overflows in half precision
        text_encoder=encoder,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def read_file(file: Path, _variant: str | None, dtype: torch.dtype, cache: Path) -> Any:
    """Load a single file with the keys of the original release."""
    config = unet.single_file_config(file, cache, CONFIG)
    options: dict[str, Any] = {"safety_checker": None, "feature_extractor": None}
    if not (sidecar(file) / "tokenizer").exists():
        from trainer.library import hub  # not needed when all files are here

        names = ["vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"]
        options["tokenizer"] = CLIPTokenizer.from_pretrained(hub.fetch_files("openai/clip-vit-large-patch14", names))
    options |= single_file.unet_parts(file, config, torch.float32, ENCODERS)
    pipeline = StableDiffusionPipeline.from_single_file(
        str(file), config=str(config), local_files_only=True, dtype=torch.float32, **options
    )
    pipeline.unet.to(dtype)
    pipeline.text_encoder.to(dtype)
    return pipeline


class SD15:
    """The modules of one base, ready to train and to render."""

    lora_targets = unet.UNET_TARGETS
    token_encoders = ("text_encoder",)
    denoiser_name = "unet"
    reads_kohya = True
    whole_file = True
    kohya_encoders = {"text_encoder": "lora_te"}  # noqa: RUF012
    control_nets = (unet.control_net(CONTROL_PIPELINES),)  # diffusers has no union pipelines for this family
    preview_latents = unet.preview_latents

    def __init__(self, pipeline: Any, device: torch.device, dtype: torch.dtype) -> None:
        self.pipeline = self.parts = pipeline
        self.device = device
        self.dtype = dtype
        self.denoiser: nn.Module = pipeline.unet
        self.text_encoders: dict[str, nn.Module] = {"text_encoder": pipeline.text_encoder}
        self.vae: nn.Module = pipeline.vae
        self.latent_scale: int = pipeline.vae_scale_factor
        self.size_multiple = unet.size_multiple(pipeline)
        self.noise_scheduler = unet.noise_scheduler(pipeline, device)
        self.metadata = unet.metadata("stable-diffusion-v1", "sd_v1", self.noise_scheduler)

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return loading.encode_pixels(self.vae, pixels, self.device)

    def encode_prompts(self, captions: list[str]) -> Cond:
        """B captions -> {"encoder_hidden_states": (B, 77, D)}. Longer captions are cut, as in rendering."""
        tokenizer = self.pipeline.tokenizer
        tokens = tokenizer(
            self.pipeline.maybe_convert_prompt(captions, tokenizer),
            padding="max_length",
            truncation=True,
            max_length=tokenizer.model_max_length,
            return_tensors="pt",
        )
        with loading.autocast(self.device, self.dtype):
            hidden = self.text_encoders["text_encoder"](tokens.input_ids.to(self.device))[0]
        return {"encoder_hidden_states": hidden}

    def encode_size(self, original: tuple[int, int], crop: tuple[int, int], size: tuple[int, int]) -> Cond:
        return {}

    def draw(self, latents: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """See `objectives.noise_and_timesteps`."""
        return noise_and_timesteps(self.noise_scheduler, latents, generator)

    def loss(
        self, latents: Tensor, cond: Cond, noise: Tensor, timesteps: Tensor, config: TrainConfig, weight: Tensor | None
    ) -> Tensor:
        """See `objectives.noise_loss`, (B,)."""
        noisy = self.noise_scheduler.add_noise(latents, noise, timesteps)
        with loading.autocast(self.device, self.dtype):
            predicted = self.denoiser(noisy.to(self.dtype), timesteps, **cond, return_dict=False)[0]
        return noise_loss(self.noise_scheduler, predicted, latents, noise, timesteps, config.min_snr, weight)

    def prompt_inputs(self, cond: Cond, empty: Cond) -> dict[str, Any]:
        key = "encoder_hidden_states"
        return {"prompt_embeds": cond[key], "negative_prompt_embeds": empty[key]}

    def encode_for_pipeline(self, text: str, negative: str | None) -> dict[str, Tensor]:
        """A prompt encoded by the stock pipeline, as its keyword arguments, batch 1."""
        prompt_embeds, negative_embeds = self.pipeline.encode_prompt(
            text, self.pipeline._execution_device, 1, True, negative
        )
        return {"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_embeds}

    def task_pipeline(self, task: Task) -> tuple[Any, frozenset[str]]:
        return loading.task_pipeline(self.pipeline, task)

    def original_weights(self) -> dict[str, Tensor]:
        return joined(
            {
                **unet.original_weights(self.denoiser, self.vae),
                "cond_stage_model.transformer.": clip_weights(self.pipeline.text_encoder),
            }
        )

    def kohya_layers(self, adapters: dict[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor, int]]:
        """kohya's trainer for SD 1.5 uses diffusers' names."""
        return {f"lora_unet_{name.replace('.', '_')}": (down, up, 1) for name, (down, up) in adapters.items()}

    def load_weights(self, file: Path, cache: Path) -> None:
        loading.copy_weights(read_file(file, None, self.dtype, cache), self.pipeline)

    def keep_text_encoders(self, names: Collection[str]) -> None:
        self.text_encoders = loading.keep_parts(self.parts, self.text_encoders, names)
