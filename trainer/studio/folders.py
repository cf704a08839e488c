"""Folders of tunes and prompts, and whether the database knows them: a folder without a row may hold a trained model.

Such folders are there after a database was moved away, restored from an older copy, or emptied. New numbers lie above
theirs, nothing here removes them, and `app.py rescue` takes them in again.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from trainer.files import PARTIAL, discard
from trainer.studio.store import Store

NUMBER = re.compile(r"[1-9][0-9]{0,8}")  # larger numbers are those of bases
TUNES, BASES, TRASH = "tunes", "bases", "trash"  # below outputs
PROMPT_FOLDERS = tuple(f"{of}/*/{files}" for of in (TUNES, BASES, TRASH) for files in ("prompts", "inputs"))


@dataclass(frozen=True)
class Orphans:
    """Folders without a row. tunes: each with its own prompts. prompts: of tunes that have a row, and of bases."""

    tunes: list[Path]
    prompts: list[Path]

    def __bool__(self) -> bool:
        return bool(self.tunes or self.prompts)


# Numbers


@contextmanager
def adding_tunes(store: Store, outputs: Path) -> Iterator[list[Path]]:
    """A transaction in which a tune is added: its number lies above that of every folder.

    Yields a list to which the caller adds the tune's folder once it is in place. Where the row is not kept after all,
    this folder is removed, and no other.
    """
    made: list[Path] = []
    try:
        with store.transaction() as db:
            raise_numbers(db, "tunes", highest_tune(outputs))
            yield made
    finally:
        for folder in made:
            if store.get("tunes", int(folder.name)) is None:
                discard(folder)


def raise_numbers(db: sqlite3.Connection, table: str, highest: int) -> None:
    """The next number of a table will lie above this one."""
    known = db.execute("SELECT seq FROM sqlite_sequence WHERE name = ?", (table,)).fetchone()
    if known and known[0] < highest:
        db.execute("UPDATE sqlite_sequence SET seq = ? WHERE name = ?", (highest, table))
    elif known is None:
        db.execute("INSERT INTO sqlite_sequence (name, seq) VALUES (?, ?)", (table, highest))


def keep_prompt_numbers(store: Store, outputs: Path) -> None:
    """The numbers of new prompts will lie above those of all folders of prompts. Called once, at start."""
    with store.transaction() as db:
        raise_numbers(db, "prompts", highest_prompt(outputs))


def highest_tune(outputs: Path) -> int:
    """The highest number of a tune's folder, also in the trash, and of what is left of one that was being removed."""
    names = [path.name.partition(PARTIAL)[0] for path in entries(outputs / TUNES)]
    names += [path.name.partition("-")[0] for path in entries(outputs / TRASH)]
    return max((int(name) for name in names if NUMBER.fullmatch(name)), default=0)


def highest_prompt(outputs: Path) -> int:
    names = [path.name.partition(PARTIAL)[0] for at in PROMPT_FOLDERS for path in outputs.glob(f"{at}/*")]
    return max((int(name) for name in names if NUMBER.fullmatch(name)), default=0)


def entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def numbered(folder: Path) -> list[Path]:
    """The folders in it whose names are numbers, in their order."""
    found = [path for path in entries(folder) if NUMBER.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name))


# Folders without a row


def find_orphans(store: Store, outputs: Path) -> Orphans:
    """The folders that no row belongs to, in the order of their numbers; those that are being deleted are left out."""
    with store.transaction() as db:
        tunes = {f"{TUNES}/{number}" for (number,) in db.execute("SELECT id FROM tunes")}
        places = db.execute("SELECT id, tune_id, base_id FROM prompts").fetchall()
    deleted = noted_deletions(store)
    prompts = {
        f"{BASES if tune_id is None else TUNES}/{base_id if tune_id is None else tune_id}/prompts/{number}"
        for number, tune_id, base_id in places
    }

    def lost(found: list[Path], known: set[str]) -> list[Path]:
        return [path for path in found if path.relative_to(outputs).as_posix() not in known | deleted]

    of_tunes = numbered(outputs / TUNES)
    lost_tunes = lost(of_tunes, tunes)
    homes = [*lost(of_tunes, {path.relative_to(outputs).as_posix() for path in lost_tunes}), *numbered_bases(outputs)]
    return Orphans(lost_tunes, [path for home in homes for path in lost(numbered(home / "prompts"), prompts)])


def numbered_bases(outputs: Path) -> list[Path]:
    """The folders of bases that have prompts of their own."""
    return sorted(path for path in entries(outputs / BASES) if path.name.isdecimal())


def noted_deletions(store: Store) -> set[str]:
    """The folders, below outputs, that are still to be removed."""
    with store.transaction() as db:
        return {path for (path,) in db.execute("SELECT path FROM deletions")}


def orphans_note(orphans: Orphans, outputs: Path) -> str:
    """How many folders have no row, and what to do; empty where there is none."""
    if not orphans:
        return ""
    counted = ((len(orphans.tunes), "tune"), (len(orphans.prompts), "prompt"))
    what = " and ".join(f"{count} {name}{'s' * (count > 1)}" for count, name in counted if count)
    numbers = ", ".join(folder.name for folder in orphans.tunes[:10]) + ", ..." * (len(orphans.tunes) > 10)
    which = f" (tune folders: {numbers})" if orphans.tunes else ""
    return (
        f"{outputs} has the files of {what} that the database does not know{which}. The files are kept."
        f" To take them in again, stop the app and run `app.py rescue --outputs {outputs}`"
    )


def has_model(folder: Path) -> bool:
    """Whether a tune's folder holds a trained model, or what is left of one."""
    return bool(entries(folder / "model"))
