"""Tunes made over REST."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
from fastapi.testclient import TestClient

from tests.helpers.web import Value, multipart, photo

Fields = list[tuple[str, Value]]
PHOTO: tuple[str, Value] = ("tune[images][]", ("rex.png", photo()))
GOOD: Fields = [("tune[title]", "Rex"), ("tune[name]", "dog"), ("tune[branch]", "fast"), PHOTO]


def post(client: TestClient, fields: Fields, path: str = "/tunes") -> httpx.Response:
    """Send a form as curl -F does."""
    body, headers = multipart(fields)
    return client.post(path, content=body, headers=headers)


def create(client: TestClient, title: str = "Rex", *more: tuple[str, Value]) -> dict[str, Any]:
    """A queued tune."""
    response = post(client, [("tune[title]", title), *GOOD[1:], *more])
    assert response.status_code == 201, response.text
    return dict(response.json())


def flatten(value: Any, name: str) -> Iterator[tuple[str, str]]:
    """The fields of a form that say this: lists of objects with numbers, lists of texts without."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flatten(inner, f"{name}[{key}]")
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from flatten(inner, f"{name}[{number}]" if isinstance(inner, dict) else f"{name}[]")
    else:
        yield name, value
