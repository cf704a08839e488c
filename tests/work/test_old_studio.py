"""A studio of version 0.1.0 opens and goes on: its answers, its links, and what waits in its queue.

tests/fixtures/README.md says what is in it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.snapshot import steady
from tests.helpers.studio import Studio
from tests.helpers.web import client_of
from trainer.photos.decoder import Decoder
from trainer.studio import rows, tunes

pytest_plugins = ("tests.helpers.web",)

OLD = Path(__file__).parents[1] / "fixtures" / "studio_0_1"
TRAINED, FACE, FAILED, EXPIRED, CANCELED, WAITING = range(1, 7)


@pytest.fixture
def studio(tmp_path: Path, decoder: Decoder) -> Iterator[Studio]:
    """A copy of the old studio, opened by the code of today; its worker is not started."""
    shutil.copytree(OLD / "outputs", tmp_path / "outputs")
    opened = Studio(tmp_path, decoder, [], weights=tmp_path / "weights")
    yield opened
    opened.store.close()
    opened.analyzer.close()


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    """What version 0.1.0 answered."""
    return dict(json.loads((OLD / "answers.json").read_text("utf-8")))


def test_it_answers_as_it_did(studio: Studio, told: dict[str, Any]) -> None:
    client = client_of(studio.services)
    assert len(told["answers"]["/tunes"]) == 6
    for path, answer in told["answers"].items():
        now = steady(client.get(path).raise_for_status().json(), {studio.settings.base_url: "US"})
        if path in ("/gallery/tunes", "/packs"):  # their rows have more keys since
            now = [{name: row[name] for name in old} for row, old in zip(now, answer, strict=True)]
        assert now == where_posted(answer), path


def where_posted(answer: Any) -> Any:
    """An answer of version 0.1.0 with the links of prompts as they are since, below the tune that they belong to, and
    with `liked`."""
    if isinstance(answer, list):
        return [where_posted(one) for one in answer]
    if not isinstance(answer, dict):
        return answer
    told = {name: where_posted(value) for name, value in answer.items()}
    if {"tune_id", "url"} <= told.keys():
        told["url"] = told["url"].replace("/prompts/", f"/tunes/{told['tune_id']}/prompts/")
        told["liked"] = False
    return told


def test_its_links_still_lead_to_its_files(studio: Studio, told: dict[str, Any]) -> None:
    client = client_of(studio.services)
    photo, picture = (client.get(link) for link in told["links"])
    assert photo.content == (OLD / "outputs/tunes/1/images/000.jpg").read_bytes()
    assert picture.content == (OLD / "outputs/tunes/1/prompts/1/0.png").read_bytes()
    model = client.get(f"/tunes/{TRAINED}/model")
    assert model.content == (OLD / "outputs/tunes/1/model/lora.safetensors").read_bytes()


def test_what_waits_is_trained_and_rendered(studio: Studio) -> None:
    studio.worker.start()
    tune = studio.ended(WAITING)
    earlier = studio.ended(TRAINED)
    studio.worker.stop()
    assert (tune.status, tune.error) == ("trained", None)
    assert [(prompt.status, prompt.error) for prompt in tune.prompts] == [("rendered", None)] * 2
    assert tune.prompts[1].tunes == [WAITING, TRAINED]  # its text names the LoRA of an earlier tune
    assert [(prompt.status, prompt.error) for prompt in earlier.prompts] == [("rendered", None)] * 2
    pictures = studio.pictures(WAITING) + studio.pictures(TRAINED)
    assert [picture.size for picture in pictures] == [(64, 64)] * 6
    assert all(len(picture.getcolors(64 * 64) or []) > 50 for picture in pictures)


def test_a_run_that_was_stopped_resumes_from_its_state(studio: Studio) -> None:
    """Also, it stands on the model of another tune."""
    tunes.resume_tune(studio.services, CANCELED)
    studio.worker.start()
    tune = studio.ended(CANCELED)
    studio.worker.stop()
    assert (tune.status, tune.error) == ("trained", None)
    assert studio.events(CANCELED) == [("started", 0), ("resumed", 1)]
    assert [prompt.status for prompt in tune.prompts] == ["rendered"]


def test_its_tunes_can_be_changed_and_deleted(studio: Studio) -> None:
    client = client_of(studio.services)
    assert client.post(f"/tunes/{FAILED}/resume").json()["status"] == "queued"
    assert client.patch(f"/tunes/{FACE}", json={"tune": {"title": "another"}}).json()["title"] == "another"
    assert client.post("/prompts/1/duplicate").json()["text"] == "ohwx dog"
    assert client.delete(f"/tunes/{TRAINED}").status_code == 409  # another one stands on it
    for tune_id in (EXPIRED, CANCELED, TRAINED):
        client.delete(f"/tunes/{tune_id}").raise_for_status()
        assert not rows.tune_folder(studio.services, tune_id).exists()
