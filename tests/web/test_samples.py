"""The five programs of the product document, run as they stand against our URL by the real curl, node and python.

What copying has done to them is mended (indentation, an address that was taken for mail, Node's own fetch); host, key
and addresses of photos are replaced, and `branch=fast` is added. The app trains fewer steps than it would.
"""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.app import App, running
from tests.helpers.quick import fewer_steps
from tests.helpers.receiver import ReceiverServer, wait_for
from tests.helpers.samples import DOCUMENT, KEY, SAMPLES, mended, run, to_us
from tests.helpers.web import PhotoServer


@pytest.fixture(scope="module")
def document() -> str:
    if not DOCUMENT.exists():
        pytest.skip("the product document is not beside the repository")
    return DOCUMENT.read_text()


@pytest.fixture(scope="module")
def presets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fewer_steps(tmp_path_factory.mktemp("presets"))


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
