"""Single files that others write, by their headers: the family, the prediction, or the refusal.

The keys and shapes are those of the published files. What is expected is what the named program makes of such a file.
"""

from __future__ import annotations

import json
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from trainer.config.branch_file import detections
from trainer.library.detect import branch_of_file
from trainer.library.header import Header, read_header
from trainer.library.leftovers import refuse_unknown
from trainer.library.prediction import Prediction, prediction_of
from trainer.library.weight_format import scales_of
from trainer.settings import Settings

Shapes = dict[str, list[int]]
D = "model.diffusion_model."
TO_K = "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
VAE: Shapes = {"first_stage_model.encoder.conv_in.weight": [128, 3, 3, 3]}
CLIP_L: Shapes = {"transformer.text_model.embeddings.position_embedding.weight": [77, 768]}
CLIP_G: Shapes = {"model.ln_final.weight": [1280], "model.positional_embedding": [77, 1280]}


def under(prefix: str, shapes: Shapes) -> Shapes:
    return {prefix + key: shape for key, shape in shapes.items()}


def unet(width: int, channels: int = 4, **more: list[int]) -> Shapes:
    """Some keys of a UNet. width: of the texts. more: keys, with `__` for a dot."""
    shapes = {"input_blocks.0.0.weight": [320, channels, 3, 3], TO_K: [640, width], "out.2.bias": [4]}
    return under(D, shapes | {key.replace("__", "."): shape for key, shape in more.items()})


SD15 = unet(768) | under("cond_stage_model.", CLIP_L) | VAE
LAST = D + "input_blocks.8.1.transformer_blocks.9.norm3.bias"
SDXL_UNET = unet(2048, label_emb__0__0__weight=[1280, 2816]) | {LAST: [1280]}
ENCODERS = under("conditioner.embedders.0.", CLIP_L) | under("conditioner.embedders.1.", CLIP_G)
SDXL = SDXL_UNET | ENCODERS | VAE
FLUX: Shapes = {
    "img_in.weight": [3072, 64],
    "double_blocks.0.img_attn.qkv.weight": [9216, 3072],
    "double_blocks.0.img_attn.norm.key_norm.scale": [128],
    "guidance_in.in_layer.weight": [3072, 256],
    "final_layer.linear.weight": [64, 3072],
}
EMPTY = [0]  # ComfyUI writes markers as tensors of no numbers
NOISE, VELOCITY = Prediction(False, False), Prediction(True, False)
SCALE = D + TO_K.replace(".weight", ".scale_weight")
NEW_SCALE = D + TO_K.replace(".weight", ".weight_scale")


@dataclass(frozen=True)
class File:
    """A single file and what is made of it. says: in the refusal; None: it is read."""

    source: str  # of what is expected
    shapes: Shapes
    branch: str = ""
    prediction: Prediction | None = None
    says: str | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)  # pattern of keys -> their dtype; others are F16
    scales: int = 0

    @property
    def header(self) -> Header:
        def dtype(key: str) -> str:
            return next((dtype for pattern, dtype in self.dtypes.items() if re.search(pattern, key)), "F16")

        return Header(self.shapes, self.metadata, {key: dtype(key) for key in self.shapes})


COMFY = "ComfyUI, supported_models.py, SDXL.model_type"
SAVED = "ComfyUI, nodes_model_merging.py, save_checkpoint"
KOHYA = "kohya sd-scripts, sai_model_spec.py"
KOHYA_TRAIN = "kohya sd-scripts, train_network.py"
QUANT = "ComfyUI, quant_ops.py and utils.py"
BNB = "bitsandbytes, functional.py, QuantState.as_dict"
WIDTHS = "the release's own configuration (yaml)"
DIFFUSERS = "diffusers, single_file_utils.py, CHECKPOINT_KEY_NAMES"
FP8, INT8, U8 = {r"to_k\.weight$": "F8_E4M3"}, {r"to_k\.weight$": "I8"}, {r"to_k\.weight$": "U8"}

