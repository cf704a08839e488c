"""Photos whose last bytes are missing, as some phones, scanners and messengers write them: is every pixel there?

The rest of the file is filled up in two ways. Where both give the same picture, no pixel was in the missing bytes.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable

from PIL import Image, ImageChops

END_OF_IMAGE = b"\xff\xd9"
START_OF_SCAN, END = 0xDA, 0xD9
FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # markers of a JPEG's size and components: ITU-T T.81, B.1.1.3
PROGRESSIVE = (0xC2, 0xC6, 0xCA, 0xCE)
COEFFICIENTS = 64  # of a block
AFTER_SCAN = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # a marker that ends a scan
FILLER_BYTES = 256
PADDING_BYTES = 4  # fewer zeros fill up no sector
LARGEST_CORNER = 100  # a corner that cannot be known may be such a part of the picture: one block
SMOOTHING_PX = 2  # a block's colours reach so far into its neighbours
TAKEN = "its last bytes are missing, but all its pixels are there"
CORNER = "its last bytes are missing: at most {} x {} pixels in a corner of it are wrong"
JPEG, PNG = b"\xff\xd8", b"\x89PNG\r\n\x1a\n"


def read_unended(data: bytes, read: Callable[[bytes], Image.Image]) -> tuple[Image.Image, str] | None:
    """The picture of a file whose last bytes are missing, and a note; None: pixels are missing too.

    read: decodes a whole file; what it raises for the filled one is raised.
    """
    if data.startswith(JPEG):
        return _read_jpeg(data, read) if all(ends_in_scan(data)) else None
    if not 0 < (missing := _missing(data)) <= len(data):
        return None
    image = read(data + bytes(missing))
    note = _compare(image, read(data + _noise(missing)))
    return (image, note) if note == TAKEN else None


def _read_jpeg(data: bytes, read: Callable[[bytes], Image.Image]) -> tuple[Image.Image, str] | None:
    """As `read_unended`. Zeros at the end may be pixels, or fill up the last sector of a disk."""
    noise = _noise(FILLER_BYTES) + END_OF_IMAGE
    body = data.removesuffix(b"\xff")
    image = read(body + END_OF_IMAGE)
    bare = body.rstrip(b"\0")
    if bare.endswith(b"\xff"):  # FF is written as FF 00
        bare += b"\0"
    if len(body) - len(bare) >= PADDING_BYTES:
        if note := _compare(image, read(bare + noise)):
            return image, note
        if _compare(image, read(body[:-2] + noise)) == TAKEN:  # zeros were read as pixels, and some are left
            return None
    note = _compare(image, read(body + noise))
    return (image, note) if note else None


def _compare(image: Image.Image, other: Image.Image) -> str | None:
    """A note on a file that is filled up in two ways, by the pixels that differ; None: too many."""
    if image.size != other.size or image.mode != other.mode:
        return None
    wrong = ImageChops.difference(image, other).getbbox()
    if wrong is None:
        return TAKEN
    width, height = _block(image)
    left, top = ((side - 1) // block * block for side, block in zip(image.size, (width, height), strict=True))
    small = LARGEST_CORNER * width * height <= image.width * image.height
    if small and wrong[0] >= left - SMOOTHING_PX and wrong[1] >= top - SMOOTHING_PX:
        return CORNER.format(width, height)
    return None


def _block(image: Image.Image) -> tuple[int, int]:
    """Width and height of the blocks that a JPEG is stored in, in pixels."""
    layers = getattr(image, "layer", None) or [(0, 1, 1, 0)]
    return 8 * max(layer[1] for layer in layers), 8 * max(layer[2] for layer in layers)


def _missing(data: bytes) -> int:
    """The number of bytes that a WebP, HEIC or AVIF says to have more than it has."""
    if data.startswith(b"RIFF"):
        size = 8 + int.from_bytes(data[4:8], "little")
        return size + size % 2 - len(data)
    at = 0
    while data[4:8] == b"ftyp" and at + 8 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        if size == 1:  # it is in 64 bits, behind the name
            size = int.from_bytes(data[at + 8 : at + 16], "big")
        if size < 8:  # until the end of the file
            return 0
        at += size
    return at - len(data)


def _noise(count: int) -> bytes:
    """Bytes that are equal in each run, without those that begin a marker."""
    return random.Random(0).randbytes(count).replace(b"\xff", b"\x5a")  # noqa: S311


def ends_in_scan(data: bytes) -> tuple[bool, bool]:
    """Whether a JPEG ends within the pixels of a scan, and whether that is its last one.

    A progressive JPEG gets finer with each scan.
    """
    components: list[int] = []
    precision: dict[int, list[int | None]] = {}  # lowest bit of each coefficient so far, by component; None: no bit
    progressive, in_scan, at = False, False, 2
    try:
        while not in_scan and data[at] == 0xFF and data[at + 1] != END:
            marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
            if marker == 0xFF:  # it may be repeated
                at += 1
                continue
            segment, at = data[at + 4 : at + 2 + length], at + 2 + length
            if marker in FRAMES:
                progressive = marker in PROGRESSIVE
                components = [segment[6 + 3 * number] for number in range(segment[5])]
                precision = {component: [None] * COEFFICIENTS for component in components}
            elif marker == START_OF_SCAN:
                first, last, bits = segment[1 + 2 * segment[0] :][:3] if progressive else (0, COEFFICIENTS - 1, 0)
                for number in range(segment[0]):
                    precision[segment[1 + 2 * number]][first : last + 1] = [bits & 0xF] * (last + 1 - first)
                found = AFTER_SCAN.search(data, at)
                in_scan, at = found is None, found.start() if found else len(data)
    except (LookupError, ValueError):  # it ends outside a scan, or it is broken
        return False, False
    return in_scan, bool(components) and all(bit == 0 for lowest in precision.values() for bit in lowest)


def lacks_end(data: bytes) -> bool:
    """Whether the last bytes of a JPEG or PNG are missing, whose pixels may all be there."""
    if data.startswith(JPEG):
        return ends_in_scan(data)[0]
    at = len(PNG)
    while data.startswith(PNG) and at < len(data):
        if data[at + 4 : at + 8] == b"IEND":
            return False
        at += 12 + int.from_bytes(data[at : at + 4], "big")
    return data.startswith(PNG)
