"""Captions: which `.txt` file belongs to which photo."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath

from trainer.contract.photos import Upload
from trainer.photos.sorting import LeftOut

MAX_CAPTION_BYTES = 10_000
Place = tuple[str, str]  # the zip and the folder, and the name without its suffix


def pair(
    photos: Sequence[Upload], captions: Sequence[Upload], left_out: Sequence[LeftOut]
) -> tuple[list[Upload | None], list[LeftOut], list[Upload]]:
    """The caption of each photo: the `.txt` file of the same name in the same folder.

    For a photo in a zip, one that is sent with the zip comes first. Returns also the captions that are left out with
    the reason: those of leftovers (`left_out`, by their full names), and those in a zip that another one replaces; and
    those without a photo.
    """
    left = {_place(caption): caption for caption in captions}
    mine: list[Upload | None] = [left.pop(_place(photo), None) if not photo.within else None for photo in photos]
    replaced: list[LeftOut] = []
    for number, photo in enumerate(photos):
        if photo.within:
            own = left.pop(_place(photo), None)
            mine[number] = left.pop(("", _place(photo)[1]), own)
            if own and mine[number] is not own:
                replaced.append((own.full_name, "another caption was sent for its photo"))
    others = {_without_suffix(name) for name, _ in left_out}
    homeless = []
    for caption in left.values():
        if _without_suffix(caption.full_name) in others:
            replaced.append((caption.full_name, "the caption of a file that is left out"))
        else:
            homeless.append(caption)
    return mine, replaced, homeless


def _place(upload: Upload) -> Place:
    return upload.within, PurePosixPath(upload.name).stem


def _without_suffix(full_name: str) -> tuple[PurePosixPath, str]:
    """Folder and name; a leftover may have no name."""
    path = PurePosixPath(full_name)
    return path.parent, path.stem


def read_caption(upload: Upload) -> str:
    """The text of a caption. Raises ValueError with the second half of a sentence that begins with the photo's name."""
    data = upload.path.read_bytes()
    if len(data) > MAX_CAPTION_BYTES:
        raise ValueError(f"has a caption of more than {MAX_CAPTION_BYTES} bytes")
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise ValueError("has a caption that is not UTF-8 text") from None
