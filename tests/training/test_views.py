"""The pictures of a training set, one after the other: decoded once, and never two in memory."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
from PIL import Image

from tests.helpers.training import TrainingSetup, config_of
from trainer.training import views
from trainer.training.views import Opened, Picture


def test_a_picture_is_freed_before_the_next_one_is_decoded(
    tmp_path: Path, thin_sd15: Path, photos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[weakref.ref[Image.Image]] = []
    left: list[int] = []  # pictures in memory when the next one is read
    read = views.read

    def spy(picture: Picture, folder: Path) -> Opened:
        left.append(sum(image() is not None for image in decoded))
        opened = read(picture, folder)
        decoded.append(weakref.ref(opened.image))
        return opened

    setup = TrainingSetup(thin_sd15, tmp_path, photos, config_of(resolution="32,64"))
    monkeypatch.setattr(views, "read", spy)
    setup.start()
    assert left == [0] * len(photos)
