"""LoRA files of other programs change the weights as those programs say, or are refused in words.

The expected change is written out here, from the formulas in LyCORIS' and kohya's code and in the DoRA paper (Liu et
al. 2024, arXiv 2402.09353); no file is written by our own code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.helpers.tiny import ldm_unet_key
from tests.helpers.training import config_of
from trainer.methods import checkpoint, lora
from trainer.rendering.job import Loaded, Lora
from trainer.rendering.renderer import load_loras

Tensors = dict[str, Tensor]
Kind = Callable[[Tensor], tuple[Tensors, Tensor]]  # W -> the parts of a layer, and what they add to W
ROUNDING = 1e-5
LINEAR = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
CONV = "down_blocks.0.resnets.0.conv1"
KOHYA = {LINEAR: f"lora_unet_{LINEAR.replace('.', '_')}", CONV: f"lora_unet_{CONV.replace('.', '_')}"}


def pipeline_of(kind: Any, folder: Path) -> Any:
    options = {"safety_checker": None} if kind is StableDiffusionPipeline else {}
    return kind.from_pretrained(folder, local_files_only=True, **options)


@pytest.fixture(scope="module")
def sd15(tiny_sd15: Path) -> Any:
    return pipeline_of(StableDiffusionPipeline, tiny_sd15)


@pytest.fixture(scope="module")
def sdxl1(tiny_sdxl1: Path) -> Any:
    return pipeline_of(StableDiffusionXLPipeline, tiny_sdxl1)


@pytest.fixture(scope="module")
def flux1(tiny_flux1: Path) -> Any:
    return pipeline_of(FluxPipeline, tiny_flux1)


@pytest.fixture
def loaded(tmp_path: Path) -> Iterator[Callable[..., list[str]]]:
    """loaded(pipeline, tensors, facts, weight): loads a file of these; it is taken away after the test."""
    used = []

    def load(pipeline: Any, tensors: Tensors, facts: dict[str, str] | None = None, weight: float = 1.0) -> list[str]:
        save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / "one.safetensors", facts)
        lora.remove(pipeline)
        used.append(pipeline)
        warnings = lora.load(pipeline, tmp_path / "one.safetensors", "one")[1]
        pipeline.set_adapters("one", weight)
        return warnings

    yield load
    for pipeline in used:
        lora.remove(pipeline)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))) / 4


def weight_of(module: nn.Module, name: str) -> Tensor:
    layer: Any = module.get_submodule(name)
    weight: Tensor = getattr(layer, "base_layer", layer).weight
    return weight.detach()


@torch.no_grad()
def change(module: nn.Module, name: str) -> Tensor:
    """What the adapters on a layer add to its weight, seen from outside: by what the layer does with unit vectors."""
    layer: Any = module.get_submodule(name)
    if not hasattr(layer, "base_layer"):
        return torch.zeros_like(weight_of(module, name))
    weight = layer.base_layer.weight
    if weight.ndim == 2:
        unit = torch.eye(weight.shape[1])
        return (layer(unit) - layer.base_layer(unit)).T
    _, into, height, width = weight.shape
    unit = torch.zeros(into, into, 2 * height - 1, 2 * width - 1)
    unit[range(into), range(into), height - 1, width - 1] = 1
    seen = (layer(unit) - layer.base_layer(unit)).permute(1, 0, 2, 3)[..., : 2 * height - 1, : 2 * width - 1]
    middle = [size // 2 for size in seen.shape[2:]]
    pad = layer.base_layer.padding[0]
    cut = seen[:, :, middle[0] - pad : middle[0] + pad + 1, middle[1] - pad : middle[1] + pad + 1]
    return cut.flip(2, 3)


def assert_near(given: Tensor, expected: Tensor, what: str = "") -> None:
    assert given.shape == expected.shape, what
    assert float((given - expected).abs().max()) < ROUNDING * max(1.0, float(expected.abs().max())), what


# The formats: the parts of a layer (out, in, kernel), and what they add to its weight W.


def kohya(w: Tensor) -> tuple[Tensors, Tensor]:
    """sd-scripts networks/lora.py: alpha / rank * up @ down."""
    out, into, *kernel = w.shape
    down, up = random(3, into, *kernel), random(out, 3, *[1] * len(kernel))
    parts = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(6.0)}
    return parts, 2 * torch.einsum("or,ri->oi", up.flatten(1), down.flatten(1)).reshape(w.shape)


def dora_output(w: Tensor) -> tuple[Tensors, Tensor]:
    """LyCORIS locon.py, wd_on_out: the changed weight's rows get the length in dora_scale."""
    parts, added = kohya(w)
    length = random(len(w)).abs() + 0.1
    changed = w + added
    rows = torch.stack([length[o] * changed[o] / changed[o].norm() for o in range(len(w))])
    return parts | {"dora_scale": length.reshape(-1, *[1] * (w.ndim - 1))}, rows - w


