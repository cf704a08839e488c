"""LoRA: what is saved works elsewhere and gives the very pictures that the trained adapters give."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    FluxPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.helpers.marks import long_but
from tests.helpers.tiny import BFL_DOUBLE_NAMES, BFL_NAMES, BFL_SINGLE_NAMES, SGM_UNET_NAMES, ldm_unet_key
from tests.helpers.training import RecordedReport, Run, TrainingSetup, config_of
from trainer.methods import lora

METADATA = {"modelspec.title": "my dog"}
KOHYA, DIFFUSERS = FILES = ["lora.safetensors", "lora_diffusers.safetensors"]
PIPELINES = {"sd15": StableDiffusionPipeline, "sdxl1": StableDiffusionXLPipeline, "flux1": FluxPipeline}
ENCODERS = ("text_encoder", "text_encoder_2")


TRAINED = ["sd15", "sd15 and encoder", "sdxl1", "sdxl1 and encoders", "flux1", "flux1 of attention"]


@dataclass
class Trained:
    """A trained branch of a family, and the folder that it was saved into."""

    family: str
    base: Path
    run: Run
    folder: Path
    files: list[str]

    def stock(self) -> Any:
        """The base in diffusers' own pipeline."""
        options = {"safety_checker": None} if self.family == "sd15" else {}
        pipeline = PIPELINES[self.family].from_pretrained(self.base, local_files_only=True, **options)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


