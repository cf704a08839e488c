"""The page's live parts: what a user wrote is text there, and what has not changed is left alone."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import gradio as gr
import pytest

from tests.helpers.web import photo, upload
from trainer.contract.photos import Check, Photo, Upload
from trainer.contract.prompts import Prompt
from trainer.contract.states import Callback, Progress
from trainer.contract.tunes import Tune
from trainer.names import BRANCHES
from trainer.studio.answers import FLAGS
from trainer.studio.rows import Services
from trainer.studio.tunes import create_tune
from trainer.web import html as page_html
from trainer.web import page
from trainer.web.caption_table import with_captions
from trainer.web.choices import usual_tokens
from trainer.web.form import Form
from trainer.web.html import (
    TuneDetails,
    cards,
    current,
    duration,
    earlier,
    note,
    thumbnails,
    trained_pictures,
    verdicts,
)
from trainer.web.templating import ENVIRONMENT, render

pytest_plugins = ("tests.helpers.web",)

ROOT = Path(__file__).parents[2]
HOSTILE = "<script>alert('x')</script>\" onload=\"alert(1)\" & 'ä"
MOMENT = "2026-11-23T12:34:56.789Z"
LINK = "http://127.0.0.1:7860/files/1/images/000.png?expires=0&signature=ab12"


def prompt(**values: Any) -> Prompt:
    given: dict[str, Any] = dict.fromkeys(Prompt.model_fields)
    given |= {
        "id": 3, "tune_id": 1, "text": "ohwx dog", "num_images": 2, "created_at": MOMENT, "updated_at": MOMENT,
        "super_resolution": False, "liked": False, "ar": "1:1", "controlnet_txt2img": False, "url": "", "images": [],
        "status": "queued", "warnings": [], "tunes": [1], "progress": Progress(),
    }  # fmt: skip
    given |= dict.fromkeys(FLAGS, False) | {"thumbnails": values.get("images", [])}
    return Prompt(**given | values)


def tune(**values: Any) -> Tune:
    given: dict[str, Any] = dict.fromkeys(Tune.model_fields)
    given |= {
        "id": 1, "title": "Rex", "name": "dog", "training_face_correct": False, "ckpt_urls": [], "branch": "fast",
        "created_at": MOMENT, "updated_at": MOMENT, "url": "http://127.0.0.1:7860/tunes/1.json", "orig_images": [],
        "characteristics": {}, "photos": [],
        "auto_extend": False, "status": "training", "progress": Progress(), "warnings": [], "prompts": [],
    }  # fmt: skip
    return Tune(**given | values)


class Reader(HTMLParser):
    """What a browser makes of the HTML: its tags, their attributes and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("img", "polyline", "meta", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag != "polyline":
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, name: str) -> list[str | None]:
        return [value for key, value in self.attributes if key == name]


def progress(one: Tune, readings: Sequence[dict[str, Any]] = ()) -> str:
    return render("progress.html", tune=one, bar=page_html.progress_bar(one, readings))


def loss_curve(readings: Sequence[dict[str, Any]], steps: int) -> str:
    return render("loss_curve.html", curve=page_html.loss_curve(readings, steps)).strip()


def actions(one: Tune) -> str:
    return str(ENVIRONMENT.get_template("parts.html").module.actions(one))  # type: ignore[attr-defined]


def judged(text: str) -> Photo:
    """A photo's verdict with this text in every field that is text."""
    link = f"{LINK}{text}"
    return Photo(
        name=text, file=text, width=64, height=48, format=text, converted=text, duplicate_of=text, masks=[text],
        dropped=text, notes=[text, text], url=link, seen=link, closeup=link,
    )  # fmt: skip


def everywhere(text: str) -> Tune:
    """A tune with this text wherever a user, or an error that quotes one, may put it."""
    link = f"{LINK}{text}"
    shared = {"text": text, "warnings": [text]}
    return tune(
        title=text, name=text, token=text, branch=text, model_type=text, preset=text, args=text, error=text,
        warnings=[text], status="failed", characteristics={text: text}, orig_images=[link], ckpt_url=link,
        progress=Progress(stage=text), photos=[judged(text)],
        prompts=[
            prompt(error=text, status="failed", images=[link], contact_sheet=link, **shared),
            prompt(status="rendering", preview=link, progress=Progress(stage=text, step=1, steps=2), **shared),
            prompt(status="rendering", preview=f"data:{text}", **shared),
        ],
    )  # fmt: skip


def seen(text: str) -> list[dict[str, Any]]:
    """One picture as it is trained, with this text wherever a user may put it."""
    return [{"url": LINK, "name": text, "kind": "photo", "caption": text, "width": 64, "height": 48, "mask": "face"}]


