"""Zips of photos, read in the decoding child process: what is in them, and one entry at a time as a file.

Nothing is written under a name from a zip. The sizes that a zip declares are limits: `zipfile` reads no entry further.
"""

from __future__ import annotations

import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from trainer.photos.caption_text import MAX_CAPTION_BYTES
from trainer.photos.decode import Refused
from trainer.photos.leftovers import HEAD_BYTES, leftover_of
from trainer.photos.sorting import archive_of, is_zip

# Of the list of entries, which `zipfile` keeps in memory as a whole: about 15,000 entries.
MAX_DIRECTORY_BYTES = 2 * 2**20
CHUNK_BYTES = 2**20
MOST_CAPTIONS = 1000  # of all zips of a request
ONE_EACH = "at most one for each photo is allowed"
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # of the others, one chunk may expand without limit
OTHER_METHODS = {9: "Deflate64", 12: "bzip2", 14: "LZMA", 93: "Zstandard", 95: "xz", 98: "PPMd"}  # 4.4.5
ENCRYPTED, UTF_8 = 0x1, 0x800  # flags of an entry
END = struct.Struct("<4s4H2LH")  # end of the list of entries: PKWARE's APPNOTE.TXT, 4.3.16
END_64 = struct.Struct("<4sQ2H2L4Q")  # 4.3.14
LOCATOR_64 = struct.Struct("<4sLQL")  # 4.3.15
END_MARK, END_64_MARK, LOCATOR_MARK = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
MOST_COMMENT = 2**16
IN_64_BITS = 0xFFFFFFFF  # the number is in the other record
DAMAGED = "is a damaged zip, or was not transferred as a whole; make it again"
# What `zipfile` raises for a broken entry. RuntimeError: one that `list_zip` refuses, in a zip that has changed since.
# UnicodeDecodeError: its name is another one in its own header than in the list.
BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, UnicodeDecodeError)


@dataclass(frozen=True)
class Entry:
    """A file in a zip. number: in the zip's list. folder: where it lies, with slashes. size: bytes, unpacked.

    text: the content of a caption, as far as captions may be long.
    """

    number: int
    folder: str
    name: str
    size: int
    text: bytes = b""


@dataclass
class Contents:
    """What is in a zip. left_out: (path, what it is). refused: messages that begin with a path in the zip."""

    photos: list[Entry] = field(default_factory=list)
    captions: list[Entry] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


def list_zip(source: Path) -> Contents:
    """What is in a zip; only the first bytes of each entry are unpacked. Raises Refused."""
    found = Contents()
    with _opened(source) as archive:
        for number, info in enumerate(archive.infolist()):
            folder, name = _place(info)
            if name:
                _sort(archive, info, Entry(number, folder, name, info.file_size), found)
            if len(found.captions) > MOST_CAPTIONS:
                raise Refused(f"has more than {MOST_CAPTIONS} text files; {ONE_EACH}")
    return found


def _sort(archive: zipfile.ZipFile, info: zipfile.ZipInfo, entry: Entry, found: Contents) -> None:
    path = f"{entry.folder}/{entry.name}" if entry.folder else entry.name
    what = leftover_of(entry.name, b"", entry.folder)  # by its place or its name, which may be all that is readable
    problem = "" if what else _problem(info)
    if problem:
        found.refused.append(f"{path} {problem}")
        return
    head = b"" if _problem(info) else _read(archive, info, HEAD_BYTES)
    if what := leftover_of(entry.name, head, entry.folder):
        found.left_out.append((path, what))
    elif entry.name.lower().endswith(".txt"):
        found.captions.append(replace(entry, text=_read(archive, info, MAX_CAPTION_BYTES + 1)))
    elif is_zip(entry.name, head):
        found.refused.append(f"{path} is a zip in a zip; send it by itself")
    elif kind := archive_of(head):
        found.refused.append(f"{path} is not a photo but {kind}; send the photos in a zip")
    else:
        found.photos.append(entry)


