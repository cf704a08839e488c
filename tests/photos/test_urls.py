"""Photos from elsewhere: nothing but public addresses is reached, and nothing takes more room or time than it may.

No test uses a network. Names are looked up in a table here, every attempt to connect is noted, and there is one address
behind which anything stands: PUBLIC, where a server on loopback takes its place. All above that is the real thing:
`fetch_all`, the guarded client, httpx, sockets.
"""

from __future__ import annotations

import gzip
import io
import random
import socket
import struct
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

import pytest
from PIL import Image

from tests.helpers.web import address, left_behind, photo
from trainer.contract.errors import InvalidRequest
from trainer.contract.fields import parse_request
from trainer.contract.prompts import PromptRequest
from trainer.photos import urls
from trainer.photos.decoder import Decoder
from trainer.photos.intake import intake
from trainer.photos.urls import Unreachable, fetch_all, post
from trainer.settings import Settings
from trainer.studio import tunes
from trainer.studio.rows import Services

pytest_plugins = ("tests.helpers.web",)


def noise(name: str) -> tuple[str, bytes]:
    """A photo of 750 kB that cannot be packed."""
    stream = io.BytesIO()
    Image.frombytes("RGB", (500, 500), random.Random(name).randbytes(750_000)).save(stream, "BMP")
    return name, stream.getvalue()


def zipped(*files: tuple[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in files:
            archive.writestr(name, content)
    return stream.getvalue()


PHOTO = photo()
BOMB = gzip.compress(bytes(2**24))  # 16 MB in 16 KB
ZIP = zipped(noise("1.bmp"), noise("2.bmp"))  # 1.5 MB
PUBLIC = "93.184.216.34"
DOWN = "93.184.216.35"  # public as well, but nothing stands behind it
SERVED = (PUBLIC, 80)

NAMES = {
    "public.test": [PUBLIC],
    "down.test": [DOWN],
    "localhost": ["127.0.0.1"],
    "foo.localhost": ["127.0.0.1"],
    "metadata.google.internal": ["169.254.169.254"],
    "metadata": ["169.254.169.254"],
    "127.0.0.1.nip.test": ["127.0.0.1"],
    "private.test": ["10.0.0.5"],
    "multi.test": [PUBLIC, "10.0.0.5"],
    "multi2.test": ["10.0.0.5", PUBLIC],
    "aaaa.test": ["::1"],
    "mapped.test": ["::ffff:169.254.169.254"],
    "nat64.test": ["64:ff9b::a9fe:a9fe"],
    "cgnat.test": ["100.64.0.1"],
}
MOVING = "rebind.test"  # PUBLIC when it is first asked for, 127.0.0.1 from then on
STALLED = "stalled.test"  # its name server keeps silent until the test lets it speak


# The server behind the public address


class Elsewhere(BaseHTTPRequestHandler):
    """Whatever another machine may answer, by the first part of the path; any other path is a photo."""

    server: ElsewhereServer

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers))
        kind = urlsplit(self.path).path.split("/")[1].replace("-", "_")
        getattr(self, f"answer_{kind}", self.answer_photo)()

    def head(self, status: int = 200, **headers: str | int) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def whole(self, body: bytes, **headers: str | int) -> None:
        self.head(Content_Length=len(body), **headers)
        self.wfile.write(body)

    def forever(self, block: bytes, pause: float = 0.0) -> None:
        """Write until the other side goes away, which ends this with an error."""
        while not self.server.closing.wait(pause):
            self.wfile.write(block)

    def answer_photo(self) -> None:
        self.whole(PHOTO)

    def answer_zip(self) -> None:
        self.whole(ZIP)

    def answer_to(self) -> None:
        """/to/302?LOCATION"""
        parts = urlsplit(self.path)
        self.head(int(parts.path.rpartition("/")[2]), Location=unquote(parts.query))

    def answer_hops(self) -> None:
        """/hops/3 is three redirects before a photo."""
        left = int(self.path.rpartition("/")[2])
        self.head(302, Location=f"/hops/{left - 1}") if left else self.answer_photo()

    def answer_loop(self) -> None:
        self.head(302, Location="/loop")

    def answer_cookie(self) -> None:
        self.head(302, Location="/cookie-taken.png", Set_Cookie="secret=1; Path=/")

    def answer_endless_move(self) -> None:
        self.head(302, Location="/moved.png")
        self.forever(bytes(2**16))

    def answer_missing(self) -> None:
        self.head(404, Content_Length=0)

    def answer_nowhere(self) -> None:
        self.head(302, Content_Length=0)

    def answer_empty(self) -> None:
        self.whole(b"")

    def answer_reset(self) -> None:
        """/reset/counted says how long the body would be."""
        counted = {"Content_Length": len(PHOTO)} if self.path.endswith("counted") else {}
        self.head(**counted)
        self.wfile.write(PHOTO[:20])
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()
        self.connection.close()

    def answer_body_by_bytes(self) -> None:
        """/body-by-bytes/counted says how long the body would be; else its end is the connection's."""
        counted = {"Content_Length": 1000} if self.path.endswith("counted") else {}
        self.head(**counted)
        self.forever(b"a", 0.05)

    def answer_head_by_bytes(self) -> None:
        self.wfile.write(b"HTTP/1.0 200 OK\r\nX-Slow: ")
        self.forever(b"a", 0.05)

    def answer_nothing(self) -> None:
        self.server.closing.wait(3)

    def answer_5_gb(self) -> None:
        self.head(Content_Length=5 * 2**30)
        self.server.closing.wait(3)

    def answer_flood(self) -> None:
        self.head()
        self.forever(bytes(2**16))

    def answer_bomb(self) -> None:
        self.whole(BOMB, Content_Encoding="gzip")

    def answer_page(self) -> None:
        self.whole(b"<html>not a photo</html>", Content_Type="image/png")

    def answer_mislabelled(self) -> None:
        self.whole(PHOTO, Content_Type="text/html")

    def answer_together(self) -> None:
        """A photo for two who ask at the same time."""
        self.server.two.wait(2)
        self.answer_photo()

    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""