def known(text: str) -> TuneDetails:
    """What is known beside a tune, with this text in a callback's address, in its answer and in titles."""
    callback = Callback(
        id=1, kind="prompt", prompt_id=3, url=text, created_at=MOMENT, attempts=2, answer=text, arrived_at=None,
        due_at=None,
    )  # fmt: skip
    formats = {"kohya": (f"{LINK}{text}", "made"), "x": (None, "")}
    return TuneDetails([callback], [text, text], formats, {"kohya": text})


def packs(text: str) -> list[dict[str, object]]:
    """A pack that can be read and one that cannot."""
    written = {"slug": text, "title": text, "description": text, "branch": text, "classes": [text]}
    return [{**written, "prompts": {text: [text]}}, {"slug": text, "error": text}]


PARTS: dict[str, Callable[[str], str]] = {
    "failed": lambda text: current(everywhere(text), [], [], 0, text),
    "running": lambda text: current(everywhere(text).model_copy(update={"status": "training"}), [], [], 0, text),
    "snapshots": lambda text: current(tune(title=text), [], [{"step": 5, "url": LINK, "model": f"{LINK}{text}"}], 0),
    "all tunes": lambda text: earlier([everywhere(text)], {1: known(text)}, text),
    "queued": lambda text: earlier([tune(prompts=[prompt()])], {}, text),
    "trained pictures": lambda text: trained_pictures(seen(text)),
    "verdicts": lambda text: verdicts(Check(photos=[judged(text)], warnings=[text])),
    "packs": lambda text: cards(packs(text)),
    "notes": lambda text: note([text, "second"]),
    "sign-in": lambda text: render("login.html", problem=text, prefix=""),
}


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_what_a_user_wrote_is_text_and_nothing_else(part: Callable[[str], str]) -> None:
    hostile, plain = Reader(part(HOSTILE)), Reader(part("plain"))
    assert hostile.tags == plain.tags and "script" not in hostile.tags
    assert [name for name, _ in hostile.attributes] == [name for name, _ in plain.attributes]
    assert hostile.open == plain.open == []
    assert plain.text.count("plain") >= 1
    assert hostile.text == plain.text.replace("plain", HOSTILE)


def test_no_template_turns_escaping_off() -> None:
    files = [*(ROOT / "trainer/web").glob("*.py"), *(ROOT / "trainer/web/templates").glob("*.html")]
    assert len(files) > 20
    for file in files:
        assert not re.search(
            r"\bMarkup\b|\|\s*safe\b|autoescape (false|true)|autoescape=False", file.read_text("utf-8")
        ), file


def test_names_of_dropped_photos_are_text() -> None:
    shown = Reader(thumbnails([f"folder/{HOSTILE}.png", "caption.txt", "b.png"]))
    assert shown.tags == ["div", "img", "img"]
    assert {name for name, _ in shown.attributes} == {"class", "src", "alt"}
    assert thumbnails(None) == thumbnails(["a.txt"]) == ""


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"), (0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (90, "1 min 30 s"), (3599, "59 min 59 s"),
        (3600, "1 h 0 min"), (7260, "2 h 1 min"), (90_000, "25 h 0 min"),
    ],
)  # fmt: skip
def test_durations_are_shown_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_the_bar_shows_how_far_a_tune_is() -> None:
    running = tune(progress=Progress(stage="training", step=50, steps=200, loss=0.12345, seconds_per_step=0.1))
    shown = Reader(progress(running))
    assert (shown.all("aria-valuenow"), shown.all("aria-valuemax")) == (["50"], ["200"])
    assert "width:25.0%" in shown.all("style")
    assert shown.text == "trainingstep 50 of 20015 s left10.0 steps a secondloss 0.1235"
    assert "tb-moving" in str(shown.all("class"))


def test_slow_steps_show_their_time() -> None:
    text = Reader(progress(tune(progress=Progress(step=1, steps=61, seconds_per_step=1.5)))).text
    assert "1.50 s a step" in text and "1 min 30 s left" in text


@pytest.mark.parametrize(
    ("values", "words", "moves"),
    [
        ({"status": "queued"}, "Waiting for its turn.", False),
        ({"status": "training", "progress": Progress(stage="loading")}, "loading", True),
        ({"status": "trained", "prompts": [prompt(status="rendering")]}, "rendering prompts", True),
        ({"status": "trained", "prompts": [prompt(status="rendered")]}, "done", False),
        ({"status": "failed"}, "failed", False),
        ({"status": "canceled"}, "stopped", False),
    ],
)
def test_the_bar_says_what_is_going_on(values: dict[str, Any], words: str, moves: bool) -> None:
    html = progress(tune(**values))
    assert Reader(html).text.startswith(words)
    assert ("tb-moving" in html) == moves


