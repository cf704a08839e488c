"""How often the child that analyzes photos decodes one: once to find faces, once for all that is made of it.

All photos are searched for faces before anything is made of the first one, for the subject is who recurs. A large JPEG
is decoded at a half or less to find faces, so its pixels could not serve both.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from trainer.photos import faces
from trainer.photos.found import Found, Task

SIZE = 2400, 1800
FACE = Found((600, 400, 1400, 1200), 0.99, ((0.0, 0.0),) * 5, 500.0)


@pytest.fixture
def decodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """The size of every picture that is decoded."""
    sizes: list[tuple[int, int]] = []
    load = ImageFile.ImageFile.load

    def spy(image: ImageFile.ImageFile) -> object:
        if image.tile:  # else it is decoded already
            sizes.append(image.size)
        return load(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load", spy)
    yield sizes


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    file = tmp_path / "images" / "000.jpg"
    file.parent.mkdir()
    Image.linear_gradient("L").resize(SIZE).convert("RGB").save(file)
    return file


def test_faces_are_found_in_one_decode_of_half_the_size(
    picture: Path, decodes: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faces, "load_detector", lambda file: None)
    monkeypatch.setattr(faces, "detect", lambda image, model: np.zeros((0, 15)))
    assert faces.find(picture, Path("detector"), None) == []
    assert decodes == [(SIZE[0] // 2, SIZE[1] // 2)]


def test_all_that_is_made_of_a_photo_is_made_of_one_decode(picture: Path, decodes: list[tuple[int, int]]) -> None:
    task = Task(picture, picture.parents[1] / "dataset", "man", [FACE], [FACE], closeup=True, mask_face=True)
    made = faces.prepare(task)
    assert (made.closeup, made.masks) == (True, ["face"])
    assert sorted(file.name for file in task.folder.rglob("*.*")) == ["000-face.jpg", "000-face.png", "000.png"]
    assert decodes == [SIZE]
