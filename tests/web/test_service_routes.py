"""The calls of the hosted service beside tunes and prompts: the user, themes, packs, likes, inspection.

The shapes are those of its documentation (astria-docs, docs/api) and what its clients read.
"""

from __future__ import annotations

from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from tests.helpers.api import PHOTO, create, post
from tests.helpers.web import address, client_of, left_behind, multipart, photo
from trainer.contract.errors import AnalysisUnavailable
from trainer.contract.tunes import Tune
from trainer.photos.found import Found
from trainer.studio.rows import Services
from trainer.web import html

pytest_plugins = ("tests.helpers.web",)


# The user


@pytest.mark.parametrize("path", ["/users", "/users.json"])
def test_the_command_line_logs_in(client: TestClient, path: str) -> None:
    """astriaai/cli: `login` and `whoami` read these keys of GET /users."""
    user = client.get(path).raise_for_status().json()
    assert (user["id"], user["name"], user["email"], user["usd_balance_mc"]) == (1, "Tunebooth", None, 0)
    assert {"purchased_plugin_at", "auto_extend_tunes", "top_off_amount"} <= user.keys()


def test_the_user_is_that_of_the_settings(services: Services) -> None:
    changed = services.settings.model_copy(update={"idempotency": "all", "lifetime_days": 30, "face_crop": True})
    user = client_of(Services(changed, services.store, services.decoder, services.analyzer)).get("/users").json()
    assert (user["idempotency"], user["lifetime_days"], user["face_crop"]) == ("all", 30, True)


def test_there_are_no_themes(client: TestClient) -> None:
    answer = client.get("/themes")
    assert (answer.status_code, answer.json()) == (200, [])
    refused: Any = client.post("/themes", json={"theme": "Corporate headshots", "tune_ids": [1]})
    assert refused.status_code == 422 and "GET /packs" in refused.json()["theme"][0]


# Packs


def test_the_packs_of_the_gallery(client: TestClient) -> None:
    """headshots-starter asks for both lists; the documentation filters with public and listed."""
    found = client.get("/gallery/packs", params={"public": "true", "listed": "true"}).raise_for_status().json()
    assert {pack["slug"] for pack in found} == {"headshots", "pet-portraits", "product-shots"}
    numbers = [pack["id"] for pack in found]
    assert numbers == sorted(numbers, reverse=True) and len(set(numbers)) == 3
    assert client.get("/gallery/packs.json", params={"limit": 1, "offset": 1}).json() == found[1:2]
    assert client.get("/gallery/packs", params={"before_id": numbers[1]}).json() == found[2:]
    assert client.get("/gallery/packs", params={"limit": 0}).status_code == 422


def test_a_pack_has_the_keys_that_clients_read(client: TestClient) -> None:
    """docs/api/2-pack/2-get.md, and `packs list` of astriaai/cli."""
    pack = client.get("/p/headshots.json").json()
    men = pack["prompts"]["man"]
    assert (pack["main_class_name"], pack["cover_url"], pack["unlisted_at"]) == ("man", None, None)
    assert pack["costs"].keys() == pack["prompts_per_class"].keys() == {"man", "woman", "person"}
    assert pack["costs"]["man"] == {"cost": 0, "num_images": 4 * len(men)}
    assert pack["prompts_per_class"]["man"] == [{"id": one["id"], "images": []} for one in men]
    assert pack["created_at"] == pack["public_at"] and pack["created_at"].endswith("Z")
    assert client.get("/p/product-shots").json()["main_class_name"] is None


def test_a_pack_is_found_by_its_number_too(client: TestClient) -> None:
    numbers = {pack["slug"]: pack["id"] for pack in client.get("/packs").json()}
    assert numbers == {"headshots": 2043263479, "pet-portraits": 1703571531, "product-shots": 1891068731}  # for ever
    for slug, number in numbers.items():
        assert client.get(f"/p/{number}.json").json() == client.get(f"/p/{slug}").json()
    fields = [("tune[title]", "Rex"), ("tune[name]", "dog"), ("tune[branch]", "fast"), PHOTO]
    tune = post(client, fields, f"/p/{numbers['pet-portraits']}/tunes")
    assert tune.status_code == 201 and len(tune.json()["prompts"]) > 7
    assert client.get("/p/260").status_code == 404


