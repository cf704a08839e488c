"""Deleting: what is to be removed with a row is noted in the transaction that deletes it.

The note is removed after the files. A kill in between leaves the note, and the next start finishes the deletion.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from trainer.files import UNCOMMITTED, remove, sweep
from trainer.studio.store import Store, Table

log = logging.getLogger(__name__)
HOMES = ("tunes", "bases")  # folders below outputs whose folders have files of rows


def note_deletions(outputs: Path, store: Store, *paths: Path) -> None:
    """Note files and folders below outputs that have no row any more, in the transaction that deletes the row."""
    with store.transaction() as db:
        notes = [(path.relative_to(outputs).as_posix(),) for path in paths]
        db.executemany("INSERT OR IGNORE INTO deletions (path) VALUES (?)", notes)


def finish_deletions(outputs: Path, store: Store) -> None:
    """Remove all that is noted. What cannot be removed now stays noted."""
    with store.transaction() as db:
        noted = [str(row["path"]) for row in db.execute("SELECT path FROM deletions")]
    for text in noted:
        path = Path(text)
        if path.is_absolute() or ".." in path.parts or len(path.parts) < 2:
            log.error("the database notes %r as deleted, which is no folder of a tune or prompt; it stays", text)
        elif not remove(outputs / path):
            log.warning("%s could not be removed; it is tried again every minute and at the next start", outputs / path)
            continue
        with store.transaction() as db:
            db.execute("DELETE FROM deletions WHERE path = ?", (text,))


def remove_leftovers(outputs: Path, store: Store) -> None:
    """At start: finish the deletions, and remove what came in or was half-written when the last process ended.

    A tune's folder without a row may be the only copy of a model: nothing in it is touched.
    """
    finish_deletions(outputs, store)
    incoming = outputs / "incoming"
    remove(incoming)
    incoming.mkdir(mode=0o700, exist_ok=True)
    for folder in (outputs, outputs / "packs", *(outputs / home for home in HOMES)):
        sweep(folder, below=False)
    sweep(outputs / "cache")
    for folder in _folders(outputs / "tunes"):
        if has_row(store, "tunes", folder.name):
            _sweep_home(store, folder)
        elif (folder / UNCOMMITTED).exists() and not (folder / "model").exists():
            remove(folder)  # its transaction did not come to its end
    for folder in _folders(outputs / "bases"):
        _sweep_home(store, folder)


def _sweep_home(store: Store, home: Path) -> None:
    """Sweep the folder of a tune or base."""
    for folder in _folders(home / "inputs"):
        if (folder / UNCOMMITTED).exists() and not has_row(store, "prompts", folder.name):
            remove(folder)
    sweep(home)


def has_row(store: Store, table: Table, name: str) -> bool:
    """Whether the row is there whose id is the name of a folder."""
    return name.isdecimal() and store.get(table, int(name)) is not None


def _folders(parent: Path) -> Iterator[Path]:
    yield from (path for path in (sorted(parent.iterdir()) if parent.is_dir() else ()) if path.is_dir())
