"""The tiny bases of one family: to be read, loaded once, or as copies to be changed.

`family` says which; a file for one family defines that fixture anew.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import tiny
from tests.helpers.families import FAMILIES, Family
from trainer.library.models_folder import sidecar


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    """Each family in turn; `parametrize("family", NAMES, indirect=True)` for some of them."""
    return FAMILIES[request.param]


@pytest.fixture(scope="session")
def tiny_flux1_whole(tiny_flux1: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny FLUX.1 as one file with all parts in it, its sidecar without weights. Read only."""
    return tiny.write_flux_file(tiny_flux1, tmp_path_factory.mktemp("tiny") / "whole.safetensors", whole=True)


@pytest.fixture(scope="session")
def kept() -> dict[tuple[str, str], Any]:
    """What has been loaded or written and is not changed: (what, name of the base) -> it."""
    return {}


@pytest.fixture
def tiny_base(family: Family, request: pytest.FixtureRequest) -> Path:
    """The tiny model as a diffusers folder. Read only."""
    return request.getfixturevalue(f"tiny_{family.name}")


@pytest.fixture
def stock(family: Family, tiny_base: Path, kept: dict[tuple[str, str], Any]) -> Any:
    """The tiny model in diffusers' own pipeline. Read only."""
    if ("stock", family.name) not in kept:
        kept["stock", family.name] = family.load_stock(tiny_base)
    return kept["stock", family.name]


@pytest.fixture
def loaded(family: Family, tiny_base: Path, tmp_path: Path, kept: dict[tuple[str, str], Any]) -> Any:
    """The tiny model as our branch loads it, with all its parts. Read only."""
    if ("loaded", family.name) not in kept:
        kept["loaded", family.name] = family.load(tiny_base, tmp_path)
    return kept["loaded", family.name]


@pytest.fixture
def folder(tiny_base: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be changed."""
    return Path(shutil.copytree(tiny_base, tmp_path / "folder"))


@pytest.fixture
def file(family: Family, request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of the tiny single file and its sidecar, to be changed. FLUX.1's has the transformer alone, and its
    sidecar the other parts."""
    return copied(request.getfixturevalue(f"tiny_{family.name}_file"), tmp_path / "file.safetensors")


@pytest.fixture
def whole(family: Family, request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of the tiny single file with all parts in it and of its sidecar, to be changed."""
    kind = "file" if family.branch.whole_file else "whole"
    return copied(request.getfixturevalue(f"tiny_{family.name}_{kind}"), tmp_path / "whole.safetensors")


def copied(file: Path, copy: Path) -> Path:
    """A copy of a single file and of its sidecar."""
    shutil.copytree(sidecar(file), sidecar(copy))
    return Path(shutil.copy(file, copy))
