"""The model types: what is trained, what is saved, and how it is applied when rendering."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    from trainer.branches import Branch
    from trainer.presets import TrainConfig

METHODS = ("lora",)
PLANNED = ("checkpoint", "pti", "faceid")  # words of the API that this version answers with "not yet"


class Method(Protocol):
    """What `train.py` and `render.py` ask of a model type: the functions of its module."""

    def attach(self, branch: Branch, config: TrainConfig) -> list[dict[str, Any]]:
        """Make the branch trainable; returns the optimizer's parameter groups (empty: nothing to train).

        Each group has `params`, its learning rate `lr` and, for the state on disk, the parameters' `names`.
        """
        ...

    def save(self, branch: Branch, folder: Path, config: TrainConfig, metadata: dict[str, str]) -> list[str]:
        """Write the files that the user keeps into `folder`; returns their names, the most widely read one first."""
        ...

    def readable(self, branch: Branch) -> list[str]:
        """The saved files that a stock pipeline reads; there is at least one."""
        ...

    def apply(self, pipeline: Any, folder: Path, scale: float, file: str = ...) -> None:
        """Put a saved model onto a stock pipeline of its base. `scale` 1 is the strength it was trained at."""
        ...

    def remove(self, pipeline: Any) -> None:
        """Take it off again."""
        ...


def get_method(model_type: str) -> Method:
    module: Any = import_module(f"trainer.methods.{model_type}")
    method: Method = module
    return method
