"""The TOML file of a pack: reading, checking, writing."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import count

import tomlkit
from pydantic import BaseModel, ConfigDict

from trainer.contract.errors import InvalidRequest, nearest, words
from trainer.contract.fields import parse_request
from trainer.contract.prompts import PICTURES, PromptRequest
from trainer.contract.references import references, without
from trainer.contract.rows import TuneRow
from trainer.contract.tunes import TuneRequest, check_branch
from trainer.names import LORA_REFERENCE, METHODS, MODEL_TYPES

PARAMETERS = (  # the parameters of a tune that a pack may set
    "branch", "base_tune_id", "model_type", "preset", "token", "args", "face_crop", "training_face_correct", "steps",
)  # fmt: skip
KEYS = ("title", "description", *PARAMETERS, "classes", "defaults", "prompts")
ANY = "*"
GENERAL = {"person": ("person",), "animal": ("animal", "pet"), "style": ("style",)}  # kind -> its class names
OF_A_REQUEST = ("callback", *PICTURES)  # attributes of a prompt that a pack cannot have
FROM_A_PICTURE = (
    "input_image_url", "mask_image_url", "denoising_strength", "controlnet", "controlnet_conditioning_scale",
    "controlnet_txt2img",
)  # fmt: skip
SIZES = ("aspect_ratio", "ar", "w", "h")
# Attribute -> the attributes that it replaces. w or h alone replaces nothing: the aspect ratio decides the other.
INSTEAD_OF = {
    "aspect_ratio": SIZES, "ar": SIZES, "input_image": ("input_image_url",), "mask_image": ("mask_image_url",),
}  # fmt: skip
SLUG = re.compile(r"[a-z0-9-]{1,64}")
SLUG_CHARACTERS = 64
PLACES = ("subject", "name", "token")
PLACE = re.compile(r"(?<!\{)\{(\w+)\}(?!\})")
CLASS_NAME = re.compile(r"[A-Za-z0-9 ]*[A-Za-z0-9][A-Za-z0-9 ]*")  # as `ClassName` in contract/fields.py


class PackPrompt(BaseModel):
    """A prompt of a pack. classes: its classes; empty: all. attributes: without the defaults of the pack."""

    model_config = ConfigDict(frozen=True)

    text: str
    classes: tuple[str, ...] = ()
    attributes: dict[str, object] = {}


class Pack(BaseModel):
    """A valid pack. slug: its name in URLs. classes: in lower case."""

    model_config = ConfigDict(frozen=True)

    slug: str
    title: str
    description: str = ""
    parameters: dict[str, object]
    classes: tuple[str, ...]
    defaults: dict[str, object] = {}
    prompts: tuple[PackPrompt, ...]

    @property
    def branch(self) -> str:
        return str(self.parameters["branch"])


def load(table: Mapping[str, object], slug: str) -> Pack:
    """A pack from the table of a TOML. Raises ValueError with all errors."""
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
    """All errors as texts, `field message`."""
    return (f"{field} {message}" for field, messages in invalid.problems.items() for message in messages)


def read_classes(given: object, where: str, problems: list[str]) -> list[str]:
    """Class names in lower case; errors are added to `problems`."""
    if not isinstance(given, list) or not given or not all(isinstance(one, str) for one in given):
        problems.append(f'{where} must be a list of class names, as ["man", "woman"] or ["{ANY}"]')
        return []
    wrong = [one for one in given if one != ANY and not CLASS_NAME.fullmatch(one)]
    problems += [f"{where}: {one!r} is no class name: English letters, numbers and spaces" for one in wrong]
    return list(dict.fromkeys(" ".join(one.lower().split()) for one in given if one not in wrong))


def read_attributes(given: Mapping[str, object], where: str, problems: list[str]) -> dict[str, object]:
    """Attributes of prompts as the API accepts them; errors are added to `problems`."""
    known = [name for name in PromptRequest.model_fields if name not in ("text", *OF_A_REQUEST)]
    messages = [f"{name} is of a request, and not of a pack" for name in given if name in OF_A_REQUEST]
    messages += [
        f"unknown attribute {name!r}{nearest(name, known)}" for name in given if name not in (*known, *OF_A_REQUEST)
    ]
    attributes = {name: value for name, value in given.items() if name in known}
    try:
        request = parse_request(PromptRequest, {"text": "{subject}", **attributes})
        attributes = request.model_dump(include=set(attributes), exclude_none=True)
    except InvalidRequest as invalid:
        messages += in_words(invalid)
    problems += [f"{where}: {problem}" for problem in messages]
    return attributes


def read_prompt(row: Mapping[str, object], where: str, classes: Sequence[str], problems: list[str]) -> PackPrompt:
    """A prompt from a table of [[prompts]]; errors are added to `problems`."""
    text, only, messages = row.get("text"), [], []
    if not isinstance(text, str) or not text.strip():
        messages.append("text is required")
        text = "{subject}"
    strange = [name for name in PLACE.findall(text) if name not in PLACES]
    messages += [f"unknown {{{name}}} in its text{close}" for name in strange if (close := nearest(name, PLACES))]
    try:
        references(text)
    except InvalidRequest as invalid:
        messages += in_words(invalid)
    if "classes" in row:
        only = read_classes(row["classes"], "classes", messages)
        messages += [
            f"{one!r} is not among the pack's classes{nearest(one, classes)}; they are {words(classes)}"
            for one in only
            if classes and one not in classes
        ]
    problems += [f"{where}: {problem}" for problem in messages]
    own = {name: value for name, value in row.items() if name not in ("text", "classes")}
    return PackPrompt(text=text, classes=tuple(only), attributes=read_attributes(own, where, problems))


def is_for(prompt: PackPrompt, class_: str) -> bool:
    return not prompt.classes or class_ in prompt.classes or ANY in prompt.classes


def over(lower: Mapping[str, object], upper: Mapping[str, object]) -> dict[str, object]:
    """Merge attributes. One of `upper` replaces those of `lower` in INSTEAD_OF as well; null removes a value."""
    replaced = {other for name, value in upper.items() if value is not None for other in INSTEAD_OF.get(name, ())}
    merged = {name: value for name, value in lower.items() if name not in replaced} | dict(upper)
    return {name: value for name, value in merged.items() if value is not None}


def to_toml(
    title: str,
    tune: TuneRow,
    prompts: Sequence[Mapping[str, object]],
    args: str | None = None,
    description: str = "",
    placeholder: bool = False,
) -> str:
    """The TOML of a pack with the settings of a tune and the given prompts, for its class.

    tune: its row. prompts: their requests, from `prompt_of(row).model_dump()`. args: those of the request; the row has
    all words, with values for its number of photos. placeholder: whether the tune's branch is one.

    Token and class name in the texts become {subject}; the tune's own `<lora:ID:WEIGHT>` becomes lora_scale. Left out
    are its own `<faceid:...>`, callbacks, and input pictures with the parameters that need them: these belong to one
    user. Raises InvalidRequest.
    """
    if not prompts:
        raise InvalidRequest({"prompts": ["a pack needs one prompt at least; render one with the tune first"]})
    columns: Mapping[str, object] = tune
    asked = {key: columns.get(key) for key in PARAMETERS if key not in ("token", "args")}
    asked |= {"model_type": tune["method"], "args": args}
    if not tune["training_face_correct"]:  # the default; face_crop=false, however, was requested
        asked["training_face_correct"] = None
    asked |= {key: bool(asked[key]) for key in ("face_crop", "training_face_correct") if asked[key] is not None}
    if placeholder:  # it has its own base and settings
        asked |= {"base_tune_id": None, "preset": None}
    rows = [general_prompt(prompt, tune) for prompt in prompts]
    rows = [row for number, row in enumerate(rows) if row not in rows[:number]]
    shared = {
        name: value
        for name, value in rows[0].items()
        if name != "text" and all(name in row and row[name] == value for row in rows)
    }
    if any(row.get(name) != rows[0].get(name) for row in rows for name in SIZES):  # a ratio would replace w and h
        shared = {name: value for name, value in shared.items() if name not in SIZES}
    table: dict[str, object] = {"title": title, **({"description": description} if description else {})}
    table |= {key: value for key, value in asked.items() if value is not None and value != ""}
    table |= {"classes": [" ".join(tune["name"].lower().split())], **({"defaults": shared} if shared else {})}
    table["prompts"] = [{name: value for name, value in row.items() if name not in shared} for row in rows]
    try:
        load(table, slug_of(title))
    except ValueError as problem:
        raise InvalidRequest({"pack": [str(problem)]}) from None
    return tomlkit.dumps(table)


def general_prompt(prompt: Mapping[str, object], tune: TuneRow) -> dict[str, object]:
    """A prompt request without the values of one tune and one user."""
    left_out = ("text", *OF_A_REQUEST, *FROM_A_PICTURE)
    attributes = {name: value for name, value in prompt.items() if value is not None and name not in left_out}
    kind = MODEL_TYPES[tune["method"]].reference or LORA_REFERENCE
    names = {str(tune["id"]), tune["token"], tune["title"]}
    text = str(prompt["text"])
    own = [weight for kind_, name, weight in references(text)[1] if kind_ == kind and name in names]
    if own:
        text = without(text, lambda tag: tag.kind == kind and tag.name in names)
    if own and kind == LORA_REFERENCE:  # the weight in the text overrides lora_scale
        attributes = {name: value for name, value in attributes.items() if name != "lora_scale"}
        attributes |= {"lora_scale": own[0]} if own[0] != 1 else {}
    return {"text": placed(text, tune["token"], tune["name"]) or "{subject}", **attributes}


def placed(text: str, token: str | None, name: str) -> str:
    """A text with {subject} and {token} in place of a tune's own; without a token the first class name is {subject}.

    Text in `{{...}}` and `<...>` stays; so does a word next to a brace, which would become another placeholder.
    """
    called = r"\s+".join(map(re.escape, name.split()))
    subject = called if token is None else rf"{re.escape(token)}\s+{called}"
    token_pattern = "" if token is None else rf"|(?<![\w{{])(?P<token>{re.escape(token)})(?![\w}}])"
    pattern = rf"\{{\{{.*?\}}\}}|<[^<>]*>|(?<![\w{{])(?P<subject>{subject})(?![\w}}]){token_pattern}"
    left = 1 if token is None else len(text)

    def place(found: re.Match[str]) -> str:
        nonlocal left
        if found.lastgroup is None or not left:
            return found[0]
        left -= 1
        return f"{{{found.lastgroup}}}"

    return re.sub(pattern, place, text, flags=re.IGNORECASE)


def slug_of(title: str) -> str:
    """The title as a name for files and URLs: 1 to 64 of a-z, 0-9 and -; `pack` if none of these is in the title."""
    plain = unicodedata.normalize("NFKD", title.casefold()).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:SLUG_CHARACTERS].strip("-") or "pack"


def free_slug(title: str, taken: Collection[str]) -> str:
    """The slug of a title, followed by -2, -3 ... if another pack has it."""
    slug = slug_of(title)
    if slug not in taken:
        return slug
    numbered = (f"{slug[: SLUG_CHARACTERS - len(end)].rstrip('-')}{end}" for end in (f"-{n}" for n in count(2)))
    return next(one for one in numbered if one not in taken)