class ElsewhereServer(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Elsewhere)
        self.asked: list[tuple[str, Message]] = []
        self.closing = threading.Event()
        self.two = threading.Barrier(2)

    def handle_error(self, *_: object) -> None:
        """Clients that go away are what some tests are about."""


@pytest.fixture(scope="module")
def server() -> Iterator[ElsewhereServer]:
    server = ElsewhereServer()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()


# The network


@dataclass
class Net:
    """What was looked up and what was connected to."""

    server: ElsewhereServer
    lookups: list[str] = field(default_factory=list)
    attempts: list[tuple[str, int]] = field(default_factory=list)
    speak: threading.Event = field(default_factory=threading.Event)

    def addresses(self, host: str) -> list[str]:
        """As a system's resolver has it: literals, the old forms of IPv4 (127.1, 0x7f000001), names."""
        self.lookups.append(host)
        try:
            return [str(ip_address(host))]
        except ValueError:
            pass  # not a literal as it is written today
        try:
            return [socket.inet_ntoa(socket.inet_aton(host))]
        except (OSError, ValueError):
            name = host.encode("idna").decode().lower().rstrip(".")
        if name == MOVING:
            return ["127.0.0.1" if self.lookups.count(host) > 1 else PUBLIC]
        if name == STALLED:
            self.speak.wait(3)
            return [PUBLIC]
        if name not in NAMES:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return NAMES[name]


@pytest.fixture
def net(server: ElsewhereServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Net]:
    """The network as said above, in place of the real one: for whoever uses sockets, guarded or not."""
    net = Net(server)
    server.asked.clear()
    behind = ("127.0.0.1", server.server_port)
    real_lookup, real_connect, real_peer = socket.getaddrinfo, socket.socket.connect, socket.socket.getpeername

    def lookup(host: str, port: int, family: int = 0, kind: int = 0, proto: int = 0, flags: int = 0, **more: int):
        found = net.addresses(host)
        kind = kind or more.get("type", 0)
        return [row for one in found for row in real_lookup(one, port, family, kind, proto, socket.AI_NUMERICHOST)]

    def connect(sock: socket.socket, where: tuple[str, int]) -> None:
        if sock.family not in (socket.AF_INET, socket.AF_INET6):
            return real_connect(sock, where)
        net.attempts.append(where[:2])
        if where[:2] != SERVED:
            raise ConnectionRefusedError
        return real_connect(sock, behind)

    def peer(sock: socket.socket):
        found = real_peer(sock)
        return SERVED if found == behind else found

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket.socket, "connect_ex", None)  # nobody gets past `connect`
    monkeypatch.setattr(socket.socket, "getpeername", peer)
    yield net
    net.speak.set()


