"""Uploads of the page and of the Gradio API: where they lie, who may read them, and when they go."""

from __future__ import annotations

import io
import json
import os
import random
import secrets
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image
from playwright.sync_api import sync_playwright

from tests.helpers.app import App, running, wait_for
from tests.helpers.web import photo
from trainer.contract.photos import Upload
from trainer.web.caption_table import with_captions
from trainer.web.spool import forget_unused

CHROMIUM = "/usr/bin/chromium"


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    folder = tmp_path_factory.mktemp("spool")
    (folder / "outputs").mkdir()
    limits = ("--max-image-mb", "1", "--max-body-mb", "3")
    with running(folder / "outputs", "--models", str(folder / "models"), *limits) as app:
        yield app.ready()


def spooled(app: App) -> list[str]:
    """The names of the uploads that are kept. Gradio leaves empty files there, too."""
    folder = app.outputs / "incoming" / "gradio"
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


def write_photos(folder: Path, *colours: str) -> list[Path]:
    for colour in colours:
        (folder / f"{colour}.png").write_bytes(photo(colour))
    return [folder / f"{colour}.png" for colour in colours]


class PageSession:
    """What a browser with the page sends."""

    def __init__(self, app: App) -> None:
        self._http = app.http
        config = app.http.get("/config").raise_for_status().json()
        self._components = {one["id"]: one for one in config["components"]}
        self._ids = {one["props"].get("elem_id"): one["id"] for one in config["components"]}
        self._dependencies = config["dependencies"]
        self._session = secrets.token_hex(5)
        self.values = {one["id"]: one["props"].get("value") for one in config["components"]}

    def upload(self, *photos: Path) -> list[dict[str, Any]]:
        files = [("files", (one.name, one.read_bytes(), "image/png")) for one in photos]
        paths = self._http.post("/gradio_api/upload", files=files).raise_for_status().json()
        return [
            {"path": path, "orig_name": one.name, "meta": {"_type": "gradio.FileData"}}
            for one, path in zip(photos, paths, strict=True)
        ]

    def fill(self, **fields: object) -> None:
        for name, value in fields.items():
            self.values[self._ids[f"field-{name}"]] = value

    def value(self, elem_id: str) -> Any:
        return self.values[self._ids[elem_id]]

    def drop(self, files: list[dict[str, Any]]) -> None:
        """The photos in the form are these now."""
        self.fill(images=files or None)
        self.fire("field-images", "change")

    def fire(self, elem_id: str, event: str) -> None:
        """All that listens to an event of a component answers, and its outputs change."""
        asked = [self._ids[elem_id], event]
        listening = [one for one in self._dependencies if asked in one["targets"]]
        assert listening, f"nothing listens to {asked}"
        for one in listening:
            for number, value in zip(one["outputs"], self._call(one, asked[0]), strict=True):
                if not (isinstance(value, dict) and value.get("__type__") == "update"):
                    self.values[number] = value

    def _call(self, dependency: dict[str, Any], trigger: Any) -> list[Any]:
        states = {number for number, one in self._components.items() if one["type"] == "state"}
        data = [None if number in states else self.values[number] for number in dependency["inputs"]]
        body = {"data": data, "fn_index": dependency["id"], "session_hash": self._session, "trigger_id": trigger}
        if dependency["queue"] is False:
            answer = self._http.post("/gradio_api/run/predict", json=body).raise_for_status().json()
            return list(answer["data"])
        self._http.post("/gradio_api/queue/join", json=body).raise_for_status()
        with self._http.stream("GET", "/gradio_api/queue/data", params={"session_hash": self._session}) as lines:
            for line in lines.iter_lines():
                message = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
                if message.get("msg") == "process_completed":
                    assert message["success"], message
                    return list(message["output"]["data"])
        raise AssertionError("the page got no answer")


def test_an_upload_lies_in_a_private_folder_and_shares_it_with_no_other(app: App, tmp_path: Path) -> None:
    (one,) = write_photos(tmp_path, "teal")
    page = PageSession(app)
    first, second = (Path(page.upload(one)[0]["path"]) for _ in range(2))
    folder = app.outputs.resolve() / "incoming" / "gradio"
    assert first.name == second.name == "teal.png" and first.parent != second.parent
    assert first.is_relative_to(folder) and second.is_relative_to(folder)
    assert folder.stat().st_mode & 0o777 == (app.outputs / "incoming").stat().st_mode & 0o777 == 0o700
    assert app.http.get(f"/gradio_api/file={first}").content == photo("teal")  # the page shows what was dropped
    page.drop([{"path": str(path), "meta": {"_type": "gradio.FileData"}} for path in (first, second)])
    page.drop([])
    assert spooled(app) == []


def test_a_file_that_is_too_large_leaves_nothing(app: App, tmp_path: Path) -> None:
    before = len(list((app.outputs / "incoming" / "gradio").iterdir()))
    large = {"files": ("large.zip", bytes(3 * 2**20), "image/png")}
    answer = app.http.post("/gradio_api/upload", files=large)
    assert answer.status_code == 413 and "larger than 3 MB" in answer.text
    assert app.http.post("/gradio_api/upload", content=b"a", headers={"Content-Type": "text/plain"}).status_code == 400
    assert spooled(app) == [] and len(list((app.outputs / "incoming" / "gradio").iterdir())) == before


