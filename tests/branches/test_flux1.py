"""Branch flux1: what it loads and encodes. Its loss: test_objectives.py; its adapters' names: test_lora.py."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from tests.helpers.tiny import bfl_tensors, write_flux_file
from trainer.branches import flux1, flux1_keys, loading
from trainer.branches.flux1 import Flux1
from trainer.library.bases import Base
from trainer.library.models_folder import sidecar

CPU = torch.device("cpu")
PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2")
ROUNDING = 1e-5  # of numbers around 1. Kernels sum in an order that depends on where in memory the weights were loaded


def load(path: Path, cache: Path) -> Flux1:
    return flux1.load(Base(1, path.name, "flux1", path=path), CPU, cache)


def load_all(path: Path, cache: Path) -> Flux1:
    """With its transformer."""
    branch = load(path, cache)
    assert branch.denoiser is branch.pipeline.transformer
    return branch


@pytest.fixture(scope="module")
def whole_file(tiny_flux1: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as one file with all parts in it, its sidecar without weights. Read only."""
    return write_flux_file(tiny_flux1, tmp_path_factory.mktemp("tiny") / "whole.safetensors", whole=True)


@pytest.fixture
def folder(tiny_flux1: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be changed."""
    return Path(shutil.copytree(tiny_flux1, tmp_path / "folder"))


@pytest.fixture
def file(tiny_flux1_file: Path, tmp_path: Path) -> Path:
    """A copy of the file with the transformer alone, and of its sidecar with the other parts, to be changed."""
    shutil.copytree(sidecar(tiny_flux1_file), tmp_path / "file")
    return Path(shutil.copy(tiny_flux1_file, tmp_path / "file.safetensors"))


@pytest.fixture
def whole(whole_file: Path, tmp_path: Path) -> Path:
    """A copy of the whole file and its sidecar, to be changed."""
    shutil.copytree(sidecar(whole_file), tmp_path / "whole")
    return Path(shutil.copy(whole_file, tmp_path / "whole.safetensors"))


@pytest.fixture(scope="module")
def stock(tiny_flux1: Path) -> FluxPipeline:
    """The tiny model in diffusers' own pipeline. Read only."""
    pipeline = FluxPipeline.from_pretrained(tiny_flux1, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# Loading


@pytest.mark.parametrize("kind", ["folder", "file", "whole"])
def test_every_layout_has_the_very_same_weights(
    request: pytest.FixtureRequest, tmp_path: Path, stock: FluxPipeline, kind: str
) -> None:
    pipeline = load(request.getfixturevalue(kind), tmp_path).pipeline
    for part in PARTS:
        expected, got = getattr(stock, part).state_dict(), getattr(pipeline, part).state_dict()
        assert got.keys() == expected.keys()
        assert [name for name in expected if not torch.equal(got[name], expected[name])] == []
    assert pipeline.scheduler.config == stock.scheduler.config
    for name in ("tokenizer", "tokenizer_2"):
        assert getattr(pipeline, name)("a dog").input_ids == getattr(stock, name)("a dog").input_ids


def test_a_file_with_the_original_prefix_or_without_has_the_same_transformer(file: Path, tmp_path: Path) -> None:
    expected = load(file, tmp_path).denoiser.state_dict()
    save_file({f"model.diffusion_model.{name}": tensor for name, tensor in load_file(file).items()}, file)
    got = load(file, tmp_path).denoiser.state_dict()
    assert [name for name in expected if not torch.equal(got[name], expected[name])] == []


def test_a_file_without_guidance_makes_a_model_without_it(file: Path, tmp_path: Path) -> None:
    assert load(file, tmp_path).denoiser.config.guidance_embeds is True
    save_file({name: tensor for name, tensor in load_file(file).items() if "guidance_in" not in name}, file)
    assert load(file, tmp_path).denoiser.config.guidance_embeds is False


@pytest.mark.parametrize("kind", ["folder", "file", "whole"])
def test_the_transformer_is_read_only_when_it_is_asked_for(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str
) -> None:
    branch = load(request.getfixturevalue(kind), tmp_path)
    branch.encode_prompts(["a dog"])
    branch.encode_images(torch.zeros(1, 3, 32, 32))
    branch.keep_text_encoders(())
    assert branch.parts.transformer is None
    assert branch.parts.text_encoder is None and branch.parts.text_encoder_2 is None
    assert branch.text_encoders == {}
    assert branch.denoiser is branch.denoiser is branch.parts.transformer is branch.pipeline.transformer


def test_a_loaded_base_is_frozen_and_draws_no_dropout(tiny_flux1: Path, tmp_path: Path) -> None:
    branch = load(tiny_flux1, tmp_path)
    assert branch.text_encoders.keys() == {"text_encoder", "text_encoder_2"}
    for module in (branch.denoiser, branch.vae, *branch.text_encoders.values()):
        assert not any(inner.training for inner in module.modules())
        assert not any(weight.requires_grad for weight in module.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_file_is_computed_in_full_precision_on_the_cpu(
    whole: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    save_file({name: tensor.to(dtype) for name, tensor in load_file(whole).items()}, whole)
    branch = load_all(whole, tmp_path)
    assert {p.dtype for part in PARTS for p in getattr(branch.pipeline, part).parameters()} == {torch.float32}


# What is not whole


def drop_weight(file: Path) -> None:
    tensors = load_file(file)
    del tensors[spoilt(tensors)]
    save_file(tensors, file, {"format": "pt"})


def change_shape(file: Path) -> None:
    tensors = load_file(file)
    save_file(tensors | {spoilt(tensors): torch.zeros(3, 3)}, file, {"format": "pt"})


def spoilt(tensors: dict[str, Tensor]) -> str:
    ends = ("mlp.fc2.weight", "decoder.conv_out.weight", "wo.weight", "ff.net.2.weight")
    return next(name for name in tensors if name.endswith(ends))


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
    load_all(folder, tmp_path)
    spoil(next((folder / part).glob("*.safetensors")))
    with pytest.raises((OSError, ValueError), match=re.compile(REASONS[spoil], re.IGNORECASE)):
        load_all(folder, tmp_path)


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
    request: pytest.FixtureRequest, tmp_path: Path, kind: str, key: str, reason: str
) -> None:
    file = request.getfixturevalue(kind)
    tensors = load_file(file)
    del tensors[key if kind == "file" else f"model.diffusion_model.{key}"]
    save_file(tensors, file)
    branch = load(file, tmp_path)
    with pytest.raises(ValueError, match=rf"{file.name}.*{reason}"):
        _ = branch.denoiser


@pytest.mark.parametrize(
    "key",
    [
        "vae.decoder.conv_out.weight",
        "text_encoders.clip_l.transformer.text_model.encoder.layers.1.mlp.fc2.weight",
        "text_encoders.t5xxl.transformer.shared.weight",
        "text_encoders.t5xxl.transformer.encoder.block.1.layer.0.SelfAttention.q.weight",
    ],
)
def test_a_whole_file_with_a_weight_of_another_part_missing_or_misshapen_is_refused(
    whole: Path, tmp_path: Path, key: str
) -> None:
    load(whole, tmp_path)
    tensors = load_file(whole)
    save_file({name: tensor for name, tensor in tensors.items() if name != key}, whole)
    with pytest.raises(ValueError, match=r"whole\.safetensors.* missing"):
        load(whole, tmp_path)
    save_file(tensors | {key: tensors[key][:-1].contiguous()}, whole)
    with pytest.raises(ValueError, match=re.compile(r"whole\.safetensors cannot be loaded.*(shape|size)", re.DOTALL)):
        load(whole, tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda qkv: {"": qkv[:-3].contiguous()}, "45 rows, not 48"),
        (lambda qkv: {"": qkv[:, :-1].contiguous()}, "size mismatch"),
        (lambda qkv: {"": qkv, ".absmax": torch.zeros(16), ".quant_map": torch.zeros(16)}, "2 tensors.*quantised"),
        (lambda qkv: {"": qkv, ".quant_state.bitsandbytes__nf4": torch.zeros(9)}, "1 tensors.*quantised"),
    ],
)
def test_a_file_with_misshapen_or_quantised_weights_is_refused(
    file: Path, tmp_path: Path, change: Callable[[Tensor], dict[str, Tensor]], reason: str
) -> None:
    key, tensors = "double_blocks.1.img_attn.qkv.weight", load_file(file)
    qkv = tensors.pop(key)
    save_file(tensors | {f"{key}{end}": tensor for end, tensor in change(qkv).items()}, file)
    branch = load(file, tmp_path)
    with pytest.raises(ValueError, match=re.compile(rf"file\.safetensors cannot be loaded: .*{reason}", re.DOTALL)):
        _ = branch.denoiser


@pytest.mark.parametrize("tokenizer", ["tokenizer", "tokenizer_2"])
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_base_without_a_vocabulary_is_refused(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str, tokenizer: str
) -> None:
    base = request.getfixturevalue(kind)
    if kind == "folder":
        shutil.rmtree(base / tokenizer)
    else:
        for part in (sidecar(base) / tokenizer).iterdir():
            if part.name != "tokenizer_config.json":  # which only says how to use it
                part.unlink()
    with pytest.raises(OSError, match=rf"has no vocabulary in {tokenizer}/"):
        load(base, tmp_path)


@pytest.mark.parametrize("part", ["vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"])
def test_a_file_without_a_part_is_refused_where_the_hub_has_none_either(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))  # not this machine's own
    load(file, tmp_path)
    shutil.rmtree(sidecar(file) / part)
    with pytest.raises(OSError, match=r"FLUX\.1-dev is not in the cache"):
        load(file, tmp_path)


