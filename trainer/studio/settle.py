"""Fills in the defaults of a tune request: base, preset, model type, hyper-parameters; and its warnings."""

from __future__ import annotations

from trainer.config import branch_file, kinds, resolve, train_config
from trainer.contract.errors import InvalidRequest, nearest, words
from trainer.contract.rows import TuneValues
from trainer.contract.tunes import TuneRequest, check_model_type
from trainer.library import bases
from trainer.library.bases import Base, Bases
from trainer.names import FORMATS, MODEL_TYPES, ModelType
from trainer.photos.caption_rules import CaptionRules, check_captions
from trainer.photos.intake import Taken
from trainer.photos.subject import not_people, of_one_person
from trainer.studio.rows import Services, tune_row, tunes_by_id

FEW_PHOTOS = 4
HOSTED_PRESETS = ("flux-lora-focus", "flux-lora-portrait", "flux-lora-fast")


def list_presets(services: Services) -> list[str]:
    return branch_file.list_presets(services.settings.presets)


def settle(services: Services, request: TuneRequest, photos: int, listed: Bases) -> TuneValues:
    """Fill in all defaults, and check that the parameters fit together. Raises InvalidRequest with all errors.

    photos: their number. listed: all bases, of this request.
    """
    base = bases.resolve(services.settings, request.base_tune_id, request.branch, tunes_by_id(services), listed)
    asked_preset, warnings = request.preset, request_warnings(services, request, photos, base)
    problems: dict[str, list[str]] = {}
    placeholder = branch_file.is_placeholder(services.settings.presets, base.branch)
    known_presets = (*list_presets(services), *HOSTED_PRESETS)
    if placeholder:
        preset = None
    elif asked_preset is not None and asked_preset not in list_presets(services):
        known = words(list_presets(services)) or "none"
        hint = nearest(asked_preset, known_presets)
        problems["preset"] = [f"there is no preset {asked_preset!r} for {base.branch}{hint}; known: {known}"]
        preset = None
    else:
        preset = asked_preset
    folder, branch = services.settings.presets, base.branch
    asked_type = request.model_type or branch_file.default_model_type(folder, branch)
    method, args = branch_file.method_of(folder, branch, asked_type), None
    if method != asked_type:
        warnings.append(f"{branch} trains {method} where {asked_type} is asked, as the hosted service does")
    try:
        check_model_type(method, branch, branch_file.model_types(folder, branch), branch_file.why_not(folder, branch))
        model_type, earlier = MODEL_TYPES[method], tune_row(services, base.id)
        if model_type.whole_model and earlier and FORMATS["embeddings"] in earlier["files"]:
            message = f"tune {base.id} has learned tokens, which a checkpoint cannot hold; train lora or pti on it"
            problems["base_tune_id"] = [message]
        if model_type.learns_tokens and (request.token or "").lower() in request.name.lower().split():
            problems["token"] = [f"{request.token} is a word of the class name: every {request.name} would be meant"]
        if not model_type.trains:
            problems |= untrained_problems(request, model_type)
        else:
            config = resolve.resolve(
                folder,
                branch=branch,
                model_type=method,
                preset=preset,
                name=request.name,
                photos=photos,
                steps=request.steps,
                args=request.args,
                face_crop=request.face_crop,
                face_crop_default=services.settings.face_crop,
            )
            args = train_config.as_args(config)
    except InvalidRequest as invalid:
        problems |= invalid.problems
    if problems:
        raise InvalidRequest(problems)
    token = request.token or token_for(services, base) if MODEL_TYPES[method].trains else None
    return tune_values(request, base, token, method, args, warnings)


def tune_values(
    request: TuneRequest, base: Base, token: str | None, method: str, args: str | None, warnings: list[str]
) -> TuneValues:
    """The columns of a tune that come from its request."""
    return {
        "title": request.title,
        "name": request.name.strip(),
        "token": token,
        "branch": base.branch,
        "model_type": request.model_type,
        "method": method,
        "preset": request.preset,
        "base_tune_id": request.base_tune_id,
        "base_id": base.id,
        "steps": request.steps,
        "args": args,
        "face_crop": request.face_crop,
        "training_face_correct": bool(request.training_face_correct),
        "auto_extend": bool(request.auto_extend),
        "callback": request.callback,
        "prompts_callback": request.prompts_callback,
        "characteristics": request.characteristics,
        "warnings": warnings,
    }


def token_for(services: Services, base: Base) -> str:
    """The default token: that of the earlier tune if the base is one, else the branch's."""
    earlier = tune_row(services, base.id)
    return (earlier and earlier["token"]) or branch_file.default_token(services.settings.presets, base.branch)


def request_warnings(services: Services, request: TuneRequest, photos: int, base: Base) -> list[str]:
    """Warnings about parameters without an effect."""
    messages = [f"{name} is accepted and has no effect" for name in request.ignored]
    messages += branch_file.branch_warnings(services.settings.presets, base.branch)
    if photos < FEW_PHOTOS:
        messages.append(f"{photos} photos are few: with {FEW_PHOTOS} or more a tune learns its subject better")
    if branch_file.is_placeholder(services.settings.presets, base.branch):
        if request.base_tune_id not in (None, base.id):
            messages.append(
                f"branch {base.branch} has a base of its own: base_tune_id {request.base_tune_id} is not used"
            )
        if request.preset is not None:
            messages.append(f"branch {base.branch} has settings of its own: preset {request.preset} is not used")
    if request.face_crop and kinds.kind_of(request.name) != "person":
        messages.append(not_people("face_crop", request.name))
    if request.model_type in MODEL_TYPES and not MODEL_TYPES[request.model_type].trains:
        asked = [name for name in ("steps", "token", "training_face_correct", "preset") if getattr(request, name)]
        messages += [f"{name} has no effect: {request.model_type} trains nothing" for name in asked]
    if request.auto_extend and not services.settings.lifetime_days:
        messages.append("auto_extend has no effect: tunes do not expire here")
    return messages


def caption_warnings(services: Services, values: TuneValues, taken: Taken) -> list[str]:
    """Warnings about captions, and notes of the photos; none for a tune that trains nothing, which has no token."""
    if values["token"] is None:
        return []
    most = branch_file.caption_tokens(services.settings.presets, values["branch"])
    return check_captions(taken.folder / "images", taken.photos, CaptionRules(values["token"], most))


def untrained_problems(request: TuneRequest, model_type: ModelType) -> dict[str, list[str]]:
    """Errors of a request for a model type without training."""
    problems = {}
    if model_type.needs_person and not of_one_person(request.name):
        problems["name"] = [f"faceid is of one person (man, woman, boy, girl, child, ...), not of {request.name}"]
    if request.args:
        problems["args"] = ["faceid trains nothing, so there is nothing to set; leave args out"]
    return problems
