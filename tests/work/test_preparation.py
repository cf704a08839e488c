"""Photos and prepared pictures that are lost, damaged or changed before a tune is resumed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.helpers.training import config_of
from trainer.contract.errors import AnalysisUnavailable
from trainer.contract.photos import Photo
from trainer.files import Unreadable
from trainer.photos.faces import write
from trainer.work.preparation import prepare_photos

NAMES = ("rex.jpg", "lying.jpg", "far.jpg")
PYTHON = ("Error", "[Errno", "Traceback", "cannot identify", "None")


class Analyzer:
    """Makes a mask of each photo, and restores the first one. It counts its runs."""

    def __init__(self) -> None:
        self.runs = 0

    def prepare(self, folder: Path, photos: list[Photo], *_: Any) -> tuple[list[Photo], list[str]]:
        self.runs += 1
        for photo in photos:
            if photo.dropped:
                continue
            stem = Path(photo.file).stem
            try:
                with Image.open(folder / "images" / photo.file) as opened:
                    image = opened.convert("RGB")
            except OSError as problem:
                raise AnalysisUnavailable(f"{photo.name} could not be analyzed: {problem}") from problem
            write(Image.new("L", image.size, 255), folder / "dataset/masks/subject" / f"{stem}.png")
            photo.masks = ["subject"]
            photo.notes.append("looked at")
            if stem == "000":
                write(image, folder / "dataset/restored" / f"{stem}.jpg")
                photo.restored = True
        return photos, []


class Rows:
    """The one row of the tune, in place of the store."""

    def __init__(self, row: dict[str, Any]) -> None:
        self.row = row

    def update(self, _table: str, _row_id: int, **values: Any) -> None:
        self.row |= values

    def get(self, _table: str, _row_id: int) -> dict[str, Any]:
        return self.row


class Told:
    """A reporter that remembers warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, message: str) -> None:
        self.warnings.append(message)


