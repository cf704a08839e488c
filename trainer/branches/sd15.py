"""Stable Diffusion 1.5: an epsilon- or v-predicting UNet over 8x smaller latents, one CLIP text encoder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from diffusers.loaders.single_file_utils import SingleFileComponentError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from trainer.bases import Base, sidecar
from trainer.files import whole_folder
from trainer.presets import TrainConfig


def load(base: Base, device: torch.device, cache: Path) -> SD15:
    """Load from a diffusers folder, a single file or a hub repository.

    Raises OSError where files are missing, ValueError where their content does not fit the family.
    """
    try:
        pipeline = read_file(base.path, cache) if base.path and base.path.is_file() else read_folder(base)
    except NotImplementedError as problem:  # diffusers moves a weight that it has not found in the file
        raise ValueError(f"{base.title} cannot be loaded: weights are missing from it") from problem
    except (RuntimeError, SafetensorError, SingleFileComponentError) as problem:
        raise ValueError(f"{base.title} cannot be loaded: {problem}") from problem
    for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        refuse_gaps(name for name, weight in module.named_parameters() if weight.is_meta)
    if len(pipeline.tokenizer) <= len(pipeline.tokenizer.all_special_tokens):
        # transformers makes a tokenizer that knows no word where it finds none, here or on the hub, and says nothing.
        raise OSError(f"{base.title} has no tokenizer/vocab.json")
    return SD15(pipeline, device)


def read_folder(base: Base) -> Any:
    """A diffusers folder here, or one from the hub."""
    source: dict[str, Any] = {
        "pretrained_model_name_or_path": base.path or base.repository,
        "local_files_only": base.path is not None,
        "use_safetensors": True,
    }
    # Loaded on its own, since the pipeline does not say which of its weights are missing and therefore random.
    encoder, facts = CLIPTextModel.from_pretrained(subfolder="text_encoder", output_loading_info=True, **source)
    refuse_gaps(facts["missing_keys"])
    return StableDiffusionPipeline.from_pretrained(
        **source, text_encoder=encoder, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


def read_file(file: Path, cache: Path) -> Any:
    """One file with the keys of the original release."""
    config = single_file_config(file, cache)
    options: dict[str, Any] = {"safety_checker": None, "feature_extractor": None}
    if not (config / "tokenizer").exists():
        options["tokenizer"] = CLIPTokenizer.from_pretrained("openai/clip-vit-large-patch14")
    return StableDiffusionPipeline.from_single_file(str(file), config=str(config), local_files_only=True, **options)


def refuse_gaps(missing: Iterable[str]) -> None:
    names = sorted(missing)
    if names:
        raise ValueError(f"{len(names)} weights are missing, {names[0]} among them")


class SD15:
    """The modules of one base, ready to train and to render."""

    def __init__(self, pipeline: Any, device: torch.device) -> None:
        # bf16 keeps the range of float32; cards without it, and the CPU, compute in float32.
        half = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        self.dtype = torch.bfloat16 if half else torch.float32
        pipeline.set_progress_bar_config(disable=True)
        self.pipeline = pipeline
        self.denoiser: nn.Module = pipeline.unet.to(device, self.dtype)
        self.text_encoders: dict[str, nn.Module] = {"text_encoder": pipeline.text_encoder.to(device, self.dtype)}
        self.vae = pipeline.vae.to(device, torch.float32)  # SD's VAE overflows in half precision
        self.latent_scale: int = pipeline.vae_scale_factor
        self.device = device
        self.noise_scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
        alphas_bar = self.noise_scheduler.alphas_cumprod.to(device)
        self.snr = alphas_bar / (1 - alphas_bar)
        for module in (self.denoiser, self.vae, *self.text_encoders.values()):
            # eval: dropout would draw from the global RNG, which a resume does not restore.
            module.requires_grad_(False).eval()

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels (B, 3, H, W) in [-1, 1] -> mean and deviation of the latents, each (B, 4, H/f, W/f), scaled."""
        posterior = self.vae.encode(pixels.to(self.device, self.vae.dtype)).latent_dist
        scale = self.vae.config.scaling_factor
        return posterior.mean * scale, posterior.std * scale

    def encode_prompts(self, captions: list[str]) -> dict[str, Tensor]:
        """B captions -> {"encoder_hidden_states": (B, 77, D)}. Longer captions are cut off, as the renderer does."""
        tokenizer = self.pipeline.tokenizer
        tokens = tokenizer(
            captions, padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
        )
        with self._autocast():
            hidden = self.text_encoders["text_encoder"](tokens.input_ids.to(self.device))[0]
        return {"encoder_hidden_states": hidden}

    def loss(
        self,
        latents: Tensor,
        cond: dict[str, Tensor],
        generator: torch.Generator,
        config: TrainConfig,
        weight: Tensor | None = None,
    ) -> Tensor:
        """Mean squared error against the noise (or the velocity), (B,).

        config.min_snr: gamma of min-SNR weighting (Hang et al. 2023, arXiv 2303.09556); 0 weighs all timesteps alike.
        weight: (B, 1, H/f, W/f), the mask; its mean should be 1 where the loss is to keep its size.
        """
        shape = latents.shape
        noise = torch.randn(shape, generator=generator, device=latents.device)
        timesteps = torch.randint(len(self.snr), (shape[0],), generator=generator, device=latents.device)
        noisy = self.noise_scheduler.add_noise(latents, noise, timesteps)
        with self._autocast():
            predicted = self.denoiser(noisy.to(self.dtype), timesteps, **cond, return_dict=False)[0]
        velocity = self.noise_scheduler.config.prediction_type == "v_prediction"
        target = self.noise_scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
        error = (predicted.float() - target) ** 2
        if weight is not None:
            error = error * weight
        loss: Tensor = error.mean(dim=(1, 2, 3))
        if config.min_snr:
            snr = self.snr[timesteps]
            loss = loss * snr.clamp(max=config.min_snr) / (snr + 1 if velocity else snr)
        return loss

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


