"""The one HTTP client for addresses that a user gives: what may be reached, how much, how long."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_network
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

import httpx
from ssrfguard import DEFAULT_DENIED, AddressTable, Block, Policy, Reach, SSRFGuardError
from ssrfguard import httpx as guarded

from trainer.schema import InvalidRequest, Upload
from trainer.settings import Settings

TOTAL_SECONDS = 20.0  # of all photos of a request together: the caller waits for the answer
MAX_REDIRECTS = 3
PARALLEL = 8

# Two addresses that ssrfguard's table lets through: Azure's metadata service, and IPv4 in an old IPv6 form.
DENIED = AddressTable(
    (
        *DEFAULT_DENIED.blocks,
        Block(ip_network("168.63.129.16/32"), "Azure platform services", "none", Reach.DENIED),
        Block(ip_network("::ffff:0:0:0/96"), "IPv4-translated", "RFC2765", Reach.DENIED),
    )
)


def fetch_all(settings: Settings, urls: list[str], folder: Path) -> list[Upload]:
    """Fetch photos into `folder`, in parallel. Raises InvalidRequest naming every URL that cannot be had."""
    deadline = time.monotonic() + TOTAL_SECONDS
    problems: list[str] = []

    def fetch(number: int, url: str) -> Upload | None:
        try:
            return _fetch(settings, url, folder / f"url-{number:03d}", deadline)
        except (SSRFGuardError, httpx.HTTPError, httpx.InvalidURL, ValueError, OSError) as error:
            # One text for what is refused and what cannot be reached, so that this is no port scanner.
            reason = str(error) if isinstance(error, ValueError) else "cannot be fetched"
            problems.append(f"{url[:200]} {reason}")
            return None

    with ThreadPoolExecutor(PARALLEL) as pool:
        uploads = list(pool.map(fetch, range(len(urls)), urls))
    if problems:
        raise InvalidRequest({"image_urls": problems})
    return [upload for upload in uploads if upload]


def _client(settings: Settings) -> httpx.Client:
    options = {"timeout": 10.0, "follow_redirects": True, "headers": {"Accept-Encoding": "identity"}}
    if settings.private_urls == "allow":
        return httpx.Client(trust_env=False, max_redirects=MAX_REDIRECTS, **options)  # type: ignore[arg-type]
    client: httpx.Client = guarded.Client(policy=Policy(denied_networks=DENIED, max_redirects=MAX_REDIRECTS), **options)
    return client


def _fetch(settings: Settings, url: str, target: Path, deadline: float) -> Upload:
    limit = settings.max_image_mb * 2**20
    if urlsplit(url).scheme not in ("http", "https"):
        raise ValueError("must begin with http:// or https://")
    with _client(settings) as client, client.stream("GET", url) as response:
        if response.status_code != httpx.codes.OK:
            raise ValueError(f"answers {response.status_code}")
        size = 0
        with target.open("wb") as file:
            for chunk in response.iter_raw():
                size += len(chunk)
                if size > limit:
                    raise ValueError(f"is larger than {settings.max_image_mb} MB")
                if time.monotonic() > deadline:
                    raise ValueError(f"did not arrive within {TOTAL_SECONDS:g} s")
                file.write(chunk)
    name = PurePosixPath(unquote(urlsplit(url).path)).name
    return Upload(name or url[:80], target)
