"""How addresses of the API are read: suffixes, slashes and methods; and the answers where there is no route."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.responses import JSONResponse
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

FILES = "/files/"


class AsRails:
    """`/tunes/1.json` and `/tunes/1/` are `/tunes/1`, PUT is PATCH, and HEAD is GET without the body, as in Rails.

    prefixes: of the paths of the API. Paths of files stay unchanged.
    """

    def __init__(self, app: ASGIApp, prefixes: tuple[str, ...]) -> None:
        self._app = app
        self._prefixes = prefixes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        root, method = scope.get("root_path", ""), scope.get("method")  # root: the prefix behind a reverse proxy
        path = scope.get("path", "").removeprefix(root)
        if path.startswith(self._prefixes):
            path = path.rstrip("/").removesuffix(".json") or "/"
            scope = {**scope, "path": root + path, "method": "PATCH" if method == "PUT" else method}
        if method == "HEAD" and path.startswith((FILES, *self._prefixes)):
            scope, send = {**scope, "method": "GET"}, _without_body(send)
        await self._app(scope, receive, send)


def _without_body(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.body":
            message = {**message, "body": b""}
        await send(message)

    return sending


class Unrouted:
    """Answers where no route of the API matches: 405 with `Allow` if another method has one, else 404."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        allowed: set[str] = set()
        for route in scope["app"].routes:
            if isinstance(route, Route) and route.matches(scope)[0] == Match.PARTIAL:
                allowed |= route.methods or set()
        path, method, known = scope["path"], scope["method"], ", ".join(sorted(allowed))
        if allowed:
            content = {"error": f"{path} has no {method}; it has {known}"}
            answer = JSONResponse(content, 405, {"Allow": known})
        else:
            answer = JSONResponse({"error": f"there is no {path[:200]} here; /docs lists all calls"}, 404)
        await answer(scope, receive, send)


def add_unrouted(app: FastAPI, prefixes: tuple[str, ...]) -> None:
    """Answer for all other paths under the prefixes. Call it after all routes; the page is mounted behind it."""
    for prefix in prefixes:
        app.router.routes.append(Route(f"{prefix}{{rest:path}}", Unrouted(), include_in_schema=False))


def answer_as_rest(app: FastAPI) -> None:
    """Let an app that is mounted at `/` answer unrouted paths and wrong methods as REST does."""
    app.add_exception_handler(404, lambda _request, _problem: JSONResponse({"error": "not found"}, 404))
    app.add_exception_handler(405, lambda _request, _problem: JSONResponse({"error": "not with this method"}, 405))