@pytest.mark.parametrize(
    ("status", "buttons"),
    [
        ("queued", ["Cancel"]), ("training", ["Cancel"]), ("trained", ["Delete"]),
        ("failed", ["Resume", "Delete"]), ("canceled", ["Resume", "Delete"]),
    ],
)  # fmt: skip
def test_each_state_has_its_buttons(status: str, buttons: list[str]) -> None:
    html = actions(tune(status=status))
    assert re.findall(r">(\w+)</button>", html) == buttons
    for button in buttons:
        path, method = ("/tunes/1", "DELETE") if button == "Delete" else (f"/tunes/1/{button.lower()}", "POST")
        assert f"fetch('{path}',{{method:'{method}'}})" in html


MOMENTS = [{"step": 5, "url": LINK, "model": None}, {"step": 10, "url": LINK, "model": LINK}]


def test_the_page_shows_previews_and_the_models_that_were_kept() -> None:
    shown = current(tune(), [], MOMENTS, 0)
    assert re.findall(r"<figcaption>(step \d+)", shown) == ["step 5", "step 10"]
    assert shown.count("download>model</a>") == 1
    assert "tb-moments" not in current(tune(), [], [], 0)


def test_the_page_shows_rate_and_memory_of_the_last_reading() -> None:
    readings = [
        {"step": 10, "loss": 0.5, "lr": 1e-4, "peak_gib": 3.0},
        {"step": 20, "loss": 0.4, "lr": 5e-5, "peak_gib": 3.25},
    ]
    shown = progress(tune(status="training"), readings)
    assert "lr 5e-05" in shown and "peak memory 3.2 GiB" in shown
    assert "lr" not in Reader(progress(tune(status="training"))).text


def test_pictures_as_trained_are_shown_with_their_captions() -> None:
    shown = Reader(trained_pictures(seen("a dog on a beach")))
    assert "a dog on a beach" in shown.text and "64 x 48, only the face counts" in shown.text
    assert trained_pictures([]) == ""


def test_links_on_the_page_work_under_each_host_name() -> None:
    done = tune(
        status="trained", ckpt_url=LINK, orig_images=[LINK], prompts=[prompt(status="rendered", images=[LINK])],
        photos=[Photo(name="a", file="000.png", width=64, height=48, format="PNG")],
    )  # fmt: skip
    shown = Reader(earlier([done], {}) + current(done, [], MOMENTS, 0) + trained_pictures(seen("a")))
    links = {*shown.all("src"), *shown.all("href")}
    assert links == {"/files/1/images/000.png?expires=0&signature=ab12"}


def curve(*points: tuple[int, float]) -> list[dict[str, Any]]:
    return [{"step": step, "loss": loss} for step, loss in points]


def test_the_loss_curve_is_drawn_from_its_second_point_on() -> None:
    assert loss_curve([], 100) == loss_curve(curve((10, 0.5)), 100) == ""
    drawn = loss_curve(curve((10, 0.5), (50, 0.1), (100, 0.3)), 100)
    raw = re.findall(r'class="raw" points="([^"]+)"', drawn)
    assert raw == ["60.0,4.0 300.0,116.0 600.0,60.0"]  # over the width by step, over the height by loss
    assert "loss 0.500" in drawn and "0.100" in drawn
    assert "nan" not in loss_curve(curve((1, 0.5), (2, 0.5)), 0)


def test_an_empty_studio_says_what_to_do() -> None:
    assert "Drop a few photos" in current(None, [], [], 0)
    assert earlier([], {}) == ""
    assert "2 more in the queue" in current(tune(), [], [], 2)


NOTHING = ("", "", "")  # what a page shows that has just been opened


@pytest.fixture
def queue(services: Services, tmp_path: Path) -> Callable[[str], Tune]:
    """queue(title): a queued tune."""

    def create(title: str) -> Tune:
        request = {"title": title, "name": "dog", "branch": "fast", "prompts_attributes": [{"text": "ohwx dog"}]}
        return create_tune(services, request, [upload(tmp_path / "sent", "rex.png", photo())])[0]

    return create


def test_the_page_says_why_the_models_folder_cannot_be_read(services: Services) -> None:
    assert "models folder" not in page.live_parts(services, NOTHING)[0]
    services.settings.models.rmdir()
    services.settings.models.symlink_to("/mnt/not-mounted")
    shown = page.live_parts(services, NOTHING)[0]
    assert "is a link to a folder that is not there; connect its drive" in shown and 'role="alert"' in shown


