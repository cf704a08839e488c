"""Class pictures belong to the content of the base that drew them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from trainer.library.bases import Base
from trainer.library.versions import changed_at
from trainer.training.class_pictures import folder_of

WHAT = "dog-64"


@pytest.fixture
def base(tmp_path: Path) -> Base:
    file = tmp_path / "models" / "mine.safetensors"
    (file.with_suffix("") / "scheduler").mkdir(parents=True)
    (file.with_suffix("") / "scheduler" / "scheduler_config.json").write_text("{}")
    write(file, 1)
    return Base(7, "mine", "sd15", path=file)


def write(file: Path, number: float, **markers: torch.Tensor) -> None:
    save_file({"model.diffusion_model.out.2.weight": torch.full((4, 4), float(number)), **markers}, file)


def test_a_base_with_other_content_has_other_class_pictures(base: Base, tmp_path: Path) -> None:
    assert base.path is not None
    first = folder_of(base, WHAT, tmp_path / "class")
    assert folder_of(base, WHAT, tmp_path / "class") == first and first.name.endswith("-dog-64")
    write(base.path, 2)
    second = folder_of(base, WHAT, tmp_path / "class")
    (base.path.with_suffix("") / "scheduler" / "scheduler_config.json").write_text(
        '{"prediction_type": "v_prediction"}'
    )
    third = folder_of(base, WHAT, tmp_path / "class")
    lora = tmp_path / "lora.safetensors"
    write(lora, 3)
    merged = folder_of(Base(7, "mine", "sd15", path=base.path, model=lora), WHAT, tmp_path / "class")
    assert len({first, second, third, merged, folder_of(base, "cat-64", tmp_path / "class")}) == 5


def test_a_base_that_was_moved_keeps_its_class_pictures(base: Base, tmp_path: Path) -> None:
    assert base.path is not None
    first = folder_of(base, WHAT, tmp_path / "class")
    moved = tmp_path / "elsewhere" / "other.safetensors"
    shutil.copytree(base.path.with_suffix(""), moved.with_suffix(""))
    shutil.copy(base.path, moved)
    assert folder_of(Base(8, "other", "sd15", path=moved), WHAT, tmp_path / "class") == first


def test_a_part_that_is_a_link_to_a_folder_elsewhere_counts(tmp_path: Path) -> None:
    """People link a UNet or a text encoder of several GB into the folders of several models."""
    folder, elsewhere = tmp_path / "models" / "mine", tmp_path / "drive" / "unet"
    folder.mkdir(parents=True)
    elsewhere.mkdir(parents=True)
    (folder / "unet").symlink_to(elsewhere)
    base = Base(7, "mine", "sd15", path=folder)
    seen = set()
    for number in (1, 2):
        write(elsewhere / "diffusion_pytorch_model.safetensors", number)
        seen.add((folder_of(base, WHAT, tmp_path / "class"), base.weights))
    assert len({pictures for pictures, _ in seen}) == len({weights for _, weights in seen}) == 2


def earlier_cache(base: Base, cache: Path, drawn: float) -> Path:
    """Class pictures of version 0.2, which named them by the number of the base. drawn: at this time."""
    folder = cache / f"{base.id}-{WHAT}"
    folder.mkdir(parents=True)
    (folder / "0000.png").write_bytes(b"picture")
    os.utime(folder / "0000.png", (drawn, drawn))
    return folder


def test_class_pictures_of_an_earlier_version_go_on(base: Base, tmp_path: Path) -> None:
    assert base.path is not None
    earlier = earlier_cache(base, tmp_path / "class", changed_at([base.path]) + 60)
    folder = folder_of(base, WHAT, tmp_path / "class")
    assert [file.name for file in folder.iterdir()] == ["0000.png"] and not earlier.exists()


def test_those_of_a_base_that_was_changed_since_do_not(base: Base, tmp_path: Path) -> None:
    assert base.path is not None
    earlier_cache(base, tmp_path / "class", changed_at([base.path]) - 60)
    assert not folder_of(base, WHAT, tmp_path / "class").exists()


def test_nor_do_those_of_a_base_that_was_read_wrong(base: Base, tmp_path: Path) -> None:
    """An earlier version drew a base that predicts velocity as if it predicted noise."""
    assert base.path is not None
    write(base.path, 1, v_pred=torch.zeros(0))
    earlier_cache(base, tmp_path / "class", changed_at([base.path]) + 60)
    assert not folder_of(base, WHAT, tmp_path / "class").exists()
