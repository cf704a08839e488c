"""SHA-256 of the files of finished models: noted when a tune ends, verified when a file is used or served."""

from __future__ import annotations

from pathlib import Path

from trainer.contract.errors import ModelChanged
from trainer.studio.folders import TUNES
from trainer.studio.idempotency import file_digest
from trainer.studio.store import Store

VERIFIED_IN = ("model", "exports")  # folders of a tune
SUFFIXES = (".safetensors", ".zip")


def of_folder(folder: Path, of: str) -> dict[str, str]:
    """The checksums of a tune's model files, by their paths in its folder. of: `model`, or `exports/FORMAT`."""
    return {file.relative_to(folder).as_posix(): file_digest(file) for file in model_files(folder / of)}


def model_files(at: Path) -> list[Path]:
    """The model files of a folder, or the file itself."""
    return [file for file in (sorted(at.iterdir()) if at.is_dir() else [at]) if file.suffix in SUFFIXES]


def note(store: Store, tune_id: int, checksums: dict[str, str]) -> None:
    """Keep the checksums of files that were just made, in place of those of earlier ones."""
    with store.transaction() as db:
        db.executemany(
            "INSERT OR REPLACE INTO checksums (tune_id, path, sha256) VALUES (?, ?, ?)",
            [(tune_id, path, checksum) for path, checksum in checksums.items()],
        )


def verify(store: Store, outputs: Path, *used: Path | None) -> None:
    """Check that the model files of tunes are there, and as they were when their tunes ended.

    used: files and folders that are about to be read; what is not part of a tune in `outputs` is left out. A file
    without a checksum gets one. Raises ModelChanged.
    """
    tunes = (outputs / TUNES).resolve()
    for at in (path.resolve() for path in used if path is not None):
        if (tune_id := tune_of(at, tunes)) is not None:
            if not at.exists() and (tune := store.get("tunes", tune_id)):
                name = at.relative_to(tunes / str(tune_id)).as_posix()
                raise ModelChanged(
                    f"{name} of tune {tune_id} ({tune['title']}) is missing. Put a copy back, or delete the tune"
                )
            for file in model_files(at):
                verify_file(store, tunes / str(tune_id), tune_id, file)


def tune_of(path: Path, tunes: Path) -> int | None:
    """The tune whose model a path is part of; None: it is no part of a model. tunes: the folder of all tunes."""
    parts = path.relative_to(tunes).parts if path.is_relative_to(tunes) else ()
    is_model = len(parts) > 1 and parts[0].isdecimal() and parts[1] in VERIFIED_IN
    return int(parts[0]) if is_model else None


def verify_file(store: Store, folder: Path, tune_id: int, file: Path) -> None:
    """Check one file of a tune. folder: of the tune. Raises ModelChanged."""
    facts = file.stat()
    version = facts.st_size, facts.st_mtime_ns
    if store.verified.get(file) == version:
        return
    path, checksum = file.relative_to(folder).as_posix(), file_digest(file)
    with store.transaction() as db:
        tune = store.get("tunes", tune_id)
        if tune is None:  # a folder without a row: nothing is known of its files
            return
        db.execute("INSERT OR IGNORE INTO checksums VALUES (?, ?, ?)", (tune_id, path, checksum))
        known = db.execute("SELECT sha256 FROM checksums WHERE tune_id = ? AND path = ?", (tune_id, path)).fetchone()
    if known[0] != checksum:
        raise ModelChanged(
            f"{path} of tune {tune_id} ({tune['title']}) is damaged or was replaced: it is not the file that was"
            f" made when the tune ended (SHA-256 {known[0]}). Put a copy of that file in its place, or delete the tune"
        )
    store.verified[file] = version
