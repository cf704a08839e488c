"""The TOML of a branch: rendering defaults, base models, ControlNets, model types."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trainer.config.toml_file import Table, read_toml
from trainer.names import BRANCHES, METHODS

PROGRAM = Path(__file__).parents[2] / "presets"  # the setting `presets` may name another folder
FACTS = ("detect", "placeholder", "face_adapter", "base")  # tables that describe a family, and that no user changes


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class BaseRow:
    """A base model. id: its number in the hosted service's gallery (0: it has none)."""

    title: str
    repository: str | None = None
    id: int = 0
    folder: str | None = None  # in trainer/branches/, if the base is part of the program
    revision: str | None = None
    variant: str | None = None  # of its weight files: `fp16` if the repository has them twice


def branch_table(folder: Path, branch: str) -> Table:
    """The TOML of a branch.

    If the user's folder is of an older version, FACTS come from the program's TOML.
    """
    tables = [read_toml(path / f"{branch}.toml") for path in (PROGRAM, folder) if (path / f"{branch}.toml").exists()]
    if not tables:
        raise FileNotFoundError(f"there is no {branch}.toml in {folder}")
    return {key: value for key, value in tables[0].items() if key in FACTS} | tables[-1]


def base_rows(folder: Path, branch: str) -> list[BaseRow]:
    """The base models of a branch; the first one is the default."""
    return [BaseRow(**row) for row in branch_table(folder, branch).get("base", [])]


def is_placeholder(folder: Path, branch: str) -> bool:
    """Whether a branch replaces others in tests and demos: it accepts any base and preset, and uses its own."""
    return bool(branch_table(folder, branch).get("placeholder", False))


def render_config(folder: Path, branch: str) -> RenderConfig:
    return RenderConfig(**branch_table(folder, branch)["render"])


@dataclass(frozen=True)
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


def default_model_type(folder: Path, branch: str) -> str:
    return str(branch_table(folder, branch)["model_type"])


def branch_warnings(folder: Path, branch: str) -> list[str]:
    """Warnings for each tune of a branch."""
    return list(branch_table(folder, branch).get("warnings", []))


def list_presets(folder: Path) -> list[str]:
    """The presets: every TOML in the folder that is not named after a branch."""
    return sorted(path.stem for path in folder.glob("*.toml") if path.stem not in BRANCHES)


def model_types(folder: Path, branch: str) -> list[str]:
    """The model types of a branch."""
    return [method for method in METHODS if method in branch_table(folder, branch)]


def why_not(folder: Path, branch: str) -> dict[str, str]:
    """The reasons why a branch does not have some model types."""
    return dict(branch_table(folder, branch).get("why_not", {}))


def method_of(folder: Path, branch: str, model_type: str) -> str:
    """The method of a model type on a branch: on sdxl1, lora means pti, as at the hosted service."""
    return str(branch_table(folder, branch).get("instead", {}).get(model_type, model_type))


def least_gib(folder: Path, branch: str, model_type: str) -> float:
    """The free card memory that training needs at least, in GiB."""
    return float(branch_table(folder, branch)[model_type].get("least_gib", 0))
