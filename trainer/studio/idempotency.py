"""Finds what an equal request created before, by its `Idempotency-Key`, or by its title and a digest."""

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

UNANSWERED = ("failed", "canceled", "expired")  # rows with these statuses do not answer a repeated request
TITLES_READ = 20  # the newest tunes with a title; more are not read, since a shop may give all its tunes one title


@dataclass(frozen=True)
class IdempotencyKey:
    """The header `Idempotency-Key` of a request, and a digest of the request."""

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
    """The row that an equal request with the same key created. Raises InvalidRequest if that request was different."""
    found = services.store.find(table, request_key=key.key, limit=1) if key else []
    if found and key and found[0]["request_digest"] != key.digest:
        message = f"was used for {table[:-1]} {found[0]['id']}, which was another request; take a new one"
        raise InvalidRequest({"Idempotency-Key": [message]})
    return found[0] if found else None


def body_digest(request: Request, uploads: Iterable[Upload] = ()) -> str:
    """sha256 of a parsed request, with the bytes of its files and the text of its URLs, without nulls.

    uploads: the files of a tune. Their names count only if there are captions, which name their photos.
    """
    digest = hashlib.sha256(json.dumps(_asked(request), sort_keys=True).encode())
    files = list(uploads)
    captioned = any(upload.name.lower().endswith(".txt") for upload in files)
    for upload in files:
        digest.update(f"{upload.name if captioned else ''}\n{file_digest(upload.path)}\n".encode())
    return digest.hexdigest()


def _asked(request: Request) -> dict[str, object]:
    """The parameters with a value; the digest replaces a picture of a prompt."""
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
    """The tune that an equal request with the same title created; None: there is none."""
    if services.settings.idempotency == "off":
        return None
    found = services.store.find("tunes", title=title, body_digest=digest)
    return next((row for row in found if row["status"] not in UNANSWERED), None)


def title_warnings(services: Services, title: str, new_id: int) -> list[str]:
    """A warning if other tunes have the same title; it names the newest of them."""
    if services.settings.idempotency == "off":
        return []
    others = services.store.find("tunes", title=title, limit=TITLES_READ)
    other = next((row for row in others if row["id"] != new_id and row["status"] not in UNANSWERED), None)
    return [f"tune {other['id']} has the same title, and was another request; this is a new tune"] if other else []


def equal_prompt(services: Services, place_id: int, digest: str | None) -> PromptRow | None:
    """The prompt that an equal request created on the same tune or base, if the setting `idempotency` is `all`."""
    if services.settings.idempotency != "all" or digest is None:
        return None
    found = services.store.find("prompts", body_digest=digest)
    return next((row for row in found if place_of(row) == place_id and row["status"] not in UNANSWERED), None)
