"""Diffusion: drawing from text, from a picture, inside a mask, with a control image."""

from __future__ import annotations

import io
import math
from functools import partial
from pathlib import Path

import torch
from diffusers import ModelMixin
from PIL import Image, ImageChops, ImageOps

from trainer import device as device_memory
from trainer.branches.protocol import Task
from trainer.contract.errors import AnalysisUnavailable
from trainer.library import hub
from trainer.methods import faceid
from trainer.rendering import control, paste, preprocessors
from trainer.rendering.job import RESAMPLING, Job, Picture
from trainer.rendering.pipelines import pipeline_for
from trainer.rendering.plan import Control
from trainer.rendering.schedulers import DISTILLED_STEPS

LEAST_STRENGTH = 0.001  # one of the 1000 steps that models are trained with


def draw_pictures(job: Job) -> list[Picture]:
    """The pictures that diffusion makes from the text and the input picture."""
    plan, size = job.plan, (job.plan.width, job.plan.height)
    if plan.picture is None:
        job.report.stage("rendering")
        return sample(job, "text", plan.seeds, size, plan.cfg_scale)
    if not plan.draws:
        same = plan.picture if plan.flags.only_upscale else ImageOps.fit(plan.picture, size, RESAMPLING)
        return [same] * len(plan.seeds)
    start = ImageOps.fit(plan.picture, size, RESAMPLING)
    mask = repaint_mask(job, start)
    more: dict[str, object] = {"image": start}
    task: Task = "image"
    if mask:
        task, more["mask_image"] = "inpaint", mask
    model = control_model(job, plan.control) if plan.control else None
    if plan.control and model is not None:
        if plan.request.controlnet_txt2img and not mask:
            task, more = "text", {}
        more |= control_arguments(job, plan.control, model, start, task)
    job.report.stage("rendering")
    drawn = sample(job, task, plan.seeds, size, plan.cfg_scale, plan.strength, model, **more)
    return [paste.paste_mask(one, start, mask) for one in drawn] if mask else drawn


def repaint_mask(job: Job, start: Picture) -> Picture | None:
    """Mask of the part that is redrawn, white on black, of the picture's size; None: all of it."""
    plan, asked = job.plan, job.plan.flags
    if plan.mask:
        mask = ImageOps.fit(plan.mask, start.size, RESAMPLING)
    elif asked.mask_prompt:
        found = mask_of_words(job, start, asked.mask_prompt)
        if found is None:  # without a mask all of the picture would be redrawn
            raise AnalysisUnavailable(f"--mask_prompt: {asked.mask_prompt!r} was not found in the picture")
        mask = found
        if asked.mask_negative and (less := mask_of_words(job, start, asked.mask_negative)):
            mask = ImageChops.subtract(mask, less)
    else:
        return None
    if asked.mask_invert:
        mask = ImageOps.invert(mask)
    if asked.mask_dilate:
        mask = paste.grow(mask, asked.mask_dilate)
    return paste.soften(mask, asked.mask_blur) if asked.mask_blur else mask


def mask_of_words(job: Job, picture: Picture, words: str) -> Picture | None:
    """Mask of what the words name; None: not found. Raises AnalysisUnavailable."""
    with job.kept(picture) as file:
        png = job.analyzer.mask(file, words, progress=job.progress)
    if png is None:
        return None
    return Image.open(io.BytesIO(png)).convert("L")


def control_model(job: Job, asked: Control) -> ModelMixin | None:
    """The base's control model of this kind; None, with a warning, where it has none."""
    row, loaded = asked.model, job.loaded
    if row is None:
        job.warnings.append(f"controlnet {asked.kind}: there is no control model for {job.family}; it was left out")
        return None
    if loaded.control is None or loaded.control[0] != row:
        loaded.control = None
        device_memory.release(loaded.branch.device)
        job.report.stage(f"loading {row.repository}")
        folder = hub.fetch_model(row.repository, row.revision, row.variant)
        loaded.control = row, control.load_control(loaded.branch, folder)
    return loaded.control[1]


def control_arguments(job: Job, asked: Control, model: ModelMixin, start: Picture, task: Task) -> dict[str, object]:
    """The control image and the scale, as arguments of the pipeline."""
    plan = job.plan

    def find(name: str) -> Path:
        row = asked.annotators[name]
        job.report.stage(f"loading {row.repository}")
        return hub.fetch_model(row.repository, row.revision, row.variant)

    with torch.autocast(job.branch.device.type, enabled=False):
        seen = preprocessors.control_image(asked.kind, start, find, job.branch.device)
    scale = plan.request.controlnet_conditioning_scale
    arguments = control.arguments(job.branch, model, asked.kind, seen, 1.0 if scale is None else scale, task)
    for name in ("control_guidance_start", "control_guidance_end"):
        if (value := getattr(plan.flags, name)) is not None:
            arguments[name] = value
    return arguments


def sample(
    job: Job,
    task: Task,
    seeds: list[int],
    size: tuple[int, int],
    cfg_scale: float,
    strength: float = 1.0,
    model: ModelMixin | None = None,
    **more: object,
) -> list[Picture]:
    """Draw a picture for each seed, as many at once as fit into memory. Raises Stopped.

    strength: of the noise on the input picture. model: a control model. more: other arguments of the stock pipeline. A
    picture's noise comes from its own seed, on the CPU: it depends neither on the other pictures nor on the card.
    """
    stock, steps = job.branch.pipeline, job.plan.steps
    pipeline, takes = pipeline_for(job.branch, task, model)
    each = steps
    if task != "text" and "strength" not in takes:
        job.warnings.append(f"{job.family} takes a picture as a reference: denoising strengths have no effect")
    elif task != "text":
        strength = max(strength, LEAST_STRENGTH)
        steps = max(steps, math.ceil(1 / strength))  # at least one step, else nothing would be drawn
        while int(steps * strength) < 1:  # where the division was rounded
            steps += 1
        each, more["strength"] = int(steps * strength), strength
    if "original_inference_steps" in pipeline.scheduler.config:  # LCM and TCD choose their steps among these
        pipeline.scheduler.register_to_config(original_inference_steps=max(DISTILLED_STEPS, steps))
    if "width" in takes:  # else the picture's size is used
        more["width"], more["height"] = size
    job.steps += each * len(seeds)
    if face := job.models.face:
        more |= faceid.inputs(job.branch, face.folder, cfg_scale)
    drawn: list[Picture] = []
    at_once = len(seeds)
    while len(drawn) < len(seeds):
        now = seeds[len(drawn) : len(drawn) + at_once]
        try:
            drawn += pipeline(
                **job.embeds,
                **more,
                num_inference_steps=steps,
                guidance_scale=cfg_scale,
                num_images_per_prompt=len(now),
                generator=[torch.Generator().manual_seed(seed) for seed in now],
                callback_on_step_end=partial(job.watch, len(now), each, size),
            ).images
            job.done += each * len(now)
            continue
        except torch.OutOfMemoryError:
            if at_once == 1 and stock.vae.use_tiling:
                raise
        device_memory.release(job.branch.device)  # only here: the traceback of the error kept its tensors alive
        if at_once > 1:
            at_once = (at_once + 1) // 2
        else:
            stock.vae.enable_tiling()  # from now on the picture is decoded in parts, which takes less memory
    return drawn
