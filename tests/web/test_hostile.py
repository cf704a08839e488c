"""120 hostile requests over a real socket: each is answered as it should be, leaves nothing, and the next one works.

The numbers are those that a list of such inputs asks for; where ours is another, the row says why. More images are in
test_decode.py.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import socket
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import psutil
import pytest
import uvicorn
from PIL import Image

from tests.helpers.analyzer import SharedAnalyzer
from tests.helpers.web import left_behind, multipart, photo
from trainer.photos.decoder import Decoder
from trainer.settings import read_settings
from trainer.studio import tunes
from trainer.studio.rows import Services
from trainer.studio.store import Store
from trainer.web.guard import Guard
from trainer.web.rest import create_app

pytest_plugins = ("tests.helpers.web",)

KEY = "sd_key"
AUTHORIZATION = f"Authorization: Bearer {KEY}"
MAX_BODY_MB = 8
GROWTH_MB = 64


@dataclass
class Live:
    """The guard and the REST app behind a real server."""

    port: int
    services: Services

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    def send(self, raw: bytes, seconds: float = 5.0) -> list[int]:
        """Send bytes, and read until the server has nothing more to say; returns the status of each answer."""
        return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", self.answer(raw, seconds))]

    def answer(self, raw: bytes, seconds: float = 5.0) -> bytes:
        received = b""
        with socket.create_connection(("127.0.0.1", self.port), timeout=seconds) as sock:
            with suppress(ConnectionError):  # a server that has answered need not read on
                sock.sendall(raw)
            with suppress(ConnectionError, TimeoutError):
                while chunk := sock.recv(65_536):
                    received += chunk
        return received


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory, decoder: Decoder) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("hostile")
    settings = read_settings(outputs=folder / "outputs", models=folder / "models", key=KEY, max_body_mb=MAX_BODY_MB)
    store, analyzer = Store(settings.outputs), SharedAnalyzer(settings)
    services = Services(settings, store, decoder, analyzer)
    guard = Guard(settings, load=lambda: create_app(services), begin=lambda: None, unload=lambda: None)
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(guard, log_level="critical", ws="none", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    live = Live(listening.getsockname()[1], services)
    while live.send(get("/health")) != [200] or b'"ready": true' not in live.answer(get("/health")):
        time.sleep(0.05)
    yield live
    server.should_exit = True
    thread.join(10)
    analyzer.close()
    store.close()


# Requests


def request(
    method: str, path: str, body: bytes = b"", *lines: str, host: str | None = "127.0.0.1", auth: str = AUTHORIZATION,
    length: str | None = "",
) -> bytes:  # fmt: skip
    """A request as bytes. length: "" counts, None says none; auth "": without a key."""
    head = [f"{method} {path} HTTP/1.1"]
    head += [f"Host: {host}"] if host is not None else []
    head += [auth] if auth else []
    if length is not None and (body or method == "POST"):
        head.append(f"Content-Length: {length or len(body)}")
    return "\r\n".join([*head, "Connection: close", *lines, "", ""]).encode("latin-1") + body


def get(path: str, *lines: str, **more: Any) -> bytes:
    return request("GET", path, b"", *lines, **more)


def posting(body: bytes, kind: str, *lines: str, **more: Any) -> bytes:
    return request("POST", "/tunes", body, f"Content-Type: {kind}", *lines, **more)


def jsonish(text: str | bytes) -> bytes:
    return posting(text.encode() if isinstance(text, str) else text, "application/json")


def tune(**fields: Any) -> bytes:
    """JSON of a tune that lacks only its photos."""
    return jsonish(json.dumps({"tune": {"title": "Rex", "name": "dog", "branch": "fast", **fields}}))


FORM = "application/x-www-form-urlencoded"
BOUND = "multipart/form-data; boundary=frontier"
FILE = ("tune[images][]", ("a.png", photo()))


def titled(title: str, *fields: Any) -> bytes:
    return posting(multipart([("tune[title]", title), *FIELDS[1:], FILE, *fields])[0], BOUND)


FIELDS = [("tune[title]", "Rex"), ("tune[name]", "dog"), ("tune[branch]", "fast")]
WHOLE = multipart([*FIELDS, FILE])[0]


def form(*fields: Any) -> bytes:
    return posting(multipart([*FIELDS, *fields])[0], BOUND)


def part(head: bytes, body: bytes = b"x") -> bytes:
    return posting(b"--frontier\r\n" + head + b"\r\n\r\n" + body + b"\r\n--frontier--\r\n", BOUND)


def keys(*names: str) -> bytes:
    return posting("&".join(f"{name}=x" for name in names).encode(), FORM)


def chunked(chunks: bytes, kind: str = "application/json", *lines: str) -> bytes:
    return posting(chunks, kind, "Transfer-Encoding: chunked", *lines, length=None)


def images(*files: tuple[str, bytes]) -> bytes:
    return form(*(("tune[images][]", file) for file in files))


def drawn(form: str = "PNG", size: tuple[int, int] = (64, 48), **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size).save(stream, form, **options)
    return stream.getvalue()


def png_of(width: int, height: int) -> bytes:
    """A PNG whose head says so; there are no pixels."""
    data = bytearray(drawn())
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


BIG = b"x" * ((MAX_BODY_MB + 1) * 2**20)
DEEP = "[" * 100_000
FRAMES = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]

HTTP: dict[str, tuple[bytes, int]] = {
    "no-token": (get("/tunes", auth=""), 401),
    "empty-bearer": (get("/tunes", auth="Authorization: Bearer "), 401),
    "basic-instead": (get("/tunes", auth="Authorization: Basic c2RfMTp4"), 401),
    "wrong-token": (get("/tunes", auth="Authorization: Bearer sd_other"), 401),
    # A line break in a value begins a header of no name, which is no HTTP.
    "token-with-newline": (get("/tunes", auth=f"Authorization: Bearer {KEY}\r\nx"), 400),
    # It fits the server's limit of 64 KB for all headers, and is a wrong key like any other.
    "token-10kB": (get("/tunes", auth=f"Authorization: Bearer {'x' * 10_000}"), 401),
    "token-in-query": (get(f"/tunes?key={KEY}", auth=""), 401),
    "two-authorization-headers": (get("/tunes", "Authorization: Bearer other"), 401),  # the last one counts
    "lower-case-bearer": (get("/tunes", auth=f"authorization: bearer {KEY}"), 200),
    "host-evil": (get("/tunes", host="evil.example"), 403),  # the server could as well say 400
    "host-missing": (get("/tunes", host=None), 400),
    "host-path-injection": (get("/tunes", host="a/?x="), 403),  # as any other name
    "origin-null-on-post": (posting(b"{}", "application/json", "Origin: null"), 403),
    "origin-other-localhost-port": (posting(b"{}", "application/json", "Origin: http://127.0.0.1:1"), 403),
    "method-TRACE": (request("TRACE", "/tunes"), 405),
    "method-override-header": (get("/tunes/1", "X-HTTP-Method-Override: DELETE"), 404),
    "path-dotdot": (get("/files/../tunebooth.db"), 404),
    "path-double-encoded": (get("/files/%252e%252e/tunebooth.db"), 404),
    "url-16kB": (get("/tunes?title=" + "x" * 16_000), 414),
    "headers-100kB": (get("/tunes", *(f"X-{n}: {'x' * 1000}" for n in range(100))), 431),
}
FRAMING: dict[str, tuple[bytes, int | None]] = {
    "cl-and-te": (posting(b"0\r\n\r\n", "application/json", "Transfer-Encoding: chunked", length="5"), 400),
    "cl-negative": (posting(b"{}", "application/json", length="-1"), 400),
    "cl-short": (posting(b'{"tune": {}}', "application/json", length="5"), 400),
    "cl-long-then-close": (posting(b"{}", "application/json", length="500"), None),  # nobody is there for an answer
    "chunked-bad-terminator": (chunked(b"2\r\n{}XX0\r\n\r\n"), 400),
    "chunk-size-10kB": (chunked(b"0" * 10_000 + b"2\r\n{}\r\n0\r\n\r\n"), 400),
    "body-1GB": (posting(b"", "application/json", length=str(2**30)), 413),
    "body-1GB-chunked": (chunked(b"%x\r\n" % len(BIG) + BIG + b"\r\n0\r\n\r\n"), 413),
    "expect-100-never-sent": (posting(b"", "application/json", "Expect: 100-continue", length="10"), 100),  # go on
    "gzip-request": (posting(gzip.compress(b'{"tune": {}}'), "application/json", "Content-Encoding: gzip"), 415),
    "gzip-bomb-request": (posting(gzip.compress(bytes(2**24)), "application/json", "Content-Encoding: gzip"), 415),
    "pipelined-two-requests": (get("/tunes").replace(b"Connection: close\r\n", b"") + get("/tunes"), 200),
}
CONTENT_TYPE: dict[str, tuple[bytes, int]] = {
    "none": (request("POST", "/tunes", b"{}"), 415),
    "text-plain-json": (posting(b"{}", "text/plain"), 415),
    "json-charset-utf16": (posting('{"tune": {}}'.encode("utf-16"), "application/json; charset=utf-16"), 400),
    "multipart-no-boundary": (posting(WHOLE, "multipart/form-data"), 400),
    "multipart-empty-boundary": (posting(WHOLE, "multipart/form-data; boundary="), 400),
    "multipart-boundary-300": (posting(WHOLE, f"multipart/form-data; boundary={'x' * 300}"), 400),
    "wrong-boundary": (posting(WHOLE, "multipart/form-data; boundary=other"), 400),
    "urlencoded-with-file-fields": (posting(b"tune[title]=a&tune[name]=a&tune[images][]=a.png", FORM), 422),
}
# Starlette's parser answers 400 to whatever is too many or too much for it.
MULTIPART: dict[str, tuple[bytes, int]] = {
    "no-closing-boundary": (posting(WHOLE.removesuffix(b"--frontier--\r\n"), BOUND), 400),
    "cut-in-file": (posting(WHOLE[:-60], BOUND), 400),
    "cut-in-header": (posting(WHOLE[:30], BOUND), 400),
    "empty-body": (posting(b"", BOUND), 400),  # it ends before its closing boundary
    "no-name": (part(b"Content-Disposition: form-data"), 400),
    "no-disposition": (part(b"Content-Type: text/plain"), 400),
    "header-1MB": (part(b"Content-Disposition: form-data; name=" + b"x" * 2**20), 400),
    "headers-10k": (part(b"\r\n".join(b"X-%d: y" % n for n in range(10_000))), 400),
    "fields-5001": (form(*[("tune[a]", "b")] * 5001), 400),  # 5,000 are allowed, for 100 prompts
    "files-over-limit": (form(*[FILE] * 611), 400),
    "text-field-2MB": (form(("tune[title]", "x" * 2**21)), 400),
    "preamble-over-the-limit": (posting(BIG + WHOLE, BOUND), 413),
    "name-bad-utf8": (part(b'Content-Disposition: form-data; name="tune[\xff\xfe]"'), 422),  # nobody's name
    "name-with-nul": (part(b'Content-Disposition: form-data; name="tune[a\0]"'), 400),
    "nested-multipart": (part(b"Content-Type: multipart/mixed; boundary=b"), 400),
    "same-filename-twice": (images(("a.png", photo("red")), ("a.png", photo("blue"))), 201),
}
KEYS: dict[str, tuple[bytes, int]] = {
    "depth-1000": (keys("tune" + "[a]" * 1000), 400),
    "unbalanced-open": (keys("tune[title"), 400),
    "unbalanced-close": (keys("tune]title"), 400),
    "empty-key": (keys(""), 400),
    "unknown-key": (keys("tune[qqq]"), 422),
    "scalar-twice": (keys("tune[title]", "tune[title]"), 400),
    "tune-string-and-map": (keys("tune", "tune[title]"), 400),
    "images-map-and-list": (keys("tune[images][a]", "tune[images][]"), 400),
    "index-999999999": (keys("tune[image_urls][999999999]"), 400),
    "index-negative": (keys("tune[image_urls][-1]"), 422),  # it is a name like any other, so no list
    "index-gap": (keys("tune[image_urls][0]", "tune[image_urls][2]"), 400),
    "bracket-bomb-600": (keys("tune" + "[" * 600), 400),  # its name is none, whatever its size
    "semicolon-separators": (posting(b"tune[title]=a;tune[name]=b", FORM), 422),  # one title with a semicolon in it
    "double-encoded-brackets": (keys("tune%255Btitle%255D"), 400),
    "dunder-class": (keys("tune[__class__]"), 422),
    "proto": (keys("tune[__proto__][a]"), 422),
}
JSON: dict[str, tuple[bytes, int]] = {
    "bad-utf8": (jsonish(b'{"tune": {"title": "\xff"}}'), 400),
    "bom": (jsonish(b"\xef\xbb\xbf{}"), 400),
    "truncated": (jsonish('{"tune": {"title": "a'), 400),
    "trailing-garbage": (jsonish('{"tune": {}} {}'), 400),
    "duplicate-keys": (jsonish('{"tune": {"title": "a", "title": "b"}}'), 400),
    "nan": (jsonish('{"tune": {"steps": NaN}}'), 400),
    "infinity-1e999": (jsonish('{"tune": {"steps": 1e999}}'), 422),
    "int-5000-digits": (jsonish('{"tune": {"steps": ' + "9" * 5000 + "}}"), 400),
    "int-over-64-bit": (tune(base_tune_id=2**70), 422),
    "float-as-int": (tune(steps=1.5), 422),
    "bool-as-int": (tune(steps=True), 422),
    "word-as-int": (tune(steps="many"), 422),  # numbers may come as texts, as forms have them
    "lone-surrogate": (jsonish('{"tune": {"title": "\\ud800"}}'), 400),  # no text at all, so the body is none
    "nul-in-string": (tune(title="a\0"), 422),
    "deep-100k": (jsonish(DEEP), 400),
    "deep-900": (jsonish("[" * 900 + "]" * 900), 422),  # it can be read; it is a list
    "top-level-array": (jsonish("[]"), 422),
    "100k-item-list": (tune(image_urls=["http://a.example/"] * 100_000), 400),  # over the limit for JSON, 1 MB
}
FIELD: dict[str, tuple[bytes, int]] = {
    "title-empty": (tune(title=""), 422),
    "title-100kB": (tune(title="x" * 100_000), 422),
    "title-dotdot": (titled("../../etc"), 201),
    "title-absolute-path": (titled("/etc/passwd"), 201),
    "title-script": (titled("<script>alert(1)</script>"), 201),
    "title-rtl-and-zero-width": (titled("\u202ea\u200bb"), 201),
    "title-newline": (tune(title="a\nb"), 422),
    "title-format-braces": (titled("{0.__class__}"), 201),
    "characteristics-jinja": (form(FILE, ("tune[characteristics][a]", "{{7*7}}")), 201),
    "characteristics-percent": (form(FILE, ("tune[characteristics][a]", "%s%n")), 201),
    "characteristics-nested-list": (tune(characteristics={"a": [["b"]]}), 422),
    "characteristics-10k-keys": (tune(characteristics={f"k{n}": "v" for n in range(10_000)}), 422),
    "steps-zero": (tune(steps=0), 422),
    "steps-1e9": (tune(steps=10**9), 422),
    "learning-rate-negative": (tune(args="lr=-1"), 422),
    "resolution-1": (tune(args="resolution=1"), 422),
    "base-model-path": (tune(base_tune_id="../../x"), 422),
    "base-model-unknown": (tune(branch="sd15", model_type="lora", base_tune_id=12345), 422),
    "callback-of-another-scheme": (tune(callback="file:///etc/passwd"), 422),  # http is allowed, as there
    "idempotency-key-of-nobody": (posting(b'{"tune": {}}', "application/json", "Idempotency-Key: a b"), 422),
}
IMAGES: dict[str, tuple[bytes, int]] = {
    "zero-images": (form(), 422),
    "too-many-images": (images(*[("a.png", photo())] * 101), 422),
    "1-byte": (images(("a.png", b"\x89")), 422),
    "html-as-png": (images(("a.png", b"<html>")), 422),
    "svg": (images(("a.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>")), 422),
    "bomb-60000": (images(("a.png", png_of(60_000, 60_000))), 422),
    "1x100000": (images(("a.png", png_of(1, 100_000))), 422),
    "animated": (
        images(("a.gif", drawn("GIF", (64, 64), save_all=True, append_images=FRAMES))),
        201,
    ),  # its first frame
    "truncated-jpeg": (images(("a.jpg", drawn("JPEG", (640, 480), quality=95)[:-2000])), 422),
    "nine-good-one-bad": (images(*[(f"{n}.png", photo(f"#0000{n}0")) for n in range(9)], ("bad.png", b"x")), 422),
}
CASES = {"HTTP": HTTP, "framing": FRAMING, "type": CONTENT_TYPE, "multipart": MULTIPART, "keys": KEYS, "JSON": JSON,
         "fields": FIELD, "images": IMAGES}  # fmt: skip
ROWS = [pytest.param(*row, id=f"{kind} {name}") for kind, rows in CASES.items() for name, row in rows.items()]


def test_all_are_here() -> None:
    assert [len(rows) for rows in CASES.values()] == [20, 12, 8, 16, 16, 18, 20, 10]


@pytest.mark.parametrize(("raw", "status"), ROWS)
def test_a_hostile_request_is_answered_and_leaves_nothing(raw: bytes, status: int | None, live: Live) -> None:
    raw = raw.replace(b"Host: 127.0.0.1\r\n", f"Host: {live.host}\r\n".encode())
    process = psutil.Process()
    before = process.memory_info().rss
    got = live.send(raw, 5.0 if status else 0.5)
    assert got[:1] == ([] if status is None else [status])
    if status == 201:
        for one in tunes.list_tunes(live.services):
            tunes.delete_tune(live.services, one.id)
    assert left_behind(live.services) == []
    assert process.memory_info().rss - before < GROWTH_MB * 2**20
    assert live.send(get("/tunes", host=live.host)) == [200]


def test_two_requests_in_one_go_are_both_answered(live: Live) -> None:
    raw = FRAMING["pipelined-two-requests"][0].replace(b"Host: 127.0.0.1\r\n", f"Host: {live.host}\r\n".encode())
    assert live.send(raw) == [200, 200]


@pytest.mark.parametrize("name", [name for name in FIELD if FIELD[name][1] == 201])
def test_what_is_only_text_is_kept_as_it_came(name: str, live: Live) -> None:
    raw = FIELD[name][0].replace(b"Host: 127.0.0.1\r\n", f"Host: {live.host}\r\n".encode())
    sent = re.findall(rb'name="tune\[(?:title|characteristics\]\[a)\]"\r\n\r\n(.*?)\r\n', raw)[-1]
    told = json.loads(live.answer(raw).partition(b"\r\n\r\n")[2])
    tunes.delete_tune(live.services, told["id"])
    assert sent.decode() in (told["title"], told["characteristics"].get("a"))