def single_file_config(file: Path, cache: Path) -> Path:
    """The diffusers configuration that a single file is read with: the family's, overridden by the file's sidecar.

    Without it diffusers would ask the hub, and take full-size shapes for granted.
    """
    folder = cache / "configs" / f"{file.stem}-{file.stat().st_mtime_ns:x}"
    beside = sidecar(file)
    if folder.exists():
        shutil.rmtree(folder)  # the sidecar may have been edited; copying a few JSON files costs nothing
    with whole_folder(folder) as partial:
        for name, config in CONFIG.items():
            path = partial / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(config))
        if beside.is_dir():
            shutil.copytree(
                beside, partial, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors", "*.bin", "*.py")
            )
    return folder


# Published numbers of Stable Diffusion 1.5 (CompVis v1-inference.yaml) and of CLIP ViT-L/14's text tower.
CONFIG: dict[str, dict[str, Any]] = {
    "model_index.json": {
        "_class_name": "StableDiffusionPipeline",
        "requires_safety_checker": False,
        "scheduler": ["diffusers", "PNDMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    },
    "scheduler/scheduler_config.json": {
        "_class_name": "PNDMScheduler",
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "num_train_timesteps": 1000,
        "skip_prk_steps": True,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    },
    "text_encoder/config.json": {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "projection_dim": 768,
        "max_position_embeddings": 77,
        "vocab_size": 49408,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-05,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
        "pad_token_id": 1,
    },
    "unet/config.json": {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 64,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [320, 640, 1280, 1280],
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "layers_per_block": 2,
        "attention_head_dim": 8,
        "cross_attention_dim": 768,
    },
    "vae/config.json": {
        "_class_name": "AutoencoderKL",
        "sample_size": 512,
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "latent_channels": 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "scaling_factor": 0.18215,
    },
}
