"""Models that are none of the families here, by a few of their keys, so that a refusal can name them.

Sources of the keys: diffusers' CHECKPOINT_KEY_NAMES (loaders/single_file_utils.py), the files' own releases, and the
widths in the configurations of the originals.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

Shapes = Mapping[str, list[int]]
INSIDE = r"(model\.diffusion_model\.)?"  # where ComfyUI puts the denoiser in a file with other parts
TEXT_KEYS = re.compile(r"model\.diffusion_model\..*attn2\.to_k\.weight$")  # keys from texts, in a UNet


@dataclass(frozen=True)
class Foreign:
    """A kind of file. what: the refusal, which names it. has: patterns of keys that it has all of.

    width: of the texts in a UNet's cross-attention; 0: any.
    """

    what: str
    has: tuple[re.Pattern[str], ...]
    width: int = 0


def _model(name: str, *has: str, width: int = 0) -> Foreign:
    return Foreign(f"it is {name}, which is not supported", tuple(map(re.compile, has)), width)


def _part(name: str, *has: str) -> Foreign:
    return Foreign(f"it is {name}, and no base model", tuple(map(re.compile, has)))


UNET = r"model\.diffusion_model\.input_blocks\.0\.0\.weight$"
# They have keys of a family here, and something else, too.
LOOKALIKES = (
    _model("a Stable Video Diffusion model", r"model\.diffusion_model\..*\.time_stack\."),
    _model("a model with AnimateDiff's motion modules in it", r"model\.diffusion_model\..*motion_modules\."),
    _model("the refiner of SDXL", UNET, width=1280),
    _model("the refiner of SDXL", UNET, r"conditioner\.embedders\.0\.model\.ln_final\."),
    _model("a Stable Diffusion 2 model", UNET, width=1024),
    _model("a FLUX.2 model", INSIDE + r"double_stream_modulation_img\.lin\."),
    _model("a Chroma model", INSIDE + r"distilled_guidance_layer\."),
    _model("a HunyuanVideo or HunyuanImage model", INSIDE + r"txt_in\.individual_token_refiner\."),
    _model("a ControlNet of FLUX.1", r"(controlnet_blocks|input_hint_block|controlnet_x_embedder)\."),
)
# They have no keys of a family here.
OTHERS = (
    _model("a Stable Diffusion 3 model", INSIDE + r"joint_blocks\.0\.(context|x)_block\."),
    _model("a Qwen-Image model", INSIDE + r"transformer_blocks\.0\.img_mod\.1\.", INSIDE + r"txt_norm\."),
    _model("a Wan model", INSIDE + r"blocks\.0\.self_attn\.q\.", INSIDE + r"(head\.modulation$|patch_embedding\.)"),
    _model("a Lumina or Z-Image model", INSIDE + r"cap_embedder\.", INSIDE + r"(noise|context)_refiner\."),
    _model("an AuraFlow model", INSIDE + r"double_layers\.0\.attn\.w1q\."),
    _model("a HunyuanDiT model", INSIDE + r"mlp_t5\.0\."),
    _model("a PixArt model", INSIDE + r"t_block\.1\."),
    _model("an LTX-Video model", INSIDE + r"patchify_proj\."),
    _model("a HiDream model", INSIDE + r"(double|single)_stream_blocks\.0\.block\."),
    _model("a Stable Cascade model", r"(clip_txt_mapper|clip_txt_pooled_mapper|effnet_mapper)\."),
    _part("motion modules of AnimateDiff", r"(module\.)?down_blocks\.0\.motion_modules\."),
    _part("an IP-Adapter", r"(image_proj|ip_adapter)[._]"),
    _part("a ControlNet", r"(control_model|controlnet_cond_embedding|zero_convs|input_hint_block)\."),
    _part("a ControlNet", r"(controlnet_down_blocks|controlnet_mid_block|controlnet_blocks)\."),
    _part("a T2I-Adapter", r"(adapter\.)?body\.0\.(block1|in_conv|resnets)\."),
    _part("an upscaler", r"(model\.1\.sub\.0\.|body\.0\.rdb1\.|layers\.0\.residual_group\.|params_ema\.)"),
    _part("an embedding (textual inversion)", r"(emb_params|string_to_param.*|\*|clip_[lg]|<.*>)$"),
    _part(
        "the UNet alone (a base model has text encoders and a VAE, too)",
        r"(input_blocks\.0\.0|down_blocks\.0\.resnets\.0\.norm1)\.weight$",
    ),
    _part(
        "one part of a diffusers folder (put the whole folder here)",
        r"(single_)?transformer_blocks\.0\.attn\.to_[qkv]\.weight$",
    ),
    _part("a VAE", r"(first_stage_model\.|vae\.)?(encoder|decoder)\.(conv_in|down\.0|down_blocks\.0|downsamples\.0)\."),
    _part("a text encoder", r"(text_encoders|cond_stage_model|conditioner)\."),
    _part("a text or image encoder", r"(text_model|vision_model)\.(encoder\.layers|embeddings)\."),
    _part("a text encoder", r"(encoder\.block\.0\.layer\.0\.SelfAttention|transformer\.resblocks\.0)\."),
    _part("a language model", r"(model\.)?layers\.0\.self_attn\.q_proj\."),
)


def text_width(shapes: Shapes) -> int:
    """The width of the texts in the cross-attention of a UNet under the original keys; 0: it has none."""
    return next((shape[-1] for key, shape in shapes.items() if shape and TEXT_KEYS.match(key)), 0)


def foreign(kinds: tuple[Foreign, ...], shapes: Shapes) -> str | None:
    """The refusal of the first of these kinds that fits a file; None: it is none of them."""
    width = text_width(shapes)
    return next((kind.what for kind in kinds if _fits(kind, shapes, width)), None)


def _fits(kind: Foreign, shapes: Shapes, width: int) -> bool:
    return kind.width in (0, width) and all(any(pattern.match(key) for key in shapes) for pattern in kind.has)
