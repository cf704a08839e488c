"""The interface of a model family (`Branch`), and loading a base with its family."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from trainer.config.train_config import TrainConfig
    from trainer.library.bases import Base


Cond: TypeAlias = "dict[str, Tensor]"  # conditioning: keyword tensors for the denoiser, batch first
Task = Literal["text", "image", "inpaint"]  # input: text only, text and picture, or also a mask


@dataclass(frozen=True)
class ControlNet:
    """An architecture of ControlNets that a family supports."""

    model: Any  # its diffusers class
    class_names: tuple[str, ...]  # possible names in config.json
    pipelines: Mapping[Task, Any]  # classes of the stock pipelines with such a model
    shared: tuple[str, ...]  # settings that must equal the denoiser's, because it adds to its blocks
    key: str = ""  # a weight's name that identifies it where config.json does not
    modes: Mapping[str, int] = field(default_factory=dict)  # kind -> its number in a union model
    mode_count: str = ""  # the setting with the number of kinds; null there: the model is for one kind
    text_argument: str = "control_image"  # argument of the control image for task "text"; other tasks: as here
    prepare: Callable[[Any], object] | None = None  # called with the loaded model


class Branch(Protocol):
    """What the training loop, the methods and the renderer need from a family.

    Everything is loaded into the CPU's memory; the caller moves a module to the device (`device.placed`).
    """

    denoiser: nn.Module
    text_encoders: dict[str, nn.Module]
    token_encoders: tuple[str, ...]  # those that can have learned tokens: CLIP's
    vae: nn.Module
    pipeline: Any  # the stock diffusers pipeline with these modules
    parts: Any  # the same, but it does not load the denoiser
    device: torch.device  # where it trains
    dtype: torch.dtype  # of the frozen weights
    latent_scale: int  # pixels along a side for each latent along a side
    size_multiple: int  # sides of training pictures are multiples of this many pixels
    lora_targets: Mapping[str, list[str]]  # value of `targets` -> ends of names of the denoiser's linear layers
    denoiser_name: str  # the denoiser's name in the pipeline, which is also its prefix in diffusers' LoRA keys
    reads_kohya: bool  # whether stock diffusers reads kohya's keys of this family
    whole_file: bool  # whether a single file of the family also has the text encoders and the VAE
    kohya_encoders: Mapping[str, str]  # text encoder -> the prefix of its adapters in kohya's keys
    control_nets: tuple[ControlNet, ...]  # a model that matches no `key` is of the first one without a `key`
    metadata: Mapping[str, str]  # of a model file, about its family (modelspec.*, ss_*)

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels (B, 3, H, W) in [-1, 1] -> mean and standard deviation of the latents, each (B, C, H/f, W/f)."""
        ...

    def encode_prompts(self, captions: list[str]) -> Cond:
        """B captions -> the keyword tensors that `loss` needs from them, batch first.

        Where texts differ in length, the second dimension is padded with zeros to the longest, and one of the tensors
        (B,) has the lengths: `loss` and `prompt_inputs` cut off the padding. Rows of different calls are padded in the
        same way when they are joined.
        """
        ...

    def encode_size(self, original: tuple[int, int], crop: tuple[int, int], size: tuple[int, int]) -> Cond:
        """Size conditioning for `loss`: a picture's original (height, width), (top, left) of the crop, training size.

        Tensors (1, ...) with separate keys; an empty dict where a family has no size conditioning.
        """
        ...

    def draw(self, latents: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Noise like latents (B, C, H/f, W/f), and the timesteps (B,) in the family's own unit."""
        ...

    def loss(
        self, latents: Tensor, cond: Cond, noise: Tensor, timesteps: Tensor, config: TrainConfig, weight: Tensor | None
    ) -> Tensor:
        """Training loss of each sample, (B,). `weight` (B, 1, H/f, W/f) is the mask; its mean is 1."""
        ...

    def prompt_inputs(self, cond: Cond, empty: Cond) -> dict[str, Any]:
        """Encoded prompts, and the same number of empty ones, as keyword arguments of the pipeline."""
        ...

    def encode_for_pipeline(self, text: str, negative: str | None) -> dict[str, Any]:
        """A prompt encoded by the stock pipeline, as its keyword arguments, batch 1."""
        ...

    def task_pipeline(self, task: Task) -> tuple[Any, frozenset[str]]:
        """The stock pipeline for a task, with the same modules, and the names of its call's arguments.

        Some families have no `strength`: the picture is a reference then, and all steps are drawn.
        """
        ...

    def preview_latents(self, latents: Tensor, size: tuple[int, int]) -> Tensor:
        """The first of the latents in a pipeline's loop, for the preview decoder: (1, C, H/f, W/f).

        size: width and height of the picture in pixels.
        """
        ...

    def original_weights(self) -> dict[str, Tensor]:
        """The weights of a single file of the family, under the original release's keys (see single_file_keys.py).

        Detached, with the modules' dtypes and devices, mostly sharing their memory; without adapters. Raises ValueError
        where the file needs text encoders that have been freed.
        """
        ...

    def kohya_layers(self, adapters: dict[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor, int]]:
        """The denoiser's adapters under kohya's names.

        adapters: name of a linear layer -> down (r, in), up (out, r). Returns kohya's name -> down (n r, in), up
        (out, n r) and n, the number of adapters in that layer.
        """
        ...

    def load_weights(self, file: Path, cache: Path) -> None:
        """Replace the weights by those of a single file. Raises ValueError for missing weights."""
        ...

    def keep_text_encoders(self, names: Collection[str]) -> None:
        """Free all other text encoders, once every caption is encoded. Their outputs are kept where the remaining
        encoders are still called."""
        ...


def load_branch(base: Base, device: torch.device, cache: Path, dtype: torch.dtype | None = None) -> Branch:
    """Load a base with its family's module; downloads it from the hub if needed. `cache`: for the family's own files.

    dtype: of the weights; None: the device's compute dtype.

    Raises what the loader raises: OSError for missing files, ValueError for wrong ones.
    """
    branch: Branch = import_module(f"trainer.branches.{base.branch}").load(
        downloaded(base), device, cache, *([dtype] if dtype else [])
    )
    return branch


def downloaded(base: Base) -> Base:
    """The base with a local path; downloads it from the hub if needed."""
    if base.rest is not None:
        base = replace(base, rest=downloaded(base.rest))
    if base.path is not None or base.repository is None:
        return base
    from trainer.library import hub

    return replace(base, path=hub.fetch_pipeline(base.repository, base.revision, base.variant))
