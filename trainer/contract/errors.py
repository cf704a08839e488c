"""The errors that every door answers, and the words that they share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping


class InvalidRequest(Exception):
    """A request that cannot be carried out, and why: {field: [message, ...]}. REST answers it with 422."""

    def __init__(self, problems: Mapping[str, list[str]]) -> None:
        self.problems = dict(problems)
        super().__init__("\n".join(f"{field}: {'; '.join(messages)}" for field, messages in problems.items()))


class NotFound(Exception):
    """Not found. REST answers it with 404."""


class Conflict(Exception):
    """Not in this state. REST answers it with 409."""


class ModelChanged(Conflict):
    """A file of a model is not the one that was trained: which one, and what to do. REST answers it with 409."""


class AnalysisUnavailable(Exception):
    """A photo that cannot be looked at, and why. REST answers it with 503; a tune fails."""


def words(names: Iterable[str]) -> str:
    """a, b, c"""
    return ", ".join(sorted(names))


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'steps'?)` where a known name looks like it, else nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""
