"""The types of request fields, and the check of a request, which reports all errors at once."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from trainer.contract.errors import InvalidRequest, nearest


def blank_is_none(value: object) -> object:
    """An empty text and the word `null` become None: forms cannot send null."""
    return None if isinstance(value, str) and value.strip() in ("", "null") else value


def _no_control_characters(value: object) -> object:
    if isinstance(value, str):
        if any(ord(c) < 32 and c not in "\t\n" for c in value):
            raise ValueError("must not contain control characters")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError("must be valid Unicode (it has a lone surrogate)") from None
    return value


Text = Annotated[str, BeforeValidator(_no_control_characters)]
OptionalBool = Annotated[bool | None, BeforeValidator(blank_is_none)]


def _in_one_line(value: str) -> str:
    if "\n" in value:
        raise ValueError("must not contain line breaks")
    return value


def _is_address(value: str) -> str:
    if not re.match(r"https?://[^/?#\s]", value):
        raise ValueError("must be an address that begins with http:// or https://")
    return value


Address = Annotated[Annotated[Text, Field(max_length=2048), AfterValidator(_is_address)] | None,
                    BeforeValidator(blank_is_none)]  # fmt: skip


T = TypeVar("T")


def _number_or_none(value: object) -> object:
    value = blank_is_none(value)
    if isinstance(value, bool):
        raise ValueError("must be a number, not true or false")
    return value


def _zero_is_none(value: object) -> object:
    """Clients of the hosted service send 0 for a number of steps that is not set."""
    return None if not isinstance(value, bool) and value in (0, "0") else _number_or_none(value)


def _as_text(value: object) -> object:
    """Numbers, booleans and null as the texts that they are in JSON; null is empty."""
    if value is None:
        return ""
    return json.dumps(value) if isinstance(value, bool | int | float) else value


# Optional values: null and an empty form field become None. Forms send numbers as strings.
OrNone = Annotated[T | None, BeforeValidator(blank_is_none)]
NumberOrNone = Annotated[T | None, BeforeValidator(_number_or_none)]
StepsOrNone = Annotated[T | None, BeforeValidator(_zero_is_none)]

Word = OrNone[Annotated[Text, Field(max_length=64)]]
Args = OrNone[Annotated[Text, Field(max_length=1000)]]
OptionalUrl = OrNone[Annotated[Text, Field(max_length=2048)]]
BaseTuneId = NumberOrNone[Annotated[int, Field(ge=1, le=2**53)]]
Share = NumberOrNone[Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]]  # strengths and scales from 0 to 1


class Request(BaseModel):
    """The base of all requests. Unknown names are refused; the message suggests the nearest known name."""

    model_config = ConfigDict(extra="forbid")

    _ignored: dict[str, object] = PrivateAttr(default_factory=dict)

    @model_validator(mode="wrap")
    @classmethod
    def _set_aside(cls, data: object, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Remove nulls, and the parameters of the hosted service that have no effect here."""
        if not isinstance(data, dict):
            raise ValueError("must be an object")
        aside = [name for name in data if name in cls.accepted()]
        null = [name for name in data if name in cls.model_fields and data[name] is None]
        request = handler({name: value for name, value in data.items() if name not in (*aside, *null)})
        request._ignored = {name: data[name] for name in aside if data[name] is not None}
        return request

    @property
    def ignored(self) -> dict[str, object]:
        """The parameters that have no effect, by their names."""
        return self._ignored

    @classmethod
    def accepted(cls) -> tuple[str, ...]:
        return ()

    @classmethod
    def parameters(cls) -> list[str]:
        """The parameter names, in order."""
        return list(cls.model_fields)

    @classmethod
    def known_at(cls, _loc: Sequence[int | str]) -> list[str]:
        """The names that are known at a location in a request, as pydantic writes it: ("prompts", 0, "text")."""
        return cls.parameters()


R = TypeVar("R", bound=Request)


def one_of(names: Iterable[str]) -> Callable[[str], str]:
    """A validator that accepts only these names, in any case, and returns lower case."""
    known = tuple(names)

    def check(value: str) -> str:
        word = value.strip().lower()
        if word not in known:
            raise ValueError(f"must be one of {', '.join(known)}, got {value!r}{nearest(word, known)}")
        return word

    return check


ClassName = Annotated[Text, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9 ]*[A-Za-z0-9][A-Za-z0-9 ]*$")]
Title = Annotated[Text, Field(min_length=1, max_length=255), AfterValidator(_in_one_line)]
Characteristics = Annotated[
    dict[
        Annotated[Text, Field(max_length=64)],
        Annotated[Annotated[Text, Field(max_length=1000)], BeforeValidator(_as_text)],
    ],
    Field(max_length=1000),
]
ImageUrls = list[Annotated[Text, Field(min_length=1, max_length=2048)]]
MESSAGES = {  # pydantic's own messages name its types; these name what the API accepts
    "missing": "is required",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_parsing": "must be a number",
    "list_type": "must be a list",
    "dict_type": "must be an object of names and texts",
    "string_type": "must be a text",
}


def parse_request(model: type[R], data: object) -> R:
    """Check a request against its schema. Raises InvalidRequest with all errors at once."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problems: dict[str, list[str]] = {}
        for problem in error.errors():
            field = str(problem["loc"][0]) if problem["loc"] else "base"
            inner = ".".join(str(part) for part in problem["loc"][1:])
            problems.setdefault(field, []).append((f"{inner}: " if inner else "") + _message(model, problem))
        raise InvalidRequest(problems) from None


def _message(model: type[Request], problem: ErrorDetails) -> str:
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "extra_forbidden":
        return f"unknown parameter{nearest(str(problem['loc'][-1]), model.known_at(problem['loc']))}"
    if kind == "string_pattern_mismatch":
        return "only English letters, numbers and spaces allowed"
    if kind in ("string_too_short", "too_short"):
        return "must not be empty"
    if kind == "string_too_long" or (kind == "too_long" and isinstance(problem["input"], str)):
        return f"must have at most {context['max_length']} characters"
    if kind == "too_long":
        return f"must have at most {context['max_length']} entries, got {context['actual_length']}"
    if kind in ("greater_than_equal", "less_than_equal"):
        bound = context.get("ge", context.get("le"))
        return f"must be {'at least' if 'ge' in context else 'at most'} {bound}, got {problem['input']}"
    return MESSAGES.get(kind, str(problem["msg"]).removeprefix("Value error, "))
