"""The names that the field's programs give to the layers of a pipeline in LoRA files.

A file's layer is looked up by its whole name, as kohya's tools and ComfyUI do it: names are made from the model's own
modules, never taken apart. Sources: kohya-ss/sd-scripts networks/lora.py and networks/lora_flux.py, Nerogar/OneTrainer
modules/util/convert_lora_util.py, diffusers' lora_conversion_utils.py, XLabs-AI/x-flux.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from trainer.branches.flux1_keys import DOUBLE_BLOCK, SHIFT_AND_SCALE, original_layers
from trainer.branches.single_file_keys import renamed, unet_names

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin

DENOISERS = ("unet", "transformer")
# Text encoder -> beginnings of the names of its layers: kohya's with underscores, then those with dots.
ENCODERS = {
    "text_encoder": (("lora_te_", "lora_te1_"), ("text_encoder.", "text_encoders.clip_l.transformer.", "")),
    "text_encoder_2": (("lora_te2_",), ("text_encoder_2.", "text_encoders.clip_g.transformer.")),
}
XLABS = {
    "qkv_lora1": "img_attn.qkv",
    "proj_lora1": "img_attn.proj",
    "qkv_lora2": "txt_attn.qkv",
    "proj_lora2": "txt_attn.proj",
}


@dataclass(frozen=True)
class Target:
    """The layers of a pipeline that a file's layer changes: several where they are one there, stacked in this order.

    part: of the pipeline. modules: names of linear layers or convolutions in it. swapped: the first and the second half
    of the rows change places.
    """

    part: str
    modules: tuple[str, ...]
    swapped: bool = False


def names_of(pipeline: DiffusionPipeline) -> dict[str, Target]:
    """Each name that a LoRA file may give to a layer of the pipeline."""
    names: dict[str, Target] = {}
    for part in DENOISERS:
        if (denoiser := getattr(pipeline, part, None)) is not None:
            for layer in layers_of(denoiser):
                add_denoiser(names, layer, Target(part, (layer,)), part)
            for original, target in original_names(part, denoiser):
                add_denoiser(names, original, target, part)
    for part, (underscored, dotted) in ENCODERS.items():
        if (encoder := getattr(pipeline, part, None)) is None:
            continue
        for layer in layers_of(encoder):
            # transformers 5 uses the prefix `text_model.` in only one of its two classes; files have it.
            bare = layer.removeprefix("text_model.")
            name = bare if bare.startswith("text_projection") else f"text_model.{bare}"
            for prefix in underscored:
                names[prefix + name.replace(".", "_")] = Target(part, (layer,))
            for prefix in dotted:
                names |= dict.fromkeys((prefix + name, prefix + layer) if prefix else (name,), Target(part, (layer,)))
    return names


def has_release_names(pipeline: DiffusionPipeline) -> bool:
    """Whether `names_of` has the names of the original release; of other families diffusers has a converter."""
    kinds = {type(getattr(pipeline, part, None)).__name__ for part in DENOISERS}
    return bool(kinds & {"UNet2DConditionModel", "FluxTransformer2DModel"})


def layers_of(module: nn.Module) -> list[str]:
    """The linear layers and convolutions of a module, without those of adapters."""
    names = [name for name, layer in module.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    return [name.removesuffix(".base_layer") for name in names if ".lora_" not in name]


def add_denoiser(names: dict[str, Target], layer: str, target: Target, part: str) -> None:
    """Add the names of a layer of the denoiser, after its name in diffusers or in the original release."""
    for prefix in ("", f"{part}.", "unet.", "diffusion_model.", "model.diffusion_model."):
        names.setdefault(prefix + layer, target)
    for prefix in ("lora_unet_", "lora_transformer_", "lycoris_"):
        names.setdefault(prefix + layer.replace(".", "_"), target)


def original_names(part: str, denoiser: ModelMixin) -> Iterator[tuple[str, Target]]:
    """The names of the original release, and XLabs' for FLUX.1; none for a denoiser that has no other names here."""
    if type(denoiser).__name__ == "UNet2DConditionModel":
        layers = {layer: layer for layer in layers_of(denoiser)}
        for original, layer in renamed(layers, unet_names(denoiser)).items():
            yield original, Target(part, (layer,))
    elif type(denoiser).__name__ == "FluxTransformer2DModel":
        for original, modules in original_layers(denoiser):
            yield original, Target(part, modules, swapped=original == SHIFT_AND_SCALE)
        for block in range(denoiser.config.num_layers):
            for name, original in XLABS.items():
                modules = tuple(f"transformer_blocks.{block}.{layer}" for layer in DOUBLE_BLOCK[original])
                yield f"double_blocks.{block}.{name}", Target(part, modules)
        for block in range(denoiser.config.num_single_layers):
            ours = f"single_transformer_blocks.{block}"
            yield f"single_blocks.{block}.qkv", Target(part, tuple(f"{ours}.attn.to_{letter}" for letter in "qkv"))
            yield f"single_blocks.{block}.proj", Target(part, (f"{ours}.proj_out",))


# Layers of FLUX.1's files that diffusers leaves out, and that the pipeline cannot have: the other text encoder (kohya's
# lora_te3, OneTrainer's lora_te2), embeddings, and the projection that its CLIP does not use.
FLUX_LEFT_OUT = re.compile(
    r"lora_te[23]_|text_encoder_2\.|text_encoders\.t5xxl\.|.*(position_embedding|token_embedding|text_projection)"
)
