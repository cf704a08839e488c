"""The public address and its prefix (`/tb`), behind a reverse proxy."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from trainer.settings import Settings

Scope = MutableMapping[str, Any]
OF_PROXIES = ("forwarded", "via", "x-real-ip")  # headers of proxies, in addition to X-Forwarded-*


def strip_prefix(settings: Settings, path: str) -> str:
    """The path of a request without the prefix: some proxies strip it, others leave it."""
    prefix = settings.prefix
    return path.removeprefix(prefix) or "/" if f"{path}/".startswith(f"{prefix}/") else path


def as_reached(settings: Settings, scope: Scope, headers: Mapping[str, str]) -> Scope:
    """The scope of a request with the address that the browser has; Gradio makes its own addresses from it.

    Requests that come straight to the port get the prefix too: the app answers with and without it. Without a
    `public_url` the scope is unchanged.
    """
    if not settings.public_url:
        return scope
    public = urlsplit(settings.base_url)
    scope = {**scope, "root_path": settings.prefix, "path": settings.prefix + strip_prefix(settings, scope["path"])}
    sent = [(name, value) for name, value in scope["headers"] if not name.lower().startswith(b"x-forwarded-")]
    if headers.get("host") == public.netloc or any(
        name.startswith("x-forwarded-") or name in OF_PROXIES for name in headers
    ):
        scope["scheme"] = public.scheme
        sent = [(name, value) for name, value in sent if name.lower() != b"host"]
        sent.append((b"host", public.netloc.encode()))
    scope["headers"] = sent
    return scope