def _problem(info: zipfile.ZipInfo) -> str:
    """Why an entry cannot be unpacked, or ""."""
    if info.flag_bits & ENCRYPTED:
        return "is protected by a password; make the zip again without one"
    if info.compress_type not in METHODS:
        method = OTHER_METHODS.get(info.compress_type, f"method {info.compress_type}")
        return f"is packed with {method}; make the zip again with the usual one (Deflate)"
    if stat.S_ISLNK(info.external_attr >> 16):
        return "is a link, not a photo"
    return ""


def _read(archive: zipfile.ZipFile, info: zipfile.ZipInfo, count: int) -> bytes:
    """The first bytes of an entry; what is damaged is refused when it is unpacked."""
    try:
        with archive.open(info) as stream:
            return stream.read(count)
    except BROKEN:
        return b""


def unpack(source: Path, number: int, target: Path) -> None:
    """Write an entry of a zip to a file. Raises Refused, OSError."""
    with _opened(source) as archive:
        info = archive.infolist()[number]
        try:
            with archive.open(info) as stream, target.open("wb") as file:
                while chunk := stream.read(CHUNK_BYTES):
                    file.write(chunk)
        except BROKEN:
            raise Refused("is damaged in the zip and cannot be unpacked") from None


@contextmanager
def _opened(source: Path) -> Iterator[zipfile.ZipFile]:
    """A zip whose list of entries is not too long, and names places in the file. Raises Refused."""
    _check_directory(source)
    try:
        archive = zipfile.ZipFile(source)
    except UnicodeDecodeError:
        raise Refused("has names that are not the UTF-8 text that they are marked as; make it again") from None
    except (zipfile.BadZipFile, struct.error, NotImplementedError, ValueError, OverflowError, EOFError):
        raise Refused(DAMAGED) from None
    with archive:
        if not all(0 <= info.header_offset < source.stat().st_size for info in archive.infolist()):
            raise Refused(DAMAGED)
        yield archive


def _check_directory(source: Path) -> None:
    """Check the size of the list of entries before `zipfile` reads it. Raises Refused."""
    size = source.stat().st_size
    with source.open("rb") as file:
        start = max(0, size - END.size - MOST_COMMENT)
        file.seek(start)
        tail = file.read()
        at = tail.rfind(END_MARK)
        if tail[-END.size :].startswith(END_MARK) and tail.endswith(b"\0\0"):  # no comment: `zipfile` looks here first
            at = len(tail) - END.size
        if at < 0 or len(tail) - at < END.size:
            raise Refused(DAMAGED)
        lengths = [END.unpack_from(tail, at)[5], *_lengths_64(file, start + at)]
    if max(length for length in lengths if length != IN_64_BITS or len(lengths) == 1) > MAX_DIRECTORY_BYTES:
        raise Refused("has too many files; send the photos alone")


def _lengths_64(file: BinaryIO, end: int) -> list[int]:
    """The size of the list of entries in a zip of more than 4 GB, in both places where readers look for it.

    end: where the usual record begins.
    """
    place = end - LOCATOR_64.size
    if place < END_64.size:
        return []
    file.seek(place)
    mark, _, offset, _ = LOCATOR_64.unpack(file.read(LOCATOR_64.size))
    lengths = []
    for begin in (min(offset, place), place - END_64.size) if mark == LOCATOR_MARK else ():
        file.seek(begin)
        record = file.read(END_64.size)
        if len(record) == END_64.size and record.startswith(END_64_MARK):
            lengths.append(END_64.unpack(record)[8])
    return lengths


def _place(info: zipfile.ZipInfo) -> tuple[str, str]:
    """Folder and name of an entry, without `..` and without a root; the name of a folder is empty.

    Some programs write backslashes; some write UTF-8 names without marking them so (`zipfile` then assumes cp437).
    """
    name = info.filename
    if not info.flag_bits & UTF_8:
        try:
            name = name.encode("cp437").decode("utf-8")
        except UnicodeError:  # a name in an old code page, which the zip does not name
            name = info.filename
    name = name.replace("\\", "/")
    if name.endswith("/"):
        return "", ""
    parts = [part for part in name.split("/") if part not in ("", ".", "..")]
    return str(PurePosixPath(*parts[:-1])) if len(parts) > 1 else "", parts[-1] if parts else ""