def test_a_saved_pack_is_not_of_the_gallery(client: TestClient, services: Services) -> None:
    tune = create(client, "Rex", ("tune[prompts_attributes][][text]", "ohwx dog"))
    saved = client.post(f"/tunes/{tune['id']}/pack").json()
    assert (saved["slug"], saved["public_at"], saved["costs"]) == ("rex", None, {"dog": {"cost": 0, "num_images": 8}})
    assert client.get(f"/p/{saved['id']}").json() == saved
    assert saved["id"] in [pack["id"] for pack in client.get("/packs").json()]
    assert saved["id"] not in [pack["id"] for pack in client.get("/gallery/packs").json()]
    (services.settings.outputs / "packs" / "rex.toml").unlink()
    assert client.get(f"/p/{saved['id']}").status_code == 404
    again = client.post(f"/tunes/{tune['id']}/pack", params={"title": "Max"}).json()
    assert again["id"] != saved["id"]  # the number of a deleted pack is not given to another


# Likes


@pytest.mark.parametrize("path", ["likes", "like", "likes.json"])
def test_likes_are_kept(client: TestClient, services: Services, path: str) -> None:
    """docs/api/3-like: 201 without a body; its samples write `/like`."""
    prompt = create(client, "Rex", ("tune[prompts_attributes][][text]", "ohwx dog"))["prompts"][0]
    assert prompt["liked"] is False
    for method, liked in (("POST", True), ("POST", True), ("DELETE", False), ("DELETE", False), ("POST", True)):
        answer = client.request(method, f"/prompts/{prompt['id']}/{path}")
        assert (answer.status_code, answer.content) == (201, b"")
        assert client.get(f"/prompts/{prompt['id']}").json() == prompt | {"liked": liked}
    assert client_of(services).get("/tunes/1").json()["prompts"][0]["liked"] is True
    assert client.request(method, "/prompts/99/" + path).status_code == 404


def test_likes_are_on_the_page(client: TestClient, services: Services) -> None:
    create(client, "Rex", ("tune[prompts_attributes][][text]", "ohwx dog"))
    assert "/prompts/1/likes" not in page_of(client)  # there is no picture yet
    services.store.update("prompts", 1, status="rendered")
    assert "fetch('/prompts/1/likes',{method:'POST'})" in page_of(client)
    client.post("/prompts/1/likes")
    assert "fetch('/prompts/1/likes',{method:'DELETE'})" in page_of(client)


def page_of(client: TestClient) -> str:
    """The list of tunes as the page shows it."""
    return html.earlier([Tune.model_validate(tune) for tune in client.get("/tunes").json()], {})


# PATCH of a prompt


@pytest.mark.parametrize("path", ["/prompts/1", "/tunes/1/prompts/1.json"])
def test_filing_a_prompt_has_no_effect_and_says_so(client: TestClient, path: str) -> None:
    """astriaai/cli, `prompts update`: a form; astriaai/skills: JSON with nulls."""
    create(client, "Rex", ("tune[prompts_attributes][][text]", "ohwx dog"))
    before = client.get("/prompts/1").json()
    body, headers = multipart([("prompt[pack_id]", "88"), ("prompt[workspace_id]", "3")])
    answer = client.patch(path, content=body, headers=headers)
    assert answer.status_code == 200
    assert answer.json() == before | {
        "warnings": [
            "pack_id is accepted and has no effect: a pack is made of all prompts of a tune, with POST /tunes/ID/pack",
            "workspace_id is accepted and has no effect: there are no workspaces here",
        ]
    }
    nulls = client.patch(path, json={"prompt": {"pack_id": None, "base_pack_id": 88, "orig_prompt_id": None}})
    assert [line.split()[0] for line in nulls.json()["warnings"]] == ["pack_id", "base_pack_id", "orig_prompt_id"]
    assert client.get("/prompts/1").json() == before


