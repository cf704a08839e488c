"""Errors in one shape, and addresses and methods as Rails reads them."""

from __future__ import annotations

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from tests.helpers.api import GOOD, create, post
from tests.helpers.web import client_of
from trainer.contract.rows import CallbackRow
from trainer.studio.rows import Services
from trainer.studio.webhooks import entity
from trainer.web.paths import answer_as_rest
from trainer.web.rest import create_app
from trainer.work.errors import explain

pytest_plugins = ("tests.helpers.web",)

NO_ROUTE = ["/nothing", "/tunes/1/nothing", "/tunesx", "/prompts/1/a/b", "/p/", "/photos/", "/gallery/nothing"]
NO_METHOD = [
    ("DELETE", "/tunes"),
    ("POST", "/presets"),
    ("PUT", "/tunes"),
    ("GET", "/photos/check"),
    ("PATCH", "/packs"),
]


def test_no_route_and_no_method_have_the_shape_of_all_errors(services: Services) -> None:
    """Also with an app mounted at the root, as the page is: it would answer {"detail": "Not Found"}."""
    app, mounted = create_app(services), FastAPI()
    mounted.get("/only")(lambda: {})
    answer_as_rest(mounted)
    app.mount("/", mounted)
    client = TestClient(app)
    for path in NO_ROUTE:
        answer = client.get(path)
        assert (answer.status_code, list(answer.json())) == (404, ["error"]), path
    for method, path in [*NO_METHOD, ("POST", "/only")]:
        answer = client.request(method, path)
        assert (answer.status_code, list(answer.json())) == (405, ["error"]), (method, path)
        assert method == "POST" or answer.headers["allow"], "HTTP: a 405 names the methods (RFC 9110, 15.5.6)"


def test_a_trailing_slash_head_and_put(client: TestClient) -> None:
    assert post(client, GOOD, "/tunes/").status_code == 201
    whole = client.get("/tunes/1")
    for path in ("/tunes/1/", "/tunes/1.json", "/tunes/1.json/"):
        assert client.get(path).json()["id"] == 1, path
        head = client.head(path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-type"] == whole.headers["content-type"]
    assert client.head("/tunes/99").status_code == 404
    changed = client.put("/tunes/1", json={"tune": {"title": "Rex II"}})
    assert (changed.status_code, changed.json()["title"]) == (200, "Rex II")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError("tiny is not a local folder"), "tiny is not a local folder"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (RuntimeError("RuntimeError: ValueError: a bug"), "a bug"),
        (KeyError("a"), "'a'"),
        (AssertionError(), "it gave no reason"),
    ],
)
def test_errors_have_no_names_of_classes(error: Exception, words: str) -> None:
    assert explain(error) == f"unexpected error: {words}; the app's log has the details"


def test_the_callback_of_a_failed_tune_says_why(services: Services) -> None:
    client = client_of(services)
    text = ("tune[prompts_attributes][][text]", "a dog")
    create(client, "Rex", text, ("tune[callback]", "https://example.com/done"))
    job = services.store.claim()
    assert job
    services.store.finish(job, "failed", error="the base cannot be read")
    callback: CallbackRow = services.store.waiting_callbacks()[0]
    tune = entity(services, callback)["tune"]
    assert isinstance(tune, dict)
    assert (tune["status"], tune["error"], tune["trained_at"]) == ("failed", "the base cannot be read", None)
    why = "the tune was not trained: the base cannot be read"
    assert [(one["user_error"], one["images"]) for one in tune["prompts"]] == [(why, [])]


def test_what_rails_forgives_in_bodies(client: TestClient) -> None:
    """As the hosted service: JSON without the wrapper, `null` as a word, 0 steps, characteristics of any scalar."""
    create(client)
    told = {"characteristics": {"age": 31, "glasses": False, "height": 1.5, "hat": None, "hair": "red"}}
    changed = client.patch("/tunes/1", json=told)
    assert changed.status_code == 200, changed.text
    wanted = {"age": "31", "glasses": "false", "height": "1.5", "hat": "", "hair": "red"}
    assert changed.json()["characteristics"] == wanted
    assert client.patch("/tunes/1", json={"characteristics": {"hair": ["red"]}}).status_code == 422
    empty = [(f"tune[{name}]", "null") for name in ("preset", "model_type", "base_tune_id", "token", "callback")]
    made = post(client, [("tune[title]", "Max"), *GOOD[1:], *empty, ("tune[steps]", "0"), ("tune[face_crop]", "null")])
    assert made.status_code == 201, made.text
    assert [made.json()[name] for name in ("preset", "callback", "face_crop", "steps")] == [None] * 4
    prompt = client.post("/tunes/1/prompts.json", json={"text": "a dog", "steps": 0, "style": "null"})
    assert prompt.status_code == 201, prompt.text
    assert (prompt.json()["steps"], prompt.json()["style"]) == (None, None)
    assert list(client.post("/tunes/1/prompts", json={"txt": "a dog"}).json()) == ["text", "txt"]
