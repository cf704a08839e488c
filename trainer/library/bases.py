"""base_tune_id -> Base. Finds base models; reads the headers of files, never the weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.config import branch_file
from trainer.config.branch_file import BaseRow
from trainer.contract.errors import InvalidRequest
from trainer.contract.rows import TuneRow
from trainer.contract.tunes import check_branch
from trainer.library.models_folder import FoundModel, scan
from trainer.library.versions import version_of
from trainer.names import BRANCHES, CHECKPOINT_FILE, DEFAULT_BRANCH, MODEL_TYPES

if TYPE_CHECKING:
    from trainer.settings import Settings

FIRST_HASHED = 1_000_000_001  # the ids of the hosted service are smaller
PROGRAM = Path(__file__).parents[1] / "branches"  # folder of the bases that are part of the program


@dataclass(frozen=True)
class Base:
    """A base model: a local folder or file, or a hub repository."""

    id: int
    title: str
    branch: str
    path: Path | None = None
    repository: str | None = None
    revision: str | None = None  # of the repository; None: the main branch
    variant: str | None = None  # of its weight files
    error: str | None = None  # why it cannot be used
    model: Path | None = None  # a LoRA that is loaded on it: a file, or the `model/` of an earlier tune
    rest: Base | None = None  # the base with the parts that its file does not have
    root: str = ""  # the title of the model with its weights, if that is another one
    chain: tuple[str, ...] = ()  # of an earlier tune: the titles of its lineage, the nearest first

    @property
    def weights(self) -> tuple[object, ...]:
        """A key that is equal for bases with the same weights; their LoRAs may differ.

        It changes when a file of the base is replaced: a cache keeps the key from the time of loading.
        """
        version = self.path and version_of(self.path)
        rest = self.rest and self.rest.weights
        return self.branch, self.path, version, self.repository, self.revision, self.variant, rest


Tunes = Callable[[int], TuneRow | None]  # a tune's row by its id
Bases = Callable[[], list[Base]]  # all bases: see `listed_once`


def list_bases(settings: Settings) -> list[Base]:
    """All bases: those of the presets (hub repositories, or part of the program), and those of the models folder."""
    known = [base for branch in BRANCHES for base in _of_branch(settings, branch)]
    found = scan(settings)
    known += [
        Base(hashed_id(one.name), one.name, one.branch, path=one.path, error=one.error)
        for one in found
        if not one.is_lora
    ]
    return known + [_put_on(one, known, settings) for one in found if one.is_lora]


def _of_branch(settings: Settings, branch: str) -> list[Base]:
    """The bases in the TOML of a branch. If the TOML is broken: one base with the error."""
    if problem := branch_file.branch_problem(settings.presets, branch):
        return [Base(hashed_id(branch), branch, branch, error=problem)]
    return [_of_row(row, branch) for row in branch_file.base_rows(settings.presets, branch)]


def listed_once(settings: Settings) -> Bases:
    """A function that returns all bases, listed at its first call: one request scans the models folder once."""
    return cache(partial(list_bases, settings))


def by_id(listed: Bases, base_id: int) -> Base | None:
    """The base with this id; None: there is none."""
    return next((base for base in listed() if base.id == base_id), None)


def _put_on(lora: FoundModel, known: list[Base], settings: Settings) -> Base:
    """A LoRA file with the base that its metadata names, else with the default base of its branch."""
    number, ours = hashed_id(lora.name), lora.trained_here_on
    named = {ours or lora.trained_on} - {None}
    usable = [base for base in known if not base.error]
    under = next((base for base in usable if named & {base.title, base.repository, Path(base.title).name}), None)
    # A placeholder's LoRAs have the keys of the family that it replaces.
    if under is None or not (
        under.branch == lora.branch or (under.branch and branch_file.is_placeholder(settings.presets, under.branch))
    ):
        if ours:
            error = f"it was trained on {ours!r}, which is not among the bases"
            return Base(number, lora.name, lora.branch, model=lora.path, error=error)
        under = next(base for base in usable if base.branch == lora.branch)
    root = under.root or under.title
    return replace(under, id=number, title=lora.name, model=lora.path, chain=(under.title,), root=root)


def _of_row(row: BaseRow, branch: str) -> Base:
    number = row.id or hashed_id(row.repository or row.title)
    path = PROGRAM / row.folder if row.folder else None
    return Base(number, row.title, branch, path, row.repository, row.revision, row.variant)


def resolve(
    settings: Settings,
    base_tune_id: int | None,
    branch: str | None,
    tunes: Tunes = lambda tune_id: None,
    listed: Bases | None = None,
) -> Base:
    """The base of a request.

    tunes: finds an earlier tune, which can be a base, too. listed: all bases; None: they are listed when needed.

    Raises InvalidRequest if there is no such base, or it is of another branch.
    """
    if branch is not None:
        check_branch(branch)
    earlier = None if base_tune_id is None else tunes(base_tune_id)
    any_base = branch is not None and branch_file.is_placeholder(settings.presets, branch)
    if base_tune_id is None or (any_base and (earlier is None or earlier["branch"] != branch)):
        branch = branch or DEFAULT_BRANCH
        return _of_row(branch_file.base_rows(settings.presets, branch)[0], branch)
    listed = listed or listed_once(settings)
    base = by_id(listed, base_tune_id)
    if base is None and earlier is not None:
        base = of_tune(settings, earlier, tunes, listed)
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


def of_tune(settings: Settings, tune: TuneRow, tunes: Tunes, listed: Bases | None = None) -> Base:
    """An earlier tune as a base: its base with its LoRA, or its checkpoint.

    Raises InvalidRequest if the tune is not trained or has no weights.
    """
    tune_id, title = tune["id"], tune["title"]
    if tune["status"] != "trained":
        raise InvalidRequest({"base_tune_id": [f"tune {tune_id} is {tune['status']}; only a trained one is a base"]})
    model_type = MODEL_TYPES[tune["method"]]
    if not model_type.trains:
        raise InvalidRequest({"base_tune_id": [f"tune {tune_id} holds a face, and no weights that could be tuned"]})
    under = resolve(settings, tune["base_id"], tune["branch"], tunes, listed)
    model = settings.outputs / "tunes" / str(tune_id) / "model"
    chain = (under.title, *under.chain)
    if not model_type.whole_model:
        root = under.root or under.title
        return replace(under, id=tune_id, title=title, model=model, chain=chain, root=root)
    family = branch_file.detection_of(settings.presets, tune["branch"])
    rest = None if family is None or family.whole_file else under.rest or replace(under, model=None)
    return Base(tune_id, title, tune["branch"], path=model / CHECKPOINT_FILE, rest=rest, chain=chain)


def hashed_id(name: str) -> int:
    """An id from 1e9 to 2^31, always the same for a name."""
    digest = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    return FIRST_HASHED + digest % (2**31 - FIRST_HASHED)
