"""FaceID: nothing is trained. Rendering uses a person's identity with IP-Adapter FaceID (Ye et al. 2023, arXiv
2308.06721; https://huggingface.co/h94/IP-Adapter-FaceID), which diffusers' pipelines support."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from trainer.branches import loading
from trainer.branches.protocol import Branch
from trainer.names import IDENTITY_FILE

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

LORA = "faceid_0"  # diffusers' name of the LoRA in the adapter's file
PARTS = ("image_proj", "ip_adapter")


def apply(branch: Branch, folder: Path, scale: float, adapter: Path, file: str = IDENTITY_FILE) -> None:
    """Load the adapter into the branch's pipeline; it replaces an earlier one, and LoRAs stay active.

    folder: of the identity, which `inputs` passes to the pipeline's call. scale: 0 is the bare base, 1 the adapter's
    trained strength, also of its LoRA. Load other LoRAs before. Raises ValueError where adapter, identity and base do
    not fit.
    """
    state = read(adapter)
    check(branch, state, adapter, folder / file)
    pipeline = branch.pipeline
    remove(pipeline)
    with active_again(pipeline):
        pipeline.load_ip_adapter([state], subfolder=None, weight_name=None, image_encoder_folder=None)
    pipeline.set_ip_adapter_scale(scale)
    for layer in lora_layers(pipeline.unet):
        layer.set_scale(LORA, scale)


def inputs(branch: Branch, folder: Path, cfg_scale: float, file: str = IDENTITY_FILE) -> dict[str, list[Tensor]]:
    """The additional arguments that the call of a pipeline with the adapter requires.

    One tensor (2, 1, 1, D) on the denoiser's device: zeros for guidance, and the identity; (1, 1, 1, D) where
    `cfg_scale` means no guidance.
    """
    unet = branch.pipeline.unet
    identity = read_identity(folder / file)[0].to(branch.device, unet.dtype)[None, None, None]
    guided = cfg_scale > 1  # the pipelines' own condition
    return {"ip_adapter_image_embeds": [torch.cat([torch.zeros_like(identity), identity]) if guided else identity]}


def remove(pipeline: DiffusionPipeline) -> None:
    """Remove the adapter and its LoRA; other LoRAs stay unchanged."""
    unet = getattr(pipeline, "unet", None)
    if unet is None:  # FLUX.1 has no such adapter
        return
    if unet.config.encoder_hid_dim_type == "ip_image_proj":  # the base of branch fast has another such projection
        pipeline.unload_ip_adapter()
    loaded = getattr(unet, "peft_config", {})
    if LORA in loaded:
        if len(loaded) > 1:
            with active_again(pipeline):  # if none is active any more, peft activates one
                pipeline.unet.delete_adapters(LORA)
        else:
            pipeline.unet.unload_lora()


def read(adapter: Path) -> dict[str, dict[str, Tensor]]:
    """Part -> weights of an adapter, from a .bin or .safetensors. Raises ValueError for other files."""
    if adapter.suffix == ".safetensors":
        flat = loading.read_tensors(adapter)[0]
        state = {
            part: {key[len(part) + 1 :]: flat[key] for key in flat if key.startswith(f"{part}.")} for part in PARTS
        }
    else:
        state = torch.load(adapter, map_location="cpu", weights_only=True)
    known = {"proj.0.weight", "proj.2.weight", "norm.weight"}
    if not all(state.get(part) for part in PARTS) or not known <= state["image_proj"].keys():
        raise ValueError(f"{adapter.name} is not an IP-Adapter FaceID")
    return {part: state[part] for part in PARTS}


def read_identity(file: Path) -> tuple[Tensor, dict[str, str]]:
    """A person's identity (D,), float32 and of length 1, and its metadata (`recognizer`, `photos`)."""
    tensors, facts = loading.read_tensors(file)
    if "identity" not in tensors:
        raise ValueError(f"{file.name} holds no identity of a person")
    return tensors["identity"], facts


def check(branch: Branch, state: dict[str, dict[str, Tensor]], adapter: Path, file: Path) -> None:
    """Raise ValueError where an adapter does not fit this identity or this family."""
    identity, facts = read_identity(file)
    taken, width = state["image_proj"]["proj.0.weight"].shape[1], state["image_proj"]["norm.weight"].shape[0]
    if len(identity) != taken:
        raise ValueError(
            f"{adapter.name} takes identities of {taken} numbers, and this one has {len(identity)}: it was made with"
            f" {facts.get('recognizer', 'another recognizer')}. Make the tune again with the adapter's recognizer"
        )
    if width != branch.pipeline.unet.config.cross_attention_dim:
        raise ValueError(f"{adapter.name} is for another family of models: it does not fit {branch.denoiser_name}")


@contextmanager
def active_again(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Restore the active LoRAs afterwards, each at its scale, and activate the adapter's as well.

    diffusers makes the adapter's LoRA the only active one, also in the text encoders.
    """
    modules = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    before = {layer: layer.active_adapters for module in modules for layer in lora_layers(module)}
    yield
    for module in modules:
        for layer in lora_layers(module):
            names = [name for name in before.get(layer, []) if name != LORA]
            layer.set_adapter(names + [LORA] * (LORA in layer.scaling))


def lora_layers(module: nn.Module) -> Iterator[LoraLayer]:
    return (layer for layer in module.modules() if isinstance(layer, LoraLayer))