class Tune:
    """A tune with its folder, as `prepare_photos` sees it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.analyzer = Analyzer()
        (folder / "images").mkdir(parents=True)
        photos = []
        for number, name in enumerate(NAMES):
            file = f"{number:03d}.png"
            Image.new("RGB", (16, 16), (9 * number, 0, 0)).save(folder / "images" / file)
            photos.append(Photo(name=name, file=file, width=16, height=16, format="PNG"))
        row = {"id": 1, "name": "dog", "training_face_correct": False, "photos": [one.model_dump() for one in photos]}
        self.rows = Rows(row)

    def prepare(self) -> list[str]:
        """The warnings."""
        told = Told()
        arguments: Any = self.folder, self.rows, self.analyzer, self.rows.row, config_of(), told
        prepare_photos(*arguments)
        return told.warnings

    def trained(self) -> list[str]:
        return [photo["name"] for photo in self.rows.row["photos"] if not photo["dropped"]]


@pytest.fixture
def tune(tmp_path: Path) -> Tune:
    """A tune whose training has begun."""
    tune = Tune(tmp_path / "1")
    assert tune.prepare() == [] and tune.analyzer.runs == 1
    (tune.folder / "config.json").write_text("{}")
    assert tune.prepare() == [] and tune.analyzer.runs == 1
    return tune


def delete(*paths: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        for path in paths:
            (folder / path).unlink()

    return spoil


def without(path: str) -> Callable[[Path], None]:
    return lambda folder: shutil.rmtree(folder / path)


def cut(path: str) -> Callable[[Path], None]:
    return lambda folder: (folder / path).write_bytes((folder / path).read_bytes()[:40])


def replace(path: str, size: tuple[int, int] = (16, 16)) -> Callable[[Path], None]:
    return lambda folder: Image.new("RGB", size, "blue").save(folder / path)


def of_another_tune(folder: Path) -> None:
    file = folder / "dataset/prepared.json"
    photos = json.loads(file.read_text())
    file.write_text(json.dumps([photo | {"name": f"other {photo['name']}"} for photo in photos]))


def several(*spoilers: Callable[[Path], None]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        for one in spoilers:
            one(folder)

    return spoil


AGAIN = "the photos were analyzed again, because "
GOES_ON: list[tuple[str, Callable[[Path], None], int, list[str], list[str]]] = [
    # what happened, how, runs of the analysis, what is trained, the beginnings of the warnings
    (
        "a photo with a restored version is lost",
        delete("images/000.png"),
        1,
        [*NAMES],
        ["rex.jpg (images/000.png) is missing: its restored version, from before, is trained"],
    ),
    (
        "a photo with a restored version is changed",
        replace("images/000.png"),
        1,
        [*NAMES],
        ["rex.jpg (images/000.png) is changed: its restored version, from before, is trained"],
    ),
    (
        "another photo is lost",
        delete("images/001.png"),
        1,
        ["rex.jpg", "far.jpg"],
        ["lying.jpg (images/001.png) is missing: training goes on without"],
    ),
    (
        "two photos are lost",
        delete("images/001.png", "images/002.png"),
        1,
        ["rex.jpg"],
        ["lying.jpg (images/001.png), far.jpg (images/002.png) are missing: training goes on without"],
    ),
    ("a photo is changed", replace("images/001.png"), 2, [*NAMES], [f"{AGAIN}lying.jpg was changed"]),
    ("a photo has another size", replace("images/002.png", (32, 8)), 2, [*NAMES], [f"{AGAIN}far.jpg was changed"]),
    ("a photo is added", replace("images/009.png"), 1, [*NAMES], []),
    ("dataset is lost", without("dataset"), 2, [*NAMES], [f"{AGAIN}dataset/prepared.json is missing"]),
    (
        "the verdicts are lost",
        delete("dataset/prepared.json"),
        2,
        [*NAMES],
        [f"{AGAIN}dataset/prepared.json is missing"],
    ),
    ("the verdicts are cut", cut("dataset/prepared.json"), 2, [*NAMES], [f"{AGAIN}dataset/prepared.json is damaged"]),
    (
        "the verdicts are on others",
        of_another_tune,
        2,
        [*NAMES],
        [f"{AGAIN}dataset/prepared.json is about other photos"],
    ),
    (
        "a mask is lost",
        delete("dataset/masks/subject/001.png"),
        2,
        [*NAMES],
        [f"{AGAIN}dataset/masks/subject/001.png is missing"],
    ),
    (
        "a mask is cut",
        cut("dataset/masks/subject/001.png"),
        2,
        [*NAMES],
        [f"{AGAIN}dataset/masks/subject/001.png is damaged"],
    ),
    (
        "a restored photo is cut",
        cut("dataset/restored/000.jpg"),
        2,
        [*NAMES],
        [f"{AGAIN}dataset/restored/000.jpg is damaged"],
    ),
    ("a mask is another one", replace("dataset/masks/subject/001.png"), 1, [*NAMES], []),  # a user may draw one
    (
        "a photo and its mask are lost",
        delete("images/001.png", "dataset/masks/subject/001.png"),
        1,
        ["rex.jpg", "far.jpg"],
        ["lying.jpg (images/001.png) is missing: training goes on without"],
    ),
    (
        "dataset and a photo are lost",
        several(without("dataset"), delete("images/001.png")),
        2,
        ["rex.jpg", "far.jpg"],
        [
            "2 of 3 photos are left",
            f"{AGAIN}dataset/prepared.json is missing",
            "lying.jpg (images/001.png) is missing: training goes on without",
        ],
    ),
]


@pytest.mark.parametrize(
    ("spoil", "runs", "trained", "warnings"), [row[1:] for row in GOES_ON], ids=[r[0] for r in GOES_ON]
)
def test_a_tune_goes_on_and_says_what_was_lost_or_changed(
    tune: Tune, spoil: Callable[[Path], None], runs: int, trained: list[str], warnings: list[str]
) -> None:
    spoil(tune.folder)
    found = tune.prepare()
    assert [message[: len(begin)] for message, begin in zip(found, warnings, strict=True)] == warnings
    assert (tune.analyzer.runs, tune.trained()) == (runs, trained)
    assert not any(word in message for word in PYTHON for message in found)
    assert not any("if it is deleted" in message for message in found)  # it is already
    assert all(photo["notes"] in ([], ["looked at"]) for photo in tune.rows.row["photos"])
    assert all(photo.keys() == set(Photo.model_fields) for photo in tune.rows.row["photos"])
    again = tune.prepare()
    assert tune.analyzer.runs == runs and not any(message.startswith(AGAIN) for message in again)


REFUSED: list[tuple[str, Callable[[Path], None], str]] = [
    (
        "all photos are lost",
        several(without("images"), without("dataset")),
        "no photo of this tune is left: rex.jpg (images/000.png), lying.jpg (images/001.png), far.jpg (images/002.png)"
        " are missing. Put a copy in its place and resume the tune",
    ),
    (
        "a broken photo must be analyzed again",
        several(cut("images/001.png"), without("dataset")),
        "lying.jpg (images/001.png) is no picture, or a broken one. Put a copy in its place",
    ),
    (
        "the only version of a photo is in dataset, and that must be made again",
        several(delete("images/000.png", "dataset/masks/subject/001.png")),
        "the pictures in dataset/ are damaged, and they cannot be made again: rex.jpg (images/000.png) is missing",
    ),
    (
        "a photo cannot be reached",
        several(delete("images/001.png"), lambda folder: (folder / "images/001.png").symlink_to("001.png")),
        "001.png cannot be read: Too many levels of symbolic links (in images). Repair that, and resume the tune",
    ),
]


@pytest.mark.parametrize(("spoil", "message"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_a_tune_is_refused_and_says_what_to_do(tune: Tune, spoil: Callable[[Path], None], message: str) -> None:
    spoil(tune.folder)
    before = sorted(tune.folder.rglob("*"))
    with pytest.raises(Unreadable) as refused:
        tune.prepare()
    assert str(refused.value).startswith(message)
    assert not any(word in str(refused.value) for word in PYTHON)
    # What is missing is deleted already, and nothing can be trained without it.
    assert ("if it is deleted" in str(refused.value)) == ("a broken one" in message)
    assert set(before) <= set(tune.folder.rglob("*"))  # nothing is lost by it


def test_a_photo_that_is_put_back_is_trained_again(tune: Tune, tmp_path: Path) -> None:
    file = tune.folder / "images/001.png"
    content = file.read_bytes()
    for lost in (lambda: None, lambda: shutil.rmtree(tune.folder / "dataset")):
        lost()
        file.unlink(missing_ok=True)
        tune.prepare()
        assert tune.trained() == ["rex.jpg", "far.jpg"]
        file.write_bytes(content)
        tune.prepare()
        assert tune.trained() == [*NAMES]


def test_a_photo_that_is_lost_before_the_first_start_is_left_out(tmp_path: Path) -> None:
    tune = Tune(tmp_path / "1")
    (tune.folder / "images/001.png").unlink()
    warnings = tune.prepare()
    assert warnings[0].startswith("2 of 3 photos are left")
    assert warnings[1].startswith("lying.jpg (images/001.png) is missing: training goes on without")
    assert tune.trained() == ["rex.jpg", "far.jpg"]
