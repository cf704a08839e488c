"""LoRA headers as the field's programs write them: family, format, and read or refused. The sizes are the real ones.

No file is written by our own code. Sources: sd-scripts = github kohya-ss/sd-scripts, networks/; LyCORIS = github
KohakuBlueleaf/LyCORIS, lycoris/modules; OneTrainer = github Nerogar/OneTrainer, modules/util/convert_lora_util.py;
diffusers = src/diffusers/loaders/lora_conversion_utils.py and the configurations of the published models.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import pytest

from trainer.library import models_folder
from trainer.library.lora_keys import format_of, layers_of
from trainer.settings import Settings

Shapes = dict[str, list[int]]
Size = tuple[int, int]  # output, input


def kohya(layers: Mapping[str, Size], rank: int = 4) -> Shapes:
    """sd-scripts networks/lora.py: LoRAModule."""
    return {
        key: shape
        for name, (out, into) in layers.items()
        for key, shape in (
            (f"{name}.lora_down.weight", [rank, into]), (f"{name}.lora_up.weight", [out, rank]), (f"{name}.alpha", []),
        )
    }  # fmt: skip


def pairs(layers: Mapping[str, Size], down: str, up: str, rank: int = 4) -> Shapes:
    return {f"{name}{down}": [rank, into] for name, (_, into) in layers.items()} | {
        f"{name}{up}": [out, rank] for name, (out, _) in layers.items()
    }


def peft(layers: Mapping[str, Size], between: str = "") -> Shapes:
    return pairs(layers, f".lora_A{between}.weight", f".lora_B{between}.weight")


# Layers with the output and the input width that they have in the published models.
SD15_K = {"down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k": (640, 768)}
SD15_SELF = {"down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q": (320, 320)}
SD2_K = {"down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k": (640, 1024)}
XL_K = {"down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k": (640, 2048)}
XL_DEEP = {"down_blocks_2_attentions_0_transformer_blocks_8_attn1_to_q": (1280, 1280)}
XL_SGM = {"input_blocks_4_1_transformer_blocks_0_attn2_to_k": (640, 2048)}
REFINER = {"input_blocks_4_1_transformer_blocks_3_attn2_to_k": (768, 1280)}
MIDDLE = {"mid_block_attentions_0_transformer_blocks_0_attn1_to_q": (1280, 1280)}  # versions 1, 2 and XL have it
CLIP_L = {"text_model_encoder_layers_0_self_attn_q_proj": (768, 768)}
CLIP_H = {"text_model_encoder_layers_0_self_attn_q_proj": (1024, 1024)}
CLIP_G = {"text_model_encoder_layers_0_self_attn_q_proj": (1280, 1280)}
BFL = {"double_blocks_0_img_attn_qkv": (9216, 3072), "single_blocks_37_linear1": (21504, 3072)}
FLUX = {"transformer_blocks.18.attn.to_q": (3072, 3072), "single_transformer_blocks.37.proj_mlp": (12288, 3072)}


def under(prefix: str, layers: Mapping[str, Size]) -> dict[str, Size]:
    return {prefix + name: size for name, size in layers.items()}


def dotted(layers: Mapping[str, Size]) -> dict[str, Size]:
    """The names above with dots: `to_k` and the like keep their underscores."""
    keep = ("down_blocks", "mid_block", "up_blocks", "transformer_blocks", "to_q", "to_k", "text_model", "self_attn",
            "q_proj", "double_blocks", "single_blocks", "img_attn", "input_blocks")  # fmt: skip
    found = {}
    for name, size in layers.items():
        for word in keep:
            name = name.replace(word, word.replace("_", "~"))
        found[name.replace("_", ".").replace("~", "_")] = size
    return found


def lycoris(name: str, **shapes: list[int]) -> Shapes:
    return {f"{name}.{part}": shape for part, shape in shapes.items()} | {f"{name}.alpha": []}


K15, KXL = next(iter(under("lora_unet_", SD15_K))), next(iter(under("lora_unet_", XL_K)))
V1 = {"ss_base_model_version": "sd_v1"}  # sd-scripts library/sai_model_spec.py and train_network.py
V2 = {"ss_base_model_version": "sd_v2", "ss_v2": "True"}
XL = {"ss_base_model_version": "sdxl_base_v1-0", "modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}
ROWS: list[tuple[str, Shapes, dict[str, str], str, str]] = [
    # name and source, header, metadata, family or the beginning of the refusal, format
    ("sd-scripts lora.py, version 1", kohya(under("lora_unet_", SD15_K) | under("lora_te_", CLIP_L)), {},
     "sd15", "LoRA"),
    ("sd-scripts lora.py, SDXL", kohya(under("lora_unet_", XL_SGM) | under("lora_te2_", CLIP_G)), XL, "sdxl1", "LoRA"),
    ("latent-consistency/lcm-lora-sdxl: kohya with diffusers' names", kohya(under("lora_unet_", XL_K)), {},
     "sdxl1", "LoRA"),
    ("rohitgandikota/sliders, SDXL: self-attention only", kohya(under("lora_unet_", XL_DEEP)), {}, "sdxl1", "LoRA"),
    ("the same with the metadata of version 1, which is wrong", kohya(under("lora_unet_", XL_DEEP)), V1,
     "sdxl1", "LoRA"),
    ("OneTrainer, SDXL", kohya(under("lora_unet_", XL_K) | under("lora_te1_", CLIP_L)), {}, "sdxl1", "LoRA"),
    ("sd-scripts, network_train_text_encoder_only, version 1", kohya(under("lora_te_", CLIP_L)), {}, "sd15", "LoRA"),
    ("sd-scripts, the same, SDXL", kohya(under("lora_te1_", CLIP_L)), XL, "sdxl1", "LoRA"),
    ("sd-scripts lora_flux.py, the same, FLUX.1", kohya(under("lora_te1_", CLIP_L)), {"ss_base_model_version": "flux1"},
     "flux1", "LoRA"),
    ("diffusers train_text_to_image_lora.py, version 1", peft(dotted(under("unet.", SD15_K))), {}, "sd15", "LoRA"),
    ("diffusers train_text_to_image_lora_sdxl.py: PEFT", peft(dotted(under("unet.", XL_DEEP))), {}, "sdxl1", "LoRA"),
    ("diffusers train_dreambooth_lora_sdxl.py: both encoders",
     peft(dotted(under("unet.", MIDDLE)) | under("text_encoder_2.", dotted(CLIP_G))), {}, "sdxl1", "LoRA"),
    ("scripts of 2023: lora.down", pairs(dotted(under("unet.", XL_K)), ".lora.down.weight", ".lora.up.weight"), {},
     "sdxl1", "LoRA"),
    ("scripts of 2023: lora_down with dots",
     pairs(dotted(under("unet.", XL_K)), ".lora_down.weight", ".lora_up.weight"), {}, "sdxl1", "LoRA"),
    ("diffusers of early 2023: processors",
     pairs({"down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q": (320, 320)}, "_lora.down.weight",
           "_lora.up.weight"), {}, "sd15", "LoRA"),
    ("peft get_peft_model(unet).save_pretrained", peft(dotted(under("base_model.model.", SD15_SELF))), {},
     "sd15", "LoRA"),
    ("peft with the name of the adapter", peft(dotted(under("base_model.model.unet.", XL_K)), ".default"), {}, "sdxl1",
     "LoRA"),
    ("ComfyUI's LoraSave: original names, SDXL", peft(dotted(under("diffusion_model.", XL_SGM))), {}, "sdxl1", "LoRA"),
    ("sd-scripts lora.py, conv_dim: 4-D",
     {f"{K15}.lora_down.weight": [4, 768], "lora_unet_up_blocks_3_resnets_0_conv1.lora_down.weight": [4, 640, 3, 3],
      "lora_unet_up_blocks_3_resnets_0_conv1.lora_up.weight": [320, 4, 1, 1]}, {}, "sd15", "LoRA"),
    ("both have the middle: metadata says SDXL", kohya(under("lora_unet_", MIDDLE)), XL, "sdxl1", "LoRA"),
    ("both have the middle: nothing is said", kohya(under("lora_unet_", MIDDLE)), {}, "sd15", "LoRA"),
    # LyCORIS
    ("LyCORIS locon.py with dora_wd", kohya(under("lora_unet_", SD15_K)) | {f"{K15}.dora_scale": [640, 1]}, {}, "sd15",
     "DoRA"),
    ("LyCORIS loha.py, SDXL",
     lycoris(KXL, hada_w1_a=[640, 8], hada_w1_b=[8, 2048], hada_w2_a=[640, 8], hada_w2_b=[8, 2048]), {},
     "sdxl1", "LoHa"),
    ("LyCORIS lokr.py, full second factor, SDXL", lycoris(KXL, lokr_w1=[8, 8], lokr_w2=[80, 256]), {}, "sdxl1", "LoKr"),
    ("LyCORIS lokr.py, low rank", lycoris(K15, lokr_w1=[8, 8], lokr_w2_a=[80, 4], lokr_w2_b=[4, 96]), {},
     "sd15", "LoKr"),
    ("LyCORIS full.py", {f"{K15}.diff": [640, 768]}, {}, "sd15", "full weight differences"),
    ("LyCORIS diag_oft.py", lycoris(K15, oft_blocks=[80, 8, 8]), {}, "1 of its 1 layers are of the format OFT", "OFT"),
    ("LyCORIS glora.py", {f"{K15}.{part}.weight": [4, 4] for part in ("a1", "a2", "b1", "b2")}, {},
     "1 of its 1 layers are of the format GLoRA", "GLoRA"),
    ("LyCORIS ia3.py", {f"{K15}.weight": [1, 768], f"{K15}.on_input": []}, {},
     "1 of its 1 layers are of the format IA3", "IA3"),
    ("LyCORIS norms.py",
     kohya(under("lora_unet_", SD15_K)) | {"lora_unet_down_blocks_0_resnets_0_norm1.w_norm": [320]}, {},
     "1 of its 2 layers are of the format norm layers", "LoRA, norm layers (w_norm)"),
    # FLUX.1
    ("sd-scripts lora_flux.py", kohya(under("lora_unet_", BFL) | under("lora_te1_", CLIP_L)), {}, "flux1", "LoRA"),
    ("OneTrainer, FLUX.1: lora_transformer_",
     kohya(under("lora_transformer_", {name.replace(".", "_"): size for name, size in FLUX.items()})), {},
     "flux1", "LoRA"),
    ("ostris/ai-toolkit", peft(under("transformer.", FLUX)), {"ss_base_model_version": "flux1"}, "flux1", "LoRA"),
    ("BFL names in ComfyUI, fused qkv", peft(dotted(under("diffusion_model.", BFL))), {}, "flux1", "LoRA"),
    ("fal: peft around the original model", peft(dotted(under("base_model.model.", BFL))), {}, "flux1", "LoRA"),
    ("XLabs-AI/flux-lora-collection",
     pairs({"double_blocks.0.processor.qkv": (9216, 3072)}, "_lora1.down.weight", "_lora1.up.weight", 16), {}, "flux1",
     "LoRA"),
    # Other families, by name
    ("sd-scripts --v2", kohya(under("lora_unet_", SD2_K)), {}, "it is a LoRA for Stable Diffusion 2", "LoRA"),
    ("sd-scripts --v2, text encoder only", kohya(under("lora_te_", CLIP_H)), {}, "it is a LoRA for Stable Diffusion 2",
     "LoRA"),
    ("sd-scripts --v2, self-attention only", kohya(under("lora_unet_", SD15_SELF)), V2,
     "it is a LoRA for Stable Diffusion 2", "LoRA"),
    ("guoyww/animatediff v2_lora_ZoomIn: it must not be offered as a LoRA of version 1",
     pairs({f"down_blocks.{block}.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.0"
            ".processor.to_q": (width, width) for block, width in ((0, 320), (3, 1280))}, "_lora.down.weight",
           "_lora.up.weight"), {}, "it is a LoRA for AnimateDiff's motion modules", "LoRA"),
    ("SDXL's refiner", kohya(under("lora_unet_", REFINER)), {}, "it is a LoRA for the refiner", "LoRA"),
    ("Kolors", peft(dotted(under("unet.", XL_K))), {"modelspec.architecture": "kolors/lora"}, "it is a LoRA for Kolors",
     "LoRA"),
    ("diffusers, SD3 medium", peft({"transformer.transformer_blocks.3.attn.to_q": (1536, 1536)}), {},
     "it is a LoRA for Stable Diffusion 3", "LoRA"),
    ("FLUX.2 klein 4B, ComfyUI's names", peft({"diffusion_model.single_blocks.0.linear1": (27648, 3072)}), {},
     "it is a LoRA for FLUX.2", "LoRA"),
    ("FLUX.2 dev", peft({"diffusion_model.double_blocks.0.img_attn.qkv": (18432, 6144)}), {}, "it is a LoRA for FLUX.2",
     "LoRA"),
    ("sd-scripts lora_flux.py --model_type chroma", kohya(under("lora_unet_", BFL)),
     {"ss_base_model_version": "chroma"},
     "it is a LoRA for Chroma", "LoRA"),
    ("diffusers, Qwen-Image",
     peft({"transformer.transformer_blocks.0.attn.to_q": (3072, 3072),
           "transformer.transformer_blocks.59.attn.to_q": (3072, 3072)}), {}, "it is a LoRA for Qwen-Image", "LoRA"),
    ("musubi-tuner, HunyuanVideo", kohya({"lora_unet_double_blocks_0_img_mlp_fc1": (12288, 3072)}), {},
     "it is a LoRA for HunyuanVideo", "LoRA"),
    ("diffusers, AuraFlow", peft({"transformer.joint_transformer_blocks.0.attn.to_q": (3072, 3072)}), {},
     "it is a LoRA for AuraFlow", "LoRA"),
    ("musubi-tuner, Wan", kohya({"lora_unet_blocks_0_self_attn_q": (5120, 5120)}), {}, "it is a LoRA for Wan", "LoRA"),
    ("ai-toolkit, Z-Image", peft({"diffusion_model.layers.0.attention.to_q": (3840, 3840)}), {},
     "it is a LoRA for Z-Image", "LoRA"),
    ("none that is known", peft({"diffusion_model.blocks.0.mixer": (512, 512)}), {},
     "it is a LoRA of no family", "LoRA"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("header", "metadata", "expected", "kind"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS]
)
def test_a_lora_header_is_of_its_family_or_refused(
    settings: Settings, header: Shapes, metadata: dict[str, str], expected: str, kind: str
) -> None:
    settings.models.mkdir(parents=True, exist_ok=True)
    # Numbers of a type of unknown size: the file holds none.
    entries = {name: {"dtype": "F0", "shape": shape, "data_offsets": [0, 0]} for name, shape in header.items()}
    text = json.dumps({"__metadata__": metadata} | entries).encode()
    Path(settings.models / "one.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    (found,) = models_folder.scan(settings)
    if expected in ("sd15", "sdxl1", "flux1"):
        assert (found.branch, found.is_lora, found.error) == (expected, True, None)
    else:
        assert found.error and found.error.startswith(expected)
    parts = {part for shapes in layers_of(header).values() for part in shapes}
    assert format_of(parts) == kind


def test_the_table_is_as_long_as_it_should_be() -> None:
    assert len(ROWS) >= 20 and len({row[0] for row in ROWS}) == len(ROWS)
