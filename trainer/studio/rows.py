"""What the operations share: their services, rows by id, and idempotency keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, overload

from trainer.contract.errors import InvalidRequest, NotFound
from trainer.contract.rows import PromptRow, TuneRow
from trainer.photos.analysis import PhotoAnalyzer
from trainer.photos.intake import Decoder
from trainer.settings import Settings
from trainer.studio.store import Store

EARLIER_LISTED = 100  # most tunes in the page's list of bases
STOP_SECONDS = 120.0  # enough for a step of the largest model on the slowest card, and for saving it


@dataclass(frozen=True)
class IdempotencyKey:
    """The header `Idempotency-Key` of a request, and a digest of the request."""

    key: str
    digest: str


def idempotency_columns(key: IdempotencyKey | None) -> dict[str, str]:
    """The columns that hold an idempotency key."""
    return {"request_key": key.key, "request_digest": key.digest} if key else {}


@dataclass(frozen=True)
class Services:
    """What the operations of the studio need."""

    settings: Settings
    store: Store
    decoder: Decoder
    analyzer: PhotoAnalyzer


def tunes_by_id(services: Services) -> Callable[[int], TuneRow | None]:
    """A function that returns a tune's row by its id."""
    return lambda tune_id: tune_row(services, tune_id)


def tune_folder(services: Services, tune_id: int) -> Path:
    return services.settings.outputs / "tunes" / str(tune_id)


def tune_row(services: Services, tune_id: int) -> TuneRow | None:
    return services.store.get("tunes", tune_id)


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


@overload
def row_of(services: Services, table: Literal["tunes"], row_id: int) -> TuneRow: ...
@overload
def row_of(services: Services, table: Literal["prompts"], row_id: int) -> PromptRow: ...
def row_of(services: Services, table: Literal["tunes", "prompts"], row_id: int) -> TuneRow | PromptRow:
    """The row with this id. Raises NotFound."""
    row = services.store.get(table, row_id)
    if row is None:
        raise NotFound(f"there is no {table[:-1]} {row_id}")
    return row
