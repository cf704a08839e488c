"""The model types: what is trained, what is saved, and how it is applied when rendering."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    from trainer.branches import Branch
    from trainer.presets import TrainConfig

METHODS = ("lora", "pti", "checkpoint", "faceid")  # faceid trains nothing: only `apply` and `remove` are there

# Words of `args` that only some of them have; for the others they are 0.
WORDS = {
    "rank": ("lora", "pti"),
    "alpha": ("lora", "pti"),
    "tokens": ("pti",),
    "token_lr": ("pti",),
    "token_share": ("pti",),
}

# The files of a trained tune by what `GET /tunes/ID/model?format=` calls them, and what is made of it when asked for.
FORMATS = {
    "kohya": "lora.safetensors",
    "diffusers": "lora_diffusers.safetensors",
    "embeddings": "lora_emb.safetensors",
    "bundled": "lora_bundled.safetensors",
    "checkpoint": "checkpoint.safetensors",
    "faceid": "faceid.safetensors",
}
MADE = {"lora": ("checkpoint",), "pti": ("checkpoint",), "checkpoint": ("diffusers",), "faceid": ()}


class Method(Protocol):
    """What `train.py` asks of a model type that is trained: the functions of its module."""

    LARGE: bool  # whether its files are those of a whole model, which are not kept twice

    def begin(self, branch: Branch, config: TrainConfig, token: str, name: str, earlier: Path | None) -> list[str]:
        """What comes before captions are encoded: an earlier model, new words. Returns what to warn of.

        name: the class name. earlier: the LoRA that the base stands on, a file or the `model/` of a tune. Raises
        ValueError where the earlier model or the token does not fit the base.
        """
        ...

    def encoders(self, branch: Branch, config: TrainConfig) -> list[str]:
        """The text encoders that are needed once the captions are encoded, to be trained or to be saved."""
        ...

    def attach(self, branch: Branch, config: TrainConfig) -> list[dict[str, Any]]:
        """Make the branch trainable; returns the optimizer's parameter groups.

        Each group has `params`, its learning rate `lr` and, for the state on disk, the parameters' `names`; it may have
        its own `weight_decay`, and `until`, the step from which it rests.
        """
        ...

    def after_step(self, branch: Branch) -> None:
        """What holds after each optimizer step."""
        ...

    def save(self, branch: Branch, folder: Path, config: TrainConfig, metadata: dict[str, str]) -> list[str]:
        """Write the files that the user keeps into `folder`; returns their names, the most widely read one first."""
        ...

    def readable(self, branch: Branch) -> list[str]:
        """The saved files that a stock pipeline reads; there is at least one."""
        ...

    def apply(self, branch: Branch, folder: Path, scale: float, file: str = ...) -> None:
        """Put a saved model onto its base, in place of what was there. `scale` 1: the strength it was trained at."""
        ...


def get_method(model_type: str) -> Method:
    module: Any = import_module(f"trainer.methods.{model_type}")
    method: Method = module
    return method
