"""The weights under the original release's keys: what is written is what stock diffusers reads, and the other tools."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from tests.helpers import tiny
from tests.helpers.fast import fast_base
from tests.helpers.training import same
from trainer.branches import sd15, sdxl1, single_file_keys
from trainer.branches.protocol import Branch, load_branch
from trainer.library.bases import Base
from trainer.library.models_folder import sidecar

CPU = torch.device("cpu")
FAMILIES = {"tiny_sd15": "sd15", "thin_sd15": "sd15", "tiny_sdxl1": "sdxl1", "tiny_flux1": "flux1"}
PARTS = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2")
ROUNDING = 1 / 255  # one level. Kernels sum in an order that depends on where in memory the weights were loaded


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest) -> Path:
    """Each tiny model. Read only."""
    return request.getfixturevalue(request.param)


def load(path: Path, cache: Path) -> Branch:
    """A tiny model's folder, or a file of the same name."""
    family = "flux1" if path.stem == "flux1" else "sdxl1" if path.stem == "sdxl1" else "sd15"
    return load_branch(Base(1, "x", family, path=path), CPU, cache)


def assert_same_weights(got: Any, expected: Any) -> None:
    """Of two pipelines."""
    assert got.components.keys() == expected.components.keys()
    for part in set(PARTS) & expected.components.keys():
        assert same(getattr(got, part).state_dict(), getattr(expected, part).state_dict()), part


def render(pipeline: Any) -> Tensor:
    """(3, 64, 64) in [0, 1]."""
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(0)
    return pipeline("a dog", height=64, width=64, num_inference_steps=2, generator=noise, output_type="pt").images[0]


# Their names


def test_sd15_has_the_names_and_the_shapes_of_compvis(tiny_sd15: Path, tmp_path: Path) -> None:
    branch = load(tiny_sd15, tmp_path)
    parts = (branch.pipeline.unet, branch.pipeline.vae, branch.pipeline.text_encoder)
    assert same(branch.original_weights(), tiny.ldm_tensors(*parts))


def test_sdxl1_has_the_names_and_the_shapes_of_stability_and_of_openclip(tiny_sdxl1: Path, tmp_path: Path) -> None:
    branch = load(tiny_sdxl1, tmp_path)
    pipeline = branch.pipeline
    expected = tiny.sgm_tensors(pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2)
    assert same(branch.original_weights(), expected)


def test_flux1_has_the_names_of_black_forest_labs_and_the_transformer_alone(tiny_flux1: Path, tmp_path: Path) -> None:
    branch = load(tiny_flux1, tmp_path)
    assert same(branch.original_weights(), tiny.bfl_tensors(branch.pipeline.transformer))


def entries(weights: Iterable[str], row: str) -> set[str]:
    """`input_blocks.1.0` and the like."""
    names = (name.removeprefix("model.diffusion_model.").split(".") for name in weights)
    return {".".join(name[1:3]) for name in names if name[0] == row}


def test_fewer_blocks_and_layers_are_counted_on_in_one_row(thin_sd15: Path, tmp_path: Path) -> None:
    weights = load(thin_sd15, tmp_path).original_weights()
    # Two blocks of one layer: with attention and a downsampler, without; and on the way up the other way round.
    assert entries(weights, "input_blocks") == {"0.0", "1.0", "1.1", "2.0", "3.0"}
    assert entries(weights, "output_blocks") == {"0.0", "1.0", "1.1", "2.0", "2.1", "3.0", "3.1"}
    assert "model.diffusion_model.input_blocks.2.0.op.weight" in weights
    assert "model.diffusion_model.output_blocks.1.1.conv.weight" in weights
    assert "first_stage_model.decoder.up.1.upsample.conv.weight" in weights
    assert "first_stage_model.decoder.up.0.block.1.conv1.weight" in weights


def test_what_the_release_does_not_know_keeps_its_name(tmp_path: Path) -> None:
    branch = load_branch(fast_base(), CPU, tmp_path)
    weights = branch.original_weights()
    modules = (branch.pipeline.unet, branch.pipeline.vae, branch.pipeline.text_encoder)
    assert len(weights) == sum(len(module.state_dict()) for module in modules)  # none is lost, none is written twice
    unet = branch.pipeline.unet.state_dict()
    prefix = "model.diffusion_model."
    kept = {name for name in unet if prefix + name in weights}
    assert kept == {name for name in unet if name.startswith(("add_embedding.", "encoder_hid_proj."))}
    assert all(torch.equal(weights[prefix + name], unet[name]) for name in kept)
    # Four blocks of one layer, those in the middle with attention.
    assert entries(weights, "input_blocks") == {"0.0", "1.0", "2.0", "3.0", "3.1", "4.0", "5.0", "5.1", "6.0", "7.0"}
    attention = "down_blocks.2.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    assert torch.equal(weights[f"{prefix}input_blocks.5.1.transformer_blocks.0.attn2.to_k.weight"], unet[attention])


