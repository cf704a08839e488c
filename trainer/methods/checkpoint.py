"""DreamBooth (Ruiz et al. 2022, arXiv 2208.12242): the base's own weights are trained.

A whole model is saved in one file under the original release's keys. The sidecar, a folder of the same name, has its
configuration and its tokenizers; nothing else is needed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from trainer.branches.protocol import Branch
from trainer.config.train_config import TrainConfig
from trainer.library.models_folder import sidecar
from trainer.library.prediction import PREDICTION_KEYS, V_MARKER, VELOCITY, ZERO_SNR_MARKER
from trainer.methods import lora, new_tokens
from trainer.methods.protocol import Group
from trainer.names import CHECKPOINT_FILE

LARGE = True


def prepare(branch: Branch, config: TrainConfig, token: str, name: str, earlier: Path | None) -> list[str]:
    """Merge the earlier LoRA into the weights. Raises ValueError for learned tokens: a checkpoint cannot store them."""
    if earlier is None:
        return []
    file, warnings = lora.load(branch.pipeline, earlier, lora.EARLIER, token)
    if new_tokens.rows_of(branch.pipeline):
        raise ValueError(f"{file.name} has learned tokens, which a checkpoint cannot hold: train a LoRA on it")
    lora.merge(branch.pipeline)
    return warnings


def needed_text_encoders(branch: Branch, config: TrainConfig) -> list[str]:
    """See `Method.needed_text_encoders`: those that the family saves in the file."""
    return list(branch.text_encoders) if config.text_encoder_lr or branch.whole_file else []


def attach(branch: Branch, config: TrainConfig) -> list[Group]:
    """Train the denoiser, or its layers in `targets`, and the text encoders at their own learning rate."""
    if config.trained_dtype == "bfloat16":
        branch.dtype = torch.bfloat16  # compute dtype from now on: the CPU does not mix formats
    chosen = None if config.targets == "all" else tuple(branch.lora_targets[config.targets])
    modules: dict[str, tuple[nn.Module, float]] = {"denoiser": (branch.denoiser, config.lr)}
    if config.text_encoder_lr:
        modules |= {name: (encoder, config.text_encoder_lr) for name, encoder in branch.text_encoders.items()}
    groups: list[Group] = []
    for name, (module, lr) in modules.items():
        if config.trained_dtype == "bfloat16":
            module.to(torch.bfloat16)  # frozen weights too: norms on the CPU need weights as wide as their input
        trained = {}
        for key, parameter in module.named_parameters():
            if name == "denoiser" and chosen and not key.rpartition(".")[0].endswith(chosen):
                continue
            if "token_embedding" in key:  # the few tokens of the captions would drift away from all others
                continue
            parameter.data = parameter.data.to(getattr(torch, config.trained_dtype))
            trained[f"{name}.{key}"] = parameter.requires_grad_(True)
        groups.append({"params": list(trained.values()), "names": list(trained), "lr": lr})
    return groups


def after_step(branch: Branch) -> None:
    """Nothing to do."""


def save(branch: Branch, folder: Path, config: TrainConfig, metadata: dict[str, str]) -> list[str]:
    """Write `checkpoint.safetensors` and its sidecar folder."""
    write(branch, folder / CHECKPOINT_FILE, getattr(torch, config.save_dtype), metadata)
    return [CHECKPOINT_FILE]


def write(branch: Branch, file: Path, dtype: torch.dtype, metadata: dict[str, str]) -> None:
    """Write all weights as one file with the original keys, and a sidecar with configuration and tokenizers."""
    tensors = {key: value.to("cpu", dtype).contiguous() for key, value in branch.original_weights().items()}
    markers, facts = prediction(branch)
    save_file(tensors | markers, file, metadata | facts)
    sidecar_folder = sidecar(file)
    for name, part in branch.pipeline.components.items():
        if isinstance(part, nn.Module):
            module: Any = part
            settings = module.save_config if hasattr(module, "save_config") else module.config.save_pretrained
            settings(sidecar_folder / name)
        elif part is not None:
            part.save_pretrained(sidecar_folder / name)
    branch.pipeline.save_config(sidecar_folder)


def prediction(branch: Branch) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What says to other programs that the weights predict the velocity: marker tensors and metadata.

    They are ComfyUI's (CheckpointSave): it reads the markers, which are empty.
    """
    if branch.metadata.get(PREDICTION_KEYS[0]) not in VELOCITY:
        return {}, {}
    zero_snr = branch.pipeline.scheduler.config.get("rescale_betas_zero_snr")
    markers = [V_MARKER, ZERO_SNR_MARKER] if zero_snr else [V_MARKER]
    return {name: torch.zeros(0) for name in markers}, dict.fromkeys(PREDICTION_KEYS, "v")


def checkable_files(branch: Branch) -> list[str]:
    """The saved files that a stock pipeline can load."""
    return [CHECKPOINT_FILE]


def apply(branch: Branch, folder: Path, scale: float, file: str = CHECKPOINT_FILE) -> None:
    """Replace the branch's weights by those of a saved checkpoint. Raises ValueError for a scale other than 1."""
    if scale != 1.0:
        raise ValueError("a checkpoint has one strength")
    branch.load_weights(folder / file, folder.parent / "cache")
