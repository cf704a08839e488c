"""The models folder: diffusers folders and single files, each with its family, or why it cannot be used."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.config.branch_file import detections
from trainer.files import printable
from trainer.library.detect import Families, branch_of_file, branch_of_folder, branch_of_lora
from trainer.library.header import read_header

if TYPE_CHECKING:
    from trainer.settings import Settings

EMBEDDINGS_SUFFIX = "_emb.safetensors"


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
    """The models in the models folder; links to files outside it are not followed."""
    models, families = settings.models, detections(settings.presets)
    if not models.is_dir():
        return []
    indexes = sorted(models.rglob("model_index.json"))
    folders = [index.parent for index in indexes]
    files = [file for file in sorted(models.rglob("*.safetensors")) if not set(file.parents) & set(folders)]
    sidecars = {sidecar(file) for file in files}
    paths = [*(folder for folder in folders if folder not in sidecars), *files]
    return [_identify(path, models, families) for path in paths if not _is_embeddings(path, files)]


def _is_embeddings(path: Path, files: list[Path]) -> bool:
    """Whether a file has the learned tokens of the LoRA next to it."""
    lora = path.with_name(path.name.removesuffix(EMBEDDINGS_SUFFIX) + ".safetensors")
    return path.name.endswith(EMBEDDINGS_SUFFIX) and lora in files


def _identify(path: Path, models: Path, families: Families) -> FoundModel:
    """The model of a folder or file. A folder's index is small and is read each time."""
    name = printable(path.relative_to(models).as_posix())
    try:
        if name != path.relative_to(models).as_posix():
            raise ValueError("its name is not UTF-8, and no library opens it; rename it")
        if not path.resolve().is_relative_to(models.resolve()):
            raise ValueError("it is outside the models folder")
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
    except RuntimeError:  # of Python before 3.13
        return FoundModel(name, path, error="it cannot be read: it is a link that leads to itself")
    except ValueError as problem:
        return FoundModel(name, path, error=str(problem))


def _identify_file(name: str, path: Path, families: Families) -> FoundModel:
    """A LoRA or a base in one file; if it cannot be used, `error` says why. Raises OSError."""
    try:
        header = read_header(path)
        branch = branch_of_lora(header.shapes, families, header.metadata)
        if branch is None:
            return FoundModel(name, path, branch_of_file(header, families, sidecar(path)))
    except ValueError as problem:
        return FoundModel(name, path, error=str(problem))
    facts = header.metadata
    return FoundModel(name, path, branch, True, facts.get("tunebooth.root"), facts.get("ss_sd_model_name"))
