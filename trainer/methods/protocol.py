"""The interface of a trained model type (`Method`), and its lookup by name."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, NotRequired, Protocol, TypedDict

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

    from trainer.branches.protocol import Branch
    from trainer.config.train_config import TrainConfig


class Group(TypedDict):
    """A parameter group. lr: its learning rate. names: of its parameters, for the state on disk.

    weight_decay: overrides the common one. until: it is not trained from this step on.
    """

    params: Sequence[Tensor]
    names: list[str]
    lr: float
    weight_decay: NotRequired[float]
    until: NotRequired[int]


class Method(Protocol):
    """What `train.py` needs from a trained model type: the functions of its module."""

    LARGE: bool  # whether it saves a whole model, which is not kept twice

    def prepare(self, branch: Branch, config: TrainConfig, token: str, name: str, earlier: Path | None) -> list[str]:
        """Load an earlier model and learned tokens, before captions are encoded. Returns warnings.

        name: the class name. earlier: the LoRA that is on the base, a file or the `model/` of a tune. Raises
        ValueError where the earlier model or the token does not fit the base.
        """
        ...

    def needed_text_encoders(self, branch: Branch, config: TrainConfig) -> list[str]:
        """The text encoders that are trained or saved, and so needed after captions are encoded."""
        ...

    def attach(self, branch: Branch, config: TrainConfig) -> list[Group]:
        """Make the branch trainable; returns the optimizer's parameter groups."""
        ...

    def after_step(self, branch: Branch) -> None:
        """Called after each optimizer step."""
        ...

    def save(self, branch: Branch, folder: Path, config: TrainConfig, metadata: dict[str, str]) -> list[str]:
        """Write the model files into `folder`; returns their names, the most widely supported format first."""
        ...

    def checkable_files(self, branch: Branch) -> list[str]:
        """The saved files that a stock pipeline can load; at least one."""
        ...

    def apply(self, branch: Branch, folder: Path, scale: float, file: str = ...) -> None:
        """Load a saved model onto its base; it replaces the one before. `scale` 1: the trained strength."""
        ...


def get_method(model_type: str) -> Method:
    module: Any = import_module(f"trainer.methods.{model_type}")
    method: Method = module
    return method
