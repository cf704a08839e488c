"""The TOML of a branch: rendering defaults, base models, ControlNets, model types."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.dataclasses import dataclass

from trainer.config.detection import Detection, detection
from trainer.config.kinds import KINDS, OTHER_KIND, STYLE_KIND
from trainer.config.toml_file import CHECKED, Table, read_toml
from trainer.contract.errors import InvalidRequest
from trainer.files import Unreadable, printable, warn_once
from trainer.names import BRANCHES, DEFAULT_METHOD, METHODS

PROGRAM = Path(__file__).parents[2] / "presets"  # a user's own folder may take its place
MOST_GIB = 1e6
FACTS = ("detect", "placeholder", "face_adapter", "base")  # what a family is, and not how a user wants it


@dataclass(frozen=True, config=CHECKED)
class RenderConfig:
    """What a prompt gets that does not say: sampling steps, guidance, width and height in pixels."""

    steps: int
    cfg_scale: float
    w: int
    h: int
    hires_strength: float = 0.4  # of the noise that hires_fix puts on the enlarged picture; 0: there is nothing to gain
    face_strength: float = 0.5  # of that which inpaint_faces puts on a face
    multiple: int = 8  # pixels of which both sides are multiples
    fixed_size: int | None = None  # a base that knows one size renders this many pixels on the longer side
    negative_prompt: bool = True  # False: the family has no use for one
    schedulers: bool = True  # False: the family has a sampler of its own
    preview: str | None = None  # the hub repository of a tiny decoder (TAESD)


@dataclass(frozen=True, config=CHECKED)
class BaseRow:
    """A base model by its number in the hosted service's gallery (0: it has none there)."""

    title: str
    repository: str | None = None
    id: int = 0
    folder: str | None = None  # in trainer/branches/, of a base that is part of the program
    revision: str | None = None
    variant: str | None = None  # of its weight files: `fp16` where the repository has them twice