def test_what_cannot_be_changed_of_a_prompt(client: TestClient) -> None:
    create(client, "Rex", ("tune[prompts_attributes][][text]", "ohwx dog"))
    refused = client.patch("/prompts/1", json={"prompt": {"pack": 88, "text": "a cat"}})
    assert refused.status_code == 422 and refused.json().keys() == {"pack", "text"}
    assert "'pack_id'" in refused.json()["pack"][0]
    assert client.patch("/prompts/1", json={"prompt": {}}).status_code == 422
    assert client.patch("/prompts/99", json={"prompt": {"pack_id": 88}}).status_code == 404
    assert client.patch("/tunes/2/prompts/1", json={"prompt": {"pack_id": 88}}).status_code == 404


# The inspection of a photo


CLIENT_KEYS = {"name", "blurry", "includes_multiple_people", "low_resolution"}


def inspect(client: TestClient, name: str, content: bytes, **more: str) -> httpx.Response:
    """As curl, requests and axios of docs/api/4-images/1-inspect.md send it: no root, one file."""
    body, headers = multipart([("name", name), *more.items(), ("file", ("photo.jpg", content))])
    return client.post("/images/inspect", content=body, headers=headers)


@pytest.mark.parametrize(
    ("sides", "name", "several"),
    [((), "", False), ((100,), "man", False), ((100, 90), "man", True), ((100, 40), "man", False)],
)
def test_what_is_seen_in_a_photo(
    services: Services, monkeypatch: pytest.MonkeyPatch, sides: tuple[int, ...], name: str, several: bool
) -> None:
    """The sample's rule: a text that is not the asked name is a warning, and so is each true."""
    found = [Found((0, 0, side, side), 0.9, (), 150.0) for side in sides]
    monkeypatch.setattr(services.analyzer, "faces", lambda picture: found if picture.is_file() else None)
    told = inspect(client_of(services), "man", photo(size=(500, 640))).raise_for_status().json()
    assert (told["name"], told["includes_multiple_people"], told["low_resolution"]) == (name, several, False)
    assert [face["box"] for face in told["faces"]] == [[0, 0, side, side] for side in sides]
    assert [face["main"] for face in told["faces"]] == [True, False][: len(sides)]
    texts = {key for key, value in told.items() if isinstance(value, str)}
    flags = {key for key, value in told.items() if isinstance(value, bool)}
    assert texts == {"name"} and texts | flags == CLIENT_KEYS  # ours are neither texts nor booleans


def test_a_photo_of_anything_else(client: TestClient, services: Services) -> None:
    told = inspect(client, "dog", photo(size=(640, 480)), authenticity_token="abc").json()
    assert (told["name"], told["width"], told["height"], told["low_resolution"]) == ("dog", 640, 480, False)
    assert "faces" not in told and "includes_multiple_people" not in told
    assert told["blurry"] is True  # one colour
    assert any("whether this is a dog is not known" in warning for warning in told["warnings"])
    assert "authenticity_token is accepted and has no effect" in told["warnings"]
    assert left_behind(services) == []


def test_a_photo_of_a_person_without_a_detector(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: True)
    told = inspect(client, "man", photo()).json()
    assert told["name"] == "man" and "faces" not in told
    assert any("face detection is not available" in warning for warning in told["warnings"])


def test_a_photo_by_its_address(services: Services, photo_server: ThreadingHTTPServer) -> None:
    allowed = services.settings.model_copy(update={"private_urls": "allow"})
    client = client_of(Services(allowed, services.store, services.decoder, services.analyzer))
    told = client.post("/images/inspect", json={"name": "dog", "file_url": f"{address(photo_server)}/1.png"})
    assert (told.json()["width"], told.json()["height"]) == (64, 48)
    missing = client.post("/images/inspect.json", data={"name": "dog", "file_url": f"{address(photo_server)}/none"})
    assert missing.status_code == 422 and missing.json().keys() == {"file_url"}


