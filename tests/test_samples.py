"""The five programs of the product document, run as they stand against our URL by the real curl, node and python.

What copying has done to them is mended (indentation, an address that was taken for mail, Node's own fetch); host, key
and addresses of photos are replaced, and `branch=fast` is added. The app trains fewer steps than it would.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.test_app import ROOT, App, running
from tests.test_webhooks import ReceiverServer, wait_for
from tests.web import PhotoServer

DOCUMENT = ROOT.parent / "shared/reference/create-a-tune.txt"
KEY = "sd_a-key-of-our-own"
PHOTO_URL = "https://i.imgur.com/HLHBnl9.jpeg"
HOSTS = ("http://localhost:3000", "https://api.astria.ai")
CALLBACK_HOST = "https://optional-callback-url.com/"
SAMPLES = {  # where each begins and ends
    "curl with files": ("# With imags", "# With image_urls as form-data"),
    "curl with image_urls": ("# With image_urls as form-data", "# As JSON"),
    "curl with JSON": ("# As JSON", "// NodeJS 16"),
    "node": ("// NodeJS 16", "import requests"),
    "python": ("import requests", "Response"),
}


@pytest.fixture(scope="module")
def document() -> str:
    if not DOCUMENT.exists():
        pytest.skip("the product document is not beside the repository")
    return DOCUMENT.read_text()


@pytest.fixture(scope="module")
def presets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fewer_steps(tmp_path_factory.mktemp("presets"))


def fewer_steps(folder: Path) -> Path:
    """The presets with a twentieth of the steps of branch fast."""
    presets = folder / "presets"
    shutil.copytree(ROOT / "presets", presets)
    toml = (presets / "fast.toml").read_text()
    for rule in ("steps_per_photo", "min_steps", "max_steps"):
        toml = re.sub(rf"^{rule} = \d+", f"{rule} = 8", toml, flags=re.MULTILINE)
    (presets / "fast.toml").write_text(toml)
    return presets


@pytest.fixture
def app(tmp_path: Path, presets: Path) -> Iterator[App]:
    """An app of its own for each program, since all of them give the same title."""
    (outputs := tmp_path / "outputs").mkdir()
    options = ["--presets", str(presets), "--key", KEY, "--private-urls", "allow", "--models", str(tmp_path / "models")]
    with running(outputs, *options) as app:
        app.http.headers["Authorization"] = f"Bearer {KEY}"
        yield app.ready()


@pytest.fixture
def photo_host() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), PhotoServer)
    server.asked = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/1.png"
    server.shutdown()
    server.server_close()


@pytest.fixture
def receiver() -> Iterator[ReceiverServer]:
    server = ReceiverServer(failures=0)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()


def mended(document: str, name: str) -> str:
    """A program of the document, as it was before it was copied."""
    begin, end = SAMPLES[name]
    text = document[document.index("POST /tunes\n") :]
    text = text[text.index(begin) : text.index(end, text.index(begin) + len(begin))]
    for number in range(1, 5):
        text = text.replace("[email protected]", f"=@{number}.jpg", 1)  # `tune[images][]=@1.jpg`
    text = text.replace('import fetch from "node-fetch";\n', "")
    return text.replace(":\nwith open", ":\n  with open").replace("as f:\nreturn", "as f:\n    return")


def to_us(program: str, url: str, photo_url: str, callbacks: str) -> str:
    for host in HOSTS:
        program = program.replace(host, url)
    program = program.replace(PHOTO_URL, photo_url).replace(CALLBACK_HOST, callbacks).replace("sd_XXXXXX", KEY)
    if '"branch"' in program:
        return program
    program = re.sub(r'(-F "tune\[title\])', r'-F "tune[branch]=fast" \1', program)
    return re.sub(r'("title": (\'[^\']*\'|"[^"]*"),)', r'\1 "branch": "fast",', program)


def run(program: str, name: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a program in its language, in a folder of its own."""
    if name.startswith("curl"):
        told = program.replace("curl ", "curl -sS -w '\\n%{http_code}\\n' ")
        command = ["bash", "-c", told]
    elif name == "node":
        (folder / "sample.mjs").write_text(program)
        command = ["node", "sample.mjs"]
    else:
        (folder / "sample.py").write_text(f"{program}\nprint(response.status_code)\nprint(response.text)")
        command = [sys.executable, "sample.py"]
    env = {"API_KEY": KEY, "PATH": "/usr/bin:/bin:/usr/local/bin"}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=60, check=True)


@pytest.mark.long
@pytest.mark.parametrize("name", SAMPLES)
def test_a_program_of_the_document_trains_its_tune(
    name: str,
    document: str,
    app: App,
    photo_host: str,
    receiver: ReceiverServer,
    dog_photos: Callable[[int], list[Path]],
    tmp_path: Path,
) -> None:
    for number, photo in enumerate(dog_photos(4), 1):
        shutil.copy(photo, tmp_path / f"{number}.jpg")
    program = to_us(mended(document, name), app.url, photo_host, receiver.url(""))
    assert not re.search(r"astria\.ai/tunes\b(?! )|imgur|email|localhost:3000", program.replace("gallery/tunes", ""))
    ended = run(program, name, tmp_path)
    assert "201" in ended.stdout.split() or name == "node", ended.stdout + ended.stderr  # node prints the tune alone
    (listed,) = app.http.get("/tunes").json()
    tune = app.finished(listed["id"])
    assert (tune["status"], tune["branch"]) == ("trained", "fast"), tune["error"]
    assert f"{listed['id']}" in ended.stdout
    assert [prompt["status"] for prompt in tune["prompts"]] == ["rendered"]
    assert_like(tune, json.loads(document.partition("\nResponse\n")[2]))
    if name == "curl with JSON":
        wait_for(lambda: len(receiver.taken) == 2)
        posted = {path.partition("?")[2]: json.loads(body) for path, _, body in receiver.taken}
        assert posted["user_id=1&tune_id=1"]["tune"]["trained_at"]
        assert len(posted["user_id=1&tune_id=1&prompt_id=1"]["prompt"]["images"]) == 8


def assert_like(tune: dict[str, Any], sample: dict[str, Any]) -> None:
    """All keys of the document's answer, each of its type. What nothing sets stays null: tunes here do not expire."""
    for key, value in sample.items():
        assert key in tune, key
        if value is not None and key != "expires_at" and tune[key] is not None:
            assert type(tune[key]) is type(value), key
    for key in ("ckpt_url", "trained_at", "started_training_at", "eta", "created_at", "updated_at", "url"):
        assert isinstance(tune[key], str), key
    assert all(isinstance(url, str) for url in tune["ckpt_urls"] + tune["orig_images"])
