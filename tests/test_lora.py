"""LoRA: what is saved works elsewhere and gives the very pictures that the trained adapters give."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.bench import Bench, Run, Told, config_of
from trainer.methods import lora

METADATA = {"modelspec.title": "my dog"}
FILES = ["lora.safetensors", "lora_diffusers.safetensors"]


@dataclass
class Trained:
    """A trained branch, and the folder that it was saved into."""

    run: Run
    folder: Path
    files: list[str]


@pytest.fixture(scope="module", params=["denoiser", "denoiser and text encoder"])
def trained(
    request: pytest.FixtureRequest, tiny_sd15: Path, photos: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> Trained:
    """Adapters of scale 2, trained at a high rate so that pictures change a lot."""
    folder = tmp_path_factory.mktemp("lora")
    text_encoder_lr = 5e-2 if "text encoder" in request.param else 0
    config = config_of(steps=4, lr=5e-2, text_encoder_lr=text_encoder_lr, rank=2, alpha=4, resolution=64)
    run = Bench(tiny_sd15, folder / "cache", photos, config).start()
    run.train(folder / "states", Told())
    if run.branch.pipeline.text_encoder is None:  # it was not trained, and the pictures of these tests want it back
        stock = StableDiffusionPipeline.from_pretrained(tiny_sd15, local_files_only=True, safety_checker=None)
        run.branch.pipeline.register_modules(text_encoder=stock.text_encoder)
    (folder / "model").mkdir()
    return Trained(run, folder / "model", lora.save(run.branch, folder / "model", config, METADATA))


@pytest.fixture
def stock(tiny_sd15: Path) -> Any:
    """The base in diffusers' own pipeline."""
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd15, local_files_only=True, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def picture(pipeline: Any) -> Tensor:
    """The latents of a picture of a fixed seed, which say more than its pixels."""
    generator = torch.Generator().manual_seed(0)
    latents: Tensor = pipeline(
        "a dog", height=64, width=64, num_inference_steps=3, generator=generator, output_type="latent"
    ).images
    return latents


def distance(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max())


@pytest.mark.parametrize("file", FILES)
def test_a_stock_pipeline_renders_what_the_trained_adapters_do(trained: Trained, stock: Any, file: str) -> None:
    base = picture(stock)
    stock.load_lora_weights(trained.folder, weight_name=file)
    expected = picture(trained.run.branch.pipeline)
    assert distance(expected, base) > 0.1
    assert distance(picture(stock), expected) < 1e-4


def test_a_program_that_merges_kohya_keys_renders_the_same(trained: Trained, stock: Any) -> None:
    merged = merge_kohya(stock, trained.folder / "lora.safetensors")
    assert merged == len(trained.run.weights()) // 2  # no adapter is left out
    assert distance(picture(stock), picture(trained.run.branch.pipeline)) < 1e-4


@torch.no_grad()
def merge_kohya(pipeline: Any, file: Path) -> int:
    """weight += alpha / rank * up @ down, as A1111 and kohya's tools have it. Returns the number of layers merged."""
    layers = {f"lora_unet_{name.replace('.', '_')}": layer for name, layer in pipeline.unet.named_modules()}
    for name, layer in pipeline.text_encoder.named_modules():
        layers[f"lora_te_text_model_{name.removeprefix('text_model.').replace('.', '_')}"] = layer
    tensors = load_file(file)
    names = {key.partition(".")[0] for key in tensors}
    for name in names:
        down, up, alpha = (tensors[f"{name}.{part}"] for part in ("lora_down.weight", "lora_up.weight", "alpha"))
        change = alpha / len(down) * (up.flatten(1) @ down.flatten(1))
        layers[name].weight += change.reshape(layers[name].weight.shape)
    return len(names)


def test_the_file_most_programs_read_comes_first_and_has_kohya_s_names(trained: Trained) -> None:
    assert trained.files == FILES
    tensors = load_file(trained.folder / "lora.safetensors")
    names = {key.partition(".")[0] for key in tensors}
    assert tensors.keys() == {f"{n}.{part}" for n in names for part in ("lora_down.weight", "lora_up.weight", "alpha")}
    unet = {name for name in names if name.startswith("lora_unet_")}
    assert len(unet) == 192  # the number that kohya's own trainer tells for a Stable Diffusion 1.5
    assert unet > {
        "lora_unet_down_blocks_0_attentions_0_proj_in",
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj",
        "lora_unet_up_blocks_1_attentions_0_transformer_blocks_0_attn2_to_out_0",
    }
    heads = [f"lora_te_text_model_encoder_layers_{n}_self_attn_{p}" for n in (0, 1) for p in lora.TEXT_ENCODER_TARGETS]
    assert names - unet == (set(heads) if trained.run.config.text_encoder_lr else set())
    assert {tensors[f"{name}.alpha"].item() for name in names} == {trained.run.config.alpha}


@pytest.mark.parametrize("file", FILES)
def test_every_tensor_is_finite_and_trained(trained: Trained, file: str) -> None:
    for name, tensor in load_file(trained.folder / file).items():
        assert torch.isfinite(tensor).all(), name
        # With one latent in the middle block there is nothing to attend to: its queries and keys have no gradient.
        if not ("mid_block" in name and "attn1" in name and ("to_q" in name or "to_k" in name)):
            assert tensor.any(), name


@pytest.mark.parametrize("file", FILES)
def test_the_metadata_is_in_the_file(trained: Trained, file: str) -> None:
    with safe_open(trained.folder / file, "pt") as tensors:
        assert tensors.metadata() == METADATA


def test_apply_renders_at_the_strength_that_is_asked_for(trained: Trained, stock: Any) -> None:
    base, expected = picture(stock), picture(trained.run.branch.pipeline)
    lora.apply(stock, trained.folder, 1.0)
    assert distance(picture(stock), expected) < 1e-4
    lora.apply(stock, trained.folder, 0.0)
    assert distance(picture(stock), base) == 0
    lora.apply(stock, trained.folder, 0.5)
    assert distance(picture(stock), base) > 0.01 and distance(picture(stock), expected) > 0.01


def test_apply_takes_the_place_of_the_model_before(trained: Trained, stock: Any, tmp_path: Path) -> None:
    base = picture(stock)
    lora.apply(stock, trained.folder, 1.0)
    changed = picture(stock)
    silent = Path(shutil.copytree(trained.folder, tmp_path / "silent"))  # a model that changes nothing
    for file in FILES:
        tensors = load_file(silent / file)
        save_file(
            {key: value * ("lora_down" in key or "lora_A" in key) for key, value in tensors.items()}, silent / file
        )
    lora.apply(stock, silent, 1.0)
    assert distance(changed, base) > 0.1
    assert distance(picture(stock), base) == 0  # nothing of the first one is left


def test_fewer_layers_are_trained_where_only_attention_is_asked_for(
    tiny_sd15: Path, tmp_path: Path, photos: list[Path]
) -> None:
    counted = {}
    for targets in ("attention", "all"):
        run = Bench(tiny_sd15, tmp_path, photos, config_of(targets=targets, resolution=64)).start()
        counted[targets] = len(run.weights()) // 2
    assert counted == {"attention": 128, "all": 192}
