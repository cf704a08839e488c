"""LoRA (Hu et al. 2021, arXiv 2106.09685): low-rank adapters beside frozen weights, through peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file

from trainer.branches import Branch
from trainer.presets import TrainConfig

# Names of linear layers in diffusers' denoisers and in transformers' CLIP text encoder.
DENOISER_TARGETS = {
    "attention": ["to_q", "to_k", "to_v", "to_out.0"],
    "all": ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"],
}
TEXT_ENCODER_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]
ADAPTER = "default"
KOHYA_PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}


def attach(branch: Branch, config: TrainConfig) -> list[dict[str, Any]]:
    """Inject the adapters: into the denoiser, and into the text encoders where they have a learning rate."""
    modules = {"denoiser": (branch.denoiser, DENOISER_TARGETS[config.targets], config.lr)}
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


def save(branch: Branch, folder: Path, config: TrainConfig, metadata: dict[str, str]) -> list[str]:
    """Write `lora.safetensors` (kohya keys: ComfyUI, A1111, diffusers) and `lora_diffusers.safetensors`."""
    kohya: dict[str, torch.Tensor] = {}
    diffusers: dict[str, torch.Tensor] = {}
    prefixes = KOHYA_PREFIXES if len(branch.text_encoders) > 1 else KOHYA_PREFIXES | {"text_encoder": "lora_te"}
    for prefix, module in (("unet", branch.denoiser), *branch.text_encoders.items()):
        if not hasattr(module, "peft_config"):
            continue
        # transformers 5 dropped the `text_model.` that the files of all others have.
        inner = "text_model." if prefix.startswith("text_encoder") else ""
        # Left to itself, peft would look for the base on the hub, to see whether words were added to it.
        state = get_peft_model_state_dict(module, adapter_name=ADAPTER, save_embedding_layers=False)
        for key, value in state.items():
            layer, half, _ = (inner + key.removeprefix(inner)).rsplit(".", 2)  # half: lora_A or lora_B
            weight = value.detach().cpu().contiguous()
            name = f"{prefixes[prefix]}_{layer.replace('.', '_')}"
            kohya[f"{name}.{'lora_down' if half == 'lora_A' else 'lora_up'}.weight"] = weight
            kohya[f"{name}.alpha"] = torch.tensor(config.alpha)
            # These keys have no alpha, and readers take the rank for it: the scale goes into the weights.
            scale = config.alpha / config.rank if half == "lora_B" else 1.0
            diffusers[f"{prefix}.{layer}.{half}.weight"] = weight * scale
    save_file(kohya, folder / "lora.safetensors", metadata)
    save_file(diffusers, folder / "lora_diffusers.safetensors", metadata)
    return ["lora.safetensors", "lora_diffusers.safetensors"]


def apply(pipeline: Any, folder: Path, scale: float) -> None:
    """Load the saved adapters into a stock pipeline, in place of those it had."""
    pipeline.unload_lora_weights()
    pipeline.load_lora_weights(folder, weight_name="lora.safetensors", adapter_name="tune")
    pipeline.set_adapters("tune", scale)
