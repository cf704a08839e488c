"""Previews of a picture while it is rendered (TAESD)."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Self

import torch
from diffusers import AutoencoderTiny

from trainer.branches.protocol import Branch
from trainer.library import hub
from trainer.rendering.pictures import preview_bytes
from trainer.rendering.pipelines import log


class Preview:
    """The preview of a prompt, in a file that exists while it is rendered."""

    SHARE = 0.02  # of the time, at most, for previews
    FIRST_SECONDS = 0.05  # estimate for the first preview

    def __init__(self, file: Path, branch: Branch, decoder: AutoencoderTiny | None) -> None:
        """decoder: see `load_tiny_decoder`; None: no previews."""
        self._file = file
        self._branch = branch
        self._decoder = decoder
        self._began = time.monotonic()
        self._spent, self._cost = 0.0, self.FIRST_SECONDS

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.unlink(missing_ok=True)

    def show(self, latents: torch.Tensor, size: tuple[int, int]) -> None:
        """Draw the first of the latents in a pipeline's loop, if the time limit allows it.

        size: width and height of the picture in pixels.
        """
        began = time.monotonic()
        if self._decoder is None or self._spent + self._cost > self.SHARE * (began - self._began):
            return
        with torch.no_grad():
            latents = self._branch.preview_latents(latents, size)
            pixels = self._decoder.decode(latents.to(self._decoder.device, self._decoder.dtype)).sample
        picture = self._branch.pipeline.image_processor.postprocess(pixels)[0]
        self._file.parent.mkdir(exist_ok=True)
        partial = self._file.with_suffix(".part")
        try:
            partial.write_bytes(preview_bytes(picture))
            partial.rename(self._file)
        finally:
            partial.unlink(missing_ok=True)  # incomplete after an error
        self._cost = time.monotonic() - began
        self._spent += self._cost


def load_tiny_decoder(repository: str, device: torch.device) -> AutoencoderTiny | None:
    """The preview decoder (TAESD, https://github.com/madebyollin/taesd); None where it is not available."""
    try:
        folder = hub.fetch_model(repository)
        decoder = AutoencoderTiny.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    except (OSError, ValueError, RuntimeError) as problem:  # pictures are rendered without it
        log.info("no previews: %s is not available (%s)", repository, problem)
        return None
    return decoder.eval().requires_grad_(False).to(device)
