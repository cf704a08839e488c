"""What all tests share: no network, the tiny models, settings in a folder of their own."""

from __future__ import annotations

import os

# Read when the libraries are imported. One thread: models this small lose more to threads than they gain.
os.environ |= {"HF_HUB_OFFLINE": "1", "GRADIO_ANALYTICS_ENABLED": "False"}
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers import shift
from tests.helpers.shared import SHARED
from trainer.settings import Settings, read_settings

SHIFT = os.environ.get("TUNEBOOTH_TEST_SHIFT") == "1"
if SHIFT:
    shift.shift_files()  # before safetensors.torch is imported


@pytest.fixture(autouse=True)
def shifted(request: pytest.FixtureRequest) -> Iterator[None]:
    """With TUNEBOOTH_TEST_SHIFT=1, odd buffers that are allocated first and kept through the test."""
    kept = shift.odd_buffers(request.node.nodeid) if SHIFT else []
    yield
    kept.clear()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Settings with folders of their own, which are empty."""
    return read_settings(outputs=tmp_path / "outputs", models=tmp_path / "models")


@pytest.fixture(scope="session")
def tiny_sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion 1.5 as a diffusers folder. Read only: copy it to change it."""
    from tests.helpers import tiny  # torch and diffusers, which the tests of the web side do without

    return tiny.make_tiny_sd15(tmp_path_factory.mktemp("tiny") / "sd15")


@pytest.fixture(scope="session")
def tiny_sd15_file(tiny_sd15: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as one file in the original layout, its sidecar folder beside it. Read only."""
    from tests.helpers import tiny

    return tiny.write_single_file(tiny_sd15, tmp_path_factory.mktemp("tiny") / "sd15.safetensors")


@pytest.fixture(scope="session")
def thin_sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion 1.5 of two blocks with a layer each, for tests that train: 10 ms a step. Read only."""
    from tests.helpers import tiny

    return tiny.make_tiny_sd15(tmp_path_factory.mktemp("tiny") / "thin", blocks=2, layers=1)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three small pictures."""
    from tests.helpers import training

    return training.write_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="session")
def dog_photos() -> Callable[[int], list[Path]]:
    """dog_photos(n): the first n photos of a dog. Skips the test where they are not on this machine."""

    def photos(count: int) -> list[Path]:
        found = sorted((SHARED / "data" / "subjects" / "dog").glob("*.jpg"))[:count]
        if len(found) < count:
            pytest.skip("the photos in ../shared/data are not on this machine")
        return found

    return photos


@pytest.fixture(scope="session")
def tiny_sdxl1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SDXL 1.0 as a diffusers folder. Read only: copy it to change it."""
    from tests.helpers import tiny

    return tiny.make_tiny_sdxl1(tmp_path_factory.mktemp("tiny") / "sdxl1")


@pytest.fixture(scope="session")
def tiny_sdxl1_file(tiny_sdxl1: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as one file in the original layout, its sidecar folder beside it. Read only."""
    from tests.helpers import tiny

    return tiny.write_single_file(tiny_sdxl1, tmp_path_factory.mktemp("tiny") / "sdxl1.safetensors")


@pytest.fixture(scope="session")
def tiny_flux1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny FLUX.1-dev as a diffusers folder. Read only: copy it to change it."""
    from tests.helpers import tiny

    return tiny.make_tiny_flux1(tmp_path_factory.mktemp("tiny") / "flux1")


@pytest.fixture(scope="session")
def tiny_flux1_file(tiny_flux1: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same transformer as one file in the original layout; its sidecar folder has the other parts. Read only."""
    from tests.helpers import tiny

    return tiny.write_flux_file(tiny_flux1, tmp_path_factory.mktemp("tiny") / "flux1.safetensors")
