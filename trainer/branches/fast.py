"""The branch that needs no GPU and no download: a small trained base in the package, through the very code of sd15.

benchmarks/fast_base made it; fast_base/README.md beside this file says what it can and cannot do.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open

from trainer.branches import loading, sd15
from trainer.library.bases import Base

FOLDER = Path(__file__).parent / "fast_base"


def load(base: Base, device: torch.device, cache: Path, dtype: torch.dtype | None = None) -> Fast:
    """Load the base, or a checkpoint tune of it. Raises what `sd15.load` raises."""
    assert base.path is not None, "it is part of the package"
    loaded = sd15.load(replace(base, path=FOLDER), device, cache, dtype)
    branch = Fast(loaded.pipeline, device, loaded.dtype)
    if base.path.is_file():
        with loading.loading_errors(base):
            branch.load_weights(base.path, cache)
    return branch


class Fast(sd15.SD15):
    """Its UNet has layers that the original release has no names for: stock single-file loaders leave them out."""

    def load_weights(self, file: Path, cache: Path) -> None:
        with safe_open(file, "pt") as tensors, torch.no_grad():
            for key, weight in self.original_weights().items():  # the modules' own memory
                weight.copy_(tensors.get_tensor(key))
