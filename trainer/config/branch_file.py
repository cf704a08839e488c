"""The TOML of a branch: rendering defaults, base models, ControlNets, model types."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trainer.config.toml_file import Table, read_toml
from trainer.names import BRANCHES, METHODS

PROGRAM = Path(__file__).parents[2] / "presets"  # a user's own folder may take its place
FACTS = ("detect", "placeholder", "face_adapter", "base")  # what a family is, and not how a user wants it


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class BaseRow:
    """A base model by its number in the hosted service's gallery (0: it has none there)."""

    title: str
    repository: str | None = None
    id: int = 0
    folder: str | None = None  # in trainer/branches/, of a base that is part of the program
    revision: str | None = None
    variant: str | None = None  # of its weight files: `fp16` where the repository has them twice


def branch_table(folder: Path, branch: str) -> Table:
    """The TOML of a branch.

    Where a user's own folder is of an older version, the program's TOML says what the family is.
    """
    tables = [read_toml(path / f"{branch}.toml") for path in (PROGRAM, folder) if (path / f"{branch}.toml").exists()]
    if not tables:
        raise FileNotFoundError(f"there is no {branch}.toml in {folder}")
    return {key: value for key, value in tables[0].items() if key in FACTS} | tables[-1]


def base_rows(folder: Path, branch: str) -> list[BaseRow]:
    """The base models that a branch may start from; the first one is its default."""
    return [BaseRow(**row) for row in branch_table(folder, branch).get("base", [])]


def is_placeholder(folder: Path, branch: str) -> bool:
    """Whether a branch stands in for others: it takes any base and preset, and uses its own."""
    return bool(branch_table(folder, branch).get("placeholder", False))


def render_config(folder: Path, branch: str) -> RenderConfig:
    return RenderConfig(**branch_table(folder, branch)["render"])


@dataclass(frozen=True)
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
    return sorted(path.stem for path in folder.glob("*.toml") if path.stem not in BRANCHES)


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
