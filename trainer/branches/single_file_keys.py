"""Weights of diffusers' modules under the names of the original releases, which A1111 and ComfyUI read.

The reverse of diffusers' single-file loaders: CompVis' names (v1-inference.yaml) of the UNet, the VAE and CLIP's text
tower, Stability's additions for SDXL (generative-models, sd_xl_base.yaml), and OpenCLIP's names of its text tower. A
layer that is not in the release keeps its name (the base of branch fast has some). Tensors share the modules' memory,
except where several are stacked into one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
# Kind of layer -> names of its parts in diffusers and in the release; other parts have the same name in both.
Parts = Mapping[str, Mapping[str, str]]
UNET_PARTS: Parts = {
    "resnets": {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    },
    "downsamplers": {"conv": "op"},
}
UNET_OUTER = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",  # SDXL only: of the sizes and the pooled text
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE_PARTS: Parts = {
    "resnets": {"conv_shortcut": "nin_shortcut"},
    "attentions": {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"},
}
OPEN_CLIP_OUTER = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
# OpenCLIP's names in a block -> ours, in the order of stacking. Each has a weight and a bias.
OPEN_CLIP_BLOCK = {
    "ln_1.": ("layer_norm1.",),
    "attn.in_proj_": ("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj."),
    "attn.out_proj.": ("self_attn.out_proj.",),
    "ln_2.": ("layer_norm2.",),
    "mlp.c_fc.": ("mlp.fc1.",),
    "mlp.c_proj.": ("mlp.fc2.",),
}


def joined(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """parts: prefix -> weights of a part. Returns one dict."""
    return {prefix + name: tensor for prefix, weights in parts.items() for name, tensor in weights.items()}


def module_weights(module: Any) -> dict[str, Tensor]:
    """A module's own weights, detached, without the adapters on its layers."""
    # peft names the wrapped layer `base_layer`, and its additions `lora_...`.
    return {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in module.state_dict().items()
        if ".lora_" not in name
    }


def unet_weights(unet: Any) -> dict[str, Tensor]:
    """Weights of a UNet2DConditionModel with any number of blocks and layers."""
    return renamed(module_weights(unet), unet_names(unet))


def unet_names(unet: Any) -> dict[str, str]:
    """Layer of a UNet2DConditionModel -> its name in the release, where that is another one."""
    return with_parts(UNET_OUTER | unet_places(unet), UNET_PARTS)


def unet_places(unet: Any) -> dict[str, str]:
    """Layer of a block -> its name in the release, which numbers the entries of all blocks, and the layers in an entry:
    a resnet, and its attention if any. A downsampler is a separate entry, an upsampler the last layer of the entry
    before."""
    inputs, outputs = [["conv_in"]], []
    for index, block in enumerate(unet.down_blocks):
        inputs += entries(f"down_blocks.{index}", block)
        if block.downsamplers:
            inputs.append([f"down_blocks.{index}.downsamplers.0"])
    for index, block in enumerate(unet.up_blocks):
        outputs += entries(f"up_blocks.{index}", block)
        if block.upsamplers:
            outputs[-1].append(f"up_blocks.{index}.upsamplers.0")
    middle = ["mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"]
    rows = {"input_blocks.": inputs, "output_blocks.": outputs}
    places = {f"{row}{entry}": layers for row, found in rows.items() for entry, layers in enumerate(found)}
    places["middle_block"] = middle
    return {layer: f"{entry}.{number}" for entry, layers in places.items() for number, layer in enumerate(layers)}


def entries(name: str, block: Any) -> list[list[str]]:
    """The entries of a block, each with its layers."""
    kinds = ("resnets", "attentions") if hasattr(block, "attentions") else ("resnets",)
    return [[f"{name}.{kind}.{layer}" for kind in kinds] for layer in range(len(block.resnets))]


def vae_weights(vae: Any) -> dict[str, Tensor]:
    """Weights of an AutoencoderKL. The attention's linear layers (C, C) become convolutions (C, C, 1, 1)."""
    weights = {
        name: tensor[:, :, None, None] if ".attentions." in name and tensor.ndim == 2 else tensor
        for name, tensor in module_weights(vae).items()
    }
    return renamed(weights, with_parts(vae_places(vae), VAE_PARTS))


