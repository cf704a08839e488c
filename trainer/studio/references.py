"""Resolves `<lora:NAME:WEIGHT>` and `<faceid:NAME:WEIGHT>` in a prompt to models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

from trainer.contract.errors import InvalidRequest
from trainer.contract.parsed_text import ParsedText
from trainer.contract.prompts import prompt_of
from trainer.contract.references import one_weight
from trainer.contract.rows import PromptRow, TuneRow
from trainer.library.bases import Base, Bases
from trainer.names import FACE_REFERENCE, LORA_REFERENCE, MODEL_TYPES
from trainer.studio.store import Store

UNUSABLE = ("failed", "canceled", "expired")


class NamedTune(TypedDict):
    """The names by which a prompt's text may refer to its own tune."""

    id: int
    title: str
    token: str | None
    method: str


@dataclass(frozen=True)
class Named:
    """A model in a prompt. kind: lora or faceid. id: of a tune, or of a LoRA file in the models folder."""

    kind: str
    id: int
    weight: float


def resolve(store: Store, listed: Bases, parsed: ParsedText, branch: str | None, own: NamedTune | None) -> list[Named]:
    """The models that a prompt's text names, in order.

    listed: all bases, of this request. own: the tune that the prompt is posted to. branch: of the base; None: unknown,
    since the request is invalid. Raises InvalidRequest for models that do not exist or do not fit the base.
    """
    found: list[Named] = []
    problems = []
    for kind, name, weight in parsed.models:
        try:
            row = (_lora if kind == LORA_REFERENCE else _face)(store, listed, name, branch, own)
            if any((one.kind, one.id) == (kind, row) for one in found):
                raise ValueError("it is named twice; once is enough")
            found.append(Named(kind, row, weight))
        except ValueError as problem:
            problems.append(f"<{kind}:{name}>: {problem}{one_weight(kind, name, weight)}")
    faces = sum(one.kind == FACE_REFERENCE for one in found)
    if faces > 1:
        problems.append(f"names {faces} faces; one is possible")
    if problems:
        raise InvalidRequest({"text": problems})
    return found


def of_row(store: Store, listed: Bases, prompt: PromptRow, tune: TuneRow | None, branch: str) -> list[Named]:
    """The models of a prompt in the store, resolved now if they were not before. Raises InvalidRequest."""
    if prompt["named"] is None:
        return resolve(store, listed, prompt_of(prompt).parsed, branch, tune)
    return [Named(*one) for one in prompt["named"]]


def as_row(named: Sequence[Named]) -> list[tuple[str, int, float]]:
    """The form in which the store keeps them."""
    return [(one.kind, one.id, one.weight) for one in named]


def _lora(store: Store, listed: Bases, name: str, branch: str | None, own: NamedTune | None) -> int:
    """The id of a LoRA, by its id, by its tune's token or title, or by the name of its file. Raises ValueError."""
    if own and name in (str(own["id"]), own["token"], own["title"]):
        if _is_face(own):
            raise ValueError(f"tune {own['id']} is a face: write <faceid:{own['id']}:1>")
        return int(own["id"])
    if number := _number(name):
        if row := store.get("tunes", number):
            _check(row, branch)
            return number
        tunes: list[TuneRow] = []
    else:
        called = [*store.find("tunes", token=name), *store.find("tunes", title=name)]
        rows = {row["id"]: row for row in called}
        tunes = [row for row in rows.values() if MODEL_TYPES[row["method"]].adapter and row["status"] not in UNUSABLE]
        tunes = [row for row in tunes if branch in (None, row["branch"])]
    files = [base for base in listed() if base.model and name in _names(base)]
    if len(tunes) + len(files) > 1:
        candidates = [f"{row['id']} ({row['title']})" for row in tunes] + [
            f"{base.id} ({base.title})" for base in files
        ]
        raise ValueError(f"several have this name: {', '.join(candidates)}; write the id of one")
    if files:
        if files[0].error:
            raise ValueError(files[0].error)
        if branch not in (None, files[0].branch):
            raise ValueError(f"it is of branch {files[0].branch}, not {branch}")
        return files[0].id
    if not tunes:
        raise ValueError("there is no LoRA with this id, token or title, and no such file in the models folder")
    return int(tunes[0]["id"])


def _names(base: Base) -> tuple[str, ...]:
    assert base.model is not None, "only LoRA files are asked for"
    return str(base.id), base.title, base.model.name, base.model.stem


def _check(row: TuneRow, branch: str | None) -> None:
    """Raises ValueError unless the tune is a LoRA for this branch."""
    number = row["id"]
    if _is_face(row):
        raise ValueError(f"tune {number} is a face: write <faceid:{number}:1>")
    if not MODEL_TYPES[row["method"]].adapter:
        raise ValueError(f"tune {number} is a whole model, not a LoRA: post the prompt to it")
    if row["status"] in UNUSABLE:
        raise ValueError(f"tune {number} is {row['status']}; it has no model")
    if branch not in (None, row["branch"]):
        raise ValueError(f"tune {number} is of branch {row['branch']}, not {branch}")


def _face(store: Store, _listed: Bases, name: str, branch: str | None, own: NamedTune | None) -> int:
    """The id of a faceid tune, by its id or by its title. Raises ValueError."""
    if own and _is_face(own) and name in (str(own["id"]), own["title"]):
        return int(own["id"])
    number = _number(name)
    rows = [store.get("tunes", number)] if number else store.find("tunes", title=name)
    faces = [row for row in rows if row and _is_face(row)]
    if not faces:
        raise ValueError(f"there is no faceid tune {name}")
    if len(faces) > 1:
        raise ValueError(f"several have this name: {', '.join(str(one['id']) for one in faces)}; write the id of one")
    if faces[0]["status"] != "trained":
        raise ValueError(f"it is {faces[0]['status']}")
    if branch not in (None, faces[0]["branch"]):
        raise ValueError(f"it is of branch {faces[0]['branch']}, not {branch}")
    return int(faces[0]["id"])


def _is_face(row: NamedTune) -> bool:
    return MODEL_TYPES[row["method"]].reference == FACE_REFERENCE


def _number(name: str) -> int | None:
    return int(name) if name.isascii() and name.isdecimal() and len(name) <= 18 else None
