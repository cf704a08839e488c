"""No room on the disk, a database in use, an outputs folder that is gone: what requests are answered."""

from __future__ import annotations

import asyncio
import io
import shutil
import sqlite3
import threading
import uuid
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import pytest
from fastapi.testclient import TestClient
from gradio.utils import get_upload_folder
from PIL import Image

from tests.helpers.analyzer import SharedAnalyzer
from tests.helpers.api import GOOD, create, post
from tests.helpers.small_disk import fill, small_disk
from tests.helpers.web import address, client_of, left_behind, multipart, upload
from trainer.contract.disk import RESERVE_BYTES, check_room
from trainer.photos.decoder import Decoder
from trainer.settings import read_settings
from trainer.studio.rows import Services
from trainer.studio.store import Store
from trainer.web.endpoints import endpoints
from trainer.web.guard import Guard
from trainer.web.rest import create_app

pytest_plugins = ("tests.helpers.web",)


@pytest.fixture
def services(tmp_path: Path, decoder: Decoder) -> Iterator[Services]:
    """The verbs over an empty store, on a disk of 32 MB."""
    with small_disk(tmp_path / "outputs", 32) as outputs:
        settings = read_settings(outputs=outputs, models=tmp_path / "models", private_urls="allow")
        store, analyzer = Store(outputs), SharedAnalyzer(settings)
        yield Services(settings, store, decoder, analyzer)
        analyzer.close()
        store.close()


def noise(size: int) -> bytes:
    """A photo that cannot be packed: about three bytes a pixel."""
    stream = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, "PNG", compress_level=0)
    return stream.getvalue()


# Photos that do not fit


def test_photos_that_do_not_fit_are_refused_before_they_are_read(client: TestClient, services: Services) -> None:
    fill(services.settings.outputs, RESERVE_BYTES + 2**20)
    answer = post(client, [*GOOD[:3], ("tune[images][]", ("large.png", noise(700)))])
    assert answer.status_code == 507
    (message,) = answer.json().values()
    assert str(services.settings.outputs) in message and "MB free" in message and "send it again" in message
    assert left_behind(services) == []
    assert create(client, "small")["status"] == "queued"  # a photo of some bytes fits


@pytest.mark.parametrize("path", ["/tunes", "/photos/check"])
@pytest.mark.parametrize("stage", ["web.bodies", "photos.intake"])  # the file as it comes, and as it is decoded
def test_a_disk_that_gets_full_while_photos_come_keeps_nothing(
    client: TestClient, services: Services, monkeypatch: pytest.MonkeyPatch, path: str, stage: str
) -> None:
    outputs = services.settings.outputs

    def check_and_fill(*arguments: Any) -> None:
        check_room(*arguments)
        fill(outputs, 2**20)

    body, headers = multipart([*GOOD[:3], ("tune[images][]", ("large.png", noise(800)))])
    with monkeypatch.context() as patch:
        patch.setattr(f"trainer.{stage}.check_room", check_and_fill)
        answer = client.post(path, content=body, headers=headers)
    assert answer.status_code == 507 and "is full" in answer.json()["error"]
    assert left_behind(services) == []
    (outputs / "filler").unlink()
    assert client.post(path, content=body, headers=headers).status_code in (200, 201)


def test_a_photo_behind_an_address_that_does_not_fit_is_not_called_unreachable(
    client: TestClient, services: Services, photo_server: ThreadingHTTPServer
) -> None:
    asked = {"title": "Rex", "name": "dog", "branch": "fast", "image_urls": [f"{address(photo_server)}/rex.png"]}
    filler = fill(services.settings.outputs)
    answer = client.post("/tunes", json={"tune": asked})
    assert answer.status_code == 507 and left_behind(services) == []
    filler.unlink()
    assert client.post("/tunes", json={"tune": asked}).status_code == 201


def test_the_gradio_api_says_the_same(services: Services) -> None:
    folder = Path(get_upload_folder()) / uuid.uuid4().hex
    folder.mkdir(parents=True)
    file = upload(folder, "large.png", noise(1000)).path
    submit = next(one for one in endpoints(services) if one.__name__ == "submit_tune")
    fill(services.settings.outputs, RESERVE_BYTES + 2**20)
    images: Any = [{"path": str(file), "orig_name": "large.png"}]
    with pytest.raises(gr.Error, match=r"MB free.*send it again"):
        asyncio.run(submit(name="dog", title="Rex", images=images, branch="fast"))
    assert left_behind(services) == []
    shutil.rmtree(folder)


# The database


