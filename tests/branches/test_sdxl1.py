"""Branch sdxl1: what it loads and encodes. Its loss: test_objectives.py; its adapters' names: test_lora.py."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from tests.helpers.tiny import sgm_tensors
from trainer.branches import loading, sdxl1
from trainer.library.bases import Base
from trainer.library.models_folder import sidecar

CPU = torch.device("cpu")
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
ROUNDING = 1e-5  # of numbers around 1. Kernels sum in an order that depends on where in memory the weights were loaded


def load(path: Path, cache: Path, variant: str | None = None) -> sdxl1.SDXL1:
    return sdxl1.load(Base(1, path.name, "sdxl1", path=path, variant=variant), CPU, cache)


@pytest.fixture
def folder(tiny_sdxl1: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be changed."""
    return Path(shutil.copytree(tiny_sdxl1, tmp_path / "folder"))


@pytest.fixture
def file(tiny_sdxl1_file: Path, tmp_path: Path) -> Path:
    """A copy of the tiny single file and its sidecar, to be changed."""
    shutil.copytree(sidecar(tiny_sdxl1_file), tmp_path / "file")
    return Path(shutil.copy(tiny_sdxl1_file, tmp_path / "file.safetensors"))


@pytest.fixture(scope="module")
def stock(tiny_sdxl1: Path) -> StableDiffusionXLPipeline:
    """The tiny model in diffusers' own pipeline. Read only."""
    return StableDiffusionXLPipeline.from_pretrained(tiny_sdxl1, local_files_only=True)


# Loading


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_folder_and_single_file_have_the_very_same_weights(
    folder: Path, file: Path, tmp_path: Path, stock: StableDiffusionXLPipeline, kind: str
) -> None:
    pipeline = load(folder if kind == "folder" else file, tmp_path).pipeline
    for part in PARTS:
        expected, got = getattr(stock, part).state_dict(), getattr(pipeline, part).state_dict()
        assert got.keys() == expected.keys()
        assert [name for name in expected if not torch.equal(got[name], expected[name])] == []
    assert pipeline.scheduler.config == stock.scheduler.config
    for name in ("tokenizer", "tokenizer_2"):  # of which the second one pads with another word
        ids = [getattr(one, name)("a dog", padding="max_length").input_ids for one in (pipeline, stock)]
        assert ids[0] == ids[1]


@pytest.mark.parametrize("without", [(), ("text_encoder",), ("unet", "vae")])
def test_weights_of_a_variant_are_read_and_plain_ones_where_a_part_has_no_others(
    folder: Path, tmp_path: Path, stock: StableDiffusionXLPipeline, without: tuple[str, ...]
) -> None:
    for part in set(PARTS) - set(without):
        plain = next((folder / part).glob("*.safetensors"))
        plain.rename(plain.with_suffix(".fp16.safetensors"))
    pipeline = load(folder, tmp_path, variant="fp16").pipeline
    for part in PARTS:
        expected, got = getattr(stock, part).state_dict(), getattr(pipeline, part).state_dict()
        assert [name for name in expected if not torch.equal(got[name], expected[name])] == [], part
    if without != ("unet", "vae"):
        with pytest.raises((OSError, ValueError)):
            load(folder, tmp_path)  # nothing plain is there


def test_a_half_precision_file_is_computed_in_full_precision_on_the_cpu(file: Path, tmp_path: Path) -> None:
    save_file({name: t.half() if t.is_floating_point() else t for name, t in load_file(file).items()}, file)
    branch = load(file, tmp_path)
    assert {p.dtype for part in PARTS for p in getattr(branch.pipeline, part).parameters()} == {torch.float32}


def test_a_loaded_base_is_frozen_and_draws_no_dropout(tiny_sdxl1: Path, tmp_path: Path) -> None:
    branch = load(tiny_sdxl1, tmp_path)
    assert branch.text_encoders.keys() == {"text_encoder", "text_encoder_2"}
    for module in (branch.denoiser, branch.vae, *branch.text_encoders.values()):
        assert not any(inner.training for inner in module.modules())
        assert not any(weight.requires_grad for weight in module.parameters())


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


