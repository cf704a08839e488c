"""The device: choosing it, moving modules to it and back to RAM, and measuring its memory."""

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
ROOM = 0.85  # share of the free memory that weights may take in rendering; the rest is for activations


@contextmanager
def placed(device: torch.device, *modules: nn.Module) -> Iterator[None]:
    """Move modules to the device, and back to RAM at the end."""
    for module in modules:
        module.to(device)
    try:
        yield
    finally:
        for module in modules:
            module.to("cpu")
        forget_free(device)


def release(device: torch.device) -> None:
    """Free unreferenced objects, reference cycles included; finding the cycles takes a third of a second."""
    gc.collect()
    forget_free(device)


def forget_free(device: torch.device) -> None:
    """Return memory that torch holds and does not use to the card."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def free_gib(device: torch.device) -> float:
    """Free memory of a card in GiB; infinite for devices without their own memory."""
    return torch.cuda.mem_get_info(device)[0] / GIB if device.type == "cuda" else math.inf


def peak_gib(device: torch.device) -> float:
    """Peak memory in GiB: of torch on a card, of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def forget_peak(device: torch.device) -> None:
    """Reset the peak memory of a card."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def place_for_rendering(pipeline: DiffusionPipeline, device: torch.device) -> None:
    """Move a pipeline to the device; if it does not fit, accelerate moves each part there when it is needed."""
    parts = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    size = sum(weight.nbytes for part in parts for weight in part.parameters()) / GIB
    if size > ROOM * free_gib(device):
        pipeline.enable_model_cpu_offload(device=device)
    else:
        pipeline.to(device)


def pick_device(wanted: str) -> torch.device:
    """`auto`: the first CUDA card, else Apple's GPU, else the CPU. Raises RuntimeError for a missing device."""
    if wanted != "auto":
        device = torch.device(wanted)
        torch.empty(1, device=device)  # fails now with a clear message, not during the first tune
        return device
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def leave_a_core_free() -> None:
    """Let torch use all cores but one, which the page and the API need.

    Threads of torch spin while they wait for each other. On two cores with another busy process (a browser), a step of
    branch fast took 600 ms instead of 80 ms; with one thread it takes 80 ms either way.
    """
    torch.set_num_threads(max(1, torch.get_num_threads() - 1))
