"""What uploads are: photos, captions, zips of photos, other archives, and leftovers, which are left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from trainer.contract.photos import Upload
from trainer.photos.leftovers import HEAD_BYTES, is_picture, leftover_of

ZIP_HEADS = (b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08")
# Documents and programs are zips too: by the first name in them, or by their own suffix.
DOCUMENT_PARTS = (b"[Content_Types].xml", b"mimetype", b"META-INF/", b"_rels/", b"AndroidManifest.xml")
DOCUMENTS = (
    ".docx", ".docm", ".xlsx", ".xlsm", ".pptx", ".odt", ".ods", ".odp", ".odg", ".epub", ".jar", ".apk", ".ipa",
    ".pages", ".numbers", ".key", ".kmz", ".kra", ".ora", ".3mf", ".xps", ".whl", ".pt", ".pth", ".ckpt",
)  # fmt: skip
ARCHIVES = (
    (b"Rar!\x1a\x07", "a RAR archive"), (b"7z\xbc\xaf\x27\x1c", "a 7z archive"), (b"\x1f\x8b", "a gzip archive"),
    (b"BZh", "a bzip2 archive"), (b"\xfd7zXZ\0", "an xz archive"), (b"\x28\xb5\x2f\xfd", "a zstd archive"),
)  # fmt: skip
LeftOut = tuple[str, str]  # the full name of a file, and what it is
NAMED = 10  # names in a note; the others are counted


@dataclass
class Sorted:
    """photos: whatever is none of the others; they are refused later if they are no pictures.

    refused: messages about archives that are not zips. left_out: leftovers.
    """

    photos: list[Upload] = field(default_factory=list)
    captions: list[Upload] = field(default_factory=list)
    zips: list[Upload] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)

    @property
    def count(self) -> int:
        """The number of photos, where each zip counts as one: it is opened later."""
        return len(self.photos) + len(self.zips) + len(self.refused)


def sort_uploads(uploads: Sequence[Upload]) -> Sorted:
    """Sort uploads by their content and their names."""
    found = Sorted()
    for upload in uploads:
        with upload.path.open("rb") as file:
            head = file.read(HEAD_BYTES)
        if what := leftover_of(upload.name, head):
            found.left_out.append((upload.full_name, what))
        elif upload.name.lower().endswith(".txt"):
            found.captions.append(upload)
        elif is_zip(upload.name, head):
            found.zips.append(upload)
        elif what := archive_of(head):
            found.refused.append(f"{upload.full_name} is not a photo but {what}; send the photos in a zip")
        else:
            found.photos.append(upload)
    return found


def is_zip(name: str, head: bytes) -> bool:
    """Whether a file is a zip, and not a document that is packed as one; or is called a zip and is no picture."""
    suffix = PurePosixPath(name).suffix.lower()
    if suffix == ".zip":
        return not is_picture(head) and not archive_of(head)
    return head.startswith(ZIP_HEADS) and suffix not in DOCUMENTS and not head[30:].startswith(DOCUMENT_PARTS)


def archive_of(head: bytes) -> str | None:
    """What an archive is that is not a zip; None: the file is none."""
    if head[257:262] == b"ustar":
        return "a tar archive"
    return next((what for start, what in ARCHIVES if head.startswith(start)), None)


def left_out_notes(left_out: Sequence[LeftOut]) -> list[str]:
    """A warning for each kind of leftover: `left out (a video): IMG_1.MOV, IMG_2.MOV and 3 more`."""
    kinds: dict[str, list[str]] = {}
    for name, what in left_out:
        kinds.setdefault(what, []).append(name)
    return [f"left out ({what}): {listed(names)}" for what, names in kinds.items()]


def no_photos(left_out: Sequence[LeftOut]) -> str:
    """The refusal of a request without photos; it names what was left out."""
    return "; ".join(["must contain at least one image", *left_out_notes(left_out)])


def listed(names: Sequence[str]) -> str:
    """Names in a message; at most NAMED, the others are counted."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
