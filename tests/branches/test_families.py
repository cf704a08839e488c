"""What every family does alike: what it loads, what it refuses, what it encodes. Their losses: test_objectives.py; the
names of their adapters: test_lora.py; the published files: test_published_files.py."""

from __future__ import annotations

import json
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.helpers.families import FAMILIES, REASONS, ROUNDING, Family, other_weights
from trainer.branches import loading
from trainer.library.models_folder import sidecar


def each(name: str, table: dict[str, Any]) -> pytest.MarkDecorator:
    """A test for each entry of the table FAMILY -> entries."""
    pairs = [(family, entry) for family, entries in table.items() for entry in entries]
    return pytest.mark.parametrize(("family", name), pairs, indirect=["family"])


@pytest.fixture
def empty_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that this machine may have in its own cache is found."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


# Loading


LAYOUTS = {"sd15": ("folder", "file"), "sdxl1": ("folder", "file"), "flux1": ("folder", "file", "whole")}


@each("layout", LAYOUTS)
@pytest.mark.usefixtures("empty_hub_cache")
def test_every_layout_has_the_very_same_weights_and_the_hub_is_not_asked(
    family: Family,
    layout: str,
    stock: Any,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def look_up(host: str, *_: object, **__: object) -> None:
        asked.append(host)
        raise socket.gaierror("there is no network in the tests")

    base = request.getfixturevalue(layout)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    pipeline = family.load(base, tmp_path).pipeline
    assert asked == []
    assert other_weights(pipeline, stock, family.parts) == []
    assert pipeline.scheduler.config == stock.scheduler.config
    for name in family.tokenizers:  # of SDXL's, the second one pads with another word
        ids = [getattr(one, name)("ohwx dog", padding="max_length").input_ids for one in (pipeline, stock)]
        assert ids[0] == ids[1]


@each("dtype", {"sd15": [torch.float16], "sdxl1": [torch.float16], "flux1": [torch.float16, torch.bfloat16]})
def test_a_half_precision_file_is_computed_in_full_precision_on_the_cpu(
    family: Family, whole: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    save_file({name: t.to(dtype) if t.is_floating_point() else t for name, t in load_file(whole).items()}, whole)
    pipeline = family.load(whole, tmp_path).pipeline
    assert {p.dtype for part in family.parts for p in getattr(pipeline, part).parameters()} == {torch.float32}


def test_a_loaded_base_is_frozen_and_draws_no_dropout(family: Family, loaded: Any) -> None:
    assert loaded.text_encoders.keys() == {part for part in family.parts if part.startswith("text_encoder")}
    for module in (loaded.denoiser, loaded.vae, *loaded.text_encoders.values()):
        assert not any(inner.training for inner in module.modules())
        assert not any(weight.requires_grad for weight in module.parameters())


# A number of the denoiser's configuration: the tiny model's, and the published one's.
CONFIGURED = {
    "sd15": ("cross_attention_dim", 16, 768),
    "sdxl1": ("cross_attention_dim", 24, 2048),
    "flux1": ("num_layers", 2, 19),
}


def test_a_sidecar_overrides_our_configuration_and_brings_nothing_else(
    family: Family, file: Path, tmp_path: Path
) -> None:
    part, (key, tiny, published) = family.branch.denoiser_name, CONFIGURED[family.name]
    for junk in ("extra.py", "diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"):
        (sidecar(file) / part / junk).touch()
    config = loading.single_file_config(file, tmp_path / "cache", family.module.CONFIG)
    assert json.loads((config / part / "config.json").read_text())[key] == tiny
    assert {path.suffix for path in config.rglob("*") if path.is_file()} == {".json", ".txt"}
    shutil.rmtree(sidecar(file))
    config = loading.single_file_config(file, tmp_path / "cache", family.module.CONFIG)
    assert json.loads((config / part / "config.json").read_text())[key] == published
    assert {str(path.relative_to(config)) for path in config.rglob("*.json")} == family.module.CONFIG.keys()


# What is not whole


@pytest.mark.parametrize("spoil", list(REASONS))
@each("part", {family.name: family.parts for family in FAMILIES.values()})
def test_a_folder_with_a_part_that_is_not_whole_is_refused(
    family: Family, folder: Path, tmp_path: Path, part: str, spoil: Callable[[Path], None]
) -> None:
    spoil(next((folder / part).glob("*.safetensors")))
    with pytest.raises((OSError, ValueError), match=re.compile(REASONS[spoil], re.IGNORECASE)):
        family.load(folder, tmp_path)


WHOLE_FILE_KEYS = {  # the transformer of FLUX.1: test_flux1.py
    "sd15": [
        "model.diffusion_model.time_embed.0.weight",
        "model.diffusion_model.middle_block.1.proj_in.weight",
        "model.diffusion_model.output_blocks.5.1.transformer_blocks.0.attn2.to_k.weight",
        "first_stage_model.quant_conv.weight",
        "first_stage_model.decoder.mid.attn_1.q.weight",
        "cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc2.weight",
        "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
    ],
    "sdxl1": [
        "model.diffusion_model.middle_block.1.proj_in.weight",
        "model.diffusion_model.label_emb.0.2.weight",
        "first_stage_model.decoder.conv_out.weight",
        "conditioner.embedders.0.transformer.text_model.encoder.layers.1.mlp.fc2.weight",
        "conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_weight",
        "conditioner.embedders.1.model.text_projection",
        "conditioner.embedders.1.model.positional_embedding",
    ],
    "flux1": [
        "vae.decoder.conv_out.weight",
        "text_encoders.clip_l.transformer.text_model.encoder.layers.1.mlp.fc2.weight",
        "text_encoders.t5xxl.transformer.shared.weight",
        "text_encoders.t5xxl.transformer.encoder.block.1.layer.0.SelfAttention.q.weight",
    ],
}


@each("key", WHOLE_FILE_KEYS)
def test_a_single_file_with_a_weight_missing_is_refused(family: Family, whole: Path, tmp_path: Path, key: str) -> None:
    tensors = load_file(whole)
    del tensors[key]
    save_file(tensors, whole)
    with pytest.raises(ValueError, match=r"whole\.safetensors.* missing"):
        family.load_lazily(whole, tmp_path)


@each("key", WHOLE_FILE_KEYS)
def test_a_single_file_with_a_weight_of_another_shape_is_refused(
    family: Family, whole: Path, tmp_path: Path, key: str
) -> None:
    tensors = load_file(whole)
    save_file(tensors | {key: tensors[key][:-1].contiguous()}, whole)
    said = "shape|size" if family.name == "flux1" else "shape"
    with pytest.raises(ValueError, match=re.compile(rf"whole\.safetensors cannot be loaded: .*({said})", re.DOTALL)):
        family.load_lazily(whole, tmp_path)


@each("tokenizer", {family.name: family.tokenizers for family in FAMILIES.values()})
def test_a_folder_without_a_vocabulary_is_refused(family: Family, folder: Path, tmp_path: Path, tokenizer: str) -> None:
    shutil.rmtree(folder / tokenizer)
    with pytest.raises(OSError, match=rf"has no vocabulary in {tokenizer}/"):
        family.load_lazily(folder, tmp_path)


# From where what is not beside a file is fetched.
HOMES = {
    "sd15": "clip-vit-large-patch14",
    "sdxl1": "stable-diffusion-xl-base-1.0",
    "flux1": "FLUX.1-dev",
}


@each(
    "part",
    {
        "sd15": ["tokenizer"],
        "sdxl1": ["tokenizer", "tokenizer_2"],
        "flux1": ["vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"],
    },
)
@pytest.mark.usefixtures("empty_hub_cache")
def test_a_single_file_without_a_part_is_refused_where_the_hub_has_none_either(
    family: Family, file: Path, tmp_path: Path, part: str
) -> None:
    shutil.rmtree(sidecar(file) / part)
    with pytest.raises(OSError, match=rf"{re.escape(HOMES[family.name])} is not in the cache"):
        family.load_lazily(file, tmp_path)


# Encoding


def encoded_by_stock(stock: Any, name: str, captions: list[str]) -> dict[str, Tensor]:
    """What diffusers' own pipeline makes of captions, by the names of its denoiser's inputs."""
    with torch.no_grad():
        if name == "sd15":
            hidden, _ = stock.encode_prompt(captions, "cpu", 1, do_classifier_free_guidance=False)
            return {"encoder_hidden_states": hidden}
        if name == "sdxl1":
            hidden, _, pooled, _ = stock.encode_prompt(captions, device="cpu", do_classifier_free_guidance=False)
            return {"encoder_hidden_states": hidden, "text_embeds": pooled}
        hidden, pooled, _ = stock.encode_prompt(captions, None, device="cpu")
        return {"encoder_hidden_states": hidden, "pooled_projections": pooled}


SHAPES = {  # of one caption
    "sd15": {"encoder_hidden_states": (77, 16)},
    "sdxl1": {"encoder_hidden_states": (77, 8 + 16), "text_embeds": (16,)},
    "flux1": {"encoder_hidden_states": (512, 16), "pooled_projections": (8,)},
}


def test_captions_are_encoded_as_the_renderer_encodes_prompts(family: Family, loaded: Any, stock: Any) -> None:
    # An empty caption of SDXL's may be zeros: test_sdxl1.py.
    captions = ["a photo of ohwx dog", "a cat" if family.name == "sdxl1" else "", "very long " * 60]
    expected, cond = encoded_by_stock(stock, family.name, captions), loaded.encode_prompts(captions)
    assert {key: tuple(value.shape[1:]) for key, value in cond.items()} == SHAPES[family.name]
    assert cond.keys() == expected.keys()
    for key, value in cond.items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=ROUNDING)
        assert len({tuple(row.flatten().tolist()) for row in value}) == len(captions)  # each is encoded its own way


def test_the_renderer_gets_what_was_encoded(loaded: Any, stock: Any) -> None:
    inputs = loaded.prompt_inputs(loaded.encode_prompts(["a dog"]), loaded.encode_prompts([""]))
    size = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "latent"}
    pictures = [
        stock(**said, **size, generator=torch.Generator().manual_seed(0)).images
        for said in (inputs, {"prompt": "a dog"}, {"prompt": "a cat"})
    ]
    assert torch.allclose(pictures[0], pictures[1], atol=1e-4)
    assert not torch.allclose(pictures[0], pictures[2], atol=1e-4)


# The shift and the scale of latents, and the multiple that the sides of pictures are of.
LATENTS = {"sd15": (0.0, 0.18215, 64), "sdxl1": (0.0, 0.13025, 32), "flux1": (0.1159, 0.3611, 16)}


def test_latents_are_those_that_the_renderer_decodes(family: Family, loaded: Any, stock: Any) -> None:
    shift, scale, multiple = LATENTS[family.name]
    pixels = torch.rand(2, 3, 64, 96) * 2 - 1
    mean, std = loaded.encode_images(pixels)
    posterior = stock.vae.encode(pixels).latent_dist
    assert mean.shape == std.shape == (2, 4, 8, 12)
    torch.testing.assert_close(mean, (posterior.mean - shift) * scale, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(std, posterior.std * scale, rtol=0, atol=ROUNDING)
    # As the pipeline undoes it before it decodes.
    undone = mean / stock.vae.config.scaling_factor + (stock.vae.config.shift_factor or 0.0)
    torch.testing.assert_close(undone, posterior.mean, rtol=0, atol=ROUNDING)
    assert (loaded.latent_scale, loaded.size_multiple) == (8, multiple)
