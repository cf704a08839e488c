"""What the verbs share: the services that they need, rows by id, and idempotency keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trainer.contract.errors import InvalidRequest, NotFound
from trainer.photos.intake import Decoder
from trainer.photos.looker import Looker
from trainer.settings import Settings
from trainer.studio.store import Row, Store, Table

EARLIER_LISTED = 100  # tunes, in the page's list of bases
STOP_SECONDS = 120.0  # a step of the largest model on the slowest card, and saving it


@dataclass(frozen=True)
class Mark:
    """The header `Idempotency-Key` of a request, and a digest of what it asked for."""

    key: str
    digest: str


def marks(mark: Mark | None) -> Row:
    """The columns that hold a mark."""
    return {"request_key": mark.key, "request_digest": mark.digest} if mark else {}


@dataclass(frozen=True)
class Services:
    """What the verbs of the studio need."""

    settings: Settings
    store: Store
    decoder: Decoder
    looker: Looker


def tunes_by_id(services: Services) -> Callable[[int], Row | None]:
    """To look up a tune's row by its id."""
    return lambda tune_id: tune_row(services, tune_id)


def tune_folder(services: Services, tune_id: int) -> Path:
    return services.settings.outputs / "tunes" / str(tune_id)


def tune_row(services: Services, tune_id: int) -> Row | None:
    return services.store.get("tunes", tune_id)


def find_marked(services: Services, table: Table, mark: Mark | None) -> Row | None:
    """What an equal request of the same mark has made. Raises InvalidRequest where that was another request."""
    found = services.store.find(table, request_key=mark.key, limit=1) if mark else []
    if found and mark and found[0]["request_digest"] != mark.digest:
        told = f"was used for {table[:-1]} {found[0]['id']}, which was another request; take a new one"
        raise InvalidRequest({"Idempotency-Key": [told]})
    return found[0] if found else None


def row_of(services: Services, table: Table, row_id: int) -> Row:
    row = services.store.get(table, row_id)
    if row is None:
        raise NotFound(f"there is no {table[:-1]} {row_id}")
    return row
