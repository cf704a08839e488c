"""Models in a prompt's text: `<lora:NAME:WEIGHT>` and `<faceid:NAME:WEIGHT>`. This is the only grammar of these tags.

The last part is the weight, so a NAME may have colons where a weight follows. Case does not matter in the first word,
nor do blanks between the parts; `lyco` means lora, as in other programs. A tag that names a model and cannot be read is
an error; one that names no model, as `<lora...>`, is left out with a warning. No tag stays in the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from trainer.contract.errors import InvalidRequest, nearest
from trainer.names import FACE_REFERENCE, LORA_REFERENCE

KINDS = {"lora": LORA_REFERENCE, "lyco": LORA_REFERENCE, "faceid": FACE_REFERENCE}
OTHER_KINDS = ("hypernet",)  # of other programs
# A tag of these kinds, closed or not. Of an unclosed one, the text up to the next tag or the end is taken.
TAG = re.compile(rf"<+\s*({'|'.join((*KINDS, *OTHER_KINDS))})(?![\w'’])([^<>]*)(>+|)", re.IGNORECASE)
MISSPELT = re.compile(r"<+\s*(\w+)\s*:[^<>:]+:\s*[-+]?[0-9.,]+\s*>")  # another first word, and the form of a tag
NAMELESS = re.compile(r"[\s.…:]*")
NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:[.,][0-9]*)?|[.,][0-9]+)")
MOST_WEIGHT = 10.0  # a model at ten times its strength draws noise
SHOWN = 60  # characters of a tag in a message


@dataclass(frozen=True)
class Tag:
    """A tag in a text. name: empty if it names no model. problem: why it cannot be read. start, end: its place."""

    kind: str
    name: str
    weight: float
    problem: str
    start: int
    end: int


def references(text: str) -> tuple[str, list[tuple[str, str, float]], list[str]]:
    """A prompt's text without its tags; the models as (lora or faceid, name, weight); and warnings.

    The default weight is 1. Raises InvalidRequest if a tag names a model and cannot be read.
    """
    found = list(tags(text))
    problems = [f"{_shown(text, tag)}: {tag.problem}" for tag in found if tag.problem]
    problems += [
        f"{_line(tag[0])}: there is no tag {tag[1]!r}{hint}"
        for tag in MISSPELT.finditer(text)
        if tag[1].lower() not in KINDS and (hint := nearest(tag[1].lower(), KINDS))
    ]
    if problems:
        raise InvalidRequest({"text": problems})
    warnings = [f"{_shown(text, tag)} names no model and was left out of the prompt" for tag in found if not tag.name]
    models = [(tag.kind, tag.name, tag.weight) for tag in found if tag.name]
    return without(text, lambda _: True), models, warnings


def tags(text: str) -> Iterator[Tag]:
    """The tags of a text, in order."""
    for found in TAG.finditer(text):
        word, inside, closed = found[1].lower(), found[2], bool(found[3])
        nameless = NAMELESS.match(inside)
        assert nameless is not None, "it matches the empty text, too"
        name, weight, problem, end = "", 1.0, "", found.end()
        if not closed and ":" not in inside:  # what follows is the prompt
            end = found.start(2) + len(nameless[0].rstrip())
        elif word in OTHER_KINDS:
            problem = f"{word} tags cannot be used here; a LoRA is named as <lora:NAME:WEIGHT>"
        elif nameless[0] != inside:
            name, weight, problem = _read(word, inside, closed)
        yield Tag(KINDS.get(word, word), name, weight, problem, found.start(), end)


def without(text: str, leave_out: Callable[[Tag], bool]) -> str:
    """The text without the tags for which `leave_out` is true."""
    spans = [(tag.start, tag.end) for tag in tags(text) if leave_out(tag)]
    if not spans:
        return text
    starts, ends = [0, *(end for _, end in spans)], [*(start for start, _ in spans), len(text)]
    kept = "".join(text[start:end] for start, end in zip(starts, ends, strict=True))
    return re.sub(r" {2,}", " ", kept).strip()


def one_weight(kind: str, name: str, weight: float) -> str:
    """A hint for a name that is not found and ends as a weight: other programs write two weights. Else empty."""
    first, colon, last = name.rpartition(":")
    if not colon or not NUMBER.fullmatch(last.strip()):
        return ""
    return f"; a tag has one weight, as <{kind}:{first.strip()}:{weight:g}>"


def _read(word: str, inside: str, closed: bool) -> tuple[str, float, str]:
    """Name, weight and problem of what follows the first word of a tag."""
    form = f"write <{word}:NAME:WEIGHT>"
    if not closed:
        return "", 1.0, f"it has no closing >; {form}"
    if not inside.lstrip().startswith(":"):
        return "", 1.0, f"it cannot be read; {form}"
    parts = [part.strip() for part in inside.split(":")[1:]]
    if len(parts) == 1:
        return parts[0], 1.0, ""
    name, last = ":".join(inside.split(":")[1:-1]).strip(), parts[-1]
    if not NAMELESS.sub("", name):  # `<lora:...:1>`
        return "", 1.0, ""
    if not last and len(parts) == 2:
        return name, 1.0, ""
    if not NUMBER.fullmatch(last):
        return "", 1.0, _no_number(word, inside, parts)
    weight = float(last.replace(",", "."))
    if abs(weight) > MOST_WEIGHT:
        return "", 1.0, f"the weight must be from -{MOST_WEIGHT:g} to {MOST_WEIGHT:g}"
    return name, weight, ""


def _no_number(word: str, inside: str, parts: list[str]) -> str:
    """Why a tag whose last part is not a number cannot be read."""
    message = "the weight must be a number, as 1, 0.7 or -0.5"
    if len(parts) > 2 and NUMBER.fullmatch(parts[1]):
        return f"{message}, and the last part; weights of single blocks ({parts[-1]}) cannot be used here"
    whole = " ".join(inside.split()).removeprefix(":").strip()
    return f"{message}; for a name with a colon write the weight as well: <{word}:{whole}:1>"


def _shown(text: str, tag: Tag) -> str:
    return _line(text[tag.start : tag.end])


def _line(text: str) -> str:
    """One line, shortened."""
    line = " ".join(text.split())
    return line if len(line) <= SHOWN else f"{line[: SHOWN - 1]}…"
