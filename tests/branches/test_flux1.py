"""What is true of branch flux1 alone: its transformer is read by itself and late, and its latents are packed. What it
shares with the other families: test_families.py."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.helpers.families import CPU, FAMILIES, Family
from trainer.branches import flux1
from trainer.library.models_folder import sidecar


@pytest.fixture
def family() -> Family:
    return FAMILIES["flux1"]


# The transformer


def test_a_file_with_the_original_prefix_or_without_has_the_same_transformer(
    family: Family, file: Path, tmp_path: Path
) -> None:
    expected = family.load_lazily(file, tmp_path).denoiser.state_dict()
    save_file({f"model.diffusion_model.{name}": tensor for name, tensor in load_file(file).items()}, file)
    got = family.load_lazily(file, tmp_path).denoiser.state_dict()
    assert [name for name in expected if not torch.equal(got[name], expected[name])] == []


def test_a_file_without_guidance_makes_a_model_without_it(family: Family, file: Path, tmp_path: Path) -> None:
    assert family.load_lazily(file, tmp_path).denoiser.config.guidance_embeds is True
    save_file({name: tensor for name, tensor in load_file(file).items() if "guidance_in" not in name}, file)
    assert family.load_lazily(file, tmp_path).denoiser.config.guidance_embeds is False


@pytest.mark.parametrize("kind", ["folder", "file", "whole"])
def test_the_transformer_is_read_only_when_it_is_asked_for(
    family: Family, request: pytest.FixtureRequest, tmp_path: Path, kind: str
) -> None:
    branch = family.load_lazily(request.getfixturevalue(kind), tmp_path)
    branch.encode_prompts(["a dog"])
    branch.encode_images(torch.zeros(1, 3, 32, 32))
    branch.keep_text_encoders(())
    assert branch.parts.transformer is None
    assert branch.parts.text_encoder is None and branch.parts.text_encoder_2 is None
    assert branch.text_encoders == {}
    assert branch.denoiser is branch.denoiser is branch.parts.transformer is branch.pipeline.transformer


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("double_blocks.1.img_attn.qkv.weight", "3 weights are missing"),  # of diffusers' layers
        ("single_blocks.0.linear1.bias", "4 weights are missing"),
        ("single_blocks.1.norm.key_norm.scale", "1 weights are missing"),
        ("final_layer.adaLN_modulation.1.weight", "1 weights are missing"),
    ],
)
@pytest.mark.parametrize("kind", ["file", "whole"])
def test_a_file_with_a_weight_missing_is_refused(
    family: Family, request: pytest.FixtureRequest, tmp_path: Path, kind: str, key: str, reason: str
) -> None:
    file = request.getfixturevalue(kind)
    tensors = load_file(file)
    del tensors[key if kind == "file" else f"model.diffusion_model.{key}"]
    save_file(tensors, file)
    branch = family.load_lazily(file, tmp_path)
    with pytest.raises(ValueError, match=rf"{file.name}.*{reason}"):
        _ = branch.denoiser


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda qkv: {"": qkv[:-3].contiguous()}, "45 rows, not 48"),
        (lambda qkv: {"": qkv[:, :-1].contiguous()}, "size mismatch"),
        (lambda qkv: {"": qkv, ".absmax": torch.zeros(16), ".quant_map": torch.zeros(16)}, "quantized as bitsandbytes"),
        (lambda qkv: {"": qkv, ".quant_state.bitsandbytes__nf4": torch.zeros(9)}, "quantized as bitsandbytes"),
        (lambda qkv: {"": qkv, ".lora_A": torch.zeros(9)}, "1 tensors are unknown, double_blocks"),
    ],
)
def test_a_file_with_misshapen_or_quantised_weights_is_refused(
    family: Family, file: Path, tmp_path: Path, change: Callable[[Tensor], dict[str, Tensor]], reason: str
) -> None:
    key, tensors = "double_blocks.1.img_attn.qkv.weight", load_file(file)
    qkv = tensors.pop(key)
    save_file(tensors | {f"{key}{end}": tensor for end, tensor in change(qkv).items()}, file)
    branch = family.load_lazily(file, tmp_path)
    with pytest.raises(ValueError, match=re.compile(rf"file\.safetensors cannot be loaded: .*{reason}", re.DOTALL)):
        _ = branch.denoiser


@pytest.mark.parametrize("tokenizer", ["tokenizer", "tokenizer_2"])
def test_a_file_whose_sidecar_has_no_vocabulary_is_refused(
    family: Family, file: Path, tmp_path: Path, tokenizer: str
) -> None:
    for part in (sidecar(file) / tokenizer).iterdir():
        if part.name != "tokenizer_config.json":  # which only says how to use it
            part.unlink()
    with pytest.raises(OSError, match=rf"has no vocabulary in {tokenizer}/"):
        family.load_lazily(file, tmp_path)


# What goes into it


def test_the_model_is_told_no_sizes(loaded: Any) -> None:
    assert loaded.encode_size((64, 64), (0, 0), (64, 64)) == {}


@pytest.mark.parametrize(("height", "width"), [(6, 10), (8, 8), (2, 4)])
def test_latents_are_packed_as_the_pipeline_does(height: int, width: int) -> None:
    latents = torch.randn(2, 4, height, width)
    packed = flux1.pack(latents)
    assert torch.equal(packed, FluxPipeline._pack_latents(latents, 2, 4, height, width))
    assert torch.equal(flux1.unpack(packed, height, width), latents)
    assert torch.equal(FluxPipeline._unpack_latents(packed, 8 * height, 8 * width, 8), latents)
    theirs = FluxPipeline._prepare_latent_image_ids(2, height // 2, width // 2, CPU, torch.float32)
    assert torch.equal(flux1.image_ids(height, width, CPU), theirs)