REASONS = {
    drop_weight: "missing",
    change_shape: "shape|mismatch",
    truncate: "cannot be loaded|unable to load",
    remove: "no file",
}


@pytest.mark.parametrize("spoil", list(REASONS))
@pytest.mark.parametrize("part", PARTS)
def test_a_folder_with_a_part_that_is_not_whole_is_refused(
    folder: Path, tmp_path: Path, part: str, spoil: Callable[[Path], None]
) -> None:
    spoil(next((folder / part).glob("*.safetensors")))
    with pytest.raises((OSError, ValueError), match=re.compile(REASONS[spoil], re.IGNORECASE)):
        load(folder, tmp_path)


FILE_KEYS = [
    "model.diffusion_model.middle_block.1.proj_in.weight",
    "model.diffusion_model.label_emb.0.2.weight",
    "first_stage_model.decoder.conv_out.weight",
    "conditioner.embedders.0.transformer.text_model.encoder.layers.1.mlp.fc2.weight",
    "conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_weight",
    "conditioner.embedders.1.model.text_projection",
    "conditioner.embedders.1.model.positional_embedding",
]


@pytest.mark.parametrize("key", FILE_KEYS)
def test_a_single_file_with_a_weight_missing_is_refused(file: Path, tmp_path: Path, key: str) -> None:
    tensors = load_file(file)
    del tensors[key]
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"file\.safetensors.* missing"):
        load(file, tmp_path)


@pytest.mark.parametrize("key", FILE_KEYS)
def test_a_single_file_with_a_weight_of_another_shape_is_refused(file: Path, tmp_path: Path, key: str) -> None:
    tensors = load_file(file)
    save_file(tensors | {key: tensors[key][:-1].contiguous()}, file)
    with pytest.raises(ValueError, match=r"file\.safetensors cannot be loaded: .*shape"):
        load(file, tmp_path)


@pytest.mark.parametrize("tokenizer", ["tokenizer", "tokenizer_2"])
def test_a_folder_without_a_vocabulary_is_refused(folder: Path, tmp_path: Path, tokenizer: str) -> None:
    shutil.rmtree(folder / tokenizer)
    with pytest.raises(OSError, match=rf"has no vocabulary in {tokenizer}/"):
        load(folder, tmp_path)


@pytest.mark.parametrize("tokenizer", ["tokenizer", "tokenizer_2"])
def test_a_single_file_without_a_tokenizer_is_refused_where_the_hub_has_none_either(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: str
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    load(file, tmp_path)
    shutil.rmtree(sidecar(file) / tokenizer)
    with pytest.raises(OSError, match=r"stable-diffusion-xl-base-1\.0 is not in the cache"):
        load(file, tmp_path)


# The configuration of a single file without a sidecar


@pytest.fixture(scope="module")
def full_size() -> dict[str, torch.nn.Module]:
    """The modules that our configuration describes, without memory for their weights."""
    with torch.device("meta"):
        return {
            "unet": UNet2DConditionModel.from_config(sdxl1.CONFIG["unet/config.json"]),
            "vae": AutoencoderKL.from_config(sdxl1.CONFIG["vae/config.json"]),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**sdxl1.CONFIG["text_encoder/config.json"])),
            "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**sdxl1.CONFIG["text_encoder_2/config.json"])),
        }


def test_our_configuration_is_as_large_as_sdxl(full_size: dict[str, torch.nn.Module]) -> None:
    counted = {part: sum(p.numel() for p in module.parameters()) for part, module in full_size.items()}
    assert counted == {
        "unet": 2_567_463_684,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
    }


