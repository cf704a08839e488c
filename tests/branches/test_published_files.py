"""The published files: our configurations have their sizes; our names, and those of the tiny models, are theirs."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, FluxTransformer2DModel, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from tests.helpers.families import FAMILIES, Family, original_tensors
from tests.helpers.tiny import bfl_tensors, sgm_tensors
from trainer.branches import flux1_keys
from trainer.config.branch_file import detections
from trainer.library.detect import branch_of_file
from trainer.library.header import Header
from trainer.settings import Settings

Shapes = dict[str, tuple[int, ...]]
KINDS: dict[str, Any] = {
    "UNet2DConditionModel": UNet2DConditionModel.from_config,
    "FluxTransformer2DModel": FluxTransformer2DModel.from_config,
    "AutoencoderKL": AutoencoderKL.from_config,
    "CLIPTextModel": lambda config: CLIPTextModel(CLIPTextConfig(**config)),
    "CLIPTextModelWithProjection": lambda config: CLIPTextModelWithProjection(CLIPTextConfig(**config)),
    "T5EncoderModel": lambda config: T5EncoderModel(T5Config(**config)),
}
WEIGHTS = {
    "sd15": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "sdxl1": {
        "unet": 2_567_463_684,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
    },
    "flux1": {
        "transformer": 11_901_408_320,
        "vae": 83_819_683,
        "text_encoder": 123_060_480,
        "text_encoder_2": 4_762_310_656,
    },
}
COUNTS = {  # how many tensors have a prefix
    "sd15": {"model.": 686, "first_stage_model.": 248, "cond_stage_model.": 196},
    "sdxl1": {
        "model.": 1680,
        "first_stage_model.": 248,
        "conditioner.embedders.0.": 196,
        "conditioner.embedders.1.": 389,
    },
    "flux1": {"": 780},
}
PUBLISHED: dict[str, dict[str, tuple[int, ...]]] = {
    "sd15": {  # v1-5-pruned-emaonly.safetensors, and its VAE below
        "model.diffusion_model.time_embed.0.weight": (1280, 320),
        "model.diffusion_model.time_embed.2.weight": (1280, 1280),
        "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
        "model.diffusion_model.input_blocks.1.1.proj_in.weight": (320, 320, 1, 1),
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
        "model.diffusion_model.input_blocks.3.0.op.weight": (320, 320, 3, 3),
        "model.diffusion_model.input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
        "model.diffusion_model.input_blocks.8.1.proj_out.weight": (1280, 1280, 1, 1),
        "model.diffusion_model.input_blocks.11.0.out_layers.3.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.middle_block.1.norm.weight": (1280,),
        "model.diffusion_model.middle_block.1.transformer_blocks.0.ff.net.0.proj.weight": (10240, 1280),
        "model.diffusion_model.middle_block.2.emb_layers.1.bias": (1280,),
        "model.diffusion_model.output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.11.0.skip_connection.weight": (320, 640, 1, 1),
        "model.diffusion_model.output_blocks.11.0.in_layers.0.weight": (640,),
        "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.ff.net.0.proj.weight": (2560, 320),
        "model.diffusion_model.out.0.weight": (320,),
        "model.diffusion_model.out.2.weight": (4, 320, 3, 3),
        "cond_stage_model.transformer.text_model.final_layer_norm.weight": (768,),
        "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": (49408, 768),
        "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight": (77, 768),
        "cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc1.weight": (3072, 768),
    },
    "sdxl1": {  # sd_xl_base_1.0.safetensors, and its VAE below
        "model.diffusion_model.time_embed.0.weight": (1280, 320),
        "model.diffusion_model.label_emb.0.0.weight": (1280, 2816),
        "model.diffusion_model.label_emb.0.2.weight": (1280, 1280),
        "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
        "model.diffusion_model.input_blocks.3.0.op.weight": (320, 320, 3, 3),
        "model.diffusion_model.input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
        "model.diffusion_model.input_blocks.4.1.proj_in.weight": (640, 640),
        "model.diffusion_model.input_blocks.5.1.transformer_blocks.1.attn2.to_k.weight": (640, 2048),
        "model.diffusion_model.input_blocks.6.0.op.weight": (640, 640, 3, 3),
        "model.diffusion_model.input_blocks.8.1.transformer_blocks.9.attn2.to_v.weight": (1280, 2048),
        "model.diffusion_model.input_blocks.8.1.transformer_blocks.9.ff.net.0.proj.weight": (10240, 1280),
        "model.diffusion_model.middle_block.1.transformer_blocks.9.norm3.bias": (1280,),
        "model.diffusion_model.middle_block.1.transformer_blocks.9.attn2.to_v.weight": (1280, 2048),
        "model.diffusion_model.output_blocks.2.2.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.5.1.transformer_blocks.1.ff.net.2.weight": (640, 2560),
        "model.diffusion_model.output_blocks.5.2.conv.weight": (640, 640, 3, 3),
        "model.diffusion_model.output_blocks.8.0.skip_connection.weight": (320, 640, 1, 1),
        "model.diffusion_model.out.2.weight": (4, 320, 3, 3),
        "model.diffusion_model.out.2.bias": (4,),
        "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight": (49408, 768),
        "conditioner.embedders.0.transformer.text_model.encoder.layers.11.mlp.fc1.weight": (3072, 768),
        "conditioner.embedders.1.model.positional_embedding": (77, 1280),
        "conditioner.embedders.1.model.text_projection": (1280, 1280),
        "conditioner.embedders.1.model.token_embedding.weight": (49408, 1280),
        "conditioner.embedders.1.model.ln_final.bias": (1280,),
        "conditioner.embedders.1.model.transformer.resblocks.0.ln_2.weight": (1280,),
        "conditioner.embedders.1.model.transformer.resblocks.0.mlp.c_fc.weight": (5120, 1280),
        "conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_weight": (3840, 1280),
        "conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_bias": (3840,),
        "conditioner.embedders.1.model.transformer.resblocks.31.mlp.c_fc.weight": (5120, 1280),
        "conditioner.embedders.1.model.transformer.resblocks.31.attn.out_proj.weight": (1280, 1280),
    },
    "flux1": {  # flux1-dev.safetensors
        "img_in.weight": (3072, 64),
        "txt_in.weight": (3072, 4096),
        "time_in.in_layer.weight": (3072, 256),
        "vector_in.in_layer.weight": (3072, 768),
        "guidance_in.out_layer.bias": (3072,),
        "double_blocks.18.img_attn.qkv.weight": (9216, 3072),
        "double_blocks.18.img_attn.norm.query_norm.scale": (128,),
        "double_blocks.18.txt_attn.proj.weight": (3072, 3072),
        "double_blocks.18.txt_mlp.0.weight": (12288, 3072),
        "double_blocks.18.img_mod.lin.weight": (18432, 3072),
        "single_blocks.37.linear1.weight": (21504, 3072),
        "single_blocks.37.linear2.weight": (3072, 15360),
        "single_blocks.37.modulation.lin.weight": (9216, 3072),
        "single_blocks.37.norm.key_norm.scale": (128,),
        "final_layer.linear.weight": (64, 3072),
        "final_layer.adaLN_modulation.1.weight": (6144, 3072),
    },
}
PUBLISHED_VAE: dict[str, tuple[int, ...]] = {  # of SD 1.5 and of SDXL
    "encoder.conv_in.weight": (128, 3, 3, 3),
    "encoder.down.0.downsample.conv.weight": (128, 128, 3, 3),
    "encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
    "encoder.down.2.downsample.conv.weight": (512, 512, 3, 3),
    "encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
    "encoder.mid.attn_1.proj_out.weight": (512, 512, 1, 1),
    "encoder.norm_out.weight": (512,),
    "decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
    "decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
    "decoder.mid.block_2.conv2.weight": (512, 512, 3, 3),
    "decoder.up.0.block.2.conv1.weight": (128, 128, 3, 3),
    "quant_conv.weight": (8, 8, 1, 1),
}


@pytest.fixture
def full_size(family: Family, kept: dict[tuple[str, str], Any]) -> dict[str, nn.Module]:
    """The modules that our configuration describes, without memory for their weights. Read only."""
    if ("full size", family.name) not in kept:
        config = family.module.CONFIG
        kinds = {part: config["model_index.json"][part][1] for part in family.parts}
        with torch.device("meta"):
            modules = {part: KINDS[kind](config[f"{part}/config.json"]) for part, kind in kinds.items()}
        kept["full size", family.name] = modules
    return kept["full size", family.name]


def shapes_of(tensors: dict[str, Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def test_our_configuration_is_as_large_as_the_published_model(family: Family, full_size: dict[str, nn.Module]) -> None:
    counted = {part: sum(p.numel() for p in module.parameters()) for part, module in full_size.items()}
    assert counted == WEIGHTS[family.name]


def written_by_branch(family: Family, full_size: dict[str, nn.Module]) -> dict[str, Tensor]:
    """By the code that writes a checkpoint's file, which asks a branch for its modules alone."""
    pipeline = SimpleNamespace(**full_size)
    branch = SimpleNamespace(denoiser=full_size["unet"], vae=full_size["vae"], pipeline=pipeline)
    return dict(family.branch.original_weights(branch))