# The configuration of a single file without a sidecar


@pytest.fixture(scope="module")
def full_size() -> dict[str, torch.nn.Module]:
    """The modules that our configuration describes, without memory for their weights."""
    with torch.device("meta"):
        return {
            "transformer": FluxTransformer2DModel.from_config(flux1.CONFIG["transformer/config.json"]),
            "vae": AutoencoderKL.from_config(flux1.CONFIG["vae/config.json"]),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**flux1.CONFIG["text_encoder/config.json"])),
            "text_encoder_2": T5EncoderModel(T5Config(**flux1.CONFIG["text_encoder_2/config.json"])),
        }


def test_our_configuration_is_as_large_as_flux(full_size: dict[str, torch.nn.Module]) -> None:
    counted = {part: sum(p.numel() for p in module.parameters()) for part, module in full_size.items()}
    assert counted == {
        "transformer": 11_901_408_320,
        "vae": 83_819_683,
        "text_encoder": 123_060_480,
        "text_encoder_2": 4_762_310_656,
    }


PUBLISHED = {  # flux1-dev.safetensors
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
}


def test_our_configuration_fits_the_published_file(full_size: dict[str, torch.nn.Module]) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in bfl_tensors(full_size["transformer"]).items()}
    assert {name: shapes.get(name) for name in PUBLISHED} == PUBLISHED
    assert len(shapes) == 780


