"""FLUX.1's transformer under the names of the original release: reading and writing such files.

Single files use these names, and kohya's names of LoRA layers are derived from them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from trainer.branches import loading
from trainer.branches.single_file import log_unused, opened
from trainer.branches.single_file_keys import module_weights, stacked
from trainer.library.leftovers import refuse_unknown

SHIFT_AND_SCALE = "final_layer.adaLN_modulation.1"  # shift and scale there, scale and shift in diffusers
OTHER_PARTS = ("vae.", "text_encoders.")
ORIGINAL_PREFIX = "model.diffusion_model."  # of the transformer in a file with other parts
# Linear layers of the original release (black-forest-labs/flux, model.py) -> the layers of diffusers that are stacked
# in each, in this order.
DOUBLE_BLOCK: dict[str, tuple[str, ...]] = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.proj": ("attn.to_out.0",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "txt_mod.lin": ("norm1_context.linear",),
}
SINGLE_BLOCK: dict[str, tuple[str, ...]] = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}
OUTER: dict[str, tuple[str, ...]] = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
SCALES = {  # of the norms of queries and keys
    "img_attn.norm.query_norm.scale": "attn.norm_q.weight",
    "img_attn.norm.key_norm.scale": "attn.norm_k.weight",
    "txt_attn.norm.query_norm.scale": "attn.norm_added_q.weight",
    "txt_attn.norm.key_norm.scale": "attn.norm_added_k.weight",
    "norm.query_norm.scale": "attn.norm_q.weight",
    "norm.key_norm.scale": "attn.norm_k.weight",
}


def transformer_from_file(file: Path, config: Path, dtype: torch.dtype) -> Any:
    """The transformer of a file with the original keys. Raises ValueError for missing, unknown or misshapen weights."""
    weights: dict[str, Tensor] = {}
    with opened(file) as (keys, read):
        guided = any("guidance_in." in key for key in keys)  # FLUX.1-schnell is not
        settings = FluxTransformer2DModel.load_config(config / "transformer") | {"guidance_embeds": guided}
        with torch.device("meta"):
            transformer = FluxTransformer2DModel.from_config(settings)
        shapes = {name: weight.shape for name, weight in transformer.state_dict().items()}
        prefix = ORIGINAL_PREFIX if any(key.startswith(ORIGINAL_PREFIX) for key in keys) else ""
        left = {key for key in keys if key.startswith(prefix) and not key.startswith(OTHER_PARTS)}
        log_unused(keys, (prefix, *OTHER_PARTS))
        for original, layers in original_layers(transformer):
            for kind in ("weight", "bias"):
                if (key := f"{prefix}{original}.{kind}") not in left:
                    continue
                left.remove(key)
                tensor = read(key).to(dtype)
                if original == SHIFT_AND_SCALE:
                    tensor = torch.cat(tensor.chunk(2)[::-1])
                names = [f"{layer}.{kind}" for layer in layers]
                rows = [shapes[name][0] for name in names]
                if sum(rows) != len(tensor):
                    raise ValueError(f"{key} has {len(tensor)} rows, not {sum(rows)}")
                # Cloned: views of one tensor share autograd's version counter.
                weights |= zip(names, (part.clone() for part in torch.split(tensor, rows)), strict=True)
        for original, name in original_scales(transformer):
            for key in (
                f"{prefix}{original}",
                f"{prefix}{original.removesuffix('scale')}weight",
            ):  # the second: ComfyUI's
                if key in left:
                    left.remove(key)
                    weights[name] = read(key).to(dtype)
    refuse_unknown(left)
    loading.refuse_gaps(shapes.keys() - weights.keys())
    transformer.load_state_dict(weights, assign=True)
    return transformer


def original_layers(transformer: Any) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Linear layers of the original release, each with the layers of diffusers that are stacked in it."""
    config = transformer.config
    for original, layers in OUTER.items():
        if not original.startswith("guidance_in") or config.guidance_embeds:
            yield original, layers
    for ours, theirs, count, table in (
        ("transformer_blocks", "double_blocks", config.num_layers, DOUBLE_BLOCK),
        ("single_transformer_blocks", "single_blocks", config.num_single_layers, SINGLE_BLOCK),
    ):
        for block in range(count):
            for original, layers in table.items():
                yield f"{theirs}.{block}.{original}", tuple(f"{ours}.{block}.{layer}" for layer in layers)


def original_scales(transformer: Any) -> Iterator[tuple[str, str]]:
    """Scales of norms: name in the original release, name in diffusers."""
    for original, name in SCALES.items():
        double = original.startswith(("img_", "txt_"))
        ours, theirs = (
            ("transformer_blocks", "double_blocks") if double else ("single_transformer_blocks", "single_blocks")
        )
        count = transformer.config.num_layers if double else transformer.config.num_single_layers
        for block in range(count):
            yield f"{theirs}.{block}.{original}", f"{ours}.{block}.{name}"


def transformer_weights(transformer: Any) -> dict[str, Tensor]:
    """Weights of a FluxTransformer2DModel, as in the published file."""
    ours = module_weights(transformer)
    weights = {theirs: ours[name] for theirs, name in original_scales(transformer)}
    for theirs, layers in original_layers(transformer):
        for kind in ("weight", "bias"):
            parts = [ours[f"{layer}.{kind}"] for layer in layers]
            # Stacking copies 7 GiB in all: the card may have no room for it.
            tensor = stacked([part.cpu() for part in parts] if len(parts) > 1 else parts)
            if theirs == SHIFT_AND_SCALE:
                tensor = torch.cat(tensor.chunk(2)[::-1])
            weights[f"{theirs}.{kind}"] = tensor
    return weights