def written_for_tests(family: Family, full_size: dict[str, nn.Module]) -> dict[str, Tensor]:
    """By the code of the tests that writes the tiny files."""
    return original_tensors(family.name, full_size)


@pytest.mark.parametrize(
    ("family", "write"),
    [(name, written_for_tests) for name in FAMILIES] + [(name, written_by_branch) for name in ("sd15", "sdxl1")],
    indirect=["family"],
)
def test_a_written_file_has_the_names_and_shapes_of_the_published_one(
    family: Family, full_size: dict[str, nn.Module], write: Callable[..., dict[str, Tensor]]
) -> None:
    shapes, published = shapes_of(write(family, full_size)), PUBLISHED[family.name]
    if family.name != "flux1":
        published = published | {f"first_stage_model.{name}": shape for name, shape in PUBLISHED_VAE.items()}
    assert {name: shapes.get(name) for name in published} == published
    counts = COUNTS[family.name]
    assert {prefix: sum(name.startswith(prefix) for name in shapes) for prefix in counts} == counts
    assert sum(counts.values()) == len(shapes)


@pytest.mark.parametrize("family", ["sdxl1"], indirect=True)
def test_sdxl_has_two_transformer_blocks_where_it_is_640_wide_and_ten_where_it_is_1280(
    family: Family, full_size: dict[str, nn.Module]
) -> None:
    names = sgm_tensors(**full_size)
    found = [re.match(r"model\.diffusion_model\.(\w+\.\d+)\..*transformer_blocks\.(\d+)\.", name) for name in names]
    depths: dict[str, int] = {}
    for one in filter(None, found):
        depths[one[1]] = max(depths.get(one[1], 0), int(one[2]) + 1)
    two, ten = ("input_blocks.4", "input_blocks.5"), ("input_blocks.7", "input_blocks.8", "middle_block.1")
    two += tuple(f"output_blocks.{n}" for n in (3, 4, 5))
    ten += tuple(f"output_blocks.{n}" for n in (0, 1, 2))
    assert depths == dict.fromkeys(two, 2) | dict.fromkeys(ten, 10)


