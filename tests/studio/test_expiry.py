"""Tunes expire only where that is set, can be had back for a week, and are renewed where that was asked."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from tests.helpers.api import create
from trainer.clock import stamp
from trainer.settings import Settings
from trainer.studio import expiry, rows
from trainer.studio.expiry import empty_trash, expire_tunes, expiry_loop, trash_of
from trainer.studio.rows import Services

pytest_plugins = ("tests.helpers.web",)


@pytest.fixture
def monthly(services: Services) -> Settings:
    return services.settings.model_copy(update={"lifetime_days": 30})


def trained(client: TestClient, services: Services, days_ago: float, title: str = "Rex", **values: Any) -> int:
    """A tune that was trained so many days ago, with a model and a picture."""
    tune_id = create(client, title, ("tune[prompts_attributes][][text]", "ohwx dog"))["id"]
    expires = stamp(datetime.now(UTC) + timedelta(days=30 - days_ago))
    for status, files in (("trained", ["lora.safetensors"]), ("rendered", ["0.png"])):
        job = services.store.claim()
        assert job is not None
        services.store.finish(job, status, files=files)
    services.store.update("tunes", tune_id, expires_at=expires, **values)
    (rows.tune_folder(services, tune_id) / "model").mkdir()
    (rows.tune_folder(services, tune_id) / "model" / "lora.safetensors").write_bytes(b"weights")
    return tune_id


def test_a_tune_expires_into_the_trash_when_its_time_is_over(
    client: TestClient, services: Services, monthly: Settings
) -> None:
    old, young = trained(client, services, 31, "old"), trained(client, services, 29, "young")
    link = client.get(f"/tunes/{old}").json()["ckpt_url"]
    assert client.get(link).status_code == 200
    expire_tunes(monthly, services.store)
    gone, kept = (client.get(f"/tunes/{tune_id}").json() for tune_id in (old, young))
    assert (gone["status"], kept["status"]) == ("expired", "trained")
    assert (gone["ckpt_url"], gone["ckpt_urls"], gone["orig_images"]) == (None, [], [])
    assert gone["prompts"][0]["images"] == []
    assert client.get(link).status_code == 404
    (folder,) = trash_of(monthly).iterdir()
    assert folder.name.startswith(f"{old}-") and (folder / "model" / "lora.safetensors").exists()
    refused = client.post(f"/tunes/{old}/prompts", json={"prompt": {"text": "ohwx dog"}})
    assert refused.status_code == 422 and "expired" in refused.json()["tune_id"][0]
    assert client.post(f"/tunes/{old}/resume").status_code == 409
    assert client.delete(f"/tunes/{old}").status_code == 200


def test_a_tune_is_renewed_where_that_was_asked(client: TestClient, services: Services, monthly: Settings) -> None:
    tune_id = trained(client, services, 31, auto_extend=True)
    expire_tunes(monthly, services.store)
    tune = client.get(f"/tunes/{tune_id}").json()
    assert tune["status"] == "trained"
    left = datetime.fromisoformat(tune["expires_at"]) - datetime.now(UTC)
    assert timedelta(days=29, hours=23) < left <= timedelta(days=30)


def test_nothing_expires_by_surprise(client: TestClient, services: Services, monthly: Settings) -> None:
    without_end, overdue = trained(client, services, 99, "a"), trained(client, services, 99, "b")
    services.store.update("tunes", without_end, expires_at=None)  # trained when nothing was set
    expire_tunes(services.settings, services.store)  # nothing is set now
    assert client.get(f"/tunes/{overdue}").json()["status"] == "trained"
    expire_tunes(monthly, services.store)
    assert client.get(f"/tunes/{without_end}").json()["status"] == "trained"
    assert client.get(f"/tunes/{overdue}").json()["status"] == "expired"


def test_a_tune_that_renders_expires_afterwards(client: TestClient, services: Services, monthly: Settings) -> None:
    tune_id = trained(client, services, 31)
    client.post(f"/tunes/{tune_id}/prompts", json={"prompt": {"text": "ohwx dog"}})
    client.post(f"/tunes/{tune_id}/prompts", json={"prompt": {"text": "ohwx dog again"}})
    job = services.store.claim()
    assert job is not None
    expire_tunes(monthly, services.store)
    assert client.get(f"/tunes/{tune_id}").json()["status"] == "trained"
    services.store.finish(job, "rendered", files=["0.png"])
    expire_tunes(monthly, services.store)
    assert client.get(f"/tunes/{tune_id}").json()["status"] == "expired"
    assert services.store.queue_length() == 0 and client.get("/prompts").json()[0]["status"] == "canceled"


def test_the_trash_is_emptied_after_a_week(services: Services, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expiry.time, "time", lambda: 10_000_000.0)
    day = 86_400
    names = {f"1-{10_000_000 - 8 * day}": False, f"2-{10_000_000 - 6 * day}": True, "notes-of-mine": True}
    for name in names:
        (tmp_path / "trash" / name).mkdir(parents=True)
        (tmp_path / "trash" / name / "file").touch()
    empty_trash(services.store, tmp_path / "trash")
    assert {name: (tmp_path / "trash" / name).exists() for name in names} == names
    empty_trash(services.store, tmp_path / "none")


def test_the_keeper_does_both(client: TestClient, services: Services, monthly: Settings) -> None:
    tune_id = trained(client, services, 31)
    (week_old := trash_of(monthly) / "9-1").mkdir(parents=True)
    keeper = expiry_loop(monthly, services.store)
    keeper.start()
    keeper.close()  # which waits for the look that it had begun
    assert client.get(f"/tunes/{tune_id}").json()["status"] == "expired"
    assert not week_old.exists() and list(trash_of(monthly).iterdir())
