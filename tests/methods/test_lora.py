"""LoRA: what is saved works elsewhere and gives the very pictures that the trained adapters give."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.helpers.tiny import BFL_DOUBLE_NAMES, BFL_NAMES, BFL_SINGLE_NAMES, SGM_UNET_NAMES, ldm_unet_key
from tests.helpers.training import RecordedReport, Run, TrainingSetup, config_of
from trainer.branches import flux1, sd15, sdxl1
from trainer.branches.flux1 import Flux1
from trainer.methods import lora

METADATA = {"modelspec.title": "my dog"}
KOHYA, DIFFUSERS = FILES = ["lora.safetensors", "lora_diffusers.safetensors"]
PIPELINES = {"sd15": StableDiffusionPipeline, "sdxl1": StableDiffusionXLPipeline, "flux1": FluxPipeline}
ENCODERS = ("text_encoder", "text_encoder_2")


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
    params=["sd15", "sd15 and encoder", "sdxl1", "sdxl1 and encoders", "flux1", "flux1 of attention"],
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


# Full size, without memory for the weights of the base


@pytest.fixture(scope="module")
def attached() -> Callable[[str, str], Any]:
    """attached(family, targets): what `lora` asks of a branch, around a full-size denoiser that has its adapters."""

    def make(family: str, targets: str, **changes: object) -> Any:
        kind, branch_class, name, config = {
            "sd15": (UNet2DConditionModel, sd15.SD15, "unet", sd15.CONFIG),
            "sdxl1": (UNet2DConditionModel, sdxl1.SDXL1, "unet", sdxl1.CONFIG),
            "flux1": (FluxTransformer2DModel, Flux1, "transformer", flux1.CONFIG),
        }[family]
        with torch.device("meta"):
            denoiser = kind.from_config(config[f"{name}/config.json"] | changes)
        branch = SimpleNamespace(
            denoiser=denoiser, denoiser_name=name, text_encoders={}, lora_targets=branch_class.lora_targets,
            parts=SimpleNamespace(),
        )  # fmt: skip
        branch.kohya_layers = partial(branch_class.kohya_layers, branch)
        with torch.device("meta"):
            (group,) = lora.attach(branch, config_of(targets=targets))
        branch.count = len(group["params"]) // 2
        return branch

    return make


@pytest.mark.parametrize(
    ("family", "targets", "count"),
    [
        ("sd15", "cross_attention", 16 * 2),
        ("sd15", "attention", 128),
        ("sd15", "all", 192),
        ("sdxl1", "cross_attention", 70 * 2),
        ("sdxl1", "attention", 560),
        ("sdxl1", "all", 722),  # the number that kohya's own trainer tells for SDXL
        ("flux1", "cross_attention", 19 * 2),
        ("flux1", "attention", 19 * 8 + 38 * 3),
        ("flux1", "all", 419),
    ],
)
def test_the_full_size_model_gets_as_many_adapters_as_is_known(
    attached: Callable[[str, str], Any], family: str, targets: str, count: int
) -> None:
    assert attached(family, targets).count == count


def test_kohya_s_names_of_the_full_size_sdxl(attached: Callable[[str, str], Any]) -> None:
    layers = [name for name, module in attached("sdxl1", "all").denoiser.named_modules() if hasattr(module, "lora_A")]
    names = {f"lora_unet_{sdxl1.original_name(name).replace('.', '_')}" for name in layers}
    assert len(names) == len(layers) == 722
    assert names > {
        "lora_unet_input_blocks_4_1_proj_in",
        "lora_unet_input_blocks_5_1_transformer_blocks_1_attn2_to_k",
        "lora_unet_input_blocks_8_1_transformer_blocks_9_attn1_to_q",
        "lora_unet_middle_block_1_transformer_blocks_9_ff_net_0_proj",
        "lora_unet_output_blocks_0_1_transformer_blocks_0_attn2_to_out_0",
        "lora_unet_output_blocks_2_1_transformer_blocks_9_ff_net_2",
        "lora_unet_output_blocks_5_1_proj_out",
    }
    entries = {re.match(r"lora_unet_((in|out)put_blocks_\d_1|middle_block_1)_", name)[1] for name in names}
    blocks = [f"input_blocks_{n}_1" for n in (4, 5, 7, 8)] + [f"output_blocks_{n}_1" for n in range(6)]
    assert entries == {*blocks, "middle_block_1"}


@pytest.mark.parametrize("targets", ["all", "attention"])
@pytest.mark.parametrize("alpha", [2, 4])
def test_diffusers_reads_our_kohya_keys_of_the_real_flux(
    attached: Callable[..., Any], tmp_path: Path, alpha: int, targets: str
) -> None:
    branch = attached("flux1", targets, num_layers=1, num_single_layers=1)
    generator = torch.Generator().manual_seed(0)
    for module in branch.denoiser.modules():
        if hasattr(module, "lora_A"):
            for half in (module.lora_A["default"], module.lora_B["default"]):
                half.weight = nn.Parameter(torch.randn(half.weight.shape, generator=generator))
    lora.save(branch, tmp_path, config_of(rank=2, alpha=alpha, targets=targets), {})
    ours, read = load_file(tmp_path / DIFFUSERS), FluxPipeline.lora_state_dict(tmp_path, weight_name=KOHYA)
    final = {f"proj_out.{half}.weight" for half in ("lora_A", "lora_B")} if targets == "all" else set()
    assert ours.keys() >= {f"transformer.{name}" for name in final}
    # Of the final projection it forgets whose it is, and so leaves it out: the reason why its users get the other file.
    assert {name for name in read if not name.startswith("transformer.")} == final
    kept = ours.keys() - {f"transformer.{name}" for name in final}
    given = {name for name in read if name.startswith("transformer.")}
    if targets == "attention":  # the rows of linear1 that have no adapter come back as one that does nothing
        extra = {f"transformer.single_transformer_blocks.0.proj_mlp.{half}.weight" for half in ("lora_A", "lora_B")}
        assert given - kept == extra and not any(read[name].any() for name in extra)
        given -= extra
    assert given == kept and len(kept) > 20
    for name in (name.removesuffix(".lora_A.weight") for name in kept if ".lora_A." in name):
        down, up = (ours[f"{name}.{half}.weight"] for half in ("lora_A", "lora_B"))
        their_down, their_up = (read[f"{name}.{half}.weight"] for half in ("lora_A", "lora_B"))
        if alpha == 2:  # scale 1
            assert torch.equal(down, their_down) and torch.equal(up, their_up), name
        else:  # the scale is ours in one half and theirs in the other
            assert torch.equal(2 * down, their_down) and torch.equal(up, 2 * their_up), name
