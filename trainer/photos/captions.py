"""Captions: which `.txt` file belongs to which photo, and what is said about it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from os.path import splitext
from pathlib import Path, PurePosixPath

from trainer.contract.photos import Photo, Upload
from trainer.photos.caption_text import CaptionText, decode_caption
from trainer.photos.sorting import LeftOut, listed

EMPTY_NOTE = "its caption is empty: the default caption is used"
GUESSED_NOTE = "its caption is not UTF-8 and was read as"  # first words
OTHER_NOTE = "its own caption is left out: another one is trained for"  # first words
Place = tuple[str, str]  # the zip and the folder, and the name without its suffix


@dataclass
class Paired:
    """mine: the caption of each photo. left_out: captions that are not used, with the reason.

    homeless: captions without a photo. refused: messages about captions that dispute a photo. shared: the names of
    photos that have one caption, by the caption's name.
    """

    mine: list[Upload | None]
    left_out: list[LeftOut] = field(default_factory=list)
    homeless: list[Upload] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    shared: dict[str, list[str]] = field(default_factory=dict)


def pair(photos: Sequence[Upload], captions: Sequence[Upload], left_out: Sequence[LeftOut]) -> Paired:
    """The caption of each photo: `IMG_1.jpg.txt`, else `IMG_1.txt`, in the same folder; photos of one stem share it.

    For a photo in a zip, a caption that is sent with the zip comes first. left_out: leftovers, by their full names.
    """
    found, given = Paired([]), defaultdict[Place, list[Upload]](list)
    for caption in captions:
        given[_place(caption)].append(caption)
    loose = {place for photo in photos if not photo.within for place in _places(photo)}
    used, replaced = defaultdict[Place, list[str]](list), dict[Place, None]()
    for photo in photos:
        places = _places(photo)
        if photo.within:  # a caption beside the zip is for a photo beside the zip, if there is one
            places = [place for place in (("", name) for _, name in places) if place not in loose] + places
        known = [place for place in places if place in given]
        found.mine.append(given[known[0]][0] if known else None)
        if known:
            used[known[0]].append(photo.full_name)
            replaced |= dict.fromkeys(known[1:])
    for place, names in used.items():
        _check_place(given[place], names, found)
    others = {splitext(name)[0] for name, _ in left_out}  # noqa: PTH122 - Path has no suffix for a name of dots
    for place, rest in given.items():
        for caption in rest if place not in used else ():
            if place in replaced:
                found.left_out.append((caption.full_name, "another caption was sent for its photo"))
            elif splitext(caption.full_name)[0] in others:  # noqa: PTH122 - likewise
                found.left_out.append((caption.full_name, "the caption of a file that is left out"))
            else:
                found.homeless.append(caption)
    return found


def _check_place(captions: Sequence[Upload], names: Sequence[str], found: Paired) -> None:
    """Captions of one place must say the same."""
    if len(captions) > 1 and len({caption.path.read_bytes() for caption in captions}) > 1:
        files = " and ".join(dict.fromkeys(caption.full_name for caption in captions))
        found.refused.append(
            f"{names[0]} has {len(captions)} captions that differ ({files}); send one, or give the photos other names"
        )
    if len(names) > 1:
        found.shared[captions[0].full_name] = list(names)


def _place(upload: Upload) -> Place:
    return upload.within, PurePosixPath(upload.name).stem


def _places(photo: Upload) -> list[Place]:
    """Where the caption of a photo may be, the closest first."""
    return [(photo.within, photo.name), _place(photo)]


def read_caption(upload: Upload) -> CaptionText:
    """The text of a caption. Raises ValueError with the second half of a sentence that begins with the photo's name."""
    return decode_caption(upload.path.read_bytes(), upload.name)


def write_caption(upload: Upload, photo: Photo, target: Path) -> None:
    """Write the text of a caption, and say in the photo's notes how it was read.

    An empty one is not written: the photo gets the default caption. Raises as `read_caption`.
    """
    caption = read_caption(upload)
    if not caption.text:
        photo.notes.append(EMPTY_NOTE)
        return
    if caption.guessed:
        shown = f"{caption.text[:80]!r}{' ...' if len(caption.text) > 80 else ''}"
        photo.notes.append(f"{GUESSED_NOTE} {caption.guessed}: {shown}; save {upload.name} as UTF-8")
    target.write_text(caption.text, "utf-8")


def caption_warnings(photos: Iterable[Photo], shared: dict[str, list[str]]) -> list[str]:
    """Warnings about how captions were read, one for each kind, and about those of several photos."""
    photos, warnings = list(photos), []
    if names := [photo.name for photo in photos if EMPTY_NOTE in photo.notes and not photo.dropped]:
        warnings.append(f"empty captions: {listed(names)}; the default caption is used for these photos")
    if names := [photo.name for photo in photos if any(note.startswith(GUESSED_NOTE) for note in photo.notes)]:
        warnings.append(
            f"captions that are not UTF-8: {listed(names)}; they were read as Windows-1252, and the notes of the "
            "photos show how: save the files as UTF-8"
        )
    if names := [photo.name for photo in photos if any(note.startswith(OTHER_NOTE) for note in photo.notes)]:
        warnings.append(
            f"photos that equal another one and have another caption: {listed(names)}; that of the first one is trained"
        )
    for caption, of in shared.items():
        warnings.append(
            f"{caption} is the caption of {listed(of)}; for captions of their own, name them as the photos: "
            f"{PurePosixPath(of[0]).name}.txt"
        )
    return warnings
