"""Branch fast: a small trained base in the package; it needs no GPU and no download, and uses the code of sd15.

benchmarks/fast_base trained it; fast_base/README.md, next to this file, describes its abilities and limits.
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
    """Its UNet has layers without names in the original release, which stock single-file loaders ignore."""

    def load_weights(self, file: Path, cache: Path) -> None:
        with safe_open(file, "pt") as tensors, torch.no_grad():
            for key, weight in self.original_weights().items():  # these share the modules' memory
                weight.copy_(tensors.get_tensor(key))
