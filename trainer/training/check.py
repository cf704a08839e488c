"""Checks of a saved model: its file, and its effect on a picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from trainer.branches.protocol import Branch
from trainer.methods.protocol import Method

CHECK_STEPS = 2  # enough to see an effect
ROUNDING = 4  # units in the last place of the largest value: another order of summing changes as much
Render = Callable[[int, str], Tensor]  # (steps, "latent") -> the latents of a picture


class BadArtefact(Exception):
    """The saved model is not usable."""


def check_file(file: Path) -> None:
    """Raises BadArtefact unless every tensor of a saved file is finite and some are not zero."""
    with safe_open(file, "pt") as tensors:
        names, some = list(tensors.keys()), False
        for name in names:  # one at a time: a whole model is large
            value = tensors.get_tensor(name)
            if not torch.isfinite(value).all():
                raise BadArtefact(f"{file.name} holds values that are not finite numbers")
            some = some or (value.dim() > 1 and bool(value.any()))
    if not names:
        raise BadArtefact(f"{file.name} holds no values, and so none that are not finite")
    if not some:
        raise BadArtefact(f"{file.name} holds nothing but zeros")


def check_effect(branch: Branch, method: Method, model: Path, render: Render, before: Tensor) -> None:
    """Raises BadArtefact unless each file loads into the stock pipeline and changes a picture by more than rounding.

    before: the latents of that picture before anything was trained.
    """
    least = ROUNDING * torch.finfo(branch.dtype).eps * float(before.abs().max())
    for file in method.checkable_files(branch):
        method.apply(branch, model, 1.0, file)
        changed = render(CHECK_STEPS, "latent")
        difference = float((changed - before).abs().max())
        if not difference > least:  # also where it is not a number
            raise BadArtefact(
                f"{file} changes nothing: a picture of a fixed seed differs by {difference:.2g} from the base's, which"
                " is rounding. More steps or a higher lr would help"
            )
