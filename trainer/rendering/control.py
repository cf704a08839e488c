"""ControlNets (Zhang et al. 2023, arXiv 2302.05543): what they look at, the models, and the stock pipelines with them.

Pictures are PIL images in RGB. No function changes what it gets.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers import (
    ControlNetModel,
    ControlNetUnionModel,
    FluxControlNetImg2ImgPipeline,
    FluxControlNetInpaintPipeline,
    FluxControlNetModel,
    FluxControlNetPipeline,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionXLControlNetInpaintPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLControlNetUnionImg2ImgPipeline,
    StableDiffusionXLControlNetUnionInpaintPipeline,
    StableDiffusionXLControlNetUnionPipeline,
)
from PIL import Image
from safetensors import SafetensorError, safe_open

from trainer.branches import loading
from trainer.branches.protocol import Branch
from trainer.rendering.pipelines import Task

Picture = Image.Image
# Which number a union model knows a kind by. xinsir/controlnet-union-sdxl-1.0 (tile: only the larger `promax`), and
# InstantX/FLUX.1-dev-Controlnet-Union with Shakker-Labs/FLUX.1-dev-ControlNet-Union-Pro: their model cards.
SDXL_MODES = {"pose": 0, "depth": 1, "canny": 3, "lineart": 3, "tile": 6}
FLUX_MODES = {"canny": 0, "tile": 1, "depth": 2, "pose": 4}
UNET_CLASSES = ("ControlNetModel", "ControlNetUnionModel", "ControlNetModel_Union")  # the last is xinsir's own code
FLUX_CLASSES = ("FluxControlNetModel",)
UNION_KEY = "task_embedding"  # xinsir's config.json does not tell
# What a control model must have in common with the denoiser whose blocks it adds to.
UNET_FIT = ("in_channels", "block_out_channels", "down_block_types", "layers_per_block", "cross_attention_dim",
            "encoder_hid_dim", "addition_embed_type")  # fmt: skip
FLUX_FIT = ("in_channels", "num_attention_heads", "attention_head_dim", "joint_attention_dim", "pooled_projection_dim")
TASKS: tuple[Task, ...] = ("text", "image", "inpaint")
PIPELINES: dict[str, tuple[Any, Any, Any]] = {  # by the stock pipeline, in the order of TASKS
    "StableDiffusionPipeline": (
        StableDiffusionControlNetPipeline,
        StableDiffusionControlNetImg2ImgPipeline,
        StableDiffusionControlNetInpaintPipeline,
    ),
    "StableDiffusionXLPipeline": (
        StableDiffusionXLControlNetPipeline,
        StableDiffusionXLControlNetImg2ImgPipeline,
        StableDiffusionXLControlNetInpaintPipeline,
    ),
    "FluxPipeline": (FluxControlNetPipeline, FluxControlNetImg2ImgPipeline, FluxControlNetInpaintPipeline),
}
UNION_PIPELINES = (
    StableDiffusionXLControlNetUnionPipeline,
    StableDiffusionXLControlNetUnionImg2ImgPipeline,
    StableDiffusionXLControlNetUnionInpaintPipeline,
)


def load_control(branch: Branch, folder: Path) -> Any:
    """The control model of a diffusers folder (config.json and safetensors), frozen, on the branch's device.

    Raises OSError where files are missing, ValueError where they are not those of a control model of this base.
    """
    flux = branch.denoiser_name == "transformer"
    name = ControlNetModel.load_config(folder, local_files_only=True).get("_class_name")
    if name not in (FLUX_CLASSES if flux else UNET_CLASSES):
        known = FLUX_CLASSES if flux else UNET_CLASSES[:2]
        raise ValueError(
            f"this control model is for another family of models: it is a {name}, the base takes {' or '.join(known)}"
        )
    variants = {file.name.split(".")[1] for file in folder.glob("diffusion_pytorch_model.*safetensors*")}
    variant = None if "safetensors" in variants else min(variants, default="").split("-")[0] or None
    try:
        kind = FluxControlNetModel if flux else ControlNetUnionModel if _is_union(folder) else ControlNetModel
        model, facts = kind.from_pretrained(
            folder,
            variant=variant,
            local_files_only=True,
            use_safetensors=True,
            dtype=branch.dtype,
            output_loading_info=True,
        )
        loading.refuse_gaps(facts["missing_keys"])
    except (RuntimeError, ValueError, SafetensorError) as problem:
        raise ValueError(f"the control model cannot be loaded: {problem}") from problem
    _check(model.config, branch.pipeline.components[branch.denoiser_name].config, FLUX_FIT if flux else UNET_FIT)
    loading.freeze(model)
    if flux:
        model.register_forward_pre_hook(_mode_for_texts, with_kwargs=True)
    return model.to(branch.device)


def control_mode(model: Any, kind: str) -> int | None:
    """The number that a union model knows a kind by; None for a model that is for one kind, or is not told.

    Raises ValueError where a union model does not know the kind.
    """
    if isinstance(model, ControlNetUnionModel):
        modes, count = SDXL_MODES, model.config.num_control_type
    elif isinstance(model, FluxControlNetModel) and model.union:
        modes, count = FLUX_MODES, model.config.num_mode
    else:
        return None
    known = {name: mode for name, mode in modes.items() if mode < count}
    if kind not in known:
        raise ValueError(f"this control model knows no {kind}; it knows {', '.join(known)}")
    return known[kind]


def arguments(
    branch_name: str, control: Any, kind: str, outline_picture: Picture, scale: float, with_picture: bool
) -> dict[str, Any]:
    """Keyword arguments for the call of a pipeline of `pipeline`, beside those that it has without a control model.

    scale: how strongly it works; 0 is not at all. with_picture: the task is "image" or "inpaint".
    """
    told: dict[str, Any] = {"controlnet_conditioning_scale": float(scale)}
    if (mode := control_mode(control, kind)) is not None:
        told["control_mode"] = mode
    plain = branch_name != "flux1" and not isinstance(control, ControlNetUnionModel)
    told["image" if plain and not with_picture else "control_image"] = outline_picture
    return told


def pipeline(stock: Any, control: Any, task: Task) -> Any:
    """The stock diffusers pipeline for a task with a control model, over the very same modules of a loaded one.

    Not by diffusers' own from_pipe: that of a pipeline's class turns all weights to float32, and that of AutoPipeline
    knows no union models.
    """
    kinds = UNION_PIPELINES if isinstance(control, ControlNetUnionModel) else PIPELINES[type(stock).__name__]
    kind = kinds[TASKS.index(task)]
    given = {**stock.config, **stock.components, "controlnet": control, "add_watermarker": False}
    made = kind(**{name: given[name] for name in inspect.signature(kind).parameters if name in given})
    made.set_progress_bar_config(disable=True)
    return made


def _is_union(folder: Path) -> bool:
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            if UNION_KEY in tensors.keys():  # noqa: SIM118
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


def _mode_for_texts(_model: Any, args: tuple[Any, ...], told: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """As many modes as there are texts, which they are put beside: diffusers 0.42 gives as many as pictures, or one."""
    mode = told.get("controlnet_mode")
    if mode is not None:
        told["controlnet_mode"] = mode[:1].expand(len(told["encoder_hidden_states"]), 1)
    return args, told