@pytest.fixture
def fetch(net: Net, settings: Settings, tmp_path: Path) -> Callable[..., list[bytes]]:
    """fetch(url, ...): what the photos hold."""
    folder = tmp_path / "fetched"
    folder.mkdir()
    return lambda *asked: [upload.path.read_bytes() for upload in fetch_all(settings, list(asked), folder)]


def problems_of(fetch: Callable[..., list[bytes]], *asked: str) -> list[str]:
    with pytest.raises(InvalidRequest) as refused:
        fetch(*asked)
    assert list(refused.value.problems) == ["image_urls"]
    return refused.value.problems["image_urls"]


def public(path: str) -> str:
    return f"http://public.test/{path}"


# The corpus of forged addresses


def http(*places: str) -> list[str]:
    return [f"http://{place}" for place in places]


def moves(code: int, location: str) -> str:
    return public(f"to/{code}?{quote(location, safe='')}")


CORPUS = {
    "IPv4": http(
        "127.0.0.1", "127.1", "127.0.1", "0", "0.0.0.0", "2130706433", "0x7f000001", "0x7f.0.0.1", "0x7f.1",
        "0177.0.0.1", "017700000001", "127.000.000.001", "127.255.255.254", "10.0.0.1", "172.16.0.1", "192.168.1.1",
        "169.254.169.254/latest/meta-data/", "2852039166", "0xa9fea9fe", "0251.0376.0251.0376", "169.254.169.254.",
        "169.254.170.2", "100.100.100.200", "100.64.0.1", "192.0.0.192", "168.63.129.16", "198.18.0.1", "192.0.2.1",
        "192.88.99.1", "224.0.0.1", "240.0.0.1", "255.255.255.255",
    ),
    "IPv6": http(
        "[::1]", "[::]", "[0:0:0:0:0:0:0:1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::ffff:169.254.169.254]",
        "[::127.0.0.1]", "[::ffff:0:127.0.0.1]", "[64:ff9b::7f00:1]", "[64:ff9b::169.254.169.254]",
        "[64:ff9b:1::a9fe:a9fe]", "[2002:7f00:1::]", "[2002:a9fe:a9fe::1]", "[2001:0:4136:e378:8000:63bf:80ff:fffe]",
        "[fe80::1]", "[fe80::1%25lo]", "[fc00::1]", "[fd00:ec2::254]", "[fec0::1]", "[ff02::1]", "[2001:db8::1]",
        "[100::1]", "[5f00::1]",
    ),
    "names": http(
        "localhost", "LOCALHOST.", "foo.localhost", "metadata.google.internal/computeMetadata/v1/", "metadata",
        "127.0.0.1.nip.test", "private.test", "multi.test", "multi2.test", "aaaa.test", "mapped.test", "nat64.test",
        "cgnat.test", "rebind.test",
    ),
    "Unicode and escapes": http(
        "①②⑦.⓪.⓪.①", "127。0。0。1", "１２７.０.０.１", "ⓛⓞⓒⓐⓛⓗⓞⓢⓣ", "loc%61lhost", "%31%32%37.0.0.1",
        "127.0.0.1%00.public.test",
    ),
    "parsers": [
        *http(
            "public.test@127.0.0.1", "127.0.0.1@public.test", "public.test:80@127.0.0.1:80", "public.test#@127.0.0.1",
            "127.0.0.1\\@public.test", "public.test\\@127.0.0.1",
        ),
        "http:/\\127.0.0.1/", "http:///127.0.0.1/", "http:127.0.0.1/", "//127.0.0.1/", "http://[::1",
        *http("127.0.0.1:6379", "public.test:22", "public.test:0", "public.test:65536"), "HTTP://127.0.0.1/",
    ],
    "schemes": [
        "file:///etc/passwd", "ftp://127.0.0.1/a.png", "gopher://127.0.0.1:6379/_INFO", "dict://127.0.0.1:6379/info",
        "ldap://127.0.0.1/", "data:image/png;base64,iVBORw0KGgo=", "jar:http://127.0.0.1/a.jar!/a.png",
        "http+unix://%2Fvar%2Frun%2Fdocker.sock/info", "unix:///var/run/docker.sock", "javascript:alert(1)",
        "blob:http://127.0.0.1/a",
    ],
    "text": [
        " http://127.0.0.1/", "http://public.test/\t", "http://public.test/\r\nX-Forged: 1", "ht\ntp://127.0.0.1/",
        "\0http://127.0.0.1/", "http://127.0.0.1\u200b/", "", "http://", f"http://{'a' * 300}.test/",
        f"http://public.test/{'a' * 100_000}",
    ],
    "redirects": [
        *(moves(code, "http://127.0.0.1/") for code in (301, 302, 303, 307, 308)),
        moves(302, "http://169.254.169.254/latest/meta-data/"), moves(302, "http://[::ffff:127.0.0.1]/"),
        moves(302, "//127.0.0.1/"), moves(302, "file:///etc/passwd"), moves(302, moves(302, "http://10.0.0.1/")),
        moves(302, "http://rebind.test/"), moves(302, "http://2130706433/"), moves(302, "http://public.test@127.0.0.1/"),
        moves(302, "/\\127.0.0.1/"),
    ],
}  # fmt: skip

