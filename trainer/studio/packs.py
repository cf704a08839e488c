"""Packs: base, preset, model type and prompts for each class under one name, so that a client need not know them.

A pack is a TOML in `presets/packs/` (trainer/config/looks.py reads it) with the name of the pack:

    title = "Headshots"
    description = "..."
    branch = "flux1"                # and any other of PARAMETERS
    classes = ["man", "person"]     # the class names that it has prompts for; person, animal (or pet) and style
                                    # mean their whole kind, "*" means everything
    [defaults]                      # attributes that all prompts share
    num_images = 4
    [[prompts]]
    text = "headshot of {subject}"  # {subject}: token and class name; {token}, {name}: one of them
    classes = ["man"]               # default: all classes of the pack
    seed = 7                        # overrides [defaults]

`{{eye_color}}` is a characteristic of the tune, and stays in the text until the prompt is rendered.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated

from pydantic import Field

from trainer.config.kinds import kind_of
from trainer.contract.errors import InvalidRequest, nearest, words
from trainer.contract.fields import parse_request
from trainer.contract.prompts import PromptRequest
from trainer.contract.tunes import CheckRequest, TuneRequest
from trainer.names import METHODS, MODEL_TYPES
from trainer.studio.pack_file import ANY, GENERAL, PLACE, Pack, in_words, is_for, over

OF_THE_METHOD = ("preset", "args", "steps")  # not valid for another branch or model type
Number = Annotated[int, Field(ge=1, lt=2**53)]


class PackRequest(TuneRequest):
    """The tune parameters, some of which the pack sets; then the parameters for packs."""

    prompt_attributes: dict[str, object] = Field({}, description="attributes that override those of each pack prompt")
    prompt_ids: list[Number] = Field([], description="only these prompts of the pack, by their `id`")
    tune_ids: list[Number] = Field([], description="a trained tune to render with; nothing is trained then")


OWN = ("prompt_attributes", "prompt_ids", "tune_ids")
ALLOWED_WITH_TUNE_IDS = (*OWN, "name", "title")  # the title has no effect, but clients always send it


def class_of(pack: Pack, name: str) -> str | None:
    """The class of the pack whose prompts a class name gets; None: the pack has no prompts for it.

    It is the name in any case, else its last word (`old dog` is a dog, `dog house` is not), else the word for its kind
    (person, animal or pet, style), else "*".
    """
    words = name.lower().split()
    if not words:
        return None
    known = (" ".join(words), words[-1], *GENERAL.get(kind_of(words[-1]), ()), ANY)
    return next((one for one in known if one in pack.classes), None)


def fill(text: str, token: str | None, name: str) -> str:
    """A prompt's text for a subject. token None: it has none, such as a faceid."""
    values = {"subject": " ".join(filter(None, (token, name))), "name": name, "token": token or ""}
    return PLACE.sub(lambda match: values.get(match[1], match[0]), text)


def prompts_for(
    pack: Pack,
    name: str,
    token: str | None,
    prompt_attributes: Mapping[str, object] | None = None,
    prompt_ids: Collection[int] = (),
) -> list[dict[str, object]]:
    """The prompt requests of a pack for a class name, in order.

    prompt_attributes: override those of each prompt; null or an empty text removes a value. prompt_ids: only these,
    from 1 on; empty: all. Raises InvalidRequest for an unknown class, and for invalid attributes or ids.
    """
    return list(numbered_prompts(pack, name, token, prompt_attributes or {}, prompt_ids).values())


def numbered_prompts(
    pack: Pack, name: str, token: str | None, prompt_attributes: Mapping[str, object], prompt_ids: Collection[int]
) -> dict[int, dict[str, object]]:
    """As `prompts_for`, by the numbers of the prompts in the pack."""
    problems: dict[str, list[str]] = {}
    upper: dict[str, object] = {}
    class_ = class_of(pack, name)
    if class_ is None:
        problems["name"] = [f"the pack {pack.title} has prompts for {words(pack.classes)}, not for {name!r}"]
    try:
        upper = asked_attributes(prompt_attributes)
    except InvalidRequest as invalid:
        problems |= invalid.problems
    prompts = enumerate(pack.prompts, 1)
    known = {number: prompt for number, prompt in prompts if class_ is not None and is_for(prompt, class_)}
    if known and (wrong := [str(number) for number in prompt_ids if number not in known]):
        message = f"the pack {pack.title} has for {name!r} the prompts {', '.join(map(str, known))}"
        problems["prompt_ids"] = [f"{message}, not {', '.join(wrong)}"]
    if problems:
        raise InvalidRequest(problems)
    return {
        number: {"text": fill(prompt.text, token, name.strip())} | over(over(pack.defaults, prompt.attributes), upper)
        for number, prompt in known.items()
        if not prompt_ids or number in prompt_ids
    }


def asked_attributes(given: Mapping[str, object]) -> dict[str, object]:
    """The attributes that a request sets on each prompt, as the API accepts them. Raises InvalidRequest."""
    if "text" in given:
        message = "text is each prompt's own; send prompts of yours as prompts_attributes"
        raise InvalidRequest({"prompt_attributes": [message]})
    try:
        request = parse_request(PromptRequest, {"text": "{subject}", **given})
    except InvalidRequest as invalid:
        raise InvalidRequest({"prompt_attributes": list(in_words(invalid))}) from None
    return {name: getattr(request, name, given[name]) for name in given}


