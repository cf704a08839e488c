"""base_tune_id -> Base. Finds and names base models; never loads one, and reads no more of a file than its header."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.config import branch_file
from trainer.config.branch_file import BaseRow
from trainer.config.detection import detection, detections
from trainer.contract.errors import InvalidRequest
from trainer.contract.rows import TuneRow
from trainer.contract.tunes import check_branch
from trainer.library.detect import branch_of_file, branch_of_folder, branch_of_lora, safetensors_header
from trainer.names import BRANCHES, CHECKPOINT_FILE, DEFAULT_BRANCH, MODEL_TYPES

if TYPE_CHECKING:
    from trainer.settings import Settings

FIRST_HASHED = 1_000_000_001  # the numbers of the hosted service are smaller
PROGRAM = Path(__file__).parents[1] / "branches"  # has the bases that are part of the program
WORDS_SUFFIX = "_emb.safetensors"


@dataclass(frozen=True)
class Base:
    """What a tune starts from: a folder or file here, or a hub repository."""

    id: int
    title: str
    branch: str
    path: Path | None = None
    repository: str | None = None
    revision: str | None = None  # of the repository; None: its main one
    variant: str | None = None  # of its weight files
    error: str | None = None  # why it cannot be used
    model: Path | None = None  # a LoRA that is put on it: a file, or the `model/` of an earlier tune
    rest: Base | None = None  # what has the parts that its file lacks
    root: str = ""  # the title of what the weights are of, where that is another one
    chain: tuple[str, ...] = ()  # of an earlier tune: the titles of what it stands on, the nearest first

    @property
    def weights(self) -> tuple[object, ...]:
        """What is the same where the same weights are loaded, whatever LoRA comes on them."""
        return self.branch, self.path, self.repository, self.revision, self.variant, self.rest and self.rest.weights


Tunes = Callable[[int], TuneRow | None]  # a tune's row by its id


def list_bases(settings: Settings) -> list[Base]:
    """All bases: those of the presets, which are hub repositories or part of the program, and the models folder's."""
    presets = settings.presets
    known = [_of_row(row, branch) for branch in BRANCHES for row in branch_file.base_rows(presets, branch)]
    found = _scan(settings)
    known += [base for base in found if base.model is None]
    return known + [_put_on(base, known, settings) for base in found if base.model is not None]


def _put_on(lora: Base, known: list[Base], settings: Settings) -> Base:
    """A LoRA file on the base that it names as its own, else on the default one of its branch."""
    assert lora.model is not None
    facts = safetensors_header(lora.model).get("__metadata__", {})
    ours = facts.get("tunebooth.root")
    named = {ours or facts.get("ss_sd_model_name")} - {None}
    under = next((base for base in known if named & {base.title, base.repository, Path(base.title).name}), None)
    # A placeholder's LoRAs have the keys of the family that it stands in for.
    if under is None or not (
        under.branch == lora.branch or (under.branch and branch_file.is_placeholder(settings.presets, under.branch))
    ):
        if ours:
            return replace(lora, error=f"it was trained on {ours!r}, which is not among the bases")
        under = next(base for base in known if base.branch == lora.branch)
    root = under.root or under.title
    return replace(under, id=lora.id, title=lora.title, model=lora.model, chain=(under.title,), root=root)


def _of_row(row: BaseRow, branch: str) -> Base:
    number = row.id or hashed_id(row.repository or row.title)
    path = PROGRAM / row.folder if row.folder else None
    return Base(number, row.title, branch, path, row.repository, row.revision, row.variant)