# Those that lead to the public address only, each in its own way: an address that is looked up once and kept (twice),
# what is a fragment, and what is a path.
HARMLESS = {
    "http://rebind.test", "http://public.test#@127.0.0.1", moves(302, "http://rebind.test/"),
    moves(302, "/\\127.0.0.1/"),
}  # fmt: skip
FORMS = [pytest.param(url, id=f"{kind} {ascii(url)[1:60]}") for kind, forms in CORPUS.items() for url in forms]
REASONS = ("cannot be fetched", "must begin with http:// or https://")


def test_the_corpus_is_whole() -> None:
    assert [len(forms) for forms in CORPUS.values()] == [32, 23, 14, 7, 16, 11, 10, 14]
    every = [url for forms in CORPUS.values() for url in forms]
    assert len(set(every)) == len(FORMS) == 127
    assert set(every) > HARMLESS


@pytest.mark.parametrize("url", FORMS)
def test_no_form_of_an_inner_address_is_connected_to(url: str, net: Net, fetch: Callable[..., list[bytes]]) -> None:
    if url in HARMLESS:
        assert fetch(url) == [PHOTO]
    else:
        (problem,) = problems_of(fetch, url)
        assert problem in [f"{url[:200]} {reason}" for reason in REASONS]
    answered = url in HARMLESS or url in CORPUS["redirects"]
    assert set(net.attempts) == ({SERVED} if answered else set())


@pytest.mark.parametrize("url", FORMS)
def test_no_form_of_an_inner_address_is_posted_to(url: str, net: Net, settings: Settings) -> None:
    beyond = settings.model_copy(update={"host": "0.0.0.0"})
    try:
        asked = parse_request(PromptRequest, {"text": "a dog", "callback": url}).callback
        answered = asked is not None and post(beyond, asked, b"{}", {})[0] > 0
    except (InvalidRequest, Unreachable):
        answered = False
    assert answered == (url in HARMLESS or url in CORPUS["redirects"])
    assert set(net.attempts) == ({SERVED} if answered else set())


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_callback_on_loopback_is_for_an_app_on_loopback(
    host: str, settings: Settings, server: ElsewhereServer
) -> None:
    here = settings.model_copy(update={"host": host})
    url = f"http://127.0.0.1:{server.server_port}/a"
    if here.on_loopback:
        assert post(here, url, b"{}", {}) == (501, None)  # it has no POST
    else:
        with pytest.raises(Unreachable, match="cannot be reached"):
            post(here, url, b"{}", {})


