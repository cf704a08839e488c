"""Messages, docstrings and comments are plain English, and old names do not come back (see docs/glossary.md)."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = [ROOT / "app.py", *sorted((ROOT / "trainer").rglob("*.py"))]

# Private or old-fashioned turns, each with what is said in its place.
OLD_TURNS = {
    r"\bnobody\b|\bsomebody\b|\bwhoever\b": "name the subject: a user, a request, another process",
    r"\banew\b": "again",
    r"put aside": "paused",
    r"can(not)? be had": "is (not) available",
    r"\bstands? on\b": "is derived from, is the base of",
    r"nothing can be trained here": "no usable device",
    r"there is nothing of that id": "not found",
    r"nobody look|no faces are looked for": "face detection was skipped",
    r"\bnew words\b": "learned tokens",
    r"wrong, over, or": "invalid or expired",
}
OLD_NAMES = {
    "Looker", "CannotLook", "Child", "Broke", "Strangers", "must_wait", "Postman", "Keeper", "Bench", "Aside",
    "put_aside", "Mark", "read_mark", "MOMENT_FILES", "moment_of", "standing_on", "Tell", "untold", "teller", "spoken",
    "taken_in", "in_turn", "told", "said", "unsaid", "Jobs",
}  # fmt: skip


# The rooms whose docstrings and comments are checked; "trainer" means the modules outside the rooms.
ROOMS = ("trainer", "web", "studio", "contract", "config", "library", "work")
# Turns that docstrings and comments do without, each with what is said in its place.
OLD_PROSE = {
    r"\bbesides?\b": "next to, in addition to, with",
    r"(?<!first )(?<!second )\bmoment\b": "time, step, snapshot",
    r"\b(lies?|lay|lain) (in|on|there|here|below|outside|around)\b": "is, is stored in",
    r"\b(stands?|stood) (for|in|on|there|next|between|behind)\b": "means, is",
    r"\b(whatever|whoever|wherever|upon)\b": "name the subject",
    r"\b(tells?|told)\b": "reports, shows, asks",
    r"\b(goes|going) on\b": "continues, resumes",
    r"\b(is|are) gone\b": "is deleted, is missing",
    r"\b(any|every|no|some)body\b|\bstrangers?\b": "a user, a client, another process",
    r"\bwhat is wrong\b": "the errors",
    r"\b(every|all) doors?\b|\bthe (shared )?verbs\b": "interfaces, operations",
    r"\b(in mid-run|in words|to be had|of late|here and there|new words)\b": "during a run; learned tokens",
    r"\blook(s|ed)? at\b": "analyzes, reads",
}


def docstrings(tree: ast.Module) -> list[ast.Constant]:
    """The docstrings of a module, its classes and functions, as nodes."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    firsts = [node.body[0] for node in ast.walk(tree) if isinstance(node, owners) and node.body]
    values = [first.value for first in firsts if isinstance(first, ast.Expr)]
    return [value for value in values if isinstance(value, ast.Constant) and isinstance(value.value, str)]


def messages(tree: ast.Module) -> Iterator[str]:
    """The texts of a module that are not docstrings: messages, descriptions, labels."""
    known = {id(one) for one in docstrings(tree)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in known:
            yield node.value


def prose(source: str) -> list[str]:
    """The docstrings and comments of a module; adjacent lines of a docstring are joined."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = [token.string for token in tokens if token.type == tokenize.COMMENT]
    return [" ".join(str(one.value).split()) for one in docstrings(ast.parse(source))] + comments


def old_turns(source: str) -> list[str]:
    """Each old turn in the docstrings and comments of a module, with its replacement."""
    return [
        f"{found[0]!r} in {text[:100]!r}: {instead}"
        for text in prose(source)
        for turn, instead in OLD_PROSE.items()
        for found in re.finditer(turn, text, re.IGNORECASE)
    ]


def names(tree: ast.Module) -> set[str]:
    """Every name that a module defines or uses, attributes and parameters included."""
    found = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    found |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    found |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    defined = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return found | {node.name for node in ast.walk(tree) if isinstance(node, defined)}


@pytest.mark.parametrize("turn", OLD_TURNS, ids=OLD_TURNS.values())
def test_messages_do_without_the_old_turns(turn: str) -> None:
    found = [
        f"{file.relative_to(ROOT)}: {text[:100]}"
        for file in FILES
        if file.name != "migrations.py"  # SQL, whose comments belong to released steps
        for text in messages(ast.parse(file.read_text("utf-8")))
        if re.search(turn, text)
    ]
    assert found == []


def test_old_names_do_not_come_back() -> None:
    found = {
        f"{file.relative_to(ROOT)}: {name}"
        for file in FILES
        for name in names(ast.parse(file.read_text("utf-8"))) & OLD_NAMES
    }
    assert found == set()


def test_every_room_of_the_list_exists() -> None:
    assert set(ROOMS) <= {file.parent.name for file in FILES}


@pytest.mark.parametrize("room", ROOMS)
def test_docstrings_and_comments_do_without_the_old_turns(room: str) -> None:
    files = [file for file in FILES if file.parent.name == room or (room == "trainer" and file.name == "app.py")]
    found = {str(file.relative_to(ROOT)): old_turns(file.read_text("utf-8")) for file in files}
    assert {file: turns for file, turns in found.items() if turns} == {}


def test_the_check_of_prose_finds_docstrings_and_comments_only() -> None:
    source = (
        '''"""A file beside\na folder."""\ntext = "whatever"  # it goes on\ndef f():\n    """What\n    is wrong."""\n'''
    )
    assert [turn.split(" in ")[0] for turn in old_turns(source)] == ["'beside'", "'What is wrong'", "'goes on'"]
    assert old_turns('"""The second moment, and the first moment."""') == []
