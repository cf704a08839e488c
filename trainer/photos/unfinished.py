"""The files of a preparation of photos that was interrupted."""

from __future__ import annotations

import json
from pathlib import Path

from trainer.contract.run_files import NAMES
from trainer.files import Unreadable, printable, read_json, write_whole

MADE = ("restored", "faces", "masks")  # folders in `dataset/`


def remove_unfinished(dataset: Path) -> None:
    """Remove the files of an interrupted preparation; keep the files that a user has put there. Raises Unreadable."""
    if dataset.exists() and not dataset.is_dir():
        raise Unreadable("dataset in the tune's folder is a file, where a folder should be; move it away")
    dataset.mkdir(exist_ok=True)
    note = dataset / "preparing.json"  # lists the files from before the first preparation
    existing = [file for kind in MADE for file in sorted((dataset / kind).rglob("*")) if file.is_file()]
    names = {file: printable(str(file.relative_to(dataset))) for file in existing}
    if not note.exists():
        write_whole(note, json.dumps(list(names.values())))
        return
    try:
        kept = read_json(note, NAMES)
    except Unreadable as problem:
        message = "It names the masks of your own: delete dataset in the tune's folder, put them back and resume"
        raise Unreadable(f"{problem}. {message}") from None
    for file, name in names.items():
        if name not in kept:
            file.unlink()
