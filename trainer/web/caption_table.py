"""The table of captions on the page: what it shows, and the caption files that are sent for what was edited in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from trainer.contract.photos import Upload

Rows = Sequence[Sequence[str | None]] | None  # photo, caption
Found = Sequence[tuple[Upload, str | None]]  # photos with the text of their caption files; None: no file


def in_order(rows: Rows, photos: Sequence[Upload]) -> list[str | None]:
    """The caption in the table of each photo, without blanks at the ends; None: the table does not have the photo.

    Photos of one name, from several folders, are in the order of the photos.
    """
    texts: dict[tuple[str, int], str] = {}
    count: Counter[str] = Counter()
    for name, text in rows or []:
        texts[name or "", count[name or ""]] = (text or "").strip()
        count[name or ""] += 1
    count.clear()
    answer = []
    for photo in photos:
        answer.append(texts.get((photo.name, count[photo.name])))
        count[photo.name] += 1
    return answer


def table(rows: Rows, found: Found, before: str, now: str) -> list[list[str]]:
    """The rows to show: the edited caption, else that of the file, else the default. before, now: the default."""
    written = in_order(rows, [photo for photo, _ in found])
    return [
        [photo.name, edited if edited and edited != before else now if caption is None else caption]
        for (photo, caption), edited in zip(found, written, strict=True)
    ]


def with_captions(uploads: Sequence[Upload], rows: Rows, automatic: str, folder: Path, found: Found) -> list[Upload]:
    """The uploads with a text file for each edited caption; it replaces an uploaded text file.

    automatic: the default caption, which needs no file. folder: for the text files. An edited caption that is empty
    is sent too: it means the default.
    """
    photos = [photo for photo, _ in found]
    texts = in_order(rows, photos)
    edited = {
        (photo.within, photo.name)
        for (photo, caption), text in zip(found, texts, strict=True)
        if text is not None and text not in (caption or "", automatic)
    }
    of_stem = Counter(_stem(photo) for photo in photos)
    unedited = {_stem(photo) for photo in photos if (photo.within, photo.name) not in edited}
    replaced = {_stem(photo) for photo in photos} - unedited
    kept = [one for one in uploads if not (one.name.lower().endswith(".txt") and _stem(one) in replaced)]
    for number, (photo, text) in enumerate(zip(photos, texts, strict=True)):
        if (photo.within, photo.name) in edited:  # of photos of one name, all: the intake refuses what differs
            file = folder / f"{number}.txt"
            file.write_text(text or "", "utf-8")
            if of_stem[_stem(photo)] == 1:
                kept.append(Upload(f"{_stem(photo)}.txt", file))
            else:
                kept.append(Upload(f"{photo.name}.txt", file, photo.within))
    return kept


def _stem(upload: Upload) -> str:
    return PurePosixPath(upload.name).stem
