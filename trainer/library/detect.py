"""The family of a folder or file, read from its index or header; no weights are read."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
EDITING_MODEL = "it is a model for inpainting or editing, which takes a picture as input; those are not trained here"
LORA_KEY = re.compile(r"\.(lora_down|lora_A|lora\.down)\.weight$")
LORA_BRANCHES = {  # told by these keys alone
    "flux1": re.compile(r"lora_unet_(double|single)_blocks_|transformer\.(single_)?transformer_blocks\."),
    "sdxl1": re.compile(r"lora_unet_(input_blocks|middle_block|output_blocks)_|lora_te2_"),
    "sd15": re.compile(r"lora_unet_(down_blocks|mid_block|up_blocks)_"),
}
PIPELINES = {
    "StableDiffusionPipeline": "sd15",
    "StableDiffusionXLPipeline": "sdxl1",
    "FluxPipeline": "flux1",
}


def branch_of_folder(folder: Path) -> str:
    index = _json_object(folder / "model_index.json")
    pipeline = str(index.get("_class_name"))
    if pipeline not in PIPELINES:
        raise ValueError(f"its model_index.json names {pipeline!r}; known are {', '.join(PIPELINES)}")
    for name, entry in index.items():
        library = entry[0] if isinstance(entry, list) and entry else None
        if library not in ("diffusers", "transformers", None):
            raise ValueError(f"its {name} asks for code of {library!r}; only diffusers and transformers are loaded")
    if code := next(folder.rglob("*.py"), None):
        raise ValueError(f"it brings code ({code.name}), which is never run; take it out")
    branch = PIPELINES[pipeline]
    denoiser = _json_object(folder / ("transformer" if branch == "flux1" else "unet") / "config.json")
    if branch == "sd15" and denoiser.get("cross_attention_dim") == 1024:
        raise ValueError("it is a Stable Diffusion 2 model, which is not supported")
    channels = denoiser.get("in_channels")
    if channels != (denoiser.get("out_channels") or channels):
        raise ValueError(EDITING_MODEL)
    return branch


def _json_object(file: Path) -> dict[str, object]:
    try:
        content = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"its {file.name} is not a JSON object")
    return content


def branch_of_file(file: Path) -> str:
    header = safetensors_header(file)
    flux = next((key for key in header if key.endswith("double_blocks.0.img_attn.qkv.weight")), None)
    if flux is not None:
        prefix = flux.removesuffix("double_blocks.0.img_attn.qkv.weight")
        if _shape(header, f"{prefix}img_in.weight")[1:] != _shape(header, f"{prefix}final_layer.linear.weight")[:1]:
            raise ValueError(EDITING_MODEL)
        return "flux1"
    if "model.diffusion_model.input_blocks.0.0.weight" in header:
        if _shape(header, "model.diffusion_model.input_blocks.0.0.weight")[1:2] != [4]:
            raise ValueError(EDITING_MODEL)
        if "conditioner.embedders.1.model.ln_final.weight" in header:
            if not any(key.startswith("first_stage_model.") for key in header):
                raise ValueError("it has no VAE; a whole Stable Diffusion XL checkpoint is needed")
            return "sdxl1"
        if "cond_stage_model.model.ln_final.weight" in header:
            raise ValueError("it is a Stable Diffusion 2 model, which is not supported")
        if not any(key.startswith("cond_stage_model.transformer.") for key in header):
            raise ValueError("it has no text encoder; a whole Stable Diffusion 1.5 checkpoint is needed")
        if not any(key.startswith("first_stage_model.") for key in header):
            raise ValueError("it has no VAE; a whole Stable Diffusion 1.5 checkpoint is needed")
        return "sd15"
    raise ValueError("its tensors are of no family that is known here")


def branch_of_lora(header: dict[str, Any]) -> str | None:
    """The branch of a LoRA with kohya's or diffusers' keys; None for what is no LoRA. Raises ValueError for others."""
    adapters = [key for key in header if LORA_KEY.search(key)]
    if not adapters:
        return None
    for branch, pattern in LORA_BRANCHES.items():
        if any(pattern.match(key) for key in adapters):
            return branch
    # diffusers' keys of both UNets are alike: what reads the text tells them apart by its width.
    widths = {_shape(header, key)[-1] for key in adapters if key.endswith("attn2.to_k.lora_A.weight")}
    if any(key.startswith("unet.") for key in adapters):
        return "sdxl1" if 2048 in widths or any(key.startswith("text_encoder_2.") for key in adapters) else "sd15"
    raise ValueError("it is a LoRA of no family that is known here")


def _shape(header: dict[str, Any], key: str) -> list[int]:
    shape = header.get(key, {}).get("shape")
    return shape if isinstance(shape, list) else []


def safetensors_header(file: Path) -> dict[str, Any]:
    """The names and shapes in a safetensors file; checks that the file is as long as they say.

    Layout: https://github.com/huggingface/safetensors#format. Raises ValueError for what is not one.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
            raise ValueError("it is not a safetensors file, or a broken one")
        try:
            header = json.loads(stream.read(length))
            end = max((entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"), default=0)
            expected = 8 + length + int(end)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError, OverflowError):
            raise ValueError("it is not a safetensors file, or a broken one: its header cannot be read") from None
    if expected != size:
        raise ValueError(f"it is broken: its header speaks of {expected} bytes, it has {size}")
    return dict(header)
