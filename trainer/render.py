"""The story of one prompt: its tune's base and model, and a face -> pictures."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL.PngImagePlugin import PngInfo

from trainer import memory, presets
from trainer.bases import Base
from trainer.branches import Branch, load_branch
from trainer.files import whole_folder
from trainer.loading import autocast
from trainer.loop import Report
from trainer.methods import faceid, lora
from trainer.presets import RenderConfig
from trainer.schema import references
from trainer.settings import Settings

DEFAULT_SEED = 42  # the hosted service's, so that a prompt without a seed renders the same twice
FIELD = re.compile(r"\{\{\s*([\w-]+)\s*\}\}")


@dataclass(frozen=True)
class FaceID:
    """A person to be drawn: the `model/` of a faceid tune, the weights of the base's adapter, and how strongly."""

    folder: Path
    adapter: Path
    strength: float


class Stopped(Exception):
    """The report said to stop."""


class Renderer:
    """Keeps the base of the last prompt loaded: the next prompt is likely to want it too."""

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self._settings = settings
        self._device = device
        self._loaded: tuple[Base, Branch] | None = None

    def release(self) -> None:
        """Give the memory back, before something else is trained."""
        self._loaded = None
        memory.release(self._device)

    def render_prompt(
        self, prompt: dict[str, Any], tune: dict[str, Any], base: Base, face: FaceID | None, report: Report
    ) -> tuple[list[str], list[str]]:
        """Render a prompt with its tune's model into `outputs/tunes/ID/prompts/PID`.

        prompt, tune: their rows in the store. base: what the tune stands on, with its LoRA. Returns the file names and
        what to warn of. Raises Stopped.
        """
        settings = self._settings
        defaults = presets.render_config(settings.presets, base.branch)
        folder = settings.outputs / "tunes" / str(tune["id"])
        text, warnings = fill(prompt["text"], tune["characteristics"])
        text, named = references(text)
        strength = next((weight for kind, _, weight in named if kind == "lora"), 1.0)  # only its own tune is named
        cfg_scale = defaults.cfg_scale if prompt["cfg_scale"] is None else prompt["cfg_scale"]
        if strength != 1.0 and base.model is None:
            warnings.append(f"{tune['title']} is a whole model, which has one strength: {strength:g} is not used")
        width, height = size(prompt["w"], prompt["h"], defaults)
        if defaults.fixed_size and (prompt["w"] or prompt["h"]) and (width, height) != (prompt["w"], prompt["h"]):
            warnings.append(f"{base.branch} renders {width} x {height} pixels, whatever w and h are")

        negative = prompt["negative_prompt"]
        if negative and not defaults.negative_prompt:
            warnings.append(f"negative_prompt has no effect on {base.branch}")
            negative = None

        report.stage("loading")
        if self._loaded is None or self._loaded[0].weights != base.weights:
            self.release()
            self._loaded = (base, load_branch(base, self._device, settings.outputs / "cache"))
            memory.place_for_rendering(self._loaded[1].pipeline, self._device)
        branch = self._loaded[1]
        pipeline = branch.pipeline
        faceid.remove(pipeline)
        lora.remove(pipeline)
        if base.model is not None:
            lora.apply(branch, base.model, strength)
        inputs = {}
        if face is not None:
            faceid.apply(branch, face.folder, face.strength, face.adapter)
            inputs = faceid.inputs(branch, face.folder, cfg_scale)

        report.stage("rendering")
        steps = prompt["steps"] or defaults.steps
        seed = DEFAULT_SEED if prompt["seed"] is None else prompt["seed"]

        def watch(_pipeline: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if not report.step(min(step + 1, steps), steps):
                raise Stopped
            return tensors

        # VAEs are kept in float32, and pipelines hand them what the denoiser gives: autocast makes the two meet.
        with autocast(self._device, branch.dtype):
            images = pipeline(
                prompt=text,
                **({"negative_prompt": negative} if defaults.negative_prompt else {}),
                width=width,
                height=height,
                num_inference_steps=steps,
                guidance_scale=cfg_scale,
                num_images_per_prompt=prompt["num_images"],
                # One generator a picture, on the CPU: a picture does not depend on its neighbours or on the card.
                generator=[torch.Generator().manual_seed((seed + i) % 2**63) for i in range(prompt["num_images"])],
                callback_on_step_end=watch,
                **inputs,
            ).images
        target = folder / "prompts" / str(prompt["id"])
        target.parent.mkdir(exist_ok=True)
        files = []
        with whole_folder(target) as partial:
            for number, image in enumerate(images):
                facts = {
                    "prompt": text,
                    "seed": seed + number,
                    "steps": steps,
                    "tune": tune["title"],
                    "base": base.title,
                }
                info = PngInfo()
                info.add_text("tunebooth", json.dumps(facts))
                files.append(f"{number}.png")
                image.save(partial / files[-1], pnginfo=info)
        return files, warnings


def fill(text: str, characteristics: dict[str, str]) -> tuple[str, list[str]]:
    """Put characteristics in place of `{{name}}`, once and as plain text; a name that is missing becomes blank."""
    missing = sorted({name for name in FIELD.findall(text) if name not in characteristics})
    filled = FIELD.sub(lambda match: characteristics.get(match[1], ""), text)
    return filled, [f"there is no characteristic {name!r}; it was left out of the prompt" for name in missing]


def size(w: int | None, h: int | None, defaults: RenderConfig) -> tuple[int, int]:
    """Width and height in pixels, multiples of 8; a base of one size keeps the asked aspect below it."""
    width, height = w or defaults.w, h or defaults.h
    if defaults.fixed_size:
        scale = defaults.fixed_size / max(width, height)
        width, height = (max(16, round(side * scale / 8) * 8) for side in (width, height))
    return width, height