class BranchFile(BaseModel):
    """What must be right in the TOML of a branch before anything in it is used; values of words are checked later."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    token: str
    model_type: str
    placeholder: bool = False
    warnings: list[str] = []
    without: list[str] = []
    why_not: dict[str, str] = {}
    instead: dict[str, str] = {}
    face_adapter: dict[str, str | int | float] | None = None


def check_branch(table: Table) -> None:
    """Raises ValueError for the TOML of a branch that cannot be used."""
    BranchFile.model_validate(table)
    bases, controls = table.get("base", []), table.get("control", {})
    if not isinstance(bases, list):
        raise ValueError("base must be one or more tables, [[base]]")
    if not isinstance(controls, dict):
        raise ValueError("[control] must be a table")
    _check_row("render", table.get("render"), RenderConfig)
    for row in bases:
        _check_row("base", row, BaseRow)
    for row in controls.values():
        _check_row("control", row, ControlRow)
    if "detect" in table:
        detection(table["detect"])
    for method in {DEFAULT_METHOD} | (table.keys() & set(METHODS)):
        _check_method(method, table.get(method))


def _check_row(name: str, row: object, make: Callable[..., object]) -> None:
    if not isinstance(row, dict):
        raise ValueError(f"[{name}] must be a table")
    try:
        make(**row)
    except ValidationError as problem:
        first = problem.errors()[0]
        raise ValueError(f"[{name}] {first['loc'][-1]}: {first['msg']}") from None


def _check_method(method: str, table: object) -> None:
    """The table of a model type: what is not a word of args."""
    if not isinstance(table, dict):
        raise ValueError(f"[{method}] must be a table")
    for kind in table.keys() & {*KINDS, STYLE_KIND, OTHER_KIND}:
        if not isinstance(table[kind], dict):
            raise ValueError(f"[{method}.{kind}] must be a table")
    rows, least = table.get("memory", []), table.get("least_gib", 0)
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "below_gib" in row for row in rows):
        raise ValueError(f"[[{method}.memory]] must be tables with below_gib")
    if not all(
        type(gib) in (int, float) and 0 <= gib < MOST_GIB for gib in (least, *(row["below_gib"] for row in rows))
    ):
        raise ValueError(f"[{method}] least_gib and below_gib must be numbers")
    if not all(type(row.get("resolution", 0)) is int for row in rows):
        raise ValueError(f"[[{method}.memory]] resolution must be a whole number")


def branch_table(folder: Path, branch: str) -> Table:
    """The TOML of a branch.

    Where a user's own folder is of an older version, the program's TOML says what the family is. Raises InvalidRequest
    where one of them is broken: which values were meant is not guessed.
    """
    tables = []
    for path in (PROGRAM, folder):
        try:
            tables.append(read_toml(path / f"{branch}.toml", check_branch))
        except FileNotFoundError:
            continue
        except Unreadable as problem:
            raise InvalidRequest({"branch": [f"{branch} cannot be used: {problem}"]}) from None
    if not tables:
        raise InvalidRequest({"branch": [f"{branch} cannot be used: there is no {branch}.toml in the presets folder"]})
    table = {key: value for key, value in tables[0].items() if key in FACTS} | tables[-1]
    if not table.get("base"):
        raise InvalidRequest({"branch": [f"{branch} cannot be used: {branch}.toml has no [[base]]"]})
    return table


def branch_problem(folder: Path, branch: str) -> str | None:
    """Why a branch cannot be used; None: it can."""
    try:
        branch_table(folder, branch)
    except InvalidRequest as invalid:
        return "; ".join(invalid.problems["branch"])
    return None


def detections(folder: Path) -> dict[str, Detection]:
    """The families that have files of their own, those left out whose TOML is broken.

    The newest is first: it is asked before those that it resembles.
    """
    found = {}
    for branch in reversed(BRANCHES):
        if branch_problem(folder, branch) is None and (one := detection_of(folder, branch)):
            found[branch] = one
    return found


def detection_of(folder: Path, branch: str) -> Detection | None:
    """None for a family that has no files of its own."""
    table = branch_table(folder, branch).get("detect")
    return None if table is None else detection(table)


def base_rows(folder: Path, branch: str) -> list[BaseRow]:
    """The base models that a branch may start from; the first one is its default."""
    return [BaseRow(**row) for row in branch_table(folder, branch)["base"]]


def is_placeholder(folder: Path, branch: str) -> bool:
    """Whether a branch stands in for others: it takes any base and preset, and uses its own."""
    return bool(branch_table(folder, branch).get("placeholder", False))


def render_config(folder: Path, branch: str) -> RenderConfig:
    return RenderConfig(**branch_table(folder, branch)["render"])


@dataclass(frozen=True, config=CHECKED)
class ControlRow:
    """The hub repository of a control model; the names are those of `BaseRow`."""

    repository: str
    revision: str | None = None
    variant: str | None = None


def control_row(folder: Path, branch: str, kind: str) -> ControlRow | None:
    """Where the control model of this kind comes from; None: the branch has none."""
    row = branch_table(folder, branch).get("control", {}).get(kind)
    return ControlRow(**row) if row else None


def default_token(folder: Path, branch: str) -> str:
    return str(branch_table(folder, branch)["token"])


def default_model_type(folder: Path, branch: str) -> str:
    return str(branch_table(folder, branch)["model_type"])


def branch_warnings(folder: Path, branch: str) -> list[str]:
    """What a user of this branch must know."""
    return list(branch_table(folder, branch).get("warnings", []))


def list_presets(folder: Path) -> list[str]:
    """Every TOML in the folder that is not named after a branch: the project's presets and a user's own."""
    names = []
    for path in folder.glob("*.toml"):
        if printable(path.name) != path.name:
            warn_once(path, f"{printable(path.name)} is no preset: its name is not UTF-8; rename it")
        elif path.stem not in BRANCHES:
            names.append(path.stem)
    return sorted(names)


def model_types(folder: Path, branch: str) -> list[str]:
    """What can be trained on a branch."""
    return [method for method in METHODS if method in branch_table(folder, branch)]


def why_not(folder: Path, branch: str) -> dict[str, str]:
    """Why a branch does not have a model type."""
    return dict(branch_table(folder, branch).get("why_not", {}))


def method_of(folder: Path, branch: str, model_type: str) -> str:
    """What a model type means on a branch: sdxl1 takes lora for pti, as the hosted service does."""
    return str(branch_table(folder, branch).get("instead", {}).get(model_type, model_type))


def least_gib(folder: Path, branch: str, model_type: str) -> float:
    """Free card memory below which this cannot be trained at all, in GiB."""
    return float(branch_table(folder, branch)[model_type].get("least_gib", 0))
