"""REST beyond creating: changes, deletions, copies, requests that come twice, and one request said in two encodings."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.helpers.api import create, flatten
from tests.helpers.app import post as post_photos
from tests.helpers.app import running
from tests.helpers.web import address, client_of, left_behind, photo
from trainer.studio import rows
from trainer.studio.rows import Services

pytest_plugins = ("tests.helpers.web",)


def prompt_on(client: TestClient, tune_id: int, text: str = "ohwx dog", **more: Any) -> httpx.Response:
    return client.post(f"/tunes/{tune_id}/prompts", json={"prompt": {"text": text, **more}})


def train(services: Services) -> None:
    """The oldest job is a tune, and it is trained."""
    job = services.store.claim()
    assert job is not None
    services.store.finish(job, "trained", files=["lora.safetensors"])


# Changes


def test_a_tune_s_title_name_and_characteristics_can_be_changed(client: TestClient) -> None:
    tune = create(client)
    change = {"title": "Rex II", "name": "cat", "auto_extend": "true", "characteristics": {"colour": "brown"}}
    answer = client.patch(f"/tunes/{tune['id']}", json={"tune": change})
    assert answer.status_code == 200
    told = answer.json()
    assert {key: told[key] for key in change} == change | {"auto_extend": True}
    assert client.get(f"/tunes/{tune['id']}").json() == told
    form = client.patch(f"/tunes/{tune['id']}.json", data={"tune[characteristics][colour]": "black"})
    assert form.json()["characteristics"] == {"colour": "black"}
    assert create(client, "Rex")["id"] != tune["id"]  # its old title is free


@pytest.mark.parametrize(
    ("change", "field", "told"),
    [
        ({}, "tune", "at least one of"),
        ({"title": ""}, "title", "must not be empty"),
        ({"auto_extend": ""}, "tune", "at least one of"),
        ({"name": "woman"}, "name", "other settings"),
        ({"name": "a_dog"}, "name", "only English letters"),
        ({"steps": 5}, "steps", "unknown parameter"),
    ],
)
def test_what_cannot_be_changed_is_reported(client: TestClient, change: dict[str, str], field: str, told: str) -> None:
    tune, _ = create(client), create(client, "Other")
    answer = client.patch(f"/tunes/{tune['id']}", json={"tune": change})
    assert answer.status_code == 422 and told in answer.json()[field][0]
    assert client.get(f"/tunes/{tune['id']}").json() == tune


def test_the_class_name_of_what_was_trained_stays(client: TestClient, services: Services) -> None:
    tune = create(client)
    train(services)
    assert "was trained" in client.patch(f"/tunes/{tune['id']}", json={"tune": {"name": "cat"}}).json()["name"][0]
    assert client.patch(f"/tunes/{tune['id']}", json={"tune": {"title": "b"}}).status_code == 200
    assert client.patch("/tunes/99", json={"tune": {"title": "b"}}).status_code == 404


# Prompts


def test_a_prompt_is_deleted_with_its_pictures_and_its_job(client: TestClient, services: Services) -> None:
    tune = create(client)
    first, second = (prompt_on(client, tune["id"]).json()["id"] for _ in range(2))
    folder = rows.tune_folder(services, tune["id"]) / "prompts" / str(first)
    folder.mkdir(parents=True)
    assert client.delete(f"/tunes/{tune['id'] + 1}/prompts/{first}").status_code == 404
    assert client.delete(f"/prompts/{first}.json").json() == {"message": "Prompt successfully deleted"}
    assert client.delete(f"/tunes/{tune['id']}/prompts/{second}").status_code == 200
    assert client.get(f"/prompts/{first}").status_code == client.delete(f"/prompts/{first}").status_code == 404
    assert not folder.exists() and services.store.queue_length() == 1


def test_a_prompt_that_renders_is_stopped_before_it_is_deleted(client: TestClient, services: Services) -> None:
    tune = create(client)
    train(services)
    prompt_id = prompt_on(client, tune["id"]).json()["id"]
    job = services.store.claim()
    assert job is not None

    def render() -> None:
        while not services.store.cancel_wanted("prompts", prompt_id):
            pass
        services.store.finish(job, "canceled")

    worker = threading.Thread(target=render)
    worker.start()
    assert client.delete(f"/prompts/{prompt_id}").status_code == 200
    worker.join()
    assert client.get(f"/prompts/{prompt_id}").status_code == 404


def test_a_prompt_is_copied_with_what_is_to_be_different(client: TestClient) -> None:
    tune = create(client)
    asked = {"seed": 7, "num_images": 2, "w": 64, "callback": "http://127.0.0.1/x?a=1", "super_resolution": "true"}
    first = prompt_on(client, tune["id"], **asked, denoising_strength=0.5, style="Cinematic").json()
    assert (first["super_resolution"], first["denoising_strength"], first["controlnet_txt2img"]) == (True, 0.5, False)
    assert first["style"] == "Cinematic" and first["warnings"] == [
        "denoising_strength has no effect without input_image"
    ]
    same = client.post(f"/prompts/{first['id']}/duplicate")
    other = client.post(f"/prompts/{first['id']}/duplicate", json={"prompt": {"seed": "8", "text": "ohwx cat"}})
    assert same.status_code == other.status_code == 201
    unlike = {"id", "url", "created_at", "updated_at"}
    expected = {key: value for key, value in first.items() if key not in unlike}
    assert {key: value for key, value in same.json().items() if key not in unlike} == expected
    assert (other.json()["seed"], other.json()["text"], other.json()["num_images"]) == (8, "ohwx cat", 2)
    form = client.post(f"/prompts/{first['id']}/duplicate", data={"prompt[num_images]": "3"})
    assert form.json()["num_images"] == 3
    assert client.post(f"/prompts/{first['id']}/duplicate", json={"prompt": {"sed": 1}}).status_code == 422
    assert client.post("/prompts/99/duplicate").status_code == 404


def pictures_of(services: Services, prompt: dict[str, Any]) -> list[str]:
    folder = services.settings.outputs / "tunes" / str(prompt["tune_id"]) / "inputs" / str(prompt["id"])
    return sorted(path.name for path in folder.glob("*"))


def test_a_prompt_may_start_from_a_picture(client: TestClient, services: Services) -> None:
    tune = create(client)
    sent = {"prompt[input_image]": ("a.png", photo()), "prompt[mask_image]": ("m.png", photo())}
    answer = client.post(f"/tunes/{tune['id']}/prompts", data={"prompt[text]": "ohwx dog"}, files=sent)
    assert answer.status_code == 201, answer.text
    prompt = answer.json()
    assert pictures_of(services, prompt) == ["input_image.png", "mask_image.png"]
    assert client.get(prompt["input_image"]).headers["content-type"] == "image/png"
    copied = client.post(f"/prompts/{prompt['id']}/duplicate").json()
    assert copied["id"] != prompt["id"] and pictures_of(services, copied) == ["input_image.png", "mask_image.png"]
    other = {"prompt[mask_image]": ("m.jpg", photo(form="JPEG"))}
    changed = client.post(f"/prompts/{prompt['id']}/duplicate", files=other).json()
    assert pictures_of(services, changed) == ["input_image.png", "mask_image.jpg"]
    client.delete(f"/prompts/{prompt['id']}")
    assert pictures_of(services, prompt) == [] and pictures_of(services, copied)
    data = {"tune[title]": "b", "tune[name]": "dog", "tune[branch]": "fast", "tune[prompts_attributes][0][text]": "a"}
    files = {"tune[images][]": ("a.png", photo()), "tune[prompts_attributes][0][input_image]": ("b.png", photo())}
    with_tune = client.post("/tunes", data=data, files=files)
    assert with_tune.status_code == 201, with_tune.text
    assert pictures_of(services, with_tune.json()["prompts"][0]) == ["input_image.png"]
    assert not list((services.settings.outputs / "incoming").glob("*"))


@pytest.mark.parametrize(
    ("sent", "field", "told"),
    [
        ({"super_resolution": "maybe"}, "super_resolution", "true or false"),
        ({"denoising_strength": 2}, "denoising_strength", "at most 1"),
        ({"ar": ["1:1"]}, "ar", "must be a text"),
        ({"aspect_ratio": "16:10"}, "aspect_ratio", "must be one of 1:1, 16:9"),
        ({"scheduler": "dpm++2m_karas"}, "scheduler", "did you mean 'dpm++2m_karras'?"),
        ({"style": "Cinematik"}, "style", "did you mean 'Cinematic'?"),
        ({"color_grading": "Velvia"}, "color_grading", "known: Film Velvia, Film Portra, Ektar"),
        ({"controlnet": "cany", "input_image_url": "http://x.example/a.png"}, "controlnet", "did you mean 'canny'?"),
        ({"controlnet": "canny"}, "controlnet", "needs input_image"),
        ({"mask_image_url": "http://x.example/a.png"}, "mask_image", "needs input_image"),
        ({"input_image": "http://x.example/a.png"}, "input_image", "goes into input_image_url"),
        ({"input_image_url": "http://127.0.0.1:1/a.png"}, "input_image_url", "cannot be fetched"),
        ({"text": "<lora:5:much> dog"}, "text", "must be a number"),
        ({"text": "<lora:5:99999> dog"}, "text", "must be from -10 to 10"),
        ({"text": "<lora:nobody:1> dog"}, "text", "<lora:nobody>: there is no LoRA"),
        ({"text": "<faceid:99:1> dog"}, "text", "there is no faceid tune 99"),
    ],
)
def test_what_a_prompt_cannot_have_is_reported_and_nothing_is_kept(
    client: TestClient, services: Services, sent: dict[str, Any], field: str, told: str
) -> None:
    tune_id = create(client)["id"]
    answer = client.post(f"/tunes/{tune_id}/prompts", json={"prompt": {"text": "a dog"} | sent})
    assert answer.status_code == 422 and list(answer.json()) == [field], answer.text
    assert told in answer.json()[field][0]
    assert services.store.find("prompts") == [] and not list((services.settings.outputs / "incoming").glob("*"))


def test_what_is_accepted_and_not_done_gives_a_warning(client: TestClient) -> None:
    tune_id = create(client)["id"]
    asked = {"face_swap": True, "hires_fix": True, "backend_version": 1, "super_resolution": "X4"}
    prompt = prompt_on(client, tune_id, "ohwx dog --fix_bindi", **asked).json()
    assert prompt["super_resolution"] is True and prompt["text"] == "ohwx dog --fix_bindi"
    told = " ".join(prompt["warnings"])
    assert all(word in told for word in ("face_swap", "licence", "backend_version", "--fix_bindi"))
    assert "hires_fix" not in told
    alone = prompt_on(client, tune_id, "ohwx dog", hires_fix=True).json()
    assert alone["warnings"] == ["hires_fix has no effect without super_resolution"]


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"aspect_ratio": "16:9", "w": 64, "h": 64}, "aspect_ratio has no effect with w and h"),
        ({"controlnet_txt2img": True}, "controlnet_txt2img has no effect without controlnet"),
        ({"controlnet_conditioning_scale": 0.5}, "controlnet_conditioning_scale has no effect without controlnet"),
        ({"text": "<lora:ohwx:0.5> a", "lora_scale": 2}, "lora_scale has no effect if the text has a weight"),
        ({"text": "a --mask_blur 4"}, "--mask_blur has no effect without a mask"),
        ({"text": "a --control_guidance_end 0.5"}, "--control_guidance_end has no effect without controlnet"),
        ({"text": "a --hires_cfg_scale 2"}, "--hires_cfg_scale has no effect without hires_fix"),
        ({"text": "a --upscale_factor 2", "hires_fix": True}, ""),
        ({"aspect_ratio": "16:9", "w": 64}, ""),
    ],
)
def test_what_has_no_effect_gives_a_warning(client: TestClient, asked: dict[str, Any], told: str) -> None:
    prompt = prompt_on(client, create(client)["id"], **{"text": "a dog"} | asked).json()
    assert prompt["warnings"] == ([told] if told else [])


def test_another_size_takes_the_place_of_the_one_that_was_there(client: TestClient) -> None:
    first = prompt_on(client, create(client)["id"], w=64, h=64).json()
    other = client.post(f"/prompts/{first['id']}/duplicate", json={"prompt": {"aspect_ratio": "9:16"}}).json()
    assert (other["w"], other["h"], other["aspect_ratio"], other["warnings"]) == (None, None, "9:16", [])
    last = client.post(f"/prompts/{other['id']}/duplicate", json={"prompt": {"ar": "portrait"}}).json()
    assert (last["aspect_ratio"], last["ar"]) == (None, "portrait")


def test_a_prompt_on_the_base_names_a_tune(client: TestClient, services: Services) -> None:
    tune = create(client, "Rex", ("tune[token]", "rexdog"))
    base = services.store.get("tunes", tune["id"])["base_id"]  # type: ignore[index]
    answer = prompt_on(client, base, f"<lora:{tune['id']}:0.8> rexdog dog")
    assert answer.status_code == 201
    told = answer.json()
    assert (told["tune_id"], told["tunes"]) == (base, [tune["id"]])
    assert told["text"] == f"<lora:{tune['id']}:0.8> rexdog dog"  # as it was asked
    assert prompt_on(client, tune["id"], "<lora:rexdog:-0.5> dog").status_code == 201


@pytest.mark.parametrize(
    ("on_base", "text"),
    [
        (True, "<lora:99:1> a dog"), (True, "<lora:rexdog:1> a dog"), (True, f"<lora:{'9' * 30}:1>"),
        (True, "<lora:1:1> <lora:1:1>"), (False, "<lora:99:1> a dog"), (False, "<faceid:1:1> a dog"),
        (False, "<lora:1:1> <lora:1:1>"),
    ],
)  # fmt: skip
def test_a_reference_to_nothing_is_refused_by_name(
    client: TestClient, services: Services, on_base: bool, text: str
) -> None:
    tune = create(client)
    before = left_behind(services)
    base = services.store.get("tunes", tune["id"])["base_id"]  # type: ignore[index]
    answer = prompt_on(client, base if on_base else tune["id"], text)
    assert answer.status_code == 422 and list(answer.json()) == ["text"]
    assert left_behind(services) == before


def test_prompts_that_come_with_a_tune_name_no_other(client: TestClient, services: Services) -> None:
    answer = client.post("/tunes", files={"tune[images][]": ("a.png", photo())}, data={
        "tune[title]": "Rex", "tune[name]": "dog", "tune[branch]": "fast",
        "tune[prompts_attributes][0][text]": "<lora:ohwx:1> a dog", "tune[prompts_attributes][1][text]": "<lora:7:1> a",
    })  # fmt: skip
    assert answer.status_code == 422
    (told,) = answer.json()["prompts_attributes"]
    assert told.startswith("1.text: <lora:7>")
    assert left_behind(services) == []


# Requests that come twice


def with_key(client: TestClient, key: str, title: str = "Rex", colour: str = "teal") -> httpx.Response:
    data = {"tune[title]": title, "tune[name]": "dog", "tune[branch]": "fast"}
    files = {"tune[images][]": ("a.png", photo(colour))}
    return client.post("/tunes", data=data, files=files, headers={"Idempotency-Key": key})


def test_a_request_with_the_same_key_has_the_same_answer(services: Services) -> None:
    titles_repeat = services.settings.model_copy(update={"idempotency": "off"})
    client = client_of(Services(titles_repeat, services.store, services.decoder, services.analyzer))
    first, again = with_key(client, "a-key"), with_key(client, "a-key")
    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json() == again.json()
    assert with_key(client, "b-key").json()["id"] != first.json()["id"]
    for other in (with_key(client, "a-key", title="Max"), with_key(client, "a-key", colour="red")):
        assert other.status_code == 422 and "another request" in other.json()["Idempotency-Key"][0]
    assert with_key(client, "a key with spaces").status_code == 422
    odd = {"tune[images][]": ("a.png", photo()), "tune[callback]": ("b.png", photo())}
    assert client.post("/tunes", files=odd, headers={"Idempotency-Key": "c-key"}).status_code == 422
    client.delete(f"/tunes/{first.json()['id']}")
    assert with_key(client, "a-key").status_code == 201


def test_a_prompt_with_the_same_key_is_rendered_once(client: TestClient) -> None:
    tune = create(client)
    ask: dict[str, Any] = {"json": {"prompt": {"text": "ohwx dog"}}, "headers": {"Idempotency-Key": "a-key"}}
    first, again = (client.post(f"/tunes/{tune['id']}/prompts", **ask).json() for _ in range(2))
    assert first == again
    assert len(client.get("/prompts").json()) == 1


@pytest.mark.long
def test_many_clients_at_once_make_each_tune_once_and_a_kill_loses_none(
    tmp_path: Path, dog_photos: Callable[[int], list[Path]]
) -> None:
    (outputs := tmp_path / "outputs").mkdir()
    titles = [f"tune {number}" for number in range(800)] * 2
    titles.sort(key=lambda title: hash(title) % 97)  # equal ones are near each other, so that they meet
    answered: dict[str, set[int]] = {}
    lock = threading.Lock()
    killed = threading.Event()
    small = tmp_path / "a.png"
    small.write_bytes(photo())

    def ask(app: Any, title: str) -> None:
        try:
            answer = post_photos(app, title, [small], steps=10_000)
        except httpx.TransportError:
            assert killed.is_set()  # only the kill may lose an answer
            return
        assert answer.status_code in (200, 201), answer.text
        with lock:
            answered.setdefault(title, set()).add(answer.json()["id"])
            if len(answered) == 300 and not killed.is_set():
                killed.set()
                app.kill()

    with running(outputs, "--models", str(tmp_path)) as app, ThreadPoolExecutor(64) as pool:
        app.ready()
        list(pool.map(lambda title: ask(app, title), titles))
    assert killed.is_set()
    with running(outputs, "--models", str(tmp_path)) as app, ThreadPoolExecutor(64) as pool:
        app.ready()
        list(pool.map(lambda title: ask(app, title), titles))
        listed: list[dict[str, Any]] = []
        while page := app.http.get("/tunes", params={"limit": 120, "offset": len(listed)}).json():
            listed += page
    assert Counter(tune["title"] for tune in listed) == Counter(set(titles))
    by_title = {tune["title"]: {tune["id"]} for tune in listed}
    assert answered == by_title  # nobody was told another id, before the kill or after it


# One request in two encodings

SHORT = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=12)
KEYS = st.from_regex(r"[a-z_]{1,8}", fullmatch=True)
PROMPTS = st.fixed_dictionaries(
    {"text": SHORT},
    optional={
        "negative_prompt": SHORT, "num_images": st.integers(1, 8), "seed": st.integers(0, 2**32 - 1),
        "steps": st.integers(1, 100), "cfg_scale": st.floats(0, 15).map(lambda value: round(value, 3)),
        "w": st.integers(8, 256).map(lambda value: 8 * value), "h": st.integers(8, 256).map(lambda value: 8 * value),
        "super_resolution": st.booleans(), "scheduler": st.sampled_from(["euler", "tcd"]),
    },
)  # fmt: skip
TUNES = st.fixed_dictionaries(
    {"title": SHORT, "name": st.sampled_from(["man", "woman", "dog", "style", "red 2 car"]), "branch": st.just("fast")},
    optional={
        "steps": st.integers(1, 10_000), "token": SHORT, "face_crop": st.booleans(), "auto_extend": st.booleans(),
        "training_face_correct": st.booleans(), "base_tune_id": st.integers(1, 2**31),
        "preset": st.just("flux-lora-fast"), "characteristics": st.dictionaries(KEYS, SHORT, min_size=1, max_size=3),
        "prompts_attributes": st.lists(PROMPTS, min_size=1, max_size=3), "model_type": st.sampled_from(["lora"]),
        "args": st.sampled_from(["rank=8", "lr=1e-4 batch=2"]), "resolution": st.just("512"),
    },
)  # fmt: skip
UNLIKE = {"id", "tune_id", "tunes", "url", "created_at", "updated_at", "orig_images", "eta"}


def told(answer: httpx.Response) -> Any:
    """What is the same of two equal tunes: all but their numbers, links and times."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: strip(inner) for key, inner in value.items() if key not in UNLIKE}
        return [strip(inner) for inner in value] if isinstance(value, list) else value

    return strip(answer.json())


def as_texts(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: as_texts(inner) for key, inner in value.items()}
    return [as_texts(inner) for inner in value] if isinstance(value, list) else str(value)


@given(asked=TUNES)
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_json_and_a_form_have_the_same_answer(
    asked: dict[str, Any], services: Services, photo_server: ThreadingHTTPServer
) -> None:
    private = services.settings.model_copy(update={"private_urls": "allow"})
    client = client_of(Services(private, services.store, services.decoder, services.analyzer))
    asked = asked | {"image_urls": [f"{address(photo_server)}/a.png"]}
    by_json = client.post("/tunes", json={"tune": asked})
    assert by_json.status_code == 201, by_json.text
    client.delete(f"/tunes/{by_json.json()['id']}")
    by_form = client.post("/tunes", data=fields(asked))
    assert by_form.status_code == 201, by_form.text
    client.delete(f"/tunes/{by_form.json()['id']}")
    assert told(by_json) == told(by_form)


def fields(asked: dict[str, Any]) -> dict[str, Any]:
    """The form of a request; names that come several times have a list."""
    found: dict[str, Any] = {}
    for name, value in flatten(as_texts(asked), "tune"):
        found.setdefault(name, []).append(value)
    return found
