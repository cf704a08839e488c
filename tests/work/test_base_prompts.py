"""A prompt lives where it was posted: on a base it is rendered, listed and deleted there; it stays without its LoRA."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from tests.helpers.studio import Studio
from tests.helpers.web import client_of
from trainer.photos.decoder import Decoder
from trainer.studio import rows

pytest_plugins = ("tests.helpers.web",)


@pytest.fixture
def studio(tmp_path: Path, decoder: Decoder, dog_photos: Callable[[int], list[Path]]) -> Iterator[Studio]:
    opened = Studio(tmp_path, decoder, dog_photos(2))
    yield opened
    opened.close()


def wait_for_prompt(studio: Studio, client: TestClient, prompt_id: int) -> dict[str, Any]:
    """The prompt's answer, once the queue is empty."""
    while studio.store.queue_length():
        studio.store.changed.wait(0.05)
    return dict(client.get(f"/prompts/{prompt_id}").json())


def test_prompts_on_a_base(studio: Studio) -> None:
    client = client_of(studio.services)
    base = next(row["id"] for row in client.get("/gallery/tunes", params={"branch": "fast"}).json())
    tune = studio.create("Rex", steps=2, prompts_attributes=[])
    ask = {"num_images": 1, "steps": 2, "seed": 7}
    texts = ["a dog", f"<lora:{tune}:1> ohwx dog", f"<lora:{tune}:0.5> ohwx dog"]
    posted = [client.post(f"/tunes/{base}/prompts", json={"prompt": ask | {"text": text}}) for text in texts]
    assert [answer.status_code for answer in posted] == [201, 201, 201]
    bare, first, second = (answer.json() for answer in posted)
    own = client.post(f"/tunes/{tune}/prompts", json={"prompt": ask | {"text": "ohwx dog"}}).json()
    # The answer names where it was posted.
    assert [prompt["tune_id"] for prompt in (bare, first, own)] == [base, base, tune]
    assert first["url"] == f"{studio.settings.base_url}/tunes/{base}/prompts/{first['id']}.json"
    assert (bare["tunes"], first["tunes"]) == ([], [tune])

    studio.worker.start()
    done = [wait_for_prompt(studio, client, prompt["id"]) for prompt in (bare, first, second, own)]
    assert [prompt["status"] for prompt in done] == ["rendered"] * 4, [prompt["error"] for prompt in done]
    pictures = [client.get(prompt["images"][0].removeprefix(studio.settings.base_url)).content for prompt in done]
    assert len(set(pictures)) == 3 and pictures[1] == pictures[3]  # strength 1, the same seed, the same base
    folder = studio.settings.outputs / "bases" / str(base) / "prompts"
    assert sorted(path.name for path in folder.iterdir()) == sorted(str(prompt["id"]) for prompt in done[:3])

    # Found and listed under the base, and under the tune of its first LoRA.
    def listed(place: int) -> list[int]:
        return [prompt["id"] for prompt in client.get(f"/tunes/{place}/prompts").json()]

    assert listed(base) == [second["id"], first["id"], bare["id"]]
    assert sorted(listed(tune)) == sorted([first["id"], second["id"], own["id"]])
    assert client.get(f"/tunes/{base}/prompts/{first['id']}").json() == client.get(f"/prompts/{first['id']}").json()
    assert client.get(f"/tunes/{tune}/prompts/{first['id']}").status_code == 200
    assert client.get(f"/tunes/{tune}/prompts/{bare['id']}").status_code == 404
    assert client.get("/tunes/12345/prompts").status_code == 404
    as_tune = client.get(f"/tunes/{base}").json()
    assert [prompt["id"] for prompt in as_tune["prompts"]] == [bare["id"], first["id"], second["id"]]
    assert as_tune.keys() == client.get(f"/tunes/{tune}").json().keys() and as_tune["status"] == "trained"

    # A copy is posted where the first was; deleting works from both places, and takes the files.
    assert client.post(f"/prompts/{bare['id']}/duplicate").json()["tune_id"] == base
    assert client.delete(f"/tunes/{tune}/prompts/{bare['id']}").status_code == 404
    assert client.delete(f"/tunes/{base}/prompts/{second['id']}").status_code == 200
    assert not (folder / str(second["id"])).exists()

    # Deleting the tune leaves what was posted on the base.
    wait_for_prompt(studio, client, bare["id"])
    assert client.delete(f"/tunes/{tune}").status_code == 200
    assert not rows.tune_folder(studio.services, tune).exists()
    assert client.get(f"/prompts/{own['id']}").status_code == 404
    left = client.get(f"/prompts/{first['id']}").json()
    assert client.get(left["images"][0].removeprefix(studio.settings.base_url)).content == pictures[1]
    after = client.post(f"/prompts/{first['id']}/duplicate")
    assert after.status_code == 422 and "there is no LoRA" in after.json()["text"][0]


