"""The TOML of a branch: rendering defaults, base models, ControlNets, model types."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from trainer.config.detection import Detection, detection
from trainer.config.kinds import KINDS, OTHER_KIND, STYLE_KIND
from trainer.config.toml_file import CHECKED, Table, read_toml
from trainer.contract.errors import InvalidRequest
from trainer.files import Unreadable, printable, warn_once
from trainer.names import BRANCHES, DEFAULT_METHOD, METHODS

PROGRAM = Path(__file__).parents[2] / "presets"  # the setting `presets` may name another folder
MOST_GIB = 1e6
# Tables that describe a family, and that no user changes.
FACTS = ("detect", "placeholder", "face_adapter", "readers", "base", "caption_tokens")


@dataclass(frozen=True, config=CHECKED)
class RenderConfig:
    """Rendering defaults: sampling steps, guidance, width and height in pixels."""

    steps: int
    cfg_scale: float
    w: int
    h: int
    hires_strength: float = 0.4  # denoising strength of hires_fix; 0: it has no effect
    face_strength: float = 0.5  # denoising strength of inpaint_faces
    multiple: int = 8  # both sides are multiples of so many pixels
    fixed_size: int | None = None  # the longer side in pixels, of a base that renders only one size
    negative_prompt: bool = True  # False: the family does not use one
    schedulers: bool = True  # False: the family has its own sampler
    preview: str | None = None  # the hub repository of a tiny decoder (TAESD)


@dataclass(frozen=True, config=CHECKED)
class BaseRow:
    """A base model. id: its number in the hosted service's gallery (0: it has none)."""

    title: str
    repository: str | None = None
    id: int = 0
    folder: str | None = None  # in trainer/branches/, if the base is part of the program
    revision: str | None = None
    variant: str | None = None  # of its weight files: `fp16` if the repository has them twice


class BranchFile(BaseModel):
    """The keys of a branch's TOML that are checked when it is read. Hyperparameters are checked when they are used."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    token: str
    model_type: str
    placeholder: bool = False
    caption_tokens: int | None = Field(None, gt=0)
    warnings: list[str] = []
    without: list[str] = []
    why_not: dict[str, str] = {}
    instead: dict[str, str] = {}
    face_adapter: dict[str, str | int | float] | None = None
    readers: dict[str, str] = {}


def check_branch(table: Table) -> None:
    """Check the TOML of a branch. Raises ValueError."""
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
    """Check the table of a model type, but for its hyperparameters. Raises ValueError."""
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

    If the user's folder is of an older version, FACTS come from the program's TOML. Raises InvalidRequest if one of the
    TOMLs is broken: values are not guessed.
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
    """The families that have their own files, the newest first: it is tried before the families that it resembles.

    A branch whose TOML is broken is left out.
    """
    found = {}
    for branch in reversed(BRANCHES):
        if branch_problem(folder, branch) is None and (one := detection_of(folder, branch)):
            found[branch] = one
    return found


def detection_of(folder: Path, branch: str) -> Detection | None:
    """The detection of one family; None: it has no files of its own."""
    table = branch_table(folder, branch).get("detect")
    return None if table is None else detection(table)


def base_rows(folder: Path, branch: str) -> list[BaseRow]:
    """The base models of a branch; the first one is the default."""
    return [BaseRow(**row) for row in branch_table(folder, branch)["base"]]


def is_placeholder(folder: Path, branch: str) -> bool:
    """Whether a branch replaces others in tests and demos: it accepts any base and preset, and uses its own."""
    return bool(branch_table(folder, branch).get("placeholder", False))


def render_config(folder: Path, branch: str) -> RenderConfig:
    return RenderConfig(**branch_table(folder, branch)["render"])


@dataclass(frozen=True, config=CHECKED)
class ControlRow:
    """The hub repository of a ControlNet; the fields are those of `BaseRow`."""

    repository: str
    revision: str | None = None
    variant: str | None = None


def control_row(folder: Path, branch: str, kind: str) -> ControlRow | None:
    """The ControlNet of a kind; None: the branch has none."""
    row = branch_table(folder, branch).get("control", {}).get(kind)
    return ControlRow(**row) if row else None


def default_token(folder: Path, branch: str) -> str:
    return str(branch_table(folder, branch)["token"])


def caption_tokens(folder: Path, branch: str) -> int | None:
    """How many tokens of a caption the text encoder reads, without the marks at both ends; None: not known."""
    number = branch_table(folder, branch).get("caption_tokens")
    return None if number is None else int(number)


def default_model_type(folder: Path, branch: str) -> str:
    return str(branch_table(folder, branch)["model_type"])


def branch_warnings(folder: Path, branch: str) -> list[str]:
    """Warnings for each tune of a branch."""
    return list(branch_table(folder, branch).get("warnings", []))


def list_presets(folder: Path) -> list[str]:
    """The presets: every TOML in the folder that is not named after a branch."""
    names = []
    for path in folder.glob("*.toml"):
        if printable(path.name) != path.name:
            warn_once(path, f"{printable(path.name)} is no preset: its name is not UTF-8; rename it")
        elif path.stem not in BRANCHES:
            names.append(path.stem)
    return sorted(names)


def model_types(folder: Path, branch: str) -> list[str]:
    """The model types of a branch."""
    return [method for method in METHODS if method in branch_table(folder, branch)]


def readers(folder: Path, branch: str) -> dict[str, str]:
    """The programs that read each format of a LoRA of the branch; FORMATS has the names of the formats."""
    return dict(branch_table(folder, branch).get("readers", {}))


def why_not(folder: Path, branch: str) -> dict[str, str]:
    """The reasons why a branch does not have some model types."""
    return dict(branch_table(folder, branch).get("why_not", {}))


def method_of(folder: Path, branch: str, model_type: str) -> str:
    """The method of a model type on a branch: on sdxl1, lora means pti, as at the hosted service."""
    return str(branch_table(folder, branch).get("instead", {}).get(model_type, model_type))


def least_gib(folder: Path, branch: str, model_type: str) -> float:
    """The free card memory that training needs at least, in GiB."""
    return float(branch_table(folder, branch)[model_type].get("least_gib", 0))
