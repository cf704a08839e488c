"""The running program: its process, its three doors, its page in a browser, and what a SIGKILL does to it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from mcp import ClientSession
from mcp.client.streamable_http import streamable_http_client
from PIL import Image
from playwright.sync_api import Page

from tests.helpers.app import PATIENCE, ROOT, App, post, running, wait_for
from tests.helpers.fast import FAST_FOLDER
from tests.helpers.shared import SHARED
from trainer.contract.tunes import TuneRequest

pytest_plugins = ("tests.helpers.chromium",)


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory, tiny_sd15: Path, tiny_sd15_file: Path) -> Iterator[App]:
    """One app for the tests that do not hurt it; its models folder holds the tiny SD 1.5 twice, and a broken file."""
    models = tmp_path_factory.mktemp("models")
    shutil.copytree(tiny_sd15, models / "folder")
    shutil.copy(tiny_sd15_file, models / "single.safetensors")
    shutil.copytree(tiny_sd15_file.with_suffix(""), models / "single")
    (models / "broken.safetensors").write_bytes(tiny_sd15_file.read_bytes()[:-100])
    options = ["--models", str(models), "--weights", str(SHARED / "weights")]
    with running(tmp_path_factory.mktemp("outputs"), *options) as app:
        yield app.ready()


def statuses(app: App, tune_id: int) -> list[str]:
    """Every status that a tune goes through from now on, until it and its prompts have ended."""
    seen: list[str] = []

    def look() -> bool:
        tune = app.tune(tune_id)
        if not seen or seen[-1] != tune["status"]:
            seen.append(tune["status"])
        return tune["status"] in ("trained", "failed", "canceled")

    wait_for(look)
    return seen


# Starting


def test_health_and_a_waiting_page_are_there_before_the_real_page(tmp_path: Path) -> None:
    with running(tmp_path) as app:
        first = wait_for(lambda: app.http.get("/health"))
        assert first.json() == {"status": "ok", "ready": False}
        waiting = app.http.get("/").text
        assert "Getting ready" in waiting and "gradio" not in waiting
        assert "gradio" in app.ready().http.get("/").text
        assert app.http.get("/gallery/tunes").status_code == 200


def refused(*options: str) -> tuple[int, str]:
    """Exit code and stderr of an app that does not start."""
    command = [sys.executable, "app.py", *options]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert ended.stdout == ""
    return ended.returncode, ended.stderr


def test_a_second_app_on_the_same_folder_is_refused_in_words(app: App) -> None:
    code, message = refused("--port", "0", "--outputs", str(app.outputs))
    assert code == 75
    assert f"in use by process {app.process.pid}" in message
    assert message.endswith(". Stop it, or give this one another --outputs.\n")


def test_a_port_that_is_taken_ends_the_app_with_a_message(app: App, tmp_path: Path) -> None:
    port = app.url.rpartition(":")[2]
    code, message = refused("--port", port, "--outputs", str(tmp_path))
    assert (code, message) == (1, f"Tunebooth cannot listen on 127.0.0.1:{port}: Address already in use. Try --port.\n")


def test_a_database_of_a_newer_version_ends_the_app_with_a_message(tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "tunebooth.db")) as database:
        database.execute("PRAGMA user_version=1000")
    code, message = refused("--port", "0", "--outputs", str(tmp_path))
    assert code == 1
    assert message.startswith("Tunebooth: ") and message.endswith("newer version of Tunebooth; upgrade to open it.\n")


@pytest.mark.long
def test_the_demo_shows_a_trained_tune_with_pictures(tmp_path: Path) -> None:
    with running(tmp_path, "--demo") as app:
        wait_for(lambda: app.ready().http.get("/tunes").json())
        tune = app.finished(1)
        assert (tune["status"], tune["error"]) == ("trained", None)
        assert [len(prompt["images"]) for prompt in tune["prompts"]] == [4, 4]
        for url in tune["prompts"][0]["images"]:
            assert app.http.get(url).headers["content-type"] == "image/png"


# The three doors, with real photos


@pytest.mark.long  # the programs of docs/api.md do it in the default run
def test_rest_trains_the_dog(app: App, dog_photos: Callable[[int], list[Path]]) -> None:
    from tests.helpers.learned import assert_learned  # torch, which collecting the web tests does without

    waiting = post(app, "before it", dog_photos(5), steps=20).json()
    answer = post(app, "by REST", dog_photos(5), **{"prompts_attributes][][text": "ohwx dog"}, steps=80)
    assert answer.status_code == 201
    assert statuses(app, answer.json()["id"]) == ["queued", "training", "trained"]
    tune = app.finished(answer.json()["id"])
    assert len(tune["prompts"][0]["images"]) == 8
    assert app.tune(waiting["id"])["trained_at"] <= tune["started_training_at"]
    assert_learned(app, tune, FAST_FOLDER)
    download = app.http.get(tune["ckpt_url"])
    assert "attachment" in download.headers["content-disposition"]
    assert download.content == (app.outputs / f"tunes/{tune['id']}/model/lora.safetensors").read_bytes()


@pytest.mark.long  # as above
def test_gradio_client_trains_the_dog(app: App, dog_photos: Callable[[int], list[Path]]) -> None:
    from tests.helpers.learned import assert_learned  # torch, which collecting the web tests does without

    client = Client(app.url, verbose=False)
    waiting = post(app, "before gradio's", dog_photos(5), steps=20).json()
    job = client.submit(
        name="dog", title="by Gradio", images=[handle_file(photo) for photo in dog_photos(5)], branch="fast", steps=80,
        prompts_attributes=[{"text": "ohwx {{colour}} dog", "num_images": 2}], characteristics={"colour": "brown"},
        api_name="/create_tune",
    )  # fmt: skip
    tune_id = wait_for(lambda: [t["id"] for t in app.http.get("/tunes").json() if t["title"] == "by Gradio"])[0]
    assert statuses(app, tune_id) == ["queued", "training", "trained"]
    assert client.predict(tune_id=waiting["id"], api_name="/get_tune")["status"] == "trained"
    told = set()
    while not job.done():
        told |= {unit.desc for unit in job.status().progress_data or []}
        time.sleep(0.2)
    tune = job.result(timeout=PATIENCE)
    assert any(re.search(r"step \d+ of 80", text or "") for text in told) or tune["progress"]["step"] == 80
    assert len(tune["prompts"][0]["images"]) == 2
    assert tune["id"] in [listed["id"] for listed in client.predict(api_name="/list_tunes")]
    assert_learned(app, tune, FAST_FOLDER)


@pytest.mark.long
def test_a_client_that_leaves_takes_nothing_with_it(app: App, dog_photos: Callable[[int], list[Path]]) -> None:
    client = Client(app.url, verbose=False)
    job = client.submit(
        name="dog", title="left alone", images=[handle_file(dog_photos(1)[0])], branch="fast", steps=60,
        api_name="/create_tune",
    )  # fmt: skip
    found = wait_for(lambda: app.http.get("/tunes", params={"title": "left alone"}).json())
    job.cancel()
    client.close()
    assert app.finished(found[0]["id"])["status"] == "trained"


@pytest.mark.long
def test_gradio_client_cancels_a_tune(app: App, dog_photos: Callable[[int], list[Path]]) -> None:
    client = Client(app.url, verbose=False)
    tune = post(app, "to be canceled", dog_photos(5), steps=5000).json()
    wait_for(lambda: app.tune(tune["id"])["progress"]["step"] > 0)
    client.predict(tune_id=tune["id"], api_name="/cancel_tune")
    step = app.tune(tune["id"])["progress"]["step"]
    ended = app.finished(tune["id"])
    assert ended["status"] == "canceled"
    assert ended["progress"]["step"] <= step + 60  # the progress that was read may be half a second old
    assert list((app.outputs / f"tunes/{tune['id']}/state").iterdir())
    with pytest.raises(AppError, match=f"tune {tune['id']} is canceled already"):
        client.predict(tune_id=tune["id"], api_name="/cancel_tune")


@pytest.mark.long
def test_the_page_draws_more_pictures_and_saves_a_pack(
    app: App, browser_page: Page, dog_photos: Callable[[int], list[Path]]
) -> None:
    tune = app.finished(post(app, "more of the dog", dog_photos(4), steps=60).raise_for_status().json()["id"])
    page = browser_page
    with page.expect_response("**/gradio_api/run/predict"):
        page.goto(app.url)
    page.get_by_role("tab", name="More pictures").click()
    page.click("#prompt-tune input")
    page.get_by_role("option", name=re.compile("more of the dog")).click()
    page.fill("#prompt-text textarea", "ohwx dog on grass")
    page.get_by_text("Start from a picture", exact=True).click()
    page.set_input_files("#prompt-input_image input[type=file]", str(dog_photos(1)[0]))
    page.get_by_label("Denoising strength: 0 keeps the picture, 1 redraws it").fill("0.3")
    page.click("#render")
    shown = f"#now [data-tune='{tune['id']}'] [data-prompt]:last-of-type[data-status=rendered]"
    page.wait_for_selector(f"{shown} img")
    prompt = app.http.get(f"/tunes/{tune['id']}/prompts").json()[0]
    assert (prompt["text"], prompt["denoising_strength"], prompt["input_image"] is not None) == (
        "ohwx dog on grass", 0.3, True,
    )  # fmt: skip
    before = len(app.http.get(f"/tunes/{tune['id']}/prompts").json())
    page.click("#render")  # and what is wrong is said there
    wait_for(lambda: len(app.http.get(f"/tunes/{tune['id']}/prompts").json()) > before)
    page.wait_for_timeout(3000)  # Gradio ignores a click while the one before has not been answered
    page.fill("#prompt-text textarea", "<lora:nobody:1> dog")
    page.click("#render")
    page.wait_for_function("document.querySelector('#prompt-note').innerText.includes('<lora:nobody>')")
    page.locator("#now button", has_text="Save as pack").click()
    page.get_by_role("tab", name="Packs").click()
    page.wait_for_selector("#shelf [data-pack=headshots]")
    page.wait_for_selector("#shelf [data-pack=more-of-the-dog]", timeout=30_000)
    pack = app.http.get("/p/more-of-the-dog").json()
    assert pack["branch"] == "fast" and "{subject}" not in str(pack["prompts"]["dog"])


@pytest.mark.long
def test_the_page_trains_the_dog(
    app: App, browser_page: Page, dog_photos: Callable[[int], list[Path]], tmp_path: Path
) -> None:
    from tests.helpers.learned import assert_learned  # torch, which collecting the web tests does without

    page = browser_page
    with page.expect_response("**/gradio_api/run/predict"):
        page.goto(app.url)
    shots = Path(os.environ.get("TUNEBOOTH_SCREENSHOTS", tmp_path))
    page.wait_for_selector("#create")
    page.wait_for_timeout(1500)
    page.screenshot(path=shots / "rest.png")
    photos = [str(photo) for photo in dog_photos(5)]
    page.set_input_files("#field-images input[type=file]", photos)
    page.wait_for_function("document.querySelectorAll('#thumbnails img').length == 5")
    page.fill("#field-name :is(input, textarea)", "dog")
    page.fill("#field-title :is(input, textarea)", "by the page")
    page.fill("#field-prompts_attributes textarea", "ohwx dog\nohwx dog in the snow")
    page.get_by_text("Captions", exact=True).click()
    captions = page.locator("#captions [data-editable=true]:visible").filter(has_text="A photo of ohwx dog")
    captions.first.dblclick()
    page.keyboard.press("Control+a")
    page.keyboard.type("ohwx dog on a sofa")
    page.keyboard.press("Enter")
    post(app, "before the page's", dog_photos(5), steps=60).raise_for_status()
    page.click("#create")
    tune = wait_for(lambda: app.http.get("/tunes", params={"title": "by the page"}).json())[0]
    page.wait_for_selector(f"#tunes [data-tune='{tune['id']}'][data-status=queued]")
    shown = f"#now [data-tune='{tune['id']}']"
    page.wait_for_selector(f"{shown}[data-status=training]")
    bar = f'document.querySelector("{shown} [role=progressbar]")?.ariaValueNow'
    page.wait_for_function(f"{bar} > 0")
    first = int(page.evaluate(bar))
    page.wait_for_function(f"{bar} > {first}")
    page.wait_for_selector(f"{shown} svg polyline", state="attached")
    assert re.search(r"step \d+ of 160", page.inner_text(f"{shown} .tb-facts"))
    page.screenshot(path=shots / "training.png")
    page.reload()
    page.wait_for_selector(f"{shown}[data-status=training]")  # seen again, in mid-training
    page.wait_for_function(f"{bar} > {first}")
    page.wait_for_function(f'document.querySelectorAll("{shown} .tb-pictures img").length == 8')
    page.wait_for_function(
        f'[...document.querySelectorAll("{shown} .tb-pictures img")].every(i => i.naturalWidth == 64)'
    )
    page.click(f"#tunes [data-tune='{tune['id']}'] summary")
    assert page.locator(f"#tunes [data-tune='{tune['id']}'] [data-photo] img").count() == 5
    page.wait_for_timeout(500)
    page.screenshot(path=shots / "done.png", full_page=True)
    assert page.locator(f"{shown} .tb-moments img").count() == 4
    assert (
        page.locator(f"{shown} .tb-moments a[download]").count() == 2
    )  # the models of the middle and of three quarters
    page.click("#seen summary")
    assert "ohwx dog on a sofa" in page.inner_text("#seen") and "A photo of ohwx dog" in page.inner_text("#seen")
    with page.expect_download() as download:
        page.click(f"{shown} a.tb-primary")
    assert Path(download.value.path()).stat().st_size > 10_000
    done = app.finished(tune["id"])
    assert statuses(app, tune["id"]) == ["trained"]
    assert done["started_training_at"] < done["trained_at"]
    assert_learned(app, done, FAST_FOLDER)


@pytest.mark.parametrize("endpoint", ["check_photos", "submit_tune"])
def test_no_endpoint_reads_a_file_that_was_not_uploaded(app: App, endpoint: str, tmp_path: Path) -> None:
    here = tmp_path / "private.png"
    Image.new("RGB", (64, 64)).save(here)
    names = app.http.get("/gradio_api/info").json()["named_endpoints"][f"/{endpoint}"]["parameters"]
    given = {"name": "dog", "title": "not uploaded", "branch": "fast", "images": [{"path": str(here)}]}
    data = [given.get(one["parameter_name"]) for one in names]
    event = app.http.post(f"/gradio_api/call/{endpoint}", json={"data": data}).json()["event_id"]
    told = app.http.get(f"/gradio_api/call/{endpoint}/{event}").text
    assert "event: error" in told and "must be files that were uploaded" in told


def test_a_language_model_has_the_endpoints_as_tools(app: App) -> None:
    async def talk() -> tuple[dict[str, Any], Any, Any, Any]:
        async with streamable_http_client(f"{app.url}/mcp") as streams, ClientSession(*streams[:2]) as session:
            await session.initialize()
            listed = {one.name: one for one in (await session.list_tools()).tools}
            bases = await session.call_tool("list_base_tunes", {"branch": "fast"})
            asked = {"name": "my_dog", "title": "by MCP", "branch": "fast", "image_urls": ["http://10.0.0.1/a.png"]}
            return listed, bases, await session.call_tool("submit_tune", asked), await session.call_tool("get_tune", {})

    with ThreadPoolExecutor(1) as pool:  # Playwright has a loop running in this thread
        listed, bases, refused, odd = pool.submit(lambda: asyncio.run(talk())).result()
    assert sorted(listed) == sorted(set(published_endpoints(app)) - {"create_tune"})
    parameters = listed["submit_tune"].inputSchema["properties"]
    assert "images" not in parameters and set(parameters) == set(TuneRequest.parameters()) - {"images"}
    assert "/etc" not in str(listed["check_photos"].inputSchema) and "images" not in listed["check_photos"].inputSchema
    assert not bases.isError and bases.structuredContent["result"][0]["branch"] == "fast"
    assert json.loads(bases.content[0].text)["branch"] == "fast"
    assert refused.isError and "only English letters" in refused.content[0].text
    assert odd.isError and "tune_id" in odd.content[0].text


def published_endpoints(app: App) -> list[str]:
    """What Gradio tells of itself."""
    info = app.http.get("/gradio_api/info").raise_for_status().json()
    return [name.removeprefix("/") for name in info["named_endpoints"]]


@pytest.mark.long
def test_the_page_says_what_is_wrong_at_the_field(
    app: App, browser_page: Page, dog_photos: Callable[[int], list[Path]]
) -> None:
    page = browser_page
    before = app.http.get("/tunes").json()
    with page.expect_response("**/gradio_api/run/predict"):  # the page's own first event: from now on it hears clicks
        page.goto(app.url)
    page.click("#create")
    page.wait_for_selector("#note-name .tb-note")
    assert "must contain at least one image" in page.inner_text("#note-images")
    page.fill("#field-name :is(input, textarea)", "my_dog!")
    odd = SHARED / "data/faces/odd/not_an_image.jpg"
    page.set_input_files("#field-images input[type=file]", [str(dog_photos(1)[0]), str(odd)])
    page.wait_for_selector("#thumbnails img")
    page.click("#create")
    page.wait_for_function("document.querySelector('#note-name').innerText.includes('only English letters')")
    page.fill("#field-name :is(input, textarea)", "dog")
    page.click("text=Advanced")
    page.fill("#field-args :is(input, textarea)", "rnak=3")
    page.click("#create")
    page.wait_for_function("document.querySelector('#note-args').innerText.includes(\"did you mean 'rank'\")")
    assert "not_an_image.jpg" in page.inner_text("#note-images")
    assert page.inner_text("#note-name").strip() == ""
    page.click("#field-branch input")
    page.click("[role=option]:has-text('sd15')")
    page.click("#field-base_tune_id input")
    page.click("[role=option]:has-text('broken.safetensors (cannot be used)')")
    page.click("#create")
    page.wait_for_function("document.querySelector('#note-base_tune_id').innerText.includes('it is broken')")
    assert app.http.get("/tunes").json() == before


@pytest.mark.long
def test_the_page_and_a_script_report_the_same_of_photos(app: App, browser_page: Page) -> None:
    faces = SHARED / "data/faces"
    if not faces.exists():
        pytest.skip("the photos and weights beside the repository are not here")
    photos = [faces / "exif/astronaut_orientation_6.jpg", faces / "noface/coffee.jpg"]
    before = app.http.get("/tunes").json()
    page = browser_page
    with page.expect_response("**/gradio_api/run/predict"):
        page.goto(app.url)
    page.fill("#field-name :is(input, textarea)", "woman")
    page.set_input_files("#field-images input[type=file]", [str(photo) for photo in photos])
    page.wait_for_function("document.querySelectorAll('#thumbnails img').length == 2")
    page.click("#check")
    page.wait_for_selector("#verdicts")
    told = [page.inner_text(f"#verdicts [data-photo='{photo.name}']") for photo in photos]
    assert "turned upright" in told[0] and "1 face" in told[0]
    assert "no face" in told[1]
    page.wait_for_function("[...document.querySelectorAll('#verdicts img')].every(i => i.naturalWidth == 64)")
    client = Client(app.url, verbose=False)
    check = client.predict(images=[handle_file(photo) for photo in photos], name="woman", api_name="/check_photos")
    assert [(photo["name"], photo["rotated"], len(photo["faces"])) for photo in check["photos"]] == [
        ("astronaut_orientation_6.jpg", True, 1),
        ("coffee.jpg", False, 0),
    ]
    assert app.http.get("/tunes").json() == before


# Bases of one's own


@pytest.mark.long
@pytest.mark.parametrize("title", ["folder", "single.safetensors"])
def test_sd15_trains_on_a_base_of_the_models_folder(
    app: App, title: str, tiny_sd15: Path, dog_photos: Callable[[int], list[Path]]
) -> None:
    from tests.helpers.learned import assert_learned  # torch, which collecting the web tests does without

    bases = {base["title"]: base for base in app.http.get("/gallery/tunes").json()}
    assert bases[title]["branch"] == "sd15"
    asked = {"branch": "sd15", "base_tune_id": bases[title]["id"], "steps": 60, "token": "ohwx"}
    args = "resolution=64 lr=2e-3 text_encoder_lr=2e-3 batch=4"
    answer = post(app, f"lora of {title}", dog_photos(5), model_type="lora", args=args, **asked)
    tune = app.finished(answer.raise_for_status().json()["id"])
    assert (tune["status"], tune["error"]) == ("trained", None)
    assert_learned(app, tune, tiny_sd15)


# Bad input, through the doors that take it


def test_bad_input_is_refused_alike_by_rest_and_gradio(app: App, dog_photos: Callable[[int], list[Path]]) -> None:
    client = Client(app.url, verbose=False)
    dog, odd = dog_photos(1), SHARED / "data/faces/odd/not_an_image.jpg"
    broken = next(b for b in app.http.get("/gallery/tunes").json() if b["title"] == "broken.safetensors")
    assert "it is broken" in broken["error"]
    cases: list[tuple[list[Path], dict[str, Any], str, str]] = [
        ([], {}, "images", "must contain at least one image"),
        (dog, {"branch": "fsat"}, "branch", "did you mean 'fast'?"),
        ([odd], {}, "images", "not_an_image.jpg is not an image"),
        (dog, {"branch": "sd15", "base_tune_id": 77}, "base_tune_id", "no base model has the id 77"),
        (dog, {"branch": "sd15", "base_tune_id": broken["id"]}, "base_tune_id", "broken.safetensors: it is broken"),
    ]
    before, files = app.http.get("/tunes").json(), sorted((app.outputs / "tunes").glob("*"))
    for photos, fields, field, words in cases:
        if "base_tune_id" in fields:
            fields = fields | {"model_type": "lora"}
        answer = post(app, "bad", photos, **fields)
        assert answer.status_code == 422
        assert words in answer.json()[field][0]
        given = {"branch": "fast", **fields, "images": [handle_file(photo) for photo in photos]}
        with pytest.raises(AppError, match=re.escape(words)):
            client.predict(name="dog", title="bad", api_name="/create_tune", **given)
    misspelt = post(app, "bad", dog, setps=3)
    assert misspelt.status_code == 422 and "did you mean 'steps'?" in misspelt.json()["setps"][0]
    with pytest.raises(TypeError, match="setps"):
        client.predict(name="dog", title="bad", setps=3, api_name="/create_tune")
    assert app.http.get("/tunes").json() == before
    assert sorted((app.outputs / "tunes").glob("*")) == files
    assert [path.name for path in (app.outputs / "incoming").iterdir()] == ["gradio"]


# Killed


@pytest.mark.long
def test_a_killed_app_takes_up_its_work_and_ends_with_the_same_weights(
    tmp_path: Path, dog_photos: Callable[[int], list[Path]]
) -> None:
    import torch
    from safetensors.torch import load_file

    photos = dog_photos(5)
    with running(tmp_path) as app:
        app.ready()
        for title in ("first", "second", "third"):
            post(app, title, photos, steps=45, **{"prompts_attributes][][text": "ohwx dog"}).raise_for_status()
        wait_for(lambda: app.tune(2)["progress"]["step"] > 30)
        killed_after = app.tune(2)["progress"]["step"]
        app.kill()
    with running(tmp_path) as app:
        app.ready()
        tunes = [app.finished(tune_id) for tune_id in (1, 2, 3)]
        assert [tune["status"] for tune in tunes] == ["trained"] * 3
        assert [len(tune["prompts"][0]["images"]) for tune in tunes] == [8, 8, 8]
        starts = [[line for line in app.log(tune_id) if "event" in line] for tune_id in (1, 2, 3)]
        assert [[line["event"] for line in lines] for lines in starts] == [
            ["started"],
            ["started", "resumed"],
            ["started"],
        ]
        resumed_at = starts[1][1]["step"]
        assert 0 < resumed_at <= 45 and killed_after - resumed_at <= 25
        steps = [line["step"] for line in app.log(2) if "loss" in line]
        assert steps == sorted(set(steps)) and steps[-1] == 45
        # The first and the third were never interrupted, and had the same photos and the same seed.
        weights = [load_file(tmp_path / f"tunes/{tune_id}/model/lora.safetensors") for tune_id in (1, 2, 3)]
        for name, expected in weights[0].items():
            assert torch.equal(weights[1][name], expected), name
            assert torch.equal(weights[2][name], expected), name
        tune = post(app, "fourth", photos, steps=5000).json()
        wait_for(lambda: app.tune(tune["id"])["progress"]["step"] > 0)
        assert app.stop() == -signal.SIGTERM  # after an orderly end, uvicorn lets the signal do what it was for
        assert list((tmp_path / f"tunes/{tune['id']}/state").iterdir())  # a polite stop saves where it is
