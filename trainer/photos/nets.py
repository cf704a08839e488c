"""The face and mask networks, loaded once in the child process."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import torch
from numpy.typing import NDArray
from torch import nn

Array = NDArray[Any]
M = TypeVar("M", bound=nn.Module)
LONG_SIDE = 1024  # px at which faces are detected; a smaller photo is enlarged, at most to twice its size


def load(model: M, file: Path, key: str | None = None) -> M:
    """Load all weights of a model. key: their entry in the file."""
    state = torch.load(file, map_location="cpu", weights_only=True)
    state = state[key] if key else state
    model.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    model.eval().requires_grad_(False)
    return model
