"""Shared code of the families with diffusers' UNet: layers for adapters, ControlNets, noise schedule."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, ControlNetUnionModel, DDPMScheduler
from torch import Tensor, nn

from trainer.branches import loading
from trainer.branches.protocol import ControlNet, Task
from trainer.branches.single_file_keys import unet_weights, vae_weights
from trainer.library.models_folder import sidecar
from trainer.library.prediction import check_scheduler, read_prediction

SCHEDULER = "scheduler/scheduler_config.json"
ZERO_SNR_SCHEDULER = "EulerDiscreteScheduler"  # PNDM knows no schedule that ends in pure noise

# Linear layers that every family with such a UNet trains.
UNET_TARGETS = {
    "cross_attention": ["attn2.to_k", "attn2.to_v"],
    "attention": ["to_q", "to_k", "to_v", "to_out.0"],
    "all": ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"],
}
SHARED = ("in_channels", "block_out_channels", "down_block_types", "layers_per_block", "cross_attention_dim",
          "encoder_hid_dim", "addition_embed_type")  # fmt: skip
# From the model card of xinsir/controlnet-union-sdxl-1.0; tile: only in the larger `promax`.
UNION_MODES = {"pose": 0, "depth": 1, "canny": 3, "lineart": 3, "tile": 6}


def control_net(pipelines: Mapping[Task, Any]) -> ControlNet:
    """Control models of a UNet for one kind. pipelines: the family's, with such a model."""
    return ControlNet(ControlNetModel, ("ControlNetModel",), pipelines, SHARED, text_argument="image")


def union_control_net(pipelines: Mapping[Task, Any]) -> ControlNet:
    """Control models of a UNet for several kinds."""
    return ControlNet(
        ControlNetUnionModel,
        ("ControlNetUnionModel", "ControlNetModel_Union"),  # the second is xinsir's own code
        pipelines,
        SHARED,
        key="task_embedding",  # xinsir's config.json does not name it
        modes=UNION_MODES,
        mode_count="num_control_type",
    )


def size_multiple(pipeline: Any) -> int:
    """Pixels; sides of training pictures are multiples. All blocks of the UNet except the last halve the size."""
    multiple: int = pipeline.vae_scale_factor * 2 ** (len(pipeline.unet.config.block_out_channels) - 1)
    return multiple


def preview_latents(_branch: object, latents: Tensor, _size: tuple[int, int]) -> Tensor:
    """See `Branch.preview_latents`; the tiny decoder takes the latents of a UNet as they are."""
    return latents[:1]


def original_weights(denoiser: nn.Module, vae: nn.Module) -> dict[str, dict[str, Tensor]]:
    """UNet and VAE under the prefixes and keys of the original releases."""
    return {"model.diffusion_model.": unet_weights(denoiser), "first_stage_model.": vae_weights(vae)}


def single_file_config(file: Path, cache: Path, family: loading.Configs) -> Path:
    """`loading.single_file_config`, with the scheduler that fits what the file's UNet predicts.

    A scheduler in the sidecar comes first.
    """
    prediction = read_prediction(file)
    scheduler = dict(family[SCHEDULER])
    if prediction.velocity:
        scheduler["prediction_type"] = "v_prediction"
    if prediction.zero_snr:
        # The last step must be among those that are drawn: arXiv 2305.08891, section 3.3.
        scheduler |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        scheduler["_class_name"] = ZERO_SNR_SCHEDULER
    folder = loading.single_file_config(file, cache, {**family, SCHEDULER: scheduler})
    if prediction.zero_snr and not (sidecar(file) / SCHEDULER).exists():
        index = folder / "model_index.json"  # the sidecar's, if it has one
        index.write_text(json.dumps(json.loads(index.read_text()) | {"scheduler": ["diffusers", ZERO_SNR_SCHEDULER]}))
    return folder


def noise_scheduler(pipeline: Any, device: torch.device) -> DDPMScheduler:
    """The noise schedule of the base's training, on the device. Raises ValueError for one that is not supported."""
    check_scheduler(pipeline.scheduler.config)
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(device)
    return scheduler


def metadata(architecture: str, version: str, scheduler: DDPMScheduler) -> dict[str, str]:
    """Metadata about the family for model files. architecture: modelspec's name; version: kohya's name."""
    return {
        "modelspec.architecture": architecture,
        "modelspec.prediction_type": "v" if scheduler.config.prediction_type == "v_prediction" else "epsilon",
        "ss_base_model_version": version,
        "ss_network_module": "networks.lora",
    }
