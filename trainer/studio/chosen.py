"""The files that are chosen in the form: photos with their captions, what is in zips, and what will be left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.contract.errors import AnalysisUnavailable
from trainer.contract.photos import Upload
from trainer.photos.caption_text import MAX_CAPTION_BYTES, decode_caption
from trainer.photos.captions import pair
from trainer.photos.sorting import left_out_notes, sort_uploads
from trainer.studio.rows import Services


@dataclass(frozen=True)
class Chosen:
    """photos: with the text of their captions; None: no text file. single: paths of the photos that are in no zip."""

    photos: Sequence[tuple[Upload, str | None]]
    single: Sequence[str]
    notes: Sequence[str]


def chosen(services: Services, paths: Sequence[str] | None) -> Chosen:
    """What the chosen files are. What cannot be read, or is missing, is refused when the form is sent."""
    files = [Upload(path.name, path) for path in map(Path, paths or [])]
    found = sort_uploads([file for file in files if file.path.exists()])
    gone = [file for file in files if not file.path.exists() and file.path.suffix.lower() != ".txt"]
    photos, captions = [photo for photo in files if photo in found.photos + gone], [*found.captions]
    texts = {one.full_name: _read(one.path) for one in found.captions}
    notes, left_out = [], [*found.left_out]
    for archive in found.zips:
        try:
            contents = services.decoder.list_zip(archive.path)
        except (ValueError, AnalysisUnavailable) as problem:
            notes.append(f"{archive.name} {problem}")
            continue
        notes.append(f"{archive.name}: {len(contents.photos)} photos")
        left_out += [(f"{archive.name}/{path}", what) for path, what in contents.left_out]
        for entry in [*contents.photos, *contents.captions]:
            one = Upload(entry.name, archive.path, "/".join(filter(None, (archive.name, entry.folder))))
            if entry in contents.photos:
                photos.append(one)
            else:
                captions.append(one)
                texts[one.full_name] = entry.text
    with_text: list[tuple[Upload, str | None]] = []
    for photo, caption in zip(photos, pair(photos, captions, []).mine, strict=True):
        text = None
        if caption:
            try:
                text = decode_caption(texts[caption.full_name], caption.name).text
            except ValueError as problem:  # it is refused when the form is sent
                notes.append(f"{photo.full_name} {problem}")
                text = ""
        with_text.append((photo, text))
    single = [str(photo.path) for photo in found.photos]
    return Chosen(with_text, single, [*notes, *found.refused, *left_out_notes(left_out)])


def _read(path: Path) -> bytes:
    """A caption file, as far as captions may be long, and one byte more."""
    with path.open("rb") as file:
        return file.read(MAX_CAPTION_BYTES + 1)
