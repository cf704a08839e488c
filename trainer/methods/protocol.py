"""What a model type offers that is trained (`Method`), and how it is found by its name."""

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

    weight_decay: its own, where it has one. until: the step from which it rests.
    """

    params: Sequence[Tensor]
    names: list[str]
    lr: float
    weight_decay: NotRequired[float]
    until: NotRequired[int]


class Method(Protocol):
    """What `train.py` asks of a model type that is trained: the functions of its module."""

    LARGE: bool  # whether its files are those of a whole model, which are not kept twice

    def prepare(self, branch: Branch, config: TrainConfig, token: str, name: str, earlier: Path | None) -> list[str]:
        """What comes before captions are encoded: an earlier model, new words. Returns what to warn of.

        name: the class name. earlier: the LoRA that is on the base, a file or the `model/` of a tune. Raises
        ValueError where the earlier model or the token does not fit the base.
        """
        ...

    def needed_text_encoders(self, branch: Branch, config: TrainConfig) -> list[str]:
        """The text encoders that are needed once the captions are encoded, to be trained or to be saved."""
        ...

    def attach(self, branch: Branch, config: TrainConfig) -> list[Group]:
        """Make the branch trainable; returns the optimizer's parameter groups."""
        ...

    def after_step(self, branch: Branch) -> None:
        """What holds after each optimizer step."""
        ...

    def save(self, branch: Branch, folder: Path, config: TrainConfig, metadata: dict[str, str]) -> list[str]:
        """Write the files that the user keeps into `folder`; returns their names, the most widely read one first."""
        ...

    def checkable_files(self, branch: Branch) -> list[str]:
        """The saved files that a stock pipeline reads; there is at least one."""
        ...

    def apply(self, branch: Branch, folder: Path, scale: float, file: str = ...) -> None:
        """Put a saved model onto its base, in place of what was there. `scale` 1: the strength it was trained at."""
        ...


def get_method(model_type: str) -> Method:
    module: Any = import_module(f"trainer.methods.{model_type}")
    method: Method = module
    return method
