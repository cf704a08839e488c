"""The errors that all interfaces answer, and helpers for their messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping


class InvalidRequest(Exception):
    """An invalid request, with its errors: {field: [message, ...]}. REST answers it with 422."""

    def __init__(self, problems: Mapping[str, list[str]]) -> None:
        self.problems = dict(problems)
        super().__init__("\n".join(f"{field}: {'; '.join(messages)}" for field, messages in problems.items()))


class NotFound(Exception):
    """Not found. REST answers it with 404."""


class Conflict(Exception):
    """Not possible in the current state. REST answers it with 409."""


class ModelChanged(Conflict):
    """A file of a model is not the one that was trained: which one, and what to do. REST answers it with 409."""


class JobRefused(RuntimeError):
    """A job that cannot run: why, and what to do. The job fails."""


class AnalysisUnavailable(Exception):
    """Face analysis is not available, with the reason. REST answers it with 503; a tune fails."""


def words(names: Iterable[str]) -> str:
    """a, b, c"""
    return ", ".join(sorted(names))


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'steps'?)` if a known name is similar, else an empty text."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""
