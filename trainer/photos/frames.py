"""Files with more than one picture: animations, bursts, pages. The first is taken, and a note says so."""

from __future__ import annotations

import struct

from PIL import ImageFile
from PIL.MpoImagePlugin import MpoImageFile
from PIL.TiffImagePlugin import TiffImageFile

ANIMATION = "an animation: its first picture was taken"
SEVERAL = "it has several pictures: the first was taken"
ANIMATIONS = ("GIF", "PNG", "WEBP", "AVIF")
SEQUENCES = (b"msf1", b"hevc", b"hevx", b"hevm", b"hevs")  # brands of HEIF: ISO/IEC 23008-12
KIND_OF_PAGE, REDUCED_OR_MASK = 254, 0b101  # TIFF's NewSubfileType
PICTURE_LIST = 0xB002  # of MPO (CIPA DC-007): its entries
SMALL_COPY = "Large Thumbnail"
# A picture of brightness that comes with a photo in high dynamic range: its names in the XMP of Android and of Apple.
GAIN_MAPS = (b"hdrgm", b"hdrgainmap")
BROKEN = (OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, struct.error)


def notes_on_frames(image: ImageFile.ImageFile) -> list[str]:
    """A note if the file has other pictures, which are not taken. Call it before the pixels are loaded.

    Small copies and gain maps, which cameras and phones add to a photo, are no other pictures.
    """
    try:
        if not getattr(image, "is_animated", False):
            return []
        if image.format in ANIMATIONS or (image.format == "HEIF" and _brand(image) in SEQUENCES):
            return [ANIMATION]
        extra = (isinstance(image, MpoImageFile) and _only_extras(image)) or (
            isinstance(image, TiffImageFile) and _is_small_copy(image)
        )
        return [] if extra else [SEVERAL]
    except BROKEN:  # behind the first picture, which may be whole
        return []


def _brand(image: ImageFile.ImageFile) -> bytes:
    return _bytes_of(image)[8:12]


def _bytes_of(image: ImageFile.ImageFile) -> bytes:
    assert image.fp is not None, "its pixels are not loaded yet"
    image.fp.seek(0)
    return image.fp.read()


def _only_extras(image: MpoImageFile) -> bool:
    """Whether the other pictures of an MPO are small copies or gain maps."""
    assert image.mpinfo is not None, "Pillow has read it to know how many pictures there are"
    others = [entry["Attribute"]["MPType"] for entry in image.mpinfo[PICTURE_LIST][1:]]
    if all(SMALL_COPY in kind for kind in others):
        return True
    data = _bytes_of(image).lower()
    return any(mark in data for mark in GAIN_MAPS)


def _is_small_copy(image: TiffImageFile) -> bool:
    """Whether the second page of a TIFF is a small copy of the first, or its mask."""
    image.seek(1)
    kind = int(image.tag_v2.get(KIND_OF_PAGE, 0))
    image.seek(0)
    return bool(kind & REDUCED_OR_MASK)
