"""Which request an equal one has made already: by its `Idempotency-Key`, or by its title and a digest of it all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, overload

from trainer.contract.errors import InvalidRequest
from trainer.contract.fields import Request
from trainer.contract.photos import Upload
from trainer.contract.prompts import PICTURES
from trainer.contract.rows import PromptRow, TuneRow
from trainer.contract.tunes import TuneRequest
from trainer.studio.rows import Services, place_of

UNANSWERED = ("failed", "canceled", "expired")  # a row with such a status answers for no new request
TITLES_READ = 20  # of a shop that gives all its tunes one title, so many of the newest are enough


@dataclass(frozen=True)
class IdempotencyKey:
    """The header `Idempotency-Key` of a request, and a digest of what it asked for."""

    key: str
    digest: str


def idempotency_columns(key: IdempotencyKey | None) -> dict[str, str]:
    """The columns that hold an idempotency key."""
    return {"request_key": key.key, "request_digest": key.digest} if key else {}


@overload
def find_by_idempotency_key(
    services: Services, table: Literal["tunes"], key: IdempotencyKey | None
) -> TuneRow | None: ...
@overload
def find_by_idempotency_key(
    services: Services, table: Literal["prompts"], key: IdempotencyKey | None
) -> PromptRow | None: ...
def find_by_idempotency_key(
    services: Services, table: Literal["tunes", "prompts"], key: IdempotencyKey | None
) -> TuneRow | PromptRow | None:
    """What an equal request of the same key has made. Raises InvalidRequest where that was another request."""
    found = services.store.find(table, request_key=key.key, limit=1) if key else []
    if found and key and found[0]["request_digest"] != key.digest:
        message = f"was used for {table[:-1]} {found[0]['id']}, which was another request; take a new one"
        raise InvalidRequest({"Idempotency-Key": [message]})
    return found[0] if found else None


def body_digest(request: Request, uploads: Iterable[Upload] = ()) -> str:
    """sha256 of a parsed request, the bytes of its files, and the strings of its URLs; nulls are left out.

    uploads: the files of a tune. The names of photos do not count. A caption's does: it says which photo it is of.
    """
    digest = hashlib.sha256(json.dumps(_asked(request), sort_keys=True).encode())
    files = list(uploads)
    captioned = any(upload.name.lower().endswith(".txt") for upload in files)
    for upload in files:
        digest.update(f"{upload.name if captioned else ''}\n{file_digest(upload.path)}\n".encode())
    return digest.hexdigest()


def _asked(request: Request) -> dict[str, object]:
    """The parameters that have a value; a picture of a prompt is its digest."""
    own = request.model_dump(mode="json", exclude={"images", *PICTURES, "prompts_attributes"}, exclude_none=True)
    files = {name: getattr(request, name, None) for name in PICTURES}
    own |= {name: file_digest(file.path) for name, file in files.items() if isinstance(file, Upload)}
    if isinstance(request, TuneRequest):
        own["prompts_attributes"] = [_asked(prompt) for prompt in request.prompts_attributes]
    return own


def file_digest(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def equal_tune(services: Services, title: str, digest: str) -> TuneRow | None:
    """The tune that an equal request with the same title has made; None: it is to be made."""
    if services.settings.idempotency == "off":
        return None
    found = services.store.find("tunes", title=title, body_digest=digest)
    return next((row for row in found if row["status"] not in UNANSWERED), None)


def title_warnings(services: Services, title: str, new_id: int) -> list[str]:
    """A warning where other tunes have the same title, which names the newest of them."""
    if services.settings.idempotency == "off":
        return []
    others = services.store.find("tunes", title=title, limit=TITLES_READ)
    other = next((row for row in others if row["id"] != new_id and row["status"] not in UNANSWERED), None)
    return [f"tune {other['id']} has the same title, and was another request; this is a new tune"] if other else []


def equal_prompt(services: Services, place_id: int, digest: str | None) -> PromptRow | None:
    """The prompt that an equal request has made at the same place, where the setting `idempotency` is `all`."""
    if services.settings.idempotency != "all" or digest is None:
        return None
    found = services.store.find("prompts", body_digest=digest)
    return next((row for row in found if place_of(row) == place_id and row["status"] not in UNANSWERED), None)
