"""The files of the models folder. Links are followed: the owner of the folder has made them."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from trainer.library import unread_files

INDEX = "model_index.json"


@dataclass
class Tree:
    """files: the files in each folder that is not hidden. errors: why a link or a folder cannot be read."""

    files: dict[Path, list[Path]] = field(default_factory=dict)
    errors: dict[Path, str] = field(default_factory=dict)

    @property
    def model_folders(self) -> list[Path]:
        """The diffusers folders; the index of a broken one may be a folder itself."""
        found = {path.parent for path in (*self.all_files(), *self.files) if path.name == INDEX}
        return sorted(found & self.files.keys())

    def all_files(self) -> list[Path]:
        return sorted(file for files in self.files.values() for file in files)


def walk(models: Path) -> Tree:
    """The files in the models folder and in its folders. Each folder is read once, under its own name if it has one
    there, so links that lead back end; hidden folders are left out.
    """
    tree, seen = Tree(), set[tuple[int, int]]()
    waiting, links = [models], list[Path]()
    while waiting or links:
        linked = not waiting
        folder = links.pop(0) if linked else waiting.pop()
        try:
            status = folder.stat()
            if (status.st_dev, status.st_ino) in seen:
                tree.errors[folder] = unread_files.LISTED_ALREADY
                continue
            seen.add((status.st_dev, status.st_ino))
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as problem:
            tree.errors[folder] = f"it cannot be read: {problem.strerror}"
            continue
        tree.files[folder] = []
        for entry in entries:
            path = Path(entry.path)
            kind = _kind(entry, tree)
            if kind == "file":
                tree.files[folder].append(path)
            elif kind == "folder" and not entry.name.startswith("."):
                (links if entry.is_symlink() else waiting).append(path)
    return tree


def _kind(entry: os.DirEntry[str], tree: Tree) -> str:
    """file, folder, or "" for what is neither; why it is neither is put into `tree.errors`, if it may be a model."""
    path = Path(entry.path)
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
        why = unread_files.DANGLING if entry.is_symlink() and not path.exists() else unread_files.NO_FILE
    except OSError as problem:  # a loop of links, or a drive that does not answer
        why = f"it cannot be read: {problem.strerror}"
    if not unread_files.is_beside(path):
        tree.errors[path] = why
    return ""