def test_a_database_without_room_is_507_and_keeps_neither_row_nor_folder(
    client: TestClient, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune_id, outputs = create(client)["id"], services.settings.outputs
    filler = fill(outputs)
    answer = client.post(f"/tunes/{tune_id}/prompts", json={"prompt": {"text": "ohwx dog"}})
    assert answer.status_code == 507 and "free" in answer.json()["error"]
    assert client.get(f"/tunes/{tune_id}").json()["prompts"] == []  # reading goes on
    filler.unlink()

    # Full at the last moment: when the folder is in its place, and the rows are written.
    long = [(f"tune[prompts_attributes][{number}][text]", "ohwx dog " + "x" * 900) for number in range(50)]
    body, headers = multipart([("tune[title]", "second"), *GOOD[1:], *long])  # rows for which the database must grow
    monkeypatch.setattr("trainer.studio.tunes.fsync", lambda path: fill(outputs) if path.name == "tunes" else None)
    answer = client.post("/tunes", content=body, headers=headers)
    (outputs / "filler").unlink()
    assert answer.status_code == 507
    assert [path.name for path in (outputs / "tunes").iterdir()] == [str(tune_id)]
    assert [tune["title"] for tune in client.get("/tunes").json()] == ["Rex"]


def test_a_database_in_use_is_waited_for_and_then_answered_with_503(
    client: TestClient, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune_id = create(client)["id"]
    database = services.settings.outputs / "tunebooth.db"
    other = sqlite3.connect(database, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN EXCLUSIVE")
    ending = threading.Timer(1.0, lambda: other.execute("ROLLBACK"))
    ending.start()
    assert client.get(f"/tunes/{tune_id}").status_code == 200  # it waited
    ending.join()

    monkeypatch.setattr("trainer.studio.connection.BUSY_SECONDS", 0.2)
    busy = client_of(Services(services.settings, services.store, services.decoder, services.analyzer))
    services.store._connections._local = threading.local()  # connections with that patience
    other.execute("BEGIN EXCLUSIVE")
    for answer in (busy.get(f"/tunes/{tune_id}"), busy.post(f"/tunes/{tune_id}/cancel"), post(busy, GOOD)):
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "10")
        assert "in use by another program" in answer.json()["error"]
    other.execute("ROLLBACK")
    other.close()
    assert busy.post(f"/tunes/{tune_id}/cancel").json()["status"] == "canceled"


# The outputs folder


@pytest.mark.parametrize("lost", ["all of it", "tunebooth.db", ".lock", "replaced"])
def test_an_outputs_folder_that_is_gone_is_told_of_and_nothing_is_pretended(
    services: Services, tmp_path: Path, lost: str
) -> None:
    outputs = tmp_path / "another"
    outputs.mkdir()
    settings = services.settings.model_copy(update={"outputs": outputs})
    store = Store(outputs)
    there = Services(settings, store, services.decoder, services.analyzer)
    guard = Guard(settings, lambda: create_app(there), lambda: None, store.close, missing=store.missing)
    with TestClient(guard, base_url=settings.base_url) as client:
        assert create(client)["id"] == 1
        assert client.get("/health").json() == {"status": "ok", "ready": True}
        if lost == "all of it":
            outputs.rename(tmp_path / "moved")
        elif lost == "replaced":
            shutil.copy(outputs / "tunebooth.db", tmp_path / "copy.db")
            (tmp_path / "copy.db").rename(outputs / "tunebooth.db")
        else:
            (outputs / lost).unlink()
        health = client.get("/health").json()
        assert health["status"] == "failed" and "while the app was running" in health["reason"]
        assert "start it again" in health["reason"]
        for answer in (client.get("/tunes"), client.get("/tunes/1"), post(client, GOOD)):
            assert (answer.status_code, answer.json()) == (503, {"error": health["reason"]})
        page = client.get("/", headers={"Accept": "text/html"})
        assert page.status_code == 503 and "while the app was running" in page.text
        if lost == "all of it":
            assert not outputs.exists()  # nothing has made it anew
            (tmp_path / "moved").rename(outputs)
            assert client.get("/health").json()["status"] == "ok" and client.get("/tunes/1").status_code == 200


def test_health_names_no_reason_to_strangers(services: Services) -> None:
    settings = read_settings(outputs=services.settings.outputs, models=services.settings.models, host="::", key="a key")
    hold = "The queue waits: the disk of outputs is full."
    guard = Guard(settings, lambda: create_app(services), lambda: None, lambda: None, hold=lambda: hold)
    with TestClient(guard, base_url="http://example.com") as client:
        health = client.get("/health").json()
        assert health["status"] == "on hold" and health.keys() == {"status", "ready"}
        told = client.get("/health", headers={"Authorization": "Bearer a key"}).json()
        assert (told["status"], told["reason"]) == ("on hold", hold)
