"""Our messages use the terms of the field, and names that were replaced do not come back (see docs/glossary.md)."""

from __future__ import annotations

import ast
import re
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


def messages(tree: ast.Module) -> Iterator[str]:
    """The texts of a module that are not docstrings: messages, descriptions, labels."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(node.body[0].value) for node in ast.walk(tree) if isinstance(node, owners) and _has_docstring(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


def _has_docstring(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return bool(node.body) and isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant)


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
