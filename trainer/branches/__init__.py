"""The model families. A new one is a file here, a TOML in `presets/` and a word in BRANCHES."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from trainer.bases import Base
    from trainer.presets import TrainConfig

BRANCHES = ("sd15", "fast")
PLANNED = ("sdxl1", "flux1")  # words of the API that this version answers with "not yet"


class Branch(Protocol):
    """What the loop, the methods and the renderer ask of a family."""

    denoiser: nn.Module
    text_encoders: dict[str, nn.Module]
    device: torch.device
    latent_scale: int  # pixels along a side for one latent along a side
    pipeline: Any  # the stock diffusers pipeline over the very same modules

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels (B, 3, H, W) in [-1, 1] -> mean and standard deviation of the latents, each (B, C, H/f, W/f)."""
        ...

    def encode_prompts(self, captions: list[str]) -> dict[str, Tensor]:
        """B captions -> exactly the keyword tensors that `loss` needs, batch first."""
        ...

    def loss(
        self,
        latents: Tensor,
        cond: dict[str, Tensor],
        generator: torch.Generator,
        config: TrainConfig,
        weight: Tensor | None = None,
    ) -> Tensor:
        """Training loss of each sample, (B,). `weight` (B, 1, H/f, W/f) is the mask."""
        ...


def load_branch(base: Base, device: torch.device, cache: Path) -> Branch:
    """Load a base with its family's module. `cache` is a folder for what a family makes for itself.

    Raises what the loader raises: OSError for missing files, ValueError for wrong ones.
    """
    branch: Branch = import_module(f"trainer.branches.{base.branch}").load(base, device, cache)
    return branch
