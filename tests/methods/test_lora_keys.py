"""The names and sizes of the files of a LoRA at full size, by the rules of the programs that read them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
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
from diffusers.utils import convert_unet_state_dict_to_peft
from torch import Tensor, nn

from tests.helpers.marks import long_but
from tests.helpers.tiny import BFL_DOUBLE_NAMES, BFL_NAMES, BFL_SINGLE_NAMES, SGM_UNET_NAMES, ldm_unet_key
from tests.helpers.training import config_of
from trainer.branches import flux1, sd15, sdxl1
from trainer.branches.flux1 import Flux1
from trainer.methods import lora

# Full size, without memory for the weights of the base


@pytest.fixture(scope="module")
def attached() -> Callable[[str, str], Any]:
    """attached(family, targets): what `lora` asks of a branch, around a full-size denoiser that has its adapters."""

    def make(family: str, targets: str, rank: int = 2) -> Any:
        kind, branch_class, name, config = {
            "sd15": (UNet2DConditionModel, sd15.SD15, "unet", sd15.CONFIG),
            "sdxl1": (UNet2DConditionModel, sdxl1.SDXL1, "unet", sdxl1.CONFIG),
            "flux1": (FluxTransformer2DModel, Flux1, "transformer", flux1.CONFIG),
        }[family]
        with torch.device("meta"):
            denoiser = kind.from_config(config[f"{name}/config.json"])
        branch = SimpleNamespace(
            denoiser=denoiser, denoiser_name=name, text_encoders={}, lora_targets=branch_class.lora_targets,
            parts=SimpleNamespace(),
        )  # fmt: skip
        branch.kohya_layers = partial(branch_class.kohya_layers, branch)
        with torch.device("meta"):
            (group,) = lora.attach(branch, config_of(targets=targets, rank=rank))
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


def test_kohya_s_names_of_the_full_size_sdxl(written: Callable[[str, str, int], Files]) -> None:
    names = {key.partition(".")[0] for key in written("sdxl1", "all", 2)[1]}
    assert len(names) == 722
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


# Each file by the rules of its readers

Files = tuple[Any, dict[str, Tensor], dict[str, Tensor]]  # the branch, and the tensors of both files
FAMILIES, SETS = ("sd15", "sdxl1", "flux1"), ("cross_attention", "attention", "all")
SOME = [("sd15", "cross_attention"), ("sdxl1", "cross_attention"), ("flux1", "attention"), ("flux1", "all")]
TARGETS = [(family, targets) for family in FAMILIES for targets in SETS]
PIPELINES = {"sd15": StableDiffusionPipeline, "sdxl1": StableDiffusionXLPipeline, "flux1": FluxPipeline}


@pytest.fixture(scope="module")
def written(
    attached: Callable[..., Any],
) -> Callable[[str, str, int], Files]:
    """written(family, targets, rank). Neighbouring adapters have other values."""

    @cache
    def make(family: str, targets: str, rank: int) -> Files:
        branch = attached(family, targets, rank=rank)
        for number, module in enumerate(m for m in branch.denoiser.modules() if hasattr(m, "lora_A")):
            for half, value in ((module.lora_A["default"], 1.0), (module.lora_B["default"], 1.0 + number % 7)):
                half.weight = nn.Parameter(torch.full(half.weight.shape, value, dtype=torch.bfloat16))
        config = config_of(targets=targets, rank=rank, alpha=rank, save_dtype="bfloat16")
        return branch, *lora.file_tensors(branch, config)

    return make


def original_layers(family: str, denoiser: nn.Module) -> Iterator[tuple[str, list[str]]]:
    """The name of each layer that kohya's trainer and ComfyUI know, with dots, and the layers of diffusers in it.

    Both make `lora_unet_` and the name in the model that they load, with `_` for `.`: kohya-ss/sd-scripts,
    networks/lora.py and lora_flux.py; ComfyUI, comfy/lora.py, model_lora_keys_unet (for SD 1.5 and SDXL it takes the
    names of diffusers, too). Their models have the names of the original releases (tests/helpers/tiny.py); kohya's
    SD 1.5 has those of diffusers.
    """
    if family != "flux1":
        for name, _ in denoiser.named_modules():
            yield ldm_unet_key(f"{name}.", SGM_UNET_NAMES).rstrip(".") if family == "sdxl1" else name, [name]
        return
    blocks = [("", "", BFL_NAMES)]
    blocks += [(f"double_blocks.{i}.", f"transformer_blocks.{i}.", BFL_DOUBLE_NAMES) for i in range(19)]
    blocks += [(f"single_blocks.{i}.", f"single_transformer_blocks.{i}.", BFL_SINGLE_NAMES) for i in range(38)]
    for theirs, ours, names in blocks:
        for original, parts in names:
            yield f"{theirs}{original}", [f"{ours}{part}" for part in parts.split()]


@pytest.mark.parametrize("rank", [2, pytest.param(1, marks=pytest.mark.long), pytest.param(4, marks=pytest.mark.long)])
@pytest.mark.parametrize(("family", "targets"), long_but(SOME, TARGETS))
def test_kohya_and_comfyui_find_a_layer_of_the_right_size_for_every_key(
    written: Any, family: str, targets: str, rank: int
) -> None:
    branch, kohya, _ = written(family, targets, rank)
    layers = {f"lora_unet_{name.replace('.', '_')}": parts for name, parts in original_layers(family, branch.denoiser)}
    names = {key.partition(".")[0] for key in kohya}
    assert names <= layers.keys()
    assert kohya.keys() == {f"{n}.{part}" for n in names for part in ("lora_down.weight", "lora_up.weight", "alpha")}
    trained = set()
    for name in names:
        parts = [branch.denoiser.get_submodule(part) for part in layers[name]]
        with_adapter = [hasattr(part, "lora_A") for part in parts]
        trained |= {part for part, has in zip(layers[name], with_adapter, strict=True) if has}
        down, up = kohya[f"{name}.lora_down.weight"], kohya[f"{name}.lora_up.weight"]
        rows = [part.weight.shape[0] for part in parts]
        inner = rank * sum(with_adapter)  # of the layers that were trained, and no more
        assert down.shape[:2] == (inner, parts[0].weight.shape[1]) and up.shape[:2] == (sum(rows), inner)
        assert kohya[f"{name}.alpha"] == inner  # both scale by alpha / inner width, which is 1 here
        column = 0
        for has, part in zip(with_adapter, up.split(rows), strict=True):
            own = part[:, column : column + rank * has]
            assert own.all() and part.count_nonzero() == own.numel()  # a layer's rows have its own columns only
            column += rank * has
    assert len(trained) == branch.count


@pytest.mark.parametrize(("family", "targets"), long_but(SOME, TARGETS))
def test_diffusers_reads_every_key_of_both_files(written: Any, family: str, targets: str) -> None:
    branch, kohya, diffusers = written(family, targets, 2)
    layers = {name for name, module in branch.denoiser.named_modules() if hasattr(module, "lora_A")}
    prefix = branch.denoiser_name
    assert diffusers.keys() == {f"{prefix}.{name}.{half}.weight" for name in layers for half in ("lora_A", "lora_B")}
    options = {"unet_config": branch.denoiser.config} if family == "sdxl1" else {}
    read = PIPELINES[family].lora_state_dict(dict(kohya), **options)
    state = convert_unet_state_dict_to_peft(read[0] if isinstance(read, tuple) else read)
    # diffusers 0.42.1 loses FLUX.1's prefix of the final projection: `lora.load` puts it back.
    lost = {key for key in state if not key.startswith(f"{prefix}.")}
    assert lost <= ({f"proj_out.{half}.weight" for half in ("lora_A", "lora_B")} if family == "flux1" else set())
    found, ours = products(state, prefix), products(diffusers, prefix)
    extra = found.keys() - ours.keys()
    assert not any(found[name].any() for name in extra)  # a part of a fused layer that was not trained: it does nothing
    assert found.keys() - extra == ours.keys() == layers
    assert all(torch.equal(found[name], ours[name]) for name in ours)


def products(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Layer -> the first rows of B @ A, from peft's keys."""
    layers = [key.removesuffix(".lora_A.weight") for key in state if key.endswith(".lora_A.weight")]
    return {
        layer.removeprefix(f"{prefix}."): state[f"{layer}.lora_B.weight"][:4].flatten(1).float()
        @ state[f"{layer}.lora_A.weight"].flatten(1).float()
        for layer in layers
    }


@pytest.mark.parametrize(
    ("targets", "kohya_mib", "diffusers_mib"),
    [
        # diffusers': r (in + out) numbers of 2 bytes for each trained layer, r = 64. kohya's: for a fused layer with n
        # trained parts, n r (in + out of all parts); its `up` cannot be written without zeros.
        ("attention", 542, 200),
        ("all", 884, 499),
    ],
)
def test_the_files_of_the_default_flux_have_the_sizes_that_were_computed(
    written: Any, targets: str, kohya_mib: int, diffusers_mib: int
) -> None:
    _, kohya, diffusers = written("flux1", targets, 1)
    of_rank_64 = [64 * sum(t.nbytes for t in file.values() if t.ndim) / 2**20 for file in (kohya, diffusers)]
    assert [round(mib) for mib in of_rank_64] == [kohya_mib, diffusers_mib]
