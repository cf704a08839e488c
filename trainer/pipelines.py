"""The stock diffusers pipelines over the modules of a loaded base, and the schedulers that a prompt can ask for."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any, Literal, Self

import torch
from diffusers import (
    AutoencoderTiny,
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
)

from trainer import hub
from trainer.pictures import preview_bytes

log = logging.getLogger("tunebooth.render")

Task = Literal["text", "image", "inpaint"]  # what a picture is drawn from: text alone, a picture too, a mask as well

PLUS_PLUS, SDE = {"algorithm_type": "dpmsolver++"}, {"algorithm_type": "sde-dpmsolver++"}
KARRAS = {"use_karras_sigmas": True}
# What the API calls a scheduler -> what its users do, and its class with options. The classes are those of diffusers'
# own table (docs, api/schedulers/overview), but that DPM++ SDE draws noise in every step, as its name says.
SCHEDULERS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "euler": ("Euler", EulerDiscreteScheduler, {}),
    "euler_a": ("Euler a", EulerAncestralDiscreteScheduler, {}),
    "dpm++2m": ("DPM++ 2M", DPMSolverMultistepScheduler, PLUS_PLUS),
    "dpm++2m_karras": ("DPM++ 2M Karras", DPMSolverMultistepScheduler, PLUS_PLUS | KARRAS),
    "dpm++sde": ("DPM++ SDE", DPMSolverSinglestepScheduler, SDE),
    "dpm++sde_karras": ("DPM++ SDE Karras", DPMSolverSinglestepScheduler, SDE | KARRAS),
    "lcm": ("LCM", LCMScheduler, {}),
    "tcd": ("TCD", TCDScheduler, {}),
}
DISTILLED_STEPS = 50  # of the teacher: LCM and TCD choose theirs among them (diffusers' default)


def make_scheduler(own: Any, name: str) -> Any:
    """The scheduler of this name, with the noise of the base's own."""
    _, kind, options = SCHEDULERS[name]
    return kind.from_config(own.config, **options)


def sampler_of(scheduler: Any, name: str | None) -> str:
    """What users call a scheduler; name: what the API does, None for a base's own."""
    return SCHEDULERS[name][0] if name else type(scheduler).__name__.removesuffix("Scheduler").removesuffix("Discrete")


def derive(stock: Any, task: Task) -> Any:
    """The pipeline that draws from a picture or into a mask, over the very same modules."""
    if task == "text":
        return stock
    kind = AutoPipelineForImage2Image if task == "image" else AutoPipelineForInpainting
    pipeline = kind.from_pipe(stock, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# Previews


class Preview:
    """What a prompt looks like so far, in a file that is there while it renders."""

    SHARE = 0.02  # of the time may go into previews
    FIRST_SECONDS = 0.05  # what the first one is reckoned to take

    def __init__(self, file: Path, pipeline: Any, decoder: Any) -> None:
        """decoder: a tiny one (`load_tiny_decoder`); None: nothing is shown."""
        self._file = file
        self._pipeline = pipeline
        self._decoder = decoder
        self._began = time.monotonic()
        self._spent, self._cost = 0.0, self.FIRST_SECONDS

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.unlink(missing_ok=True)

    def show(self, latents: torch.Tensor, size: tuple[int, int]) -> None:
        """Draw the first of the latents (B, C, H/f, W/f), or packed ones (B, T, 4 C), where there is time for it.

        size: width and height of the picture in pixels.
        """
        began = time.monotonic()
        if self._decoder is None or self._spent + self._cost > self.SHARE * (began - self._began):
            return
        with torch.no_grad():
            if latents.dim() == 3:
                factor = self._pipeline.vae_scale_factor
                latents = self._pipeline._unpack_latents(latents[:1], size[1], size[0], factor)
            pixels = self._decoder.decode(latents[:1].to(self._decoder.device, self._decoder.dtype)).sample
        picture = self._pipeline.image_processor.postprocess(pixels)[0]
        self._file.parent.mkdir(exist_ok=True)
        partial = self._file.with_suffix(".part")
        partial.write_bytes(preview_bytes(picture))
        partial.rename(self._file)
        self._cost = time.monotonic() - began
        self._spent += self._cost


def load_tiny_decoder(repository: str, device: torch.device) -> Any:
    """A decoder of previews (TAESD, https://github.com/madebyollin/taesd); None where it cannot be had."""
    try:
        folder = hub.fetch_model(repository)
        decoder = AutoencoderTiny.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    except (OSError, ValueError, RuntimeError) as problem:  # pictures come without it
        log.info("there are no previews: %s cannot be had (%s)", repository, problem)
        return None
    return decoder.eval().requires_grad_(False).to(device)