def vae_places(vae: Any) -> dict[str, str]:
    """Layer of a block -> its name in the release, which numbers both halves from the picture to the latents."""
    places: dict[str, str] = {}
    for side, way, blocks in (("encoder", "down", vae.encoder.down_blocks), ("decoder", "up", vae.decoder.up_blocks)):
        for index, block in enumerate(blocks):
            number = index if way == "down" else len(blocks) - 1 - index
            here, there = f"{side}.{way}_blocks.{index}", f"{side}.{way}.{number}"
            places |= {f"{here}.resnets.{layer}": f"{there}.block.{layer}" for layer in range(len(block.resnets))}
            places[f"{here}.{way}samplers.0"] = f"{there}.{way}sample"
        places |= {
            f"{side}.mid_block.resnets.0": f"{side}.mid.block_1",
            f"{side}.mid_block.attentions.0": f"{side}.mid.attn_1",
            f"{side}.mid_block.resnets.1": f"{side}.mid.block_2",
            f"{side}.conv_norm_out": f"{side}.norm_out",
        }
    return places


def with_parts(places: Mapping[str, str], parts: Parts) -> dict[str, str]:
    """places: layer -> its name in the release. Adds the parts of each layer."""
    inner = {
        f"{layer}.{part}": f"{there}.{name}"
        for layer, there in places.items()
        for kind, names in parts.items()
        if f".{kind}." in layer
        for part, name in names.items()
    }
    return {**places, **inner}


def renamed(weights: Mapping[str, T], places: Mapping[str, str]) -> dict[str, T]:
    """Rename each weight, or whatever has a layer's name, by its innermost layer in `places`."""
    found = {}
    for name, tensor in weights.items():
        layer = name
        while layer and layer not in places:
            layer = layer.rpartition(".")[0]
        found[places.get(layer, "") + name.removeprefix(layer)] = tensor
    return found


def clip_weights(encoder: Any) -> dict[str, Tensor]:
    """Weights of a CLIPTextModel. Raises ValueError where it has been freed."""
    return {f"text_model.{name}": tensor for name, tensor in encoder_weights(encoder).items()}


def open_clip_weights(encoder: Any) -> dict[str, Tensor]:
    """Weights of a CLIPTextModelWithProjection, as in OpenCLIP: queries, keys and values are one matrix (3 D, D), and
    the output is multiplied by the projection (D, P), which is a linear layer (P, D) in transformers.

    Raises ValueError where it has been freed.
    """
    ours = encoder_weights(encoder)
    weights = {"text_projection": ours["text_projection.weight"].T}
    weights |= {theirs: ours[name] for name, theirs in OPEN_CLIP_OUTER.items()}
    for block in range(encoder.config.num_hidden_layers):
        here, there = f"encoder.layers.{block}", f"transformer.resblocks.{block}"
        for theirs, layers in OPEN_CLIP_BLOCK.items():
            for kind in ("weight", "bias"):
                weights[f"{there}.{theirs}{kind}"] = stacked([ours[f"{here}.{layer}{kind}"] for layer in layers])
    return weights


def open_clip_names(encoder: Any) -> Collection[str]:
    """The names of `open_clip_weights`, without the work of stacking them."""
    with torch.device("meta"):
        bare = type(encoder)(encoder.config)
    return open_clip_weights(bare).keys()


def encoder_weights(encoder: Any) -> dict[str, Tensor]:
    """A text encoder's weights without the prefix `text_model.`, which transformers 5 uses in only one of its two
    classes. Raises ValueError where the encoder has been freed."""
    if encoder is None:
        raise ValueError("a text encoder has been dropped, and a single file of this family holds it: read it again")
    return {name.removeprefix("text_model."): tensor for name, tensor in module_weights(encoder).items()}


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenate tensors (n, ...) along the first axis; a single one is not copied."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def stacked_adapters(
    denoiser: Any, layers: Iterable[tuple[str, Sequence[str]]], adapters: Mapping[str, tuple[Tensor, Tensor]]
) -> dict[str, tuple[Tensor, Tensor, int]]:
    """Adapters under kohya's names, where several layers of diffusers can be one layer: see `Branch.kohya_layers`.

    layers: each layer of the original release, with the layers of diffusers that are stacked in it. The adapters of
    those are combined: each has its own columns and its own rows of `up`. A layer without an adapter has rows of zeros
    and no columns.
    """
    found: dict[str, tuple[Tensor, Tensor, int]] = {}
    for original, names in layers:
        given = [adapters[name] for name in names if name in adapters]
        if not given:
            continue
        columns = sum(up.shape[1] for _, up in given)
        blocks, first = [], 0
        for name in names:
            height: int = denoiser.get_submodule(name).out_features
            rows = given[0][1].new_zeros(height, columns)
            if name in adapters:
                up = adapters[name][1]
                rows[:, first : first + up.shape[1]] = up
                first += up.shape[1]
            blocks.append(rows)
        kohya_name = f"lora_unet_{original.replace('.', '_')}"
        found[kohya_name] = (torch.cat([down for down, _ in given]), torch.cat(blocks), len(given))
    return found
