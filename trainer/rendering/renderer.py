"""Rendering one prompt: load base and models, draw pictures, postprocess, write."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from trainer import device as device_memory
from trainer.branches.loading import autocast
from trainer.branches.protocol import load_branch
from trainer.contract.disk import check_room
from trainer.contract.report import Report
from trainer.device import place_for_rendering
from trainer.files import whole_folder
from trainer.library.bases import Base
from trainer.methods import faceid, lora
from trainer.photos.analysis import PhotoAnalyzer
from trainer.rendering import pictures, weighted
from trainer.rendering.afterwards import load_upscaler, postprocess
from trainer.rendering.draw import draw_pictures
from trainer.rendering.job import Job, Loaded, Lora, Models, Picture
from trainer.rendering.pictures import Facts
from trainer.rendering.plan import Plan
from trainer.rendering.preview import Preview, load_tiny_decoder
from trainer.rendering.schedulers import make_scheduler, sampler_of
from trainer.settings import Settings

PNG_BYTES_PER_PIXEL = 3  # without any compression
SMALL_BYTES = 2**17  # of a thumbnail and a cell of the contact sheet
TEXTS_KEPT = 16  # prompt embeddings, while the models on the base stay the same


class Renderer:
    """Keeps the base of the last prompt loaded, with its models: the next prompt probably needs them too."""

    def __init__(self, settings: Settings, device: torch.device, analyzer: PhotoAnalyzer) -> None:
        self._settings = settings
        self._device = device
        self._analyzer = analyzer
        self._loaded: Loaded | None = None

    def release(self) -> None:
        """Free the memory, before a training starts."""
        self._loaded = None
        device_memory.release(self._device)

    def render_prompt(
        self,
        prompt_id: int,
        plan: Plan,
        models: Models,
        folder: Path,
        report: Report,
    ) -> tuple[list[str], list[str]]:
        """Render a prompt with its models into `prompts/ID` of a tune's folder.

        Returns the names of the files, and warnings. Raises Stopped.
        """
        settings, warnings = self._settings, list(plan.warnings)
        check_room(folder, room_needed(plan), "the pictures of this prompt")
        report.stage("loading")
        loaded = self._load(models.base, plan.defaults.preview)
        branch = loaded.branch
        warnings += load_loras(loaded, models.loras)
        branch.pipeline.scheduler = loaded.scheduler
        if plan.scheduler:
            branch.pipeline.scheduler = make_scheduler(loaded.scheduler, plan.scheduler)
        if plan.request.controlnet is None:
            loaded.control = None
        if face := models.face:
            faceid.apply(branch, face.folder, face.strength, face.adapter)
        if plan.enlarges:
            warnings += load_upscaler(loaded, settings, report)

        target = folder / "prompts" / str(prompt_id)
        target.parent.mkdir(exist_ok=True)
        preview = Preview(folder / "previews" / f"{prompt_id}.jpg", branch, loaded.decoder)
        with preview, whole_folder(target) as made, autocast(self._device, branch.dtype):
            embeds = encode_prompt(loaded, plan, warnings)
            job = Job(plan, models, loaded, embeds, made, self._analyzer, report, preview, warnings)
            drawn = draw_pictures(job)
            done = [postprocess(job, one, seed) for one, seed in zip(drawn, plan.seeds, strict=True)]
            report.stage("saving")
            sampler = sampler_of(branch.pipeline.scheduler, plan.scheduler)
            facts = [describe(plan, seed, one, sampler, models) for seed, one in zip(plan.seeds, done, strict=True)]
            check_room(made, sum(picture_bytes(*one.size) for one in done), "the pictures of this prompt")
            files = pictures.write(made, done, facts, settings.picture_format)
        return files, list(dict.fromkeys(warnings))

    def _load(self, base: Base, decoder: str | None) -> Loaded:
        """The base, bare or with the LoRAs of the last prompt. decoder: hub repository of the preview decoder."""
        key = base.weights  # before they are read: a file that is replaced meanwhile is read again next time
        if self._loaded is None or self._loaded.weights_key != key:
            self.release()
            branch = load_branch(base, self._device, self._settings.outputs / "cache")
            # The VAE is in float32 anyway; SDXL's img2img would convert it to half precision afterwards.
            branch.pipeline.vae.register_to_config(force_upcast=False)
            place_for_rendering(branch.pipeline, self._device)
            tiny = load_tiny_decoder(decoder, self._device) if decoder else None
            self._loaded = Loaded(key, branch, branch.pipeline.scheduler, tiny)
        pipeline = self._loaded.branch.pipeline
        faceid.remove(pipeline)
        pipeline.vae.disable_tiling()
        return self._loaded


def room_needed(plan: Plan) -> int:
    """Bytes of the pictures of a prompt; an estimate, since upscaling may choose its factor later."""
    factor = plan.flags.upscale_factor or 1.0
    return len(plan.seeds) * picture_bytes(math.ceil(factor * plan.width), math.ceil(factor * plan.height))


def picture_bytes(width: int, height: int) -> int:
    """Bytes of a picture at most, with its thumbnail and its cell of the contact sheet."""
    return PNG_BYTES_PER_PIXEL * width * height + SMALL_BYTES


def load_loras(loaded: Loaded, loras: Sequence[Lora]) -> list[str]:
    """Replace the LoRAs on the base; LoRAs of weight 0 are ignored. Returns warnings."""
    pipeline = loaded.branch.pipeline
    wanted = [one for one in loras if one.weight]
    names = [f"lora{number}" for number in range(len(wanted))]
    there = tuple((one.model, *changed(one.model)) for one in wanted)
    warnings = []
    if there != loaded.loras:
        loaded.texts.clear()
        loaded.loras = None  # not known until all are loaded
        lora.remove(pipeline)
        for name, one in zip(names, wanted, strict=True):
            warnings += lora.load(pipeline, one.model, name)[1]
        loaded.loras = None if warnings else there  # warnings are given each time
    if wanted:
        pipeline.set_adapters(names, [one.weight for one in wanted])
    loaded.weights = tuple(one.weight for one in wanted)
    return warnings


def changed(model: Path) -> tuple[int, int]:
    """Time of the last change (ns), and bytes: a file in the models folder may have been replaced."""
    facts = (model / lora.DIFFUSERS_FILE if model.is_dir() else model).stat()
    return facts.st_mtime_ns, facts.st_size


def encode_prompt(loaded: Loaded, plan: Plan, warnings: list[str]) -> dict[str, Tensor]:
    """Prompt embeddings, from the cache where the same text was encoded with the same models."""
    texts, branch = loaded.texts, loaded.branch
    key = plan.text, plan.negative, bool(plan.request.use_lpw), loaded.weights
    if key in texts:
        return texts[key]
    if len(texts) >= TEXTS_KEPT:
        del texts[next(iter(texts))]
    with torch.no_grad():
        if plan.request.use_lpw:
            try:
                texts[key] = weighted.encode(branch.pipeline, plan.text, plan.negative)
                return texts[key]
            except ValueError as problem:  # these text encoders do not support weights
                warnings.append(str(problem))
        embeds = branch.encode_for_pipeline(plan.text, plan.negative)
    if not plan.request.use_lpw:  # not cached, so that the warning comes each time
        texts[key] = embeds
    return embeds


def describe(plan: Plan, seed: int, drawn: Picture, sampler: str, models: Models) -> Facts:
    """The facts that are written into a picture."""
    request = plan.request.model_dump(exclude_none=True, exclude_defaults=True)
    elsewhere = {
        "text",
        "negative_prompt",
        "num_images",
        "seed",
        "steps",
        "cfg_scale",
        "w",
        "h",
        "callback",
        "scheduler",
    }
    return Facts(
        prompt=plan.text,
        negative_prompt=plan.negative,
        seed=seed,
        steps=plan.steps,
        sampler=sampler,
        cfg_scale=plan.cfg_scale,
        width=drawn.width,
        height=drawn.height,
        model=models.title,
        base=models.base.root or models.base.title,
        loras=[(one.title, one.weight) for one in models.loras],
        more={name: value for name, value in request.items() if name not in elsewhere and not name.endswith("_url")},
    )