def test_a_prompt_whose_lora_is_deleted_before_it_renders_fails_in_words(studio: Studio) -> None:
    client = client_of(studio.services)
    base = next(row["id"] for row in client.get("/gallery/tunes", params={"branch": "fast"}).json())
    tune = studio.create("Rex", prompts_attributes=[])
    text = f"<lora:{tune}:1> ohwx dog"
    callback = "http://127.0.0.1:9/"
    asked = {"prompt": {"text": text, "num_images": 1, "steps": 2, "callback": callback}}
    prompt = client.post(f"/tunes/{base}/prompts", json=asked).json()
    assert client.delete(f"/tunes/{tune}").status_code == 200
    studio.worker.start()
    done = wait_for_prompt(studio, client, prompt["id"])
    assert done["status"] == "failed" and f"<lora:{tune}>" in done["error"]
    assert [one["url"] for one in client.get(f"/tunes/{base}/callbacks").json()] == [callback]


def test_gallery_rows_have_the_keys_of_a_tune(client: TestClient) -> None:
    found = client.get("/gallery/tunes").json()
    assert {"id", "title", "name", "branch", "model_type", "token", "url", "orig_images", "error"} <= found[0].keys()
    assert client.get("/gallery/tunes", params={"limit": 2}).json() == found[:2]
    assert client.get("/gallery/tunes", params={"title": found[3]["title"]}).json() == [found[3]]
    assert client.get("/gallery/tunes", params={"model_type": "faceid"}).json() == []
    for row in found[:3]:
        answer = client.get(f"/tunes/{row['id']}.json")
        assert answer.status_code == 200 and answer.json()["title"] == row["title"], row
    assert client.delete(f"/tunes/{found[0]['id']}").status_code == 404


def test_a_face_on_the_fast_branch_is_a_mock(studio: Studio) -> None:
    client = client_of(studio.services)
    base = next(row["id"] for row in client.get("/gallery/tunes", params={"branch": "fast"}).json())
    face = studio.create("Jane", name="woman", model_type="faceid", steps=None, prompts_attributes=[])
    ask = {"num_images": 1, "steps": 2, "seed": 7}
    texts = {base: f"<faceid:{face}:1> woman in the snow", face: "woman in the snow"}
    posted = [client.post(f"/tunes/{place}/prompts", json={"prompt": ask | {"text": t}}) for place, t in texts.items()]
    plain = client.post(f"/tunes/{base}/prompts", json={"prompt": ask | {"text": "woman in the snow"}})
    studio.worker.start()
    done = [wait_for_prompt(studio, client, answer.json()["id"]) for answer in (*posted, plain)]
    assert [prompt["status"] for prompt in done] == ["rendered"] * 3, [prompt["error"] for prompt in done]
    warning = f"<faceid:{face}> is not drawn: a face on branch fast is a mock"
    assert [warning in prompt["warnings"] for prompt in done] == [True, True, False]
    files = [client.get(prompt["images"][0].removeprefix(studio.settings.base_url)).content for prompt in done]
    pixels = {Image.open(io.BytesIO(file)).tobytes() for file in files}  # the files' metadata have the texts
    assert len(pixels) == 1  # the plain prompt's
