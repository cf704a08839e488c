"""How the numbers of a single file are stored: plain, as fp8 with scales, or quantized in a format that is not read.

Scaled fp8 is ComfyUI's: `LAYER.scale_weight` (older) or `LAYER.weight_scale` next to `LAYER.weight`, which is to be
multiplied by it; `scale_input` is for products in fp8 only. `LAYER.comfy_quant` names the format as JSON, as do the
metadata `_quantization_metadata`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable

from trainer.library.header import Header

SCALE = re.compile(r"(.*)\.(?:scale_weight|weight_scale)$")
FORMAT_KEY = ".comfy_quant"
# Tensors that come with scaled fp8, and that are not weights.
COMPANION = re.compile(r"(?:.*\.)?(?:scale_weight|weight_scale|scale_input|input_scale|comfy_quant|scaled_fp8)$")
PLAIN_FORMATS = {"float8_e4m3fn", "float8_e5m2"}  # ComfyUI's names of formats whose weights are numbers times a scale
# Dtypes whose numbers are the weights, perhaps with a scale. Others in a `.weight` are codes.
NUMBERS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
CODES = {"BOOL", "U8", "I8", "I16", "U16", "I32", "U32", "I64", "U64", "F4", "F6_E2M3", "F6_E3M2", "F8_E8M0"}
# Parts of keys -> the format that writes them.
QUANTIZED: dict[str, str] = {
    r".*\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*|SCB)$": "bitsandbytes (nf4, fp4 or int8)",
    r".*\.(wscales|wtscale|wcscales|smooth_factor(_orig)?|proj_down|proj_up)$": "SVDQuant (Nunchaku)",
    r".*\.(qweight|qzeros|g_idx|scales)$": "GPTQ or AWQ",
    r".*\.weight(\._data|\._scale|\._packed|:.*)$": "Quanto or torchao",
    r".*\.weight_scale_2$": "nvfp4",
    r".*\.weight_scale_inv$": "fp8 in blocks",
    r".*\.weight_codebook$": "a codebook",
}
_QUANTIZED = [(re.compile(pattern), name) for pattern, name in QUANTIZED.items()]


def scales_of(header: Header) -> dict[str, str]:
    """The key of each weight that must be multiplied -> the key of its scale: one number, or one for each row.

    Raises ValueError where weights are quantized in a format that is not read.
    """
    for pattern, name in _QUANTIZED:
        if key := next((key for key in header.shapes if pattern.match(key)), None):
            raise _refusal(name, key)
    check_formats(_formats_in_metadata(header))
    scales: dict[str, str] = {}
    for key in header.shapes:
        if key.endswith(".weight") and header.dtypes[key] in CODES:
            raise _refusal(f"codes of type {header.dtypes[key]}", key)
        if found := SCALE.match(key):
            weight = f"{found[1]}.weight"
            if weight not in header.shapes:
                raise ValueError(f"{key} is a scale, and {weight} is missing")
            rows, numbers = header.shapes[weight][:1], math.prod(header.shapes[key])
            if header.dtypes[key] not in NUMBERS or (numbers != 1 and [numbers] != rows):
                raise _refusal(f"scales in blocks, of shape {header.shapes[key]}", key)
            if weight in scales:
                raise ValueError(f"{weight} has two scales: {scales[weight]} and {key}")
            scales[weight] = key
    return scales


def check_formats(texts: Iterable[str | bytes]) -> None:
    """texts: layers' formats, in ComfyUI's JSON. Raises ValueError unless weights are just numbers times a scale."""
    try:
        names = {_format_name(json.loads(text)) for text in texts}
    except (AttributeError, LookupError, TypeError, ValueError):
        raise ValueError("it says that it is quantized, and not how") from None
    if strange := sorted(names - PLAIN_FORMATS):
        raise _refusal(strange[0], None)


def _formats_in_metadata(header: Header) -> list[str]:
    text = header.metadata.get("_quantization_metadata")
    try:
        return [json.dumps(layer) for layer in json.loads(text)["layers"].values()] if text else []
    except (AttributeError, LookupError, TypeError, ValueError):
        raise ValueError("its metadata says that it is quantized, and not how") from None


def _format_name(layer: dict[str, object]) -> str:
    """`+convrot`: the weights are rotated, too."""
    return f"{layer['format']}{'+convrot' if layer.get('convrot') else ''}"


def _refusal(name: str, key: str | None) -> ValueError:
    there = f" ({key})" if key else ""
    return ValueError(
        f"its weights are quantized as {name}{there}, which is not read; use the file with fp16, bf16 or fp8 weights"
    )
