"""The outermost ASGI layer: who may come in, how much they may send, and what they see until the page is up."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from trainer.settings import LOOPBACK, Settings

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

log = logging.getLogger("tunebooth")
COOKIE = "tunebooth_key"
OPEN_PATHS = "/files/"  # their links carry a signature


class TooLarge(Exception):
    """The body is longer than it may be."""


class Body:
    """A request's body that ends with TooLarge after `limit` bytes, whatever its Content-Length said."""

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


class Guard:
    """Answers `/health` and a waiting page at once; lets everything else through when the app has been loaded."""

    def __init__(
        self, settings: Settings, load: Callable[[], Any], begin: Callable[[], None], unload: Callable[[], None]
    ) -> None:
        """load: builds the inner app (a FastAPI one); begin: called once it is up; unload: ends what they started."""
        self._settings = settings
        self._load = load
        self._begin = begin
        self._unload = unload
        self._inner: Any = None
        self._ready = asyncio.Event()
        self._end = asyncio.Event()
        self.failed: BaseException | None = None
        key, made_now = settings.required_key()
        self._key = hashlib.sha256(key.encode()).digest() if key else None
        if made_now:
            log.warning("API key, shown this once: %s", key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        # Web sockets are not served: nothing here speaks them.

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
        """Load the app while `/health` answers already, and keep its own lifespan open until the end."""
        try:
            app = await asyncio.to_thread(self._load)
        except BaseException as error:
            log.exception("Tunebooth cannot start")
            self.failed = error
            self._ready.set()
            return
        async with app.router.lifespan_context(app):
            self._inner = app
            self._ready.set()
            try:
                await asyncio.to_thread(self._begin)
            except Exception as error:
                log.exception("Tunebooth cannot work; it only answers")
                self.failed = error
            await self._end.wait()

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        path, method = scope["path"], scope["method"]
        if path == "/health":
            health = {"status": "failed" if self.failed else "ok", "ready": self._inner is not None}
            await _json(send, 200, health)
        elif refusal := self._stranger(headers):
            await _json(send, 403, {"error": refusal})
        elif path == "/login" and method == "POST":
            await self._login(receive, send)
        elif not (self._key is None or path.startswith(OPEN_PATHS) or self._has_key(headers)):
            if method == "GET" and "text/html" in headers.get("accept", ""):
                await _html(send, 401, LOGIN_PAGE)
            else:
                await _json(send, 401, {"error": "a key is needed: send Authorization: Bearer KEY"})
        elif self._inner is None and path == "/" and not self.failed:
            await _html(send, 200, WAITING_PAGE)
        else:
            await self._pass_on(scope, headers, receive, send)

    async def _pass_on(self, scope: Scope, headers: dict[str, str], receive: Receive, send: Send) -> None:
        """Hand a request to the app, once it is there, with a limit on its body."""
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
            if not body.too_large or started:  # what the app makes of TooLarge (500) is not the answer
                started = True
                await send(message)

        try:
            await self._inner(scope, body.receive, watched_send)
        except TooLarge:
            if started:
                raise
        if body.too_large and not started:
            await _json(send, 413, too_large)

    def _stranger(self, headers: dict[str, str]) -> str | None:
        """Why a request comes from where it should not: another site's page, or a name that was pointed here."""
        host = headers.get("host", "")
        public = urlsplit(self._settings.base_url)
        if self._settings.on_loopback and _hostname(host) not in (*LOOPBACK, public.hostname):
            return f"the Host header names {host!r}; this app is reached as {self._settings.base_url}"
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc not in (host, public.netloc):
            return f"requests from pages of {origin!r} are refused"
        return None

    def _has_key(self, headers: dict[str, str]) -> bool:
        scheme, _, token = headers.get("authorization", "").partition(" ")
        # By hand: http.cookies stumbles over what other apps on this host have set, and cookies know no ports.
        cookies = dict(part.strip().partition("=")[::2] for part in headers.get("cookie", "").split(";"))
        sent = token.strip() if scheme.lower() == "bearer" else unquote(cookies.get(COOKIE, ""))
        return self._right_key(sent)

    def _right_key(self, sent: str) -> bool:
        return self._key is None or hmac.compare_digest(hashlib.sha256(sent.encode()).digest(), self._key)

    async def _login(self, receive: Receive, send: Send) -> None:
        """Take the key from the sign-in page and give the browser a cookie for it."""
        body, more = b"", True
        while more and len(body) < 4096:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        key = parse_qs(body.decode("latin-1")).get("key", [""])[0]
        if not self._right_key(key):
            problem = "<p class=problem>That is not the key.</p>"
            await _html(send, 401, LOGIN_PAGE.replace("<!--problem-->", problem))
            return
        # A Space shows the app in a frame of another site, which only takes a cookie marked for that.
        framed = "SameSite=None; Secure; Partitioned" if self._settings.base_url.startswith("https") else "SameSite=Lax"
        cookie = f"{COOKIE}={quote(key)}; HttpOnly; Path=/; Max-Age=2592000; {framed}"
        await send(
            {
                "type": "http.response.start",
                "status": 303,
                "headers": [(b"location", b"/"), (b"set-cookie", cookie.encode())],
            }
        )
        await send({"type": "http.response.body", "body": b""})


def _hostname(host: str) -> str | None:
    return urlsplit(f"//{host}").hostname


async def _json(send: Send, status: int, content: dict[str, Any]) -> None:
    await _answer(send, status, b"application/json", json.dumps(content).encode())


async def _html(send: Send, status: int, content: str) -> None:
    await _answer(send, status, b"text/html; charset=utf-8", content.encode())


async def _answer(send: Send, status: int, kind: bytes, body: bytes) -> None:
    headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode()), (b"cache-control", b"no-store")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


STYLE = """<meta charset=utf-8><meta name=viewport content="width=device-width"><title>Tunebooth</title><style>
body{font:16px system-ui,sans-serif;display:grid;place-content:center;height:100vh;margin:0;text-align:center;
background:#fafaf9;color:#292524}@media(prefers-color-scheme:dark){body{background:#18181b;color:#e7e5e4}}
h1{font-weight:650;margin:0 0 .5em}.bar{width:14em;height:4px;border-radius:2px;background:#8884;overflow:hidden}
.bar i{display:block;width:40%;height:100%;background:#e8590c;animation:slide 1.2s infinite alternate ease-in-out}
@keyframes slide{to{transform:translateX(150%)}}
input,button{font:inherit;padding:.5em .8em;border-radius:6px;border:1px solid #8886}
button{background:#e8590c;color:#fff;border:0}.problem{color:#e03131}</style>"""
WAITING_PAGE = f"""<!doctype html>{STYLE}<main><h1>Tunebooth</h1><p>Getting ready&hellip;</p>
<div class=bar><i></i></div></main>
<script>(async function wait(){{try{{const h=await(await fetch('/health')).json();
if(h.ready||h.status!='ok')return location.reload()}}catch(e){{}}setTimeout(wait,300)}})()</script>"""
LOGIN_PAGE = f"""<!doctype html>{STYLE}<main><h1>Tunebooth</h1><!--problem--><form method=post action=/login>
<p>The key is in the app's log of its first start, or in TUNEBOOTH_KEY.</p>
<input type=password name=key placeholder=Key autofocus> <button>Open</button></form></main>"""