@pytest.mark.parametrize("url", [public("a.png"), moves(302, "/a.png"), moves(302, public("a.png"))])
def test_good_addresses_are_fetched_and_seen(url: str, net: Net, fetch: Callable[..., list[bytes]]) -> None:
    assert fetch(url) == [PHOTO]
    assert net.attempts == [SERVED] * len(net.server.asked)
    assert net.server.asked[-1][0] == "/a.png"


def test_without_the_guard_the_corpus_reaches_inner_addresses(net: Net, settings: Settings, tmp_path: Path) -> None:
    unguarded = settings.model_copy(update={"private_urls": "allow"})
    reached = set()
    for url in (url for forms in CORPUS.values() for url in forms):
        net.attempts.clear()
        net.lookups.clear()
        try:
            fetch_all(unguarded, [url], tmp_path)
        except InvalidRequest:
            assert SERVED not in net.attempts or url in CORPUS["redirects"] or "multi" in url or len(url) > 8000, url
        if {place for place, _ in net.attempts} - {PUBLIC}:
            reached.add(url)
    print(len(reached), [u[:80] for u in set().union(*CORPUS.values()) - reached])
    assert len(reached) > 70
    assert not reached & HARMLESS


def test_a_name_that_moves_is_refused_at_the_next_lookup(net: Net, fetch: Callable[..., list[bytes]]) -> None:
    url = f"http://rebind.test/to/302?{quote('http://rebind.test/a.png', safe='')}"
    assert problems_of(fetch, url) == [f"{url} cannot be fetched"]
    assert (net.attempts, net.lookups) == ([SERVED], ["rebind.test", "rebind.test"])


