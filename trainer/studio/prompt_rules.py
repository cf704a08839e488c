"""Rules for prompt requests: errors, warnings, and the row in the store."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pydantic import JsonValue

from trainer.config import looks
from trainer.contract import parsed_text
from trainer.contract.errors import InvalidRequest, nearest
from trainer.contract.photos import Upload
from trainer.contract.prompts import (
    COLUMNS,
    CONTROLS,
    DIGESTS,
    HOSTED_CONTROLS,
    PICTURES,
    PromptRequest,
    attributes_of,
)
from trainer.contract.references import references, tags
from trainer.contract.rows import PromptRow
from trainer.files import UNCOMMITTED, Unreadable
from trainer.names import LORA_REFERENCE
from trainer.photos import inputs
from trainer.studio.idempotency import file_digest
from trainer.studio.references import Named, as_row
from trainer.studio.rows import Services, prompt_home, row_of

API_NUM_IMAGES = 8  # the hosted service's default; the page asks for 4


def check_prompt(services: Services, request: PromptRequest) -> None:
    """Check styles, film looks and pictures, and parameters that exclude each other. Raises InvalidRequest."""
    problems: dict[str, list[str]] = {}
    folder = services.settings.presets
    for field, read in (("style", looks.styles), ("color_grading", looks.film_looks)):
        given = getattr(request, field)
        try:
            known = list(read(folder)) if given else []
        except Unreadable as problem:
            problems[field] = [str(problem)]
            continue
        name = next((name for name in known if given and name.lower() == given.strip().lower()), None)
        if given and name is None:
            message = f"there is no {given!r}{nearest(given, known)}; known: {', '.join(known)}"
            problems[field] = [message]
        setattr(request, field, name)
    for field in PICTURES:
        if not isinstance(getattr(request, field), Upload | None):
            message = f"must be a file in multipart/form-data; an address goes into {field}_url"
            problems[field] = [message]
    try:
        references(request.negative_prompt or "")
    except InvalidRequest as invalid:
        problems["negative_prompt"] = invalid.problems["text"]
    if not request.has_input:
        for field, given in (("mask_image", request.has_mask), ("controlnet", request.controlnet)):
            if given:
                problems[field] = ["needs input_image or input_image_url"]
    if problems:
        raise InvalidRequest(problems)


def keep_pictures(services: Services, prompt_id: int, folder: Path, target: Path | None = None) -> Path:
    """Move the input pictures of a prompt into its folder, and store their names and digests. Returns that folder.

    target: that folder, if the tune is being created; None: in the folder of its tune or base.
    """
    row = row_of(services, "prompts", prompt_id)
    files = [path for path in folder.iterdir() if path.name != UNCOMMITTED]
    names: dict[str, JsonValue] = {path.stem: path.name for path in files}
    names[DIGESTS] = {path.stem: file_digest(path) for path in files}
    target = target or pictures_of(services, row)
    inputs.move_into_place(folder, target)
    services.store.update("prompts", prompt_id, attributes=row["attributes"] | names)
    return target


def pictures_of(services: Services, row: PromptRow) -> Path:
    """The folder of a prompt's input pictures."""
    return services.settings.outputs / prompt_home(row) / "inputs" / str(row["id"])


def prompt_values(request: PromptRequest, named: Sequence[Named]) -> dict[str, object]:
    """The columns of a prompt that come from its request."""
    return {
        **{name: getattr(request, name) for name in COLUMNS},
        "num_images": request.num_images or API_NUM_IMAGES,
        "attributes": attributes_of(request),
        "named": as_row(named),
        "parsed": parsed_text.as_row(request.parsed),
        "kept": json.loads(json.dumps(request.ignored, default=lambda upload: upload.name)),
        "warnings": prompt_warnings(request),
    }


def numbered(invalid: InvalidRequest, number: int) -> list[str]:
    """The errors of one of several prompts, with its number."""
    return [f"{number}.{field}: {message}" for field, all_ in invalid.problems.items() for message in all_]


def prompt_warnings(request: PromptRequest) -> list[str]:
    """Warnings about parameters without an effect; those that depend on the base are added in rendering."""
    messages = [f"{name} is accepted and has no effect" for name in request.ignored]
    asked = request.parsed.flags
    messages += request.parsed.warnings
    messages += [
        f"<{tag.kind}:{tag.name}> in negative_prompt has no effect and was left out; a model is named in text"
        for tag in tags(request.negative_prompt or "")
    ]
    if request.face_swap:
        messages.append("face_swap is accepted and not done: there is no model for it whose licence allows its use")
    if request.controlnet in HOSTED_CONTROLS:
        messages.append(f"controlnet {request.controlnet} is accepted and not done; there are {', '.join(CONTROLS)}")
    drawn = not (request.has_input and (asked.only_upscale or request.denoising_strength == 0))
    enlarged = request.super_resolution or asked.upscale_factor or asked.only_upscale
    follows = request.controlnet in CONTROLS and drawn
    masked = request.has_mask or (asked.mask_prompt and request.has_input)
    no_input = follows and request.controlnet_txt2img and not masked
    lines = [one for one in request.parsed.models if one[0] == LORA_REFERENCE]
    for name, lacks in {  # parameter -> why it has no effect
        "aspect_ratio": request.w and request.h and "with w and h",
        "ar": (request.aspect_ratio and "with aspect_ratio") or (request.w and request.h and "with w and h"),
        "hires_fix": not enlarged and "without super_resolution",
        "denoising_strength": (not request.has_input and "without input_image")
        or (no_input and "with controlnet_txt2img"),
        "mask_image": not drawn and "where nothing is drawn",
        "controlnet": request.controlnet in CONTROLS and not drawn and "where nothing is drawn",
        "controlnet_conditioning_scale": not follows and "without controlnet",
        "controlnet_txt2img": (not follows and "without controlnet") or (masked and "with a mask"),
        "lora_scale": lines and "if the text has a weight",
    }.items():
        if lacks and getattr(request, name):
            messages.append(f"{name} has no effect {lacks}")
    for name, lacks in {
        "mask_prompt": (not request.has_input and "without input_image") or (request.has_mask and "with mask_image"),
        "only_upscale": not request.has_input and "without input_image",
        "mask_negative": not (asked.mask_prompt and masked and not request.has_mask) and "without --mask_prompt",
        "mask_invert": not masked and "without a mask",
        "mask_dilate": not masked and "without a mask",
        "mask_blur": not masked and "without a mask",
        "hires_denoising_strength": not request.hires_fix and "without hires_fix",
        "hires_cfg_scale": not request.hires_fix and "without hires_fix",
        "face_inpaint_denoising": not request.inpaint_faces and "without inpaint_faces",
        "control_guidance_start": not follows and "without controlnet",
        "control_guidance_end": not follows and "without controlnet",
    }.items():
        if lacks and getattr(asked, name):
            messages.append(f"--{name} has no effect {lacks}")
    return messages
