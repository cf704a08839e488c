"""Marks for the parameters of tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest


def long_but(default: Sequence[Any], values: Sequence[Any]) -> list[Any]:
    """The parameters of a test, of which only those in `default` run by default; the others are long."""
    rows = [(value, value if isinstance(value, tuple) else (value,)) for value in values]
    return [value if value in default else pytest.param(*row, marks=pytest.mark.long) for value, row in rows]
