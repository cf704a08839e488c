"""Whether a base was changed: by the times and sizes of its files, or by their content."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from trainer.library.models_folder import sidecar
from trainer.library.models_tree import walk
from trainer.library.prediction import yaml_of

READ = {".safetensors", ".json", ".txt", ".model", ".bin"}  # of weights, configurations and vocabularies
Version = tuple[
    tuple[str, int, int, int], ...
]  # of each file: its path, its number, its time of change (ns), its bytes


def version_of(base: Path) -> Version:
    """The version of a file with its sidecar, or of a folder. Empty: it is deleted."""
    return tuple(
        (str(file), facts.st_ino, facts.st_mtime_ns, facts.st_size) for file, facts in _with_facts(files_of(base))
    )


def files_of(base: Path) -> list[Path]:
    """The files that are read of a base: a single file, its sidecar and its YAML, or a diffusers folder."""
    folder = sidecar(base) if base.is_file() else base
    # Parts may be links to folders elsewhere, which rglob does not enter.
    inside = [file for file in walk(folder).all_files() if file.suffix in READ] if folder.is_dir() else []
    if not base.is_file():
        return inside
    beside = yaml_of(base)
    return [base, *([beside] if beside.is_file() else []), *inside]


def changed_at(bases: Iterable[Path]) -> float:
    """The latest time (s) at which a file of these bases was written, moved or linked; 0 without files."""
    times = [max(facts.st_mtime, facts.st_ctime) for base in bases for _, facts in _with_facts(files_of(base))]
    return max(times, default=0.0)


def content_digest(bases: Iterable[Path]) -> str:
    """SHA-256, in hex, of the names and the whole content of the files of these bases. Raises OSError.

    It reads all weights: seconds for a model of a few GB, whose file is in the page cache after loading.
    """
    total = hashlib.sha256()
    for base in bases:
        for file in files_of(base):
            with file.open("rb") as stream:
                content = hashlib.file_digest(stream, "sha256").hexdigest()
            total.update(f"{'' if file == base else _name_in(file, base)} {content}\n".encode())
        total.update(b"\n")
    return total.hexdigest()


def _name_in(file: Path, base: Path) -> str:
    """The name of a file of a base, which does not change when the base is moved or renamed."""
    folder = sidecar(base) if base.is_file() else base
    return file.relative_to(folder).as_posix() if file.is_relative_to(folder) else file.suffix


def _with_facts(files: Iterable[Path]) -> list[tuple[Path, os.stat_result]]:
    """Each file that is still there, with its facts."""
    found = []
    for file in files:
        try:
            found.append((file, file.stat()))
        except OSError:  # deleted meanwhile, or a link to nothing
            continue
    return found
