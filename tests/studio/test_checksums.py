"""A finished model has checksums, and is served only while its files have them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from tests.helpers.api import create
from tests.helpers.web import photo, upload
from trainer.contract.errors import ModelChanged
from trainer.studio import checksums, tunes
from trainer.studio.rows import Services, tune_folder

pytest_plugins = ("tests.helpers.web",)

WEIGHTS = b"weights of a tune" * 100


@pytest.fixture
def model(client: TestClient, services: Services) -> Path:
    """The model file of tune 1, made before there were checksums."""
    tune_id = create(client, "Rex")["id"]
    job = services.store.claim()
    assert job is not None and tune_id == 1
    services.store.finish(job, "trained", files=["lora.safetensors"])
    (tune_folder(services, tune_id) / "model").mkdir()
    file = tune_folder(services, tune_id) / "model" / "lora.safetensors"
    file.write_bytes(WEIGHTS)
    return file


def known(services: Services) -> dict[tuple[int, str], str]:
    with services.store.transaction() as db:
        return {(row[0], row[1]): row[2] for row in db.execute("SELECT tune_id, path, sha256 FROM checksums")}


def damage(file: Path) -> None:
    """One bit, as a disk may lose it; the size stays."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_model_without_a_checksum_gets_one_when_it_is_first_served(
    client: TestClient, services: Services, model: Path
) -> None:
    assert known(services) == {}
    assert client.get("/tunes/1/model").content == WEIGHTS
    assert known(services) == {(1, "model/lora.safetensors"): hashlib.sha256(WEIGHTS).hexdigest()}


def test_a_changed_model_is_not_served_and_says_why(client: TestClient, services: Services, model: Path) -> None:
    assert client.get("/tunes/1/model").status_code == 200
    damage(model)
    answer = client.get("/tunes/1/model")
    assert answer.status_code == 409
    message = answer.json()["error"]
    assert "model/lora.safetensors of tune 1 (Rex)" in message and "delete the tune" in message
    assert client.get("/tunes/1/model").status_code == 409  # it stays so
    model.write_bytes(WEIGHTS)
    assert client.get("/tunes/1/model").content == WEIGHTS


def test_a_file_is_hashed_once_for_each_version_of_it(
    client: TestClient, services: Services, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[Path] = []
    plain = checksums.file_digest
    monkeypatch.setattr(checksums, "file_digest", lambda file: hashed.append(file) or plain(file))
    for _ in range(3):
        assert client.get("/tunes/1/model").status_code == 200
    checksums.verify(services.store, services.settings.outputs, model.parent)  # by another way to the same file
    assert len(hashed) == 1
    os.utime(model, ns=(1, 1))
    assert client.get("/tunes/1/model").status_code == 200
    assert len(hashed) == 2


def test_an_export_is_verified_too_and_pictures_are_not(client: TestClient, services: Services, model: Path) -> None:
    exported, picture = (tune_folder(services, 1) / name for name in ("exports/a/diffusers.zip", "images/000.png"))
    exported.parent.mkdir(parents=True)
    exported.write_bytes(WEIGHTS)
    checksums.note(services.store, 1, checksums.of_folder(tune_folder(services, 1), "exports/a"))
    assert list(known(services)) == [(1, "exports/a/diffusers.zip")]
    damage(exported)
    with pytest.raises(ModelChanged, match=r"exports/a/diffusers\.zip"):
        checksums.verify(services.store, services.settings.outputs, exported)
    checksums.verify(
        services.store, services.settings.outputs, picture, services.settings.models / "a.safetensors", None
    )
    assert len(known(services)) == 1


def test_a_tune_that_is_made_anew_has_the_checksums_of_its_new_files(services: Services, model: Path) -> None:
    folder = tune_folder(services, 1)
    checksums.note(services.store, 1, checksums.of_folder(folder, "model"))
    damage(model)
    checksums.note(services.store, 1, checksums.of_folder(folder, "model"))
    checksums.verify(services.store, services.settings.outputs, folder / "model")
    assert known(services)[1, "model/lora.safetensors"] == hashlib.sha256(model.read_bytes()).hexdigest()


def test_checksums_go_with_their_tune(client: TestClient, services: Services, model: Path) -> None:
    link = client.get("/tunes/1").json()["ckpt_url"]
    assert client.get(link).status_code == 200
    services.store.delete("tunes", 1)
    assert known(services) == {}
    os.utime(model, ns=(1, 1))
    assert client.get(link).content == WEIGHTS  # a folder without a row: there is nothing that it must be


def test_a_face_has_its_checksum_from_the_beginning(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    def identify(folder: Path, photos: list[Any], *_: Any) -> tuple[list[Any], list[str]]:
        (folder / "model").mkdir()
        (folder / "model" / "faceid.safetensors").write_bytes(WEIGHTS)
        return photos, []

    monkeypatch.setattr(services.analyzer, "identify", identify)
    request = {"title": "a face", "name": "man", "model_type": "faceid"}
    tune, _ = tunes.create_tune(services, request, [upload(services.settings.outputs / "sent", "a.png", photo())])
    assert known(services) == {(tune.id, "model/faceid.safetensors"): hashlib.sha256(WEIGHTS).hexdigest()}