def test_what_has_not_changed_is_not_sent_again(services: Services, queue: Callable[[str], Tune]) -> None:
    def skipped(*parts: Any) -> list[bool]:
        return [part == gr.skip() for part in parts]

    queue("Rex")
    now, pictures, tunes, shown = page.live_parts(services, NOTHING)
    assert (now, "", tunes) == shown and "Rex" in now and "Rex" in tunes
    assert skipped(*page.live_parts(services, shown)) == [True, True, True, True]
    services.store.update("tunes", 1, status="training", progress={"step": 1, "steps": 160, "stage": "training"})
    now, pictures, tunes, shown = page.live_parts(services, shown)
    assert skipped(now, pictures, tunes, shown) == [False, True, False, False] and "training" in now
    services.store.update("tunes", 1, progress={"step": 2, "steps": 160, "stage": "training"})
    now, pictures, tunes, shown = page.live_parts(services, shown)
    assert (
        skipped(now, pictures, tunes, shown) == [False, True, True, False] and "step <b>2</b>" in now
    )  # the list stays as it is


def test_the_page_shows_the_tune_whose_turn_it_is(services: Services, queue: Callable[[str], Tune]) -> None:
    assert "Nothing here yet" in page.live_parts(services, NOTHING)[0]
    for title in ("first", "second", "third"):
        queue(title)
    now, _, tunes, _ = page.live_parts(services, NOTHING)
    assert "first" in now and "2 more in the queue" in now
    assert re.findall(r"<b>(\w+)</b>", tunes) == ["third", "second", "first"]
    for _ in range(2):  # the tune and its prompt
        job = services.store.claim()
        assert job is not None
        services.store.finish(job, "trained" if job.prompt_id is None else "rendered")
    assert "second" in page.live_parts(services, NOTHING)[0]


def test_the_form_shows_which_token_a_tune_gets_that_names_none(services: Services, tmp_path: Path) -> None:
    with gr.Blocks():
        assert Form(services).fields["token"].placeholder == "ohwx (sd15: sks)"  # type: ignore[attr-defined]
    shutil.copytree(services.settings.presets, tmp_path / "presets")
    for branch in BRANCHES:
        file = tmp_path / "presets" / f"{branch}.toml"
        file.write_text(re.sub(r'^token = ".*"', 'token = "zwx"', file.read_text("utf-8"), flags=re.MULTILINE), "utf-8")
    assert usual_tokens(tmp_path / "presets") == "zwx"


def test_captions_on_the_form_follow_the_fields_until_the_user_writes_one(services: Services, tmp_path: Path) -> None:
    with gr.Blocks():
        form = Form(services)
    (tmp_path / "b.txt").write_text("a dog in the snow")
    files = [str(tmp_path / name) for name in ("a.jpg", "b.jpg", "b.txt")]
    rows, automatic = form.caption(files, "", "", "fast", [["", ""]], "")
    assert (rows, automatic) == ([["a.jpg", ""], ["b.jpg", "a dog in the snow"]], "")
    rows, automatic = form.caption(files, "dog", "", "fast", rows, automatic)
    assert rows[0] == ["a.jpg", "A photo of ohwx dog"] == ["a.jpg", automatic]
    rows, automatic = form.caption(files, "dog", "zwx", "sd15", rows, automatic)
    assert rows == [["a.jpg", "A photo of zwx dog"], ["b.jpg", "a dog in the snow"]]
    rows[0][1] = "zwx dog on a beach"
    rows, automatic = form.caption(files, "cat", "", "sd15", rows, automatic)
    assert rows == [["a.jpg", "zwx dog on a beach"], ["b.jpg", "a dog in the snow"]]
    assert automatic == "A photo of sks cat"


def test_written_captions_are_sent_along_and_automatic_ones_are_not(tmp_path: Path) -> None:
    came = upload(tmp_path, "b.txt", b"old")
    uploads = [Upload("a.jpg", tmp_path), Upload("b.jpg", tmp_path), Upload("c.jpg", tmp_path), came]
    rows = [["a.jpg", "A photo of x dog"], ["b.jpg", "a new text"], ["c.jpg", ""]]
    found = [(uploads[0], None), (uploads[1], "old"), (uploads[2], None)]
    sent = with_captions(uploads, rows, "A photo of x dog", tmp_path, found)
    texts = {one.name: one.path.read_text() for one in sent if one.name.endswith(".txt")}
    assert texts == {"b.txt": "a new text"}
    assert [one.name for one in sent[:3]] == ["a.jpg", "b.jpg", "c.jpg"]
    assert with_captions(uploads, [], "", tmp_path, found) == uploads
