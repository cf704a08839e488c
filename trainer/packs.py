"""Packs: base, preset, model type and prompts for each class under one name, so that a client need not know them.

A pack is a TOML in `presets/packs/` (`presets.py` reads it), its name is the pack's:

    title = "Headshots"
    description = "..."
    branch = "flux1"                # and any other of PARAMETERS
    classes = ["man", "person"]     # the class names that it has prompts for; person, animal (or pet) and style stand
                                    # for their kind, "*" for everything
    [defaults]                      # attributes that all prompts share
    num_images = 4
    [[prompts]]
    text = "headshot of {subject}"  # {subject}: token and class name; {token}, {name}: one of them
    classes = ["man"]               # not given: for all classes of the pack
    seed = 7                        # over [defaults]

`{{eye_color}}` is a characteristic of the tune, and stays as it is until the prompt is rendered.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from html import escape
from itertools import count
from typing import Annotated, Any

import tomlkit
from pydantic import BaseModel, ConfigDict, Field

from trainer.methods import METHODS
from trainer.presets import kind_of
from trainer.schema import (
    PICTURES,
    REFERENCE,
    CheckRequest,
    InvalidRequest,
    PromptRequest,
    TuneRequest,
    check_branch,
    nearest,
    parse_request,
    references,
    words,
)

PARAMETERS = (  # of a tune, that a pack may set
    "branch", "base_tune_id", "model_type", "preset", "token", "args", "face_crop", "training_face_correct", "steps",
)  # fmt: skip
KEYS = ("title", "description", *PARAMETERS, "classes", "defaults", "prompts")
OF_THE_METHOD = ("preset", "args", "steps")  # they mean something else, or nothing, with another branch or model type
ANY = "*"
GENERAL = {"person": ("person",), "animal": ("animal", "pet"), "style": ("style",)}  # classes that stand for a kind
OF_A_REQUEST = ("callback", *PICTURES)  # attributes of a prompt that no pack has
FROM_A_PICTURE = (
    "input_image_url", "mask_image_url", "denoising_strength", "controlnet", "controlnet_conditioning_scale",
    "controlnet_txt2img",
)  # fmt: skip
SIZES = ("aspect_ratio", "ar", "w", "h")
# What an attribute takes the place of. w and h alone do not: they go with the aspect ratio that is there.
INSTEAD_OF = {
    "aspect_ratio": SIZES, "ar": SIZES, "input_image": ("input_image_url",), "mask_image": ("mask_image_url",),
}  # fmt: skip
SLUG = re.compile(r"[a-z0-9-]{1,64}")
SLUG_CHARACTERS = 64
PLACES = ("subject", "name", "token")
PLACE = re.compile(r"(?<!\{)\{(\w+)\}(?!\})")
CLASS_NAME = re.compile(r"[A-Za-z0-9 ]*[A-Za-z0-9][A-Za-z0-9 ]*")  # as `schema.ClassName`


class PackPrompt(BaseModel):
    """A prompt of a pack. classes: those that it is for; empty: all. attributes: its own, without the pack's."""

    model_config = ConfigDict(frozen=True)

    text: str
    classes: tuple[str, ...] = ()
    attributes: dict[str, Any] = {}


class Pack(BaseModel):
    """A pack that was read and found good. slug: its name in addresses. classes are in small letters."""

    model_config = ConfigDict(frozen=True)

    slug: str
    title: str
    description: str = ""
    parameters: dict[str, Any]
    classes: tuple[str, ...]
    defaults: dict[str, Any] = {}
    prompts: tuple[PackPrompt, ...]

    @property
    def branch(self) -> str:
        return str(self.parameters["branch"])


Number = Annotated[int, Field(ge=1, lt=2**53)]


class PackRequest(TuneRequest):
    """The tune parameters, of which the pack knows some; then those of a pack."""

    prompt_attributes: dict[str, Any] = Field({}, description="attributes over those of each prompt of the pack")
    prompt_ids: list[Number] = Field([], description="only these prompts of the pack, by their `id`")
    tune_ids: list[Number] = Field([], description="a trained tune to render with; nothing is trained then")


