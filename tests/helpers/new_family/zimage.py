"""Z-Image: a rectified-flow transformer over 8x smaller latents, in which text and picture are one sequence.

Its text encoder is Qwen3. Texts have no padding: the transformer takes a list of texts of different lengths.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import ZImagePipeline
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen3Model

from trainer.branches import loading
from trainer.branches.objectives import logit_normal, masked_mean
from trainer.branches.protocol import Task
from trainer.branches.single_file_keys import module_weights, stacked, stacked_adapters
from trainer.config.train_config import TrainConfig
from trainer.library.bases import Base

ATTENTION = ["attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0"]
FEED_FORWARD = ["feed_forward.w1", "feed_forward.w2", "feed_forward.w3"]
# diffusers' names -> those of the original release, which has one layer for queries, keys and values.
ORIGINAL_NAMES = {
    r"^all_(final_layer|x_embedder)\.2-1\b": r"\1",
    r"\.attention\.to_[qkv]\b": ".attention.qkv",
    r"\.attention\.to_out\.0\b": ".attention.out",
    r"\.attention\.norm_([qk])\b": r".attention.\1_norm",
}


def load(base: Base, device: torch.device, cache: Path, dtype: torch.dtype | None = None) -> ZImage:
    """Load from a diffusers folder.

    Raises OSError where files are missing, ValueError where their content does not fit the family.
    """
    assert base.path is not None, "load_branch fetches what is not here"
    dtype = dtype or loading.compute_dtype(device)
    source = {
        "pretrained_model_name_or_path": base.path,
        "local_files_only": True,
        "use_safetensors": True,
        "variant": base.variant,
    }
    with loading.loading_errors(base):
        encoder = loading.read_text_encoder(Qwen3Model, "text_encoder", dtype, source)
        pipeline = ZImagePipeline.from_pretrained(
            **source, dtype={"vae": torch.float32, "default": dtype}, text_encoder=encoder
        )
    loading.finish(base, pipeline)
    return ZImage(pipeline, device, dtype)


class ZImage:
    """The modules of one base, ready to train and to render."""

    token_encoders = ()  # new words are for CLIP
    denoiser_name = "transformer"
    reads_kohya = True
    whole_file = False
    kohya_encoders = {"text_encoder": "lora_te"}  # noqa: RUF012
    control_nets = ()
    metadata = {  # noqa: RUF012
        "modelspec.architecture": "z-image",
        "ss_base_model_version": "zimage",
        "ss_network_module": "networks.lora_zimage",
        "ss_timestep_sampling": "sigmoid",
    }

    def __init__(self, pipeline: Any, device: torch.device, dtype: torch.dtype) -> None:
        self.pipeline = self.parts = pipeline
        self.device = device
        self.dtype = dtype
        self.denoiser: nn.Module = pipeline.transformer
        self.text_encoders: dict[str, nn.Module] = {"text_encoder": pipeline.text_encoder}
        self.vae: nn.Module = pipeline.vae
        self.latent_scale: int = pipeline.vae_scale_factor
        self.size_multiple = 2 * self.latent_scale  # a token is a patch of two by two latents
        layers = [f"layers.{number}" for number in range(pipeline.transformer.config.n_layers)]
        texts = [f"context_refiner.{number}" for number in range(pipeline.transformer.config.n_refiner_layers)]
        self.lora_targets = {
            # Text and picture share all other keys and values.
            "cross_attention": [f"{block}.{end}" for block in texts for end in ("attention.to_k", "attention.to_v")],
            "attention": [f"{block}.{end}" for block in layers for end in ATTENTION],
            "all": [f"{block}.{end}" for block in layers for end in [*ATTENTION, *FEED_FORWARD]],
        }

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels (B, 3, H, W) in [-1, 1] -> mean and deviation of the latents, each (B, C, H/f, W/f), scaled."""
        return loading.encode_pixels(self.vae, pixels, self.device)

    def encode_prompts(self, captions: list[str]) -> dict[str, Tensor]:
        """B captions -> {"texts": (B, L, D), "lengths": (B,)}; L is the longest, at most 512 tokens."""
        with loading.autocast(self.device, self.dtype):
            texts, _ = self.parts.encode_prompt(list(captions), self.device, do_classifier_free_guidance=False)
        lengths = torch.tensor([len(text) for text in texts], device=self.device)
        return {"texts": pad_sequence(texts, batch_first=True), "lengths": lengths}

    def encode_size(self, original: tuple[int, int], crop: tuple[int, int], size: tuple[int, int]) -> dict[str, Tensor]:
        return {}

    def draw(self, latents: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Noise like latents (B, C, H/f, W/f), and times (B,) in (0, 1): 1 is all noise."""
        noise = torch.randn(latents.shape, generator=generator, device=latents.device)
        return noise, logit_normal(len(latents), generator)

    def loss(
        self,
        latents: Tensor,
        cond: dict[str, Tensor],
        noise: Tensor,
        timesteps: Tensor,
        config: TrainConfig,
        weight: Tensor | None = None,
    ) -> Tensor:
        """Squared error of the velocity noise - latents (rectified flow; Liu et al. 2022, arXiv 2209.03003), (B,).

        The transformer counts time from noise to picture, and predicts the velocity in that direction.
        """
        times = timesteps.view(-1, 1, 1, 1)
        noisy = ((1 - times) * latents + times * noise).to(self.dtype)
        with loading.autocast(self.device, self.dtype):
            frames = list(noisy.unsqueeze(2).unbind())  # (C, 1, H, W) each
            predicted = self.denoiser(frames, 1 - timesteps, unpadded(cond), return_dict=False)[0]
        velocity = -torch.stack(predicted).squeeze(2).float()
        return masked_mean((velocity - (noise - latents)) ** 2, weight)

    def prompt_inputs(self, cond: dict[str, Tensor], empty: dict[str, Tensor]) -> dict[str, Any]:
        return {"prompt_embeds": unpadded(cond), "negative_prompt_embeds": unpadded(empty)}

    def encode_for_pipeline(self, text: str, negative: str | None) -> dict[str, Any]:
        """A prompt as the stock pipeline encodes it: keyword arguments of it, batch 1."""
        said, unsaid = self.pipeline.encode_prompt(text, self.pipeline._execution_device, True, negative)
        return {"prompt_embeds": said, "negative_prompt_embeds": unsaid}

    def task_pipeline(self, task: Task) -> tuple[Any, frozenset[str]]:
        return loading.task_pipeline(self.pipeline, task)

    def preview_latents(self, latents: Tensor, size: tuple[int, int]) -> Tensor:
        return latents[:1]

    def original_weights(self) -> dict[str, Tensor]:
        """Of the transformer alone, as in the published file."""
        ours = module_weights(self.denoiser)
        return {theirs: stacked([ours[name] for name in names]) for theirs, names in original_keys(ours).items()}

    def kohya_layers(self, adapters: dict[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor, int]]:
        layers = [key.removesuffix(".weight") for key in module_weights(self.denoiser) if key.endswith(".weight")]
        return stacked_adapters(self.denoiser, original_keys(layers).items(), adapters)

    def load_weights(self, file: Path, cache: Path) -> None:
        ours = module_weights(self.denoiser)
        with safe_open(file, "pt") as tensors, torch.no_grad():
            there = set(tensors.keys())
            loading.refuse_gaps(original_keys(ours).keys() - there)
            for theirs, names in original_keys(ours).items():
                for name, part in zip(names, tensors.get_tensor(theirs).chunk(len(names)), strict=True):
                    ours[name].copy_(part)  # the modules' own memory

    def keep_text_encoders(self, names: Collection[str]) -> None:
        self.text_encoders = loading.keep_parts(self.parts, self.text_encoders, names)


def unpadded(cond: dict[str, Tensor]) -> list[Tensor]:
    """The texts of `encode_prompts` as the transformer takes them: (L, D) each."""
    return [text[:length] for text, length in zip(cond["texts"], cond["lengths"].tolist(), strict=True)]


def original_keys(names: Iterable[str]) -> dict[str, list[str]]:
    """Each name of the original release -> those of diffusers that are stacked in it, in the order of the modules."""
    found: dict[str, list[str]] = {}
    for name in names:
        theirs = name
        for pattern, original in ORIGINAL_NAMES.items():
            theirs = re.sub(pattern, original, theirs)
        found.setdefault(theirs, []).append(name)
    return found
