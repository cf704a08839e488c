"""New numbers lie above every folder, and a folder without a row is never removed or written over."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from tests.helpers.api import create
from tests.helpers.web import photo, upload
from trainer.contract.disk import DiskProblem
from trainer.files import sweep
from trainer.settings import Settings
from trainer.studio import expiry, folders, tunes
from trainer.studio.deletions import remove_leftovers
from trainer.studio.folders import find_orphans, keep_prompt_numbers, orphans_note
from trainer.studio.rows import Services, tune_folder

pytest_plugins = ("tests.helpers.web",)

Content = dict[str, bytes]


def with_model(folder: Path) -> Path:
    """A folder of a tune that was trained."""
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "lora.safetensors").write_bytes(b"weights of an earlier tune")
    (folder / "images").mkdir()
    (folder / "images" / "000.png").write_bytes(photo())
    return folder


def content(folder: Path) -> Content:
    """Every file in it."""
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_new_tune_gets_a_number_above_the_folders_that_are_there(client: TestClient, settings: Settings) -> None:
    earlier = [with_model(settings.outputs / "tunes" / number) for number in ("1", "2", "7")]
    before = [content(folder) for folder in earlier]
    assert create(client, "Rex")["id"] == 8
    with_model(settings.outputs / "tunes" / "12")  # copied back while the app runs
    assert create(client, "Fido")["id"] == 13
    assert [content(folder) for folder in earlier] == before


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("tunes/5.partial-0a1b2c3d", 6),
        ("trash/5-1700000000", 6),
        ("tunes/5", 6),
        ("tunes/notes", 1),
        ("tunes/05", 1),
        ("tunes/1700000000", 1),  # as a base's number, or a time
        ("trash/notes-of-mine", 1),
    ],
)
def test_what_counts_as_the_folder_of_a_tune(client: TestClient, settings: Settings, name: str, number: int) -> None:
    (settings.outputs / name).mkdir(parents=True)
    assert create(client, "Rex")["id"] == number


def test_a_file_in_the_place_of_a_folder_is_left_alone(client: TestClient, settings: Settings) -> None:
    (settings.outputs / "tunes").mkdir()
    (settings.outputs / "tunes" / "1").write_text("mine")
    assert create(client, "Rex")["id"] == 2
    assert (settings.outputs / "tunes" / "1").read_text() == "mine"


def test_a_request_that_cannot_be_committed_removes_its_own_folder_and_no_other(
    client: TestClient, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = with_model(tune_folder(services, 4))
    before = content(earlier)

    def full(path: Path) -> None:
        if path.name == "tunes":  # the new folder is in place by now
            assert (path / "5").exists()
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(tunes, "fsync", full)
    with pytest.raises(DiskProblem, match="Input/output"):
        create_raising(client, services)
    monkeypatch.undo()
    assert [path.name for path in (services.settings.outputs / "tunes").iterdir()] == ["4"]
    assert content(earlier) == before
    assert services.store.find("tunes") == [] and services.store.queue_length() == 0
    assert create(client, "Rex")["id"] == 5


def create_raising(client: TestClient, services: Services) -> None:
    """Create a tune by the verb, which raises what the web app would answer with 500."""
    tunes.create_tune(
        services,
        {"title": "Rex", "name": "dog", "branch": "fast"},
        [upload(services.settings.outputs / "sent", "a.png", photo())],
    )


def test_prompts_are_numbered_above_all_folders_of_prompts(client: TestClient, services: Services) -> None:
    outputs = services.settings.outputs
    for number, of in enumerate(
        ("tunes/9/prompts", "bases/690204/prompts", "trash/3-17/prompts", "tunes/9/inputs"), 20
    ):
        (outputs / of / str(number)).mkdir(parents=True)
    (outputs / "tunes/9/prompts/sheet").mkdir()
    keep_prompt_numbers(services.store, outputs)
    tune = create(client, "Rex", ("tune[prompts_attributes][][text]", "ohwx dog"))
    assert tune["prompts"][0]["id"] == 24
    keep_prompt_numbers(services.store, outputs)  # never down
    answer = client.post(f"/tunes/{tune['id']}/prompts", json={"prompt": {"text": "ohwx dog"}})
    assert answer.json()["id"] == 25


def test_folders_without_a_row_are_counted(client: TestClient, services: Services) -> None:
    outputs = services.settings.outputs
    assert (
        not find_orphans(services.store, outputs) and orphans_note(find_orphans(services.store, outputs), outputs) == ""
    )
    known = create(client, "Rex", ("tune[prompts_attributes][][text]", "ohwx dog"))
    home = tune_folder(services, known["id"])
    for name in (f"prompts/{known['prompts'][0]['id']}", "prompts/30", "prompts/31.partial-1a2b3c4d"):
        (home / name).mkdir(parents=True)
    (outputs / "bases/690204/prompts/32").mkdir(parents=True)
    for number in ("11", "9"):
        (with_model(outputs / "tunes" / number) / "prompts" / "40").mkdir(parents=True)
    orphans = find_orphans(services.store, outputs)
    assert [path.name for path in orphans.tunes] == ["9", "11"]
    assert [path.relative_to(outputs).as_posix() for path in orphans.prompts] == [
        f"tunes/{known['id']}/prompts/30",
        "bases/690204/prompts/32",
    ]
    note = orphans_note(orphans, outputs)
    assert "2 tunes and 2 prompts" in note and "9, 11" in note and f"app.py rescue --outputs {outputs}" in note
    with services.store.transaction() as db:  # they are being deleted
        db.executemany("INSERT INTO deletions VALUES (?)", [("tunes/9",), ("bases/690204/prompts/32",)])
    assert "1 tune and 1 prompt that" in orphans_note(find_orphans(services.store, outputs), outputs)


def test_what_a_killed_process_left_is_removed_but_for_models_without_a_row(
    client: TestClient, services: Services
) -> None:
    outputs = services.settings.outputs
    known = tune_folder(services, create(client, "Rex")["id"])
    lost = with_model(outputs / "tunes" / "9")
    being_removed = with_model(outputs / "tunes" / "10.partial-1a2b3c4d")
    kept = [lost, being_removed]
    for folder in (known, lost):
        (folder / "samples.partial-2a2b3c4d").mkdir()
        (folder / "samples.partial-2a2b3c4d" / "half").write_bytes(b"half")
    noted = with_model(outputs / "tunes" / "11.partial-3a2b3c4d")
    incoming = with_model(outputs / "incoming" / ".partial-4a2b3c4d")  # of a face
    with services.store.transaction() as db:
        db.execute("INSERT INTO deletions VALUES ('tunes/11')")
    before = [content(folder) for folder in kept]
    remove_leftovers(outputs, services.store)
    assert [content(folder) for folder in kept] == before
    assert not any(path.exists() for path in (known / "samples.partial-2a2b3c4d", noted, incoming))
    sweep(outputs)  # what nobody spares goes
    assert not being_removed.exists()


def test_an_expired_tune_that_the_database_does_not_know_stays_in_the_trash(
    client: TestClient, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    trash = expiry.trash_of(services.settings)
    known = create(client, "Rex")["id"]
    lost, own, empty = with_model(trash / "99-1"), with_model(trash / f"{known}-1"), trash / "98-1"
    empty.mkdir()
    expiry.empty_trash(services.store, trash)
    assert lost.exists() and not own.exists() and not empty.exists()


def test_a_deleted_tune_leaves_nothing_in_the_trash(client: TestClient, services: Services) -> None:
    trash = expiry.trash_of(services.settings)
    tune_id = create(client, "Rex")["id"]
    own, other = with_model(trash / f"{tune_id}-1700000000"), with_model(trash / f"{tune_id}1-1700000000")
    assert client.delete(f"/tunes/{tune_id}").status_code == 200
    assert not own.exists() and other.exists() and folders.has_model(other)


def test_the_folder_of_tunes_may_be_a_link_to_another_disk(
    client: TestClient, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, rename = tmp_path / "disk", os.rename
    disk.mkdir()
    (settings.outputs / "tunes").symlink_to(disk)

    def rename_on_one_disk(source: Path, target: Path) -> None:
        if (disk in Path(source).resolve().parents) != (disk in Path(target).resolve().parents):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        rename(source, target)

    monkeypatch.setattr(os, "rename", rename_on_one_disk)
    tune = create(client, "Rex")
    assert content(disk / str(tune["id"])).keys() >= {"images/000.png", "request.json"}
    assert not list(disk.glob("*.partial*")) and not list((settings.outputs / "incoming").iterdir())
    expiry.move_to_trash(settings, tune["id"])
    (kept,) = expiry.trash_of(settings).iterdir()
    assert "images/000.png" in content(kept) and not list(disk.iterdir())
