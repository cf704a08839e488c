"""Loads the adapters of a LoRA file into a pipeline, for all formats and names of the field.

Each layer of the file is looked up in the pipeline (layer_names.py). A LoRA goes into diffusers' own loader under
diffusers' names; a LoHa or LoKr too, if it is a LoRA of a useful rank; every other change is computed at each use
(lycoris.py). No tensor is left out without a word.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from trainer.library.lora_keys import format_of, parsed, why_not_read
from trainer.methods import lycoris
from trainer.methods.layer_names import ENCODERS, FLUX_LEFT_OUT, Target, has_release_names, names_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from transformers import PreTrainedModel

Configs = dict[str, dict[str, Any]]  # part of the pipeline -> the fields of peft's LoraConfig
NUMBERS = (torch.float16, torch.bfloat16, torch.float32)  # other types (float8, float64) are converted when read
NO_CHANGE = {"alpha", "rescale"}  # parts that change nothing on their own
WHY_OTHER = "it was made for another family or size of model"


@dataclass
class Adapter:
    """The adapter of one layer of the pipeline. down: (r, in, ...), up: (out, r, ...), times `scale`.

    change: it is used in place of `down` and `up`, which are zeros then.
    """

    down: Tensor
    up: Tensor
    scale: float = 1.0
    change: lycoris.Change | None = None


@dataclass
class Found:
    """What is in a file.

    adapters: by the part of the pipeline and the name of its layer. left_out: layers that cannot be applied, although
    they have an effect. twice: layers that are there under diffusers' names, too, with other values.
    """

    adapters: dict[tuple[str, str], Adapter] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)


def load_adapters(
    pipeline: DiffusionPipeline, tensors: Mapping[str, Tensor], facts: Mapping[str, str], name: str, folder: Path
) -> list[str]:
    """Load a file's adapters into the pipeline, under this name. Returns warnings.

    facts: the file's metadata. folder: where peft's adapter_config.json may be. Raises ValueError for a file that is of
    another model, or of a format that is not read.
    """
    found = read(pipeline, tensors, configs(facts, folder))
    if not found.adapters:
        raise ValueError("none of its layers is applied")
    parts: dict[str, dict[str, Adapter]] = {}
    for (part, module), one in found.adapters.items():
        parts.setdefault(part, {})[module] = one
    for part, adapters in parts.items():
        weights = {
            f"{module}.lora_{half}.weight": tensor
            for module, one in adapters.items()
            for half, tensor in (("A", one.down), ("B", one.up))
        }
        if part in ENCODERS:
            inject(getattr(pipeline, part), weights, {module: len(one.down) for module, one in adapters.items()}, name)
        else:
            pipeline.load_lora_weights({f"{part}.{key}": value for key, value in weights.items()}, adapter_name=name)
        for module, one in adapters.items():
            attach(getattr(pipeline, part).get_submodule(module), one, name)
    why = {
        "the pipeline cannot use them": found.left_out,
        "they are there again under diffusers' names, which are applied": found.twice,
    }
    return [
        f"{len(layers)} of its layers are left out, {layers[0]} among them: {reason}; the rest is applied"
        for reason, layers in why.items()
        if layers
    ]


def inject(encoder: PreTrainedModel, weights: dict[str, Tensor], ranks: Mapping[str, int], name: str) -> None:
    """Load adapters into a text encoder. diffusers' own loader takes none without a layer of attention among them."""
    config = LoraConfig(r=next(iter(ranks.values())), rank_pattern=dict(ranks), target_modules=list(ranks))
    encoder.load_adapter(adapter_name=name, adapter_state_dict=weights, peft_config=config, low_cpu_mem_usage=True)
    encoder.to(device=encoder.device, dtype=encoder.dtype)


def attach(layer: nn.Module, adapter: Adapter, name: str) -> None:
    """Set the scale of a loaded adapter, and its change. Raises ValueError if the loader did not take it."""
    if not isinstance(layer, LoraLayer) or name not in layer.lora_A:
        raise ValueError("the loader of diffusers left out some of its layers")
    layer.lora_alpha[name] = adapter.scale * layer.r[name]
    layer.set_scale(name, 1.0)
    if adapter.change is not None:
        if not hasattr(layer, "lora_change"):
            layer.lora_change = nn.ModuleDict()  # moves to the device with the layer, and is deleted with the adapter
            layer.adapter_layer_names = (*layer.adapter_layer_names, "lora_change")
        layer.lora_change[name] = adapter.change.to(layer.get_base_layer().weight.device)
        layer.lora_variant[name] = adapter.change  # type: ignore[assignment]


def changes_in(module: nn.Module) -> int:
    """How many layers have an adapter that is no LoRA."""
    return sum(bool(getattr(layer, "lora_change", None)) for layer in module.modules() if isinstance(layer, LoraLayer))


