"""Styles, film looks, annotators and packs, from their TOMLs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pydantic.dataclasses import dataclass

from trainer.config.branch_file import ControlRow
from trainer.config.toml_file import CHECKED, Table, anything, read_toml
from trainer.files import Unreadable, printable


@dataclass(frozen=True, config=CHECKED)
class Style:
    """A style of prompts. prompt: a text in which {prompt} is the user's prompt. negative: added to the user's."""

    prompt: str
    negative: str = ""


def styles(folder: Path) -> dict[str, Style]:
    """The styles of prompts by their names. Raises Unreadable."""
    return _styles(looks(folder, "styles", _styles))


def _styles(table: Table) -> dict[str, Style]:
    return {name: Style(**_row(name, row)) for name, row in table.items()}


@dataclass(frozen=True, config=CHECKED)
class FilmLook:
    """The colours of a film: a matrix, then a saturation, then a tone curve for each channel; colours are 0 to 1.

    curves: points (x, y) of red, green and blue, by rising x. matrix: 3 x 3, a row for each channel of the result.
    """

    curves: tuple[tuple[tuple[float, float], ...], ...]
    saturation: float
    matrix: tuple[tuple[float, float, float], ...]


def film_looks(folder: Path) -> dict[str, FilmLook]:
    """The film looks of `color_grading`, by their names. Raises Unreadable."""
    return _film_looks(looks(folder, "film", _film_looks))


def _film_looks(table: Table) -> dict[str, FilmLook]:
    return {name: _film_look(name, _row(name, row)) for name, row in table.items()}


def _film_look(name: str, row: Table) -> FilmLook:
    try:
        return FilmLook(
            curves=tuple(tuple((x, y) for x, y in row[channel]) for channel in ("red", "green", "blue")),
            saturation=row["saturation"],
            matrix=tuple((red, green, blue) for red, green, blue in row["matrix"]),
        )
    except (LookupError, TypeError) as problem:
        raise ValueError(f"[{name}] is no film look ({problem})") from None


def _row(name: str, row: object) -> Table:
    if not isinstance(row, dict):
        raise ValueError(f"{name} must be a table, [{name}]")
    return row


def looks(folder: Path, name: str, check: Callable[[Table], object] = anything) -> Table:
    """The table of a TOML in `looks/`; empty if the user's folder has no such file. Raises Unreadable."""
    try:
        return read_toml(folder / "looks" / f"{name}.toml", check)
    except FileNotFoundError:
        return {}


def pack_tables(*folders: Path) -> dict[str, Table | str]:
    """The TOMLs of the packs in some folders, by their names; for an unreadable one, the error."""
    tables: dict[str, Table | str] = {}
    for file in (file for folder in folders for file in sorted(folder.glob("*.toml"))):
        try:
            tables[printable(file.stem)] = read_toml(file)
        except Unreadable as problem:
            tables[printable(file.stem)] = str(problem)
        except FileNotFoundError:  # deleted since it was listed
            continue
    return tables


def annotator_row(folder: Path, name: str) -> ControlRow:
    """The source of a model that a preprocessor uses: depth, people or pose.

    Raises ValueError if the user's folder does not name it.
    """
    rows = looks(folder, "annotators", _annotators)
    if name not in rows:
        raise ValueError(f"looks/annotators.toml has no [{name}]; copy the one of the program into the presets folder")
    return ControlRow(**rows[name])


def _annotators(table: Table) -> dict[str, ControlRow]:
    return {name: ControlRow(**_row(name, row)) for name, row in table.items()}
