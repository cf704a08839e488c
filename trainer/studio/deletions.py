"""Deleting: what is to be removed with a row is noted in the transaction that deletes it.

The note is removed after the files. A kill in between leaves the note, and the next start finishes the deletion.
"""

from __future__ import annotations

import logging
from pathlib import Path

from trainer.files import LEFTOVER, PARTIAL, UNCOMMITTED, remove, sweep
from trainer.studio.folders import BASES, TUNES, entries, has_model, noted_deletions, numbered
from trainer.studio.store import Store

log = logging.getLogger(__name__)


def note_deletions(outputs: Path, store: Store, *paths: Path) -> None:
    """Note files and folders below outputs that have no row any more, in the transaction that deletes the row."""
    with store.transaction() as db:
        notes = [(path.relative_to(outputs).as_posix(),) for path in paths]
        db.executemany("INSERT OR IGNORE INTO deletions (path) VALUES (?)", notes)


def finish_deletions(outputs: Path, store: Store) -> None:
    """Remove all that is noted. What cannot be removed now stays noted."""
    noted = noted_deletions(store)
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
    """At start: finish the deletions, and remove what was spooled or half-written when the last process ended.

    A tune's folder without a row may be the only copy of a model: nothing in it is touched.
    """
    noted = noted_deletions(store)
    finish_deletions(outputs, store)
    incoming = outputs / "incoming"
    remove(incoming)
    incoming.mkdir(mode=0o700, exist_ok=True)
    for folder in (outputs, outputs / "packs", outputs / BASES):
        sweep(folder, below=False)
    sweep(outputs / "cache")
    for path in entries(outputs / TUNES):
        name = f"{TUNES}/{path.name.partition(PARTIAL)[0]}"
        if LEFTOVER.search(path.name) and (name in noted or not has_model(path)):  # it may be of an older version
            remove(path)
    for folder in numbered(outputs / TUNES):
        if store.get("tunes", int(folder.name)):
            _sweep_home(store, folder)
        elif (folder / UNCOMMITTED).exists() and not has_model(folder):
            remove(folder)  # it was being created
    for folder in entries(outputs / BASES):
        _sweep_home(store, folder)


def _sweep_home(store: Store, home: Path) -> None:
    """Sweep the folder of a tune or base."""
    for folder in numbered(home / "inputs"):
        if (folder / UNCOMMITTED).exists() and not store.get("prompts", int(folder.name)):
            remove(folder)
    sweep(home)
