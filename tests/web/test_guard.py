"""The outermost layer: what is answered before the app is there, who may come in, and how much they may send."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from tests.helpers.web import left_behind
from trainer.settings import Settings, read_settings
from trainer.studio.rows import Services
from trainer.web.guard import Guard, time
from trainer.web.rest import create_app

pytest_plugins = ("tests.helpers.web",)

HERE = "http://127.0.0.1:7860"
KEY = "a key; with = signs"


def small_app() -> FastAPI:
    """What stands behind the guard."""
    app = FastAPI()

    @app.get("/")
    @app.post("/")
    @app.get("/tunes")
    @app.get("/files/1/photo.png")
    def answer() -> dict[str, str]:
        return {"answer": "from the app"}

    return app


def nothing() -> None:
    """Nothing is to be started or ended in these tests."""


@contextmanager
def guarded(
    settings: Settings,
    load: Callable[[], Any] = small_app,
    begin: Callable[[], None] = nothing,
    unload: Callable[[], None] = nothing,
) -> Iterator[TestClient]:
    """A client of the guard, its lifespan running; what is loaded is loaded in the background."""
    guard = Guard(settings, load=load, begin=begin, unload=unload)
    with TestClient(guard, base_url=settings.base_url, follow_redirects=False) as client:
        yield client


@pytest.fixture
def open_settings(settings: Settings) -> Settings:
    """Bound to all addresses, with a key set."""
    return read_settings(outputs=settings.outputs, models=settings.models, host="0.0.0.0", key=KEY)


# Before, while and after the app is loaded


def test_health_says_why_the_models_folder_cannot_be_read(settings: Settings, open_settings: Settings) -> None:
    """A link to a drive that is not connected: the app goes on, with the bases of the presets."""
    settings.models.rmdir()
    settings.models.symlink_to("/mnt/not-mounted")
    with guarded(settings) as client:
        (warning,) = client.get("/health").json()["warnings"]
        assert "is a link to a folder that is not there; connect its drive" in warning
        settings.models.unlink()
        settings.models.mkdir()
        assert "warnings" not in client.get("/health").json()
        settings.models.rmdir()
    with guarded(open_settings) as client:
        assert client.get("/health").json().keys() == {"status", "ready"}  # to whom has no key
        assert "warnings" in client.get("/health", headers={"Authorization": f"Bearer {KEY}"}).json()


def test_health_and_a_waiting_page_come_before_the_app(settings: Settings) -> None:
    loaded, begun = threading.Event(), threading.Event()

    def load() -> FastAPI:
        loaded.wait()
        return small_app()

    with guarded(settings, load, begun.set) as client:
        assert client.get("/health").json() == {"status": "ok", "ready": False}
        page = client.get("/")
        assert page.status_code == 200 and "Getting ready" in page.text
        assert "fetch('/health')" in page.text  # it turns into the real page by itself
        assert page.headers["cache-control"] == "no-store"
        assert not begun.is_set()

        answers: list[Any] = []
        early = threading.Thread(target=lambda: answers.append(client.get("/tunes").json()))
        early.start()
        assert client.get("/health").json()["ready"] is False and answers == []
        loaded.set()
        early.join()  # a request that came too early was kept waiting, not refused
        assert answers == [{"answer": "from the app"}]
        assert client.get("/").json() == {"answer": "from the app"}
        assert client.get("/health").json() == {"status": "ok", "ready": True}
        begun.wait()


def test_what_was_started_is_ended_with_the_app(settings: Settings) -> None:
    told: list[str] = []
    with guarded(
        settings, small_app, begin=lambda: told.append("begin"), unload=lambda: told.append("unload")
    ) as client:
        client.post("/")
    assert told == ["begin", "unload"]


def test_an_app_that_cannot_be_loaded_is_reported_as_failed(settings: Settings) -> None:
    told: list[str] = []

    def load() -> FastAPI:
        raise OSError("SECRET reason")

    with guarded(settings, load, unload=lambda: told.append("unload")) as client:
        response = client.post("/")
        assert response.status_code == 503
        assert response.json() == {"error": "Tunebooth could not start; its log says why"}
        assert client.get("/").status_code == 503  # the waiting page would wait for ever
        assert client.get("/health").json() == {"status": "failed", "ready": False}
    assert told == []


# Host and Origin


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:7860", 200), ("127.0.0.1", 200), ("localhost:7860", 200), ("LOCALHOST", 200), ("[::1]:7860", 200),
        ("127.0.0.1:1", 200),  # a tunnel's other end
        ("evil.example", 403), ("evil.example:7860", 403), ("127.0.0.1.evil.example", 403), ("localhost.evil", 403),
        ("127.0.0.1@evil.example", 403), ("0.0.0.0", 403), ("192.168.0.2", 403),
        ("", 403), ("[::2]", 403),
    ],
)  # fmt: skip
def test_on_loopback_only_loopback_names_are_answered(settings: Settings, host: str, status: int) -> None:
    with guarded(settings) as client:
        response = client.post("/", headers={"Host": host})
        assert response.status_code == status
        assert status == 200 or "Host header" in response.json()["error"]
        assert client.get("/health", headers={"Host": host}).status_code == 200  # it tells nothing


def test_the_public_address_is_answered_too(settings: Settings) -> None:
    public = settings.model_copy(update={"public_url": "https://tunes.example/"})
    with guarded(public) as client:
        for host in ("tunes.example", "127.0.0.1:7860"):
            assert client.post("/", headers={"Host": host}).status_code == 200
        assert client.post("/", headers={"Host": "evil.example"}).status_code == 403


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        (None, 200), (HERE, 200),
        ("http://localhost:7860", 403),  # another name than the Host header's: not the page that we served
        ("http://127.0.0.1:8000", 403), ("http://127.0.0.1", 403), ("https://evil.example", 403), ("null", 403),
        ("http://127.0.0.1:7860.evil.example", 403), ("http://127.0.0.1:7860@evil.example", 403), ("", 403),
    ],
)  # fmt: skip
def test_pages_of_other_sites_may_not_send(settings: Settings, origin: str | None, status: int) -> None:
    with guarded(settings) as client:
        response = client.post("/", headers={} if origin is None else {"Origin": origin})
        assert response.status_code == status
        assert status == 200 or "are refused" in response.json()["error"]


def test_a_page_may_send_under_the_name_it_was_opened_with(settings: Settings, open_settings: Settings) -> None:
    with guarded(settings) as client:
        headers = {"Host": "localhost:7860", "Origin": "http://localhost:7860"}
        assert client.post("/", headers=headers).status_code == 200
    with guarded(open_settings) as client:
        headers = {"Host": "studio.lan:7860", "Origin": "http://studio.lan:7860", "Authorization": f"Bearer {KEY}"}
        assert client.post("/", headers=headers).status_code == 200
        assert client.post("/", headers=headers | {"Origin": "http://evil.lan"}).status_code == 403


# The key


def test_without_a_key_on_loopback_the_authorization_header_is_ignored(settings: Settings) -> None:
    with guarded(settings) as client:
        assert client.post("/").status_code == 200
        assert client.post("/", headers={"Authorization": "Bearer sd_anything"}).status_code == 200


@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        (f"Bearer {KEY}", 200), (f"bearer  {KEY} ", 200), ("Bearer", 401), ("Bearer ", 401), (KEY, 401),
        (f"Basic {KEY}", 401), (f"Bearer {KEY}x", 401), (f"Bearer {KEY[:-1]}", 401), ("Bearer \u00e9", 401),
    ],
)  # fmt: skip
def test_bound_elsewhere_the_key_is_needed(open_settings: Settings, authorization: str, status: int) -> None:
    with guarded(open_settings) as client:
        refused = client.post("/")
        assert (refused.status_code, list(refused.json())) == (401, ["error"])
        response = client.post("/", headers={"Authorization": authorization.encode("latin-1")})
        assert response.status_code == status


def test_bound_elsewhere_a_key_is_made_where_none_is_set(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    bound = read_settings(outputs=settings.outputs, models=settings.models, host="0.0.0.0")
    with guarded(bound) as client:
        assert client.post("/").status_code == 401
        made = capsys.readouterr().err.split()[-1]
        assert client.post("/", headers={"Authorization": f"Bearer {made}"}).status_code == 200


def test_an_address_that_tries_many_keys_has_to_wait(open_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    moment = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: moment[0])
    with guarded(open_settings) as client:
        tried = [client.post("/", headers={"Authorization": f"Bearer {n}"}).status_code for n in range(12)]
        assert tried == [401] * 9 + [429] * 3
        even_the_right_one = client.post("/", headers={"Authorization": f"Bearer {KEY}"})
        assert (even_the_right_one.status_code, even_the_right_one.headers["retry-after"]) == (429, "60")
        assert client.post("/login", data={"key": KEY}).status_code == 429
        assert client.get("/health").status_code == client.get("/files/1/photo.png").status_code == 200
        moment[0] += 61
        assert client.post("/", headers={"Authorization": f"Bearer {KEY}"}).status_code == 200
        tried = [client.post("/", headers={"Authorization": f"Bearer {n}"}).status_code for n in range(12)]
        assert tried == [401] * 12  # behind a proxy, the owner has the same address as everybody
        assert client.post("/", headers={"Authorization": f"Bearer {KEY}"}).status_code == 200


def test_a_set_key_is_needed_on_loopback_too(settings: Settings) -> None:
    with guarded(read_settings(outputs=settings.outputs, models=settings.models, key=KEY)) as client:
        assert client.post("/").status_code == 401
        assert client.post("/", headers={"Authorization": f"Bearer {KEY}"}).status_code == 200


def test_a_browser_signs_in_once(open_settings: Settings) -> None:
    with guarded(open_settings) as client:
        page = client.get("/", headers={"Accept": "text/html"})
        assert page.status_code == 401 and '<form method=post action="/login">' in page.text
        wrong = client.post("/login", data={"key": "wrong"})
        assert wrong.status_code == 401 and "That is not the key." in wrong.text
        assert client.get("/", headers={"Accept": "text/html"}).status_code == 401
        right = client.post("/login", data={"key": KEY})
        assert (right.status_code, right.headers["location"]) == (303, "/")
        cookie = right.headers["set-cookie"]
        assert "HttpOnly" in cookie and "SameSite=Lax" in cookie
        assert client.get("/").json() == {"answer": "from the app"}  # the client kept the cookie


def test_on_a_space_the_cookie_is_one_for_frames(open_settings: Settings) -> None:
    with guarded(open_settings.model_copy(update={"public_url": "https://me-tunes.hf.space"})) as client:
        cookie = client.post("/login", data={"key": KEY}).headers["set-cookie"]
        assert "SameSite=None; Secure; Partitioned" in cookie


@pytest.mark.parametrize(
    ("cookie", "status"),
    [
        ("tunebooth_key=wrong", 401), ("tunebooth_key", 401), ("", 401), ("a@b=1; /=2; {}; =;;", 401),
        ("a@b=1; x={\"y\":[1]}; tunebooth_key={key}; z", 200),  # cookies of other apps on this host come along
    ],
)  # fmt: skip
def test_cookies_of_all_kinds_are_read(open_settings: Settings, cookie: str, status: int) -> None:
    with guarded(open_settings) as client:
        signed_in = client.post("/login", data={"key": KEY}).headers["set-cookie"]
        client.cookies.clear()
        key = signed_in.partition(";")[0].partition("=")[2]
        assert client.post("/", headers={"Cookie": cookie.replace("{key}", key)}).status_code == status


def test_files_are_open_and_paths_that_look_like_it_are_not(open_settings: Settings) -> None:
    with guarded(open_settings) as client:
        assert client.get("/files/1/photo.png").status_code == 200  # its link carries a signature
        assert client.get("/health").status_code == 200
        for path in ("/", "/files", "/filesystem", "/tunes", "/x/files/1", "/healthy", "/login", "/loginx"):
            assert client.get(path).status_code == 401, path


def test_the_waiting_page_needs_the_key(open_settings: Settings) -> None:
    loaded = threading.Event()
    with guarded(open_settings, lambda: (loaded.wait(), small_app())[1]) as client:
        assert client.get("/", headers={"Accept": "text/html"}).status_code == 401
        loaded.set()


# How much may be sent


@pytest.fixture
def narrow(services: Services) -> Services:
    """Requests of at most one megabyte."""
    return Services(
        services.settings.model_copy(update={"max_body_mb": 1}), services.store, services.decoder, services.analyzer
    )


TOO_LARGE = {"error": "the request is larger than 1 MB"}


def test_a_body_that_says_it_is_too_long_is_refused_unread(narrow: Services) -> None:
    chunks = [b" " * 2**16] * 16
    status, body, read = asyncio.run(streamed(narrow, chunks, "application/json", length=2**20 + 1))
    assert (status, json.loads(body), read) == (413, TOO_LARGE, 0)
    status, body, read = asyncio.run(streamed(narrow, chunks, "application/json", length=2**20))
    assert (status, read) == (400, 16)  # a megabyte is read, and found to be no JSON


KINDS = ["application/json", "multipart/form-data; boundary=b", "application/x-www-form-urlencoded"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_body_that_does_not_say_how_long_it_is_is_cut_off(narrow: Services, kind: str) -> None:
    """Chunks come one by one, without a Content-Length, as from a client that streams."""
    head = b'--b\r\nContent-Disposition: form-data; name="tune[images][]"; filename="a.png"\r\n\r\n'
    chunks = [head if kind.startswith("multipart") else b"", *[b"x" * 2**16] * 1000]
    status, body, read = asyncio.run(streamed(narrow, chunks, kind))
    assert (status, json.loads(body)) == (413, TOO_LARGE)
    assert read < 20  # of a thousand
    assert left_behind(narrow) == []


async def streamed(
    services: Services, chunks: list[bytes], kind: str, length: int | None = None
) -> tuple[int, bytes, int]:
    """POST /tunes straight to the guard; returns the status, the body and how many chunks were read."""
    guard = Guard(services.settings, load=lambda: create_app(services), begin=nothing, unload=nothing)
    life: asyncio.Queue[Any] = asyncio.Queue()
    answer: asyncio.Queue[Any] = asyncio.Queue()
    read = 0

    async def receive() -> dict[str, Any]:
        nonlocal read
        read += 1
        return {"type": "http.request", "body": chunks[read - 1], "more_body": read < len(chunks)}

    life.put_nowait({"type": "lifespan.startup"})
    running = asyncio.create_task(guard({"type": "lifespan"}, life.get, asyncio.Queue().put))
    headers = [(b"host", b"127.0.0.1:7860"), (b"content-type", kind.encode())]
    headers += [] if length is None else [(b"content-length", str(length).encode())]
    await guard(
        {"type": "http", "method": "POST", "path": "/tunes", "query_string": b"", "headers": headers},
        receive,
        answer.put,
    )
    life.put_nowait({"type": "lifespan.shutdown"})
    await running
    start, body = answer.get_nowait(), answer.get_nowait()
    assert answer.empty()
    return start["status"], body["body"], read
