"""The bytes that a run writes, computed before it begins."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.branches.protocol import Branch
from trainer.config.train_config import TrainConfig
from trainer.methods.protocol import Method

FLOAT32 = 4  # bytes
ADAPTER_COPIES = 2  # kohya's keys, and diffusers'
BUNDLED_COPIES = 3  # and one with the learned tokens in it


def state_bytes(weight: Tensor, optimizer: str) -> int:
    """Bytes of one trained weight and its moments in a state. optimizer: its name in the configuration."""
    if optimizer != "adafactor":
        return 3 * weight.nbytes + FLOAT32
    sides = weight.numel() if weight.dim() < 2 else weight.shape[0] + weight.shape[1:].numel()
    return weight.nbytes + FLOAT32 * (sides + 1)


def model_bytes(branch: Branch, method: Method, config: TrainConfig) -> int:
    """Bytes of the saved model, all files together. Call it after `Method.attach`."""
    size: int = getattr(torch, config.save_dtype).itemsize
    if method.LARGE:
        parts = branch.pipeline.components.values() if branch.whole_file else [branch.denoiser]
        return size * sum(
            weight.numel() for part in parts if isinstance(part, nn.Module) for weight in part.parameters()
        )
    copies = BUNDLED_COPIES if config.tokens else ADAPTER_COPIES
    parts = [branch.denoiser, *branch.text_encoders.values()]
    numbers = sum(weight.numel() for part in parts for name, weight in part.named_parameters() if ".lora_" in name)
    return size * copies * numbers