OWN = ("prompt_attributes", "prompt_ids", "tune_ids")
BESIDE_TUNE_IDS = (*OWN, "name", "title")  # a title has no use there; clients send it with every tune


# Reading


def load(table: Mapping[str, Any], slug: str) -> Pack:
    """The pack that a TOML's table is. Raises ValueError with all that is wrong with it, in words."""
    problems = [f"unknown key {key!r}{nearest(key, KEYS)}" for key in table if key not in KEYS]
    if not SLUG.fullmatch(slug):
        problems.append(f"a pack's name must be 1 to {SLUG_CHARACTERS} of a-z, 0-9 and -, got {slug!r}")
    parameters = {key: table[key] for key in PARAMETERS if key in table}
    if table.get("branch") is None or not str(table["branch"]).strip():
        problems.append("branch is required")
    if (description := table.get("description", "")) != "" and not isinstance(description, str):
        problems.append("description must be a text")
    try:
        request = parse_request(TuneRequest, {"name": "person", "title": table.get("title"), **parameters})
        parameters = request.model_dump(include=set(parameters), exclude_none=True)
        if request.branch is not None:
            check_branch(request.branch)
        if request.model_type not in (None, *METHODS):
            close = nearest(str(request.model_type), METHODS)
            problems.append(f"unknown model_type {request.model_type!r}{close}; known: {words(METHODS)}")
    except InvalidRequest as invalid:
        problems += in_words(invalid)
    classes = read_classes(table.get("classes"), "classes", problems)
    defaults, prompts = {}, []
    given = table.get("defaults", {})
    if isinstance(given, Mapping):
        defaults = read_attributes(given, "defaults", problems)
    else:
        problems.append("defaults must be a table, [defaults]")
    rows = table.get("prompts")
    if isinstance(rows, list) and rows and all(isinstance(row, Mapping) for row in rows):
        prompts = [read_prompt(row, f"prompt {number}", classes, problems) for number, row in enumerate(rows, 1)]
    else:
        problems.append("prompts must be one or more tables, [[prompts]]")
    for one in classes:
        if prompts and not any(is_for(prompt, one) for prompt in prompts):
            problems.append(f"no prompt is for the class {one!r}; add one, or take it out of classes")
    for number, prompt in enumerate(() if problems else prompts, 1):
        try:
            parse_request(PromptRequest, {"text": prompt.text} | over(defaults, prompt.attributes))
        except InvalidRequest as invalid:
            problems += [f"prompt {number}: {problem}" for problem in in_words(invalid)]
    if problems:
        raise ValueError("; ".join(problems))
    return Pack(
        slug=slug,
        title=table["title"],
        description=description,
        parameters=parameters,
        classes=tuple(classes),
        defaults=defaults,
        prompts=tuple(prompts),
    )


def in_words(invalid: InvalidRequest) -> Iterator[str]:
    """`field message` of all that is wrong."""
    return (f"{field} {message}" for field, messages in invalid.problems.items() for message in messages)


def read_classes(given: Any, where: str, problems: list[str]) -> list[str]:
    """Class names in small letters; what is wrong with them is added to `problems`."""
    if not isinstance(given, list) or not given or not all(isinstance(one, str) for one in given):
        problems.append(f'{where} must be a list of class names, as ["man", "woman"] or ["{ANY}"]')
        return []
    wrong = [one for one in given if one != ANY and not CLASS_NAME.fullmatch(one)]
    problems += [f"{where}: {one!r} is no class name: English letters, numbers and spaces" for one in wrong]
    return list(dict.fromkeys(" ".join(one.lower().split()) for one in given if one not in wrong))


