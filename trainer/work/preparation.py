"""The photos of a tune before its training: analyzed once, and again where what was prepared is lost or damaged."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from trainer.config.train_config import TrainConfig
from trainer.contract.errors import AnalysisUnavailable
from trainer.contract.photos import Photo
from trainer.contract.rows import TuneRow
from trainer.contract.run_files import PreparedPhoto
from trainer.files import Unreadable, write_whole
from trainer.photos.analysis import PhotoAnalyzer
from trainer.photos.intake import SAME_PICTURE
from trainer.photos.unfinished import remove_unfinished
from trainer.studio.store import Store
from trainer.training.views import PUT_BACK, PUT_COPY
from trainer.work.reporter import Reporter
from trainer.work.run_files import (
    damage,
    has_begun,
    is_changed,
    is_lost,
    is_whole,
    prepared,
    restored,
    with_digests,
)

LOST = "it is missing"  # first words of the reason why a photo is left out
FOUND_BY_ANALYSIS = ("faces", "same_person", "cropped", "restored", "masks", "dropped")  # of a verdict


class JobInterrupted(Exception):
    """The job must stop before training begins."""


def prepare_photos(
    folder: Path, store: Store, analyzer: PhotoAnalyzer, tune: TuneRow, config: TrainConfig, reporter: Reporter
) -> TuneRow:
    """Analyze the photos of a tune and write `dataset/`, unless that is there. Returns the row with the verdicts.

    folder: of the tune. A photo that is missing is left out, with a warning. Raises Unreadable where none is left, and
    for files that a user must repair.
    """
    photos, why = usable(folder, tune)
    if photos is None:
        photos = analyze(folder, analyzer, tune, config, reporter)
        if why:
            reporter.warn(f"the photos were analyzed again, because {why}")
        write_whole(folder / "dataset" / "prepared.json", json.dumps([photo.model_dump() for photo in photos]))
    leave_out_lost(photos, folder)
    for message in lost_or_changed(photos, folder):
        reporter.warn(message)
    store.update("tunes", tune["id"], photos=verdicts(photos))
    row = store.get("tunes", tune["id"])
    assert row is not None, "a job is deleted together with its rows"
    return row


def usable(folder: Path, tune: TuneRow) -> tuple[list[PreparedPhoto] | None, str]:
    """The verdicts on photos that are prepared; or None, and why they must be prepared again ("": the first time)."""
    done = folder / "dataset" / "prepared.json"
    if not done.exists() and not has_begun(folder):
        return None, ""
    try:
        photos = prepared(done, tune)
    except Unreadable as problem:
        return None, f"dataset/{problem}"
    if back := [photo.name for photo in photos if is_back(photo, folder)]:
        return None, f"{', '.join(back)} was put back"
    if why := damage(photos, folder):
        return None, why
    return photos, ""


def is_back(photo: Photo, folder: Path) -> bool:
    left_out = photo.dropped is not None and photo.dropped.startswith(LOST)
    return left_out and not is_lost(photo.model_copy(update={"dropped": None}), folder)


def analyze(
    folder: Path, analyzer: PhotoAnalyzer, tune: TuneRow, config: TrainConfig, reporter: Reporter
) -> list[PreparedPhoto]:
    """Analyze the photos that are there, and write `dataset/`. Raises Unreadable, AnalysisUnavailable."""
    photos = [as_uploaded(Photo.model_validate(photo)) for photo in tune["photos"]]
    if only := [photo for photo in photos if is_lost(photo, folder) and restored(photo, folder).exists()]:
        raise Unreadable(
            f"the pictures in dataset/ are damaged, and they cannot be made again: {named(only)} missing. {PUT_COPY}"
        )
    leave_out_lost(photos, folder)
    remove_unfinished(folder / "dataset")

    def progress(what: str, number: int, of: int) -> None:
        reporter.stage(f"{what}: {number} of {of}")
        if not reporter.may_continue():
            raise JobInterrupted

    before = sum(not photo["dropped"] for photo in tune["photos"])
    try:
        found, warnings = analyzer.prepare(
            folder, photos, config, tune["name"], bool(tune["training_face_correct"]), progress
        )
    except AnalysisUnavailable:
        for photo in photos:
            if not photo.dropped and not is_whole(folder / "images" / photo.file):
                raise Unreadable(f"{named([photo])} no picture, or a broken one. {PUT_BACK}") from None
        raise
    if (left := sum(not photo.dropped for photo in found)) < before:
        warnings.append(f"{left} of {before} photos are left; steps and batch are those for {before}")
    for warning in warnings:
        reporter.warn(warning)
    for photo in found:
        photo.notes = list(dict.fromkeys(photo.notes))
    return with_digests(found, folder)


def as_uploaded(photo: Photo) -> Photo:
    """A verdict without what an earlier analysis has found."""
    kept = {"dropped"} if photo.dropped and photo.dropped.startswith(SAME_PICTURE) else set()
    fields = {name: Photo.model_fields[name].default for name in FOUND_BY_ANALYSIS if name not in kept}
    return photo.model_copy(update=fields | {"masks": [], "notes": list(photo.notes)})


def leave_out_lost(photos: Sequence[Photo], folder: Path) -> None:
    """Drop the photos that are missing, unless their restored version is there. Raises Unreadable if none is left."""
    lost = [photo for photo in photos if is_lost(photo, folder) and not restored(photo, folder).exists()]
    if lost and all(photo.dropped for photo in photos if photo not in lost):
        raise Unreadable(f"no photo of this tune is left: {named(lost)} missing. {PUT_COPY}")
    for photo in lost:
        photo.dropped = f"{LOST}: there is no images/{photo.file} any more"


def lost_or_changed(photos: Sequence[PreparedPhoto], folder: Path) -> list[str]:
    """Warnings about photos that were lost or changed after they were prepared. folder: of the tune."""
    lost = [photo for photo in photos if photo.dropped and photo.dropped.startswith(LOST)]
    messages = [f"{named(lost)} missing: training goes on without. {PUT_COPY}"] if lost else []
    for photo in photos:
        if not photo.dropped and restored(photo, folder).exists():
            state = "missing" if is_lost(photo, folder) else "changed" if is_changed(photo, folder) else ""
            if state:
                messages.append(f"{named([photo])} {state}: its restored version, from before, is trained")
    return messages


def named(photos: Sequence[Photo]) -> str:
    """`a.jpg (images/000.jpg) is`"""
    names = ", ".join(f"{photo.name} (images/{photo.file})" for photo in photos)
    return f"{names} {'is' if len(photos) == 1 else 'are'}"


def verdicts(photos: Sequence[Photo]) -> list[dict[str, object]]:
    """The form in which the store keeps them."""
    return [photo.model_dump(include=set(Photo.model_fields)) for photo in photos]
