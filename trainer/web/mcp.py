"""The Gradio endpoints as MCP tools, at `/mcp`, for language models: answers are JSON, photos are addresses.

Gradio's own MCP server answers with the `str` of a dict.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, get_type_hints

from fastapi import FastAPI
from mcp.server.fastmcp import FastMCP
from mcp.server.transport_security import TransportSecuritySettings

Endpoint = Callable[..., Awaitable[object]]
log = logging.getLogger(__name__)
# Parameters that tools do not have: the caller cannot upload files, and its paths would be read on this machine.
FILES = ("images", "input_image", "mask_image")


def mount(app: FastAPI, endpoints: list[Endpoint], text: type[Exception]) -> None:
    """Serve the endpoints as tools. text: the error whose message the caller gets; others are masked."""
    server = FastMCP(
        "Tunebooth",
        stateless_http=True,
        json_response=True,
        streamable_http_path="/mcp",
        transport_security=TransportSecuritySettings(enable_dns_rebinding_protection=False),  # the guard does that
    )
    for endpoint in endpoints:
        server.add_tool(tool(endpoint, text))
    app.router.routes.extend(server.streamable_http_app().routes)  # not mounted: a mount would answer only /mcp/
    outer = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(running: FastAPI) -> AsyncIterator[Any]:
        async with outer(running) as state, server.session_manager.run():
            yield state

    app.router.lifespan_context = lifespan


def tool(endpoint: Endpoint, text: type[Exception]) -> Endpoint:
    """An endpoint without its file parameters."""

    @functools.wraps(endpoint)
    async def called(**named: object) -> object:
        try:
            return await endpoint(**named)
        except text:
            raise
        except Exception:  # the edge to a client: it does not see unexpected errors, the log does
            log.exception("the tool %s failed", endpoint.__name__)
            raise RuntimeError("internal error") from None

    hints = get_type_hints(endpoint)
    signature = inspect.signature(endpoint)
    taken = [one.replace(annotation=hints[name]) for name, one in signature.parameters.items() if name not in FILES]
    called.__signature__ = signature.replace(parameters=taken, return_annotation=hints["return"])  # type: ignore[attr-defined]
    return called