def dora_input(w: Tensor) -> tuple[Tensors, Tensor]:
    """LyCORIS locon.py before 3.0, OneTrainer without norm_output_axis: the columns get it."""
    parts, added = kohya(w)
    length = random(w.shape[1]).abs() + 0.1
    changed = w + added
    columns = [length[i] * changed[:, i] / changed[:, i].norm() for i in range(w.shape[1])]
    return parts | {"dora_scale": length.reshape(1, -1, *[1] * (w.ndim - 2))}, torch.stack(columns, dim=1) - w


def dora_peft(w: Tensor) -> tuple[Tensors, Tensor]:
    """peft tuners/lora/dora.py: the same along the output, and alpha is the rank where nothing tells it."""
    down, up, length = random(3, w.shape[1]), random(len(w), 3), random(len(w)).abs() + 0.1
    changed = w + up @ down
    rows = torch.stack([length[o] * changed[o] / changed[o].norm() for o in range(len(w))])
    return {"lora_A.weight": down, "lora_B.weight": up, "lora_magnitude_vector": length}, rows - w


def locon_tucker(w: Tensor) -> tuple[Tensors, Tensor]:
    """LyCORIS locon.py, use_tucker: three convolutions one after the other."""
    out, into, *kernel = w.shape
    down, mid, up = random(3, into, 1, 1), random(3, 3, *kernel), random(out, 3, 1, 1)
    parts = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up, "alpha": torch.tensor(1.5)}
    return parts, 0.5 * torch.einsum("os,srhw,ri->oihw", up[..., 0, 0], mid, down[..., 0, 0])


def loha(w: Tensor, rank: int = 2) -> tuple[Tensors, Tensor]:
    """LyCORIS loha.py: alpha / rank * (w1_a @ w1_b) * (w2_a @ w2_b), element by element."""
    out, into = len(w), w[0].numel()
    one, two = (random(out, rank), random(rank, into)), (random(out, rank, seed=5), random(rank, into, seed=6))
    parts = {
        f"hada_w{n}_{side}": half for n, pair in ((1, one), (2, two)) for side, half in zip("ab", pair, strict=True)
    }
    return parts | {"alpha": torch.tensor(1.0)}, ((one[0] @ one[1]) * (two[0] @ two[1]) / rank).reshape(w.shape)


def loha_large(w: Tensor) -> tuple[Tensors, Tensor]:
    """As a LoRA it would be larger than the weight."""
    return loha(w, rank=8)


def loha_tucker(w: Tensor) -> tuple[Tensors, Tensor]:
    """LyCORIS functional/loha.py, tucker: t (r, r, h, w), w_a (r, out), w_b (r, in)."""
    out, into, *kernel = w.shape
    parts, product = {"alpha": torch.tensor(4.0)}, torch.ones_like(w)
    for n in (1, 2):
        core, left, right = random(2, 2, *kernel, seed=n), random(2, out, seed=n), random(2, into, seed=n)
        parts |= {f"hada_t{n}": core, f"hada_w{n}_a": left, f"hada_w{n}_b": right}
        product = product * torch.einsum("ijhw,io,jr->orhw", core, left, right)
    return parts, 2 * product


def kron(first: Tensor, second: Tensor) -> Tensor:
    """Every number of the first times the whole second."""
    return torch.cat([torch.cat([number * second for number in row], dim=1) for row in first], dim=0)


