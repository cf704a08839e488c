"""The only HTTP client for URLs from users, with limits on addresses, sizes and times."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing, suppress
from functools import cache, partial
from http.cookiejar import CookieJar, DefaultCookiePolicy
from ipaddress import ip_network
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

import httpx
from ssrfguard import DEFAULT_DENIED, AddressTable, Block, Policy, Reach, SSRFGuardError
from ssrfguard import httpx as guarded

from trainer.contract.disk import problem_of
from trainer.contract.errors import InvalidRequest
from trainer.contract.photos import ProgressCallback, Upload, no_progress
from trainer.settings import Settings

TOTAL_SECONDS = 20.0  # for all photos of a request together: the caller is waiting
STALL_SECONDS = 10.0  # without a connection, or without a byte
ANSWER_SECONDS = 15.0  # until the receiver of a POST has answered
WAKE_SECONDS = 0.5  # for a thread to notice that its connection was closed
MAX_REDIRECTS = 3
PARALLEL = 8
ZIP_HEAD = b"PK\x03\x04"
# Two kinds of address that ssrfguard's table allows: Azure's metadata service, and IPv4 in an old IPv6 form.
DENIED = AddressTable(
    (
        *DEFAULT_DENIED.blocks,
        Block(ip_network("168.63.129.16/32"), "Azure platform services", "none", Reach.DENIED),
        Block(ip_network("::ffff:0:0:0/96"), "IPv4-translated", "RFC2765", Reach.DENIED),
    )
)
PHOTOS = Policy(denied_networks=DENIED)
# Receivers use many ports; below 1024 there are mail and database servers.
PORTS = frozenset({80, 443, *range(1024, 65_536)})
LOOPBACK = (ip_network("127.0.0.0/8"), ip_network("::1/128"))


class Unreachable(Exception):
    """The receiver cannot be reached; the message says why."""


class _Unfit(Exception):
    """Why a photo is refused. The message is our own: a library's text could name an internal address."""


class _Deadline:
    """The common limits of all fetches of a request: a deadline, and the bytes of zips.

    `cut` closes connections: timeouts restart with each byte.
    """

    def __init__(self, seconds: float, zip_bytes: int = 0) -> None:
        """zip_bytes: that all zips of a request may have together."""
        self._end = time.monotonic() + seconds
        self._sockets: list[socket.socket] = []
        self.zip_bytes, self._lock = zip_bytes, threading.Lock()

    def left(self) -> float:
        return max(0.0, self._end - time.monotonic())

    def check(self) -> None:
        """Raise TimeoutError when the time is up."""
        if not self.left():
            raise TimeoutError

    def take_zip_bytes(self, count: int) -> bool:
        """Whether so many more bytes of zips may be written."""
        with self._lock:
            self.zip_bytes -= count
            return self.zip_bytes >= 0

    def trace(self, event: str, info: Mapping[str, Any]) -> None:
        """An httpcore trace: records every connection, and starts none after the deadline."""
        if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            self._sockets.append(info["return_value"].get_extra_info("socket"))
        if event.startswith("connection."):
            self.check()

    def cut(self) -> None:
        """End the time now, and wake every thread that is reading."""
        self._end = time.monotonic()
        for one in list(self._sockets):
            with suppress(OSError):  # it was closed already
                one.shutdown(socket.SHUT_RDWR)


def fetch_all(
    settings: Settings,
    urls: list[str],
    folder: Path,
    progress: ProgressCallback = no_progress,
    *,
    zips: bool = False,
) -> list[Upload]:
    """Fetch photos into `folder`, in parallel. zips: whether a zip may be larger than a photo.

    Raises InvalidRequest that names every URL that is not available.
    """
    seconds = TOTAL_SECONDS
    deadline = _Deadline(seconds, settings.max_body_mb * 2**20 if zips else 0)
    pool = ThreadPoolExecutor(PARALLEL)
    fetches = [
        pool.submit(_fetch, settings, url, folder / f"url-{number:03d}", deadline) for number, url in enumerate(urls)
    ]
    try:
        _await(fetches, deadline, progress)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        deadline.cut()
        # Nothing wakes a thread that waits for DNS; when it continues, it ends before it writes anything.
        wait([fetch for fetch in fetches if not fetch.cancelled()], WAKE_SECONDS)
    late = f"did not arrive within {seconds:g} s"
    answers = [fetch.result() if fetch.done() and not fetch.cancelled() else None for fetch in fetches]
    problems = [
        f"{url[:200]} {answer or late}"
        for url, answer in zip(urls, answers, strict=True)
        if not isinstance(answer, Upload)
    ]
    if problems:
        raise InvalidRequest({"image_urls": problems})
    return [answer for answer in answers if isinstance(answer, Upload)]


