"""Behind a reverse proxy under a prefix (`--public-url https://tunes.example/tb`), and straight at the port."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from playwright.sync_api import Page
from pydantic import SecretStr

from tests.helpers.app import running, wait_for
from tests.helpers.proxy import proxy
from tests.helpers.web import photo
from trainer.studio.rows import Services
from trainer.web import page
from trainer.web.guard import Guard
from trainer.web.rest import create_app

pytest_plugins = ("tests.helpers.web", "tests.helpers.chromium")

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


@pytest.mark.long
def test_the_page_trains_and_shows_pictures_through_a_proxy_and_straight(
    tmp_path: Path, browser_page: Page, dog_photos: Callable[[int], list[Path]]
) -> None:
    page, refused, outside = browser_page, [], []
    page.on("response", lambda one: refused.append(f"{one.status} {one.url}") if one.status >= 400 else None)
    page.on("request", lambda one: outside.append(one.url))
    photos = [str(photo) for photo in dog_photos(5)]
    with proxy() as server, running(tmp_path, "--public-url", server.url) as app:
        server.upstream = app.url
        app.ready()
        for number, url in enumerate((f"{server.url}/", f"{app.url}/", f"{app.url}/tb/"), start=1):
            outside.clear()
            with page.expect_response("**/gradio_api/run/predict"):
                page.goto(url)
            page.set_input_files("#field-images input[type=file]", photos)
            page.wait_for_function("document.querySelectorAll('#thumbnails img').length == 5")
            page.wait_for_function("[...document.querySelectorAll('#thumbnails img')].every(i => i.naturalWidth > 0)")
            page.fill("#field-name :is(input, textarea)", "dog")
            page.fill("#field-title :is(input, textarea)", f"page {number}")
            page.fill("#field-prompts_attributes textarea", "ohwx dog")
            page.click("#create")
            shown = f"#now [data-tune='{number}']"
            bar = f'document.querySelector("{shown} [role=progressbar]")?.ariaValueNow'
            page.wait_for_function(f"{bar} > 0")
            first = int(page.evaluate(bar))
            page.wait_for_function(f"{bar} > {first}")
            page.wait_for_selector(f"{shown} .tb-pictures a img")
            with page.context.expect_page() as opened:
                page.click(f"{shown} .tb-pictures a")
            opened.value.wait_for_load_state()
            assert opened.value.evaluate("document.images[0].naturalWidth") == 64
            opened.value.close()
            app.finished(number)
            page.once("dialog", lambda dialog: dialog.accept())
            page.locator(f"{shown} button", has_text="Save as pack").click()
            wait_for(lambda title=f"page-{number}": app.http.get(f"/p/{title}").status_code == 200)
            assert all(one.startswith((url, "data:", "blob:")) for one in outside)
        assert refused == []
