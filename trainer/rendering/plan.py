"""The plan of a prompt, made before anything is loaded: text, size, seeds and input pictures."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from trainer.config import branch_file, looks
from trainer.config.branch_file import ControlRow, RenderConfig
from trainer.config.looks import FilmLook
from trainer.contract.flags import Flags
from trainer.contract.prompts import AR, CONTROLS, DENOISING_STRENGTH, PromptRequest, prompt_of
from trainer.contract.references import without
from trainer.contract.rows import PromptToRender
from trainer.photos import inputs
from trainer.photos.picture_file import open_picture
from trainer.rendering.preprocessors import ANNOTATORS

DEFAULT_SEED = 42  # the hosted service's: a prompt without a seed renders the same twice
FIELD = re.compile(r"\{\{\s*([\w-]+)\s*\}\}")
MOST_PX = 2048  # of a side, the limit of w and h
BLOCK_PX = 16  # sides are multiples of it, unless the user gave them


@dataclass(frozen=True)
class Control:
    """The sources of a ControlNet's models."""

    kind: str
    model: ControlRow | None  # None: the branch has none of this kind
    annotators: Mapping[str, ControlRow]  # by their names in `preprocessors`


@dataclass(frozen=True)
class Plan:
    """The plan of a prompt. width, height: of the drawing, in pixels.

    It contains everything from the presets: rendering reads no configuration.
    """

    request: PromptRequest
    defaults: RenderConfig
    text: str
    negative: str | None
    flags: Flags
    seed: int
    steps: int
    cfg_scale: float
    width: int
    height: int
    picture: Image.Image | None  # input picture, in its own size
    mask: Image.Image | None
    strength: float  # of the noise on it: 1 redraws it, 0 leaves it unchanged
    scheduler: str | None  # None: the base's own
    control: Control | None
    film: FilmLook | None
    warnings: tuple[str, ...]  # for the user

    @property
    def seeds(self) -> list[int]:
        return [(self.seed + i) % 2**63 for i in range(self.request.num_images or 1)]

    @property
    def enlarges(self) -> bool:
        only = self.flags.only_upscale and self.picture is not None
        return bool(self.request.super_resolution or self.flags.upscale_factor or only)

    @property
    def draws(self) -> bool:
        """Whether anything is drawn; else the input picture is only postprocessed."""
        return self.picture is None or not (self.flags.only_upscale or self.strength == 0)


def make_plan(
    prompt: PromptToRender, characteristics: dict[str, str], branch: str, folder: Path, presets: Path
) -> Plan:
    """Make the plan of a prompt's row. characteristics: of its tune. folder: of its input pictures.

    Only this function reads the configuration for a prompt. Raises ValueError where the prompt needs a missing entry.
    """
    request, defaults = prompt_of(prompt), branch_file.render_config(presets, branch)
    asked = request.parsed.flags
    text, warnings = fill(request.parsed.text, characteristics)
    if asked.mask_prompt:
        asked = replace(asked, mask_prompt=fill(asked.mask_prompt, characteristics)[0])
    negative = without(request.negative_prompt or "", lambda _: True)
    if request.style:
        style = looks.styles(presets)[request.style]
        text = style.prompt.replace("{prompt}", text)
        negative = ", ".join(part for part in (negative, style.negative) if part)
    if not defaults.negative_prompt:
        if request.negative_prompt:
            warnings.append(f"negative_prompt has no effect on {branch}")
        negative = ""
    if request.scheduler and not defaults.schedulers:
        warnings.append(f"scheduler has no effect on {branch}, which has a sampler of its own")
    picture = read(inputs.find(folder, "input_image"), "RGB")
    width, height = size(request, picture.size if picture else None, defaults)
    if defaults.fixed_size and (request.w or request.h) and (width, height) != (request.w, request.h):
        warnings.append(f"{branch} renders {width} x {height} pixels; w and h have no effect")
    elif (request.w or width, request.h or height) != (width, height):
        warnings.append(f"{branch} renders {width} x {height} pixels: its sides are multiples of {defaults.multiple}")
    cfg_scale = defaults.cfg_scale if request.cfg_scale is None else request.cfg_scale
    if negative and cfg_scale <= 1 and request.negative_prompt:
        warnings.append(f"negative_prompt has no effect at cfg_scale {cfg_scale:g}; it takes more than 1")
    strength = DENOISING_STRENGTH if request.denoising_strength is None else request.denoising_strength
    follows = picture is not None and strength > 0 and not asked.only_upscale
    return Plan(
        request=request,
        defaults=defaults,
        text=text,
        negative=negative or None,
        flags=asked,
        seed=DEFAULT_SEED if request.seed is None else request.seed,
        steps=request.steps or defaults.steps,
        cfg_scale=cfg_scale,
        width=width,
        height=height,
        picture=picture,
        mask=read(inputs.find(folder, "mask_image"), "L"),
        scheduler=request.scheduler if defaults.schedulers else None,
        strength=strength,
        control=control_of(request.controlnet, branch, presets) if follows else None,
        film=looks.film_looks(presets)[request.color_grading] if request.color_grading else None,
        warnings=tuple(warnings),
    )


def control_of(kind: str | None, branch: str, presets: Path) -> Control | None:
    """The models of a ControlNet; None: no ControlNet. Raises ValueError where an annotator is missing."""
    if kind not in CONTROLS:
        return None
    model = branch_file.control_row(presets, branch, kind)
    needed = ANNOTATORS.get(kind, ()) if model else ()
    return Control(kind, model, {name: looks.annotator_row(presets, name) for name in needed})


def read(file: Path | None, mode: str) -> Image.Image | None:
    """An input picture of a prompt, as the decoding child process wrote it."""
    if file is None:
        return None
    return open_picture(file, mode)


def fill(text: str, characteristics: dict[str, str]) -> tuple[str, list[str]]:
    """Replace `{{name}}` by characteristics, once and as plain text. Missing names become empty, with a warning."""
    missing = sorted({name for name in FIELD.findall(text) if name not in characteristics})
    filled = FIELD.sub(lambda match: characteristics.get(match[1], ""), text)
    return filled, [f"there is no characteristic {name!r}; it was left out of the prompt" for name in missing]


def plain(prompt: PromptToRender, characteristics: dict[str, str]) -> str:
    """The text of a prompt's row, without references to models and without flags."""
    return fill(prompt_of(prompt).parsed.text, characteristics)[0]


def size(request: PromptRequest, picture: tuple[int, int] | None, defaults: RenderConfig) -> tuple[int, int]:
    """Width and height of the drawing in pixels.

    Order: w and h, else the aspect ratio, else the input picture's, else the base's own. A base with one size keeps the
    requested aspect below that size.
    """
    ratio = request.aspect_ratio or (AR[request.ar] if request.ar else None)
    across, down = map(int, ratio.split(":")) if ratio else picture or (defaults.w, defaults.h)
    width, height = request.w, request.h
    if ratio or picture:
        if width is None and height is None:
            area = defaults.w * defaults.h
            shares = across / down, down / across
            width, height = (round(math.sqrt(area * share) / BLOCK_PX) * BLOCK_PX for share in shares)
        elif width is None:
            width = round((height or 0) * across / down)
        elif height is None:
            height = round(width * down / across)
    step = defaults.multiple
    width, height = (
        min(MOST_PX, max(step, math.floor(side / step + 0.5) * step))
        for side in (width or defaults.w, height or defaults.h)
    )
    if defaults.fixed_size:
        scale = defaults.fixed_size / max(width, height)
        width, height = (max(16, round(side * scale / 8) * 8) for side in (width, height))
    return width, height