def lokr_low_rank(w: Tensor) -> tuple[Tensors, Tensor]:
    """LyCORIS lokr.py: alpha / rank * kron(w1, w2_a @ w2_b); the rank is that of w2."""
    out, into, *kernel = w.shape
    left, a, b = random(2, 2), random(out // 2, 1), random(1, w[0].numel() // 2)
    second = (a @ b).reshape(out // 2, into // 2, *kernel)
    return {"lokr_w1": left, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(3.0)}, 3 * kron(left, second)


def lokr_full(w: Tensor) -> tuple[Tensors, Tensor]:
    """LyCORIS lokr.py: of two full matrices the scale is 1, whatever alpha says (ai-toolkit writes a huge one)."""
    out, into, *kernel = w.shape
    left, right = random(4, 4), random(out // 4, into // 4, *kernel)
    return {"lokr_w1": left, "lokr_w2": right, "alpha": torch.tensor(9999.0)}, kron(left, right)


def lokr_both(w: Tensor) -> tuple[Tensors, Tensor]:
    """LyCORIS lokr.py, decompose_both."""
    a, b, c, d = random(4, 1), random(1, 4), random(len(w) // 4, 1, seed=1), random(1, w.shape[1] // 4, seed=2)
    parts = {"lokr_w1_a": a, "lokr_w1_b": b, "lokr_w2_a": c, "lokr_w2_b": d, "alpha": torch.tensor(16.0)}
    return parts, 16 * kron(a @ b, c @ d)


def lokr_tucker(w: Tensor) -> tuple[Tensors, Tensor]:
    """LyCORIS functional/lokr.py, tucker: w2 is made of t2 (r, r, h, w), w2_a (r, out), w2_b (r, in)."""
    out, into, *kernel = w.shape
    left, core, a, b = random(2, 2), random(2, 2, *kernel), random(2, out // 2), random(2, into // 2, seed=1)
    second = torch.einsum("ijhw,io,jr->orhw", core, a, b)
    return {"lokr_w1": left, "lokr_t2": core, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(4.0)}, (
        2 * kron(left, second)
    )


def dora_loha(w: Tensor) -> tuple[Tensors, Tensor]:
    """LyCORIS loha.py with dora_wd."""
    parts, added = loha(w)
    changed, length = w + added, random(len(w)).abs() + 0.1
    rows = torch.stack([length[o] * changed[o] / changed[o].norm() for o in range(len(w))])
    return parts | {"dora_scale": length.reshape(-1, *[1] * (w.ndim - 1))}, rows - w


def full(w: Tensor) -> tuple[Tensors, Tensor]:
    """LyCORIS full.py."""
    return {"diff": random(*w.shape)}, random(*w.shape)


MATRICES = [
    kohya, dora_output, dora_input, dora_peft, loha, loha_large, lokr_low_rank, lokr_full, lokr_both, dora_loha, full,
]  # fmt: skip
KERNELS = [kohya, dora_output, dora_input, locon_tucker, loha, loha_tucker, lokr_low_rank, lokr_full, lokr_tucker, full]


def test_every_layer_is_changed_as_its_format_says(sd15: Any, loaded: Callable[..., list[str]]) -> None:
    """All formats in one file, each on two or more layers of its own."""
    matrices = [name for name, layer in sd15.unet.named_modules() if isinstance(layer, nn.Linear) and "attn" in name]
    kernels = [name for name, layer in sd15.unet.named_modules() if re.search(r"resnets\.\d\.conv\d$", name)]
    kinds = list(zip(matrices, 2 * MATRICES, strict=False)) + list(zip(kernels, 2 * KERNELS, strict=False))
    assert len(kinds) == 2 * len(MATRICES) + 2 * len(KERNELS)
    tensors, expected = {}, {}
    for layer, kind in kinds:
        parts, expected[layer] = kind(weight_of(sd15.unet, layer))
        assert expected[layer].abs().max() > 0.01
        tensors |= {f"lora_unet_{layer.replace('.', '_')}.{part}": tensor for part, tensor in parts.items()}
    assert loaded(sd15, tensors) == []
    for weight in (1.0, 0.5):  # of the whole change, as ComfyUI and LyCORIS have it, also for DoRA
        sd15.set_adapters("one", weight)
        for layer, kind in kinds:
            assert_near(change(sd15.unet, layer), weight * expected[layer], f"{kind.__name__} {layer}")


@pytest.mark.parametrize("kind", [kohya, dora_output, lokr_full, loha])
def test_a_text_encoder_is_changed_the_same_way(sd15: Any, loaded: Callable[..., list[str]], kind: Kind) -> None:
    layer = next(name for name, _ in sd15.text_encoder.named_modules() if name.endswith("layers.0.self_attn.q_proj"))
    parts, expected = kind(weight_of(sd15.text_encoder, layer))
    name = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    loaded(sd15, {f"{name}.{part}": tensor for part, tensor in parts.items()})
    assert_near(change(sd15.text_encoder, layer), expected)


@pytest.mark.parametrize("kind", [dora_output, lokr_full, loha])
def test_a_checkpoint_on_top_gets_the_change_in_its_weights(tiny_sd15: Path, tmp_path: Path, kind: Kind) -> None:
    pipeline = pipeline_of(StableDiffusionPipeline, tiny_sd15)
    before = weight_of(pipeline.unet, LINEAR).clone()
    parts, expected = kind(before)
    save_file({f"{KOHYA[LINEAR]}.{part}": tensor for part, tensor in parts.items()}, tmp_path / "one.safetensors")
    branch: Any = SimpleNamespace(pipeline=pipeline, denoiser=pipeline.unet, text_encoders={}, parts=pipeline)
    assert checkpoint.prepare(branch, config_of(), "ohwx", "dog", tmp_path / "one.safetensors") == []
    assert_near(weight_of(pipeline.unet, LINEAR) - before, expected)


@pytest.mark.parametrize(("kind", "goes_on"), [(kohya, True), (loha, True), (dora_output, False), (loha_large, False)])
def test_a_lora_on_top_goes_on_from_a_lora_and_is_refused_on_what_is_none(
    sd15: Any, tmp_path: Path, kind: Kind, goes_on: bool
) -> None:
    parts, expected = kind(weight_of(sd15.unet, LINEAR))
    file = tmp_path / "one.safetensors"
    save_file({f"{KOHYA[LINEAR]}.{part}": tensor for part, tensor in parts.items()}, file)
    branch: Any = SimpleNamespace(pipeline=sd15, denoiser=sd15.unet, text_encoders={}, parts=sd15)
    try:
        if goes_on:
            lora.prepare(branch, config_of(), "ohwx", "dog", file)
            assert_near(change(sd15.unet, LINEAR), expected)
        else:
            with pytest.raises(ValueError, match=r"DoRA, LoHa or LoKr that is no LoRA.*train model_type=checkpoint"):
                lora.prepare(branch, config_of(), "ohwx", "dog", file)
    finally:
        lora.remove(sd15)


def test_a_tag_in_a_prompt_applies_the_same_at_its_weight(sd15: Any, tmp_path: Path) -> None:
    parts, expected = dora_input(weight_of(sd15.unet, LINEAR))
    more, added = kohya(weight_of(sd15.unet, LINEAR))
    for name, tensors in (("a", parts), ("b", more)):
        save_file(
            {f"{KOHYA[LINEAR]}.{part}": value for part, value in tensors.items()}, tmp_path / f"{name}.safetensors"
        )
    base: Any = None
    room = Loaded(base, SimpleNamespace(pipeline=sd15), None, None)  # type: ignore[arg-type]
    try:
        wanted = [Lora(tmp_path / "a.safetensors", 0.8, "a"), Lora(tmp_path / "b.safetensors", -0.5, "b")]
        assert load_loras(room, wanted) == []
        assert_near(change(sd15.unet, LINEAR), 0.8 * expected - 0.5 * added)
        assert load_loras(room, wanted[1:]) == []
        assert_near(change(sd15.unet, LINEAR), -0.5 * added)
    finally:
        lora.remove(sd15)
    assert not hasattr(sd15.unet.get_submodule(LINEAR), "base_layer")


# Names


def pair(name: str, out: int, into: int, ends: tuple[str, str] = (".lora_A.weight", ".lora_B.weight")) -> Tensors:
    return {f"{name}{ends[0]}": random(2, into), f"{name}{ends[1]}": random(out, 2)}


def product(out: int, into: int) -> Tensor:
    return random(out, 2) @ random(2, into)


DOWN_UP = (".lora_down.weight", ".lora_up.weight")
MIDDLE = "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"
PEFT = (".lora_A.weight", ".lora_B.weight")
NAMES_SD15 = [
    # sources as in tests/library/test_lora_headers.py; {}: with dots or underscores, as the letters before it say
    ("lora_unet_{}", DOWN_UP),
    ("lora_unet_{original}", DOWN_UP),  # the names of the release of version 1.5
    ("diffusion_model.{original}", PEFT),
    ("unet.{}", PEFT),
    ("unet.{}", (".lora.down.weight", ".lora.up.weight")),
    ("unet.{}", (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight")),
    ("unet.{}", DOWN_UP),
    ("{processor}", ("_lora.down.weight", "_lora.up.weight")),
    ("unet.{processor}", ("_lora.down.weight", "_lora.up.weight")),
    ("base_model.model.{}", (".lora_A.default.weight", ".lora_B.default.weight")),
    ("base_model.model.unet.{}", PEFT),
    ("lycoris_{}", DOWN_UP),
]


def test_every_name_of_a_unet_s_layer_is_known(sd15: Any, loaded: Callable[..., list[str]]) -> None:
    layers = [name for name, _ in sd15.unet.named_modules() if name.endswith(("to_q", "to_k", "to_out.0"))]
    tensors, used = {}, layers[: 3 * len(NAMES_SD15)]
    for layer, (name, ends) in zip(used, 3 * NAMES_SD15, strict=True):
        processor = layer.replace(".to_", ".processor.to_").removesuffix(".0")
        written = name.format(layer, original=ldm_unet_key(f"{layer}.").rstrip("."), processor=processor)
        if written.startswith(("lora_unet_", "lycoris_")):
            written = written.replace(".", "_")
        tensors |= pair(written, *weight_of(sd15.unet, layer).shape, ends)
    assert loaded(sd15, tensors) == []
    for layer, (name, _) in zip(used, 3 * NAMES_SD15, strict=True):
        assert_near(change(sd15.unet, layer), product(*weight_of(sd15.unet, layer).shape), f"{name} {layer}")


# Names of Stability's release in a UNet (generative-models, openaimodel.py), as kohya's tools write them for SDXL.
SGM = {
    "lora_unet_input_blocks_0_0": "conv_in",
    "lora_unet_time_embed_2": "time_embedding.linear_2",
    "lora_unet_label_emb_0_0": "add_embedding.linear_1",
    "lora_unet_input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
    "lora_unet_input_blocks_4_0_skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
    "lora_unet_input_blocks_4_1_proj_in": "down_blocks.1.attentions.0.proj_in",
    "lora_unet_input_blocks_8_1_proj_out": "down_blocks.2.attentions.1.proj_out",
    "lora_unet_output_blocks_1_1_transformer_blocks_1_attn1_to_q": (
        "up_blocks.0.attentions.1.transformer_blocks.1.attn1.to_q"
    ),
    "lora_unet_middle_block_2_in_layers_2": "mid_block.resnets.1.conv1",
    "lora_unet_output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
    "lora_unet_output_blocks_5_0_emb_layers_1": "up_blocks.1.resnets.2.time_emb_proj",
    "lora_unet_out_2": "conv_out",
    "lora_te1_text_model_encoder_layers_0_mlp_fc1": "text_encoder encoder.layers.0.mlp.fc1",
    "lora_te2_text_model_encoder_layers_1_self_attn_out_proj": "text_encoder_2 encoder.layers.1.self_attn.out_proj",
    "text_encoder_2.text_model.encoder.layers.0.mlp.fc2": "text_encoder_2 encoder.layers.0.mlp.fc2",
    "text_encoder.text_model.encoder.layers.1.self_attn.to_k_lora": "text_encoder encoder.layers.1.self_attn.k_proj",
    "lora_te2_text_projection": "text_encoder_2 text_projection",
}


def test_kohya_s_names_of_sdxl_are_all_known(sdxl1: Any, loaded: Callable[..., list[str]]) -> None:
    tensors, expected = {}, {}
    for name, place in SGM.items():
        part, _, layer = place.rpartition(" ")
        module = getattr(sdxl1, part or "unet")
        layer = next(one for one, _ in module.named_modules() if one.removeprefix("text_model.") == layer)
        out, into, *kernel = weight_of(module, layer).shape
        down, up = random(2, into, *kernel), random(out, 2, *[1] * len(kernel))
        ends = (".down.weight", ".up.weight") if name.endswith("_lora") else DOWN_UP
        tensors |= {f"{name}{ends[0]}": down, f"{name}{ends[1]}": up}
        expected[part or "unet", layer] = (up.flatten(1) @ down.flatten(1)).reshape(out, into, *kernel)
    assert loaded(sdxl1, tensors) == []
    for (part, layer), wanted in expected.items():
        module = getattr(sdxl1, part)
        if wanted.ndim == 4:
            adapter = module.get_submodule(layer)
            given = adapter.get_delta_weight("one")
        else:
            given = change(module, layer)
        assert_near(given, wanted)


def bfl(flux1: Any, name: str) -> tuple[int, int, dict[str, slice]]:
    """Output, input and the rows of diffusers' layers in a layer of the original release (flux, modules/layers.py)."""
    width = flux1.transformer.config.num_attention_heads * flux1.transformer.config.attention_head_dim
    rows = [slice(number * width, (number + 1) * width) for number in range(3)]
    if name == "double_blocks.1.img_attn.qkv":
        return 3 * width, width, {f"transformer_blocks.1.attn.to_{c}": row for c, row in zip("qkv", rows, strict=True)}
    if name == "double_blocks.0.txt_attn.qkv":
        layers = [f"transformer_blocks.0.attn.add_{c}_proj" for c in "qkv"]
        return 3 * width, width, dict(zip(layers, rows, strict=True))
    if name == "single_blocks.1.linear1":
        layers = {f"single_transformer_blocks.1.attn.to_{c}": row for c, row in zip("qkv", rows, strict=True)}
        return 7 * width, width, layers | {"single_transformer_blocks.1.proj_mlp": slice(3 * width, 7 * width)}
    if name == "final_layer.linear":
        return flux1.transformer.config.in_channels, width, {"proj_out": slice(None)}
    assert name == "single_blocks.0.linear2"
    return width, 5 * width, {"single_transformer_blocks.0.proj_out": slice(None)}


ORIGINAL = ["double_blocks.1.img_attn.qkv", "double_blocks.0.txt_attn.qkv", "single_blocks.1.linear1",
            "single_blocks.0.linear2", "final_layer.linear"]  # fmt: skip


@pytest.mark.parametrize(
    ("prefix", "first"), [("lora_unet_", 0), ("lora_unet_", 2), ("diffusion_model.", 1), ("base_model.model.", 3)]
)
def test_original_names_of_flux_change_the_layers_that_are_stacked_in_them(
    flux1: Any, loaded: Callable[..., list[str]], prefix: str, first: int
) -> None:
    tensors, expected = {}, {}
    kinds = [kohya, lokr_full, loha, dora_output, dora_input]
    for name, kind in zip(ORIGINAL, kinds[first:] + kinds[:first], strict=True):
        _, _, layers = bfl(flux1, name)
        parts, added = kind(torch.cat([weight_of(flux1.transformer, layer) for layer in layers]))
        written = prefix + (name.replace(".", "_") if prefix == "lora_unet_" else name)
        tensors |= {f"{written}.{part}": tensor for part, tensor in parts.items()}
        expected |= {layer: (added[rows], f"{kind.__name__} {name}") for layer, rows in layers.items()}
    assert loaded(flux1, tensors) == []
    for layer, (wanted, what) in expected.items():
        assert_near(change(flux1.transformer, layer), wanted, what)


FLUX_Q, FLUX_OUT = "transformer_blocks.0.attn.to_q", "single_transformer_blocks.1.proj_out"


@pytest.mark.parametrize(
    ("prefix", "ends"),
    [
        ("lora_transformer_", DOWN_UP),  # OneTrainer
        ("transformer.", (".lora_A.weight", ".lora_B.weight")),  # ai-toolkit, diffusers
        ("transformer.", DOWN_UP),
        ("lora_unet_", DOWN_UP),
        ("", (".lora_A.weight", ".lora_B.weight")),
        ("base_model.model.", (".lora_A.default.weight", ".lora_B.default.weight")),
    ],
)
def test_diffusers_names_of_flux_are_known_under_every_prefix(
    flux1: Any, loaded: Callable[..., list[str]], prefix: str, ends: tuple[str, str]
) -> None:
    tensors = {}
    for layer in (FLUX_Q, FLUX_OUT):
        name = prefix + (layer.replace(".", "_") if prefix.endswith("_") else layer)
        tensors |= pair(name, *weight_of(flux1.transformer, layer).shape, ends)
    assert loaded(flux1, tensors) == []
    for layer in (FLUX_Q, FLUX_OUT):
        assert_near(change(flux1.transformer, layer), product(*weight_of(flux1.transformer, layer).shape))


def test_xlabs_names_are_read_as_stock_diffusers_reads_them(flux1: Any, loaded: Callable[..., list[str]]) -> None:
    width = 16
    tensors: Tensors = {}
    for name, out in (("qkv_lora1", 3), ("qkv_lora2", 3), ("proj_lora1", 1), ("proj_lora2", 1)):
        tensors |= pair(f"double_blocks.0.processor.{name}", out * width, width, (".down.weight", ".up.weight"))
    tensors |= pair("single_blocks.1.processor.qkv_lora", 3 * width, width, (".down.weight", ".up.weight"))
    stock = FluxPipeline.lora_state_dict(dict(tensors))
    assert loaded(flux1, tensors) == []
    layers = {key.removeprefix("transformer.").partition(".lora_")[0] for key in stock}
    assert len(layers) == 2 * 4 + 3
    for layer in layers:
        down, up = (stock[f"transformer.{layer}.lora_{half}.weight"] for half in "AB")
        assert_near(change(flux1.transformer, layer), up @ down)


def test_the_halves_of_flux_s_last_modulation_change_places(flux1: Any, loaded: Callable[..., list[str]]) -> None:
    # Shift and scale in the original release (flux, layers.py, LastLayer), scale and shift in diffusers.
    out, into = weight_of(flux1.transformer, "norm_out.linear").shape
    assert loaded(flux1, pair("lora_unet_final_layer_adaLN_modulation_1", out, into, DOWN_UP)) == []
    shift, scale = product(out, into).chunk(2)
    assert_near(change(flux1.transformer, "norm_out.linear"), torch.cat([scale, shift]))


def test_what_flux_s_pipeline_cannot_use_is_named_and_the_rest_is_applied(
    flux1: Any, loaded: Callable[..., list[str]]
) -> None:
    out, into = weight_of(flux1.transformer, FLUX_Q).shape
    tensors = pair(f"lora_transformer_{FLUX_Q.replace('.', '_')}", out, into, DOWN_UP)
    t5 = pair("lora_te3_encoder_block_0_layer_0_SelfAttention_q", 8, 8, DOWN_UP)  # sd-scripts lora_flux.py
    (warning,) = loaded(flux1, tensors | t5)
    assert "1 of its layers are left out, lora_te3_encoder_block_0_layer_0_SelfAttention_q among them" in warning
    assert_near(change(flux1.transformer, FLUX_Q), product(out, into))
    assert loaded(flux1, tensors | {key: 0 * value for key, value in t5.items()}) == []  # without an effect


# Alphas that are not in the tensors


def test_the_alpha_in_the_metadata_of_diffusers_counts(sd15: Any, loaded: Callable[..., list[str]]) -> None:
    # diffusers loaders/lora_base.py, LORA_ADAPTER_METADATA_KEY: the fields of peft's LoraConfig.
    facts = {"unet.r": 2, "unet.lora_alpha": 8, "unet.alpha_pattern": {MIDDLE: 6}, "unet.use_rslora": False}
    tensors = {}
    for layer in (MIDDLE, LINEAR):
        tensors |= pair(f"unet.{layer}", *weight_of(sd15.unet, layer).shape)
    loaded(sd15, tensors, {"lora_adapter_metadata": json.dumps(facts)})
    for layer, scale in ((MIDDLE, 3), (LINEAR, 4)):
        assert_near(change(sd15.unet, layer), scale * product(*weight_of(sd15.unet, layer).shape))


def test_the_patterns_of_alphas_are_read_as_peft_reads_them(sd15: Any, loaded: Callable[..., list[str]]) -> None:
    # peft utils/other.py, get_pattern_key: regular expressions up to the end of the name, of which the first counts.
    # diffusers loaders/peft.py writes the beginning of the name, too: `^`.
    facts = {"unet.r": 2, "unet.lora_alpha": 8, "unet.alpha_pattern": {f"^{MIDDLE}": 6, ".*": 4, LINEAR: 10}}
    tensors = {}
    for layer in (MIDDLE, LINEAR):
        tensors |= pair(f"unet.{layer}", *weight_of(sd15.unet, layer).shape)
    loaded(sd15, tensors, {"lora_adapter_metadata": json.dumps(facts)})
    for layer, scale in ((MIDDLE, 3), (LINEAR, 2)):
        assert_near(change(sd15.unet, layer), scale * product(*weight_of(sd15.unet, layer).shape))
    with pytest.raises(ValueError, match="alpha_pattern has"):
        loaded(sd15, tensors, {"lora_adapter_metadata": json.dumps(facts | {"unet.alpha_pattern": {"(": 6}})})


def test_the_alpha_in_peft_s_configuration_counts(sd15: Any, loaded: Callable[..., list[str]], tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "use_rslora": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    out, into = weight_of(sd15.unet, MIDDLE).shape
    loaded(sd15, pair(f"base_model.model.{MIDDLE}", out, into))
    assert_near(change(sd15.unet, MIDDLE), 8 / 2**0.5 * product(out, into))  # arXiv 2312.03732


# Refusals


def refusals(sd15: Any) -> dict[str, tuple[Tensors, str]]:
    name, (out, into) = KOHYA[LINEAR], weight_of(sd15.unet, LINEAR).shape
    good = pair(name, out, into, DOWN_UP)
    foreign = pair("lora_unet_down_blocks_7_attentions_0_proj_in", 4, 4, DOWN_UP)
    return {
        "layers of another model": (good | foreign, "1 of its layers and tensors are not in this model, lora_u"),
        "only such": (foreign, "none of its 1 layers is in this model, lora_unet_down_blocks_7"),
        "an unknown tensor": (good | {"lora_unet_x.strange": random(2)}, "lora_unet_x.strange among them"),
        "another width": (pair(name, out, into + 1, DOWN_UP), rf"does not fit: its size .* is \({out}, {into + 1}\)"),
        "another width, LoHa": ({f"{name}.{part}": one for part, one in loha(torch.zeros(out, into + 2))[0].items()},
                                r"\(LoHa\) does not fit"),
        "half of it": ({f"{name}.lora_down.weight": random(2, into)}, r"lacks the tensor 'up' \(LoRA\)"),
        "OFT": ({f"{name}.oft_blocks": random(2, 2, 2)}, "of the format OFT, which is not read.*merge it into its"),
        "norms": (good | {"lora_unet_down_blocks_0_resnets_0_norm1.w_norm": random(8)}, "norm layers.*merge it into"),
        "biases": (good | {f"{name}.diff_b": random(out)}, "it changes biases"),
        "nothing": ({f"{name}.alpha": torch.tensor(1.0)}, "none of its layers is applied"),
    }  # fmt: skip


def test_what_cannot_be_applied_whole_is_refused_with_its_name(sd15: Any, loaded: Callable[..., list[str]]) -> None:
    for tensors, message in refusals(sd15).values():
        with pytest.raises(ValueError, match=rf"(?s)one.safetensors does not fit its base: .*{message}"):
            loaded(sd15, tensors)
    assert not any(hasattr(layer, "base_layer") for layer in sd15.unet.modules())


def test_layers_of_zeros_and_layers_under_two_names_are_no_reason(sd15: Any, loaded: Callable[..., list[str]]) -> None:
    out, into = weight_of(sd15.unet, LINEAR).shape
    good = pair(KOHYA[LINEAR], out, into, DOWN_UP)
    foreign = {key: 0 * value for key, value in pair("lora_unet_down_blocks_7_x", 4, 4, DOWN_UP).items()}
    assert loaded(sd15, good | foreign) == []
    assert loaded(sd15, good | pair(f"unet.{LINEAR}", out, into)) == []  # the same values
    original = pair("lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_k", out, into, DOWN_UP)
    (warning,) = loaded(sd15, good | {key: 2 * value for key, value in original.items()})
    assert "1 of its layers are left out, lora_unet_input_blocks_1_1" in warning and "under diffusers' names" in warning
    assert_near(change(sd15.unet, LINEAR), product(out, into))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_every_type_of_numbers_is_read(sd15: Any, loaded: Callable[..., list[str]], dtype: torch.dtype) -> None:
    out, into = weight_of(sd15.unet, LINEAR).shape
    halves = {key: value.to(dtype) for key, value in pair(KOHYA[LINEAR], out, into, DOWN_UP).items()}
    loaded(sd15, halves)
    down, up = (halves[f"{KOHYA[LINEAR]}{end}"].float() for end in DOWN_UP)
    adapter: Any = sd15.unet.get_submodule(LINEAR)
    assert float((adapter.get_delta_weight("one") - up @ down).abs().max()) < 1e-2