def resolve(
    settings: Settings, base_tune_id: int | None, branch: str | None, tunes: Tunes = lambda tune_id: None
) -> Base:
    """The base that a request means. tunes: to look up an earlier tune, which is a base, too.

    Raises InvalidRequest where there is none, or none of that branch.
    """
    if branch is not None:
        check_branch(branch)
    earlier = None if base_tune_id is None else tunes(base_tune_id)
    any_base = branch is not None and branch_file.is_placeholder(settings.presets, branch)
    if base_tune_id is None or (any_base and (earlier is None or earlier["branch"] != branch)):
        branch = branch or DEFAULT_BRANCH
        return _of_row(branch_file.base_rows(settings.presets, branch)[0], branch)
    base = next((base for base in list_bases(settings) if base.id == base_tune_id), None)
    if base is None and earlier is not None:
        base = of_tune(settings, earlier, tunes)
    if base is None:
        raise InvalidRequest(
            {"base_tune_id": [f"no base model has the id {base_tune_id}; GET /gallery/tunes lists them"]}
        )
    if base.error:
        raise InvalidRequest({"base_tune_id": [f"{base.title}: {base.error}"]})
    check_branch(base.branch)
    if branch is not None and base.branch != branch:
        raise InvalidRequest({"base_tune_id": [f"{base.title} is of branch {base.branch}, not {branch}"]})
    return base


def of_tune(settings: Settings, tune: TuneRow, tunes: Tunes) -> Base:
    """An earlier tune as a base: what it stands on with its LoRA, or its checkpoint.

    Raises InvalidRequest for one that is not trained, or that has no weights.
    """
    tune_id, title = tune["id"], tune["title"]
    if tune["status"] != "trained":
        raise InvalidRequest({"base_tune_id": [f"tune {tune_id} is {tune['status']}; only a trained one is a base"]})
    model_type = MODEL_TYPES[tune["method"]]
    if not model_type.trains:
        raise InvalidRequest({"base_tune_id": [f"tune {tune_id} holds a face, and no weights that could be tuned"]})
    under = resolve(settings, tune["base_id"], tune["branch"], tunes)
    model = settings.outputs / "tunes" / str(tune_id) / "model"
    chain = (under.title, *under.chain)
    if not model_type.whole_model:
        root = under.root or under.title
        return replace(under, id=tune_id, title=title, model=model, chain=chain, root=root)
    family = detection(settings.presets, tune["branch"])
    rest = None if family is None or family.whole_file else under.rest or replace(under, model=None)
    return Base(tune_id, title, tune["branch"], path=model / CHECKPOINT_FILE, rest=rest, chain=chain)


def hashed_id(name: str) -> int:
    """A number from 1e9 to 2^31 that stays the same for the same name."""
    digest = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    return FIRST_HASHED + digest % (2**31 - FIRST_HASHED)


def sidecar(file: Path) -> Path:
    """The folder of the same name beside a single file: its configuration, and its tokenizer."""
    return file.with_suffix("")


def _scan(settings: Settings) -> list[Base]:
    """Diffusers folders and single files below the models folder; links that lead out of it are left alone."""
    models, families = settings.models, detections(settings.presets)
    if not models.is_dir():
        return []
    root = models.resolve()
    indexes = sorted(models.rglob("model_index.json"))
    folders = [index.parent for index in indexes]
    files = [file for file in sorted(models.rglob("*.safetensors")) if not set(file.parents) & set(folders)]
    sidecars = {sidecar(file) for file in files}
    found = []
    for path in [*(folder for folder in folders if folder not in sidecars), *files]:
        name = path.relative_to(models).as_posix()
        if (
            path.name.endswith(WORDS_SUFFIX)
            and path.with_name(path.name.replace(WORDS_SUFFIX, ".safetensors")) in files
        ):
            continue  # the new words of the LoRA beside it
        branch, lora, error = "", None, None
        try:
            if not path.resolve().is_relative_to(root):
                raise ValueError("it lies outside the models folder")
            lora = None if path.is_dir() else branch_of_lora(safetensors_header(path), families)
            branch = lora or (branch_of_folder(path, families) if path.is_dir() else branch_of_file(path, families))
        except OSError as problem:
            error = f"it cannot be read: {problem.strerror}"
        except ValueError as problem:
            error = str(problem)
        base = Base(hashed_id(name), name, branch, error=error)
        found.append(replace(base, model=path) if lora else replace(base, path=path))
    return found
