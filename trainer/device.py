"""Where modules are: on the device while they are needed, in ordinary memory otherwise. And how much there is."""

from __future__ import annotations

import gc
import math
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

GIB = 2**30
ROOM = 0.85  # of the free memory may be weights when a picture is rendered; the rest is for activations


@contextmanager
def placed(device: torch.device, *modules: nn.Module) -> Iterator[None]:
    """Modules on the device for a while, and back in ordinary memory afterwards."""
    for module in modules:
        module.to(device)
    try:
        yield
    finally:
        for module in modules:
            module.to("cpu")
        forget_free(device)


def release(device: torch.device) -> None:
    """Give back what nothing refers to any more, circles too; looking for those takes a third of a second."""
    gc.collect()
    forget_free(device)


def forget_free(device: torch.device) -> None:
    """Hand memory that torch holds and does not use back to the card."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def free_gib(device: torch.device) -> float:
    """Free memory of a card in GiB; infinite for devices that have none of their own."""
    return torch.cuda.mem_get_info(device)[0] / GIB if device.type == "cuda" else math.inf


def peak_gib(device: torch.device) -> float:
    """The most memory held so far in GiB: on a card by torch, elsewhere by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def forget_peak(device: torch.device) -> None:
    """Count the peak of a card from now on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def place_for_rendering(pipeline: DiffusionPipeline, device: torch.device) -> None:
    """All parts of a pipeline on the device; where they do not fit together, each when its turn comes (accelerate)."""
    parts = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    size = sum(weight.nbytes for part in parts for weight in part.parameters()) / GIB
    if size > ROOM * free_gib(device):
        pipeline.enable_model_cpu_offload(device=device)
    else:
        pipeline.to(device)


def pick_device(wanted: str) -> torch.device:
    """`auto`: the first CUDA card, else Apple's GPU, else the CPU. Raises RuntimeError for one that is not there."""
    if wanted != "auto":
        device = torch.device(wanted)
        torch.empty(1, device=device)  # fails now and with a clear message, not in the middle of the first tune
        return device
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def leave_a_core_free() -> None:
    """Torch's threads take all cores but one, which is the page's and the API's.

    They spin while they wait for each other: with another busy process (a browser) beside as many threads as cores, a
    step of branch fast took 600 ms instead of 80 ms on two cores; with one thread it takes 80 ms either way.
    """
    torch.set_num_threads(max(1, torch.get_num_threads() - 1))