def test_our_configuration_fits_the_published_file(full_size: dict[str, torch.nn.Module]) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in sgm_tensors(**full_size).items()}
    published = {  # sd_xl_base_1.0.safetensors
        "model.diffusion_model.time_embed.0.weight": (1280, 320),
        "model.diffusion_model.label_emb.0.0.weight": (1280, 2816),
        "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
        "model.diffusion_model.input_blocks.3.0.op.weight": (320, 320, 3, 3),
        "model.diffusion_model.input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
        "model.diffusion_model.input_blocks.4.1.proj_in.weight": (640, 640),
        "model.diffusion_model.input_blocks.5.1.transformer_blocks.1.attn2.to_k.weight": (640, 2048),
        "model.diffusion_model.input_blocks.8.1.transformer_blocks.9.ff.net.0.proj.weight": (10240, 1280),
        "model.diffusion_model.middle_block.1.transformer_blocks.9.attn2.to_v.weight": (1280, 2048),
        "model.diffusion_model.output_blocks.2.2.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.5.1.transformer_blocks.1.ff.net.2.weight": (640, 2560),
        "model.diffusion_model.output_blocks.5.2.conv.weight": (640, 640, 3, 3),
        "model.diffusion_model.output_blocks.8.0.skip_connection.weight": (320, 640, 1, 1),
        "model.diffusion_model.out.2.weight": (4, 320, 3, 3),
        "first_stage_model.encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        "first_stage_model.quant_conv.weight": (8, 8, 1, 1),
        "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight": (49408, 768),
        "conditioner.embedders.0.transformer.text_model.encoder.layers.11.mlp.fc1.weight": (3072, 768),
        "conditioner.embedders.1.model.positional_embedding": (77, 1280),
        "conditioner.embedders.1.model.token_embedding.weight": (49408, 1280),
        "conditioner.embedders.1.model.text_projection": (1280, 1280),
        "conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_weight": (3840, 1280),
        "conditioner.embedders.1.model.transformer.resblocks.31.mlp.c_fc.weight": (5120, 1280),
    }
    assert {name: shapes.get(name) for name in published} == published
    prefixes = ("model.", "first_", "conditioner.embedders.0.", "conditioner.embedders.1.")
    assert [sum(name.startswith(prefix) for name in shapes) for prefix in prefixes] == [1680, 248, 196, 389]
    # Transformer blocks in each entry of the UNet: 2 where it is 640 wide, 10 where it is 1280.
    found = [re.match(r"model\.diffusion_model\.(\w+\.\d+)\..*transformer_blocks\.(\d+)\.", name) for name in shapes]
    depths: dict[str, int] = {}
    for one in filter(None, found):
        depths[one[1]] = max(depths.get(one[1], 0), int(one[2]) + 1)
    two, ten = ("input_blocks.4", "input_blocks.5"), ("input_blocks.7", "input_blocks.8", "middle_block.1")
    two += tuple(f"output_blocks.{n}" for n in (3, 4, 5))
    ten += tuple(f"output_blocks.{n}" for n in (0, 1, 2))
    assert depths == dict.fromkeys(two, 2) | dict.fromkeys(ten, 10)


def test_our_noise_schedule_is_that_of_sdxl() -> None:
    alphas_bar = DDPMScheduler.from_config(sdxl1.CONFIG["scheduler/scheduler_config.json"]).alphas_cumprod
    sigmas = ((1 - alphas_bar) / alphas_bar).sqrt()
    # The ends that every k-diffusion user knows.
    assert (sigmas[0].item(), sigmas[-1].item()) == (pytest.approx(0.0292, abs=1e-4), pytest.approx(14.6146, abs=1e-4))


def test_a_sidecar_overrides_our_configuration(file: Path, tmp_path: Path) -> None:
    config = loading.single_file_config(file, tmp_path / "cache", sdxl1.CONFIG)
    assert json.loads((config / "unet" / "config.json").read_text())["cross_attention_dim"] == 24
    shutil.rmtree(sidecar(file))
    config = loading.single_file_config(file, tmp_path / "cache", sdxl1.CONFIG)
    assert json.loads((config / "unet" / "config.json").read_text())["cross_attention_dim"] == 2048
    assert {str(path.relative_to(config)) for path in config.rglob("*.json")} == sdxl1.CONFIG.keys()