def test_what_is_refused_reads_like_what_cannot_be_reached(net: Net, fetch: Callable[..., list[bytes]]) -> None:
    refused = ["http://private.test/a", "http://multi.test/a", "http://10.0.0.5/a", moves(302, "http://private.test/a")]
    out_of_reach = ["http://down.test/a", "http://unknown.test/a", moves(302, "http://down.test/a")]
    asked = [*refused, *out_of_reach]
    assert problems_of(fetch, *asked) == [f"{url} cannot be fetched" for url in asked]
    assert set(net.attempts) == {SERVED, (DOWN, 80)}


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_no_proxy_is_taken_from_the_environment(
    name: str, net: Net, fetch: Callable[..., list[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "http://10.0.0.1:3128")
    assert fetch(public("a.png")) == [PHOTO]
    assert net.attempts == [SERVED]


@pytest.mark.parametrize("allowed", ["refuse", "allow"])
def test_loopback_is_reached_only_where_it_is_allowed(
    allowed: str, settings: Settings, photo_server: ThreadingHTTPServer, tmp_path: Path
) -> None:
    chosen = settings.model_copy(update={"private_urls": allowed})
    asked = [f"{address(photo_server)}/rex.png", f"{address(photo_server)}/move"]
    if allowed == "allow":
        assert [one.path.read_bytes() for one in fetch_all(chosen, asked, tmp_path)] == [PHOTO, PHOTO]
        assert sorted(photo_server.asked) == ["/move", "/moved.png", "/rex.png"]  # type: ignore[attr-defined]
    else:
        assert problems_of(lambda *all_: fetch_all(chosen, list(all_), tmp_path), *asked)
        assert photo_server.asked == []  # type: ignore[attr-defined]


# Redirects


def test_three_redirects_are_followed(net: Net, fetch: Callable[..., list[bytes]]) -> None:
    assert fetch(public("hops/3")) == [PHOTO]
    assert [path for path, _ in net.server.asked] == ["/hops/3", "/hops/2", "/hops/1", "/hops/0"]


@pytest.mark.parametrize("path", ["hops/4", "hops/21", "loop"])
def test_more_redirects_are_not_followed(path: str, net: Net, fetch: Callable[..., list[bytes]]) -> None:
    assert problems_of(fetch, public(path)) == [f"{public(path)} redirects more than 3 times"]
    assert len(net.server.asked) == 4


def test_a_cookie_is_not_sent_on(net: Net, fetch: Callable[..., list[bytes]]) -> None:
    assert fetch(public("cookie")) == [PHOTO]
    assert [path for path, _ in net.server.asked] == ["/cookie", "/cookie-taken.png"]
    assert not any("Cookie" in headers for _, headers in net.server.asked)


def test_the_body_of_a_redirect_is_not_read(fetch: Callable[..., list[bytes]]) -> None:
    assert fetch(public("endless-move")) == [PHOTO]


# Answers


@pytest.mark.parametrize(
    ("path", "reason"),
    [("missing", "answers 404"), ("nowhere", "answers 302"), ("reset/counted", "cannot be fetched"),
     ("reset/uncounted", "cannot be fetched")],
)  # fmt: skip
def test_what_is_no_answer_is_refused(path: str, reason: str, fetch: Callable[..., list[bytes]]) -> None:
    assert problems_of(fetch, public(path)) == [f"{public(path)} {reason}"]


def test_five_gigabytes_are_refused_before_they_come(
    fetch: Callable[..., list[bytes]], settings: Settings, tmp_path: Path
) -> None:
    began = time.monotonic()
    reason = f"is larger than {settings.max_image_mb} MB"
    assert problems_of(fetch, public("5-gb")) == [f"{public('5-gb')} {reason}"]
    assert time.monotonic() - began < 2
    assert list((tmp_path / "fetched").iterdir()) == []


def test_a_flood_ends_at_the_limit(net: Net, settings: Settings, tmp_path: Path) -> None:
    small = settings.model_copy(update={"max_image_mb": 1})
    assert problems_of(lambda url: fetch_all(small, [url], tmp_path), public("flood")) == [
        f"{public('flood')} is larger than 1 MB"
    ]
    assert sum(file.stat().st_size for file in tmp_path.glob("url-*")) <= 2**20


def test_a_zip_of_photos_may_be_larger_than_a_photo(net: Net, settings: Settings, decoder: Decoder) -> None:
    small = settings.model_copy(update={"max_image_mb": 1})
    with intake(small, decoder, [], [public("zip/photos.zip?size=large"), public("3.png")]) as found:
        assert sorted(one.name for one in found.photos) == ["1.bmp", "2.bmp", "3.png"]


@pytest.mark.parametrize("zips", [True, False])
def test_zips_have_a_limit_together(net: Net, settings: Settings, tmp_path: Path, zips: bool) -> None:
    """Two of 1.5 MB where 2 MB are allowed; for an input picture of a prompt, none may be larger than a photo."""
    small = settings.model_copy(update={"max_image_mb": 1, "max_body_mb": 2})
    with pytest.raises(InvalidRequest) as refused:
        fetch_all(small, [public("zip/a.zip"), public("zip/b.zip")], tmp_path, zips=zips)
    told = refused.value.problems["image_urls"]
    assert len(told) == (1 if zips else 2)
    assert all(one.endswith("is larger than 1 MB") for one in told)


def test_packed_answers_are_kept_packed(net: Net, fetch: Callable[..., list[bytes]]) -> None:
    assert fetch(public("bomb")) == [BOMB]
    assert net.server.asked[0][1]["Accept-Encoding"] == "identity"


@pytest.mark.parametrize(("path", "reason"), [("empty", "is empty"), ("page", "is not"), ("bomb", "is not")])
def test_what_is_no_photo_is_refused_by_the_intake(
    path: str, reason: str, net: Net, settings: Settings, decoder: Decoder
) -> None:
    with pytest.raises(InvalidRequest) as refused, intake(settings, decoder, [], [public(path)]):
        pass
    (problem,) = refused.value.problems["images"]
    assert problem.startswith(f"{path} {reason}")
    assert list((settings.outputs / "incoming").iterdir()) == []


def test_a_photo_is_recognized_under_any_name(net: Net, settings: Settings, decoder: Decoder) -> None:
    with intake(settings, decoder, [], [public("mislabelled")]) as found:
        assert [(one.name, one.format) for one in found.photos] == [("mislabelled", "PNG")]


# Time


@pytest.fixture
def half_a_second(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The time limit, and that it holds: well below what a timeout of each step would allow."""
    monkeypatch.setattr(urls, "TOTAL_SECONDS", 0.5)
    began = time.monotonic()
    yield
    assert 0.5 <= time.monotonic() - began < 2


@pytest.mark.parametrize(
    "path", ["body-by-bytes/counted", "body-by-bytes/uncounted", "head-by-bytes", "nothing"]
)  # fmt: skip
@pytest.mark.usefixtures("half_a_second")
def test_the_time_limit_holds_for_a_slow_server(path: str, fetch: Callable[..., list[bytes]]) -> None:
    asked = [public(path), public("a.png")]
    assert problems_of(fetch, *asked) == [f"{asked[0]} did not arrive within 0.5 s"]
    assert all_end()


@pytest.mark.usefixtures("half_a_second")
def test_the_time_limit_is_one_for_all(fetch: Callable[..., list[bytes]]) -> None:
    asked = [public(f"nothing/{number}") for number in range(2 * urls.PARALLEL)]
    assert problems_of(fetch, *asked) == [f"{url} did not arrive within 0.5 s" for url in asked]


@pytest.mark.usefixtures("half_a_second")
def test_a_silent_name_server_blocks_no_request(net: Net, fetch: Callable[..., list[bytes]], tmp_path: Path) -> None:
    asked = [f"http://{STALLED}/a.png", public("a.png")]
    assert problems_of(fetch, *asked) == [f"{asked[0]} did not arrive within 0.5 s"]
    assert running()
    net.speak.set()
    assert all_end()
    assert [path.name for path in (tmp_path / "fetched").iterdir()] == ["url-001"]


def running() -> list[threading.Thread]:
    """The threads that fetch."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPoolExecutor")]


def all_end() -> bool:
    """Whether they end by themselves, which takes a thread that was woken a moment."""
    for thread in running():
        thread.join(1)
    return not running()


def test_photos_are_fetched_side_by_side(net: Net, fetch: Callable[..., list[bytes]]) -> None:
    assert fetch(public("together/1"), public("together/2")) == [PHOTO, PHOTO]


# What the caller gets


def test_the_caller_hears_of_every_photo(net: Net, settings: Settings, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    found = fetch_all(settings, [public(f"{n}.png") for n in range(9)], tmp_path, lambda *words: told.append(words))
    assert told == [("photos are fetched", number, 9) for number in range(1, 10)]
    assert [one.name for one in found] == [f"{n}.png" for n in range(9)]


def test_the_caller_hears_of_bad_photos_too(net: Net, settings: Settings, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    with pytest.raises(InvalidRequest):
        fetch_all(settings, [public("a.png"), "x"], tmp_path, lambda *words: told.append(words))
    assert told == [("photos are fetched", 1, 2), ("photos are fetched", 2, 2)]


def test_a_caller_who_stops_listening_waits_for_nothing(net: Net, settings: Settings, tmp_path: Path) -> None:
    def stop(*_: object) -> None:
        raise ConnectionAbortedError

    began = time.monotonic()
    with pytest.raises(ConnectionAbortedError):
        fetch_all(settings, [public("a.png"), public("nothing")], tmp_path, stop)
    assert time.monotonic() - began < 2
    assert all_end()


def test_one_bad_address_leaves_nothing_and_is_named(net: Net, services: Services) -> None:
    bad = "http://private.test/good-2.png"
    asked = [public("good-1.png"), bad, public("good-3.png")]
    with pytest.raises(InvalidRequest) as refused:
        tunes.create_tune(services, {"title": "Rex", "name": "dog", "branch": "fast", "image_urls": asked}, [])
    assert refused.value.problems == {"image_urls": [f"{bad} cannot be fetched"]}
    # The request of an earlier test that was given up may reach the server as late as now.
    assert sorted(path for path, _ in net.server.asked if "good" in path) == ["/good-1.png", "/good-3.png"]
    assert left_behind(services) == []