READ = {
    "SD 1.5": File(WIDTHS, SD15, "sd15", NOISE),
    "SD 1.5 with what the release's training left": File(
        "CompVis, ddpm.py (register_buffer), LitEma",
        SD15
        | {key: [1000] for key in ("alphas_cumprod", "betas", "posterior_variance", "model_ema.decay")}
        | {"cond_stage_model.transformer.text_model.embeddings.position_ids": [1, 77]},
        "sd15",
        NOISE,
    ),
    "SD 1.5, v": File(KOHYA, SD15, "sd15", VELOCITY, metadata={"modelspec.prediction_type": "v"}),
    "SD 1.5, v, marker": File(COMFY, SD15 | {"v_pred": EMPTY}, "sd15", VELOCITY),
    "SDXL": File(WIDTHS, SDXL, "sdxl1", NOISE, metadata={"modelspec.prediction_type": "epsilon"}),
    "NoobAI-XL v-pred": File(COMFY, SDXL | {"v_pred": EMPTY, "ztsnr": EMPTY}, "sdxl1", Prediction(True, True)),
    "SDXL, v without ztsnr": File(COMFY, SDXL | {"v_pred": []}, "sdxl1", VELOCITY),
    "SDXL, ztsnr alone": File(COMFY + ": it asks for v_pred first", SDXL | {"ztsnr": EMPTY}, "sdxl1", NOISE),
    "SDXL saved by ComfyUI": File(SAVED, SDXL, "sdxl1", VELOCITY, metadata={"modelspec.predict_key": "v"}),
    "SDXL, the marker against stale metadata": File(
        COMFY, SDXL | {"v_pred": EMPTY}, "sdxl1", VELOCITY, metadata={"modelspec.prediction_type": "epsilon"}
    ),
    "SDXL trained with --v_parameterization --zero_terminal_snr": File(
        KOHYA_TRAIN,
        SDXL,
        "sdxl1",
        Prediction(True, True),
        metadata={"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"},
    ),
    "SDXL, plain fp8": File("safetensors dtypes", SDXL, "sdxl1", NOISE, dtypes={r"weight$": "F8_E5M2"}),
    "SDXL, scaled fp8": File(
        QUANT,
        SDXL | {SCALE: [1], SCALE.replace("weight", "input"): [1], "scaled_fp8": [2]},
        "sdxl1",
        NOISE,
        dtypes=FP8 | {"scale": "F32"},
        scales=1,
    ),
    "SDXL, scaled fp8 in newer words": File(
        QUANT,
        SDXL | {NEW_SCALE: [], NEW_SCALE.replace("weight_scale", "comfy_quant"): [28]},
        "sdxl1",
        NOISE,
        dtypes=FP8 | {"weight_scale": "F32", "comfy_quant": "U8"},
        metadata={"_quantization_metadata": '{"layers": {"a": {"format": "float8_e4m3fn"}}}'},
        scales=1,
    ),
    "SDXL, a scale for each row": File(
        QUANT, SDXL | {NEW_SCALE: [640, 1]}, "sdxl1", NOISE, dtypes=FP8 | {"weight_scale": "F32"}, scales=1
    ),
    "FLUX.1-dev, bf16": File(WIDTHS, FLUX, "flux1", dtypes={".": "BF16"}),
    "FLUX.1-schnell, fp8": File(
        WIDTHS, {key: shape for key, shape in FLUX.items() if "guidance" not in key}, "flux1", dtypes={".": "F8_E4M3"}
    ),
    "FLUX.1-dev, all in one": File(
        "ComfyUI, supported_models.py, Flux",
        under(D, FLUX)
        | {"vae.encoder.conv_in.weight": [128, 3, 3, 3]}
        | {"text_encoders.t5xxl.transformer.shared.weight": [32128, 4096]},
        "flux1",
    ),
    "FLUX.1-dev, scaled fp8": File(
        QUANT,
        FLUX | {"double_blocks.0.img_attn.qkv.scale_weight": [], "scaled_fp8": [2]},
        "flux1",
        dtypes={r"qkv\.weight|scaled_fp8": "F8_E4M3", "scale_weight": "F32"},
        scales=1,
    ),
}  # fmt: skip
NOT_READ = {
    "Playground v2.5": File(COMFY, SDXL | {"edm_mean": [1, 4, 1, 1], "edm_std": [1, 4, 1, 1]}, says="Playground v2.5"),
    "CosXL": File(COMFY, SDXL | {"edm_vpred.sigma_max": [], "edm_vpred.sigma_min": []}, says="as in CosXL"),
    "SDXL that predicts the picture": File(KOHYA, SDXL, metadata={"modelspec.prediction_type": "x0"}, says="'x0'"),
    "SDXL refiner": File(WIDTHS, unet(1280) | under("conditioner.embedders.0.", CLIP_G) | VAE, says="the refiner"),
    "SD 2.1": File(WIDTHS, unet(1024) | under("cond_stage_model.", CLIP_G) | VAE, says="a Stable Diffusion 2 model"),
    "SD 2.1, UNet and VAE": File(WIDTHS, unet(1024) | VAE, says="a Stable Diffusion 2 model"),
    "SVD": File(DIFFUSERS, unet(1024, 8, input_blocks__1__1__time_stack__0__norm1__bias=[320]), says="Video Diffusion"),
    "SSD-1B": File(
        "segmind/SSD-1B: transformer blocks 4 for 10",
        {key: shape for key, shape in SDXL.items() if key != LAST},
        says="fewer blocks",
    ),
    "SDXL's UNet and VAE": File(WIDTHS, SDXL_UNET | VAE, says="both of them"),
    "SD 1.5's UNet and VAE": File(WIDTHS, unet(768) | VAE, says="it has no text encoder"),
    "SD 1.5 inpainting": File(WIDTHS, SD15 | unet(768, 9), says="for inpainting or editing"),
    "instruct-pix2pix": File(WIDTHS, SD15 | unet(768, 8), says="for inpainting or editing"),
    "the UNet alone": File(WIDTHS, {"input_blocks.0.0.weight": [320, 4, 3, 3]}, says="the UNet alone"),
    "SD 1.5 with GLIGEN": File(
        "gligen, attention.py",
        SD15 | unet(768, input_blocks__1__1__transformer_blocks__0__fuser__alpha_attn=[]),
        says="1 tensors are unknown, model.diffusion_model.input_blocks.1.1.transformer_blocks.0.fuser.alpha_attn",
    ),
    "SDXL, int8": File(QUANT, SDXL | {NEW_SCALE: [640]}, dtypes=INT8 | {"weight_scale": "F32"}, says="type I8"),
    "SDXL, nvfp4": File(QUANT, SDXL | {NEW_SCALE: [8, 4], NEW_SCALE + "_2": []}, dtypes=U8, says="nvfp4"),
    "SDXL, mxfp8": File(QUANT, SDXL | {NEW_SCALE: [640, 64]}, dtypes=FP8 | {"_scale": "U8"}, says="in blocks"),
    "SDXL, another format by the metadata": File(
        QUANT, SDXL, metadata={"_quantization_metadata": '{"layers": {"a": {"format": "mxfp8"}}}'}, says="mxfp8"
    ),
    "SDXL, nf4": File(BNB, SDXL | {D + TO_K + ".quant_state.bitsandbytes__nf4": [9]}, dtypes=U8, says="bitsandbytes"),
    "SDXL, bnb int8": File(BNB, SDXL | {D + TO_K.replace(".weight", ".SCB"): [640]}, dtypes=INT8, says="bitsandbytes"),
    "a scale without its weight": File(QUANT, SDXL | {D + "out.9.scale_weight": [1]}, says="out.9.weight is missing"),
    "FLUX.1-dev, nf4": File(
        BNB,
        FLUX | {"double_blocks.0.img_attn.qkv.weight.absmax": [9]},
        dtypes={"qkv.weight$": "U8"},
        says="bitsandbytes",
    ),
    "FLUX.1-dev, SVDQuant": File(
        "nunchaku, linear.py, SVDQW4A4Linear",
        {f"transformer_blocks.0.qkv_proj.{part}": [9] for part in ("qweight", "wscales", "smooth_factor")},
        says="SVDQuant (Nunchaku)",
    ),
    "FLUX.1 Fill": File(WIDTHS, FLUX | {"img_in.weight": [3072, 384]}, says="for inpainting or editing"),
    "FLUX.2": File(DIFFUSERS, FLUX | {"double_stream_modulation_img.lin.weight": [9]}, says="a FLUX.2 model"),
    "Chroma": File(DIFFUSERS, FLUX | {"distilled_guidance_layer.in_proj.weight": [9]}, says="a Chroma model"),
    "ControlNet of FLUX.1": File(DIFFUSERS, FLUX | {"controlnet_blocks.0.weight": [9]}, says="a ControlNet"),
    "HunyuanVideo": File(
        DIFFUSERS, {D + "txt_in.individual_token_refiner.blocks.0.adaLN_modulation.1.bias": [9]}, says="Hunyuan"
    ),
    "SD 3.5": File(DIFFUSERS, {D + "joint_blocks.0.context_block.adaLN_modulation.1.bias": [9]}, says="Diffusion 3"),
    "Qwen-Image": File(
        "Qwen-Image, transformer", {"transformer_blocks.0.img_mod.1.weight": [9], "txt_norm.weight": [9]}, says="Qwen"
    ),
    "Wan": File(DIFFUSERS, {"blocks.0.self_attn.q.weight": [9, 9], "head.modulation": [1, 2, 9]}, says="a Wan model"),
    "Lumina": File(DIFFUSERS, {"cap_embedder.0.weight": [9], "noise_refiner.0.ffn.w1.weight": [9]}, says="Lumina"),
    "AuraFlow": File(DIFFUSERS, {"double_layers.0.attn.w1q.weight": [9]}, says="AuraFlow"),
    "AnimateDiff": File(
        DIFFUSERS,
        {"down_blocks.0.motion_modules.0.temporal_transformer.norm.bias": [9]},
        says="AnimateDiff",
    ),
    "IP-Adapter": File("IP-Adapter, release", {"image_proj.proj.weight": [9], "ip_adapter.1.to_k_ip.weight": [9]},
                       says="an IP-Adapter"),
    "ControlNet": File(DIFFUSERS, {"control_model.input_hint_block.0.weight": [9]}, says="a ControlNet"),
    "ControlNet of diffusers": File("diffusers, ControlNetModel", {"controlnet_cond_embedding.conv_in.bias": [9]},
                                    says="a ControlNet"),
    "VAE": File("stabilityai/sd-vae-ft-mse", {"encoder.conv_in.weight": [9], "decoder.conv_in.weight": [9]},
                says="it is a VAE"),
    "CLIP": File("openai/clip-vit-large-patch14", {"text_model.embeddings.position_embedding.weight": [9]},
                 says="text or image encoder"),
    "T5": File("google/t5-v1_1-xxl", {"encoder.block.0.layer.0.SelfAttention.q.weight": [9]}, says="a text encoder"),
    "embedding": File("A1111, textual_inversion.py", {"emb_params": [8, 768]}, says="an embedding"),
    "SDXL's embedding": File("kohya, sdxl_train_textual_inversion.py", {"clip_g": [8, 1280], "clip_l": [8, 768]},
                             says="an embedding"),
    "ESRGAN": File("xinntao/ESRGAN", {"model.1.sub.0.RDB1.conv1.0.weight": [9]}, says="an upscaler"),
    "a transformer of a diffusers folder": File("diffusers, FluxTransformer2DModel",
                                                {"transformer_blocks.0.attn.to_q.weight": [9, 9]}, says="whole folder"),
    "nothing known": File("", {"weight": [1]}, says="of no family that is known here"),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_a_base_of_others_is_read_as_its_program_reads_it(settings: Settings, name: str) -> None:
    file = READ[name]
    assert branch_of_file(file.header, detections(settings.presets)) == file.branch, file.source
    assert len(scales_of(file.header)) == file.scales
    if file.prediction is not None:
        assert prediction_of(file.header) == file.prediction, file.source


@pytest.mark.parametrize("name", NOT_READ)
def test_what_is_not_read_is_refused_by_its_name(settings: Settings, name: str) -> None:
    file = NOT_READ[name]
    with pytest.raises(ValueError, match=re.escape(file.says or "")):
        branch_of_file(file.header, detections(settings.presets))


@pytest.mark.parametrize(
    "key",
    [  # transformers, CLIPModel; open_clip, CLIP; both have an encoder of pictures beside the one of texts
        "cond_stage_model.transformer.vision_model.pre_layrnorm.weight",
        "cond_stage_model.transformer.visual_projection.weight",
        "conditioner.embedders.0.transformer.vision_model.encoder.layers.0.mlp.fc1.bias",
        "conditioner.embedders.1.model.visual.conv1.weight",
    ],
)
def test_the_encoder_of_pictures_in_a_whole_clip_is_not_needed(key: str) -> None:
    refuse_unknown([key])


def test_a_name_of_endless_length_is_refused_before_it_is_searched(tmp_path: Path) -> None:
    """The time of a search grows with the square of the length."""
    name = "lora.oft_a" * 100_000
    entries = json.dumps({name: {"dtype": "F0", "shape": [], "data_offsets": [0, 0]}}).encode()
    (tmp_path / "long.safetensors").write_bytes(struct.pack("<Q", len(entries)) + entries)
    with pytest.raises(ValueError, match="has 1000000 characters"):
        read_header(tmp_path / "long.safetensors")
