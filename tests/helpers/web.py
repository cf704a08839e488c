"""What the tests of the web side share: the decoder, jobs that nobody works on, bodies, what is left behind.

A pytest plugin: a module that wants the fixtures says `pytest_plugins = ("tests.helpers.web",)`. It asserts nothing
(PYTEST_DONT_REWRITE), so it may be imported for its functions before pytest takes it in.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from tests.helpers.analyzer import SharedAnalyzer
from trainer.contract.photos import Upload
from trainer.photos.decoder import Decoder
from trainer.settings import Settings, read_settings
from trainer.studio.rows import Services
from trainer.studio.store import Store
from trainer.web.rest import create_app

Value = str | tuple[str, bytes]  # of a form field: a text, or a file's name and content


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Decoder]:
    """The one child process that decodes photos; it lives through all tests, as it does in the app."""
    folder = tmp_path_factory.mktemp("decoder")
    child = Decoder(read_settings(outputs=folder / "outputs", models=folder / "models"))
    child.warm()
    yield child
    child.close()


@pytest.fixture
def services(settings: Settings, decoder: Decoder) -> Iterator[Services]:
    """The verbs over an empty store. No worker runs, so what is queued stays queued."""
    store = Store(settings.outputs)
    analyzer = SharedAnalyzer(settings)
    yield Services(settings, store, decoder, analyzer)
    analyzer.close()
    store.close()


@pytest.fixture
def client(services: Services) -> TestClient:
    """The REST app; what it does not expect is answered with 500, as it is in the app."""
    return client_of(services)


def client_of(services: Services) -> TestClient:
    return TestClient(create_app(services), raise_server_exceptions=False)


def photo(colour: str = "teal", size: tuple[int, int] = (64, 48), form: str = "PNG") -> bytes:
    """An image file of one colour."""
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, form)
    return stream.getvalue()


def upload(folder: Path, name: str, content: bytes) -> Upload:
    """A file as a door hands it on: its bytes somewhere, under a name of no meaning."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{len(list(folder.iterdir())):04d}"
    path.write_bytes(content)
    return Upload(name, path)


def left_behind(services: Services) -> list[str]:
    """Every row of the store and everything in the folders of tunes: nothing after a request that was refused."""
    rows = [f"{table} {row['id']}" for table in ("tunes", "prompts") for row in services.store.find(table)]
    folders = [services.settings.outputs / name for name in ("incoming", "tunes")]
    files = [str(path) for folder in folders if folder.exists() for path in folder.iterdir()]
    return [*rows, *files, *["a job"] * services.store.queue_length()]


def multipart(fields: Iterable[tuple[str, Value]], boundary: str = "frontier") -> tuple[bytes, dict[str, str]]:
    """Body and headers of multipart/form-data, the fields in this order, as curl -F writes it."""
    body = b""
    for name, value in fields:
        text, file = (value.encode(), "") if isinstance(value, str) else (value[1], f'; filename="{value[0]}"')
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'
        body += head.encode() + text + b"\r\n"
    return body + f"--{boundary}--\r\n".encode(), {"Content-Type": f"multipart/form-data; boundary={boundary}"}


class PhotoServer(BaseHTTPRequestHandler):
    """Another machine that has photos: /NAME.png is one, /move leads there, anything else is not found."""

    def do_GET(self) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        if self.path == "/move":
            self.send_response(302)
            self.send_header("Location", "/moved.png")
            self.end_headers()
            return
        found = self.path.endswith(".png")
        body = photo() if found else b"not here"
        self.send_response(200 if found else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def photo_server() -> Iterator[ThreadingHTTPServer]:
    """A PhotoServer on a free loopback port; `asked` holds the paths that were asked for."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), PhotoServer)
    server.asked = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def address(server: ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_port}"
