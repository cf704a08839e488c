"""ControlNets (Zhang et al. 2023, arXiv 2302.05543): loading, and the arguments of their pipelines.

The architectures for a family are in its file (`Branch.control_nets`).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline, ModelMixin
from PIL import Image
from safetensors import SafetensorError, safe_open

from trainer.branches import loading
from trainer.branches.protocol import Branch, ControlNet, Task

Picture = Image.Image


def load_control(branch: Branch, folder: Path) -> ModelMixin:
    """The control model of a diffusers folder (config.json and safetensors), frozen, on the branch's device.

    Raises OSError where files are missing, ValueError where they are not a control model for this base.
    """
    kinds = branch.control_nets
    if not kinds:
        raise ValueError("this family of models takes no control models")
    name = kinds[0].model.load_config(folder, local_files_only=True).get("_class_name")
    if name not in [known for kind in kinds for known in kind.class_names]:
        taken = " or ".join(kind.model.__name__ for kind in kinds) or "none"
        raise ValueError(f"this control model is for another family of models: it is a {name}, the base takes {taken}")
    variants = {file.name.split(".")[1] for file in folder.glob("diffusion_pytorch_model.*safetensors*")}
    variant = None if "safetensors" in variants else min(variants, default="").split("-")[0] or None
    try:
        kind = next((kind for kind in kinds if kind.key and _has_key(folder, kind.key)), None)
        kind = kind or next(kind for kind in kinds if not kind.key)
        source = loading.folder_source(folder, variant)
        model, facts = kind.model.from_pretrained(**source, dtype=branch.dtype, output_loading_info=True)
        loading.refuse_gaps(facts["missing_keys"])
    except (RuntimeError, ValueError, SafetensorError) as problem:
        raise ValueError(f"the control model cannot be loaded: {problem}") from problem
    _check(model.config, branch.pipeline.components[branch.denoiser_name].config, kind.shared)
    loading.freeze(model)
    if kind.prepare is not None:
        kind.prepare(model)
    return model.to(branch.device)


def kind_of(branch: Branch, control: ModelMixin) -> ControlNet:
    """The architecture of a loaded control model, from those of the branch."""
    return next(kind for kind in branch.control_nets if isinstance(control, kind.model))


def control_mode(branch: Branch, control: ModelMixin, kind: str) -> int | None:
    """The number of a kind in a union model; None for a model that is for one kind, or takes no number.

    Raises ValueError where a union model does not know the kind.
    """
    known_as = kind_of(branch, control)
    count = control.config[known_as.mode_count] if known_as.mode_count else None
    if count is None:
        return None
    known = {name: mode for name, mode in known_as.modes.items() if mode < count}
    if kind not in known:
        raise ValueError(f"this control model does not know {kind}; it knows {', '.join(known)}")
    return known[kind]


def arguments(
    branch: Branch, control: ModelMixin, kind: str, image: Picture, scale: float, task: Task
) -> dict[str, Any]:
    """Additional keyword arguments for the call of a pipeline with a control model.

    image: the control image. scale: the model's strength; 0 is no effect.
    """
    arguments: dict[str, Any] = {"controlnet_conditioning_scale": float(scale)}
    if (mode := control_mode(branch, control, kind)) is not None:
        arguments["control_mode"] = mode
    arguments[kind_of(branch, control).text_argument if task == "text" else "control_image"] = image
    return arguments


def pipeline(branch: Branch, control: ModelMixin, task: Task) -> DiffusionPipeline:
    """The stock diffusers pipeline for a task with a control model; it shares the modules of the loaded pipeline.

    diffusers' from_pipe is not used: a pipeline class's own converts all weights to float32, and AutoPipeline's does
    not know union models.
    """
    stock, made_by = branch.pipeline, kind_of(branch, control).pipelines[task]
    given = {**stock.config, **stock.components, "controlnet": control, "add_watermarker": False}
    made = made_by(**{name: given[name] for name in inspect.signature(made_by).parameters if name in given})
    made.set_progress_bar_config(disable=True)
    return made


def _has_key(folder: Path, key: str) -> bool:
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            if key in tensors.keys():  # noqa: SIM118
                return True
    return False


def _check(control: Any, denoiser: Any, names: Sequence[str]) -> None:
    """Raises ValueError where a control model's configuration and the denoiser's differ in one of these names."""
    for name in names:
        ours, theirs = (getattr(config, name, None) for config in (denoiser, control))
        if _plain(ours) != _plain(theirs):
            raise ValueError(
                f"this control model is for another family of models: its {name} is {theirs}, the base's is {ours}"
            )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | list) else value
