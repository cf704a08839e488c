"""The stock diffusers pipelines over the modules of a loaded base, and the schedulers that a prompt can ask for."""

from __future__ import annotations

import logging
from typing import Literal

from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting, DiffusionPipeline

log = logging.getLogger("tunebooth.render")
Task = Literal["text", "image", "inpaint"]  # what a picture is drawn from: text alone, a picture too, a mask as well


def derive(stock: DiffusionPipeline, task: Task) -> DiffusionPipeline:
    """The pipeline that draws from a picture or into a mask, over the very same modules."""
    if task == "text":
        return stock
    kind = AutoPipelineForImage2Image if task == "image" else AutoPipelineForInpainting
    pipeline = kind.from_pipe(stock, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
