"""A disk that is full: jobs wait, the queue says why, and all goes on as if nothing had been."""

from __future__ import annotations

import resource
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import sync_playwright
from safetensors.torch import load_file

from tests.helpers.app import App, post, running, wait_for
from tests.helpers.small_disk import fill, small_disk
from tests.helpers.studio import PATIENCE_S, PROMPT, Studio, same
from trainer.contract.disk import RESERVE_BYTES
from trainer.photos.decoder import Decoder
from trainer.studio import prompts, tunes
from trainer.web.page import live_parts

pytest_plugins = ("tests.helpers.web",)

CHROMIUM = Path("/usr/bin/chromium")


@pytest.fixture
def studio(
    tmp_path: Path, decoder: Decoder, dog_photos: Callable[[int], list[Path]], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Studio]:
    """A studio whose outputs are on a disk of 40 MB, which is checked five times a second."""
    monkeypatch.setattr("trainer.work.hold.LOOK_SECONDS", 0.2)
    with small_disk(tmp_path / "outputs", 40):
        opened = Studio(tmp_path, decoder, dog_photos(3))
        yield opened
        opened.close()


def until(true: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_tune_waits_while_the_disk_is_full_and_ends_as_if_it_had_not_been(studio: Studio) -> None:
    outputs = studio.settings.outputs
    with studio.store.transaction():
        whole, tune_id = studio.create("whole"), studio.create("waits", args="save_every=2")
        after = studio.create("after", steps=1)
        studio.store.at_step[tune_id, 5] = lambda: fill(outputs)
    studio.worker.start()
    until(lambda: studio.store.hold)
    waiting = tunes.get_tune(studio.services, tune_id)
    reason = waiting.progress.stage
    assert reason == studio.store.hold and f"the disk of {outputs}" in reason and "it goes on by itself" in reason
    assert (waiting.status in ("training", "queued"), waiting.error) == (True, None)
    assert tunes.get_tune(studio.services, after).status == "queued"
    shown = live_parts(studio.services, ("", "", ""))[0]
    assert "tb-hold" in str(shown) and "The queue waits" in str(shown)
    assert "step-000004" in studio.states(tune_id)
    assert not list(outputs.rglob("*.partial-*"))  # of what was not written whole, nothing stays

    (outputs / "filler").unlink()
    ended, last = studio.ended(tune_id), studio.ended(after)
    assert (ended.status, last.status, studio.store.hold) == ("trained", "trained", "")
    assert studio.events(tune_id)[0] == ("started", 0) and studio.events(tune_id)[1][0] == "resumed"
    assert same(studio.weights(tune_id), studio.weights(whole))


def test_what_a_run_will_write_is_known_before_its_first_step(studio: Studio) -> None:
    outputs = studio.settings.outputs
    fill(outputs, RESERVE_BYTES + 2**20)
    tune_id = studio.create("too large", args="rank=64")
    studio.worker.start()
    until(lambda: "states and models" in studio.store.hold)
    assert "about" in studio.store.hold and "MB free" in studio.store.hold
    until(lambda: tunes.get_tune(studio.services, tune_id).status == "queued")
    assert not (outputs / f"tunes/{tune_id}/state").exists()
    small = studio.create("small", steps=1, args="rank=1")
    tunes.delete_tune(studio.services, tune_id)  # then its need is no reason to wait any more
    assert studio.ended(small).status == "trained"


def test_a_prompt_waits_for_room_for_its_pictures(studio: Studio) -> None:
    outputs = studio.settings.outputs
    tune_id = studio.create("whole", steps=1)
    studio.worker.start()
    studio.ended(tune_id)
    fill(outputs, RESERVE_BYTES)
    prompt = prompts.create_prompt(studio.services, tune_id, PROMPT)
    until(lambda: "the pictures of this prompt" in studio.store.hold)
    until(lambda: prompts.get_prompt(studio.services, prompt.id).status == "queued")
    waiting = prompts.get_prompt(studio.services, prompt.id)
    assert (waiting.status, waiting.error, waiting.progress.stage) == ("queued", None, studio.store.hold)
    assert tunes.get_tune(studio.services, tune_id).progress.stage == "trained"  # it has ended
    (outputs / "filler").unlink()
    assert studio.ended(tune_id).prompts[-1].status == "rendered"


@pytest.mark.long
def test_a_database_in_use_by_another_program_makes_the_queue_wait(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.studio.connection.BUSY_SECONDS", 0.1)
    studio.worker.start()
    other = sqlite3.connect(studio.settings.outputs / "tunebooth.db", isolation_level=None, check_same_thread=False)
    with studio.store.transaction():
        tune_id = studio.create("Rex")
        studio.store.at_step[tune_id, 3] = lambda: other.execute("BEGIN EXCLUSIVE")
    until(lambda: "in use by another program" in studio.store.hold)
    other.execute("ROLLBACK")
    assert studio.ended(tune_id).status == "trained"
    other.close()


@pytest.mark.long
def test_a_tune_whose_folder_of_outputs_is_gone_waits_and_nothing_is_written_there(studio: Studio) -> None:
    outputs = studio.settings.outputs
    database = outputs / "tunebooth.db"
    with studio.store.transaction():
        tune_id = studio.create("Rex")
        studio.store.at_step[tune_id, 4] = lambda: database.rename(outputs / "elsewhere")
    studio.worker.start()
    until(lambda: "tunebooth.db is gone" in studio.store.hold)
    assert "stop Tunebooth" in studio.store.hold
    assert not database.exists()
    (outputs / "elsewhere").rename(database)
    assert studio.ended(tune_id).status == "trained"


# The story, on the running app


@contextmanager
def filled(app: App) -> Iterator[None]:
    filler = fill(app.outputs)
    yield
    filler.unlink()


@contextmanager
def limited(app: App) -> Iterator[None]:
    """No file may get as large as a state: a quota, which no look at the free room can show."""
    _, hard = resource.prlimit(app.process.pid, resource.RLIMIT_FSIZE)
    size = max(path.stat().st_size for path in app.outputs.rglob("state.safetensors")) - 1
    assert size > 2 * (app.outputs / "tunebooth.db").stat().st_size
    resource.prlimit(app.process.pid, resource.RLIMIT_FSIZE, (size, hard))
    yield
    resource.prlimit(app.process.pid, resource.RLIMIT_FSIZE, (hard, hard))


@contextmanager
def plain_folder(folder: Path, _megabytes: int) -> Iterator[Path]:
    folder.mkdir()
    yield folder


@pytest.mark.long
@pytest.mark.parametrize(("disk", "full"), [(small_disk, filled), (plain_folder, limited)])
def test_the_disk_fills_in_mid_training_and_the_app_says_so_until_there_is_room(
    tmp_path: Path, dog_photos: Callable[[int], list[Path]], disk: Any, full: Any
) -> None:
    with disk(tmp_path / "outputs", 48) as outputs, running(outputs, TMPDIR=str(tmp_path)) as app:
        app.ready()
        wanted = {"steps": 80, "args": "save_every=5"}
        whole = post(app, "whole", dog_photos(3), **wanted).json()["id"]
        assert app.finished(whole)["status"] == "trained"
        waits = post(app, "waits", dog_photos(3), **wanted).json()["id"]
        after = post(app, "after", dog_photos(3), steps=5).json()["id"]
        wait_for(lambda: app.tune(waits)["progress"]["step"] >= 12)
        with full(app):
            wait_for(lambda: app.http.get("/health").json()["status"] == "on hold")
            health = app.http.get("/health").json()
            assert health["ready"] and str(outputs) in health["reason"] and "The queue waits" in health["reason"]
            wait_for(lambda: "The queue waits" in app.tune(waits)["progress"]["stage"])
            assert "The queue waits" in banner(app)
            time.sleep(5)  # longer than the queue waits between two looks
            assert (app.tune(waits)["error"], app.tune(after)["status"]) == (None, "queued")
            kept = [path for path in outputs.rglob("state.safetensors") if ".partial-" not in str(path)]
            assert kept and all(load_file(path) for path in kept)
        tune = app.finished(waits)
        assert (tune["status"], tune["error"], app.finished(after)["status"]) == ("trained", None, "trained")
        assert app.http.get("/health").json() == {"status": "ok", "ready": True}
        ours, theirs = (load_file(outputs / f"tunes/{number}/model/lora.safetensors") for number in (waits, whole))
        assert same(ours, theirs)
        assert not list(outputs.rglob("*.partial-*"))


def banner(app: App) -> str:
    """What the page says above the tune that runs, as a browser shows it."""
    if not CHROMIUM.exists():
        pytest.skip(f"there is no {CHROMIUM} (apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(app.url)
        text = page.locator(".tb-hold").first.inner_text(timeout=120_000)
        browser.close()
    return text


@pytest.mark.long
def test_an_app_that_starts_on_a_full_disk_says_so_and_resumes_when_there_is_room(
    tmp_path: Path, dog_photos: Callable[[int], list[Path]]
) -> None:
    with small_disk(tmp_path / "outputs", 48) as outputs:
        with running(outputs, TMPDIR=str(tmp_path)) as app:
            tune_id = post(app.ready(), "Rex", dog_photos(3), steps=80, args="save_every=5").json()["id"]
            wait_for(lambda: app.tune(tune_id)["progress"]["step"] >= 10)
        filler = fill(outputs)
        with running(outputs, TMPDIR=str(tmp_path)) as app:
            app.ready()
            wait_for(lambda: app.http.get("/health").json()["status"] == "on hold")
            assert app.tune(tune_id)["error"] is None
            filler.unlink()
            assert app.finished(tune_id)["status"] == "trained"
            assert app.log(tune_id)[0]["event"] == "started" and any(
                line.get("event") == "resumed" for line in app.log(tune_id)
            )


@pytest.mark.long
def test_an_outputs_folder_that_is_removed_under_the_app_is_told_of(
    tmp_path: Path, dog_photos: Callable[[int], list[Path]]
) -> None:
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    with running(outputs) as app:
        app.ready()
        tune_id = post(app, "Rex", dog_photos(3), steps=1000).json()["id"]
        wait_for(lambda: app.tune(tune_id)["progress"]["step"] > 5)
        outputs.rename(tmp_path / "moved")
        wait_for(lambda: app.http.get("/health").json()["status"] == "failed")
        assert "is gone" in app.http.get("/health").json()["reason"]
        for answer in (app.http.get("/tunes"), post(app, "Rex 2", dog_photos(3))):
            assert answer.status_code == 503 and "is gone" in answer.json()["error"]
        page = app.http.get("/", headers={"Accept": "text/html"})
        assert page.status_code == 503 and "is gone" in page.text
        time.sleep(5)
        assert not outputs.exists()
        assert "is gone while the app was running" in (tmp_path / "moved" / "stderr.txt").read_text()
