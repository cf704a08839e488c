"""Branch sd15: what it loads and encodes. Its loss: test_objectives.py."""

from __future__ import annotations

import json
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from tests.helpers.tiny import ldm_tensors
from trainer.branches import loading, sd15
from trainer.library.bases import Base
from trainer.library.models_folder import sidecar

CPU = torch.device("cpu")
PARTS = ("unet", "vae", "text_encoder")


def load(path: Path, cache: Path) -> sd15.SD15:
    return sd15.load(Base(1, path.name, "sd15", path=path), CPU, cache)


@pytest.fixture
def folder(tiny_sd15: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be changed."""
    return Path(shutil.copytree(tiny_sd15, tmp_path / "base"))


@pytest.fixture
def file(tiny_sd15_file: Path, tmp_path: Path) -> Path:
    """A copy of the tiny single file and its sidecar, to be changed."""
    shutil.copytree(sidecar(tiny_sd15_file), tmp_path / "base")
    return Path(shutil.copy(tiny_sd15_file, tmp_path / "base.safetensors"))


# Loading


def test_a_single_file_has_the_very_weights_of_its_folder(
    tiny_sd15: Path, tiny_sd15_file: Path, tmp_path: Path
) -> None:
    from_folder, from_file = load(tiny_sd15, tmp_path).pipeline, load(tiny_sd15_file, tmp_path).pipeline
    for part in PARTS:
        expected, got = getattr(from_folder, part).state_dict(), getattr(from_file, part).state_dict()
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert from_file.scheduler.config == from_folder.scheduler.config
    assert from_file.tokenizer("ohwx dog").input_ids == from_folder.tokenizer("ohwx dog").input_ids


def test_the_hub_is_not_asked_for_what_is_here(
    tiny_sd15: Path, tiny_sd15_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def look_up(host: str, *_: object, **__: object) -> None:
        asked.append(host)
        raise socket.gaierror("there is no network in the tests")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    load(tiny_sd15, tmp_path)
    load(tiny_sd15_file, tmp_path)
    assert asked == []


def test_a_single_file_without_a_tokenizer_is_refused_where_the_hub_has_none_either(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))  # not this machine's own
    load(file, tmp_path)
    shutil.rmtree(sidecar(file) / "tokenizer")
    with pytest.raises(OSError, match="clip-vit-large-patch14 is not in the cache"):
        load(file, tmp_path)


def test_a_sidecar_overrides_our_configuration_and_brings_nothing_else(file: Path, tmp_path: Path) -> None:
    (sidecar(file) / "unet" / "extra.py").touch()
    (sidecar(file) / "unet" / "diffusion_pytorch_model.bin").touch()
    config = loading.single_file_config(file, tmp_path / "cache", sd15.CONFIG)
    assert json.loads((config / "unet" / "config.json").read_text())["cross_attention_dim"] == 16
    assert {path.suffix for path in config.rglob("*") if path.is_file()} == {".json", ".txt"}
    shutil.rmtree(sidecar(file))
    config = loading.single_file_config(file, tmp_path / "cache", sd15.CONFIG)
    assert {str(path.relative_to(config)) for path in config.rglob("*.json")} == sd15.CONFIG.keys()


def drop_weight(file: Path) -> None:
    tensors = load_file(file)
    del tensors[next(name for name in tensors if name.endswith("mlp.fc2.weight") or "conv_out.weight" in name)]
    save_file(tensors, file, {"format": "pt"})


def change_shape(file: Path) -> None:
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("mlp.fc2.weight") or "conv_out.weight" in name)
    save_file(tensors | {name: torch.zeros(3, 3)}, file, {"format": "pt"})


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def remove(file: Path) -> None:
    file.unlink()


REASONS = {drop_weight: "missing", change_shape: "shape|mismatch", truncate: "load", remove: "no file"}


@pytest.mark.parametrize("spoil", list(REASONS))
@pytest.mark.parametrize("part", PARTS)
def test_a_folder_with_a_part_that_is_not_whole_is_refused(
    folder: Path, tmp_path: Path, part: str, spoil: Callable[[Path], None]
) -> None:
    spoil(next((folder / part).glob("*.safetensors")))
    with pytest.raises((OSError, ValueError), match=re.compile(REASONS[spoil], re.IGNORECASE)):
        load(folder, tmp_path)


FILE_KEYS = [
    "model.diffusion_model.time_embed.0.weight",
    "model.diffusion_model.middle_block.1.proj_in.weight",
    "model.diffusion_model.output_blocks.5.1.transformer_blocks.0.attn2.to_k.weight",
    "first_stage_model.quant_conv.weight",
    "first_stage_model.decoder.mid.attn_1.q.weight",
    "cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc2.weight",
    "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
]


@pytest.mark.parametrize("key", FILE_KEYS)
def test_a_single_file_with_a_weight_missing_is_refused(file: Path, tmp_path: Path, key: str) -> None:
    tensors = load_file(file)
    del tensors[key]
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"base.* missing"):
        load(file, tmp_path)


@pytest.mark.parametrize("key", FILE_KEYS)
def test_a_single_file_with_a_weight_of_another_shape_is_refused(file: Path, tmp_path: Path, key: str) -> None:
    tensors = load_file(file)
    save_file(tensors | {key: tensors[key][:-1].contiguous()}, file)
    with pytest.raises(ValueError, match=r"base.* cannot be loaded: .*shape"):
        load(file, tmp_path)


def test_a_folder_without_a_vocabulary_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(OSError, match="tokenizer"):
        load(folder, tmp_path)


def test_a_half_precision_file_is_computed_in_full_precision_on_the_cpu(file: Path, tmp_path: Path) -> None:
    save_file({name: t.half() if t.is_floating_point() else t for name, t in load_file(file).items()}, file)
    branch = load(file, tmp_path)
    assert {p.dtype for part in PARTS for p in getattr(branch.pipeline, part).parameters()} == {torch.float32}


def test_a_loaded_base_is_frozen_and_draws_no_dropout(tiny_sd15: Path, tmp_path: Path) -> None:
    branch = load(tiny_sd15, tmp_path)
    for module in (branch.denoiser, branch.vae, *branch.text_encoders.values()):
        assert not any(inner.training for inner in module.modules())
        assert not any(weight.requires_grad for weight in module.parameters())


# The configuration of a single file without a sidecar


@pytest.fixture(scope="module")
def full_size() -> dict[str, torch.nn.Module]:
    """The modules that our configuration describes, without memory for their weights."""
    with torch.device("meta"):
        return {
            "unet": UNet2DConditionModel.from_config(sd15.CONFIG["unet/config.json"]),
            "vae": AutoencoderKL.from_config(sd15.CONFIG["vae/config.json"]),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**sd15.CONFIG["text_encoder/config.json"])),
        }


def test_our_configuration_is_as_large_as_stable_diffusion_1_5(full_size: dict[str, torch.nn.Module]) -> None:
    counted = {part: sum(p.numel() for p in module.parameters()) for part, module in full_size.items()}
    assert counted == {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}


def test_our_configuration_fits_the_published_file(full_size: dict[str, torch.nn.Module]) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in ldm_tensors(**full_size).items()}
    published = {
        "model.diffusion_model.time_embed.0.weight": (1280, 320),
        "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
        "model.diffusion_model.input_blocks.1.1.proj_in.weight": (320, 320, 1, 1),
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
        "model.diffusion_model.input_blocks.3.0.op.weight": (320, 320, 3, 3),
        "model.diffusion_model.input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
        "model.diffusion_model.middle_block.1.transformer_blocks.0.ff.net.0.proj.weight": (10240, 1280),
        "model.diffusion_model.output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.11.0.skip_connection.weight": (320, 640, 1, 1),
        "model.diffusion_model.out.2.weight": (4, 320, 3, 3),
        "first_stage_model.encoder.conv_in.weight": (128, 3, 3, 3),
        "first_stage_model.encoder.down.0.downsample.conv.weight": (128, 128, 3, 3),
        "first_stage_model.encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
        "first_stage_model.decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
        "first_stage_model.quant_conv.weight": (8, 8, 1, 1),
        "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": (49408, 768),
        "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight": (77, 768),
        "cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc1.weight": (3072, 768),
        "cond_stage_model.transformer.text_model.final_layer_norm.weight": (768,),
    }
    assert {name: shapes.get(name) for name in published} == published
    counted = [sum(name.startswith(prefix) for name in shapes) for prefix in ("model.", "first_", "cond_")]
    assert counted == [686, 248, 196]


def test_our_noise_schedule_is_that_of_stable_diffusion_1_5() -> None:
    alphas_bar = DDPMScheduler.from_config(sd15.CONFIG["scheduler/scheduler_config.json"]).alphas_cumprod
    sigmas = ((1 - alphas_bar) / alphas_bar).sqrt()
    # The ends that every k-diffusion user knows.
    assert (sigmas[0].item(), sigmas[-1].item()) == (pytest.approx(0.0292, abs=1e-4), pytest.approx(14.6146, abs=1e-4))


# Encoding and loss


def test_captions_are_encoded_as_the_renderer_encodes_prompts(tiny_sd15: Path, tmp_path: Path) -> None:
    branch = load(tiny_sd15, tmp_path)
    captions = ["a photo of ohwx dog", "", "very long " * 40]
    ours = branch.encode_prompts(captions)["encoder_hidden_states"]
    theirs, _ = branch.pipeline.encode_prompt(captions, CPU, 1, do_classifier_free_guidance=False)
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours[0], ours[1])


def test_latents_are_those_that_the_renderer_decodes(tiny_sd15: Path, tmp_path: Path) -> None:
    branch = load(tiny_sd15, tmp_path)
    pixels = torch.rand(2, 3, 64, 64) * 2 - 1
    mean, std = branch.encode_images(pixels)
    posterior = StableDiffusionPipeline.from_pretrained(tiny_sd15, safety_checker=None).vae.encode(pixels).latent_dist
    assert mean.shape == std.shape == (2, 4, 64 // branch.latent_scale, 64 // branch.latent_scale)
    # To rounding: kernels sum in an order that depends on where in memory the weights were loaded.
    torch.testing.assert_close(mean, posterior.mean * 0.18215, rtol=0, atol=1e-5)
    torch.testing.assert_close(std, posterior.std * 0.18215, rtol=0, atol=1e-5)
