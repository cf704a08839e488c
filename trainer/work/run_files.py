"""The files that decide how a tune is trained: its request, its photos and what was prepared of them.

A broken one is made again, or is an error: values are not guessed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from trainer.contract.photos import Photo
from trainer.contract.rows import TuneRow
from trainer.contract.run_files import ASKED, VERDICTS, PreparedPhoto
from trainer.files import Unreadable, is_there, read_json, steps_in, unreadable
from trainer.photos.geometry import FACE_SUFFIX
from trainer.photos.picture_file import open_picture
from trainer.photos.unfinished import MADE
from trainer.studio.idempotency import file_digest


def has_begun(folder: Path) -> bool:
    """Whether the training of a tune has begun before. folder: of the tune."""
    return is_there(folder / "config.json") or bool(steps_in(folder / "state"))


def prepared(file: Path, tune: TuneRow) -> list[PreparedPhoto]:
    """The verdicts on a tune's photos, from `dataset/prepared.json`. Raises Unreadable."""
    try:
        photos = read_json(file, VERDICTS)
    except FileNotFoundError:
        raise Unreadable(f"{file.name} is missing") from None
    except Unreadable:
        raise Unreadable(f"{file.name} is damaged") from None
    asked = [Photo.model_validate(photo) for photo in tune["photos"]]
    if [identity(photo) for photo in photos] != [identity(photo) for photo in asked]:
        raise Unreadable(f"{file.name} is about other photos")
    return photos


def identity(photo: Photo) -> tuple[str, str, int, int]:
    """What does not change in the verdict on a photo."""
    return photo.file, photo.name, photo.width, photo.height


def asked_args(file: Path) -> str | None:
    """The parameter args of the request, from `request.json`. Raises Unreadable."""
    try:
        return read_json(file, ASKED).args
    except (FileNotFoundError, Unreadable) as problem:
        why = f"{problem}" if isinstance(problem, Unreadable) else "request.json is missing"
        raise Unreadable(f"{why}. It holds what was asked for in args: put it back, or create the tune again") from None


def with_digests(photos: list[Photo], folder: Path) -> list[PreparedPhoto]:
    """Verdicts with the digests of the photos, and of what was made of them. folder: of the tune."""
    return [
        PreparedPhoto(
            **photo.model_dump(),
            sha256=digest_of(folder / "images" / photo.file),
            made={file.relative_to(folder / "dataset").as_posix(): digest_of(file) for file in made_of(photo, folder)},
        )
        for photo in photos
    ]


def made_of(photo: Photo, folder: Path) -> Iterator[Path]:
    """The files in `dataset/` that belong to a photo. folder: of the tune."""
    stem = Path(photo.file).stem
    for kind in MADE:
        for name in (stem, f"{stem}{FACE_SUFFIX}"):
            yield from sorted(file for file in (folder / "dataset" / kind).rglob(f"{name}.*") if file.is_file())


def digest_of(file: Path) -> str:
    """The sha256 of a file; "" where it cannot be read."""
    try:
        return file_digest(file)
    except OSError:
        return ""


def restored(photo: Photo, folder: Path) -> Path:
    """Where the restored version of a photo is, which is trained in its place. folder: of the tune."""
    return folder / "dataset" / "restored" / f"{Path(photo.file).stem}.jpg"


def is_lost(photo: Photo, folder: Path) -> bool:
    """Whether a photo that is to be trained is missing. folder: of the tune. Raises Unreadable if that is not known."""
    file = folder / "images" / photo.file
    try:
        file.stat()
    except (FileNotFoundError, NotADirectoryError):
        return photo.dropped is None
    except OSError as problem:
        raise Unreadable(f"{unreadable(file, problem)} (in images). Repair that, and resume the tune") from None
    return False


def damage(photos: list[PreparedPhoto], folder: Path) -> str | None:
    """Why the photos must be prepared again; None: they need not be. folder: of the tune."""
    return next((why for photo in photos if not photo.dropped and (why := damage_of(photo, folder))), None)


def damage_of(photo: PreparedPhoto, folder: Path) -> str | None:
    replaced = is_there(restored(photo, folder))
    if is_lost(photo, folder) and not replaced:
        return None  # it is left out
    for path, digest in photo.made.items():
        file = folder / "dataset" / path
        if not is_there(file):
            return f"dataset/{path} is missing"
        if digest_of(file) != digest and not is_whole(file):
            return f"dataset/{path} is damaged"
    # Its masks and crops are those of another picture.
    return f"{photo.name} was changed" if photo.made and not replaced and is_changed(photo, folder) else None


def is_changed(photo: PreparedPhoto, folder: Path) -> bool:
    """Whether a photo is there, and another one than was prepared. folder: of the tune."""
    return bool(photo.sha256) and digest_of(folder / "images" / photo.file) not in (photo.sha256, "")


def is_whole(picture: Path) -> bool:
    try:
        open_picture(picture, "RGB")
    except (FileNotFoundError, Unreadable):
        return False
    return True
