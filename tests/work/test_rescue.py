"""`app.py rescue` takes tunes, prompts and pictures in again that the database does not know."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.helpers.app import ROOT, App, post, running
from tests.helpers.snapshot import steady
from tests.helpers.studio import Studio
from tests.helpers.web import client_of
from trainer.photos.decoder import Decoder
from trainer.studio import prompts, tunes
from trainer.work.rescue import rescue

pytest_plugins = ("tests.helpers.web",)

OLD = Path(__file__).parents[1] / "fixtures" / "studio_0_1"
TRAINED, FACE, FAILED, EXPIRED, CANCELED, WAITING = range(1, 7)
KNOWN = "1, 2, 3, 5, 6"  # the tunes that have a folder


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    """The folders of a studio whose database was moved away."""
    shutil.copytree(OLD / "outputs", tmp_path / "outputs")
    (tmp_path / "outputs" / "tunebooth.db").unlink()
    return tmp_path / "outputs"


@pytest.fixture
def open_studio(tmp_path: Path, decoder: Decoder) -> Iterator[Callable[[], Studio]]:
    """Opens the studio of `outputs`; its worker is not started."""
    opened: list[Studio] = []

    def open_() -> Studio:
        opened.append(Studio(tmp_path, decoder, [], weights=tmp_path / "weights"))
        return opened[-1]

    yield open_
    for studio in opened:
        studio.close()


def rescued(studio: Studio, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    """The exit code of the command, and the lines that it printed; the studio is closed, and open again after it."""
    studio.store.close()
    capsys.readouterr()
    code = rescue(studio.settings)
    return code, capsys.readouterr().out.splitlines()


def content(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def tables(outputs: Path) -> dict[str, list[Any]]:
    with sqlite3.connect(outputs / "tunebooth.db") as db:
        return {
            name: db.execute(f"SELECT * FROM {name}").fetchall() for name in ("tunes", "prompts", "jobs", "callbacks")
        }


def test_a_studio_without_its_database_answers_again(
    outputs: Path, open_studio: Callable[[], Studio], capsys: pytest.CaptureFixture[str]
) -> None:
    files = content(outputs / "tunes")
    code, lines = rescued(open_studio(), capsys)
    assert code == 0 and lines[:2] == [
        "tune 1 (trained): trained; 2 files in images/",
        "prompt 1 of tune 1: 2 pictures",
    ]
    assert lines[-1] == "Taken in again: 5 tunes and 5 prompts. Left as they are: 0 folders."
    studio = open_studio()
    client = client_of(studio.services)
    told = json.loads((OLD / "answers.json").read_text("utf-8"))["answers"]
    for tune_id, more in ((TRAINED, "prompts"), (FACE, "photos")):  # a face's verdicts were in the database alone
        was = told[f"/tunes/{tune_id}"]
        tune = steady(client.get(f"/tunes/{tune_id}").raise_for_status().json(), {studio.settings.base_url: "US"})
        assert {key for key in was if tune[key] != was[key]} <= {more, "progress", "started_training_at"}
        assert tune["status"] == "trained" and tune["progress"]["step"] == was["progress"]["step"]
    one = told[f"/tunes/{TRAINED}"]["prompts"][0]
    again = steady(client.get(f"/prompts/{one['id']}").raise_for_status().json(), {studio.settings.base_url: "US"})
    assert {key for key in one if again[key] != one[key]} <= {"progress", "started_training_at", "url"}
    for link in [*client.get("/prompts/1").json()["images"], client.get(f"/tunes/{TRAINED}").json()["ckpt_url"]]:
        assert client.get(link).status_code == 200
    for tune_id in (FAILED, CANCELED, WAITING):
        tune = client.get(f"/tunes/{tune_id}").json()
        assert (tune["status"], {prompt["status"] for prompt in tune["prompts"]}) == ("canceled", {"canceled"})
        for key in ("title", "args", "token", "base_tune_id", "callback", "characteristics", "branch"):
            assert steady(tune, {studio.settings.base_url: "US"})[key] == told[f"/tunes/{tune_id}"][key], key
        was = told[f"/tunes/{tune_id}"]
        assert [photo["file"] for photo in tune["photos"]] == [photo["file"] for photo in was["photos"]]
    assert content(outputs / "tunes") == files
    assert tables(outputs)["jobs"] == tables(outputs)["callbacks"] == []


def test_twice_changes_nothing(
    outputs: Path, open_studio: Callable[[], Studio], capsys: pytest.CaptureFixture[str]
) -> None:
    studio = open_studio()
    rescued(studio, capsys)
    before = tables(outputs)
    assert rescued(studio, capsys) == (0, ["Taken in again: 0 tunes and 0 prompts. Left as they are: 0 folders."])
    assert tables(outputs) == before


def test_what_is_taken_in_again_is_rendered_resumed_and_built_upon(
    outputs: Path, open_studio: Callable[[], Studio], capsys: pytest.CaptureFixture[str]
) -> None:
    rescued(open_studio(), capsys)
    studio = open_studio()
    prompts.create_prompt(studio.services, TRAINED, {"text": "ohwx dog", "num_images": 1, "steps": 2})
    tunes.resume_tune(studio.services, CANCELED)  # it has a state, and stands on the first one
    tunes.resume_tune(studio.services, WAITING)
    studio.worker.start()
    rendered, resumed, begun = (studio.ended(tune_id) for tune_id in (TRAINED, CANCELED, WAITING))
    studio.worker.stop()
    assert [prompt.status for prompt in rendered.prompts] == ["rendered", "rendered"]
    assert (resumed.status, begun.status, resumed.error, begun.error) == ("trained", "trained", None, None)
    assert studio.events(CANCELED) == [("started", 0), ("resumed", 1)]
    assert [prompt.status for prompt in (*resumed.prompts, *begun.prompts)] == ["rendered"] * 3
    assert begun.prompts[1].tunes == [WAITING, TRAINED]  # its text names the other's LoRA


def test_a_model_says_what_it_is_where_the_request_is_lost(
    outputs: Path, open_studio: Callable[[], Studio], capsys: pytest.CaptureFixture[str]
) -> None:
    told = json.loads((OLD / "answers.json").read_text("utf-8"))["answers"][f"/tunes/{TRAINED}"]
    for name in ("request.json", "config.json", "dataset", "log.jsonl"):
        path = outputs / "tunes" / str(TRAINED) / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    _, lines = rescued(open_studio(), capsys)
    assert lines[0] == "tune 1 (trained): trained; 2 files in images/"
    tune = client_of(open_studio().services).get(f"/tunes/{TRAINED}").json()
    for key in ("title", "name", "token", "args", "branch", "status"):
        assert tune[key] == told[key], key
    assert [photo["file"] for photo in tune["photos"]] == ["000.jpg", "001.jpg"]
    assert tune["prompts"][0]["text"] == "ohwx dog" and tune["prompts"][0]["seed"] == 7
    assert "restored from its pictures" in tune["prompts"][0]["warnings"][0]


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def no_request(folder: Path) -> None:
    (folder / "request.json").unlink()
    for file in (folder / "model").iterdir():
        save_file(load_file(file), file)  # without metadata


def unknown_files(folder: Path) -> None:
    for file in (folder / "model").iterdir():
        file.rename(file.with_suffix(".txt"))


def emptied(folder: Path) -> None:
    for name in ("model", "dataset", "images"):
        shutil.rmtree(folder / name)


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (lambda folder: cut(folder / "model" / "lora.safetensors"), "model/lora.safetensors: it is broken"),
        (lambda folder: (folder / "model" / "lora.safetensors").write_text("no"), "not a safetensors file"),
        (no_request, "it has no request.json"),
        (unknown_files, "none of the files"),
        (lambda folder: (folder / "dataset" / "prepared.json").write_text("[1, 2]"), "prepared.json cannot be read"),
        (emptied, "neither a model nor photos"),
        (lambda folder: (folder / "config.json").write_text('{"steps": [[]]}'), "steps"),
        (lambda folder: (folder / "config.json").write_text("["), "config.json cannot be read"),
    ],
)
def test_what_cannot_be_read_is_named_and_left_alone(
    outputs: Path,
    open_studio: Callable[[], Studio],
    capsys: pytest.CaptureFixture[str],
    harm: Callable[[Path], object],
    why: str,
) -> None:
    harm(outputs / "tunes" / str(TRAINED))
    before = content(outputs / "tunes" / str(TRAINED))
    code, lines = rescued(open_studio(), capsys)
    assert code == 1
    assert lines[0].startswith("tunes/1: left as it is: ") and why in lines[0]
    assert lines[1] == "tune 2 (a face): trained; 2 files in images/"  # the others are taken in
    assert content(outputs / "tunes" / str(TRAINED)) == before
    assert client_of(open_studio().services).get("/tunes/1").status_code == 404


def test_a_tune_whose_log_is_broken_is_restored_without_its_readings(
    outputs: Path, open_studio: Callable[[], Studio], capsys: pytest.CaptureFixture[str]
) -> None:
    (outputs / "tunes" / str(TRAINED) / "log.jsonl").write_bytes(b"\xff\xfe")
    assert rescued(open_studio(), capsys)[0] == 0
    tune = client_of(open_studio().services).get("/tunes/1").json()
    assert (tune["status"], tune["progress"]["loss"]) == ("trained", None)


def test_a_picture_that_says_nothing_is_named_and_left_alone(
    outputs: Path, open_studio: Callable[[], Studio], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = outputs / "tunes" / str(TRAINED) / "prompts"
    (folder / "7").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "7" / "0.png")
    (folder / "8").mkdir()
    code, lines = rescued(open_studio(), capsys)
    assert code == 1 and lines[1] == "prompt 1 of tune 1: 2 pictures"
    assert lines[2].startswith("tunes/1/prompts/7: left as it is: 0.png does not say how it was made")
    assert lines[3] == "tunes/1/prompts/8: left as it is: it has no pictures"
    assert (folder / "7" / "0.png").exists()


def test_a_prompt_whose_number_is_taken_gets_a_new_one(
    outputs: Path, open_studio: Callable[[], Studio], capsys: pytest.CaptureFixture[str]
) -> None:
    lost, kept = outputs / "lost", outputs / "tunes" / str(TRAINED)
    kept.rename(lost)
    rescued(studio := open_studio(), capsys)  # prompt 1 is one of tune 3 now
    lost.rename(kept)
    pictures = content(kept / "prompts")
    _, lines = rescued(studio, capsys)
    assert lines[1] == "prompt 5 of tune 1: 2 pictures; its number 1 belongs to another prompt now"
    assert [path.name for path in (kept / "prompts").iterdir()] == ["5"]
    assert sorted(content(kept / "prompts").values()) == sorted(pictures.values())
    assert client_of(open_studio().services).get("/prompts/5").json()["tune_id"] == TRAINED


def test_a_prompt_of_a_tune_that_is_known_and_of_a_base_are_taken_in(
    outputs: Path, open_studio: Callable[[], Studio], capsys: pytest.CaptureFixture[str]
) -> None:
    rescued(studio := open_studio(), capsys)
    pictures = outputs / "tunes" / str(TRAINED) / "prompts" / "1"
    shutil.copytree(pictures, outputs / "tunes" / str(TRAINED) / "prompts" / "50")
    shutil.copytree(pictures, outputs / "bases" / "690204" / "prompts" / "51")
    _, lines = rescued(studio, capsys)
    assert lines[:2] == ["prompt 50 of tune 1: 2 pictures", "prompt 51 of base 690204: 2 pictures"]
    studio = open_studio()
    rows = {row["id"]: row for row in studio.store.find("prompts")}
    assert (rows[50]["tune_id"], rows[50]["base_id"]) == (TRAINED, None)
    assert (rows[51]["tune_id"], rows[51]["base_id"], rows[51]["lora_id"]) == (None, 690204, TRAINED)
    client = client_of(studio.services)
    prompt = client.get("/tunes/690204/prompts/51").json()
    assert prompt["tune_id"] == 690204 and len(prompt["images"]) == 2
    assert all(client.get(link).status_code == 200 for link in prompt["images"])
    assert [one["id"] for one in client.get(f"/tunes/{TRAINED}/prompts").json()] == [51, 50, 1]


def test_folders_that_stand_elsewhere_are_told_of(
    outputs: Path, open_studio: Callable[[], Studio], capsys: pytest.CaptureFixture[str]
) -> None:
    (outputs / "trash").mkdir()
    (outputs / "tunes" / str(TRAINED)).rename(outputs / "trash" / f"{TRAINED}-1700000000")
    (outputs / "tunes" / str(FACE)).rename(outputs / "tunes" / f"{FACE}.partial-00")
    code, lines = rescued(open_studio(), capsys)
    assert code == 1
    assert "trash/1-1700000000: left as it is: an expired tune; delete it, or move it to tunes/1" in lines[-3]
    assert "tunes/2.partial-00: left as it is: it was being removed" in lines[-2]


def command(outputs: Path) -> subprocess.CompletedProcess[str]:
    """`app.py rescue`, as a user calls it."""
    return subprocess.run(
        [sys.executable, "app.py", "rescue", "--outputs", str(outputs)], cwd=ROOT, capture_output=True, text=True
    )


def rendered(app: App, tune_id: int) -> list[dict[str, Any]]:
    """The tune's prompts, each with pictures that can be fetched."""
    tune = app.finished(tune_id)
    for prompt in tune["prompts"]:
        assert prompt["status"] == "rendered" and prompt["images"], prompt["error"]
        assert all(app.http.get(link).status_code == 200 for link in prompt["images"])
    return list(tune["prompts"])