@pytest.fixture(
    scope="module",
    params=long_but(("sd15", "sdxl1 and encoders", "flux1"), TRAINED),
)
def trained(request: pytest.FixtureRequest, photos: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Adapters of scale 2, trained at a high rate so that pictures change a lot."""
    folder, family = tmp_path_factory.mktemp("lora"), request.param.split()[0]
    base = request.getfixturevalue(f"tiny_{family}")
    text_encoder_lr = 5e-2 if "encoder" in request.param else 0
    targets = "attention" if "attention" in request.param else "all"
    config = config_of(
        steps=4, lr=5e-2, text_encoder_lr=text_encoder_lr, rank=2, alpha=4, resolution=64, targets=targets
    )
    run = TrainingSetup(base, folder / "cache", photos, config, family).start()
    run.train(folder / "states", RecordedReport())
    (folder / "model").mkdir()
    files = lora.save(run.branch, folder / "model", config, METADATA)
    made = Trained(family, base, run, folder / "model", files)
    parts = run.branch.pipeline.components
    # Those that were not trained are gone, and the pictures of these tests want them back.
    gone = {name: getattr(made.stock(), name) for name in ENCODERS if name in parts and parts[name] is None}
    run.branch.pipeline.register_modules(**gone)
    run.branch.pipeline.set_progress_bar_config(disable=True)
    return made


@pytest.fixture
def stock(trained: Trained) -> Any:
    return trained.stock()


@pytest.fixture(scope="module")
def expected(trained: Trained) -> Tensor:
    """The picture that the trained adapters give."""
    return picture(trained.run.branch.pipeline)


def picture(pipeline: Any) -> Tensor:
    """The latents of a picture of a fixed seed, which say more than its pixels."""
    generator = torch.Generator().manual_seed(0)
    latents: Tensor = pipeline(
        "a dog", height=64, width=64, num_inference_steps=2, generator=generator, output_type="latent"
    ).images
    return latents


ROUNDING = 1e-4  # the same sums in another order: on some CPUs a kernel depends on where its numbers lie in memory


def around(pipeline: Any) -> Any:
    """What `lora.apply` asks of a branch, around a stock pipeline."""
    return SimpleNamespace(pipeline=pipeline, parts=pipeline)


def distance(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max())


# Files that work elsewhere


def test_a_stock_pipeline_renders_what_the_trained_adapters_do(trained: Trained, expected: Tensor) -> None:
    base = picture(trained.stock())
    assert distance(expected, base) > 0.1
    for file in lora.checkable_files(trained.run.branch):
        stock = trained.stock()
        stock.load_lora_weights(trained.folder, weight_name=file)
        assert distance(picture(stock), expected) < 1e-4, file


def test_both_files_are_readable_but_for_flux_s_kohya_keys(trained: Trained) -> None:
    assert lora.checkable_files(trained.run.branch) == ([DIFFUSERS] if trained.family == "flux1" else FILES)


def test_a_program_that_merges_kohya_keys_renders_the_same(trained: Trained, stock: Any, expected: Tensor) -> None:
    base = picture(stock)
    merged = merge_kohya(trained, stock)
    assert merged == len(trained.run.weights()) // 2  # no adapter is left out
    assert distance(picture(stock), base) > 0.1
    assert distance(picture(stock), expected) < 1e-4


@torch.no_grad()
def merge_kohya(trained: Trained, pipeline: Any) -> int:
    """weight += alpha / rank * up @ down, as A1111, ComfyUI and kohya's tools have it, on the layers of the original
    release: where several of ours are one there, the sum is split among them. Returns how many of ours were changed."""
    layers, tensors = dict(kohya_layers(trained.family, pipeline)), load_file(trained.folder / KOHYA)
    names, changed = {key.partition(".")[0] for key in tensors}, 0
    for name in names:
        down, up, alpha = (tensors[f"{name}.{part}"] for part in ("lora_down.weight", "lora_up.weight", "alpha"))
        whole = torch.cat([layer.weight.flatten(1) for layer in layers[name]])
        change = alpha / len(down) * (up.flatten(1) @ down.flatten(1))
        rows = [len(layer.weight) for layer in layers[name]]
        for layer, weight, part in zip(layers[name], (whole + change).split(rows), change.split(rows), strict=True):
            layer.weight.copy_(weight.reshape(layer.weight.shape))
            changed += len(rows) == 1 or bool(part.any())  # a block of zeros is a layer without an adapter
    return changed


def kohya_layers(family: str, pipeline: Any) -> Iterator[tuple[str, list[nn.Module]]]:
    """kohya's name of each layer, from the names that the original releases have (tests/tiny.py), and ours in it."""
    for number, part in enumerate(ENCODERS, 1):
        prefix = "lora_te" if family == "sd15" else f"lora_te{number}"
        for name, layer in getattr(pipeline, part, nn.Module()).named_modules():
            yield f"{prefix}_text_model_{name.removeprefix('text_model.').replace('.', '_')}", [layer]
    if family != "flux1":
        for name, layer in pipeline.unet.named_modules():
            original = ldm_unet_key(f"{name}.", SGM_UNET_NAMES).rstrip(".") if family == "sdxl1" else name
            yield f"lora_unet_{original.replace('.', '_')}", [layer]
        return
    blocks = [("", "", BFL_NAMES)]
    blocks += [(f"double_blocks.{i}.", f"transformer_blocks.{i}.", BFL_DOUBLE_NAMES) for i in range(2)]
    blocks += [(f"single_blocks.{i}.", f"single_transformer_blocks.{i}.", BFL_SINGLE_NAMES) for i in range(2)]
    for theirs, ours, names in blocks:
        for original, parts in names:
            layers = [pipeline.transformer.get_submodule(f"{ours}{part}") for part in parts.split()]
            yield f"lora_unet_{theirs}{original}".replace(".", "_"), layers


def test_the_file_most_programs_read_comes_first_and_has_kohya_s_names(trained: Trained) -> None:
    assert trained.files == FILES
    tensors = load_file(trained.folder / KOHYA)
    names = {key.partition(".")[0] for key in tensors}
    assert tensors.keys() == {f"{n}.{part}" for n in names for part in ("lora_down.weight", "lora_up.weight", "alpha")}
    unet = {name for name in names if name.startswith("lora_unet_")}
    some = {
        "sd15": {
            "lora_unet_down_blocks_0_attentions_0_proj_in",
            "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj",
            "lora_unet_up_blocks_1_attentions_0_transformer_blocks_0_attn2_to_out_0",
        },
        "sdxl1": {
            "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
            "lora_unet_input_blocks_8_1_transformer_blocks_1_attn2_to_out_0",
            "lora_unet_middle_block_1_transformer_blocks_0_ff_net_0_proj",
            "lora_unet_output_blocks_0_1_proj_in",
            "lora_unet_output_blocks_5_1_transformer_blocks_0_ff_net_2",
        },
        "flux1": {
            "lora_unet_double_blocks_0_img_attn_qkv",
            "lora_unet_double_blocks_1_txt_attn_proj",
            "lora_unet_single_blocks_1_linear1",
        },
    }[trained.family]
    assert unet > some
    if trained.family == "sd15":
        assert len(unet) == 192  # the number that kohya's own trainer tells for a Stable Diffusion 1.5
    if trained.family == "flux1" and trained.run.config.targets == "all":
        assert unet > {"lora_unet_double_blocks_0_img_mlp_0", "lora_unet_single_blocks_0_linear2"}
        assert len(unet) == 2 * 8 + 2 * 2 + 1
    heads = [f"text_model_encoder_layers_{n}_self_attn_{p}" for n in (0, 1) for p in lora.TEXT_ENCODER_TARGETS]
    prefixes = ["lora_te"] if trained.family == "sd15" else ["lora_te1", "lora_te2"]
    encoders = {f"{prefix}_{head}" for prefix in prefixes for head in heads}
    assert names - unet == (encoders if trained.run.config.text_encoder_lr else set())
    for name in names:  # readers divide by the inner width: the scale is 2 everywhere
        assert tensors[f"{name}.alpha"].item() / len(tensors[f"{name}.lora_down.weight"]) == 2


@pytest.mark.parametrize("file", FILES)
def test_every_tensor_is_finite_and_trained(trained: Trained, file: str) -> None:
    for name, tensor in load_file(trained.folder / file).items():
        assert torch.isfinite(tensor).all(), name
        if not without_gradient(trained.family, name):
            assert tensor.any(), name


def without_gradient(family: str, name: str) -> bool:
    """What a layer puts out has no say: its adapter stays as it began, half of it zeros."""
    if family == "sd15":  # with one latent in the middle block there is nothing to attend to
        return "mid_block" in name and "attn1" in name and ("to_q" in name or "to_k" in name)
    if family == "sdxl1":  # SDXL reads what comes out of the last but one layer of its first encoder
        return re.search(r"^(lora_te1_|text_encoder\.).*layers.1.", name) is not None
    return False


@pytest.mark.parametrize("file", FILES)
def test_the_metadata_is_in_the_file(trained: Trained, file: str) -> None:
    with safe_open(trained.folder / file, "pt") as tensors:
        assert tensors.metadata() == METADATA


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_model_is_saved_in_the_format_that_is_asked_for(trained: Trained, tmp_path: Path, dtype: str) -> None:
    lora.save(trained.run.branch, tmp_path, trained.run.config.model_copy(update={"save_dtype": dtype}), {})
    for file in FILES:
        halves, exact = load_file(tmp_path / file), load_file(trained.folder / file)
        assert {tensor.dtype for tensor in exact.values()} == {torch.float32}
        assert {tensor.dtype for tensor in halves.values()} == {getattr(torch, dtype)}
        assert sum(one.nbytes for one in halves.values()) * 2 == sum(one.nbytes for one in exact.values())
        assert halves.keys() == exact.keys()
        assert all(torch.equal(halves[name], exact[name].to(getattr(torch, dtype))) for name in exact)


# Applying


def test_apply_renders_at_the_strength_that_is_asked_for(trained: Trained, stock: Any, expected: Tensor) -> None:
    base = picture(stock)
    lora.apply(around(stock), trained.folder, 1.0)
    assert distance(picture(stock), expected) < 1e-4
    lora.apply(around(stock), trained.folder, 0.0)
    assert distance(picture(stock), base) < ROUNDING
    lora.apply(around(stock), trained.folder, 0.5)
    assert distance(picture(stock), base) > 0.01 and distance(picture(stock), expected) > 0.01
    lora.remove(stock)
    assert distance(picture(stock), base) < ROUNDING


def test_apply_takes_the_place_of_the_model_before(trained: Trained, stock: Any, tmp_path: Path) -> None:
    base = picture(stock)
    lora.apply(around(stock), trained.folder, 1.0)
    changed = picture(stock)
    silent = Path(shutil.copytree(trained.folder, tmp_path / "silent"))  # a model that changes nothing
    for file in FILES:
        tensors = load_file(silent / file)
        save_file(
            {key: value * ("lora_down" in key or "lora_A" in key) for key, value in tensors.items()}, silent / file
        )
    lora.apply(around(stock), silent, 1.0)
    assert distance(changed, base) > 0.1
    assert distance(picture(stock), base) < ROUNDING  # nothing of the first one is left