@pytest.mark.parametrize("family", ["flux1"], indirect=True)
def test_the_reader_knows_every_name_of_the_published_flux_file(
    family: Family, full_size: dict[str, nn.Module]
) -> None:
    transformer = full_size["transformer"]
    state, expected = transformer.state_dict(), bfl_tensors(transformer)
    shapes: Shapes = {}
    read: list[str] = []
    for original, layers in flux1_keys.original_layers(transformer):
        for kind in ("weight", "bias"):
            parts = [f"{layer}.{kind}" for layer in layers]
            shapes[f"{original}.{kind}"] = (sum(len(state[part]) for part in parts), *state[parts[0]].shape[1:])
            read += parts
    for original, name in flux1_keys.original_scales(transformer):
        shapes[original] = tuple(state[name].shape)
        read.append(name)
    assert shapes == shapes_of(expected)
    assert sorted(read) == sorted(state)  # each weight of ours once


@pytest.mark.parametrize("family", ["sd15", "sdxl1"], indirect=True)
def test_our_noise_schedule_is_the_published_one(family: Family) -> None:
    alphas_bar = DDPMScheduler.from_config(family.module.CONFIG["scheduler/scheduler_config.json"]).alphas_cumprod
    sigmas = ((1 - alphas_bar) / alphas_bar).sqrt()
    # The ends that every k-diffusion user knows.
    assert (sigmas[0].item(), sigmas[-1].item()) == (pytest.approx(0.0292, abs=1e-4), pytest.approx(14.6146, abs=1e-4))


@pytest.mark.parametrize("branch", PUBLISHED)
def test_a_file_with_the_published_keys_is_of_its_family(settings: Settings, branch: str) -> None:
    vae = {} if branch == "flux1" else {f"first_stage_model.{key}": shape for key, shape in PUBLISHED_VAE.items()}
    first = {"double_blocks.0.img_attn.qkv.weight": (9216, 3072)} if branch == "flux1" else {}
    first |= {"conditioner.embedders.1.model.ln_final.weight": (1280,)} if branch == "sdxl1" else {}
    shapes = {key: list(shape) for key, shape in (PUBLISHED[branch] | vae | first).items()}
    header = Header(shapes, {}, dict.fromkeys(shapes, "F16"))
    assert branch_of_file(header, detections(settings.presets)) == branch