# Encoding


def test_captions_are_encoded_as_the_renderer_encodes_prompts(
    tiny_sdxl1: Path, tmp_path: Path, stock: StableDiffusionXLPipeline
) -> None:
    branch, captions = load(tiny_sdxl1, tmp_path), ["a photo of ohwx dog", "very long " * 40]
    hidden, _, pooled, _ = stock.encode_prompt(captions, device="cpu", do_classifier_free_guidance=False)
    cond = branch.encode_prompts(captions)
    assert cond.keys() == {"encoder_hidden_states", "text_embeds"}
    torch.testing.assert_close(cond["encoder_hidden_states"], hidden, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(cond["text_embeds"], pooled, rtol=0, atol=ROUNDING)
    assert hidden.shape == (2, 77, 8 + 16) and pooled.shape == (2, 16)
    assert not torch.equal(pooled[0], pooled[1])


@pytest.mark.parametrize("zeros", [True, False])
def test_an_empty_caption_is_what_it_is_when_rendering(folder: Path, tmp_path: Path, zeros: bool) -> None:
    index = folder / "model_index.json"
    facts = json.loads(index.read_text())
    assert facts["force_zeros_for_empty_prompt"] is True
    index.write_text(json.dumps(facts | {"force_zeros_for_empty_prompt": zeros}))
    stock = StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True)
    hidden, empty, pooled, empty_pooled = stock.encode_prompt("a dog", device="cpu")
    cond = load(folder, tmp_path).encode_prompts(["a dog", ""])
    # A row of a batch and one on its own differ in their last bits.
    assert torch.allclose(cond["encoder_hidden_states"], torch.cat([hidden, empty]), atol=1e-5)
    assert torch.allclose(cond["text_embeds"], torch.cat([pooled, empty_pooled]), atol=1e-5)
    assert [bool(cond[key][1].any()) for key in cond] == [not zeros] * 2
    assert [bool(cond[key][0].any()) for key in cond] == [True] * 2


def test_the_renderer_gets_what_was_encoded(tiny_sdxl1: Path, tmp_path: Path, stock: StableDiffusionXLPipeline) -> None:
    branch = load(tiny_sdxl1, tmp_path)
    inputs = branch.prompt_inputs(branch.encode_prompts(["a dog"]), branch.encode_prompts([""]))
    size = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "latent"}
    pictures = [
        stock(**said, **size, generator=torch.Generator().manual_seed(0)).images
        for said in (inputs, {"prompt": "a dog"}, {"prompt": "a cat"})
    ]
    assert torch.allclose(pictures[0], pictures[1], atol=1e-4)
    assert not torch.allclose(pictures[0], pictures[2], atol=1e-4)


def test_the_model_is_told_sizes_in_the_renderer_s_order(
    tiny_sdxl1: Path, tmp_path: Path, stock: StableDiffusionXLPipeline
) -> None:
    told = load(tiny_sdxl1, tmp_path).encode_size((1200, 900), (16, 8), (1152, 896))
    assert told.keys() == {"time_ids"}
    assert told["time_ids"].tolist() == [[1200, 900, 16, 8, 1152, 896]]
    theirs = stock._get_add_time_ids((1200, 900), (16, 8), (1152, 896), torch.float32, 16)
    assert torch.equal(told["time_ids"], theirs)


def test_latents_are_those_that_the_renderer_decodes(
    tiny_sdxl1: Path, tmp_path: Path, stock: StableDiffusionXLPipeline
) -> None:
    branch, pixels = load(tiny_sdxl1, tmp_path), torch.rand(2, 3, 64, 96) * 2 - 1
    mean, std = branch.encode_images(pixels)
    posterior = stock.vae.encode(pixels).latent_dist
    assert mean.shape == std.shape == (2, 4, 8, 12)
    torch.testing.assert_close(mean, posterior.mean * 0.13025, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(std, posterior.std * 0.13025, rtol=0, atol=ROUNDING)
    assert (branch.latent_scale, branch.size_multiple) == (8, 32)
