"""The outermost ASGI layer: checks key, origin and size of each request, and answers while the app loads."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import math
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from trainer.settings import LOOPBACK, Settings, digest_of
from trainer.web.prefix import as_reached, strip_prefix
from trainer.web.templating import render

if TYPE_CHECKING:
    from fastapi import FastAPI

    from trainer.contract.disk import DiskProblem

Scope = MutableMapping[str, Any]
Message = Scope
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
log = logging.getLogger("tunebooth")
COOKIE = "tunebooth_key"
WRONG_KEYS, WRONG_SECONDS = 10, 60.0  # after so many wrong keys in such a time, an address must wait
MOST_ADDRESSES = 10_000
MOST_HEADER_BYTES, MOST_URL_BYTES = 2**16, 2**13  # the server itself does not limit all of these
OPEN_PATHS = "/files/"  # links to files are signed, so they need no key


class TooLarge(Exception):
    """The body is larger than the limit."""


class Body:
    """A request's body that raises TooLarge after `limit` bytes; Content-Length is ignored."""

    def __init__(self, receive: Receive, limit: int) -> None:
        self._receive = receive
        self._left = limit

    @property
    def too_large(self) -> bool:
        return self._left < 0

    async def receive(self) -> Message:
        message = await self._receive()
        self._left -= len(message.get("body", b""))
        if self.too_large:
            raise TooLarge
        return message


class RateLimiter:
    """Counts the wrong keys of each address, so that a client cannot try many.

    An address that once sent the right key is never limited: behind a proxy, all users share it.
    """

    def __init__(self) -> None:
        self._wrong: dict[str, list[float]] = {}  # address -> times of its wrong keys, in seconds
        self._known: set[str] = set()

    def note(self, address: str, right: bool) -> None:
        if right:
            self._wrong.pop(address, None)
            if len(self._known) < MOST_ADDRESSES:
                self._known.add(address)
        elif address not in self._known:
            if len(self._wrong) >= MOST_ADDRESSES:
                self._wrong.pop(next(iter(self._wrong)))
            self._wrong[address] = [*self._wrong.get(address, []), time.monotonic()][-WRONG_KEYS:]

    def retry_after(self, address: str) -> int:
        """Seconds until an address may send a key again."""
        wrong = self._wrong.get(address, [])
        left = wrong[0] + WRONG_SECONDS - time.monotonic() if len(wrong) == WRONG_KEYS else 0.0
        return max(0, math.ceil(left))