def read_attributes(given: Mapping[str, Any], where: str, problems: list[str]) -> dict[str, Any]:
    """Attributes of prompts as the API takes them; what is wrong with them is added to `problems`."""
    known = [name for name in PromptRequest.model_fields if name not in ("text", *OF_A_REQUEST)]
    told = [f"{name} is of a request, and not of a pack" for name in given if name in OF_A_REQUEST]
    told += [
        f"unknown attribute {name!r}{nearest(name, known)}" for name in given if name not in (*known, *OF_A_REQUEST)
    ]
    attributes = {name: value for name, value in given.items() if name in known}
    try:
        request = parse_request(PromptRequest, {"text": "{subject}", **attributes})
        attributes = request.model_dump(include=set(attributes), exclude_none=True)
    except InvalidRequest as invalid:
        told += in_words(invalid)
    problems += [f"{where}: {problem}" for problem in told]
    return attributes


def read_prompt(row: Mapping[str, Any], where: str, classes: Sequence[str], problems: list[str]) -> PackPrompt:
    """One of [[prompts]]; what is wrong with it is added to `problems`."""
    text, only, told = row.get("text"), [], []
    if not isinstance(text, str) or not text.strip():
        told.append("text is required")
        text = "{subject}"
    strange = [name for name in PLACE.findall(text) if name not in PLACES]
    told += [f"unknown {{{name}}} in its text{close}" for name in strange if (close := nearest(name, PLACES))]
    try:
        references(text)
    except InvalidRequest as invalid:
        told += in_words(invalid)
    if "classes" in row:
        only = read_classes(row["classes"], "classes", told)
        told += [
            f"{one!r} is not among the pack's classes{nearest(one, classes)}; they are {words(classes)}"
            for one in only
            if classes and one not in classes
        ]
    problems += [f"{where}: {problem}" for problem in told]
    own = {name: value for name, value in row.items() if name not in ("text", "classes")}
    return PackPrompt(text=text, classes=tuple(only), attributes=read_attributes(own, where, problems))


# What a pack has for whom


def is_for(prompt: PackPrompt, class_: str) -> bool:
    return not prompt.classes or class_ in prompt.classes or ANY in prompt.classes


def class_of(pack: Pack, name: str) -> str | None:
    """The pack's class whose prompts a class name gets; None: it has none for it.

    It is the name itself in any case, else its last word (`old dog` is a dog, `dog house` is none), else the word for
    its kind (person, animal or pet, style), else "*".
    """
    spoken = name.lower().split()
    if not spoken:
        return None
    known = (" ".join(spoken), spoken[-1], *GENERAL.get(kind_of(spoken[-1]), ()), ANY)
    return next((one for one in known if one in pack.classes), None)


