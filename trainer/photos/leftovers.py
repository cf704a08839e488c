"""Leftovers of file managers, phones and photo programs, which lie next to photos and are left out.

Content decides before names: a picture is taken, whatever its name is, and a video is none.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath

HEAD_BYTES = 512  # of a file; the mark of a tar archive ends at byte 262
PICTURE_HEADS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"BM")
# Brands of ISO media files (`ftyp`), as registered at mp4ra.org.
PICTURE_BRANDS = {
    b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"mif2", b"msf1", b"avif", b"avis"
}  # fmt: skip
OTHER_BRANDS = {b"crx ", b"M4A ", b"M4B ", b"M4P ", b"jp2 ", b"jpx ", b"jxl "}  # raw photos, sound, unread pictures
VIDEO_HEADS = (b"\x1a\x45\xdf\xa3", b"\0\0\1\xba", b"\x30\x26\xb2\x75", b"FLV\1")  # Matroska, MPEG, ASF, Flash
VIDEO_SUFFIXES = (
    ".mov", ".mp4", ".m4v", ".3gp", ".3g2", ".avi", ".mkv", ".webm", ".mts", ".m2ts", ".wmv", ".mpg", ".mpeg", ".lrv",
    ".insv", ".vob", ".flv",
)  # fmt: skip
APPLE_DOUBLE = (b"\0\x05\x16\x07", b"\0\x05\x16\0")  # RFC 1740
MACOS, WINDOWS, ANDROID = "a file of macOS", "a file of Windows", "a file of Android"
NAMES = {
    ".ds_store": MACOS, ".localized": MACOS, ".apdisk": MACOS, "icon\r": MACOS,
    "thumbs.db": WINDOWS, "ehthumbs.db": WINDOWS, "ehthumbs_vista.db": WINDOWS, "desktop.ini": WINDOWS,
    "iconcache.db": WINDOWS, ".directory": "a file of KDE", ".nomedia": ANDROID, ".database_uuid": ANDROID,
    ".picasa.ini": "a file of Picasa", "picasa.ini": "a file of Picasa",
}  # fmt: skip
SIDE_FILES = {
    ".aae": "edits of Apple Photos",
    ".json": "facts about photos, as Google Takeout writes them",
    ".xmp": "edits of a photo program",
    ".dop": "edits of a photo program",
    ".pp3": "edits of a photo program",
    ".on1": "edits of a photo program",
    ".cos": "edits of a photo program",
    ".icloud": "a placeholder of iCloud: the photo itself was not downloaded to that computer",
    ".lnk": "a shortcut",
    ".url": "a shortcut",
    ".webloc": "a shortcut",
    ".desktop": "a shortcut",
    ".part": "an unfinished download",
    ".partial": "an unfinished download",
    ".crdownload": "an unfinished download",
    ".download": "an unfinished download",
    ".db": "the database of a photo program",
    ".ini": "settings of a photo program",
    ".tmp": "a temporary file",
    ".trashinfo": "a note of a trash folder",
}
THUMBNAILS = re.compile(r"SYNO(PHOTO|VIDEO|FILE)_THUMB", re.IGNORECASE)  # of a Synology disk station, as JPEG
FOLDERS = ("__macosx", "@eadir", "$recycle.bin", "#recycle", "system volume information", "lost+found")


def leftover_of(name: str, head: bytes, folder: str = "") -> str | None:
    """What a leftover is, such as `a file of macOS`; None: the file is none.

    head: its first HEAD_BYTES. folder: where it lies in a zip, with slashes.
    """
    for part in PurePosixPath(folder).parts:
        if part.lower() in FOLDERS or (part.startswith(".") and part.strip(".")):
            return f"in {part}, a folder of a file manager"
    suffix = PurePosixPath(name).suffix.lower()
    if head.startswith(APPLE_DOUBLE):
        return MACOS
    if THUMBNAILS.match(name):
        return "a small copy of a photo, of a disk station"
    if suffix == ".thm":
        return "the small picture of a video"
    if is_picture(head):
        return None
    if is_video(head, suffix):
        return "a video"
    if name.lower() in NAMES:
        return NAMES[name.lower()]
    if suffix in SIDE_FILES:
        return SIDE_FILES[suffix]
    if name.startswith("._"):
        return MACOS
    if name.startswith(".") and suffix != ".txt":
        return "a hidden file"
    return None


def is_picture(head: bytes) -> bool:
    """Whether a file begins as a picture that can be read."""
    webp = head[:4] == b"RIFF" and head[8:12] == b"WEBP"
    return webp or head.startswith(PICTURE_HEADS) or (_is_iso_media(head) and bool(_brands(head) & PICTURE_BRANDS))


def is_video(head: bytes, suffix: str = "") -> bool:
    """Whether a file is a video, by its content, or by its name if the content is unknown. suffix: in lower case."""
    if _is_iso_media(head):
        return not _brands(head) & PICTURE_BRANDS and head[8:12] not in OTHER_BRANDS
    avi = head[:4] == b"RIFF" and head[8:12] == b"AVI "
    return avi or head.startswith(VIDEO_HEADS) or suffix in VIDEO_SUFFIXES


def _is_iso_media(head: bytes) -> bool:
    return head[4:8] == b"ftyp"


def _brands(head: bytes) -> set[bytes]:
    """The major brand of an ISO media file; the compatible ones too, if the major one is of no video."""
    end = min(int.from_bytes(head[:4], "big"), len(head))
    major = head[8:12]
    if major in (b"qt  ", b"mp41", b"mp42", b"isom", b"M4V "):
        return {major}
    return {major, *(head[at : at + 4] for at in range(16, end - 3, 4))}