@pytest.mark.long
def test_the_files_of_gradio_client_go_when_they_are_taken_in_and_stay_when_it_is_refused(
    app: App, tmp_path: Path
) -> None:
    client = Client(app.url, verbose=False)
    images = [handle_file(path) for path in write_photos(tmp_path, "teal", "red")]
    with pytest.raises(AppError, match="only English letters"):
        client.predict(name="my_dog!", title="a", branch="fast", images=images, api_name="/submit_tune")
    assert spooled(app) == ["red.png", "teal.png"]
    for path in (app.outputs / "incoming" / "gradio").rglob("*.png"):
        path.unlink()
    tune = client.predict(name="dog", title="b", branch="fast", steps=1, images=images, api_name="/submit_tune")
    assert spooled(app) == []
    start = {"input_image": handle_file(tmp_path / "red.png"), "num_images": 1, "steps": 1}
    client.predict(tune_id=tune["id"], text="ohwx dog", **start, api_name="/create_prompt")
    assert spooled(app) == []
    assert app.finished(tune["id"])["prompts"][0]["status"] == "rendered"


def test_photos_go_when_they_leave_the_form_and_when_the_tune_is_made(app: App, tmp_path: Path) -> None:
    page = PageSession(app)
    files = page.upload(*write_photos(tmp_path, "teal", "red", "gold"))
    page.drop(files)
    assert spooled(app) == ["gold.png", "red.png", "teal.png"]
    page.drop(files[:2])  # one is taken out of the form
    assert spooled(app) == ["red.png", "teal.png"]
    page.fill(name="my_dog!", title="by the page", branch="fast", steps="1")
    page.fire("create", "click")
    assert "only English letters" in page.value("note-name")
    assert spooled(app) == ["red.png", "teal.png"] and page.value("field-images")
    page.fill(name="dog")
    page.fire("create", "click")
    (tune,) = app.http.get("/tunes", params={"title": "by the page"}).json()
    assert len(tune["orig_images"]) == 2
    assert spooled(app) == [] and page.value("field-images") is None
    page.drop([])
    page.fill(images=files[:2])  # as a page would that has not heard of it
    page.fire("create", "click")
    assert "red.png is not here any more: an upload is kept for an hour" in page.value("note-images")
    assert list((app.outputs / "incoming").iterdir()) == [app.outputs / "incoming" / "gradio"]


