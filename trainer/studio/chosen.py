"""The files that are chosen in the form: photos with their captions, what is in zips, and what will be left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.contract.errors import AnalysisUnavailable
from trainer.contract.photos import Upload
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
    texts = {Path(one.name).stem: one.path.read_text("utf-8", errors="replace").strip() for one in found.captions}
    photos = [(photo, texts.get(Path(photo.name).stem)) for photo in files if photo in found.photos + gone]
    notes, left_out = [], [*found.left_out]
    for archive in found.zips:
        try:
            contents = services.decoder.list_zip(archive.path)
        except (ValueError, AnalysisUnavailable) as problem:
            notes.append(f"{archive.name} {problem}")
            continue
        notes.append(f"{archive.name}: {len(contents.photos)} photos")
        left_out += [(f"{archive.name}/{path}", what) for path, what in contents.left_out]
        own = {(one.folder, Path(one.name).stem): one.text.decode("utf-8-sig", "replace") for one in contents.captions}
        for entry in contents.photos:
            stem = Path(entry.name).stem
            within = "/".join(filter(None, (archive.name, entry.folder)))
            text = texts.get(stem, own.get((entry.folder, stem)))
            photos.append((Upload(entry.name, archive.path, within), text and text.strip()))
    single = [str(photo.path) for photo in found.photos]
    return Chosen(photos, single, [*notes, *found.refused, *left_out_notes(left_out)])