def test_the_reader_knows_every_name_of_the_published_file(full_size: dict[str, torch.nn.Module]) -> None:
    transformer = full_size["transformer"]
    state, expected = transformer.state_dict(), bfl_tensors(transformer)
    shapes: dict[str, tuple[int, ...]] = {}
    read: list[str] = []
    for original, layers in flux1_keys.original_layers(transformer):
        for kind in ("weight", "bias"):
            parts = [f"{layer}.{kind}" for layer in layers]
            shapes[f"{original}.{kind}"] = (sum(len(state[part]) for part in parts), *state[parts[0]].shape[1:])
            read += parts
    for original, name in flux1_keys.original_scales(transformer):
        shapes[original] = tuple(state[name].shape)
        read.append(name)
    assert shapes == {name: tuple(tensor.shape) for name, tensor in expected.items()}
    assert sorted(read) == sorted(state)  # each weight of ours once


def test_a_sidecar_overrides_our_configuration(file: Path, tmp_path: Path) -> None:
    config = loading.single_file_config(file, tmp_path / "cache", flux1.CONFIG)
    assert json.loads((config / "transformer" / "config.json").read_text())["num_layers"] == 2
    assert list(config.rglob("*.safetensors")) == []
    shutil.rmtree(sidecar(file))
    config = loading.single_file_config(file, tmp_path / "cache", flux1.CONFIG)
    assert json.loads((config / "transformer" / "config.json").read_text())["num_layers"] == 19
    assert {str(path.relative_to(config)) for path in config.rglob("*.json")} == flux1.CONFIG.keys()