def a_folder(folder: Path) -> list[Path]:
    """What a folder of photos may hold: a photo, leftovers, a video and a zip that are larger than a photo may be."""
    noise = random.Random(0).randbytes(750_000)
    with zipfile.ZipFile(folder / "more.zip", "w") as archive:
        for name in ("a/1.bmp", "2.bmp"):
            stream = io.BytesIO()
            Image.frombytes("RGB", (500, 500), noise if name == "2.bmp" else noise[::-1]).save(stream, "BMP")
            archive.writestr(name, stream.getvalue())
        archive.writestr("a/1.txt", "ohwx dog on a sofa")
        archive.writestr("__MACOSX/a/._1.bmp", b"\0\5\x16\7")
    (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (folder / "teal.MOV").write_bytes(b"\0\0\0\x14ftypqt  \0\0\0\0qt  " + bytes(2**20))
    return [*write_photos(folder, "teal"), folder / "more.zip", folder / ".DS_Store", folder / "teal.MOV"]


def test_the_page_takes_a_zip_and_leaves_out_leftovers(app: App, tmp_path: Path) -> None:
    page = PageSession(app)
    page.drop([file for one in a_folder(tmp_path) for file in page.upload(one)])
    shown = page.values[page._ids["thumbnails"]]
    assert shown.count("<img") == 1 and "more.zip: 2 photos" in shown
    assert "left out (a video): teal.MOV" in shown and "__MACOSX" in shown
    assert page.value("captions")["data"][1:] == [["1.bmp", "ohwx dog on a sofa"], ["2.bmp", ""]]
    page.fill(name="dog", title="a folder", branch="fast", steps="1")
    page.fire("create", "click")
    (tune,) = app.http.get("/tunes", params={"title": "a folder"}).json()
    assert [one["name"] for one in tune["photos"]] == ["teal.png", "1.bmp", "2.bmp"]
    assert "left out (a file of macOS): .DS_Store" in tune["warnings"]
    captions = app.outputs / "tunes" / str(tune["id"]) / "images"
    assert (captions / "001.txt").read_text() == "ohwx dog on a sofa"
    assert spooled(app) == []


def test_an_edited_caption_replaces_that_of_a_zip(tmp_path: Path) -> None:
    sent = [Upload("photos.zip", tmp_path / "photos.zip")]
    zipped = [(Upload(f"{number}.png", tmp_path, "photos.zip"), text) for number, text in ((1, "old"), (2, "two"))]
    rows = [["1.png", "new"], ["2.png", "two"]]
    uploads = with_captions(sent, rows, "a dog", tmp_path, zipped)
    assert [(one.name, one.path.read_bytes()) for one in uploads[1:]] == [("1.txt", b"new")]


def test_the_same_photo_in_two_pages_is_two_files(app: App, tmp_path: Path) -> None:
    photos = write_photos(tmp_path, "teal")
    pages = [PageSession(app), PageSession(app)]
    for number, page in enumerate(pages):
        page.drop(page.upload(*photos))
        page.fill(name="dog", title=f"page {number}", branch="fast", steps="1")
    assert spooled(app) == ["teal.png", "teal.png"]
    for number, page in enumerate(pages):
        page.fire("create", "click")
        assert len(app.http.get("/tunes", params={"title": f"page {number}"}).json()) == 1
    assert spooled(app) == []


def test_nothing_lies_in_the_system_s_folder(tmp_path: Path, app: App) -> None:
    """The tests before have uploaded: by then Gradio would have made its own folder."""
    mine = {path.name for path in (app.outputs / "incoming" / "gradio").iterdir()}
    theirs = Path(tempfile.gettempdir()) / "gradio"
    assert mine and not (theirs.exists() and mine & {path.name for path in theirs.iterdir()})


def test_what_is_unused_for_an_hour_goes(tmp_path: Path) -> None:
    ages = {
        "a/b/old.png": 3700, "a/b/used.png": 3500, "c/d/old.png": 3700, "tmpempty": 90, "tmpnew": 10, "e/new.png": 0,
        "f/future.png": -86_400,
    }  # fmt: skip
    for name, age in ages.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    (tmp_path / "begun").mkdir()  # an upload that has just begun
    for _ in range(3):  # its file, its folder, the folder of that
        for folder in ("a", "a/b", "c", "c/d"):
            if (tmp_path / folder).exists():
                os.utime(tmp_path / folder, (time.time() - 90,) * 2)
        forget_unused(tmp_path)
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    files = {"a/b/used.png", "tmpnew", "e/new.png", "f/future.png"}
    assert left == files | {"a", "a/b", "e", "f", "begun"}
    assert (tmp_path / "f/future.png").stat().st_mtime <= time.time()


@pytest.mark.long
def test_what_a_killed_app_had_spooled_is_gone_after_the_next_start(tmp_path: Path) -> None:
    (outputs := tmp_path / "outputs").mkdir()
    with running(outputs, "--models", str(tmp_path / "models")) as app:
        page = PageSession(app.ready())
        page.drop(page.upload(*write_photos(tmp_path, "teal")))
        assert spooled(app) == ["teal.png"]
    with running(outputs, "--models", str(tmp_path / "models")) as app:
        app.ready()
        assert spooled(app) == []
        page = PageSession(app)
        page.upload(*write_photos(tmp_path, "teal"))
        app.stop()
        assert not (outputs / "incoming").exists()


@pytest.mark.long
def test_a_browser_that_removes_a_photo_removes_the_file(
    app: App, dog_photos: Callable[[int], list[Path]], tmp_path: Path
) -> None:
    if not Path(CHROMIUM).exists():
        pytest.skip(f"there is no {CHROMIUM} (apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-quic"])
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.set_default_timeout(120_000)
        with page.expect_response("**/gradio_api/run/predict"):
            page.goto(app.url)
        folder = [str(one) for one in a_folder(tmp_path)[1:]]  # a zip, and what is left out
        page.set_input_files("#field-images input[type=file]", [*(str(one) for one in dog_photos(3)), *folder])
        page.wait_for_function("document.querySelectorAll('#thumbnails img').length == 3")
        assert "more.zip: 2 photos" in page.inner_text("#thumbnails")
        assert "left out (a video): teal.MOV" in page.inner_text("#thumbnails")
        wait_for(lambda: len(spooled(app)) == 6)
        for _ in folder:
            page.locator("#field-images button[aria-label='Remove this file']").last.click()
        page.wait_for_function("[...document.querySelectorAll('#thumbnails img')].every(i => i.naturalWidth > 0)")
        wait_for(lambda: len(spooled(app)) == 3)
        page.locator("#field-images button[aria-label='Remove this file']").first.click()
        wait_for(lambda: len(spooled(app)) == 2)
        page.fill("#field-name :is(input, textarea)", "my_dog!")
        page.fill("#field-title :is(input, textarea)", "by a browser")
        page.click("#create")
        page.wait_for_function("document.querySelector('#note-name').innerText.includes('only English letters')")
        assert len(spooled(app)) == 2
        page.fill("#field-name :is(input, textarea)", "dog")
        page.click("#create")
        tune = wait_for(lambda: app.http.get("/tunes", params={"title": "by a browser"}).json())[0]
        assert len(tune["orig_images"]) == 2
        wait_for(lambda: spooled(app) == [])
        page.wait_for_function("document.querySelectorAll('#thumbnails img').length == 0")
        browser.close()
