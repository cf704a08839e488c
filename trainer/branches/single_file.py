"""Reading of single files: their weights, scaled where they are stored as fp8 with scales, and nothing left over."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm
from safetensors import safe_open
from torch import Tensor, nn

from trainer.branches.single_file_keys import unet_weights, vae_weights
from trainer.library.header import read_header
from trainer.library.leftovers import refuse_unknown, unneeded
from trainer.library.weight_format import COMPANION, FORMAT_KEY, check_formats, scales_of

log = logging.getLogger("tunebooth.branches")
Read = Callable[[str], Tensor]
# (class of the encoder, its prefix in the file, the names of its weights there)
Encoder = tuple[type, str, Callable[[nn.Module], Collection[str]]]


@contextmanager
def opened(file: Path, scaled: torch.dtype = torch.float32) -> Iterator[tuple[set[str], Read]]:
    """The keys of a file's tensors, without scales, and a function that reads a tensor as it is in the file.

    A weight with a scale is multiplied by it; `scaled` is the dtype of the product. Raises ValueError for weights that
    are quantized in a format that is not read.
    """
    header = read_header(file)
    scales = scales_of(header)
    with safe_open(file, "pt") as tensors:
        check_formats(
            bytes(tensors.get_tensor(key).flatten().tolist()) for key in header.shapes if key.endswith(FORMAT_KEY)
        )

        def read(key: str) -> Tensor:
            tensor: Tensor = tensors.get_tensor(key)
            if key not in scales:
                return tensor
            scale: Tensor = tensors.get_tensor(scales[key]).float()  # one number, or one for each row
            product: Tensor = tensor.float() * scale.view(-1, *[1] * (tensor.dim() - 1))
            return product.to(scaled)

        yield {key for key in header.shapes if not COMPANION.match(key)}, read


def refuse_left_over(keys: Collection[str], parts: Mapping[str, Collection[str]]) -> None:
    """Check that every tensor of a file was read. parts: prefix of a part -> the names that were read after it.

    Raises ValueError for tensors of a part that the loader has no place for. Others are named in the log.
    """
    for prefix, names in parts.items():
        refuse_unknown({key for key in keys if key.startswith(prefix)} - {prefix + name for name in names})
    log_unused(keys, tuple(parts))


def log_unused(keys: Collection[str], prefixes: tuple[str, ...]) -> None:
    """Name in the log the tensors of a file that are of none of its parts, and not known to be needless."""
    left = {key for key in keys if not key.startswith(prefixes)}
    if others := left - unneeded(left):
        log.warning("%d tensors of a single file are not used, %s among them", len(others), min(others))


def unet_parts(file: Path, config: Path, dtype: torch.dtype, encoders: Mapping[str, Encoder]) -> dict[str, nn.Module]:
    """UNet, VAE and text encoders of a file with the keys of the original release, by their names in the pipeline.

    config: a diffusers folder with their configurations. The VAE is in float32: half-precision weights are fine, and
    half-precision arithmetic overflows. Raises ValueError for tensors that have no place in them.
    """
    with opened(file, dtype) as (keys, read):
        weights = {key: read(key) for key in keys - unneeded(keys)}
        source = {"config": str(config), "local_files_only": True}
        parts: dict[str, nn.Module] = {
            "unet": UNet2DConditionModel.from_single_file(weights, subfolder="unet", dtype=dtype, **source),
            "vae": AutoencoderKL.from_single_file(weights, subfolder="vae", dtype=torch.float32, **source),
        }
        for name, (kind, _, _) in encoders.items():
            try:
                parts[name] = create_diffusers_clip_model_from_ldm(
                    kind, checkpoint=weights, subfolder=name, torch_dtype=dtype, **source
                )
            except ValueError as problem:  # it distinguishes the encoders by the width of their positions
                raise ValueError(f"weights of its {name} are missing, or of another size ({problem})") from problem
    known = {prefix: names(parts[name]) for name, (_, prefix, names) in encoders.items()}
    known |= {"model.diffusion_model.": unet_weights(parts["unet"]), "first_stage_model.": vae_weights(parts["vae"])}
    refuse_left_over(keys, known)
    return parts
