"""Styles, film looks, annotators and packs, from their TOMLs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trainer.config.branch_file import ControlRow
from trainer.config.toml_file import Table, read_toml


@dataclass(frozen=True)
class Style:
    """A style of prompts. prompt: a text in which {prompt} is the user's prompt. negative: added to the user's."""

    prompt: str
    negative: str = ""


def styles(folder: Path) -> dict[str, Style]:
    """The styles of prompts by their names."""
    return {name: Style(**table) for name, table in looks(folder, "styles").items()}


@dataclass(frozen=True)
class FilmLook:
    """The colours of a film: a matrix, then a saturation, then a tone curve for each channel; colours are 0 to 1.

    curves: points (x, y) of red, green and blue, by rising x. matrix: 3 x 3, a row for each channel of the result.
    """

    curves: tuple[tuple[tuple[float, float], ...], ...]
    saturation: float
    matrix: tuple[tuple[float, float, float], ...]


def film_looks(folder: Path) -> dict[str, FilmLook]:
    """The film looks of `color_grading`, by their names."""
    return {
        name: FilmLook(
            curves=tuple(tuple((x, y) for x, y in row[channel]) for channel in ("red", "green", "blue")),
            saturation=row["saturation"],
            matrix=tuple((red, green, blue) for red, green, blue in row["matrix"]),
        )
        for name, row in looks(folder, "film").items()
    }


def looks(folder: Path, name: str) -> Table:
    """The table of a TOML in `looks/`; empty if the user's folder has no such file."""
    file = folder / "looks" / f"{name}.toml"
    return read_toml(file) if file.exists() else {}


def pack_tables(*folders: Path) -> dict[str, Table | str]:
    """The TOMLs of the packs in some folders, by their names; for an unreadable one, the error."""
    tables: dict[str, Table | str] = {}
    for file in (file for folder in folders for file in sorted(folder.glob("*.toml"))):
        try:
            tables[file.stem] = read_toml(file)
        except (OSError, ValueError, RecursionError) as problem:
            tables[file.stem] = f"{file.name} cannot be read: {problem}"
    return tables


def annotator_row(folder: Path, name: str) -> ControlRow:
    """The source of a model that a preprocessor uses: depth, people or pose.

    Raises ValueError if the user's folder does not name it.
    """
    rows = looks(folder, "annotators")
    if name not in rows:
        raise ValueError(f"looks/annotators.toml has no [{name}]; copy the one of the program into the presets folder")
    return ControlRow(**rows[name])
