"""Keys of LoRA files: the layer and the part of the adapter that each tensor belongs to, in all names of the field.

Sources of the names: kohya-ss/sd-scripts networks/lora.py (`lora_down`, `alpha`), peft (`lora_A`, `lora_embedding_A`),
diffusers of 2023 (`processor.to_q_lora.down`, `lora_linear_layer`), XLabs-AI/x-flux (`qkv_lora1.down`), and
KohakuBlueleaf/LyCORIS lycoris/modules (`hada_`, `lokr_`, `dora_scale`, `diff`, `w_norm`, `oft_blocks`, GLoRA, IA3).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

# Part -> the end of its keys. A group in the pattern: the part has the name that it matches.
ENDINGS = {
    "down": r"\.lora_down\.weight|\.lora_A(?:\.\w+)?\.weight|\.down\.weight",
    "up": r"\.lora_up\.weight|\.lora_B(?:\.\w+)?\.weight|\.up\.weight",
    "mid": r"\.lora_mid\.weight",
    "bias": r"\.lora_(?:down|up)\.bias|\.lora_[AB](?:\.\w+)?\.bias",
    "alpha": r"\.alpha",
    "magnitude": r"\.dora_scale",
    "magnitude_out": r"\.lora_magnitude_vector(?:\.\w+)*",  # peft's are always along the output
    "": r"\.(hada_[wt][12](?:_[ab])?|lokr_[wt][12](?:_[ab])?|diff_b|diff|[wb]_norm)",
    "oft": r"\.(?:oft|boft)_\w+(?:\.\w+)*",
    "rescale": r"\.rescale",
    "glora": r"\.(?:[ab][12]|bm)\.weight",
    "ia3": r"\.on_input|\.ia3_l(?:\.\w+)*",
    "embedding": r"\.lora_embedding_[AB](?:\.\w+)*",
}
PATTERN = re.compile(
    "(.+?)(?:" + "|".join(f"(?P<_{number}>{end})" for number, end in enumerate(ENDINGS.values())) + ")$"
)
# Most keys of a base fail this first, and cheap, test.
LIKELY = re.compile(
    r"lora|hada_|lokr_|oft_|ia3_l|alpha$|dora_scale|\.diff(?:_b)?$|[wb]_norm$|rescale|on_input|\.[ab][12]\.w|\.bm\.w"
)
OLD = re.compile(r"(?:.+[._])?lora(?:_linear_layer|\d)?$")  # the layer before `.down.weight` and `.up.weight`
OLD_END = re.compile(r"[._]lora(?:_linear_layer)?$")
ATTENTION = re.compile(r"(self_attn\.)to_([qkv])$")
# Formats by their parts, in the order in which they are named. A layer has a format if it has one of the parts.
READ = {
    "LoRA": ("down", "up"),
    "LoHa": ("hada_w1_a",),
    "LoKr": ("lokr_w1", "lokr_w1_a"),
    "full weight differences": ("diff",),
}
NOT_READ = {
    "OFT": ("oft",),
    "GLoRA": ("glora",),
    "IA3": ("ia3",),
    "norm layers (w_norm)": ("w_norm",),
    "embeddings (lora_embedding)": ("embedding",),
}
FIRST_LETTERS = ("lora_", "lycoris_", "oft_")  # of kohya's layers
TO_DO = "merge it into its base with ComfyUI or kohya's tools, and use the merged base"


def parsed(key: str) -> tuple[str, str] | None:
    """The layer that a key belongs to and the part of its adapter; None: the key is not of an adapter.

    The layer's name is without peft's `base_model.model.` and the words of the old diffusers.
    """
    found = PATTERN.match(key) if LIKELY.search(key) else None
    if found is None:
        return None
    layer, number = found[1], next(name for name, value in found.groupdict().items() if value is not None)
    part = list(ENDINGS)[int(number[1:])] or next(value for value in found.groups()[1:] if value and value[0] != ".")
    if key.endswith((".down.weight", ".up.weight")):
        if not OLD.match(layer):
            return None
        layer = OLD_END.sub("", layer)
    return plain_name(layer), part


def plain_name(layer: str) -> str:
    layer = layer.removeprefix("base_model.model.").replace(".processor.", ".")
    if "self_attn." in layer:  # of a text encoder in diffusers of 2023
        layer = ATTENTION.sub(r"\1\2_proj", layer)
        return layer.removesuffix("to_out") + "out_proj" if layer.endswith(".to_out") else layer
    return f"{layer}.0" if layer.endswith(".to_out") else layer


def layers_of(shapes: Mapping[str, list[int]]) -> dict[str, dict[str, list[int]]]:
    """The adapters in a header; empty: it is not a LoRA. shapes: of its tensors."""
    layers: dict[str, dict[str, list[int]]] = {}
    for key, shape in shapes.items():
        if (found := parsed(key)) is not None:
            layers.setdefault(found[0], {})[found[1]] = shape
    known = {part for parts in (*READ.values(), *NOT_READ.values()) for part in parts} - {"glora"}
    if any(
        known & parts.keys() or ("glora" in parts and name.startswith(FIRST_LETTERS)) for name, parts in layers.items()
    ):
        return layers
    return {}


def format_of(parts: Iterable[str]) -> str:
    """The format of a layer or a file with these parts, for messages."""
    parts = set(parts)
    names = [name for name, some in (READ | NOT_READ).items() if parts & set(some)]
    if parts & {"magnitude", "magnitude_out"}:
        names = ["DoRA", *(name for name in names if name != "LoRA")]
    return ", ".join(names) or "unknown"


def why_not_read(layers: Mapping[str, Mapping[str, object]]) -> str | None:
    """Why a file with these adapters cannot be read; None: it can. layers: layer -> its parts."""
    for name, some in NOT_READ.items():
        found = [layer for layer, parts in layers.items() if parts.keys() & set(some)]
        if found:
            count = f"{len(found)} of its {len(layers)} layers"
            return f"{count} are of the format {name}, which is not read ({found[0]}): {TO_DO}"
    return None


def widths(parts: Mapping[str, list[int]]) -> tuple[int | None, int | None]:
    """The input and the output width of the layer of an adapter; None: not known. parts: part -> shape."""

    def size(part: str, axis: int) -> int | None:
        shape = parts.get(part, [])
        return shape[axis] if len(shape) > axis else None

    into, out = size("down", 1) or size("diff", 1), size("up", 0) or size("diff", 0)
    if "hada_w1_a" in parts:
        return size("hada_w1_b", 1), size("hada_w1_a", 1 if "hada_t1" in parts else 0)
    if parts.keys() & {"lokr_w1", "lokr_w1_a"}:
        inner = size("lokr_w1", 1) or size("lokr_w1_b", 1), size("lokr_w2", 1) or size("lokr_w2_b", 1)
        outer = (
            size("lokr_w1", 0) or size("lokr_w1_a", 0),
            size("lokr_w2", 0) or size("lokr_w2_a", int("lokr_t2" in parts)),
        )
        into = inner[0] * inner[1] if inner[0] and inner[1] else None
        out = outer[0] * outer[1] if outer[0] and outer[1] else None
    return into, out