def _await(fetches: list[Future[Upload | str | None]], deadline: _Deadline, progress: ProgressCallback) -> None:
    """Wait until all have ended or the time is up, and report each that has ended."""
    done, pending = 0, set(fetches)
    while pending and deadline.left():
        ended, pending = wait(pending, deadline.left(), FIRST_COMPLETED)
        for _ in ended:
            done += 1
            progress("photos are fetched", done, len(fetches))


@cache
def _tls() -> ssl.SSLContext:
    """The trusted certificates, read once: reading them takes longer than fetching many photos does."""
    return httpx.create_ssl_context()


def _client(settings: Settings, policy: Policy) -> httpx.Client:
    """A client without cookies and without proxies from the environment.

    It does not follow redirects: it would read and unpack the whole body of each.
    """
    plain = settings.private_urls == "allow"
    make: Callable[..., httpx.Client] = httpx.Client if plain else partial(guarded.Client, policy=policy)
    return make(
        timeout=STALL_SECONDS,
        headers={"Accept-Encoding": "identity"},
        cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),
        trust_env=False,
        verify=_tls(),
    )


def post(settings: Settings, url: str, body: bytes, headers: Mapping[str, str]) -> tuple[int, str | None]:
    """POST to a URL from a user; returns the status of the answer and its `Retry-After`.

    Redirects are not followed. Raises Unreachable.
    """
    deadline = _Deadline(ANSWER_SECONDS)
    timer = threading.Timer(ANSWER_SECONDS, deadline.cut)
    timer.daemon = True
    timer.start()
    loopback = LOOPBACK if settings.on_loopback else ()
    policy = Policy(denied_networks=DENIED, allowed_networks=loopback, allowed_ports=PORTS)
    try:
        with _client(settings, policy) as client:
            traced = {"trace": deadline.trace}
            request = client.build_request("POST", url, content=body, headers=dict(headers), extensions=traced)
            with closing(client.send(request, stream=True)) as response:
                return response.status_code, response.headers.get("Retry-After")
    except (SSRFGuardError, httpx.HTTPError, httpx.InvalidURL, ValueError, OverflowError, OSError):
        # One text for refused and for unreachable addresses, as for photos.
        message = "cannot be reached" if deadline.left() else f"did not answer within {ANSWER_SECONDS:g} s"
        raise Unreachable(message) from None
    finally:
        timer.cancel()


def _fetch(settings: Settings, url: str, target: Path, deadline: _Deadline) -> Upload | str | None:
    """The photo, or why it is refused; None: the time was up."""
    try:
        if urlsplit(url).scheme not in ("http", "https"):
            return "must begin with http:// or https://"
        _download(settings, url, target, deadline)
        deadline.check()  # a closed connection can look like the end of a body
    except _Unfit as unfit:
        return str(unfit)
    except (SSRFGuardError, httpx.HTTPError, httpx.InvalidURL, ValueError, OverflowError, OSError) as error:
        if problem := problem_of(error, target.parent):
            raise problem from error
        # One text for refused and for unreachable addresses: else this would be a port scanner.
        return "cannot be fetched" if deadline.left() else None
    name = PurePosixPath(unquote(urlsplit(url).path)).name
    return Upload(name or url[:80], target)


def _download(settings: Settings, url: str, target: Path, deadline: _Deadline) -> None:
    """Write the body behind a URL; each redirect passes the same checks as the URL itself."""
    with _client(settings, PHOTOS) as client:
        seconds = min(STALL_SECONDS, deadline.left())
        request = client.build_request("GET", url, timeout=seconds, extensions={"trace": deadline.trace})
        for _ in range(MAX_REDIRECTS + 1):
            with closing(client.send(request, stream=True)) as response:
                if response.next_request is None:
                    _write(settings, response, target, deadline)
                    return
                request = response.next_request
    raise _Unfit(f"redirects more than {MAX_REDIRECTS} times")


def _write(settings: Settings, response: httpx.Response, target: Path, deadline: _Deadline) -> None:
    """Write the body as received, still compressed, until it is too large."""
    if response.status_code != httpx.codes.OK:
        raise _Unfit(f"answers {response.status_code}")
    limit = settings.max_image_mb * 2**20
    too_large = _Unfit(f"is larger than {settings.max_image_mb} MB")
    length = int(response.headers.get("Content-Length", 0))
    if length > max(limit, deadline.zip_bytes):
        raise too_large
    head, size, counted = b"", 0, 0
    with target.open("wb") as file:
        for chunk in response.iter_raw():
            deadline.check()
            head += chunk[: len(ZIP_HEAD) - len(head)]
            size += len(chunk)
            if max(size, length) > limit and len(head) == len(ZIP_HEAD):
                if head != ZIP_HEAD or not deadline.take_zip_bytes(size - counted):
                    raise too_large
                counted = size
            file.write(chunk)
