"""The lists of REST: pages that end, filters, and query parameters that no call has."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.testclient import TestClient

from tests.helpers.api import PHOTO, Fields, post
from tests.helpers.fast import FAST_ID
from tests.helpers.web import client_of
from trainer.studio.rows import Services

pytest_plugins = ("tests.helpers.web",)


@pytest.fixture
def client(services: Services) -> TestClient:
    """Three tunes (dog, cat, dog) and three prompts on a base."""
    client = client_of(services)
    for number, name in enumerate(["dog", "cat", "dog"], 1):
        fields: Fields = [("tune[title]", f"tune {number}"), ("tune[name]", name), ("tune[branch]", "fast"), PHOTO]
        assert post(client, fields).status_code == 201
    for text in ("a Red hat", "a blue hat", "a red shoe"):
        body = {"prompt": {"text": text, "num_images": 1}}
        assert client.post(f"/tunes/{FAST_ID}/prompts", json=body).status_code == 201
    return client


def test_a_client_that_pages_reaches_the_end(client: TestClient) -> None:
    for path in ("/tunes", "/prompts", f"/tunes/{FAST_ID}/prompts", "/gallery/tunes"):
        page_through(client, path)


def page_through(client: TestClient, path: str) -> None:
    """As the service's own command line does: ask with the id of the last row until a page is empty."""
    whole = [row["id"] for row in client.get(path).json()]
    assert len(whole) >= 3
    seen: list[int] = []
    page: list[dict[str, Any]] = client.get(path, params={"limit": 2}).json()
    while page:
        seen += [row["id"] for row in page]
        assert len(seen) <= len(whole), "the pages repeat"
        page = client.get(path, params={"limit": 2, "before_id": page[-1]["id"]}).json()
    assert seen == whole
    assert [row["id"] for row in client.get(path, params={"limit": 1, "offset": 1}).json()] == whole[1:2]
    after = {"limit": 1, "offset": 1, "before_id": whole[0]}
    assert [row["id"] for row in client.get(path, params=after).json()] == whole[2:3]


def test_lists_without_ids_have_limit_and_offset(client: TestClient) -> None:
    for path in ("/packs", "/presets"):
        whole = client.get(path).json()
        assert len(whole) >= 2
        assert client.get(path, params={"limit": 1, "offset": 1}).json() == whole[1:2]


FILTERED = [
    ("name=cat", ["tune 2"]),
    ("name=dog", ["tune 3", "tune 1"]),
    ("name[]=cat&name[]=dog", ["tune 3", "tune 2", "tune 1"]),
    ("name%5B%5D=cat", ["tune 2"]),
    ("name=bird", []),
    ("title=tune+1", ["tune 1"]),
    ("branch=sd15", []),
    ("branch=&name=", ["tune 3", "tune 2", "tune 1"]),
    ("branch=fast&limit=1", ["tune 3"]),
    ("name=dog&before_id=3", ["tune 1"]),
]


def test_tunes_are_filtered(client: TestClient) -> None:
    for query, titles in FILTERED:
        assert [tune["title"] for tune in client.get(f"/tunes?{query}").json()] == titles, query


def test_prompts_are_filtered_by_text(client: TestClient) -> None:
    for path in ("/prompts", f"/tunes/{FAST_ID}/prompts"):
        found = client.get(path, params={"text": "red"}).json()
        assert [prompt["text"] for prompt in found] == ["a red shoe", "a Red hat"]
        assert client.get(path, params={"text": "%"}).json() == []
        assert len(client.get(path, params={"text": ""}).json()) == 3


UNKNOWN: list[tuple[str, str, str, str | None]] = [
    ("GET", "/tunes?befor_id=1", "befor_id", "before_id"),
    ("GET", "/tunes?names[]=1", "names[]", "name[]"),
    ("GET", "/prompts?tex=a", "tex", "text"),
    ("GET", "/gallery/tunes?model_typ=lora", "model_typ", "model_type"),
    ("GET", "/packs?limits=1", "limits", "limit"),
    ("GET", "/presets?offsett=1", "offsett", "offset"),
    ("GET", "/tunes/1/callbacks?limt=1", "limt", "limit"),
    ("GET", "/tunes/1/model?formt=kohya", "formt", "format"),
    ("GET", "/tunes/1?page=2", "page", None),
    ("DELETE", "/tunes/1?force=1", "force", None),
    ("POST", "/tunes?dry_run=1", "dry_run", None),
]


def test_an_unknown_query_parameter_is_refused(client: TestClient) -> None:
    for row in UNKNOWN:
        refused(client, *row)
    assert len(client.get("/tunes").json()) == 3, "nothing was done"


def refused(client: TestClient, method: str, path: str, name: str, near: str | None) -> None:
    answer = client.request(method, path, **({"json": {"tune": {}}} if method == "POST" else {}))
    assert answer.status_code == 422
    assert list(answer.json()) == [name]
    assert (f"did you mean '{near}'?" in answer.json()[name][0]) if near else "no query parameters" in answer.text


def test_a_cursor_that_is_not_in_the_list(client: TestClient) -> None:
    assert client.get("/gallery/tunes", params={"before_id": 5}).status_code == 422
    assert client.get("/tunes", params={"before_id": 1}).json() == []