# Encoding


def test_captions_are_encoded_as_the_renderer_encodes_prompts(
    tiny_flux1: Path, tmp_path: Path, stock: FluxPipeline
) -> None:
    branch, captions = load(tiny_flux1, tmp_path), ["a photo of ohwx dog", "", "very long " * 60]
    with torch.no_grad():
        hidden, pooled, _ = stock.encode_prompt(captions, None, device="cpu")
    cond = branch.encode_prompts(captions)
    assert cond.keys() == {"encoder_hidden_states", "pooled_projections"}
    torch.testing.assert_close(cond["encoder_hidden_states"], hidden, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(cond["pooled_projections"], pooled, rtol=0, atol=ROUNDING)
    assert hidden.shape == (3, 512, 16) and pooled.shape == (3, 8)
    assert not torch.equal(pooled[0], pooled[1]) and not torch.equal(hidden[0], hidden[1])
    assert branch.encode_size((64, 64), (0, 0), (64, 64)) == {}


def test_the_renderer_gets_what_was_encoded(tiny_flux1: Path, tmp_path: Path, stock: FluxPipeline) -> None:
    branch = load(tiny_flux1, tmp_path)
    inputs = branch.prompt_inputs(branch.encode_prompts(["a dog"]), branch.encode_prompts([""]))
    size = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "latent"}
    pictures = [
        stock(**said, **size, generator=torch.Generator().manual_seed(0)).images
        for said in (inputs, {"prompt": "a dog"}, {"prompt": "a cat"})
    ]
    assert torch.allclose(pictures[0], pictures[1], atol=1e-4)
    assert not torch.allclose(pictures[0], pictures[2], atol=1e-4)


def test_latents_are_those_that_the_renderer_decodes(tiny_flux1: Path, tmp_path: Path, stock: FluxPipeline) -> None:
    branch, pixels = load(tiny_flux1, tmp_path), torch.rand(2, 3, 64, 96) * 2 - 1
    mean, std = branch.encode_images(pixels)
    posterior = stock.vae.encode(pixels).latent_dist
    assert mean.shape == std.shape == (2, 4, 8, 12)
    torch.testing.assert_close(mean, (posterior.mean - 0.1159) * 0.3611, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(std, posterior.std * 0.3611, rtol=0, atol=ROUNDING)
    # As the pipeline undoes it before it decodes.
    undone = mean / stock.vae.config.scaling_factor + stock.vae.config.shift_factor
    torch.testing.assert_close(undone, posterior.mean, rtol=0, atol=ROUNDING)
    assert (branch.latent_scale, branch.size_multiple) == (8, 16)


@pytest.mark.parametrize(("height", "width"), [(6, 10), (8, 8), (2, 4)])
def test_latents_are_packed_as_the_pipeline_does(height: int, width: int) -> None:
    latents = torch.randn(2, 4, height, width)
    packed = flux1.pack(latents)
    assert torch.equal(packed, FluxPipeline._pack_latents(latents, 2, 4, height, width))
    assert torch.equal(flux1.unpack(packed, height, width), latents)
    assert torch.equal(FluxPipeline._unpack_latents(packed, 8 * height, 8 * width, 8), latents)
    theirs = FluxPipeline._prepare_latent_image_ids(2, height // 2, width // 2, CPU, torch.float32)
    assert torch.equal(flux1.image_ids(height, width, CPU), theirs)