def test_what_cannot_be_inspected(client: TestClient, services: Services) -> None:
    assert inspect(client, "dog", b"no photo").json().keys() == {"file"}
    assert client.post("/images/inspect", json={}).json().keys() == {"name", "file"}
    assert client.post("/images/inspect", json={"name": "dog", "file": "a.jpg"}).json().keys() == {"file"}
    both = inspect(client, "dog", photo(), file_url="https://example.com/a.jpg").json()
    assert both == {"file": ["file and file_url are two photos; leave one of them out"]}
    wrong = inspect(client, "dog", photo(), nmae="dog")
    assert wrong.status_code == 422 and "'name'" in wrong.json()["nmae"][0]
    assert left_behind(services) == []


# The mock of the faceid flow


def create_face(client: TestClient, title: str = "Jane", name: str = "woman") -> dict[str, Any]:
    fields = [("tune[title]", title), ("tune[name]", name), ("tune[branch]", "fast"), ("tune[model_type]", "faceid")]
    answer = post(client, [*fields, PHOTO])
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


def test_a_faceid_on_the_fast_branch_is_ready_at_once(client: TestClient, services: Services) -> None:
    """The hosted service's faceid has no training, no token and needs no callback."""
    tune = create_face(client)
    assert (tune["status"], tune["token"], tune["model_type"], tune["branch"]) == ("trained", None, "faceid", "fast")
    assert tune["trained_at"] == tune["started_training_at"] and tune["ckpt_url"] is None and tune["ckpt_urls"] == []
    assert "a faceid on branch fast is a mock: its prompts are drawn without the face" in tune["warnings"]
    assert "no face was looked for: the face detector is not here yet" in tune["warnings"]
    assert services.store.queue_length() == 0
    assert client.get(f"/tunes/{tune['id']}/model").json() == {"error": "tune 1 has no model files"}
    assert "data-tune" in page_of(client)
    base = client.get("/gallery/tunes", params={"branch": "fast"}).json()[0]["id"]
    for place, text in ((base, "<faceid:1:1> woman on a beach"), (1, "woman on a beach")):
        assert client.post(f"/tunes/{place}/prompts", json={"prompt": {"text": text}}).status_code == 201
    assert client.delete("/tunes/1").status_code == 200


def test_a_face_is_looked_for_in_the_mock(
    client: TestClient, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    face = Found((8, 8, 40, 40), 0.9, (), 150.0)
    monkeypatch.setattr("trainer.library.weights.find", lambda *_: Path("detector"))
    monkeypatch.setattr(services.analyzer, "faces", lambda _: [face])
    found = create_face(client)
    assert found["photos"][0]["faces"][0]["box"] == [8, 8, 40, 40] and len(found["warnings"]) == 2  # few photos
    monkeypatch.setattr(services.analyzer, "faces", lambda _: [])
    none = create_face(client, "nobody")
    assert none["status"] == "trained" and none["photos"][0]["faces"] == []
    assert any(warning.startswith("no face was found in any photo") for warning in none["warnings"])

    def unavailable(_: Path) -> None:
        raise AnalysisUnavailable("face detection is not available: it takes too long")

    monkeypatch.setattr(services.analyzer, "faces", unavailable)
    assert "no face was looked for: face detection is not" in " ".join(create_face(client, "slow")["warnings"])


def test_a_faceid_is_of_one_person_in_the_mock_too(client: TestClient, services: Services) -> None:
    fields = [("tune[title]", "Rex"), ("tune[name]", "dog"), ("tune[branch]", "fast"), ("tune[model_type]", "faceid")]
    refused = post(client, [*fields, PHOTO])
    assert refused.status_code == 422 and refused.json().keys() == {"name"}
    assert left_behind(services) == []