def read(pipeline: DiffusionPipeline, tensors: Mapping[str, Tensor], alphas: Configs) -> Found:
    """The adapters of a file's tensors. Raises ValueError as `load_adapters`."""
    layers: dict[str, dict[str, Tensor]] = {}
    strange = []
    for key, tensor in tensors.items():
        if (place := parsed(key)) is None:
            strange.append(key)
        else:
            layers.setdefault(place[0], {})[place[1]] = tensor if tensor.dtype in NUMBERS else tensor.float()
    if problem := why_not_read(layers):
        raise ValueError(problem)
    names, found = names_of(pipeline), Found()
    flux = type(getattr(pipeline, "transformer", None)).__name__ == "FluxTransformer2DModel"
    for layer, parts in sorted(layers.items(), key=lambda one: not names_diffusers(one[0], names)):
        if flux and "diff_b" in parts and bool(parts.pop("diff_b").any()):
            found.left_out.append(f"{layer}.diff_b")
        if layer in names and parts.keys() - NO_CHANGE:
            add(found, layer, names[layer], adapters_of(pipeline, layer, parts, names[layer], alphas))
        elif has_effect(parts):
            (found.left_out if flux and (FLUX_LEFT_OUT.match(layer) or "diff" in parts) else strange).append(layer)
    if strange and not has_release_names(pipeline):
        return read(pipeline, converted(pipeline, tensors), alphas)
    if strange:
        count = f"{len(strange)} of its layers and tensors are not"
        if not found.adapters:
            count = f"none of its {len(layers)} layers is"
        raise ValueError(f"{count} in this model, {strange[0]} among them: {WHY_OTHER}")
    return found


def converted(pipeline: DiffusionPipeline, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors under diffusers' names, by diffusers' own converter. Raises ValueError where it does nothing."""
    found = pipeline.lora_state_dict(dict(tensors))
    state, alphas = found[:2] if isinstance(found, tuple) else (found, {})
    if state.keys() == tensors.keys():
        raise ValueError(f"{len(tensors)} tensors are of layers with unknown names, {min(tensors)} among them")
    return {**state, **{key: torch.as_tensor(value) for key, value in (alphas or {}).items()}}


def names_diffusers(layer: str, names: Mapping[str, Target]) -> bool:
    """Whether a file's layer has a name that is made from diffusers'. Only such a name ends like the module's."""
    return layer in names and layer.replace(".", "_").endswith(names[layer].modules[0].replace(".", "_"))


def add(found: Found, layer: str, target: Target, adapters: Mapping[str, Adapter]) -> None:
    """Add the adapters of a layer, except where they are there already: some files have layers under two names."""
    for module, one in adapters.items():
        known = found.adapters.setdefault((target.part, module), one)
        if known is not one and not (torch.equal(known.down, one.down) and torch.equal(known.up, one.up)):
            found.twice.append(layer)


def has_effect(parts: Mapping[str, Tensor]) -> bool:
    """Whether an adapter changes anything. Trainers write layers of zeros for what they do not train."""
    products = (("down", "up"), ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), ("lokr_w2_a", "lokr_w2_b"))
    none = {part for part, tensor in parts.items() if not bool(tensor.any())} | NO_CHANGE
    if parts.keys() & {"magnitude", "magnitude_out"}:
        return True
    without = {part for product in products if none & set(product) for part in product}
    return bool(parts.keys() - none - without)


def adapters_of(
    pipeline: DiffusionPipeline, name: str, parts: dict[str, Tensor], target: Target, alphas: Configs
) -> dict[str, Adapter]:
    """The adapters of a file's layer, by the names of the pipeline's. Raises ValueError where it does not fit."""
    module = getattr(pipeline, target.part)
    weights = [base_weight(module.get_submodule(one)) for one in target.modules]
    shape = (sum(len(weight) for weight in weights), *weights[0].shape[1:])
    for part, what in (("bias", "biases"), ("diff_b", "biases (diff_b)")):
        if part in parts and bool(parts[part].any()):
            raise ValueError(f"it changes {what} ({name}), which is not read: merge it into its base with ComfyUI")
        parts.pop(part, None)
    if "magnitude_out" in parts:
        parts["magnitude"] = parts.pop("magnitude_out").flatten()
    if "alpha" not in parts and "down" in parts:
        parts |= told_alpha(alphas, target, parts["down"])
    try:
        if parts.keys() <= {"down", "up", "alpha"}:
            return plain(parts, target, weights, shape)
        lora = lycoris.as_lora(parts, shape)
        if lora is not None:
            down, up = (half.to(weights[0].dtype) for half in lora)
            return plain({"down": down, "up": up}, target, weights, shape)
        return changes(parts, target, weights, shape)
    except KeyError as problem:
        raise ValueError(f"its layer {name} lacks the tensor {problem} ({format_of(parts)})") from None
    except (ValueError, RuntimeError) as problem:
        raise ValueError(f"its layer {name} ({format_of(parts)}) does not fit: {problem}; {WHY_OTHER}") from None


