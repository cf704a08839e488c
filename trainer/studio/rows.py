"""What the operations share: their services, rows by id, and the folders of rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, overload

from trainer.contract.errors import NotFound
from trainer.contract.rows import PromptRow, TuneRow
from trainer.photos.analysis import PhotoAnalyzer
from trainer.photos.decoder import Decoder
from trainer.settings import Settings
from trainer.studio.store import Store

EARLIER_LISTED = 100  # most tunes in the page's list of bases
STOP_SECONDS = 120.0  # enough for a step of the largest model on the slowest card, and for saving it


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


def prompt_home(row: PromptRow) -> str:
    """The folder with the files of a prompt, relative to outputs: its tune's, else its base's."""
    return f"bases/{row['base_id']}" if row["tune_id"] is None else f"tunes/{row['tune_id']}"


def place_of(row: PromptRow) -> int:
    """The id of the base or tune that a prompt was posted to."""
    place = row["base_id"] if row["tune_id"] is None else row["base_id"] or row["tune_id"]
    assert place is not None, "the table has a check for it"
    return place


def tunes_of(row: PromptRow) -> set[int]:
    """The tunes that a prompt is rendered with: its own, and those that its text names."""
    return {row["tune_id"] or 0, *(number for _, number, _ in row["named"] or [])} - {0}


def broken_warnings(row: TuneRow | PromptRow) -> list[str]:
    """What the answer of a row must say of its columns that cannot be read."""
    return [f"{column} cannot be read: the database is damaged there" for column in row.get("broken", [])]


def tune_row(services: Services, tune_id: int) -> TuneRow | None:
    return services.store.get("tunes", tune_id)


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
