"""Behind a reverse proxy under a prefix (`--public-url https://tunes.example/tb`), and straight at the port."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr

from tests.helpers.web import photo
from trainer.studio.rows import Services
from trainer.web import page
from trainer.web.guard import Guard
from trainer.web.rest import create_app

pytest_plugins = ("tests.helpers.web",)

DIRECT = "http://127.0.0.1:7860"
PUBLIC = "https://tunes.example/tb"
HEADERS = [
    {"Host": "tunes.example"},  # of a proxy that keeps the Host
    {"X-Forwarded-Host": "tunes.example", "X-Forwarded-Proto": "https"},  # of one that tells it
    {"X-Forwarded-For": "192.0.2.7"},  # of one that tells only the client
]


@pytest.fixture
def client(services: Services) -> Iterator[TestClient]:
    settings = services.settings.model_copy(update={"public_url": f"{PUBLIC}/"})
    served = Services(settings, services.store, services.decoder, services.analyzer)
    guard = Guard(settings, lambda: page.mount(create_app(served), served), lambda: None, lambda: None)
    with TestClient(guard, base_url=DIRECT, follow_redirects=False) as client:
        yield client


def test_page_and_calls_have_the_prefix_behind_each_kind_of_proxy(client: TestClient) -> None:
    for prefix in ("", "/tb"):  # the proxy strips it, or leaves it
        for headers in HEADERS:
            assert client.get(f"{prefix}/config", headers=headers).json()["root"] == PUBLIC
            assert root_of(client.get(f"{prefix}/", headers=headers).text) == PUBLIC
        assert client.get(f"{prefix}/config").json()["root"] == f"{DIRECT}/tb"
        assert root_of(client.get(f"{prefix}/").text) == f"{DIRECT}/tb"
        stranger = client.get(f"{prefix}/tunes", headers={"Host": "evil.example", "X-Forwarded-Host": "tunes.example"})
        assert stranger.status_code == 403
        form = {"tune[title]": f"by {prefix}", "tune[name]": "dog", "tune[branch]": "fast"}
        files = [("tune[images][]", ("a.png", photo(), "image/png"))]
        tune = client.post(f"{prefix}/tunes.json", data=form, files=files).raise_for_status().json()
        assert tune["url"] == f"{PUBLIC}/tunes/{tune['id']}.json"
        for url in (tune["url"], tune["orig_images"][0]):
            path = url.removeprefix("https://tunes.example")
            assert path.startswith("/tb/")
            assert client.get(path).status_code == client.get(path.removeprefix("/tb")).status_code == 200
        sent = client.post(f"{prefix}/gradio_api/upload", files={"files": ("a.png", photo(), "image/png")}).json()
        assert client.get(f"{prefix}/gradio_api/file={sent[0]}").content == photo()
        assert client.get(f"{prefix}/health").json()["ready"] is True
        assert '"/tb/openapi.json"' in client.get(f"{prefix}/docs").text.replace("'", '"')
        assert client.get(f"{prefix}/nothing").status_code == 404
    assert client.get("/tbx/tunes").status_code == 404


def root_of(html: str) -> str:
    found = re.search(r'"root":\s*("[^"]*")', html)
    assert found
    root: str = json.loads(found[1])
    return root


def test_the_sign_in_page_and_its_cookie_have_the_prefix(services: Services) -> None:
    settings = services.settings.model_copy(
        update={"public_url": PUBLIC, "host": "192.0.2.1", "key": SecretStr("a key")}
    )
    guard = Guard(settings, lambda: create_app(services), lambda: None, lambda: None)
    with TestClient(guard, base_url=DIRECT, follow_redirects=False) as client:
        shown = client.get("/", headers={"Accept": "text/html"})
        assert shown.status_code == 401 and 'action="/tb/login"' in shown.text
        assert client.post("/tb/login", data={"key": "a key"}).headers["location"] == "/tb/"
