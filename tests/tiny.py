"""Tiny random models with the layout of the real ones, made offline; the same ones from the same seed."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from trainer.branches.fast import vocabulary, write_tokenizer


def make_tiny_sd15(folder: Path, seed: int = 0, blocks: int = 4, layers: int = 2) -> Path:
    """Write a Stable Diffusion 1.5 of about 0.3 M weights as a diffusers folder: all blocks of the real one, but thin.

    At 64 pixels its 8x8 latents are one in the middle block. With fewer `blocks` and `layers` a step takes less time,
    and the layout is no longer that of the real one.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16, 16, 16)[:blocks],
            down_block_types=("CrossAttnDownBlock2D",) * (blocks - 1) + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (blocks - 1),
            layers_per_block=layers,
            norm_num_groups=4,
            attention_head_dim=2,
            cross_attention_dim=16,
        )
        vae = AutoencoderKL(
            sample_size=64,
            block_out_channels=(8, 8, 16, 16)[:blocks],
            down_block_types=("DownEncoderBlock2D",) * blocks,
            up_block_types=("UpDecoderBlock2D",) * blocks,
            layers_per_block=layers,
            norm_num_groups=4,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(vocabulary()),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=77,
                projection_dim=16,
                bos_token_id=0,
                eos_token_id=1,
                pad_token_id=1,
            )
        )
    write_tokenizer(folder / "tokenizer")
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=unet,
        scheduler=PNDMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, skip_prk_steps=True, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def write_single_file(folder: Path, file: Path) -> Path:
    """Write a diffusers folder of SD 1.5 as one file with the keys of the original release, and its sidecar folder."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True, safety_checker=None)
    tensors = ldm_tensors(pipeline.unet, pipeline.vae, pipeline.text_encoder)
    # The published files hold these too; they are no weights, and a loader must not stumble over them.
    tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    tensors["alphas_cumprod"] = pipeline.scheduler.alphas_cumprod
    save_file({key: value.contiguous() for key, value in tensors.items()}, file)
    shutil.copytree(folder, file.with_suffix(""), ignore=shutil.ignore_patterns("*.safetensors"))
    return file


def ldm_tensors(unet: nn.Module, vae: nn.Module, text_encoder: nn.Module) -> dict[str, Tensor]:
    """All weights under the names that CompVis gave them (v1-inference.yaml), in the shapes that they have there."""
    tensors = {f"model.diffusion_model.{ldm_unet_key(key)}": value for key, value in unet.state_dict().items()}
    for key, value in vae.state_dict().items():
        name = ldm_vae_key(key)
        if ".attn_1." in name and name.endswith(".weight") and value.ndim == 2:
            value = value[:, :, None, None]  # 1x1 convolutions there, linear layers here
        tensors[f"first_stage_model.{name}"] = value
    for key, value in text_encoder.state_dict().items():
        # transformers 5 dropped the prefix that all published files have.
        tensors[f"cond_stage_model.transformer.text_model.{key.removeprefix('text_model.')}"] = value
    return tensors


# CompVis counts the layers of all blocks in one row: each entry has its resnet (0) and its attention (1). A downsampler
# is an entry of its own; an upsampler is the last part of the entry before it. The real model has two layers a block.
UNET_NAMES: list[tuple[str, Callable[..., str]]] = [
    (r"^conv_in", lambda: "input_blocks.0.0"),
    (r"^time_embedding\.linear_(\d)", lambda n: f"time_embed.{2 * n - 2}"),
    (r"^conv_norm_out", lambda: "out.0"),
    (r"^conv_out", lambda: "out.2"),
    (r"^down_blocks\.(\d)\.resnets\.(\d)", lambda block, layer: f"input_blocks.{1 + 3 * block + layer}.0"),
    (r"^down_blocks\.(\d)\.attentions\.(\d)", lambda block, layer: f"input_blocks.{1 + 3 * block + layer}.1"),
    (r"^down_blocks\.(\d)\.downsamplers\.0\.conv", lambda block: f"input_blocks.{3 + 3 * block}.0.op"),
    (r"^mid_block\.resnets\.(\d)", lambda layer: f"middle_block.{2 * layer}"),
    (r"^mid_block\.attentions\.0", lambda: "middle_block.1"),
    (r"^up_blocks\.(\d)\.resnets\.(\d)", lambda block, layer: f"output_blocks.{3 * block + layer}.0"),
    (r"^up_blocks\.(\d)\.attentions\.(\d)", lambda block, layer: f"output_blocks.{3 * block + layer}.1"),
    (r"^up_blocks\.(\d)\.upsamplers\.0", lambda block: f"output_blocks.{3 * block + 2}.{2 if block else 1}"),
]
UNET_RESNET_NAMES: list[tuple[str, Callable[..., str]]] = [
    (r"\.norm1\.", lambda: ".in_layers.0."),
    (r"\.conv1\.", lambda: ".in_layers.2."),
    (r"\.time_emb_proj\.", lambda: ".emb_layers.1."),
    (r"\.norm2\.", lambda: ".out_layers.0."),
    (r"\.conv2\.", lambda: ".out_layers.3."),
    (r"\.conv_shortcut\.", lambda: ".skip_connection."),
]
# The decoder's blocks are counted from the output there.
VAE_NAMES: list[tuple[str, Callable[..., str]]] = [
    (r"conv_norm_out", lambda: "norm_out"),
    (r"down_blocks\.(\d)\.resnets\.(\d)", lambda block, layer: f"down.{block}.block.{layer}"),
    (r"down_blocks\.(\d)\.downsamplers\.0", lambda block: f"down.{block}.downsample"),
    (r"up_blocks\.(\d)\.resnets\.(\d)", lambda block, layer: f"up.{3 - block}.block.{layer}"),
    (r"up_blocks\.(\d)\.upsamplers\.0", lambda block: f"up.{3 - block}.upsample"),
    (r"mid_block\.resnets\.(\d)", lambda layer: f"mid.block_{layer + 1}"),
    (r"mid_block\.attentions\.0", lambda: "mid.attn_1"),
    (r"group_norm", lambda: "norm"),
    (r"to_out\.0", lambda: "proj_out"),
    (r"to_([qkv])", lambda letter: letter),
    (r"conv_shortcut", lambda: "nin_shortcut"),
]


def ldm_unet_key(key: str) -> str:
    """`down_blocks.1.resnets.0.conv1.weight` -> `input_blocks.4.0.in_layers.2.weight`."""
    # norm1 of a transformer block keeps its name, so that the resnets' names must be taken first.
    return renamed(renamed(key, UNET_RESNET_NAMES) if ".resnets." in key else key, UNET_NAMES)


def ldm_vae_key(key: str) -> str:
    """`decoder.up_blocks.0.resnets.1.conv1.weight` -> `decoder.up.3.block.1.conv1.weight`."""
    return renamed(key, VAE_NAMES)


def renamed(key: str, names: list[tuple[str, Callable[..., str]]]) -> str:
    """Apply each rule once; what a pattern captures is handed to its function, digits as numbers."""
    for pattern, name in names:
        if found := re.search(pattern, key):
            captured = [int(part) if part.isdigit() else part for part in found.groups()]
            key = key[: found.start()] + name(*captured) + key[found.end() :]
    return key
