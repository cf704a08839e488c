"""Zips of photos among the uploads: their photos and captions become uploads, within the limits of photos."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trainer.contract.disk import as_text, check_room
from trainer.contract.errors import InvalidRequest
from trainer.contract.photos import ProgressCallback, Upload
from trainer.photos.decoder import Decoder
from trainer.photos.sorting import Sorted, no_photos
from trainer.photos.zips import MOST_CAPTIONS, ONE_EACH, Contents, Entry
from trainer.settings import Settings


@dataclass(frozen=True)
class Packed:
    """An entry of a zip that is taken: a photo or a caption."""

    archive: Upload
    entry: Entry
    is_photo: bool

    def unpacked(self, path: Path) -> Upload:
        within = "/".join(filter(None, (self.archive.full_name, self.entry.folder)))
        return Upload(self.entry.name, path, within)


def unpack_zips(settings: Settings, decoder: Decoder, sent: Sorted, folder: Path, progress: ProgressCallback) -> Sorted:
    """The uploads with the photos and captions of zips in place of the zips; their files are written into `folder`.

    Nothing is unpacked before all numbers and sizes are within the limits. What is wrong with single entries is added
    to `refused`. Raises InvalidRequest, DiskProblem.
    """
    found = Sorted([*sent.photos], [*sent.captions], [], [*sent.refused], [*sent.left_out])
    packed: list[Packed] = []
    for archive in sent.zips:
        try:
            contents = decoder.list_zip(archive.path)
        except ValueError as problem:
            found.refused.append(f"{archive.full_name} {problem}")
        else:
            packed += _taken(settings, archive, contents, found)
        if sum(not one.is_photo for one in packed) > MOST_CAPTIONS:  # their texts are in memory
            raise InvalidRequest({"images": [f"have more than {MOST_CAPTIONS} text files in zips; {ONE_EACH}"]})
    _check(settings, packed, found)
    for number, one in enumerate(packed):
        upload = one.unpacked(folder / f"{number:05d}")
        try:
            if one.is_photo:
                decoder.unpack(one.archive.path, one.entry, upload.path)
            else:
                upload.path.write_bytes(one.entry.text)
        except ValueError as problem:
            found.refused.append(f"{upload.full_name} {problem}")
        else:
            (found.photos if one.is_photo else found.captions).append(upload)
        progress("photos are unpacked", number + 1, len(packed))
    return found


def _taken(settings: Settings, archive: Upload, contents: Contents, found: Sorted) -> Iterator[Packed]:
    """The photos and captions of a zip that are not too large; the others are added to `found`."""
    name = archive.full_name
    found.refused += [f"{name}/{message}" for message in contents.refused]
    found.left_out += [(f"{name}/{path}", what) for path, what in contents.left_out]
    if not contents.photos and not contents.refused:
        found.left_out.append((name, "a zip without photos"))
    for entry in contents.photos:
        one = Packed(archive, entry, is_photo=True)
        if entry.size > settings.max_image_mb * 2**20:
            size = f"has {entry.size / 2**20:.1f} MB; at most {settings.max_image_mb} MB are allowed"
            found.refused.append(f"{one.unpacked(Path()).full_name} {size}")
        else:
            yield one
    yield from (Packed(archive, entry, is_photo=False) for entry in contents.captions)


def _check(settings: Settings, packed: list[Packed], found: Sorted) -> None:
    """Check the number of all photos, and the size of those in zips. Raises InvalidRequest, DiskProblem."""
    count = len(found.photos) + sum(one.is_photo for one in packed)
    total, most = sum(one.entry.size for one in packed), settings.max_body_mb * 2**20
    problems = []
    if count == 0 and not found.refused:
        problems.append(no_photos(found.left_out))
    if count > settings.max_images:
        problems.append(f"must contain at most {settings.max_images} images, got {count}")
    if total > most:
        problems.append(f"have {as_text(total)} in zips, unpacked; at most {as_text(most)} are allowed")
    if problems:
        names = {one.archive.full_name for one in packed}
        within = f" ({', '.join(sorted(names))} included)" if names else ""
        raise InvalidRequest({"images": [*(f"{problem}{within}" for problem in problems), *found.refused]})
    if packed:
        check_room(settings.outputs, total, "the photos of the zip")
