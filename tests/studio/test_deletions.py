"""What is deleted is gone, whenever the app is killed; what nobody deleted stays, also where the database is gone."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from fastapi.testclient import TestClient

from tests.helpers.api import create, post
from tests.helpers.app import post as post_tune
from tests.helpers.app import running, wait_for
from tests.helpers.web import left_behind, photo, upload
from trainer.files import UNCOMMITTED
from trainer.studio import deletions, expiry, folders, prompts, rows, tunes
from trainer.studio.deletions import finish_deletions, note_deletions, remove_leftovers
from trainer.studio.rows import Services

pytest_plugins = ("tests.helpers.web",)
WASTE = ".partial-1a2b3c4d"


class Killed(BaseException):
    """The process ends here."""


def killed(*_: object, **__: object) -> None:
    raise Killed


def at_start(services: Services) -> None:
    remove_leftovers(services.settings.outputs, services.store)


def notes(services: Services) -> list[str]:
    with services.store.transaction() as db:
        return [row["path"] for row in db.execute("SELECT path FROM deletions ORDER BY path")]


def trained(client: TestClient, services: Services, title: str = "Rex") -> int:
    tune_id: int = create(client, title)["id"]
    end(services, "trained", ["lora.safetensors"])
    (model := rows.tune_folder(services, tune_id) / "model").mkdir()
    (model / "lora.safetensors").write_bytes(b"weights")
    return tune_id


def end(services: Services, status: str, files: list[str] | None = None, error: str | None = None) -> None:
    job = services.store.claim()
    assert job is not None
    services.store.finish(job, status, files=files or [], error=error)


def prompt_with_picture(client: TestClient, tune_id: int) -> int:
    fields = [("prompt[text]", "ohwx dog"), ("prompt[input_image]", ("a.png", photo()))]
    answer = post(client, fields, f"/tunes/{tune_id}/prompts")
    assert answer.status_code == 201, answer.text
    return int(answer.json()["id"])


# A kill between the row's end and the files'


def test_a_tune_whose_deletion_was_cut_short_is_gone_after_the_next_start(
    client: TestClient, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone, kept = trained(client, services), trained(client, services, "other")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(deletions, "remove", killed)
        tunes.delete_tune(services, gone)
    assert client.get(f"/tunes/{gone}").status_code == 404
    assert rows.tune_folder(services, gone).exists() and notes(services) == [f"tunes/{gone}"]
    at_start(services)
    assert not rows.tune_folder(services, gone).exists() and notes(services) == []
    assert (rows.tune_folder(services, kept) / "model" / "lora.safetensors").read_bytes() == b"weights"


def test_a_prompt_whose_deletion_was_cut_short_is_gone_after_the_next_start(
    client: TestClient, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune_id = trained(client, services)
    home = rows.tune_folder(services, tune_id)
    gone, kept = prompt_with_picture(client, tune_id), prompt_with_picture(client, tune_id)
    for prompt_id in (gone, kept):
        end(services, "rendered", ["0.png"])
        for file in (f"prompts/{prompt_id}/0.png", f"previews/{prompt_id}.jpg", f"previews/{prompt_id}.part"):
            (home / file).parent.mkdir(parents=True, exist_ok=True)
            (home / file).write_bytes(photo())
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(deletions, "remove", killed)
        prompts.delete_prompt(services, gone)
    assert len(notes(services)) == 4
    at_start(services)
    left = {path.relative_to(home).as_posix() for path in home.rglob("*") if path.parent.parent == home}
    files = {f"prompts/{kept}", f"inputs/{kept}", f"previews/{kept}.jpg", f"previews/{kept}.part"}
    assert left == files | {"images/000.png", "model/lora.safetensors"}
    assert notes(services) == []


def test_deleting_leaves_no_note(client: TestClient, services: Services) -> None:
    tune_id = trained(client, services)
    prompt_id = prompt_with_picture(client, tune_id)
    assert client.delete(f"/prompts/{prompt_id}").status_code == 200
    assert list((rows.tune_folder(services, tune_id) / "inputs").iterdir()) == []
    assert client.delete(f"/tunes/{tune_id}").status_code == 200
    assert left_behind(services) == [] and notes(services) == []


def test_what_cannot_be_removed_now_is_removed_later(
    client: TestClient, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune_id = trained(client, services)
    with monkeypatch.context() as patch:
        patch.setattr("trainer.files.shutil.rmtree", lambda *_, **__: None)  # a file system that is gone for now
        assert client.delete(f"/tunes/{tune_id}").status_code == 200
    assert rows.tune_folder(services, tune_id).exists() and notes(services) == [f"tunes/{tune_id}"]
    loop = expiry.expiry_loop(services.settings, services.store)
    loop.start()
    loop.close()
    assert not rows.tune_folder(services, tune_id).exists() and notes(services) == []


def test_two_who_delete_a_tune_at_once_do_not_hurt_each_other(client: TestClient, services: Services) -> None:
    tune_id = trained(client, services)
    for number in range(500):
        (rows.tune_folder(services, tune_id) / f"{number}").touch()
    answers: list[int] = []
    threads = [
        threading.Thread(target=lambda: answers.append(client.delete(f"/tunes/{tune_id}").status_code))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [200, 404, 404, 404]
    assert left_behind(services) == [] and notes(services) == []


def test_a_note_that_leads_elsewhere_removes_nothing(services: Services, tmp_path: Path) -> None:
    (mine := tmp_path / "mine").mkdir()
    texts = ("../mine", str(mine), ".", "", "tunes", "tunes/../../mine")
    with services.store.transaction() as db:
        db.executemany("INSERT INTO deletions VALUES (?)", [(text,) for text in texts])
    (services.settings.outputs / "tunes").mkdir()
    at_start(services)
    assert mine.exists() and (services.settings.outputs / "tunes").exists() and notes(services) == []


def test_a_link_is_removed_and_what_it_leads_to_stays(services: Services, tmp_path: Path) -> None:
    (mine := tmp_path / "mine").mkdir()
    (link := services.settings.outputs / "tunes" / "5").parent.mkdir()
    link.symlink_to(mine)
    note_deletions(services.settings.outputs, services.store, link)
    finish_deletions(services.settings.outputs, services.store)
    assert mine.exists() and not link.is_symlink() and notes(services) == []


@pytest.mark.long
def test_an_app_that_is_killed_while_it_deletes_goes_on_at_its_next_start(
    tmp_path: Path, dog_photos: Callable[[int], list[Path]]
) -> None:
    (outputs := tmp_path / "outputs").mkdir()
    options = ("--models", str(tmp_path / "models"))
    with running(outputs, *options) as app:
        app.ready()
        for title in ("gone", "kept"):
            post_tune(app, title, dog_photos(1), steps=1).raise_for_status()
            app.finished(1)
        app.finished(2)
        for number in range(20_000):  # so that removing them takes a while
            (outputs / "tunes/1/samples" / f"{number}.png").touch()

        def delete() -> None:
            with pytest.raises(httpx.TransportError):
                httpx.delete(f"{app.url}/tunes/1", timeout=60)

        deleting = threading.Thread(target=delete)
        deleting.start()
        wait_for(lambda: app.http.get("/tunes/1").status_code == 404)
        app.kill()
        deleting.join()
        assert (outputs / "tunes/1").exists()
    with sqlite3.connect(outputs / "tunebooth.db") as database:
        assert database.execute("SELECT path FROM deletions").fetchall() == [("tunes/1",)]
    database.close()
    with running(outputs, *options) as app:
        app.ready()
        assert [path.name for path in (outputs / "tunes").iterdir()] == ["2"]
        assert app.tune(2)["status"] == "trained"
        assert app.http.get(app.tune(2)["ckpt_url"]).status_code == 200


# A kill between the files' place and the row


def test_the_photos_of_a_tune_whose_creation_was_cut_short_are_gone_after_the_next_start(
    client: TestClient, services: Services, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed_after_the_move(path: Path) -> None:
        if path.name == "tunes":
            raise Killed

    request = {"title": "Rex", "name": "dog", "branch": "fast"}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(tunes, "fsync", killed_after_the_move)
        patch.setattr(folders, "discard", lambda _: None)  # a process that is gone clears up nothing
        tunes.create_tune(services, request, [upload(tmp_path / "sent", "rex.png", photo())])
    (folder,) = (services.settings.outputs / "tunes").iterdir()
    assert (folder / "images").exists()
    at_start(services)
    assert left_behind(services) == []
    again = create(client)
    assert client.get(again["orig_images"][0]).status_code == 200
    assert not (rows.tune_folder(services, again["id"]) / UNCOMMITTED).exists()


def test_the_pictures_of_a_prompt_whose_creation_was_cut_short_are_gone_after_the_next_start(
    client: TestClient, services: Services, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune_id = trained(client, services)
    kept = prompt_with_picture(client, tune_id)
    inputs = rows.tune_folder(services, tune_id) / "inputs"
    request = {"text": "ohwx dog", "input_image": upload(tmp_path / "sent", "rex.png", photo())}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(services.store, "update", killed)
        prompts.create_prompt(services, tune_id, request)
    assert len(list(inputs.iterdir())) == 2
    at_start(services)
    assert [path.name for path in inputs.iterdir()] == [str(kept)]
    assert [path.name for path in (inputs / str(kept)).iterdir()] == ["input_image.png"]


# Leftovers


def test_leftovers_are_removed_at_the_start_and_nothing_else(client: TestClient, services: Services) -> None:
    known, outputs = trained(client, services), services.settings.outputs
    prompt_id = prompt_with_picture(client, known)
    stays = {
        f"tunes/{known}/images/000.png", f"tunes/{known}/model/lora.safetensors", "tunes/71/model/lora.safetensors",
        f"tunes/71/model/lora{WASTE}", f"tunes/71/seen{WASTE}/000.png", "tunes/72/state/step-000005/state.safetensors",
        f"tunes/75{WASTE}/model/a", f"tunes/73/{UNCOMMITTED}", "tunes/73/model/lora.safetensors", "tunes/notes.txt",
        f"models/base{WASTE}", f"models/other{WASTE}/unet/a.safetensors", "my.partial-1.txt", "bases/5/prompts/2/0.png",
        "trash/9-1/model/a", f"tunes/{known}/inputs/{prompt_id}/input_image.png", "packs/dog.toml",
        "tunes/mine.partial-copy/a.txt",
    }  # fmt: skip
    goes = {
        f"tunes/{known}/model{WASTE}/lora.safetensors", f"tunes/{known}/state/step-000005{WASTE}/a",
        f"tunes/{known}/dataset/prepared.json{WASTE}", f"tunes/70{WASTE}/images/a", f"tunes/74/{UNCOMMITTED}",
        "tunes/74/images/000.png", f"tunes/{known}/inputs/99/{UNCOMMITTED}", f"tunes/{known}/inputs/99/input_image.png",
        f"tunes/{known}/inputs/{prompt_id}/{UNCOMMITTED}", "incoming/a/images/000.png", "incoming/gradio/ab/cd/a.jpg",
        f"cache/a/base{WASTE}/b", f"packs/dog.toml{WASTE}", "tunebooth.db.version-5.partial-",
        f"bases/5/prompts/3{WASTE}/0.png", f"bases/5/inputs/98/{UNCOMMITTED}",
    }  # fmt: skip
    for path in (outputs / name for name in stays | goes):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_bytes(b"")
    at_start(services)
    ours = ("tunebooth.db", "tunebooth.db-wal", "tunebooth.db-shm", ".lock", ".link-secret", "request.json")
    left = {path.relative_to(outputs).as_posix() for path in outputs.rglob("*") if path.is_file()}
    assert {name for name in left if Path(name).name not in ours} == stays
    assert not (outputs / "tunes/74").exists() and not (outputs / "bases/5/inputs/98").exists()
    assert (outputs / "incoming").stat().st_mode & 0o777 == 0o700


# Exports and tunes that have expired


def test_the_files_of_an_export_that_failed_go_with_its_row(client: TestClient, services: Services) -> None:
    tune_id = trained(client, services)
    assert client.get(f"/tunes/{tune_id}/model", params={"format": "checkpoint"}).status_code == 202
    (half := rows.tune_folder(services, tune_id) / "exports" / "checkpoint").mkdir(parents=True)
    end(services, "failed", error="no memory")
    assert client.get(f"/tunes/{tune_id}/model", params={"format": "checkpoint"}).status_code == 409
    assert not half.exists() and services.store.find("exports") == []


def test_a_tune_that_expired_is_in_the_trash_also_where_the_move_was_cut_short(
    client: TestClient, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune_id = trained(client, services)
    row = services.store.get("tunes", tune_id)
    assert row is not None
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(expiry, "move_to_trash", killed)
        expiry.expire(services.settings, services.store, row)
    assert rows.tune_folder(services, tune_id).exists()
    expiry.expire_tunes(services.settings, services.store)  # no lifetime is set any more
    assert not rows.tune_folder(services, tune_id).exists()
    (folder,) = expiry.trash_of(services.settings).iterdir()
    assert (folder / "model").exists()


def test_deleting_a_tune_that_has_expired_removes_it_from_the_trash(client: TestClient, services: Services) -> None:
    tune_id = trained(client, services)
    row = services.store.get("tunes", tune_id)
    assert row is not None
    expiry.expire(services.settings, services.store, row)
    trash = expiry.trash_of(services.settings)
    assert len(list(trash.iterdir())) == 1
    assert client.delete(f"/tunes/{tune_id}").status_code == 200
    assert list(trash.iterdir()) == []
    assert json.loads(client.get("/tunes").text) == [] and notes(services) == []