@pytest.mark.parametrize(("family", "count"), [(sd15, 686), (sdxl1, 1680)])
def test_full_size_unets_have_the_published_names(family: Any, count: int) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(family.CONFIG["unet/config.json"])
        vae = AutoencoderKL.from_config(family.CONFIG["vae/config.json"])
    shapes = {name: tuple(tensor.shape) for name, tensor in single_file_keys.unet_weights(unet).items()}
    assert len(shapes) == count  # as in v1-5-pruned-emaonly.safetensors and in sd_xl_base_1.0.safetensors
    expected = PUBLISHED[family]
    assert {name: shapes.get(name) for name in expected} == expected
    shapes = {name: tuple(tensor.shape) for name, tensor in single_file_keys.vae_weights(vae).items()}
    assert len(shapes) == 248
    assert {name: shapes.get(name) for name in PUBLISHED_VAE} == PUBLISHED_VAE


PUBLISHED: dict[Any, dict[str, tuple[int, ...]]] = {
    sd15: {
        "time_embed.2.weight": (1280, 1280),
        "input_blocks.0.0.weight": (320, 4, 3, 3),
        "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
        "input_blocks.3.0.op.weight": (320, 320, 3, 3),
        "input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
        "input_blocks.8.1.proj_out.weight": (1280, 1280, 1, 1),
        "input_blocks.11.0.out_layers.3.weight": (1280, 1280, 3, 3),
        "middle_block.1.norm.weight": (1280,),
        "middle_block.2.emb_layers.1.bias": (1280,),
        "output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
        "output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
        "output_blocks.11.1.transformer_blocks.0.ff.net.0.proj.weight": (2560, 320),
        "output_blocks.11.0.in_layers.0.weight": (640,),
        "out.0.weight": (320,),
        "out.2.weight": (4, 320, 3, 3),
    },
    sdxl1: {
        "label_emb.0.0.weight": (1280, 2816),
        "label_emb.0.2.weight": (1280, 1280),
        "input_blocks.4.1.proj_in.weight": (640, 640),
        "input_blocks.6.0.op.weight": (640, 640, 3, 3),
        "input_blocks.8.1.transformer_blocks.9.attn2.to_v.weight": (1280, 2048),
        "middle_block.1.transformer_blocks.9.norm3.bias": (1280,),
        "output_blocks.2.2.conv.weight": (1280, 1280, 3, 3),
        "output_blocks.5.2.conv.weight": (640, 640, 3, 3),
        "output_blocks.8.0.skip_connection.weight": (320, 640, 1, 1),
        "out.2.bias": (4,),
    },
}
PUBLISHED_VAE = {
    "encoder.down.2.downsample.conv.weight": (512, 512, 3, 3),
    "encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
    "encoder.mid.attn_1.proj_out.weight": (512, 512, 1, 1),
    "encoder.norm_out.weight": (512,),
    "decoder.mid.block_2.conv2.weight": (512, 512, 3, 3),
    "decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
    "decoder.up.0.block.2.conv1.weight": (128, 128, 3, 3),
    "decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
    "quant_conv.weight": (8, 8, 1, 1),
}


def test_a_full_size_openclip_has_the_published_names() -> None:
    with torch.device("meta"):
        config = CLIPTextConfig.from_dict(sdxl1.CONFIG["text_encoder_2/config.json"])
        weights = single_file_keys.open_clip_weights(CLIPTextModelWithProjection(config))
    assert len(weights) == 32 * 12 + 5
    expected = {
        "positional_embedding": (77, 1280),
        "token_embedding.weight": (49408, 1280),
        "ln_final.bias": (1280,),
        "text_projection": (1280, 1280),
        "transformer.resblocks.31.attn.in_proj_weight": (3840, 1280),
        "transformer.resblocks.31.attn.in_proj_bias": (3840,),
        "transformer.resblocks.31.attn.out_proj.weight": (1280, 1280),
        "transformer.resblocks.0.mlp.c_fc.weight": (5120, 1280),
        "transformer.resblocks.0.ln_2.weight": (1280,),
    }
    assert {name: tuple(weights[name].shape) for name in expected} == expected


# Reading them back


STOCK: dict[str, tuple[Any, dict[str, Any]]] = {
    "sd15": (StableDiffusionPipeline, {"safety_checker": None, "feature_extractor": None}),
    "thin": (StableDiffusionPipeline, {"safety_checker": None, "feature_extractor": None}),
    "sdxl1": (StableDiffusionXLPipeline, {}),
}


