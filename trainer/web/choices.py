"""What the fields of the page offer; a broken TOML leaves its field empty, and the page is built."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from trainer.config import branch_file
from trainer.files import read_for_show
from trainer.names import BRANCHES, DEMO_BRANCH


def look_names(name: str, read: Callable[[Path], Mapping[str, object]], folder: Path) -> list[str]:
    """The names of styles or film looks; empty if their TOML is broken, which is logged."""
    return list(read_for_show(folder / "looks" / f"{name}.toml", lambda _: read(folder)) or ())


def usual_tokens(presets: Path) -> str:
    """The default token, and the branches with another one: `ohwx (sd15: sks)`."""
    tokens = {branch: token_of(presets, branch) for branch in BRANCHES}
    usual = tokens[DEMO_BRANCH] or ""
    others = ", ".join(f"{branch}: {token}" for branch, token in tokens.items() if token and token != usual)
    return f"{usual} ({others})" if others else usual


def token_of(presets: Path, branch: str) -> str | None:
    """The token of a branch; None if its TOML is broken: the request will be refused."""
    return None if branch_file.branch_problem(presets, branch) else branch_file.default_token(presets, branch)
