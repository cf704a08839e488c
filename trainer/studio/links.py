"""Signed links to files in the outputs folder, for GET without a key."""

from __future__ import annotations

import hashlib
import hmac
import time
from pathlib import Path
from urllib.parse import quote, urlencode

from trainer.settings import Settings

MODEL_LINK_SECONDS = 24 * 3600
BASES = "bases/"  # the beginning of the link paths of prompts on a base


def make_link(settings: Settings, path: str, lifetime_s: int | None = None) -> str:
    """A link to a file by its `link_path`; with a lifetime it expires, at least so many seconds from now.

    The end is rounded up to the hour, so that repeated answers have the same links.
    """
    expires = 0 if lifetime_s is None else (int(time.time()) + lifetime_s) // 3600 * 3600 + 3600
    query = urlencode({"expires": expires, "signature": _sign(settings, path, expires)})
    return f"{settings.base_url}/files/{quote(path)}?{query}"


def open_link(settings: Settings, path: str, expires: int, signature: str) -> Path | None:
    """The file of a link; None if the signature is wrong, the link has expired or the file is missing."""
    if not hmac.compare_digest(_sign(settings, path, expires).encode(), signature.encode()):
        return None
    if expires and expires < time.time():
        return None
    root = (settings.outputs / ("bases" if path.startswith(BASES) else "tunes")).resolve()
    try:
        file = (root / path.removeprefix(BASES)).resolve()
        return file if file.is_relative_to(root) and file.is_file() else None
    except (OSError, RuntimeError):  # a link that leads to itself, or a folder without permission
        return None


def link_path(settings: Settings, file: Path) -> str:
    """The path of a file in a link: relative to `outputs/tunes`, or `bases/...`."""
    return file.relative_to(settings.outputs).as_posix().removeprefix("tunes/")


def _sign(settings: Settings, path: str, expires: int) -> str:
    return hmac.new(settings.link_secret, f"{expires}/{path}".encode(), hashlib.sha256).hexdigest()[:40]