def over(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes over others, each with what it takes the place of; null takes away what was there."""
    gone = {other for name, value in upper.items() if value is not None for other in INSTEAD_OF.get(name, ())}
    merged = {name: value for name, value in lower.items() if name not in gone} | dict(upper)
    return {name: value for name, value in merged.items() if value is not None}


def fill(text: str, token: str | None, name: str) -> str:
    """A prompt's text for a subject. token None: it has none, as a faceid."""
    spoken = {"subject": " ".join(filter(None, (token, name))), "name": name, "token": token or ""}
    return PLACE.sub(lambda match: spoken.get(match[1], match[0]), text)


def prompts_for(
    pack: Pack,
    name: str,
    token: str | None,
    prompt_attributes: Mapping[str, Any] | None = None,
    prompt_ids: Collection[int] = (),
) -> list[dict[str, Any]]:
    """The prompt requests of a pack for a class name, in its order.

    prompt_attributes: go over those of each prompt; null or an empty text takes the pack's own away. prompt_ids: only
    these, from 1 on; empty: all. Raises InvalidRequest for a class that the pack does not have, and for what is wrong
    with the other two.
    """
    return list(numbered_prompts(pack, name, token, prompt_attributes or {}, prompt_ids).values())


def numbered_prompts(
    pack: Pack, name: str, token: str | None, prompt_attributes: Mapping[str, Any], prompt_ids: Collection[int]
) -> dict[int, dict[str, Any]]:
    """`prompts_for`, by their numbers in the pack."""
    problems: dict[str, list[str]] = {}
    upper: dict[str, Any] = {}
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
        told = f"the pack {pack.title} has for {name!r} the prompts {', '.join(map(str, known))}"
        problems["prompt_ids"] = [f"{told}, not {', '.join(wrong)}"]
    if problems:
        raise InvalidRequest(problems)
    return {
        number: {"text": fill(prompt.text, token, name.strip())} | over(over(pack.defaults, prompt.attributes), upper)
        for number, prompt in known.items()
        if not prompt_ids or number in prompt_ids
    }


def asked_attributes(given: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes that a request wants on each prompt, as the API takes them. Raises InvalidRequest."""
    if "text" in given:
        told = "text is each prompt's own; send prompts of yours as prompts_attributes"
        raise InvalidRequest({"prompt_attributes": [told]})
    try:
        request = parse_request(PromptRequest, {"text": "{subject}", **given})
    except InvalidRequest as invalid:
        raise InvalidRequest({"prompt_attributes": list(in_words(invalid))}) from None
    return {name: getattr(request, name, given[name]) for name in given}


def describe(pack: Pack, token: str) -> dict[str, Any]:
    """What GET /packs answers of a pack.

    token: the one that its tunes get where nobody says. Prompts are listed for each class as they would be sent, with
    their numbers (`id`) in the pack; {name} stands for the class name where the pack takes any.
    """
    own = pack.parameters.get("token") or token
    token_ = None if pack.parameters.get("model_type") == "faceid" else own
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


# Requests


def check_names(data: Mapping[str, Any]) -> None:
    """Raises InvalidRequest for a field that POST /p/SLUG/tunes does not have."""
    known = (*PackRequest.parameters(), *PackRequest.accepted())
    unknown = {name: [f"unknown parameter{nearest(name, known)}"] for name in data if name not in known}
    if unknown:
        raise InvalidRequest(unknown)


def own_fields(data: Mapping[str, Any]) -> PackRequest:
    """Those of a pack, the others left empty. Raises InvalidRequest."""
    own = {name: data[name] for name in OWN if name in data}
    return parse_request(PackRequest, {"name": "person", "title": "pack", **own})


def asked_base(pack: Pack, data: Mapping[str, Any]) -> tuple[int | None, str | None]:
    """base_tune_id and branch of a tune: the request's where it says one of them, else the pack's.

    Raises InvalidRequest for what is neither.
    """
    given = parse_request(CheckRequest, {key: data[key] for key in ("base_tune_id", "branch") if key in data})
    if given.base_tune_id is not None:
        return given.base_tune_id, given.branch
    branch = given.branch or pack.branch
    own = "base_tune_id" not in data and branch == pack.branch
    return pack.parameters.get("base_tune_id") if own else None, branch


def tune_request(pack: Pack, data: Mapping[str, Any], branch: str, token: str) -> dict[str, Any]:
    """The data of POST /tunes for a request that names a pack.

    The request's parameters go over the pack's; null or an empty text takes the pack's own away. On another branch the
    pack's base, model type, preset, args and steps are left out, with another model type its preset, args and steps.
    Prompts are the pack's, and then the request's. branch, token: those of the base that `asked_base` names. Raises
    InvalidRequest for unknown fields, and where the pack has nothing for the class.
    """
    check_names(data)
    own = own_fields(data)
    if own.tune_ids:
        raise InvalidRequest({"tune_ids": ["nothing is trained for a tune that is there already"]})
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
    if isinstance(name, str) and name.strip() and isinstance(more, list):  # else POST /tunes says what is wrong
        spoken = None if request.get("model_type") == "faceid" else str(request.get("token", token))
        request["prompts_attributes"] = [
            *prompts_for(pack, name, spoken, own.prompt_attributes, own.prompt_ids),
            *more,
        ]
    return request


def asked_tune(data: Mapping[str, Any]) -> int | None:
    """The tune that a request with a pack renders with; None: it trains one. Raises InvalidRequest."""
    check_names(data)
    tune_ids = own_fields(data).tune_ids
    if not tune_ids:
        return None
    if len(tune_ids) > 1:
        told = f"takes one tune, got {len(tune_ids)}; send the request once for each"
        raise InvalidRequest({"tune_ids": [told]})
    blank: tuple[Any, ...] = (None, "", [], {})
    needless = [name for name, value in data.items() if name not in BESIDE_TUNE_IDS and value not in blank]
    if needless:
        told = "has no effect with tune_ids, for nothing is trained; leave it out"
        raise InvalidRequest({name: [told] for name in needless})
    return tune_ids[0]


def prompt_requests(pack: Pack, data: Mapping[str, Any], name: str, token: str | None) -> list[dict[str, Any]]:
    """The data of POST /tunes/ID/prompts for a request with `tune_ids`, one for each prompt of the pack.

    name, token: those of the tune. Raises InvalidRequest.
    """
    own = own_fields(data)
    asked = data.get("name")
    if asked and (not isinstance(asked, str) or asked.lower().split() != name.lower().split()):
        raise InvalidRequest({"name": [f"the tune is of a {name}, not of {asked!r}; leave name out"]})
    return prompts_for(pack, name, token, own.prompt_attributes, own.prompt_ids)


# Writing


def to_toml(
    title: str,
    tune: Mapping[str, Any],
    prompts: Sequence[Mapping[str, Any]],
    args: str | None = None,
    description: str = "",
) -> str:
    """The TOML of a pack with the settings of a tune and the given prompts, for its class.

    tune: its row. prompts: their requests, as `prompt_of(row).model_dump()` gives them. args: as the request had them;
    the row has all words, as they were settled for its number of photos. Token and class name in the texts become
    {subject}; the tune's own `<lora:ID:WEIGHT>` becomes lora_scale, its own `<faceid:...>` is left out. So are
    callbacks, and pictures that prompts start from with what depends on them: those are one user's. Raises
    InvalidRequest.
    """
    if not prompts:
        raise InvalidRequest({"prompts": ["a pack needs one prompt at least; render one with the tune first"]})
    asked = {key: tune.get(key) for key in PARAMETERS if key not in ("token", "args")}
    asked |= {"model_type": tune["method"], "args": args}
    if not tune["training_face_correct"]:  # which is what nobody asked for; face_crop=false was asked
        asked["training_face_correct"] = None
    asked |= {key: bool(asked[key]) for key in ("face_crop", "training_face_correct") if asked[key] is not None}
    if tune["branch"] == "fast":  # it has a base and settings of its own
        asked |= {"base_tune_id": None, "preset": None}
    rows = [general_prompt(prompt, tune) for prompt in prompts]
    rows = [row for number, row in enumerate(rows) if row not in rows[:number]]
    shared = {
        name: value
        for name, value in rows[0].items()
        if name != "text" and all(name in row and row[name] == value for row in rows)
    }
    if any(row.get(name) != rows[0].get(name) for row in rows for name in SIZES):  # a ratio would displace w and h
        shared = {name: value for name, value in shared.items() if name not in SIZES}
    table: dict[str, Any] = {"title": title, **({"description": description} if description else {})}
    table |= {key: value for key, value in asked.items() if value is not None and value != ""}
    table |= {"classes": [" ".join(tune["name"].lower().split())], **({"defaults": shared} if shared else {})}
    table["prompts"] = [{name: value for name, value in row.items() if name not in shared} for row in rows]
    try:
        load(table, slug_of(title))
    except ValueError as problem:
        raise InvalidRequest({"pack": [str(problem)]}) from None
    return tomlkit.dumps(table)


def general_prompt(prompt: Mapping[str, Any], tune: Mapping[str, Any]) -> dict[str, Any]:
    """A prompt request without what is of one tune and one user."""
    left_out = ("text", *OF_A_REQUEST, *FROM_A_PICTURE)
    attributes = {name: value for name, value in prompt.items() if value is not None and name not in left_out}
    kind = "faceid" if tune["method"] == "faceid" else "lora"
    names = {str(tune["id"]), tune["token"], tune["title"]}
    own = [weight for kind_, name, weight in references(prompt["text"])[1] if kind_ == kind and name in names]
    text = prompt["text"]
    if own:
        text = REFERENCE.sub(lambda found: "" if found[1] == kind and found[2].strip() in names else found[0], text)
        text = re.sub(r" {2,}", " ", text).strip()  # as `references` leaves it
    if own and kind == "lora":  # the weight in the text wins over lora_scale
        attributes = {name: value for name, value in attributes.items() if name != "lora_scale"}
        attributes |= {"lora_scale": own[0]} if own[0] != 1 else {}
    return {"text": placed(text, tune["token"], tune["name"]) or "{subject}", **attributes}


def placed(text: str, token: str | None, name: str) -> str:
    """A text with {subject} and {token} in place of a tune's own; without a token the first class name is {subject}.

    What is in `{{...}}` and `<...>` stays, and so does a word beside a brace: it would read as another placeholder.
    """
    called = r"\s+".join(map(re.escape, name.split()))
    subject = called if token is None else rf"{re.escape(token)}\s+{called}"
    mine = "" if token is None else rf"|(?<![\w{{])(?P<token>{re.escape(token)})(?![\w}}])"
    pattern = rf"\{{\{{.*?\}}\}}|<[^<>]*>|(?<![\w{{])(?P<subject>{subject})(?![\w}}]){mine}"
    left = 1 if token is None else len(text)

    def place(found: re.Match[str]) -> str:
        nonlocal left
        if found.lastgroup is None or not left:
            return found[0]
        left -= 1
        return f"{{{found.lastgroup}}}"

    return re.sub(pattern, place, text, flags=re.IGNORECASE)


def slug_of(title: str) -> str:
    """A name for files and addresses: 1 to 64 of a-z, 0-9 and -; `pack` where nothing of a title is left."""
    plain = unicodedata.normalize("NFKD", title.casefold()).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:SLUG_CHARACTERS].strip("-") or "pack"


def free_slug(title: str, taken: Collection[str]) -> str:
    """The slug of a title; with -2, -3 ... behind it where another pack has it."""
    slug = slug_of(title)
    if slug not in taken:
        return slug
    numbered = (f"{slug[: SLUG_CHARACTERS - len(end)].rstrip('-')}{end}" for end in (f"-{n}" for n in count(2)))
    return next(one for one in numbered if one not in taken)


# The page


def cards(packs: Sequence[Mapping[str, Any]]) -> str:
    """The packs as HTML: `describe` of each, or `slug` and `error` of one that cannot be read."""
    if not packs:
        return (
            '<div class="tb-empty"><b>No packs yet</b><span>A pack keeps the settings and prompts of a tune that went'
            " well. Save one from a tune below.</span></div>"
        )
    return f'<div class="tb-packs">{"".join(map(card, packs))}</div>'


def card(pack: Mapping[str, Any]) -> str:
    """One pack: what it is for, and how many prompts it has."""
    if "error" in pack:
        return (
            f'<article class="tb-card" data-pack="{escape(pack["slug"])}"><header><h3>{escape(pack["slug"])}</h3>'
            f'</header><p class="tb-problem">{escape(pack["error"])}</p></article>'
        )
    kinds = "".join(f'<b class="tb-badge">{escape("anything" if one == ANY else one)}</b>' for one in pack["classes"])
    numbers = sorted({len(prompts) for prompts in pack["prompts"].values()})
    told = f"{numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else str(numbers[0])
    return (
        f'<article class="tb-card" data-pack="{escape(pack["slug"])}"><header><h3>{escape(pack["title"])}</h3>'
        f'<span class="tb-pill">{escape(pack["branch"])}</span></header><p>{escape(pack["description"])}</p>'
        f'<p class="tb-dim">{kinds}{told} prompt{"" if numbers == [1] else "s"}</p></article>'
    )
