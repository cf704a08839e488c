"""LoRA (Hu et al. 2021, arXiv 2106.09685): low-rank adapters beside frozen weights, through peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from trainer.branches import Branch
from trainer.presets import TrainConfig

TEXT_ENCODER_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]  # of transformers' CLIP
ADAPTER = "default"
KOHYA_FILE, DIFFUSERS_FILE = "lora.safetensors", "lora_diffusers.safetensors"
KOHYA_ENCODERS = {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}


def attach(branch: Branch, config: TrainConfig) -> list[dict[str, Any]]:
    """Inject the adapters: into the denoiser, and into the text encoders where they have a learning rate."""
    modules = {"denoiser": (branch.denoiser, branch.lora_targets[config.targets], config.lr)}
    if config.text_encoder_lr:
        for name, encoder in branch.text_encoders.items():
            modules[name] = (encoder, TEXT_ENCODER_TARGETS, config.text_encoder_lr)
    groups = []
    for name, (module, targets, lr) in modules.items():
        adapter: Any = module
        adapter.add_adapter(
            LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=targets, init_lora_weights="gaussian"),
            adapter_name=ADAPTER,
        )
        trained = {f"{name}.{key}": p for key, p in module.named_parameters() if p.requires_grad}
        for parameter in trained.values():
            parameter.data = parameter.data.float()  # bf16 has too few digits for an optimizer's small steps
        groups.append({"params": list(trained.values()), "names": list(trained), "lr": lr})
    return groups


def adapters_of(module: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Name of each linear layer that has an adapter -> its down (r, in) and up (out, r), in ordinary memory."""
    # Left to itself, peft would look for the base on the hub, to see whether words were added to it.
    state = get_peft_model_state_dict(module, adapter_name=ADAPTER, save_embedding_layers=False)
    values = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    layers = [key.removesuffix(".lora_A.weight") for key in values if key.endswith(".lora_A.weight")]
    return {layer: (values[f"{layer}.lora_A.weight"], values[f"{layer}.lora_B.weight"]) for layer in layers}


def save(branch: Branch, folder: Path, config: TrainConfig, metadata: dict[str, str]) -> list[str]:
    """Write `lora.safetensors` (kohya keys: ComfyUI, A1111, kohya's tools) and `lora_diffusers.safetensors`."""
    denoiser = adapters_of(branch.denoiser)
    layers = {f"{branch.denoiser_name}.{name}": pair for name, pair in denoiser.items()}
    stacked = branch.kohya_layers(denoiser)
    for part, encoder in branch.text_encoders.items():
        if not hasattr(encoder, "peft_config"):
            continue
        prefix = KOHYA_ENCODERS[part] if len(branch.text_encoders) > 1 else "lora_te"
        for layer, (down, up) in adapters_of(encoder).items():
            # transformers 5 dropped the `text_model.` that the files of all others have.
            name = f"text_model.{layer.removeprefix('text_model.')}"
            layers[f"{part}.{name}"] = (down, up)
            stacked[f"{prefix}_{name.replace('.', '_')}"] = (down, up, 1)
    dtype = getattr(torch, config.save_dtype)
    kohya: dict[str, Tensor] = {}
    for name, (down, up, parts) in stacked.items():
        kohya[f"{name}.lora_down.weight"] = down.to(dtype)
        kohya[f"{name}.lora_up.weight"] = up.to(dtype)
        kohya[f"{name}.alpha"] = torch.tensor(config.alpha * parts, dtype=dtype)  # readers divide by the inner width
    # diffusers' keys have no alpha, and readers take the rank for it: the scale goes into the weights.
    scale = config.alpha / config.rank
    diffusers = {f"{name}.lora_A.weight": down.to(dtype) for name, (down, _) in layers.items()}
    diffusers |= {f"{name}.lora_B.weight": (up * scale).to(dtype) for name, (_, up) in layers.items()}
    save_file(kohya, folder / KOHYA_FILE, metadata)
    save_file(diffusers, folder / DIFFUSERS_FILE, metadata)
    return [KOHYA_FILE, DIFFUSERS_FILE]


def readable(branch: Branch) -> list[str]:
    """The saved files that a stock pipeline reads."""
    return [KOHYA_FILE, DIFFUSERS_FILE] if branch.reads_kohya else [DIFFUSERS_FILE]


def apply(pipeline: Any, folder: Path, scale: float, file: str = DIFFUSERS_FILE) -> None:
    """Load the saved adapters into a stock pipeline, in place of those it had."""
    remove(pipeline)
    pipeline.load_lora_weights(folder, weight_name=file, adapter_name="tune", local_files_only=True)
    pipeline.set_adapters("tune", scale)


def remove(pipeline: Any) -> None:
    """Leave the bare base."""
    pipeline.unload_lora_weights()
