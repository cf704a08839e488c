"""What the families with diffusers' UNet have in common: layers that adapters lie on, ControlNets, noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import ControlNetModel, ControlNetUnionModel, DDPMScheduler

from trainer.branches.protocol import ControlNet, Task

# Linear layers; every family that has such a UNet trains these.
UNET_TARGETS = {
    "cross_attention": ["attn2.to_k", "attn2.to_v"],
    "attention": ["to_q", "to_k", "to_v", "to_out.0"],
    "all": ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"],
}
SHARED = ("in_channels", "block_out_channels", "down_block_types", "layers_per_block", "cross_attention_dim",
          "encoder_hid_dim", "addition_embed_type")  # fmt: skip
# Of xinsir/controlnet-union-sdxl-1.0, by its model card; tile: only the larger `promax`.
UNION_MODES = {"pose": 0, "depth": 1, "canny": 3, "lineart": 3, "tile": 6}


def control_net(pipelines: Mapping[Task, Any]) -> ControlNet:
    """The control models of a UNet that are for one kind. pipelines: the family's, with such a model."""
    return ControlNet(ControlNetModel, ("ControlNetModel",), pipelines, SHARED, text_argument="image")


def union_control_net(pipelines: Mapping[Task, Any]) -> ControlNet:
    """Those that know several kinds."""
    return ControlNet(
        ControlNetUnionModel,
        ("ControlNetUnionModel", "ControlNetModel_Union"),  # the second is xinsir's own code
        pipelines,
        SHARED,
        key="task_embedding",  # xinsir's config.json does not tell
        modes=UNION_MODES,
        mode_count="num_control_type",
    )


def size_multiple(pipeline: Any) -> int:
    """The sides of training pictures are multiples of this many pixels: each block of the UNet but the last halves."""
    multiple: int = pipeline.vae_scale_factor * 2 ** (len(pipeline.unet.config.block_out_channels) - 1)
    return multiple


def noise_scheduler(pipeline: Any, device: torch.device) -> DDPMScheduler:
    """The noise schedule that the base was trained with, on the device."""
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(device)
    return scheduler


def metadata(architecture: str, version: str, scheduler: DDPMScheduler) -> dict[str, str]:
    """What a model file says of its family. architecture: as modelspec names it; version: as kohya's trainer does."""
    return {
        "modelspec.architecture": architecture,
        "modelspec.prediction_type": "v" if scheduler.config.prediction_type == "v_prediction" else "epsilon",
        "ss_base_model_version": version,
        "ss_network_module": "networks.lora",
    }
