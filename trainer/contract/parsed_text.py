"""A prompt's text, parsed once: when the prompt is created. The result is kept with its row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from trainer.contract.flags import Flags, split
from trainer.contract.references import references


@dataclass(frozen=True)
class ParsedText:
    """text: what is drawn, without models and flags. models: (lora or faceid, name, weight) of each that it names.

    warnings: of flags that were left out; they are for the request, and are not kept.
    """

    text: str
    models: tuple[tuple[str, str, float], ...]
    flags: Flags
    warnings: tuple[str, ...] = ()


def parse_text(text: str) -> ParsedText:
    """Raises InvalidRequest for a model's weight that is no number, or out of range."""
    without_models, models = references(text)
    plain, flags, warnings = split(without_models)
    return ParsedText(plain, tuple(models), flags, tuple(warnings))


def as_row(parsed: ParsedText) -> dict[str, object]:
    """As the store keeps it: flags that were not given are left out."""
    flags = {name: value for name, value in asdict(parsed.flags).items() if value is not None and value is not False}
    return {"text": parsed.text, "models": parsed.models, "flags": flags}


def of_row(row: Mapping[str, Any]) -> ParsedText:
    """The inverse of `as_row`. A flag that only a later version knows is left out."""
    known = {field.name for field in fields(Flags)}
    flags = Flags(**{name: value for name, value in row["flags"].items() if name in known})
    models = tuple((str(kind), str(name), float(weight)) for kind, name, weight in row["models"])
    return ParsedText(str(row["text"]), models, flags)