def describe(pack: Pack, token: str) -> dict[str, object]:
    """The answer of GET /packs about a pack.

    token: the default of its tunes. Prompts are listed for each class, in the form of a request, with their numbers
    (`id`) in the pack; for the class "*", their texts have {name} in place of the class name.
    """
    own = str(pack.parameters.get("token") or token)
    token_ = own if has_token(pack.parameters.get("model_type")) else None
    return {
        "slug": pack.slug,
        "title": pack.title,
        "description": pack.description,
        **{key: pack.parameters.get(key) for key in ("branch", "model_type", "preset", "base_tune_id")},
        "classes": list(pack.classes),
        "prompts": {
            one: [
                {"id": number, **prompt}
                for number, prompt in numbered_prompts(pack, "{name}" if one == ANY else one, token_, {}, ()).items()
            ]
            for one in pack.classes
        },
    }


def has_token(model_type: object) -> bool:
    """Whether tunes of a model type have a token: those without training have none."""
    return not (isinstance(model_type, str) and model_type in METHODS and not MODEL_TYPES[model_type].trains)


def check_names(data: Mapping[str, object]) -> None:
    """Raises InvalidRequest for unknown parameters of POST /p/SLUG/tunes."""
    known = (*PackRequest.parameters(), *PackRequest.accepted())
    unknown = {name: [f"unknown parameter{nearest(name, known)}"] for name in data if name not in known}
    if unknown:
        raise InvalidRequest(unknown)


def own_fields(data: Mapping[str, object]) -> PackRequest:
    """The parameters for packs; the tune parameters are empty. Raises InvalidRequest."""
    own = {name: data[name] for name in OWN if name in data}
    return parse_request(PackRequest, {"name": "person", "title": "pack", **own})


def asked_base(pack: Pack, data: Mapping[str, object]) -> tuple[int | None, str | None]:
    """base_tune_id and branch: those of the request if it has one of them, else the pack's.

    Raises InvalidRequest for invalid values.
    """
    given = parse_request(CheckRequest, {key: data[key] for key in ("base_tune_id", "branch") if key in data})
    if given.base_tune_id is not None:
        return given.base_tune_id, given.branch
    branch = given.branch or pack.branch
    base = pack.parameters.get("base_tune_id") if "base_tune_id" not in data and branch == pack.branch else None
    return base if isinstance(base, int) else None, branch


def tune_request(pack: Pack, data: Mapping[str, object], branch: str, token: str) -> dict[str, object]:
    """The data of POST /tunes for a request with a pack.

    The request's parameters override the pack's; null or an empty text removes a value. With another branch, the pack's
    base, model type, preset, args and steps are left out; with another model type, its preset, args and steps. The
    pack's prompts come before the request's. branch, token: those of the base that `asked_base` returns. Raises
    InvalidRequest for unknown parameters, and if the pack has no prompts for the class.
    """
    check_names(data)
    own = own_fields(data)
    if own.tune_ids:
        raise InvalidRequest({"tune_ids": ["an existing tune is not trained again"]})
    left_out = ["base_tune_id", "branch"]
    if branch != pack.branch:
        left_out += ["model_type", *OF_THE_METHOD]
    elif data.get("model_type") not in (None, "", pack.parameters.get("model_type")):
        left_out += OF_THE_METHOD
    request = {key: value for key, value in pack.parameters.items() if key not in left_out}
    request |= {key: value for key, value in data.items() if key not in (*OWN, "base_tune_id", "branch")}
    base_tune_id, branch_asked = asked_base(pack, data)
    request |= {"base_tune_id": base_tune_id, "branch": branch_asked}
    request = {key: value for key, value in request.items() if value is not None and value != ""}
    name, more = request.get("name"), request.get("prompts_attributes", [])
    if isinstance(name, str) and name.strip() and isinstance(more, list):  # else POST /tunes reports the error
        own_token = str(request.get("token", token)) if has_token(request.get("model_type")) else None
        request["prompts_attributes"] = [
            *prompts_for(pack, name, own_token, own.prompt_attributes, own.prompt_ids),
            *more,
        ]
    return request


def asked_tune(data: Mapping[str, object]) -> int | None:
    """The tune that renders the pack's prompts; None: a new tune is trained. Raises InvalidRequest."""
    check_names(data)
    tune_ids = own_fields(data).tune_ids
    if not tune_ids:
        return None
    if len(tune_ids) > 1:
        message = f"takes one tune, got {len(tune_ids)}; send the request once for each"
        raise InvalidRequest({"tune_ids": [message]})
    blank: tuple[object, ...] = (None, "", [], {})
    useless = [name for name, value in data.items() if name not in ALLOWED_WITH_TUNE_IDS and value not in blank]
    if useless:
        message = "has no effect with tune_ids, since nothing is trained; leave it out"
        raise InvalidRequest({name: [message] for name in useless})
    return tune_ids[0]


def prompt_requests(pack: Pack, data: Mapping[str, object], name: str, token: str | None) -> list[dict[str, object]]:
    """The data of POST /tunes/ID/prompts for each prompt of the pack, for a request with `tune_ids`.

    name, token: those of the tune. Raises InvalidRequest.
    """
    own = own_fields(data)
    asked = data.get("name")
    if asked and (not isinstance(asked, str) or asked.lower().split() != name.lower().split()):
        raise InvalidRequest({"name": [f"the tune is of a {name}, not of {asked!r}; leave name out"]})
    return prompts_for(pack, name, token, own.prompt_attributes, own.prompt_ids)
