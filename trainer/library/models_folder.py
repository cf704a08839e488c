"""The models folder: diffusers folders and single files, each with its family, or why it cannot be used."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.config.branch_file import detections
from trainer.files import printable
from trainer.library.detect import Families, branch_of_file, branch_of_folder, branch_of_lora
from trainer.library.header import read_header
from trainer.library.models_tree import INDEX, Tree, walk
from trainer.library.unread_files import FOLDER, MODEL_SUFFIX, is_apple_double, what_it_is, why_unread

if TYPE_CHECKING:
    from trainer.settings import Settings

EMBEDDINGS_SUFFIX = "_emb.safetensors"
PART_FILES = {"config.json", "tokenizer_config.json", "vocab.json", "scheduler_config.json"}


@dataclass(frozen=True)
class FoundModel:
    """A model in the models folder. name: its path in the folder, with slashes. error: why it cannot be used.

    trained_here_on, trained_on: the base that a LoRA file names, in our metadata and in kohya's.
    """

    name: str
    path: Path
    branch: str = ""
    is_lora: bool = False
    trained_here_on: str | None = None
    trained_on: str | None = None
    error: str | None = None


# Results by file, with the file's version and the families at that time: each header is read once. The version has the
# parts that the sidecar configures.
_found: dict[Path, tuple[tuple[int, int, tuple[str, ...]], Families, FoundModel]] = {}


def sidecar(file: Path) -> Path:
    """The folder next to a single file, with the same name: its configuration and its tokenizer."""
    return file.with_suffix("")


def scan(settings: Settings) -> list[FoundModel]:
    """The models in the models folder, then what is not read there, with the reason."""
    models, families = settings.models, detections(settings.presets)
    if not models.is_dir():
        return []
    tree = walk(models)
    folders, everything = set(tree.model_folders), [file for file in tree.all_files() if not is_apple_double(file)]
    files = [file for file in everything if file.suffix == MODEL_SUFFIX and not set(file.parents) & folders]
    sidecars = {sidecar(file) for file in files if _is_sidecar(sidecar(file), tree)}
    files = [file for file in files if not _is_part(file, sidecars, tree)]
    paths = [*sorted(folders - sidecars), *files]
    found = [_identify(path, models, families) for path in paths if not _is_embeddings(path, files)]
    others = [file for file in everything if file.suffix != MODEL_SUFFIX]
    owned = {*folders, *sidecars, *(folder for folder in tree.files if _is_hub_blobs(folder, tree))}
    unread = {file: why for file in others if not set(file.parents) & owned and (why := _why_unread(file))}
    unread |= {folder: FOLDER for folder in tree.files if _is_in_place_of_file(folder, tree) and folder not in folders}
    unread |= {path: why for path, why in tree.errors.items() if path != models and not set(path.parents) & owned}
    return [*found, *(FoundModel(_name(path, models), path, error=unread[path]) for path in sorted(unread))]


def _is_sidecar(folder: Path, tree: Tree) -> bool:
    """Whether a folder with the name of a file has the parts of a model; else it is a folder of other models."""
    if folder not in tree.files:
        return False
    parts = (files for part, files in tree.files.items() if part.parent == folder)
    return folder / INDEX in tree.files[folder] or any(file.name in PART_FILES for files in parts for file in files)


def _is_part(file: Path, sidecars: set[Path], tree: Tree) -> bool:
    """Whether a file has the weights of a part of the model that the sidecar belongs to."""
    return bool(set(file.parent.parents) & sidecars) and file.parent / "config.json" in tree.files[file.parent]


def _is_in_place_of_file(folder: Path, tree: Tree) -> bool:
    """Whether a folder has the name of a model file, and no such file in it."""
    return folder.suffix == MODEL_SUFFIX and not any(file.suffix == MODEL_SUFFIX for file in tree.files[folder])


def _is_hub_blobs(folder: Path, tree: Tree) -> bool:
    """Whether a folder has the files of a cache of the hub, to which the links in its snapshots lead."""
    return folder.name == "blobs" and folder.with_name("snapshots") in tree.files


def _why_unread(file: Path) -> str | None:
    try:
        return why_unread(file)
    except OSError as problem:
        return f"it cannot be read: {problem.strerror}"


def _name(path: Path, models: Path) -> str:
    return printable(path.relative_to(models).as_posix())


def _is_embeddings(path: Path, files: list[Path]) -> bool:
    """Whether a file has the learned tokens of the LoRA next to it."""
    lora = path.with_name(path.name.removesuffix(EMBEDDINGS_SUFFIX) + ".safetensors")
    return path.name.endswith(EMBEDDINGS_SUFFIX) and lora in files


def _identify(path: Path, models: Path, families: Families) -> FoundModel:
    """The model of a folder or file. A folder's index is small and is read each time."""
    name = _name(path, models)
    try:
        if name != path.relative_to(models).as_posix():
            raise ValueError("its name is not UTF-8, and no library opens it; rename it")
        if path.is_dir():
            return FoundModel(name, path, branch_of_folder(path, families))
        status = path.stat()
        configurations = tuple(sorted(file.parent.name for file in sidecar(path).glob("*/config.json")))
        version = status.st_mtime_ns, status.st_size, configurations
        known = _found.get(path)
        if known is None or known[:2] != (version, families):
            known = version, families, _identify_file(name, path, families)
            _found[path] = known
        return known[2]
    except OSError as problem:
        return FoundModel(name, path, error=f"it cannot be read: {problem.strerror}")
    except ValueError as problem:
        return FoundModel(name, path, error=str(problem))


def _identify_file(name: str, path: Path, families: Families) -> FoundModel:
    """A LoRA or a base in one file; if it cannot be used, `error` says why. Raises OSError."""
    try:
        header = read_header(path)
    except ValueError as problem:
        return FoundModel(name, path, error=": ".join(filter(None, (str(problem), what_it_is(path)))))
    try:
        branch = branch_of_lora(header.shapes, families, header.metadata)
        if branch is None:
            return FoundModel(name, path, branch_of_file(header, families, sidecar(path)))
    except ValueError as problem:
        return FoundModel(name, path, error=str(problem))
    facts = header.metadata
    return FoundModel(name, path, branch, True, facts.get("tunebooth.root"), facts.get("ss_sd_model_name"))