def written(branch: Branch, folder: Path, file: Path) -> Path:
    """A file of a branch's weights; its sidecar has what the folder has besides."""
    without = "transformer/*.safetensors" if folder.name == "flux1" else "*/*.safetensors"
    return tiny.write_with_sidecar(branch.original_weights(), folder, file, without)


def test_a_written_file_is_the_folder_it_came_from(folder: Path, tmp_path: Path) -> None:
    branch = load(folder, tmp_path)
    again = load(written(branch, folder, tmp_path / f"{folder.name}.safetensors"), tmp_path)
    assert_same_weights(again.pipeline, branch.pipeline)
    torch.testing.assert_close(render(again.pipeline), render(branch.pipeline), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("folder", ["tiny_sd15", "thin_sd15", "tiny_sdxl1"], indirect=True)
def test_stock_diffusers_reads_a_written_file_too(folder: Path, tmp_path: Path) -> None:
    kind, options = STOCK[folder.name]
    file = written(load(folder, tmp_path), folder, tmp_path / f"{folder.name}.safetensors")
    from_file = kind.from_single_file(str(file), config=str(sidecar(file)), local_files_only=True, **options)
    from_folder = kind.from_pretrained(folder, local_files_only=True, **options)
    assert_same_weights(from_file, from_folder)
    torch.testing.assert_close(render(from_file), render(from_folder), rtol=0, atol=ROUNDING)


def test_a_file_of_branch_fast_is_read_by_the_branch_itself(tmp_path: Path) -> None:
    """Its layers that the release does not know are in the file, and diffusers does not look for them."""
    branch = load_branch(fast_base(), CPU, tmp_path)
    assert fast_base().path is not None
    file = written(branch, fast_base().path, tmp_path / "fast.safetensors")
    with torch.no_grad():
        for weight in branch.denoiser.parameters():
            weight.zero_()
    read = load_branch(Base(1, "x", "fast", path=file), CPU, tmp_path)
    assert_same_weights(read.pipeline, load_branch(fast_base(), CPU, tmp_path).pipeline)
    branch.load_weights(file, tmp_path)
    assert_same_weights(branch.pipeline, read.pipeline)
    tensors = safetensors.torch.load_file(file)
    safetensors.torch.save_file({key: value for key, value in tensors.items() if "encoder_hid_proj" not in key}, file)
    with pytest.raises(ValueError, match="encoder_hid_proj"):
        load_branch(Base(1, "x", "fast", path=file), CPU, tmp_path)


# What is written


def test_the_weights_are_the_modules_own_without_a_gradient(folder: Path, tmp_path: Path) -> None:
    branch = load(folder, tmp_path)
    branch.denoiser.requires_grad_(True).to(torch.float16)
    weights = branch.original_weights()
    assert not any(tensor.requires_grad for tensor in weights.values())
    ours = {tensor.data_ptr() for tensor in branch.denoiser.state_dict().values()}
    assert ours & {tensor.data_ptr() for tensor in weights.values()}  # what is not stacked is not copied
    of_denoiser = [name for name in weights if folder.name == "flux1" or name.startswith("model.diffusion_model.")]
    assert {weights[name].dtype for name in of_denoiser} == {torch.float16}
    assert {weights[name].dtype for name in weights.keys() - of_denoiser} <= {torch.float32}


def test_adapters_are_left_out(folder: Path, tmp_path: Path) -> None:
    branch = load(folder, tmp_path)
    before = branch.original_weights()
    adapter = LoraConfig(r=2, target_modules=branch.lora_targets["all"], init_lora_weights=False)
    branch.denoiser.add_adapter(adapter)  # type: ignore[operator]
    assert any(".lora_A." in name for name in branch.denoiser.state_dict())
    assert same(branch.original_weights(), before)


@pytest.mark.parametrize("folder", ["tiny_sd15", "tiny_sdxl1"], indirect=True)
def test_text_encoders_that_have_been_dropped_are_missed(folder: Path, tmp_path: Path) -> None:
    branch = load(folder, tmp_path)
    last = [name for name in PARTS if name in branch.text_encoders][-1]
    branch.pipeline.register_modules(**{last: None})
    with pytest.raises(ValueError, match="text encoder has been dropped"):
        branch.original_weights()


def test_a_flux1_file_does_without_text_encoders(tiny_flux1: Path, tmp_path: Path) -> None:
    branch = load(tiny_flux1, tmp_path)
    before = branch.original_weights()
    branch.pipeline.register_modules(text_encoder=None, text_encoder_2=None)
    assert same(branch.original_weights(), before)
