"""REST: bodies of every kind, what is refused, and what is answered. No worker runs here."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from datetime import datetime
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import httpx
import pytest
from fastapi.testclient import TestClient
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ssrfguard import SSRFGuardError

from tests.helpers.api import GOOD, PHOTO, Fields, create, flatten, post
from tests.helpers.fast import FAST_ID
from tests.helpers.shared import SHARED
from tests.helpers.web import address, client_of, left_behind, multipart
from trainer.contract.tunes import Tune
from trainer.library import bases
from trainer.names import BRANCHES
from trainer.photos.urls import PHOTOS, _client
from trainer.studio import rows
from trainer.studio.links import make_link
from trainer.studio.rows import Services
from trainer.web.bodies import Malformed, nest

pytest_plugins = ("tests.helpers.web",)


@pytest.fixture
def private(services: Services) -> Services:
    """The same store for an owner who allows image_urls of private addresses."""
    return Services(
        services.settings.model_copy(update={"private_urls": "allow"}),
        services.store,
        services.decoder,
        services.analyzer,
    )


# One request in all the ways in which it can be said; what it says is in ASKED.

ASKED = {
    "title": "Jane Doe - UUID - 1234-6789",
    "name": "woman",
    "token": "zwx",
    "branch": "fast",
    "steps": 120,
    "face_crop": True,
    "training_face_correct": False,
    "model_type": "lora",
    "base_tune_id": 690204,
    "characteristics": {"eye_color": "blue eyes", "Ärmel-1": "red"},
}
ASKED_PROMPTS = [
    {"text": "zwx woman, {{eye_color}}", "num_images": 2, "seed": 7, "cfg_scale": 2.5, "w": 64, "h": 64},
    {"text": "zwx woman & a dög", "num_images": 8, "seed": None, "cfg_scale": None, "w": None, "h": None},
]
SCALARS: Fields = [
    ("tune[title]", "Jane Doe - UUID - 1234-6789"), ("tune[name]", "woman"), ("tune[token]", "zwx"),
    ("tune[branch]", "fast"), ("tune[steps]", "120"), ("tune[face_crop]", "true"), ("tune[callback]", ""),
    ("tune[training_face_correct]", "0"), ("tune[model_type]", "lora"), ("tune[base_tune_id]", "690204"),
]  # fmt: skip
NESTED: Fields = [("tune[characteristics][eye_color]", "blue eyes"), ("tune[characteristics][Ärmel-1]", "red")]
IN_ONE_TEXT: Fields = [("tune[characteristics]", '{"eye_color": "blue eyes", "Ärmel-1": "red"}')]
WITHOUT_NUMBERS: Fields = [
    ("tune[prompts_attributes][][text]", "zwx woman, {{eye_color}}"),
    ("tune[prompts_attributes][][num_images]", "2"),
    ("tune[prompts_attributes][][seed]", "7"),
    ("tune[prompts_attributes][][cfg_scale]", "2.5"),
    ("tune[prompts_attributes][][w]", "64"),
    ("tune[prompts_attributes][][h]", "64"),
    ("tune[prompts_attributes][][super_resolution]", "true"),
    ("tune[prompts_attributes][][text]", "zwx woman & a dög"),
]
NUMBERED: Fields = [
    ("tune[prompts_attributes][0][text]", "zwx woman, {{eye_color}}"),
    ("tune[prompts_attributes][1][text]", "zwx woman & a dög"),
    ("tune[prompts_attributes][0][num_images]", "2"),
    ("tune[prompts_attributes][0][seed]", "7"),
    ("tune[prompts_attributes][0][cfg_scale]", "2.5"),
    ("tune[prompts_attributes][0][w]", "64"),
    ("tune[prompts_attributes][0][h]", "64"),
    ("tune[prompts_attributes][0][super_resolution]", "true"),
    ("tune[prompts_attributes][1][seed]", ""),
]


def as_multipart(fields: Fields) -> tuple[bytes, dict[str, str]]:
    return multipart(fields)


def as_urlencoded(fields: Fields) -> tuple[bytes, dict[str, str]]:
    return urlencode(fields).encode(), {"Content-Type": "application/x-www-form-urlencoded; charset=utf-8"}


def as_json(fields: Fields) -> tuple[bytes, dict[str, str]]:
    """With numbers as strings, as the fields have them: JSON takes these too."""
    return json.dumps(nest(fields)).encode(), {"Content-Type": "application/json"}


@pytest.mark.parametrize("urls", ["tune[image_urls][]", "tune[image_urls][0]"])
@pytest.mark.parametrize("prompts", [WITHOUT_NUMBERS, NUMBERED], ids=["[]", "[0]"])
@pytest.mark.parametrize("characteristics", [NESTED, IN_ONE_TEXT], ids=["nested", "in one text"])
@pytest.mark.parametrize("encode", [as_multipart, as_urlencoded, as_json])
def test_one_request_written_in_many_ways_has_one_answer(
    private: Services,
    photo_server: ThreadingHTTPServer,
    encode: Callable[[Fields], tuple[bytes, dict[str, str]]],
    characteristics: Fields,
    prompts: Fields,
    urls: str,
) -> None:
    fields = [*SCALARS, *characteristics, *prompts, (urls, f"{address(photo_server)}/a.png")]
    body, headers = encode(fields)
    response = client_of(private).post("/tunes", content=body, headers=headers)
    assert response.status_code == 201, response.text
    tune = response.json()
    assert {name: tune[name] for name in ASKED} == ASKED
    assert [{name: prompt[name] for name in ASKED_PROMPTS[0]} for prompt in tune["prompts"]] == ASKED_PROMPTS
    assert [photo["name"] for photo in tune["photos"]] == ["a.png"]
    assert tune["callback"] is None
    assert tune["prompts"][0]["warnings"] == []


def test_json_takes_numbers_booleans_and_null_as_well(private: Services, photo_server: ThreadingHTTPServer) -> None:
    prompts = [ASKED_PROMPTS[0] | {"super_resolution": True}, {"text": "zwx woman & a dög", "seed": None}]
    asked = ASKED | {"callback": None, "preset": None, "image_urls": [f"{address(photo_server)}/a.png"]}
    response = client_of(private).post("/tunes", json={"tune": asked | {"prompts_attributes": prompts}})
    assert response.status_code == 201, response.text
    tune = response.json()
    assert {name: tune[name] for name in ASKED} == ASKED
    assert [{name: prompt[name] for name in ASKED_PROMPTS[0]} for prompt in tune["prompts"]] == ASKED_PROMPTS


def test_the_same_title_answers_the_same_tune_before_anything_is_fetched(
    private: Services, photo_server: ThreadingHTTPServer
) -> None:
    client = client_of(private)
    asked = {"title": "Rex", "name": "dog", "branch": "fast", "image_urls": [f"{address(photo_server)}/a.png"]}
    first, again = (client.post("/tunes", json={"tune": asked}) for _ in range(2))
    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json()["id"] == again.json()["id"]
    assert photo_server.asked == ["/a.png"]  # type: ignore[attr-defined]
    other = client.post("/tunes", json={"tune": asked | {"title": "Rexa"}})
    assert (other.status_code, other.json()["id"]) == (201, 2)


def test_a_title_is_free_again_when_its_tune_is_deleted(client: TestClient) -> None:
    first = create(client)
    assert post(client, GOOD).status_code == 200
    assert client.delete(f"/tunes/{first['id']}").status_code == 200
    assert create(client)["id"] != first["id"]


def test_titles_may_repeat_where_that_is_set(services: Services) -> None:
    client = client_of(
        Services(
            services.settings.model_copy(update={"idempotency": "off"}),
            services.store,
            services.decoder,
            services.analyzer,
        )
    )
    assert [post(client, GOOD).status_code for _ in range(2)] == [201, 201]


# Answers

OURS = [
    "callback", "preset", "characteristics", "auto_extend", "status", "progress", "error", "warnings", "photos",
    "prompts",
]  # fmt: skip


def test_a_tune_has_the_document_s_keys_in_its_order_then_ours(client: TestClient) -> None:
    document = SHARED / "reference" / "create-a-tune.txt"
    if not document.exists():
        pytest.skip("../shared/reference is not on this machine")
    sample = json.loads(document.read_text("utf-8").partition("\nResponse\n")[2])
    assert list(create(client)) == [*sample, *OURS] == list(Tune.model_fields)


def test_a_new_tune_says_what_was_made_of_the_request(client: TestClient) -> None:
    tune = create(client, "Rex", ("tune[preset]", "flux-lora-fast"), ("tune[prompts_attributes][][text]", "ohwx dog"))
    nothing_yet = ("eta", "trained_at", "started_training_at", "expires_at", "ckpt_url", "error", "steps")
    assert [tune[name] for name in nothing_yet] == [None] * len(nothing_yet)
    assert (tune["status"], tune["ckpt_urls"], tune["token"]) == ("queued", [], "ohwx")
    assert re.search(r"\bsteps=128\b.*\bseed=42\b", tune["args"])  # what null became
    assert tune["url"] == "http://127.0.0.1:7860/tunes/1.json"
    for moment in (tune["created_at"], tune["updated_at"]):
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", moment)
        assert datetime.fromisoformat(moment)
    assert any("1 photos are few" in warning for warning in tune["warnings"])
    assert any("preset flux-lora-fast is not used" in warning for warning in tune["warnings"])
    (prompt,) = tune["prompts"]
    assert (prompt["status"], prompt["num_images"], prompt["images"]) == ("queued", 8, [])
    assert (prompt["tune_id"], prompt["tunes"]) == (1, [1])


def test_what_has_no_effect_is_named_and_not_refused(client: TestClient) -> None:
    tune = create(client, "Rex", ("tune[is_api]", "true"), ("tune[resolution]", "1024"))
    assert {"is_api is accepted and has no effect", "resolution is accepted and has no effect"} <= {*tune["warnings"]}


@pytest.mark.parametrize("path", ["/tunes", "/tunes/1", "/tunes/1/prompts", "/prompts", "/prompts/1", "/presets"])
def test_a_json_suffix_changes_nothing(client: TestClient, path: str) -> None:
    create(client, "Rex", ("tune[prompts_attributes][][text]", "ohwx dog"))
    plain, suffixed = client.get(path), client.get(f"{path}.json")
    assert plain.status_code == suffixed.status_code == 200
    assert without_signatures(plain.text) == without_signatures(suffixed.text)


def test_a_json_suffix_is_taken_on_post_too(client: TestClient) -> None:
    assert post(client, GOOD, "/tunes.json").status_code == 201
    assert client.post("/tunes/1/cancel.json").json()["status"] == "canceled"


def without_signatures(text: str) -> str:
    """Links to models end at the next full hour, which may come between two requests."""
    return re.sub(r"expires=\d+&signature=\w+", "", text)


PAGES = {
    "": [5, 4, 3, 2, 1],
    "limit=2": [5, 4],
    "limit=2&offset=2": [3, 2],
    "offset=5": [],
    "before_id=3": [2, 1],
    "before_id=3&limit=1": [2],
    "title=tune%203": [3],
    "title=tune": [],
    "branch=sd15": [2],
    "branch=fast&limit=3": [5, 4, 3],
    "model_type=lora": [4],
    "model_type=lora&branch=sd15": [],
}


def test_tunes_are_listed_newest_first_in_pages_and_by_filter(client: TestClient, services: Services) -> None:
    for number in range(1, 6):
        more: Fields = [("tune[model_type]", "lora")] if number == 4 else []
        create(client, f"tune {number}", *more)
    services.store.update("tunes", 2, branch="sd15")
    assert {query: [tune["id"] for tune in client.get(f"/tunes?{query}").json()] for query in PAGES} == PAGES


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("limit=0", "limit"),
        ("limit=121", "limit"),
        ("limit=many", "limit"),
        ("offset=-1", "offset"),
        ("offset=99999999999999999999", "offset"),
        ("before_id=99999999999999999999", "before_id"),
    ],
)
def test_a_page_that_does_not_exist_is_refused(client: TestClient, query: str, field: str) -> None:
    response = client.get(f"/tunes?{query}")
    assert (response.status_code, list(response.json())) == (422, [field])


@pytest.mark.parametrize("query", ["before_id=", "title=", "limit=120&offset=0&before_id=", "name[]="])
def test_an_empty_value_is_none(client: TestClient, query: str) -> None:
    response = client.get(f"/tunes?{query}")
    assert (response.status_code, response.json()) == (200, [])


NOWHERE = [
    "GET /tunes/7", "DELETE /tunes/7", "POST /tunes/7/cancel", "POST /tunes/7/resume", "GET /tunes/7/model",
    "GET /tunes/7/prompts", "GET /prompts/7", "GET /tunes/1/prompts/7", "GET /tunes/2/prompts/1", "GET /tunes/1/model",
    "GET /tunes/0", "GET /tunes/-1", "GET /tunes/99999999999999999999", "GET /tunes/Rex", "GET /nothing",
]  # fmt: skip


def test_what_is_not_there_is_404(client: TestClient) -> None:
    create(client, "Rex", ("tune[prompts_attributes][][text]", "ohwx dog"))
    create(client, "Ada")
    for request in NOWHERE:
        response = client.request(*request.split())
        assert (response.status_code, list(response.json())) == (404, ["error"]), request
    assert client.get("/tunes/1/prompts/1").status_code == 200
    assert len(client.get("/tunes").json()) == 2


def test_a_prompt_for_a_tune_that_is_not_there_is_404(client: TestClient) -> None:
    assert client.post("/tunes/7/prompts", json={"prompt": {"text": "a dog"}}).status_code == 404


# Verbs


def test_a_waiting_tune_is_canceled_at_once_and_can_be_resumed(client: TestClient, services: Services) -> None:
    create(client, "Rex", ("tune[prompts_attributes][][text]", "ohwx dog"))
    canceled = client.post("/tunes/1/cancel").json()
    assert (canceled["status"], canceled["prompts"][0]["status"]) == ("canceled", "canceled")
    assert services.store.queue_length() == 0
    response = client.post("/tunes/1/cancel")
    assert (response.status_code, response.json()) == (409, {"error": "tune 1 is canceled already"})
    resumed = client.post("/tunes/1/resume").json()
    assert (resumed["status"], resumed["prompts"][0]["status"]) == ("queued", "queued")
    assert services.store.queue_length() == 2
    response = client.post("/tunes/1/resume")
    assert response.status_code == 409 and "only a canceled or failed one" in response.json()["error"]


def test_deleting_removes_rows_and_files(client: TestClient, services: Services) -> None:
    create(client, "Rex", ("tune[prompts_attributes][][text]", "ohwx dog"))
    assert len(left_behind(services)) == 5  # two rows, a folder, two jobs
    response = client.delete("/tunes/1")
    assert (response.status_code, response.json()) == (200, {"message": "Tune successfully deleted"})
    assert left_behind(services) == []


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        multipart([("prompt[text]", "ohwx dog"), ("prompt[num_images]", "2"), ("prompt[seed]", "")]),
        (b"prompt[text]=ohwx+dog&prompt[num_images]=2", {"Content-Type": "application/x-www-form-urlencoded"}),
        (b'{"prompt": {"text": "ohwx dog", "num_images": 2}}', {"Content-Type": "application/json"}),
    ],
    ids=["multipart", "urlencoded", "json"],
)
def test_prompts_are_added_and_listed(
    client: TestClient, services: Services, body: bytes, headers: dict[str, str]
) -> None:
    create(client, "Rex")
    create(client, "Ada", ("tune[prompts_attributes][][text]", "ohwx cat"))
    response = client.post("/tunes/1/prompts", content=body, headers=headers)
    assert response.status_code == 201
    prompt = response.json()
    assert (prompt["id"], prompt["tune_id"], prompt["text"], prompt["num_images"]) == (2, 1, "ohwx dog", 2)
    assert client.get("/prompts/2").json() == client.get("/tunes/1/prompts/2").json() == prompt
    assert client.get("/tunes/1/prompts").json() == client.get("/tunes/1").json()["prompts"] == [prompt]
    assert [one["id"] for one in client.get("/prompts").json()] == [2, 1]
    assert [one["id"] for one in client.get("/prompts?limit=1&offset=1").json()] == [1]
    assert services.store.queue_length() == 4


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({}, "text"), ({"text": ""}, "text"), ({"text": "a", "num_images": 9}, "num_images"),
        ({"text": "a", "w": 100}, "base"), ({"text": "a", "txet": "b"}, "txet"), ({"text": "a", "seed": -2}, "seed"),
    ],
)  # fmt: skip
def test_a_prompt_that_cannot_be_rendered_is_refused(client: TestClient, asked: dict[str, Any], field: str) -> None:
    create(client)
    response = client.post("/tunes/1/prompts", json={"prompt": asked})
    assert (response.status_code, list(response.json())) == (422, [field])
    assert client.get("/prompts").json() == []


def test_a_tune_without_a_model_takes_no_prompts(client: TestClient) -> None:
    create(client)
    client.post("/tunes/1/cancel")
    response = client.post("/tunes/1/prompts", json={"prompt": {"text": "a dog"}})
    assert (response.status_code, response.json()) == (422, {"tune_id": ["tune 1 is canceled; it has no model"]})


def test_the_gallery_lists_bases_and_says_which_are_broken(client: TestClient, services: Services) -> None:
    (services.settings.models / "broken.safetensors").write_bytes(b"not a model")
    listed = {base["title"]: base for base in client.get("/gallery/tunes").json()}
    assert listed["Realistic Vision 5.1"]["id"] == 690204
    assert listed["Tunebooth fast"]["branch"] == "fast"
    assert listed["broken.safetensors"]["error"] and not listed["Realistic Vision 5.1"]["error"]
    only = client.get("/gallery/tunes?branch=fast").json()
    assert [base["title"] for base in only] == ["Tunebooth fast"]


def test_presets_are_listed(services: Services, tmp_path: Path) -> None:
    for name in BRANCHES:
        (tmp_path / f"{name}.toml").write_bytes((services.settings.presets / f"{name}.toml").read_bytes())
    (tmp_path / "mine.toml").write_text("[lora]\nrank = 4\n")
    own = Services(
        services.settings.model_copy(update={"presets": tmp_path}), services.store, services.decoder, services.analyzer
    )
    assert client_of(own).get("/presets").json() == ["mine"]
    hosted = ["flux-lora-fast", "flux-lora-focus", "flux-lora-portrait"]
    assert client_of(services).get("/presets").json() == hosted


# What is refused: the status, the one field that is named, and a part of what is said of it. Nothing is kept.

SD15: Fields = [("tune[branch]", "sd15"), ("tune[model_type]", "lora")]
BAD_PARAMETERS: dict[str, tuple[Fields, str, str]] = {
    "an unknown branch": ([("tune[branch]", "sd16")], "branch", "unknown branch 'sd16' (did you mean 'sd15'?)"),
    "flux1 faceid": ([("tune[branch]", "flux1"), ("tune[model_type]", "faceid")], "model_type", "its adapter is PuLID"),
    "fast faceid of a dog": ([("tune[model_type]", "faceid")], "name", "faceid is of one person"),
    "faceid of a dog": ([("tune[branch]", "sd15"), ("tune[model_type]", "faceid")], "name", "faceid is of one person"),
    "faceid with args": (
        [("tune[branch]", "sd15"), ("tune[model_type]", "faceid"), ("tune[name]", "man"), ("tune[args]", "lr=1")],
        "args", "faceid trains nothing",
    ),
    "rank of a checkpoint": (
        [("tune[branch]", "sd15"), ("tune[args]", "rank=4")], "args", "rank has no meaning for checkpoint",
    ),
    "a token that is the class": (
        [("tune[branch]", "sd15"), ("tune[model_type]", "pti"), ("tune[token]", "Dog")],
        "token", "is a word of the class",
    ),
    "tokens of a lora": ([*SD15, ("tune[args]", "tokens=2")], "args", "tokens has no meaning for lora"),
    "flux preset on sdxl1": (
        [("tune[branch]", "sdxl1"), ("tune[preset]", "flux-lora-portrait")], "preset", "for flux1, not for sdxl1",
    ),
    "an unknown model_type": ([("tune[model_type]", "lroa")], "model_type", "did you mean 'lora'?"),
    "a misspelt parameter": ([("tune[stepz]", "5")], "stepz", "unknown parameter (did you mean 'steps'?)"),
    "a parameter of nobody": ([("tune[qqq]", "5")], "qqq", "unknown parameter"),
    "a name of ours inside": ([("tune[ignored][]", "name")], "ignored", "unknown parameter"),
    "a parameter outside": ([("title", "Rex")], "title", "everything goes under tune"),
    "an unknown base": ([*SD15, ("tune[base_tune_id]", "123456")], "base_tune_id", "no base model has the id 123456"),
    "a base of another branch": ([*SD15, ("tune[base_tune_id]", str(FAST_ID))], "base_tune_id", "not sd15"),
    "a base in words": ([("tune[base_tune_id]", "the best")], "base_tune_id", "must be a whole number"),
    "an unknown preset": ([*SD15, ("tune[preset]", "flux-lora-fsat")], "preset", "did you mean 'flux-lora-fast'?"),
    "no name": ([("tune[name]", "")], "name", "must not be empty"),
    "a name of signs": ([("tune[name]", "dog!")], "name", "only English letters, numbers and spaces allowed"),
    "no title": ([("tune[title]", "")], "title", "must not be empty"),
    "a long title": ([("tune[title]", "x" * 256)], "title", "must have at most 255 characters"),
    "a title with a bell": ([("tune[title]", "a\x07b")], "title", "must not contain control characters"),
    "steps -1": ([("tune[steps]", "-1")], "steps", "must be at least 1, got -1"),
    "steps 1e9": ([("tune[steps]", "1000000000")], "steps", "must be at most 10000"),
    "steps in words": ([("tune[steps]", "many")], "steps", "must be a whole number"),
    "half a step": ([("tune[steps]", "1.5")], "steps", "must be a whole number"),
    "steps of 5000 digits": ([("tune[steps]", "9" * 5000)], "steps", ""),
    "face_crop maybe": ([("tune[face_crop]", "maybe")], "face_crop", "must be true or false"),
    "an unknown word": ([("tune[args]", "rnak=4")], "args", "unknown word 'rnak' (did you mean 'rank'?)"),
    "a word without value": ([("tune[args]", "rank")], "args", "'rank' is not key=value"),
    "a rank of 0": ([("tune[args]", "rank=0")], "args", "rank"),
    "an lr of nan": ([("tune[args]", "lr=nan")], "args", "lr"),
    "steps twice": ([("tune[steps]", "5"), ("tune[args]", "steps=6")], "args", "steps is given twice"),
    "an empty prompt": ([("tune[prompts_attributes][][text]", "")], "prompts_attributes", "0.text: must not be empty"),
    "a misspelt prompt": ([("tune[prompts_attributes][][txet]", "a")], "prompts_attributes", "(did you mean 'text'?)"),
    "a prompt in one text": ([("tune[prompts_attributes]", "a dog")], "prompts_attributes", "must be a list"),
    "characteristics in a list": ([("tune[characteristics][]", "blue")], "characteristics", "must be an object"),
    "an address that is none": ([("tune[image_urls][]", "x")], "image_urls", "must begin with http:// or https://"),
    "a file of this machine": ([("tune[image_urls][]", "file:///etc/passwd")], "image_urls", "must begin with http"),
    "not an image": ([("tune[images][]", ("page.png", b"<html>"))], "images", "page.png is not an image"),
    "an empty file": ([("tune[images][]", ("nil.png", b""))], "images", "nil.png is empty"),
    "a text for a file": ([("tune[images][]", "photo.png")], "images", "must be files in multipart/form-data"),
    "a digit that is none": ([("tune[prompts_attributes][²]", "a")], "prompts_attributes", "must be a list"),
    "a place below 0": ([("tune[prompts_attributes][-1]", "a")], "prompts_attributes", "must be a list"),
    "a caption of nothing": ([("tune[images][]", ("ada.txt", b"a"))], "images", "ada.txt is a caption without"),
}  # fmt: skip


def refusal(response: httpx.Response, services: Services) -> dict[str, list[str]]:
    assert response.status_code == 422, response.text
    assert left_behind(services) == []
    return dict(response.json())


@pytest.mark.parametrize("kind", BAD_PARAMETERS)
def test_a_bad_parameter_is_named_and_nothing_is_kept(client: TestClient, services: Services, kind: str) -> None:
    changes, field, told = BAD_PARAMETERS[kind]
    changed = {name for name, _ in changes if not name.endswith("[]")}
    problems = refusal(post(client, [one for one in GOOD if one[0] not in changed] + changes), services)
    assert list(problems) == [field]
    assert told in " ".join(problems[field])


def test_what_is_missing_is_named_at_once(client: TestClient, services: Services) -> None:
    problems = refusal(post(client, [("tune[steps]", "-1"), ("tune[branch]", "fast")]), services)
    assert problems == {
        "images": ["must contain at least one image"],
        "name": ["is required"],
        "title": ["is required"],
        "steps": ["must be at least 1, got -1"],
    }


def test_bad_parameters_and_bad_photos_are_reported_together(client: TestClient, services: Services) -> None:
    fields = [*GOOD, ("tune[model_type]", "faceid"), ("tune[images][]", ("bad.png", b"no"))]
    assert list(refusal(post(client, fields), services)) == ["name", "images"]


def test_a_broken_file_in_the_models_folder_is_refused_by_name(client: TestClient, services: Services) -> None:
    (services.settings.models / "mine.safetensors").write_bytes(b"not a model")
    fields = [*GOOD[:2], PHOTO, *SD15, ("tune[base_tune_id]", str(bases.hashed_id("mine.safetensors")))]
    told = refusal(post(client, fields), services)
    assert told == {"base_tune_id": ["mine.safetensors: it is not a safetensors file, or a broken one"]}


def test_too_many_prompts_and_photos_are_refused(client: TestClient, services: Services) -> None:
    prompts: Fields = [("tune[prompts_attributes][][text]", "a dog")] * 101
    told = refusal(post(client, [*GOOD, *prompts, *[PHOTO] * 100]), services)
    assert told == {
        "images": ["must contain at most 100 images, got 101"],
        "prompts_attributes": ["must contain at most 100 prompts"],
    }


def jsonish(text: str) -> tuple[bytes, str]:
    return text.encode(), "application/json"


FORM, BOUND = "application/x-www-form-urlencoded", "multipart/form-data; boundary=frontier"
WHOLE = multipart(GOOD)[0]
BAD_BODIES: dict[str, tuple[tuple[bytes, str], int, str]] = {
    "images in JSON": (jsonish('{"tune": {"title": "a", "name": "a", "images": ["aGk="]}}'), 422, "must be files"),
    "no tune": (jsonish("{}"), 422, "is required"),
    "a tune in one text": (jsonish('{"tune": "Rex"}'), 422, "must be an object"),
    "a list": (jsonish("[]"), 422, "must be a JSON object"),
    "NaN": (jsonish('{"tune": {"steps": NaN}}'), 400, "NaN"),
    "Infinity": (jsonish('{"tune": {"steps": -Infinity}}'), 400, "Infinity"),
    "1e999": (jsonish('{"tune": {"steps": 1e999}}'), 422, "finite"),
    "an integer of 5000 digits": (jsonish('{"tune": {"steps": %s}}' % ("9" * 5000)), 400, "not JSON"),
    "a number for a truth": (jsonish('{"tune": {"steps": true}}'), 422, "must be a number"),
    "a doubled name": (jsonish('{"tune": {"title": "a", "title": "b"}}'), 400, "gives a name twice"),
    "a lone surrogate": (jsonish('{"tune": {"title": "\\ud800"}}'), 400, "surrogates"),
    "a name of a lone surrogate": (jsonish('{"\\ud800": 1}'), 400, "surrogates"),
    "a NUL": (jsonish('{"tune": {"title": "a\\u0000"}}'), 422, "control characters"),
    "cut JSON": (jsonish('{"tune": {"title": "a'), 400, "not JSON"),
    "JSON with a tail": (jsonish('{"tune": {}} {}'), 400, "not JSON"),
    "deep JSON": (jsonish("[" * 100_000), 400, "not JSON"),
    "much JSON": (jsonish(json.dumps({"tune": {"title": "x" * 2**20}})), 400, "larger than"),
    "Latin-1": ((b'{"tune": {"title": "\xe9"}}', "application/json"), 400, "not JSON"),
    "nothing": ((b"", "application/json"), 400, "not JSON"),
    "characteristics that are no JSON": ((b"tune[characteristics]={a", FORM), 400, "characteristics is not JSON"),
    "doubled characteristics": ((b'tune[characteristics]={"a":"b","a":"c"}', FORM), 400, "gives a name twice"),
    "a doubled field": ((b"tune[title]=a&tune[title]=b", FORM), 400, "'tune[title]' is given twice"),
    "a list and a text": ((b"tune[title]=a&tune[title][]=b", FORM), 400, "'tune[title][]' is given twice, or used for"),
    "a text and an object": ((b"tune=a&tune[title]=b", FORM), 400, "two kinds of thing"),
    "an open bracket": ((b"tune[title=a", FORM), 400, "is not a name that this API has"),
    "an empty form": ((b"", FORM), 422, "is required"),
    "a form cut in a file": ((WHOLE[:-60], BOUND), 400, "ends before its closing boundary"),
    "a form cut in its end": ((WHOLE[:-6], BOUND), 400, "ends before its closing boundary"),
    "a form without boundary": ((WHOLE, "multipart/form-data"), 400, "boundary"),
    "a form of another boundary": ((WHOLE, "multipart/form-data; boundary=other"), 400, ""),
    "a field without name": ((WHOLE.replace(b' name="tune[name]"', b""), BOUND), 400, "name"),
    "too many fields": ((multipart([("tune[a]", "b")] * 5001)[0], BOUND), 400, "Too many fields"),
    "too many files": ((multipart([PHOTO] * 611)[0], BOUND), 400, "Too many files"),
    "a field of 2 MB": ((multipart([("tune[title]", "x" * 2**21)])[0], BOUND), 400, "maximum size"),
    "plain text": ((b'{"tune": {}}', "text/plain"), 415, "send application/json"),
    "no content type": ((b'{"tune": {}}', ""), 415, "send application/json"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_BODIES)
def test_a_bad_body_is_refused_and_nothing_is_kept(client: TestClient, services: Services, kind: str) -> None:
    (body, content_type), status, told = BAD_BODIES[kind]
    response = client.post("/tunes", content=body, headers={"Content-Type": content_type})
    assert response.status_code == status, response.text
    answer = response.json()
    assert told in json.dumps(answer, ensure_ascii=False)
    assert (list(answer) == ["error"]) == (status != 422)
    assert left_behind(services) == []


def test_a_form_cut_anywhere_makes_no_tune(client: TestClient, services: Services) -> None:
    headers = {"Content-Type": BOUND}
    for end in range(0, len(WHOLE) - 4, 7):  # the last four bytes are the end of the end
        assert client.post("/tunes", content=WHOLE[:end], headers=headers).status_code == 400
    assert left_behind(services) == []
    assert client.post("/tunes", content=WHOLE, headers=headers).status_code == 201


# Photos from elsewhere


def test_addresses_of_this_network_are_refused_unless_allowed(
    client: TestClient, private: Services, photo_server: ThreadingHTTPServer
) -> None:
    url = f"{address(photo_server)}/rex.png"
    asked = {"tune": {"title": "Rex", "name": "dog", "branch": "fast", "image_urls": [url]}}
    assert refusal(client.post("/tunes", json=asked), private) == {"image_urls": [f"{url} cannot be fetched"]}
    assert photo_server.asked == []  # type: ignore[attr-defined]
    allowed = client_of(private).post("/tunes", json=asked)
    assert (allowed.status_code, allowed.json()["photos"][0]["name"]) == (201, "rex.png")
    assert photo_server.asked == ["/rex.png"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "url",
    ["http://localhost/a.png", "http://[::1]/a.png", "http://[::ffff:127.0.0.1]/a.png", "http://2130706433/a.png",
     "http://169.254.169.254/latest/meta-data/", "http://168.63.129.16/a.png", "http://[::ffff:0:127.0.0.1]/a.png",
     "http://0.0.0.0/a.png", "http://user:word@10.0.0.1/a.png", "http://127.0.0.1:6379/a.png", "http://[::1/a.png"],
)  # fmt: skip
def test_no_spelling_of_a_private_address_is_fetched(client: TestClient, services: Services, url: str) -> None:
    asked = {"tune": {"title": "Rex", "name": "dog", "branch": "fast", "image_urls": [url]}}
    problems = refusal(client.post("/tunes", json=asked), services)
    assert list(problems) == ["image_urls"] and problems["image_urls"][0].startswith(url)


@pytest.mark.parametrize("host", ["127.0.0.1", "168.63.129.16", "[::ffff:0:127.0.0.1]", "[64:ff9b::7f00:1]"])
def test_private_addresses_are_refused_before_anything_is_sent(
    services: Services, private: Services, host: str
) -> None:
    with _client(services.settings, PHOTOS) as guarded, pytest.raises(SSRFGuardError):
        guarded.get(f"http://{host}/a.png")
    with _client(private.settings, PHOTOS) as plain:
        assert not isinstance(plain, type(guarded))


def test_every_address_that_cannot_be_fetched_is_named(private: Services, photo_server: ThreadingHTTPServer) -> None:
    urls = [f"{address(photo_server)}{path}" for path in ("/a.png", "/gone.jpg", "/move")] + ["http://127.0.0.1:1/b"]
    asked = {"tune": {"title": "Rex", "name": "dog", "branch": "fast", "image_urls": urls}}
    problems = refusal(client_of(private).post("/tunes", json=asked), private)
    assert sorted(problems["image_urls"]) == sorted([f"{urls[1]} answers 404", f"{urls[3]} cannot be fetched"])
    assert "/moved.png" in photo_server.asked  # type: ignore[attr-defined]


def test_files_and_addresses_go_together(private: Services, photo_server: ThreadingHTTPServer) -> None:
    response = post(client_of(private), [*GOOD, ("tune[image_urls][]", f"{address(photo_server)}/b.png")])
    assert [one["name"] for one in response.json()["photos"]] == ["rex.png", "b.png"]


# Links


@pytest.fixture
def links(client: TestClient, services: Services) -> Iterator[dict[str, str]]:
    """A photo's link and a model's, without host, of a tune that looks as if it had been trained."""
    create(client)
    model = rows.tune_folder(services, 1) / "model"
    model.mkdir()
    (model / "lora.safetensors").write_bytes(b"0123456789")
    services.store.update("tunes", 1, files=["lora.safetensors"], status="trained")
    tune = client.get("/tunes/1").json()
    assert tune["ckpt_urls"] == [tune["ckpt_url"]]
    yield {"photo": path_of(tune["orig_images"][0]), "model": path_of(tune["ckpt_url"])}


def path_of(url: str) -> str:
    parts = urlsplit(url)
    assert f"{parts.scheme}://{parts.netloc}" == "http://127.0.0.1:7860"
    return f"{parts.path}?{parts.query}"


def test_links_are_plain_gets(client: TestClient, services: Services, links: dict[str, str]) -> None:
    picture, model = client.get(links["photo"]), client.get(links["model"])
    assert picture.content == (rows.tune_folder(services, 1) / "images" / "000.png").read_bytes()
    assert picture.headers["content-type"] == "image/png"
    assert picture.headers["content-disposition"].startswith("inline")
    assert picture.headers["x-content-type-options"] == "nosniff"
    assert model.content == b"0123456789"
    assert model.headers["content-disposition"] == 'attachment; filename="tune-1-lora.safetensors"'


def test_a_download_can_resume_where_it_stopped(client: TestClient, links: dict[str, str]) -> None:
    rest = client.get(links["model"], headers={"Range": "bytes=6-"})
    assert (rest.status_code, rest.content, rest.headers["content-range"]) == (206, b"6789", "bytes 6-9/10")
    assert client.get(links["model"], headers={"Range": "bytes=20-"}).status_code == 416


def test_the_model_route_leads_to_the_file(client: TestClient, links: dict[str, str]) -> None:
    response = client.get("/tunes/1/model", follow_redirects=False)
    assert (response.status_code, path_of(response.headers["location"])) == (307, links["model"])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda link: link[:-1] + ("0" if link[-1] != "0" else "1"),
        lambda link: link.partition("?")[0],
        lambda link: link.partition("&signature=")[0],
        lambda link: link.partition("&signature=")[0] + "&signature=%C3%A9",
        lambda link: link.replace("/files/1/", "/files/2/"),
        lambda link: link.replace("expires=", "expires=9"),
    ],
)
def test_a_link_that_was_changed_leads_nowhere(
    client: TestClient, links: dict[str, str], spoil: Callable[[str], str]
) -> None:
    for link in links.values():
        assert client.get(link).status_code == 200
        assert client.get(spoil(link)).status_code == 404


def test_a_link_ends_when_its_time_is_over(client: TestClient, services: Services, links: dict[str, str]) -> None:
    file = "1/model/lora.safetensors"
    assert client.get(path_of(make_link(services.settings, file, 3600))).status_code == 200
    assert client.get(path_of(make_link(services.settings, file, -2 * 3600))).status_code == 404


def test_a_link_survives_a_restart_and_no_other_installation_knows_it(
    client: TestClient, services: Services, links: dict[str, str], tmp_path: Path
) -> None:
    restarted = Services(services.settings.model_copy(), services.store, services.decoder, services.analyzer)
    restarted.settings.__dict__.pop("link_secret", None)  # it is read once
    assert client_of(restarted).get(links["photo"]).status_code == 200
    (services.settings.outputs / ".link-secret").write_text("another one")
    restarted.settings.__dict__.pop("link_secret", None)
    assert client_of(restarted).get(links["photo"]).status_code == 404


@pytest.mark.parametrize("path", ["../tunebooth.db", "1/../../.link-secret", "/etc/passwd", "1/out", "1", "1/model"])
def test_even_a_signed_link_reaches_nothing_but_the_tunes_files(
    client: TestClient, services: Services, links: dict[str, str], path: str
) -> None:
    (rows.tune_folder(services, 1) / "out").symlink_to(services.settings.outputs / "tunebooth.db")
    link = path_of(make_link(services.settings, path)).replace("..", "%2e%2e")
    assert client.get(link).status_code == 404


# The grammar of form names

NAMES = st.from_regex(r"[a-zA-Z_]\w{0,8}", fullmatch=True).filter(str.isascii)
TEXTS = st.text(max_size=5)
FLAT = st.dictionaries(NAMES, TEXTS, min_size=1, max_size=3)
TREES = st.dictionaries(
    NAMES, st.one_of(TEXTS, st.lists(TEXTS, min_size=1, max_size=3), FLAT, st.lists(FLAT, min_size=1, max_size=3)),
    min_size=1, max_size=4,
)  # fmt: skip


@given(TREES)
@settings(deadline=None)
@example({"a": [{"b": "c"}, {"b": "d"}], "e": ["f", "f"], "g": {"h": "i"}})
def test_a_flattened_request_nests_to_itself(tree: dict[str, Any]) -> None:
    assert nest(list(flatten(tree, "tune"))) == {"tune": tree}


@given(st.lists(st.tuples(st.text("ab01[]_-é²\n", max_size=12), TEXTS), max_size=5))
@settings(deadline=None)
def test_any_names_are_at_most_malformed(items: list[tuple[str, str]]) -> None:
    try:
        tree = nest(items)
    except Malformed:
        return
    assert sum(1 for _ in flatten(tree, "")) == len(items)  # nothing was merged or lost


@pytest.mark.parametrize(
    "names",
    [
        [""], ["tune["], ["tune]"], ["[tune]"], ["tune[a]b"], ["tune[[a]]"], ["tune[a b]"], ["tune.a"], ["tune[a]\n"],
        ["tune[a][b][c][d][e][f]"], ["tune" + "[a]" * 10_000], [f"tune[{'a' * 65}]"], [f"tune[a][{'9' * 5000}]"],
        ["tune[a][1]"], ["tune[a][999999999]"], ["tune[a][0]", "tune[a][2]"], ["tune[a][0]", "tune[a][-1]"],
        ["tune[a]", "tune[a]"], ["tune[a]", "tune[a][b]"], ["tune[a][b]", "tune[a]"], ["tune[a][]", "tune[a][b]"],
        ["tune[a][0]", "tune[a][0]"], ["tune[a][0][0]", "tune[a][0][b]"], ["tune[a][0][b]", "tune[a][0][b]"],
    ],
)  # fmt: skip
def test_hostile_names_are_malformed(names: list[str]) -> None:
    with pytest.raises(Malformed):
        nest([(name, "x") for name in names])