@pytest.mark.long
def test_an_empty_database_beside_folders_does_not_start_without_a_word(outputs: Path, tmp_path: Path) -> None:
    (outputs / "tunebooth.db").touch()
    before = content(outputs / "tunes")
    with running(outputs, "--models", str(tmp_path / "models")) as app:
        app.ready()
        warning = app.errors.read_text()
        assert f"the files of 5 tunes that the database does not know (tune folders: {KNOWN})" in warning
        assert f"app.py rescue --outputs {outputs}" in warning
        assert "5 tunes that the database does not know" in app.http.get("/").text
        refused = command(outputs)
        assert refused.returncode == 75 and f"in use by process {app.process.pid}" in refused.stderr
    assert content(outputs / "tunes") == before


@pytest.mark.long
def test_the_advice_to_move_the_database_away_costs_nobody_a_model(
    tmp_path: Path, dog_photos: Callable[[int], list[Path]]
) -> None:
    """Two tunes are trained, the database goes, the app starts, and another tune is made."""
    outputs, photos = tmp_path / "outputs", dog_photos(3)
    outputs.mkdir()
    prompt = {"prompts_attributes][][text": "ohwx dog", "prompts_attributes][][num_images": 1}
    options = ("--models", str(tmp_path / "models"))
    with running(outputs, *options) as app:
        app.ready()
        for title in ("Rex", "Fido"):
            assert post(app, title, photos, steps=4, **prompt).status_code == 201
        before = [rendered(app, tune_id) for tune_id in (1, 2)]
        app.stop()
    models = {tune_id: content(outputs / "tunes" / str(tune_id) / "model") for tune_id in (1, 2)}
    (outputs / "tunebooth.db").rename(tmp_path / "damaged.db")

    with running(outputs, *options) as app:
        app.ready()
        warning = app.errors.read_text()
        assert "2 tunes" in warning and "app.py rescue --outputs" in warning
        assert "2 tunes that the database does not know" in app.http.get("/").text
        assert post(app, "Bello", photos, steps=4, **prompt).json()["id"] == 3
        (new,) = rendered(app, 3)
        assert new["id"] == 3
        app.stop()
    for tune_id, files in models.items():
        assert content(outputs / "tunes" / str(tune_id) / "model") == files

    done = command(outputs)
    assert done.returncode == 0, done.stderr
    assert "tune 1 (Rex): trained" in done.stdout and "tune 2 (Fido): trained" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("Taken in again: 2 tunes and 2 prompts.")
    assert command(outputs).stdout.startswith("Taken in again: 0 tunes and 0 prompts.")

    with running(outputs, *options) as app:
        app.ready()
        for tune_id, prompts_before in zip((1, 2), before, strict=True):
            tune = app.tune(tune_id)
            assert (tune["status"], tune["title"]) == ("trained", {1: "Rex", 2: "Fido"}[tune_id])
            assert app.http.get(tune["ckpt_url"]).content == models[tune_id]["lora.safetensors"]
            (one,) = rendered(app, tune_id)
            assert {key: one[key] for key in ("id", "text", "num_images", "seed")} == {
                key: prompts_before[0][key] for key in ("id", "text", "num_images", "seed")
            }
        answer = app.http.post("/tunes/1/prompts", json={"prompt": {"text": "ohwx dog at sea", "num_images": 1}})
        assert answer.json()["id"] == 4
        assert len(rendered(app, 1)) == 2
        assert "does not know" not in app.http.get("/").text
