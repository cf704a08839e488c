"""Idempotency: an equal request answers what it has made, another one with the same title makes a new tune."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from tests.helpers.web import client_of, photo
from trainer.contract.fields import parse_request
from trainer.contract.tunes import TuneRequest
from trainer.settings import read_settings
from trainer.studio.idempotency import body_digest
from trainer.studio.rows import Services

pytest_plugins = ("tests.helpers.web",)

PHOTO = ("tune[images][]", ("a.png", photo()))
ANOTHER = ("tune[images][]", ("a.png", photo("red")))


def post(client: TestClient, *photos: Any, **fields: Any) -> httpx.Response:
    data = {"title": "my portrait", "name": "dog", "branch": "fast"} | fields
    return client.post(
        "/tunes",
        files=list(photos or [PHOTO]),
        data={f"tune[{name}]": value for name, value in data.items()},
    )


@pytest.mark.parametrize(
    ("photos", "fields"),
    [
        ([ANOTHER], {}),
        ([PHOTO, ANOTHER], {}),
        ([PHOTO], {"name": "cat"}),
        ([PHOTO], {"callback": "https://example.com/customer/2"}),
        ([PHOTO], {"steps": "12"}),
        ([PHOTO], {"characteristics][colour": "red"}),
        ([PHOTO], {"prompts_attributes][][text": "ohwx dog"}),
    ],
)
def test_another_request_with_the_same_title_makes_a_new_tune_and_a_warning(
    client: TestClient, photos: list[Any], fields: dict[str, str]
) -> None:
    first = post(client).json()
    other = post(client, *photos, **fields)
    assert other.status_code == 201 and other.json()["id"] != first["id"]
    (warning,) = [one for one in other.json()["warnings"] if "title" in one]
    assert warning == f"tune {first['id']} has the same title, and was another request; this is a new tune"
    for answer, again in ((first, post(client)), (other.json(), post(client, *photos, **fields))):
        assert again.status_code == 200 and again.json()["id"] == answer["id"]


def test_a_form_and_json_are_the_same_request_and_nulls_do_not_count(client: TestClient, services: Services) -> None:
    asked = {"title": "Rex", "name": "dog", "branch": "fast", "image_urls": ["https://example.com/a.png"]}
    first = post(client, title="Rex").json()["id"]
    digest = body_digest(parse_request(TuneRequest, asked))
    services.store.update("tunes", first, body_digest=digest)  # as if its photo had come from that URL
    form = {
        "tune[title]": "Rex",
        "tune[name]": "dog",
        "tune[branch]": "fast",
        "tune[image_urls][]": asked["image_urls"],
    }
    for body in (
        {"data": form},
        {"json": {"tune": asked}},
        {"json": {"tune": asked | {"steps": None, "callback": None}}},
    ):
        answer = client.post("/tunes", **body)  # type: ignore[arg-type]
        assert (answer.status_code, answer.json()["id"]) == (200, first)


@pytest.mark.parametrize("status", ["failed", "canceled", "expired"])
def test_a_tune_without_a_model_answers_for_nothing(client: TestClient, services: Services, status: str) -> None:
    first = post(client).json()["id"]
    services.store.update("tunes", first, status=status)
    again = post(client)
    assert again.status_code == 201 and again.json()["id"] != first
    assert not [one for one in again.json()["warnings"] if "title" in one]


def test_a_tune_of_an_older_version_answers_for_nothing(client: TestClient, services: Services) -> None:
    first = post(client).json()["id"]
    services.store.update("tunes", first, body_digest=None)
    assert post(client).status_code == 201


def test_a_title_may_be_taken_by_a_change(client: TestClient) -> None:
    first, second = post(client).json()["id"], post(client, title="other").json()["id"]
    assert client.patch(f"/tunes/{second}", json={"tune": {"title": "my portrait"}}).json()["title"] == "my portrait"
    assert post(client).json()["id"] == first


def test_equal_and_unequal_requests_at_once(client: TestClient) -> None:
    """Eight equal ones make one tune; eight that differ in their callback make eight."""
    start = threading.Barrier(16)

    def ask(number: int) -> tuple[int, int]:
        start.wait()
        fields = {} if number < 8 else {"callback": f"https://example.com/{number}"}
        answer = post(client, **fields)
        return answer.status_code, answer.json()["id"]

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(16)))
    assert len({tune_id for _, tune_id in answers[:8]}) == 1
    assert Counter(status for status, _ in answers[:8]) == {201: 1, 200: 7}
    assert len({tune_id for _, tune_id in answers[8:]}) == 8 and {status for status, _ in answers[8:]} == {201}


@pytest.mark.parametrize("setting", ["tunes", "all", "off"])
def test_an_equal_prompt_answers_the_earlier_one_where_that_is_set(services: Services, setting: str) -> None:
    chosen = services.settings.model_copy(update={"idempotency": setting})
    client = client_of(Services(chosen, services.store, services.decoder, services.analyzer))
    tune = post(client).json()["id"]
    ask = {"prompt": {"text": "ohwx dog", "seed": 3}}
    first, again = (client.post(f"/tunes/{tune}/prompts", json=ask).json()["id"] for _ in range(2))
    assert (first == again) == (setting == "all")
    assert client.post(f"/tunes/{tune}/prompts", json={"prompt": {"text": "ohwx dog", "seed": 4}}).json()["id"] != first
    services.store.update("prompts", first, status="failed")
    services.store.update("prompts", again, status="failed")
    assert client.post(f"/tunes/{tune}/prompts", json=ask).json()["id"] not in (first, again)
    copied = client.post(f"/prompts/{first}/duplicate").json()["id"]
    assert client.post(f"/prompts/{first}/duplicate").json()["id"] != copied, "a copy is always a new prompt"


@pytest.mark.parametrize(
    ("given", "chosen"),
    [
        ("true", "tunes"), ("false", "off"), ("True", "tunes"), ("0", "off"), ("1", "tunes"), ("all", "all"),
        ("off", "off"), ("tunes", "tunes"),
    ],
)  # fmt: skip
def test_the_setting_takes_its_old_values(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, given: str, chosen: str
) -> None:
    folders = {"outputs": tmp_path / "outputs", "models": tmp_path / "models"}
    monkeypatch.setenv("TUNEBOOTH_IDEMPOTENCY", given)
    assert read_settings(**folders).idempotency == chosen
    assert read_settings(["--no-idempotency"], **folders).idempotency == "off"
    assert read_settings(["--idempotency", "all"], **folders).idempotency == "all"
