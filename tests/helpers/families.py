"""The three families of published models: what each is made of, how a base of it is loaded, and ways to spoil one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.helpers import tiny
from trainer.branches import flux1, sd15, sdxl1
from trainer.library.bases import Base

CPU = torch.device("cpu")
ROUNDING = 1e-5  # of numbers around 1. Kernels sum in an order that depends on where in memory the weights were loaded
LEVEL = 1 / 255  # the same, of a picture's pixels


@dataclass(frozen=True)
class Family:
    """module: of trainer.branches, branch: its class; stock: diffusers' own pipeline; parts: those with weights."""

    name: str
    module: Any
    branch: Any
    stock: Any
    parts: tuple[str, ...]
    tokenizers: tuple[str, ...]
    stock_options: dict[str, Any] = field(default_factory=dict)

    def load(self, path: Path, cache: Path, variant: str | None = None) -> Any:
        """A base with all its parts, by our branch. Raises what the branch raises."""
        branch = self.load_lazily(path, cache, variant)
        assert branch.denoiser is getattr(branch.pipeline, self.branch.denoiser_name)
        return branch

    def load_lazily(self, path: Path, cache: Path, variant: str | None = None) -> Any:
        """The same, but a transformer is not read before it is asked for."""
        return self.module.load(Base(1, path.name, self.name, path=path, variant=variant), CPU, cache)

    def load_stock(self, folder: Path) -> Any:
        """A diffusers folder in diffusers' own pipeline."""
        pipeline = self.stock.from_pretrained(folder, local_files_only=True, **self.stock_options)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


UNET_PARTS = ("unet", "vae", "text_encoder")
FAMILIES = {
    "sd15": Family(
        name="sd15",
        module=sd15,
        branch=sd15.SD15,
        stock=StableDiffusionPipeline,
        parts=UNET_PARTS,
        tokenizers=("tokenizer",),
        stock_options={"safety_checker": None, "feature_extractor": None},
    ),
    "sdxl1": Family(
        name="sdxl1",
        module=sdxl1,
        branch=sdxl1.SDXL1,
        stock=StableDiffusionXLPipeline,
        parts=(*UNET_PARTS, "text_encoder_2"),
        tokenizers=("tokenizer", "tokenizer_2"),
    ),
    "flux1": Family(
        name="flux1",
        module=flux1,
        branch=flux1.Flux1,
        stock=FluxPipeline,
        parts=("transformer", "vae", "text_encoder", "text_encoder_2"),
        tokenizers=("tokenizer", "tokenizer_2"),
    ),
}


# Comparing


def original_tensors(family: str, modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """All weights of a family's modules as the tests name them: after CompVis, after Stability and OpenCLIP, or after
    Black Forest Labs, whose file has the transformer alone."""
    if family == "flux1":
        return tiny.bfl_tensors(modules["transformer"])
    return {"sd15": tiny.ldm_tensors, "sdxl1": tiny.sgm_tensors}[family](**modules)


def other_weights(got: Any, expected: Any, parts: tuple[str, ...]) -> list[str]:
    """Of two pipelines: the names of the weights that only one has, or that differ."""
    found = []
    for part in parts:
        ours, theirs = getattr(got, part).state_dict(), getattr(expected, part).state_dict()
        found += [f"{part}.{name}" for name in ours.keys() ^ theirs.keys()]
        found += [f"{part}.{name}" for name in ours.keys() & theirs.keys() if not torch.equal(ours[name], theirs[name])]
    return found


def render(pipeline: Any, prompt: str = "a dog") -> Tensor:
    """(3, 64, 64) in [0, 1], the same noise for all prompts."""
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(0)
    return pipeline(prompt, height=64, width=64, num_inference_steps=2, generator=noise, output_type="pt").images[0]


# Spoiling a safetensors file


def spoilt(tensors: dict[str, Tensor]) -> str:
    """The weight of a part that is spoilt: of a text encoder, a UNet or VAE, T5, a transformer."""
    ends = ("mlp.fc2.weight", "conv_out.weight", "wo.weight", "ff.net.2.weight")
    return next(name for end in ends for name in tensors if name.endswith(end))


def drop_weight(file: Path) -> None:
    tensors = load_file(file)
    del tensors[spoilt(tensors)]
    save_file(tensors, file, {"format": "pt"})


def change_shape(file: Path) -> None:
    tensors = load_file(file)
    save_file(tensors | {spoilt(tensors): torch.zeros(3, 3)}, file, {"format": "pt"})


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def remove(file: Path) -> None:
    file.unlink()


REASONS: dict[Callable[[Path], None], str] = {  # what the error says
    drop_weight: "missing",
    change_shape: "shape|mismatch",
    truncate: "cannot be loaded|unable to load",
    remove: "no file",
}
