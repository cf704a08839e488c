"""Stable Diffusion XL 1.0: a UNet over 8x smaller latents, two CLIP text encoders, and the picture's size as input."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionXLControlNetInpaintPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLControlNetUnionImg2ImgPipeline,
    StableDiffusionXLControlNetUnionInpaintPipeline,
    StableDiffusionXLControlNetUnionPipeline,
    StableDiffusionXLPipeline,
)
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from trainer.branches import loading, single_file, unet
from trainer.branches.objectives import noise_and_timesteps, noise_loss
from trainer.branches.protocol import Cond, Task
from trainer.branches.single_file_keys import (
    clip_weights,
    joined,
    open_clip_names,
    open_clip_weights,
    renamed,
    unet_names,
)
from trainer.config.train_config import TrainConfig
from trainer.library.bases import Base
from trainer.library.models_folder import sidecar

# Stability-AI/generative-models, sd_xl_base.yaml, with CLIP ViT-L/14's text tower and OpenCLIP's of ViT-bigG/14.
CONFIG = loading.published_config("sdxl1")
ENCODERS: dict[str, single_file.Encoder] = {
    "text_encoder": (CLIPTextModel, "conditioner.embedders.0.transformer.", clip_weights),
    "text_encoder_2": (CLIPTextModelWithProjection, "conditioner.embedders.1.model.", open_clip_names),
}
CONTROL_PIPELINES: dict[Task, Any] = {
    "text": StableDiffusionXLControlNetPipeline,
    "image": StableDiffusionXLControlNetImg2ImgPipeline,
    "inpaint": StableDiffusionXLControlNetInpaintPipeline,
}
UNION_PIPELINES: dict[Task, Any] = {
    "text": StableDiffusionXLControlNetUnionPipeline,
    "image": StableDiffusionXLControlNetUnionImg2ImgPipeline,
    "inpaint": StableDiffusionXLControlNetUnionInpaintPipeline,
}
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
HOME = "stabilityai/stable-diffusion-xl-base-1.0"  # source of the tokenizers for a single file without a sidecar


def load(base: Base, device: torch.device, cache: Path, dtype: torch.dtype | None = None) -> SDXL1:
    """Load from a diffusers folder or a single file. Raises what `loading.read_base` raises."""
    dtype = dtype or loading.compute_dtype(device)
    return SDXL1(loading.read_base(base, dtype, cache, read_folder, read_file), device, dtype)


def read_folder(folder: Path, variant: str | None, dtype: torch.dtype, _cache: Path) -> Any:
    """Load a diffusers folder."""
    source = loading.folder_source(folder, variant)
    return StableDiffusionXLPipeline.from_pretrained(
        **source,
        dtype={"vae": torch.float32, "default": dtype},  # SDXL's VAE overflows in half precision
        text_encoder=loading.read_text_encoder(CLIPTextModel, "text_encoder", dtype, source),
        text_encoder_2=loading.read_text_encoder(CLIPTextModelWithProjection, "text_encoder_2", dtype, source),
        add_watermarker=False,
    )


def read_file(file: Path, _variant: str | None, dtype: torch.dtype, cache: Path) -> Any:
    """Load a single file with the keys of the original release."""
    config = unet.single_file_config(file, cache, CONFIG)
    options: dict[str, Any] = {}
    for name in ("tokenizer", "tokenizer_2"):
        if not (sidecar(file) / name).exists():
            from trainer.library import hub  # not needed when all files are here

            files = hub.fetch_files(HOME, [f"{name}/{part}" for part in TOKENIZER_FILES])
            options[name] = CLIPTokenizer.from_pretrained(files / name)
    options |= single_file.unet_parts(file, config, dtype, ENCODERS)
    return StableDiffusionXLPipeline.from_single_file(
        str(file), config=str(config), local_files_only=True, dtype=dtype, add_watermarker=False, **options
    )


class SDXL1:
    """The modules of one base, ready to train and to render."""

    lora_targets = unet.UNET_TARGETS
    token_encoders = ("text_encoder", "text_encoder_2")
    denoiser_name = "unet"
    reads_kohya = True
    whole_file = True
    kohya_encoders = {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}  # noqa: RUF012
    control_nets = (unet.control_net(CONTROL_PIPELINES), unet.union_control_net(UNION_PIPELINES))
    preview_latents = unet.preview_latents

    def __init__(self, pipeline: Any, device: torch.device, dtype: torch.dtype) -> None:
        self.pipeline = self.parts = pipeline
        self.device = device
        self.dtype = dtype
        self.denoiser: nn.Module = pipeline.unet
        names = ("text_encoder", "text_encoder_2")
        self.text_encoders: dict[str, nn.Module] = {name: getattr(pipeline, name) for name in names}
        self.vae: nn.Module = pipeline.vae
        self.latent_scale: int = pipeline.vae_scale_factor
        self.size_multiple = unet.size_multiple(pipeline)
        self.noise_scheduler = unet.noise_scheduler(pipeline, device)
        self.metadata = unet.metadata("stable-diffusion-xl-v1-base", "sdxl_base_v1-0", self.noise_scheduler)

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return loading.encode_pixels(self.vae, pixels, self.device)

    def encode_prompts(self, captions: list[str]) -> Cond:
        """B captions -> {"encoder_hidden_states": (B, 77, D), "text_embeds": (B, P)}. As in rendering, an empty caption
        is zeros where the base was trained so (`force_zeros_for_empty_prompt`)."""
        with loading.autocast(self.device, self.dtype):
            hidden, _, pooled, _ = self.pipeline.encode_prompt(
                captions, device=self.device, do_classifier_free_guidance=False
            )
        if self.pipeline.config.force_zeros_for_empty_prompt:
            not_empty = torch.tensor([bool(caption) for caption in captions], dtype=hidden.dtype, device=self.device)
            hidden, pooled = hidden * not_empty[:, None, None], pooled * not_empty[:, None]
        return {"encoder_hidden_states": hidden, "text_embeds": pooled}

    def encode_size(self, original: tuple[int, int], crop: tuple[int, int], size: tuple[int, int]) -> Cond:
        """{"time_ids": (1, 6)}: SDXL's micro-conditioning (Podell et al. 2023, arXiv 2307.01952, §2.2)."""
        return {"time_ids": torch.tensor([[*original, *crop, *size]], dtype=self.dtype, device=self.device)}

    def draw(self, latents: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """See `objectives.noise_and_timesteps`."""
        return noise_and_timesteps(self.noise_scheduler, latents, generator)

    def loss(
        self, latents: Tensor, cond: Cond, noise: Tensor, timesteps: Tensor, config: TrainConfig, weight: Tensor | None
    ) -> Tensor:
        """See `objectives.noise_loss`, (B,)."""
        noisy = self.noise_scheduler.add_noise(latents, noise, timesteps)
        added = {"text_embeds": cond["text_embeds"], "time_ids": cond["time_ids"]}
        with loading.autocast(self.device, self.dtype):
            predicted = self.denoiser(
                noisy.to(self.dtype),
                timesteps,
                cond["encoder_hidden_states"],
                added_cond_kwargs=added,
                return_dict=False,
            )[0]
        return noise_loss(self.noise_scheduler, predicted, latents, noise, timesteps, config.min_snr, weight)

    def prompt_inputs(self, cond: Cond, empty: Cond) -> dict[str, Any]:
        return {
            "prompt_embeds": cond["encoder_hidden_states"],
            "pooled_prompt_embeds": cond["text_embeds"],
            "negative_prompt_embeds": empty["encoder_hidden_states"],
            "negative_pooled_prompt_embeds": empty["text_embeds"],
        }

    def encode_for_pipeline(self, text: str, negative: str | None) -> dict[str, Tensor]:
        """A prompt encoded by the stock pipeline, as its keyword arguments, batch 1."""
        prompt_embeds, negative_embeds, pooled, negative_pooled = self.pipeline.encode_prompt(
            text, negative_prompt=negative
        )
        return {
            "prompt_embeds": prompt_embeds,
            "negative_prompt_embeds": negative_embeds,
            "pooled_prompt_embeds": pooled,
            "negative_pooled_prompt_embeds": negative_pooled,
        }

    def task_pipeline(self, task: Task) -> tuple[Any, frozenset[str]]:
        return loading.task_pipeline(self.pipeline, task)

    def original_weights(self) -> dict[str, Tensor]:
        return joined(
            {
                **unet.original_weights(self.denoiser, self.vae),
                "conditioner.embedders.0.transformer.": clip_weights(self.pipeline.text_encoder),
                "conditioner.embedders.1.model.": open_clip_weights(self.pipeline.text_encoder_2),
            }
        )

    def kohya_layers(self, adapters: dict[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor, int]]:
        """kohya's trainer for SDXL uses the original release's names."""
        original = renamed(adapters, unet_names(self.denoiser))
        return {f"lora_unet_{name.replace('.', '_')}": (down, up, 1) for name, (down, up) in original.items()}

    def load_weights(self, file: Path, cache: Path) -> None:
        loading.copy_weights(read_file(file, None, self.dtype, cache), self.pipeline)

    def keep_text_encoders(self, names: Collection[str]) -> None:
        self.text_encoders = loading.keep_parts(self.parts, self.text_encoders, names)
