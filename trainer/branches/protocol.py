"""What a model family offers (`Branch`), and how the family of a base is loaded."""

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
Task = Literal["text", "image", "inpaint"]  # what a picture is drawn from: text alone, a picture too, a mask as well


@dataclass(frozen=True)
class ControlNet:
    """An architecture of control models (ControlNets) that a family takes."""

    model: Any  # its diffusers class
    class_names: tuple[str, ...]  # that its config.json may name
    pipelines: Mapping[Task, Any]  # the classes of the stock pipelines with such a model
    shared: tuple[str, ...]  # settings that must be the same as the denoiser's, whose blocks it adds to
    key: str = ""  # in its weights, which proves it where config.json does not tell
    modes: Mapping[str, int] = field(default_factory=dict)  # kind -> the number by which a union model knows it
    mode_count: str = ""  # the setting that says how many it knows; null there: the model is for one kind
    text_argument: str = "control_image"  # how the pipeline of task "text" calls the control image; others: as here
    prepare: Callable[[Any], object] | None = None  # done to a model once it is loaded


class Branch(Protocol):
    """What the loop, the methods and the renderer ask of a family.

    Everything is loaded into ordinary memory; the caller that needs a module on the device puts it there
    (`device.placed`).
    """

    denoiser: nn.Module
    text_encoders: dict[str, nn.Module]
    token_encoders: tuple[str, ...]  # those that new words can be taught: CLIP's
    vae: nn.Module
    pipeline: Any  # the stock diffusers pipeline over the very same modules
    parts: Any  # the same, without reading a denoiser that has not been asked for yet
    device: torch.device  # where it trains
    dtype: torch.dtype  # of the frozen weights
    latent_scale: int  # pixels along a side for one latent along a side
    size_multiple: int  # sides of training pictures are multiples of this many pixels
    lora_targets: Mapping[str, list[str]]  # for each word of `targets`: ends of names of the denoiser's linear layers
    denoiser_name: str  # the denoiser's name in the pipeline, which is also its prefix in diffusers' LoRA keys
    reads_kohya: bool  # whether stock diffusers reads kohya's keys of this family
    whole_file: bool  # whether a single file of the family holds the text encoders and the VAE, too
    kohya_encoders: Mapping[str, str]  # text encoder -> the prefix of its adapters in kohya's keys
    control_nets: tuple[ControlNet, ...]  # the first one without a `key` is what a model is that proves no other
    metadata: Mapping[str, str]  # what a model file says of its family (modelspec.*, ss_*)

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels (B, 3, H, W) in [-1, 1] -> mean and standard deviation of the latents, each (B, C, H/f, W/f)."""
        ...

    def encode_prompts(self, captions: list[str]) -> Cond:
        """B captions -> exactly the keyword tensors that `loss` needs of them, batch first.

        Where texts differ in length, the second dimension is padded with zeros to the longest, and one of the tensors
        (B,) has the lengths: `loss` and `prompt_inputs` cut what they take. Rows of different calls are padded alike
        when they are put together.
        """
        ...

    def encode_size(self, original: tuple[int, int], crop: tuple[int, int], size: tuple[int, int]) -> Cond:
        """What `loss` gets of one picture's (height, width) as it was sent, (top, left) of the crop and trained size.

        Tensors (1, ...) with keys of their own; an empty dict where a family knows no such thing.
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
        """Encoded prompts, and as many empty ones, as keyword arguments of the pipeline."""
        ...

    def encode_for_pipeline(self, text: str, negative: str | None) -> dict[str, Any]:
        """A prompt as the stock pipeline encodes it, as keyword arguments of it, batch 1."""
        ...

    def task_pipeline(self, task: Task) -> tuple[Any, frozenset[str]]:
        """The stock pipeline for a task, over the very same modules, and the names of the arguments its call takes.

        Some families take no `strength` with a picture: it is a reference then, and all steps are drawn.
        """
        ...

    def preview_latents(self, latents: Tensor, size: tuple[int, int]) -> Tensor:
        """The first of the latents in a pipeline's loop, as the tiny decoder takes them: (1, C, H/f, W/f).

        size: width and height of the picture in pixels.
        """
        ...

    def original_weights(self) -> dict[str, Tensor]:
        """What a single file of the family holds, under the original release's keys (see trainer/original.py).

        Detached, with the dtypes and devices of the modules, and for the most part their very memory; adapters are left
        out. Raises ValueError where text encoders belong into the file and have been dropped.
        """
        ...

    def kohya_layers(self, adapters: dict[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor, int]]:
        """The denoiser's adapters under kohya's names.

        adapters: name of a linear layer -> down (r, in), up (out, r). Returns name -> down (n r, in), up (out, n r)
        and n, the number of layers that are one layer there.
        """
        ...

    def load_weights(self, file: Path, cache: Path) -> None:
        """Put what a single file of the family holds in place of the weights here. Raises ValueError for gaps."""
        ...

    def keep_text_encoders(self, names: Collection[str]) -> None:
        """Give back the memory of all others, once every caption is encoded. Their outputs are remembered, where the
        rest is still called."""
        ...


def load_branch(base: Base, device: torch.device, cache: Path, dtype: torch.dtype | None = None) -> Branch:
    """Load a base with its family's module, from the hub where it is not here. `cache` is for what a family makes.

    dtype: of the weights; None: what the device computes in.

    Raises what the loader raises: OSError for missing files, ValueError for wrong ones.
    """
    branch: Branch = import_module(f"trainer.branches.{base.branch}").load(
        at_hand(base), device, cache, *([dtype] if dtype else [])
    )
    return branch


def at_hand(base: Base) -> Base:
    """The base with a path on this machine, from the hub where it has none."""
    if base.rest is not None:
        base = replace(base, rest=at_hand(base.rest))
    if base.path is not None or base.repository is None:
        return base
    from trainer.library import hub

    return replace(base, path=hub.fetch_pipeline(base.repository, base.revision, base.variant))
