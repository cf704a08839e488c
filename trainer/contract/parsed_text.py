"""A prompt's text, parsed once, when the prompt is created. The row of the prompt keeps the result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from trainer.contract.flags import Flags, split
from trainer.contract.references import references


@dataclass(frozen=True)
class ParsedText:
    """text: the text without models and flags. models: (lora or faceid, name, weight) of each model in it.

    warnings: about removed flags and tags; they are for the request, and are not kept.
    """

    text: str
    models: tuple[tuple[str, str, float], ...]
    flags: Flags
    warnings: tuple[str, ...] = ()


def parse_text(text: str) -> ParsedText:
    """Raises InvalidRequest if a tag names a model and cannot be read."""
    without_models, models, about_tags = references(text)
    plain, flags, about_flags = split(without_models)
    return ParsedText(plain, tuple(models), flags, (*about_tags, *about_flags))


def as_row(parsed: ParsedText) -> dict[str, object]:
    """The form in which the store keeps it, without flags that are not set."""
    flags = {name: value for name, value in asdict(parsed.flags).items() if value is not None and value is not False}
    return {"text": parsed.text, "models": parsed.models, "flags": flags}


def of_row(row: Mapping[str, Any]) -> ParsedText:
    """The inverse of `as_row`. Flags of a later version are left out."""
    known = {field.name for field in fields(Flags)}
    flags = Flags(**{name: value for name, value in row["flags"].items() if name in known})
    models = tuple((str(kind), str(name), float(weight)) for kind, name, weight in row["models"])
    return ParsedText(str(row["text"]), models, flags)