def base_weight(layer: nn.Module) -> Tensor:
    """The weight of a layer, without the adapters around it."""
    weight: Tensor = (layer.get_base_layer() if isinstance(layer, LoraLayer) else layer).weight  # type: ignore[assignment, union-attr]
    return weight


def plain(
    parts: Mapping[str, Tensor], target: Target, weights: list[Tensor], shape: tuple[int, ...]
) -> dict[str, Adapter]:
    """The adapters of a LoRA. Of stacked layers each gets its rows, and the part of the rank that reaches them."""
    down, up = parts["down"], parts["up"]
    rank, into = len(down), math.prod(shape[1:])
    if up.numel() != shape[0] * rank or down.numel() != rank * into:
        size = (len(up), down.numel() // max(rank, 1))
        raise ValueError(f"its size (output, input) is {size}, the base's is {(shape[0], into)}")
    # A convolution of 1x1 in one program is a linear layer in another.
    down, up = down.reshape(rank, *shape[1:]), up.reshape(shape[0], rank, *[1] * (len(shape) - 2))
    if target.swapped:
        up = torch.cat(up.chunk(2)[::-1])
    scale = lycoris.scale_of(parts)
    if len(weights) == 1:
        return {target.modules[0]: Adapter(down, up, scale)}
    found = {}
    parts_of_up = torch.split(up, [len(weight) for weight in weights])
    for module, rows in zip(target.modules, parts_of_up, strict=True):
        used = rows.flatten(1).any(dim=0)
        if not bool(up.any()):
            used[0] = True  # a LoRA of zeros is one
        if bool(used.any()):
            found[module] = Adapter(down[used].clone(), rows[:, used].clone(), scale)
    return found


def changes(
    parts: Mapping[str, Tensor], target: Target, weights: list[Tensor], shape: tuple[int, ...]
) -> dict[str, Adapter]:
    """The adapters of changes that are no LoRA of a useful rank."""
    # Raises where it does not fit; without computing anything.
    lycoris.change_of({part: tensor.to("meta") for part, tensor in parts.items() if part != "alpha"}, shape)
    parts = {part: tensor.to(weights[0].device) for part, tensor in parts.items()}
    whole = torch.cat(weights) if len(weights) > 1 else weights[0]
    if target.swapped:
        whole = torch.cat(whole.chunk(2)[::-1])
    factor = lycoris.factor_of(parts, whole)
    if target.swapped and factor is not None and len(factor) > 1:
        factor = torch.cat(factor.chunk(2)[::-1])
    kept = {part: tensor for part, tensor in parts.items() if part != "magnitude"}
    found, start = {}, 0
    for module, weight in zip(target.modules, weights, strict=True):
        rows = slice(start, start + len(weight))
        start += len(weight)
        change = lycoris.Change(kept, shape, rows, target.swapped, factor)
        down, up = weight.new_zeros(1, *weight.shape[1:]), weight.new_zeros(len(weight), 1, *[1] * (weight.ndim - 2))
        found[module] = Adapter(down, up, 1.0, change)
    return found


def configs(facts: Mapping[str, str], folder: Path) -> Configs:
    """Part of the pipeline -> peft's configuration of its adapters, which has the alphas that the tensors do not have.

    diffusers writes it into the file's metadata, with the part before each name; peft writes adapter_config.json, which
    is for the denoiser ("").
    """
    found: Configs = {}
    try:
        for key, value in json.loads(facts.get("lora_adapter_metadata", "{}")).items():
            part, _, name = key.partition(".")
            found.setdefault(part, {})[name] = value
        if not found and (folder / "adapter_config.json").is_file():
            found[""] = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    except (OSError, ValueError, AttributeError) as problem:
        raise ValueError(f"the configuration of its adapters cannot be read: {problem}") from None
    return found


def told_alpha(configs: Configs, target: Target, down: Tensor) -> dict[str, Tensor]:
    """The alpha of a layer from peft's configuration, as a part; empty: there is none."""
    config = configs.get(target.part) or configs.get("") or {}
    patterns = config.get("alpha_pattern") or {}
    try:
        alpha = patterns.get(get_pattern_key(patterns, target.modules[0]), config.get("lora_alpha"))
    except re.error as problem:
        raise ValueError(f"the configuration of its adapters cannot be read: alpha_pattern has {problem}") from None
    if alpha is None:
        return {}
    return {"alpha": torch.tensor(alpha * (math.sqrt(len(down)) if config.get("use_rslora") else 1.0))}