class Guard:
    """Answers `/health` and a waiting page at once; passes other requests on when the app is loaded."""

    def __init__(
        self,
        settings: Settings,
        load: Callable[[], FastAPI],
        begin: Callable[[], None],
        unload: Callable[[], None],
        missing: Callable[[], DiskProblem | None] = lambda: None,
        hold: Callable[[], str] = str,
    ) -> None:
        """load: builds the inner FastAPI app; begin: called when that answers; unload: called at the end.

        missing: the problem if a file of the outputs folder is missing; then all requests are refused. hold: why the
        queue waits, or "".
        """
        self._settings = settings
        self._missing, self._hold = missing, hold
        self._load = load
        self._begin = begin
        self._unload = unload
        self._inner: FastAPI | None = None
        self._ready = asyncio.Event()
        self._end = asyncio.Event()
        self.failed: BaseException | None = None
        self._key, made_now = settings.required_key()
        self._rate_limiter = RateLimiter()
        if made_now:
            print(f"Tunebooth: the API key, shown this once: {made_now}", file=sys.stderr, flush=True)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        # Web sockets are not served: the app does not use them.

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        inner = asyncio.create_task(self._run_inner())
        await send({"type": "lifespan.startup.complete"})
        await receive()
        self._end.set()
        await inner
        if self._inner is not None:
            await asyncio.to_thread(self._unload)
        await send({"type": "lifespan.shutdown.complete"})

    async def _run_inner(self) -> None:
        """Load the app in a thread, and keep its lifespan open until the end."""
        try:
            app = await asyncio.to_thread(self._load)
        except BaseException as error:  # the edge of a thread: waiting requests get the error
            log.exception("Tunebooth cannot start")
            self.failed = error
            self._ready.set()
            return
        async with app.router.lifespan_context(app):
            self._inner = app
            self._ready.set()
            try:
                await asyncio.to_thread(self._begin)
            except Exception as error:  # the edge of a thread: the app still answers
                log.exception("Tunebooth cannot work; it only answers")
                self.failed = error
            await self._end.wait()

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        path, method = strip_prefix(self._settings, scope["path"]), scope["method"]
        address = (scope.get("client") or ("", 0))[0]
        if sum(len(name) + len(value) for name, value in scope["headers"]) > MOST_HEADER_BYTES:
            await _json(send, 431, {"error": f"the headers are larger than {MOST_HEADER_BYTES} bytes"})
        elif len(scope.get("raw_path") or b"") + len(scope["query_string"]) > MOST_URL_BYTES:
            await _json(send, 414, {"error": f"the address is longer than {MOST_URL_BYTES} bytes"})
        elif path == "/health":
            await _json(send, 200, self._health(self._key is None or self._has_key(address, headers)))
        elif refusal := self._origin_refusal(headers):
            await _json(send, 403, {"error": refusal})
        elif path == "/login" and method == "POST":
            await self._login(address, receive, send)
        elif not (self._key is None or path.startswith(OPEN_PATHS) or self._has_key(address, headers)):
            if seconds := self._rate_limiter.retry_after(address):
                await _too_many(send, seconds)
            elif method == "GET" and "text/html" in headers.get("accept", ""):
                await _html(send, 401, self._login_page())
            else:
                await _json(send, 401, {"error": "a key is needed: send Authorization: Bearer KEY"})
        elif problem := self._missing():
            await _missing(send, problem, headers)
        elif self._inner is None and path == "/" and not self.failed:
            await _html(send, 200, render("waiting.html", prefix=self._settings.prefix))
        else:
            await self._pass_on(scope, headers, receive, send)

    def _health(self, trusted: bool) -> dict[str, object]:
        """The answer of `/health`. trusted: whether the caller has the key; the answer for others has no reason."""
        problem, hold = self._missing(), self._hold()
        failed = self.failed or problem
        health: dict[str, object] = {
            "status": "failed" if failed else "on hold" if hold else "ok",
            "ready": self._inner is not None,
        }
        if trusted and (problem or hold):
            health["reason"] = problem.as_refusal() if problem else hold
        if trusted and (warning := self._settings.models_problem()):
            health["warnings"] = [warning]
        return health

    async def _pass_on(self, scope: Scope, headers: dict[str, str], receive: Receive, send: Send) -> None:
        """Pass a request on to the app when that is loaded, with a limit on the body."""
        limit = self._settings.max_body_mb * 2**20
        too_large = {"error": f"the request is larger than {self._settings.max_body_mb} MB"}
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > limit:
            await _json(send, 413, too_large)
            return
        await self._ready.wait()
        if self._inner is None:
            await _json(send, 503, {"error": "Tunebooth could not start; its log says why"})
            return
        body, started = Body(receive, limit), False

        async def watched_send(message: Message) -> None:
            nonlocal started
            if not body.too_large or started:  # the app turns TooLarge into a 500, which is not sent
                started = True
                await send(message)

        try:
            await self._inner(as_reached(self._settings, scope, headers), body.receive, watched_send)
        except TooLarge:
            if started:
                raise
        if body.too_large and not started:
            await _json(send, 413, too_large)

    def _origin_refusal(self, headers: dict[str, str]) -> str | None:
        """The reason to refuse a request: another site's page sent it, or its Host is not ours (DNS rebinding)."""
        host = headers.get("host", "")
        public = urlsplit(self._settings.base_url)
        if self._settings.on_loopback and _hostname(host) not in (*LOOPBACK, public.hostname):
            return f"the Host header names {host!r}; this app is reached as {self._settings.base_url}"
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc not in (host, public.netloc):
            return f"requests from pages of {origin!r} are refused"
        return None

    def _has_key(self, address: str, headers: dict[str, str]) -> bool:
        scheme, _, token = headers.get("authorization", "").partition(" ")
        # http.cookies fails on cookies of other apps on this host; cookies are not separated by port.
        cookies = dict(part.strip().partition("=")[::2] for part in headers.get("cookie", "").split(";"))
        sent = token.strip() if scheme.lower() == "bearer" else unquote(cookies.get(COOKIE, ""))
        return bool(sent) and self._right_key(address, sent)

    def _right_key(self, address: str, sent: str) -> bool:
        """Whether it is the key, and the address does not have to wait."""
        if self._rate_limiter.retry_after(address):
            return False
        right = self._is_key(sent)
        self._rate_limiter.note(address, right)
        return right

    def _is_key(self, sent: str) -> bool:
        return self._key is None or hmac.compare_digest(digest_of(sent), self._key)

    def _login_page(self, problem: str | None = None) -> str:
        return render("login.html", problem=problem, prefix=self._settings.prefix)

    async def _login(self, address: str, receive: Receive, send: Send) -> None:
        """Check the key from the sign-in page and set a cookie with it."""
        body, more = b"", True
        while more and len(body) < 4096:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        key = parse_qs(body.decode("latin-1")).get("key", [""])[0]
        if not self._right_key(address, key):
            if seconds := self._rate_limiter.retry_after(address):
                await _too_many(send, seconds)
                return
            await _html(send, 401, self._login_page("That is not the key."))
            return
        # A Space shows the app in a frame of another site, where browsers accept only a cookie marked for that.
        framed = "SameSite=None; Secure; Partitioned" if self._settings.base_url.startswith("https") else "SameSite=Lax"
        cookie = f"{COOKIE}={quote(key)}; HttpOnly; Path=/; Max-Age=2592000; {framed}"
        await send(
            {
                "type": "http.response.start",
                "status": 303,
                "headers": [(b"location", f"{self._settings.prefix}/".encode()), (b"set-cookie", cookie.encode())],
            }
        )
        await send({"type": "http.response.body", "body": b""})


def _hostname(host: str) -> str | None:
    return urlsplit(f"//{host}").hostname


async def _json(send: Send, status: int, content: Mapping[str, object], *headers: tuple[bytes, bytes]) -> None:
    await _answer(send, status, b"application/json", json.dumps(content).encode(), *headers)


async def _too_many(send: Send, seconds: int) -> None:
    content = {"error": f"{WRONG_KEYS} wrong keys within a minute; wait {seconds} s"}
    await _json(send, 429, content, (b"retry-after", str(seconds).encode()))


async def _missing(send: Send, problem: DiskProblem, headers: Mapping[str, str]) -> None:
    """Answer 503, as HTML for the page."""
    if "text/html" in headers.get("accept", ""):
        await _html(send, 503, render("problem.html", problem=problem.as_refusal()))
    else:
        await _json(send, 503, {"error": problem.as_refusal()})


async def _html(send: Send, status: int, content: str) -> None:
    await _answer(send, status, b"text/html; charset=utf-8", content.encode())


async def _answer(send: Send, status: int, kind: bytes, body: bytes, *more: tuple[bytes, bytes]) -> None:
    headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode()), (b"cache-control", b"no-store")]
    await send({"type": "http.response.start", "status": status, "headers": [*headers, *more]})
    await send({"type": "http.response.body", "body": body})
