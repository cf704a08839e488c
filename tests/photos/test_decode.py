"""Decoding: every kind of photo, and every kind of file made to break a decoder; what is said of a photo's quality.

The table has the 53 own cases of images and the 10 of the API (reference: reliability, Appendix B). A picture that is
taken is compared with what was drawn; a file that is refused is refused for a reason that a reader understands.
"""

from __future__ import annotations

import io
import itertools
import multiprocessing
import pickle
import re
import struct
import time
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pillow_heif
import psutil
import pytest
from PIL import Image, ImageChops, ImageCms, ImageFilter
from PIL.PngImagePlugin import PngInfo

from tests.helpers.shared import SHARED
from tests.helpers.web import left_behind, photo, upload
from trainer.contract.errors import InvalidRequest
from trainer.photos.decode import BLURRED_BELOW, SMALL_PX, Decoded, Refused, alike, decode, load_decoders
from trainer.photos.decoder import Decoder
from trainer.studio import tunes
from trainer.studio.rows import Services

pytest_plugins = ("tests.helpers.web",)
pytestmark = pytest.mark.filterwarnings("ignore:Corrupt EXIF", "ignore:Image appears to be a malformed MPO")

MAX_PIXELS = 100_000_000
MARK = b"PAYLOAD"  # in whatever is hidden beside the pixels
REQUEST = {"title": "Ada", "name": "woman", "branch": "fast"}
ORIENTATION = 0x0112
UNDO = {  # how a picture is stored that a reader turns upright by the orientation of this number
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.fixture(autouse=True)
def pillow_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder sets Pillow's own limit of pixels, which is for a process that does nothing else."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    load_decoders()


# Drawing


def drawn(size: tuple[int, int] = (96, 64)) -> Image.Image:
    """Four corners of four colours, wider than high: no turn or flip of it looks the same."""
    return quarters("RGB", "red", "lime", "blue", "yellow", size=size)


def quarters(mode: str, *colours: Any, size: tuple[int, int] = (96, 64)) -> Image.Image:
    """Upper left, upper right, lower left, lower right."""
    width, height = size
    image = Image.new(mode, size)
    for colour, (row, column) in zip(colours, itertools.product((0, 1), repeat=2), strict=True):
        left, top = column * width // 2, row * height // 2
        image.paste(colour, (left, top, left + width // 2, top + height // 2))
    return image


def saved(image: Image.Image, form: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def jpeg(image: Image.Image, **options: Any) -> bytes:
    return saved(image, "JPEG", quality=95, subsampling=0, **options)


def heic(image: Image.Image, **options: Any) -> bytes:
    load_decoders()
    return saved(image, "HEIF", quality=95, chroma=444, **options)


def noise(side: int = 256) -> Image.Image:
    """A picture that takes many bytes, so that a part of them is a part of the pixels."""
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (side, side, 3), np.uint8))


def animated(form: str) -> bytes:
    """Its first frame is `drawn`, the others are not."""
    others = [Image.new("RGB", (96, 64), colour) for colour in ("black", "white")]
    options = {} if form in ("GIF", "PNG") else {"quality": 95}
    return saved(drawn(), form, save_all=True, append_images=others, duration=100, **options)


def exif_of(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


def turned(orientation: int) -> Image.Image:
    """`drawn` as it is stored with this orientation."""
    return drawn().transpose(UNDO[orientation]) if orientation in UNDO else drawn()


def looped_exif() -> bytes:
    """A directory that says: orientation 6, details in this directory, and the next directory is this one."""
    entries = struct.pack("<HHIHxx", ORIENTATION, 3, 1, 6) + struct.pack("<HHII", 0x8769, 4, 1, 8)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + struct.pack("<I", 8)


# Bytes by hand


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, pixels: bytes = b"", depth: int = 8, colours: int = 2, more: bytes = b"") -> bytes:
    """A PNG of these facts, whether they are true or not. `more`: chunks before the pixels."""
    facts = struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0)
    body = chunk(b"IHDR", facts) + more + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def png_16(image: np.ndarray) -> bytes:
    """A PNG with 16 bits a colour, which Pillow does not write."""
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in image)
    return png(image.shape[1], image.shape[0], lines, 16, 2)


def drawn_png(more: bytes) -> bytes:
    """`drawn`, with more chunks behind the first, which has 25 bytes behind a signature of 8."""
    content = saved(drawn(), "PNG")
    return content[:33] + more + content[33:]


def text_bomb(megabytes: int) -> bytes:
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(bytes(2**20)) for _ in range(megabytes)) + packer.flush()
    return chunk(b"zTXt", b"Comment\0\0" + packed)


def bad_checksum() -> bytes:
    content = bytearray(saved(drawn(), "PNG"))
    content[29] ^= 0xFF  # of the first chunk, which says how large the picture is
    return bytes(content)


def header_only() -> bytes:
    """All of a JPEG that stands before its pixels."""
    content = jpeg(drawn())
    start = content.index(b"\xff\xda")
    return content[: start + 2 + int.from_bytes(content[start + 2 : start + 4], "big")]


def many_scans(count: int) -> bytes:
    """A progressive JPEG whose first scan, of the coarsest values, comes again and again."""
    content = jpeg(drawn(), progressive=True)
    first = content.index(b"\xff\xda")
    following = next(
        at
        for at in range(first + 2, len(content))
        if content[at] == 0xFF and content[at + 1] in (0xC4, 0xDA)  # tables, or the next scan
    )
    return content[:first] + content[first:following] * count + content[following:]


def zipped() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("run.sh", MARK)
    return stream.getvalue()


def photoshop() -> bytes:
    """A whole PSD: no layers, three planes of 32 x 32."""
    head = b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, 32, 32, 8, 3)
    return head + bytes(12) + struct.pack(">H", 0) + bytes(3 * 32 * 32)


def srgb_profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def cmyk_profile() -> bytes:
    """A profile that says to be of CMYK."""
    profile = srgb_profile()
    return profile[:12] + b"prtrCMYK" + profile[20:]


def broken_profile() -> bytes:
    """sRGB, whose table of contents points behind its end."""
    profile = bytearray(srgb_profile())
    profile[132 + 4 : 132 + 8] = struct.pack(">I", 2**31)
    return bytes(profile[:400])


def p3_profile() -> bytes:
    """Display P3: sRGB with other primaries, and under its own name."""
    profile = bytearray(srgb_profile())
    primaries = {
        b"rXYZ": (0.51512, 0.24120, -0.00105),
        b"gXYZ": (0.29198, 0.69225, 0.04189),
        b"bXYZ": (0.15710, 0.06657, 0.78407),
    }
    for at in range(132, 132 + 12 * int.from_bytes(profile[128:132], "big"), 12):
        name, offset, _ = struct.unpack(">4sII", profile[at : at + 12])
        if name in primaries:
            values = (round(value * 2**16) for value in primaries[name])
            profile[offset + 8 : offset + 20] = struct.pack(">iii", *values)
    old, new = ("sRGB built-in".encode("utf-16-be"), "Display P3   ".encode("utf-16-be"))
    return bytes(profile).replace(old, new)


# The table


@dataclass(frozen=True)
class Case:
    """A file, and what becomes of it: the picture that it shows, or the reason why it is refused."""

    make: Callable[[], bytes]
    shows: Callable[[], Image.Image] = drawn
    refused: str | None = None  # a pattern
    converted: str | None = None
    rotated: bool = False
    off: float = 3  # of 255: how much lossy formats may change a corner


NO_IMAGE = r"^is not an image that can be read \(JPEG, PNG, .*\)$"
DAMAGED = r"^is damaged and cannot be decoded \(.+\)$"
TOO_MANY = r"^has too many pixels; at most 100 million are allowed$"

GREYS = (0, 20_000, 40_000, 65_535)


def grey_of(*values: int) -> Callable[[], Image.Image]:
    return lambda: quarters("L", *values).convert("RGB")


def part(percent: int) -> Callable[[], bytes]:
    def make() -> bytes:
        content = jpeg(noise())
        return content[: len(content) * percent // 100]

    return make


def flawed_profile(profile: Callable[[], bytes]) -> Case:
    return Case(lambda: jpeg(drawn(), icc_profile=profile()))


OWN = {
    "JPEG": Case(lambda: jpeg(drawn())),
    "PNG": Case(lambda: saved(drawn(), "PNG"), off=0),
    "WebP": Case(lambda: saved(drawn(), "WEBP", quality=95), off=8),
    **{
        f"EXIF {number}": Case(lambda n=number: jpeg(turned(n), exif=exif_of(n)), rotated=number in UNDO)  # type: ignore[misc]
        for number in (*range(1, 9), 99)
    },
    "EXIF garbage": Case(lambda: jpeg(drawn(), exif=b"Exif\0\0II*\0" + bytes(range(255, 0, -1)))),
    "EXIF loop": Case(lambda: jpeg(turned(6), exif=looped_exif()), rotated=True),
    "CMYK": Case(
        lambda: saved(quarters("CMYK", (255, 0, 0, 0), (0, 255, 0, 0), (0, 0, 255, 0), (0, 0, 0, 255)), "TIFF"),
        lambda: quarters("RGB", "cyan", "magenta", "yellow", "black"),
        converted="CMYK",
    ),
    "CMYK inverted by Adobe": Case(
        lambda: jpeg(quarters("CMYK", (255, 0, 0, 0), (0, 255, 0, 0), (0, 0, 255, 0), (0, 0, 0, 255))),
        lambda: quarters("RGB", "cyan", "magenta", "yellow", "black"),
        converted="CMYK",
    ),
    "grey": Case(lambda: jpeg(quarters("L", 0, 80, 160, 255)), grey_of(0, 80, 160, 255), converted="grey"),
    "1-bit": Case(
        lambda: saved(quarters("1", 0, 1, 1, 1), "PNG"), grey_of(0, 255, 255, 255), converted="black and white", off=0
    ),
    "palette": Case(lambda: saved(drawn().quantize(4), "PNG"), converted="palette", off=0),
    "palette and transparency": Case(
        lambda: saved(quarters("RGBA", "#ff000000", "lime", "blue", "yellow").quantize(8), "PNG"),
        lambda: quarters("RGB", "white", "lime", "blue", "yellow"),
        converted="palette, transparency",
        off=1,
    ),
    "RGBA": Case(
        lambda: saved(quarters("RGBA", "#ff000000", "#00ff0080", "blue", "yellow"), "PNG"),
        lambda: quarters("RGB", "white", "#7fff7f", "blue", "yellow"),
        converted="transparency",
        off=1,
    ),
    "LA": Case(
        lambda: saved(quarters("LA", (0, 0), (0, 128), (80, 255), (200, 255)), "PNG"),
        grey_of(255, 127, 80, 200),
        converted="grey, transparency",
        off=1,
    ),
    "16-bit grey": Case(
        lambda: saved(Image.fromarray(np.asarray(quarters("I", *GREYS)).astype(np.uint16)), "PNG"),
        grey_of(*(value // 257 for value in GREYS)),
        converted="16-bit grey",
        off=1,
    ),
    "16-bit RGB": Case(
        lambda: png_16(np.asarray(quarters("RGB", "#204060", "lime", "blue", "#ff8001")).astype(np.uint16) * 257),
        lambda: quarters("RGB", "#204060", "lime", "blue", "#ff8001"),
        converted="16-bit colours",
        off=1,
    ),
    "MPO": Case(lambda: saved(drawn(), "MPO", save_all=True, append_images=[noise(64)], quality=95, subsampling=0)),
    "GIF animated": Case(lambda: animated("GIF"), converted="palette", off=1),
    "WebP animated": Case(lambda: animated("WEBP"), off=8),
    "APNG animated": Case(lambda: animated("PNG"), off=0),
    "truncated at 10 %": Case(part(10), refused=DAMAGED),
    "truncated at 50 %": Case(part(50), refused=DAMAGED),
    "truncated at 99 %": Case(part(99), refused=DAMAGED),
    "header only": Case(header_only, refused=DAMAGED),
    "empty": Case(lambda: b"", refused=NO_IMAGE),
    "bad CRC": Case(bad_checksum, refused=DAMAGED),
    "bad ICC": flawed_profile(broken_profile),
    "garbage ICC": flawed_profile(lambda: bytes(range(256))),
    "CMYK ICC on RGB": flawed_profile(cmyk_profile),
    "200 MB zTXt": Case(lambda: drawn_png(text_bomb(200)), refused=DAMAGED),
    "5,000 tEXt": Case(lambda: drawn_png(chunk(b"tEXt", b"Comment\0" + MARK) * 5000), off=0),
    "0x0": Case(lambda: png(0, 0), refused=DAMAGED),
    "2^31 wide": Case(lambda: png(2**31, 1), refused=TOO_MANY),
    "JPEG and zip": Case(lambda: jpeg(drawn()) + zipped()),
    "JPEG and HTML": Case(lambda: jpeg(drawn(), comment=b"<script>" + MARK) + b"<script>" + MARK + b"</script>"),
    "GIF and JS": Case(
        lambda: saved(drawn(), "GIF", comment=b"*/=1;" + MARK) + b"/*" + MARK + b"*/", converted="palette", off=1
    ),
    "TIFF named .jpg": Case(lambda: saved(drawn(), "TIFF"), off=0),
    "EPS named .jpg": Case(lambda: saved(drawn(), "EPS"), refused=NO_IMAGE),
    "PDF named .jpg": Case(lambda: saved(drawn(), "PDF"), refused=NO_IMAGE),
    "ICO named .jpg": Case(lambda: saved(drawn(), "ICO"), refused=NO_IMAGE),
    "PSD named .jpg": Case(photoshop, refused=NO_IMAGE),
    "JP2 named .jpg": Case(lambda: saved(drawn(), "JPEG2000"), refused=NO_IMAGE),
    "AVIF named .jpg": Case(lambda: saved(drawn(), "AVIF", quality=95, subsampling="4:4:4", speed=10), off=8),
    "HEIC named .jpg": Case(lambda: heic(drawn()), off=5),
    "progressive JPEG of 1,000 scans": Case(lambda: many_scans(1000)),
}
API = {
    "1 byte": Case(lambda: b"\x89", refused=NO_IMAGE),
    "html as png": Case(lambda: b"<!DOCTYPE html><html><body>404</body></html>", refused=NO_IMAGE),
    "svg": Case(lambda: b"<svg xmlns='http://www.w3.org/2000/svg' width='64' height='64'/>", refused=NO_IMAGE),
    "bomb of 60000": Case(lambda: png(60_000, 60_000), refused=TOO_MANY),
    "1x100000": Case(
        lambda: png(100_000, 1, bytes(300_001)),
        refused="^is 100000 x 1 pixels; its short side must have at least 32$",
    ),
    "animated": Case(lambda: animated("AVIF"), off=8),  # the issue decides so; the reference refused it
    "truncated jpeg": Case(lambda: jpeg(drawn())[:-20], refused=DAMAGED),
}
FILES = OWN | API


def nothing() -> list[bytes]:
    return []


def too_many() -> list[bytes]:
    return [photo()] * 101


def nine_and_a_bad_one() -> list[bytes]:
    return [*(photo(size=(64 + number, 64)) for number in range(9)), FILES["truncated jpeg"].make()]


REQUESTS = {
    "zero images": (nothing, "^must contain at least one image$"),
    "too many images": (too_many, "^must contain at most 100 images, got 101$"),
    "good nine plus one bad": (nine_and_a_bad_one, r"^9\.jpg is damaged and cannot be decoded \(.+\)$"),
}


def test_the_table_has_every_case_of_the_reference() -> None:
    assert len(OWN) == 53
    assert len(API) + len(REQUESTS) == 10


# Decoding


def decoded(folder: Path, content: bytes) -> tuple[Decoded, Image.Image]:
    """The verdict, and the picture as it is kept; decoded in this process, under a name that tells nothing."""
    source = folder / "photo.jpg"
    source.write_bytes(content)
    found = decode(source, folder / "kept", "photo.jpg", MAX_PIXELS)
    with Image.open(folder / found.photo.file) as image:
        image.load()
    assert image.size == (found.photo.width, found.photo.height)
    assert (image.mode, image.info.keys() & {"icc_profile", "exif", "comment", "transparency"}) == ("RGB", set())
    return found, image


def reason(folder: Path, content: bytes) -> str:
    """Why it is refused. Nothing of it is kept."""
    source = folder / "photo.jpg"
    source.write_bytes(content)
    with pytest.raises(Refused) as problem:
        decode(source, folder / "kept", "photo.jpg", MAX_PIXELS)
    assert list(folder.iterdir()) == [source]
    return str(problem.value)


def off(image: Image.Image, expected: Image.Image) -> float:
    """How much the worst corner differs: mean of its pixels, of 255, in the worst of three colours."""
    assert image.size == expected.size
    difference = np.asarray(ImageChops.difference(image, expected), np.float64)
    height, width = difference.shape[0] // 2, difference.shape[1] // 2
    corners = [difference[y : y + height, x : x + width] for y in (0, height) for x in (0, width)]
    return max(float(corner.mean((0, 1)).max()) for corner in corners)


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_shown_as_it_was_drawn_or_refused_for_a_reason(tmp_path: Path, name: str) -> None:
    case = FILES[name]
    content = case.make()
    if case.refused:
        assert re.search(case.refused, reason(tmp_path, content))
        return
    found, image = decoded(tmp_path, content)
    assert off(image, case.shows()) <= case.off
    assert (found.photo.converted, found.photo.rotated) == (case.converted, case.rotated)
    assert MARK not in (tmp_path / found.photo.file).read_bytes()


@pytest.mark.parametrize("name", REQUESTS)
def test_a_request_that_is_refused_leaves_nothing(services: Services, tmp_path: Path, name: str) -> None:
    make, pattern = REQUESTS[name]
    uploads = [upload(tmp_path / "sent", f"{number}.jpg", content) for number, content in enumerate(make())]
    with pytest.raises(InvalidRequest) as problem:
        tunes.create_tune(services, REQUEST, uploads)
    (told,) = problem.value.problems["images"]
    assert re.search(pattern, told)
    assert left_behind(services) == []


def test_after_all_of_them_the_child_lives_and_has_not_grown(services: Services, tmp_path: Path) -> None:
    """One real child takes the files one after the other, under its limit of memory."""
    before = set(multiprocessing.active_children())
    decoder = Decoder(services.settings)
    decoder.decode(upload(tmp_path / "sent", "first.png", photo()).path, tmp_path / "first", "first.png")
    (child,) = set(multiprocessing.active_children()) - before
    idle, files = peak_mb(child.pid), psutil.Process(child.pid).num_fds()
    kept = tmp_path / "kept"
    kept.mkdir()
    expected = set()
    for number, (name, case) in enumerate(FILES.items()):
        sent = upload(tmp_path / "sent", name, case.make()).path
        try:
            expected.add(decoder.decode(sent, kept / str(number), name).photo.file)
        except ValueError as problem:
            assert type(problem) is Refused, name
            assert re.search(case.refused or "^$", str(problem)), name
    assert {path.name for path in kept.iterdir()} == expected
    assert len(expected) == sum(case.refused is None for case in FILES.values())
    assert set(multiprocessing.active_children()) - before == {child}
    assert peak_mb(child.pid) - idle < 500
    assert psutil.Process(child.pid).num_fds() <= files
    decoder.close()


def peak_mb(pid: int | None) -> int:
    """The most memory that a process has had so far."""
    status = Path(f"/proc/{pid}/status").read_text("utf-8")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) // 1024  # type: ignore[index]


# HEIC


@pytest.mark.parametrize("orientation", [*range(1, 9), 99])
def test_a_heic_is_upright(tmp_path: Path, orientation: int) -> None:
    content = heic(turned(orientation), exif=exif_of(orientation).tobytes())
    found, image = decoded(tmp_path, content)
    assert off(image, drawn()) < 5
    assert (found.photo.format, found.photo.file) == ("HEIC", "kept.jpg")
    assert found.photo.rotated == (orientation in UNDO)
    assert ("turned upright" in found.photo.notes) == found.photo.rotated


@pytest.mark.parametrize(("boxes", "exif"), [(6, 1), (1, 6)])
def test_a_heic_is_turned_by_its_own_boxes_not_by_exif(tmp_path: Path, boxes: int, exif: int) -> None:
    content = heic(turned(boxes), exif=exif_of(boxes).tobytes())
    said = struct.pack(">HHIH", ORIENTATION, 3, 1, boxes)
    assert content.count(said) == 1
    found, image = decoded(tmp_path, content.replace(said, struct.pack(">HHIH", ORIENTATION, 3, 1, exif)))
    assert off(image, drawn()) < 5
    assert found.photo.rotated == (boxes == 6)


def test_a_heic_may_have_garbage_as_exif(tmp_path: Path) -> None:
    content = heic(turned(6), exif=exif_of(6).tobytes())
    at = content.index(b"MM\0*")
    found, image = decoded(tmp_path, content[: at + 4] + b"\xff" * 4 + content[at + 8 :])
    assert off(image, drawn()) < 5
    assert found.photo.rotated


def test_what_is_transparent_in_a_heic_becomes_white(tmp_path: Path) -> None:
    found, image = decoded(tmp_path, heic(quarters("RGBA", "#ff000000", "lime", "blue", "yellow")))
    assert off(image, quarters("RGB", "white", "lime", "blue", "yellow")) < 5
    assert found.photo.converted == "transparency"


@pytest.mark.parametrize("bits", [10, 12])
def test_a_heic_of_more_bits_is_scaled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    monkeypatch.setattr(pillow_heif.options, "SAVE_HDR_TO_12_BIT", bits == 12)
    expected, stream = quarters("RGB", "#204060", "lime", "blue", "#ff8001"), io.BytesIO()
    pixels = np.asarray(expected).astype("<u2") * 257
    pillow_heif.from_bytes("RGB;16", expected.size, pixels.tobytes()).save(stream, quality=95, chroma=444)
    found, image = decoded(tmp_path, stream.getvalue())
    assert off(image, expected) < 5
    assert found.photo.converted == f"{bits}-bit colours"


def test_half_a_heic_is_refused_in_one_line(tmp_path: Path) -> None:
    content = heic(noise())  # what libheif says of it has a line break
    assert re.search(DAMAGED, reason(tmp_path, content[: len(content) // 2]))


def test_a_heic_that_is_larger_than_it_says_is_refused(tmp_path: Path) -> None:
    said, content = b"ispe" + struct.pack(">III", 0, 640, 64), heic(drawn((640, 64)))
    assert content.count(said) == 1
    told = reason(tmp_path, content.replace(said, b"ispe" + struct.pack(">III", 0, 64, 64)))
    assert re.search(DAMAGED, told) and "size" in told


def test_a_heic_decodes_in_the_child(decoder: Decoder, tmp_path: Path) -> None:
    sent = upload(tmp_path / "sent", "phone.heic", heic(turned(6), exif=exif_of(6).tobytes()))
    found = decoder.decode(sent.path, tmp_path / "kept", "phone.heic")
    assert (found.photo.name, found.photo.width, found.photo.height) == ("phone.heic", 96, 64)


# Files whose last bytes are missing: no pixel may be, and a note says so

WHOLE, NEARLY = "its last bytes are missing, but all its pixels are there", "its last bytes are missing: at most"
UNENDED: dict[str, tuple[Callable[[], bytes], int]] = {  # a whole file, and how many bytes are cut off
    "JPEG without the second byte of its end mark": (lambda: jpeg(noise()), 1),
    "JPEG without its end mark": (lambda: jpeg(noise()), 2),
    "JPEG of smaller colours": (lambda: saved(noise(), "JPEG", quality=80), 2),
    "JPEG in grey": (lambda: saved(noise().convert("L"), "JPEG"), 2),
    "JPEG in CMYK": (lambda: saved(noise().convert("CMYK"), "JPEG"), 2),
    "progressive JPEG": (lambda: saved(noise(), "JPEG", quality=75, progressive=True), 2),
    "JPEG with restart marks": (lambda: jpeg(noise(), restart_marker_rows=1), 2),
    "JPEG that is turned": (lambda: jpeg(noise(), exif=exif_of(6)), 2),
    "JPEG in one colour": (lambda: jpeg(Image.new("RGB", (256, 256), "teal")), 2),
    "PNG without IEND": (lambda: saved(noise(), "PNG"), 12),
    "PNG without a part of IEND": (lambda: saved(noise(), "PNG"), 7),
    "JPEG in one colour, of zeros": (lambda: saved(Image.new("RGB", (256, 256), "teal"), "JPEG", optimize=True), 2),
    "WebP": (lambda: saved(noise(), "WEBP", quality=80), 1),
}
CUT: dict[str, tuple[Callable[[], bytes], int]] = {  # pixels are missing
    "JPEG": (lambda: jpeg(noise()), 2000),
    "progressive JPEG within its last scan": (lambda: saved(noise(), "JPEG", quality=75, progressive=True), 2000),
    "JPEG with restart marks": (lambda: jpeg(noise(), restart_marker_rows=1), 2000),
    "JPEG in one colour": (lambda: jpeg(Image.new("RGB", (256, 256), "teal")), 60),
    "PNG": (lambda: saved(noise(), "PNG"), 2000),
    "WebP": (lambda: saved(noise(), "WEBP"), 2000),
    "HEIC": (lambda: heic(noise()), 2000),
    "AVIF": (lambda: saved(noise(), "AVIF"), 2000),
    "TIFF": (lambda: saved(noise(), "TIFF"), 2000),
    "BMP": (lambda: saved(noise(), "BMP"), 2000),
}


@pytest.mark.parametrize("kind", UNENDED)
def test_a_photo_that_lacks_only_its_end_has_the_same_pixels_and_a_note(tmp_path: Path, kind: str) -> None:
    make, missing = UNENDED[kind]
    whole = decoded(tmp_path, make())[0]
    cut = decoded(tmp_path, make()[:-missing])[0]
    assert cut.digest == whole.digest
    assert cut.photo.notes == [WHOLE, *whole.photo.notes]
    assert WHOLE not in whole.photo.notes


@pytest.mark.parametrize(
    ("kind", "padding"), [(kind, bytes(count)) for kind in CUT for count in (0, 4096) if "JPEG" in kind or not count]
)
def test_a_photo_that_lacks_pixels_is_refused(tmp_path: Path, kind: str, padding: bytes) -> None:
    """Also a JPEG where a program has filled up the last sector with zeros, which a decoder would take for pixels."""
    make, missing = CUT[kind]
    assert re.search(DAMAGED, reason(tmp_path, make()[:-missing] + padding))


def test_a_jpeg_without_its_end_may_be_padded_with_zeros(tmp_path: Path) -> None:
    whole = decoded(tmp_path, jpeg(noise()))[0]
    for missing in (1, 2):
        found = decoded(tmp_path, jpeg(noise())[:-missing] + bytes(4096))[0]
        assert found.digest == whole.digest and found.photo.notes[0] == WHOLE


def test_a_progressive_jpeg_without_its_last_scan_is_refused(tmp_path: Path) -> None:
    """Every line is there, but coarser than the camera saw it."""
    content = saved(noise(), "JPEG", quality=75, progressive=True)
    last = content.rindex(b"\xff\xda")
    tables = content.rindex(b"\xff\xc4", 0, last)
    assert re.search(DAMAGED, reason(tmp_path, content[:tables]))
    assert re.search(DAMAGED, reason(tmp_path, content[:last]))


def test_a_few_bytes_more_cost_a_corner_and_the_note_says_so(tmp_path: Path) -> None:
    content = saved(noise(512), "JPEG")
    _, image = decoded(tmp_path, content)
    found, cut = decoded(tmp_path, content[:-5])
    assert found.photo.notes[0] == f"{NEARLY} 16 x 16 pixels in a corner of it are wrong"
    left, top, *_ = ImageChops.difference(image, cut).getbbox()  # type: ignore[misc]
    assert min(left, top) >= 512 - 16 - 18  # the kept copies are JPEGs too, in blocks of their own


def test_what_follows_the_end_of_a_jpeg_is_not_commented(tmp_path: Path) -> None:
    """Samsung's phones write facts there, Google's a video."""
    whole = decoded(tmp_path, jpeg(noise()))[0]
    found = decoded(tmp_path, jpeg(noise()) + b"SEFH" + bytes(50) + b"SEFT")[0]
    assert (found.digest, found.photo.notes) == (whole.digest, whole.photo.notes)


# Files with several pictures


def pages(**options: Any) -> bytes:
    return saved(drawn(), "TIFF", save_all=True, append_images=[Image.new("RGB", (96, 64))], **options)


def with_small_copy() -> bytes:
    """A TIFF whose second page says that it is a small copy of the first (NewSubfileType 1)."""
    copy = Image.new("RGB", (48, 32))
    copy.encoderinfo = {"tiffinfo": {254: 1}}
    return saved(drawn(), "TIFF", save_all=True, append_images=[copy])


def mpo(**options: Any) -> bytes:
    return saved(drawn(), "MPO", save_all=True, append_images=[noise(64)], quality=95, subsampling=0, **options)


def burst() -> bytes:
    load_decoders()
    return saved(drawn(), "HEIF", save_all=True, append_images=[noise(64)], quality=95, chroma=444)


ANIMATION, SEVERAL = "an animation: its first picture was taken", "it has several pictures: the first was taken"
SEVERAL_PICTURES: dict[str, tuple[Callable[[], bytes], list[str]]] = {
    **{form: (lambda form=form: animated(form), [ANIMATION]) for form in ("GIF", "PNG", "WEBP", "AVIF")},  # type: ignore[misc]
    "MPO": (mpo, [SEVERAL]),
    "MPO with a gain map": (lambda: mpo(xmp=b"<x xmlns:hdrgm='http://ns.adobe.com/hdr-gain-map/1.0/'/>"), []),
    "HEIC": (burst, [SEVERAL]),
    "TIFF": (pages, [SEVERAL]),
    "TIFF with a small copy": (with_small_copy, []),
    "GIF of one picture": (lambda: saved(drawn(), "GIF"), []),
    "JPEG": (lambda: jpeg(drawn()), []),
}


@pytest.mark.parametrize("kind", SEVERAL_PICTURES)
def test_the_first_of_several_pictures_is_taken_and_a_note_says_so(tmp_path: Path, kind: str) -> None:
    make, notes = SEVERAL_PICTURES[kind]
    found, image = decoded(tmp_path, make())
    assert off(image, drawn()) < 8
    assert [note for note in found.photo.notes if "picture" in note] == notes


# Colours


def test_a_profile_of_other_colours_is_converted_and_named(tmp_path: Path) -> None:
    p3 = Image.new("RGB", (64, 64), (200, 100, 50))
    found, image = decoded(tmp_path, saved(p3, "PNG", icc_profile=p3_profile()))
    assert found.photo.converted == "Display P3"
    assert "converted to sRGB from Display P3" in found.photo.notes
    assert off(image, Image.new("RGB", (64, 64), p3_in_srgb(200, 100, 50))) <= 2


def p3_in_srgb(*colour: int) -> tuple[int, ...]:
    """By the matrix of the two sets of primaries, whose white and curve are the same."""
    values = np.array(colour) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    matrix = [[1.22494, -0.22494, 0], [-0.04206, 1.04206, 0], [-0.01964, -0.07864, 1.09828]]
    linear = (np.array(matrix) @ linear).clip(0, 1)
    values = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    return tuple(int(value) for value in (values * 255).round())


def test_a_profile_of_the_same_colours_changes_nothing(tmp_path: Path) -> None:
    found, image = decoded(tmp_path, saved(noise(), "PNG", icc_profile=srgb_profile()))
    assert (found.photo.converted, off(image, noise())) == (None, 0)


def test_an_alpha_channel_in_which_nothing_is_transparent_is_none(tmp_path: Path) -> None:
    found, image = decoded(tmp_path, saved(drawn().convert("RGBA"), "PNG"))
    assert (found.photo.converted, off(image, drawn())) == (None, 0)


def test_grey_with_numbers_of_other_sizes_is_scaled(tmp_path: Path) -> None:
    expected = quarters("L", 0, 80, 160, 255)
    numbers = np.asarray(expected)
    for scaled in (numbers.astype(np.int32) * 257, numbers.astype(np.float32) / 255):
        found, image = decoded(tmp_path, saved(Image.fromarray(scaled), "TIFF"))
        assert off(image, expected.convert("RGB")) <= 1
        assert found.photo.converted == "32-bit grey"


def test_a_transparent_grey_of_sixteen_bits_is_not_taken_for_one_of_eight(tmp_path: Path) -> None:
    """40,000 of 65,535 is 155 of 255, and 155 of 65,535 is what is transparent here: nothing."""
    lines = b"".join(b"\0" + struct.pack(">H", 40_000) * 64 for _ in range(64))
    found, image = decoded(tmp_path, png(64, 64, lines, 16, 0, chunk(b"tRNS", struct.pack(">H", 155))))
    assert off(image, Image.new("RGB", (64, 64), (155,) * 3)) <= 1
    assert found.photo.converted == "16-bit grey"


def test_lab_is_converted(tmp_path: Path) -> None:
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    soft = quarters("RGB", "#a05040", "#50a060", "#4060a0", "#c0b080")
    found, image = decoded(tmp_path, saved(ImageCms.applyTransform(soft, to_lab), "TIFF"))  # type: ignore[arg-type]
    assert off(image, soft) < 5
    assert found.photo.converted == "LAB"


def test_a_turned_tiff_is_upright_with_a_note(tmp_path: Path) -> None:
    """Pillow turns it as it is loaded, and then no longer says that it did."""
    found, image = decoded(tmp_path, saved(turned(6), "TIFF", tiffinfo={ORIENTATION: 6}))
    assert (found.photo.rotated, off(image, drawn())) == (True, 0)


@pytest.mark.parametrize(("options", "suffix"), [({"quality": 90}, ".jpg"), ({"lossless": True}, ".png")])
def test_a_webp_is_kept_without_loss_only_where_it_has_none(
    tmp_path: Path, options: dict[str, Any], suffix: str
) -> None:
    for more in ({}, {"icc_profile": srgb_profile()}):
        found, _ = decoded(tmp_path, saved(drawn(), "WEBP", **options, **more))
        assert found.photo.file == f"kept{suffix}"


def test_comments_named_like_the_decoder_s_keys_change_nothing(tmp_path: Path) -> None:
    notes = PngInfo()
    for name in ("icc_profile", "exif", "original_orientation", "bit_depth", "XML:com.adobe.xmp"):
        notes.add_text(name, "6")
    found, image = decoded(tmp_path, saved(drawn(), "PNG", pnginfo=notes))
    assert (found.photo.converted, found.photo.rotated, off(image, drawn())) == (None, False, 0)


def test_a_refusal_comes_out_of_the_child_as_it_was() -> None:
    back = pickle.loads(pickle.dumps(Refused("is empty")))
    assert (type(back), str(back)) == (Refused, "is empty")


# What is said of a photo's quality


def test_a_good_photo_is_not_commented(tmp_path: Path) -> None:
    photo = decoded(tmp_path, saved(noise(SMALL_PX), "PNG"))[0].photo
    assert photo.sharpness is not None and photo.sharpness > 100
    assert (photo.blurred, photo.too_small, photo.notes) == (False, False, [])


def test_notes_say_what_was_done_and_what_is_in_doubt(tmp_path: Path) -> None:
    photo = decoded(tmp_path, jpeg(turned(6).convert("CMYK").filter(ImageFilter.BoxBlur(9)), exif=exif_of(6)))[0].photo
    assert photo.rotated and photo.blurred and photo.too_small
    assert photo.notes == [
        "turned upright",
        "converted to sRGB from CMYK",
        f"blurred: sharpness {photo.sharpness:.0f}, where sharp photos have 100 and more",
        "small: 96 x 64 pixels; 1024 of the short side are best, 512 the least",
    ]


@pytest.mark.parametrize(("side", "small"), [(SMALL_PX - 1, True), (SMALL_PX, False)])
def test_a_photo_is_small_by_its_short_side(tmp_path: Path, side: int, small: bool) -> None:
    assert decoded(tmp_path, photo(size=(side, 2 * SMALL_PX)))[0].photo.too_small == small


@pytest.fixture(scope="session")
def subjects() -> list[Image.Image]:
    """Real photos of ten subjects and two people, none a copy of another."""
    data = SHARED / "data"
    paths = [path for number in (0, 1, 3, 4) for path in data.glob(f"subjects/*/0{number}.jpg")]
    paths += data.glob("faces/person_*/*.*")
    if len(paths) < 20:
        pytest.skip("the photos in ../shared/data are not on this machine")
    return [Image.open(path).convert("RGB") for path in paths]


def test_real_photos_are_sharp_and_blurred_ones_are_not(tmp_path: Path, subjects: list[Image.Image]) -> None:
    for image in subjects:
        blur = image.filter(ImageFilter.GaussianBlur(max(image.size) / 100))
        sharp, soft = (decoded(tmp_path, jpeg(one))[0].photo for one in (image, blur))
        assert soft.blurred and not sharp.blurred
        assert soft.sharpness < BLURRED_BELOW / 2 < BLURRED_BELOW * 2 < sharp.sharpness  # type: ignore[operator]


def test_copies_look_alike_and_no_two_photos_do(tmp_path: Path, subjects: list[Image.Image]) -> None:
    looks = []
    for image in subjects:
        smaller = image.resize((image.width * 9 // 10, image.height * 9 // 10), Image.Resampling.LANCZOS)
        files = (jpeg(image), saved(image, "JPEG", quality=70), saved(smaller, "JPEG", quality=70))
        first, *copies = (decoded(tmp_path, content)[0] for content in files)
        assert all(alike(first.look, copy.look) and first.digest != copy.digest for copy in copies)
        looks.append(first.look)
    assert not any(alike(one, other) for one, other in itertools.combinations(looks, 2))


def test_the_same_pixels_have_the_same_digest_in_each_format(tmp_path: Path) -> None:
    files = (saved(drawn(), "PNG"), saved(drawn(), "BMP"), saved(turned(6), "PNG", exif=exif_of(6)))
    assert len({decoded(tmp_path, content)[0].digest for content in files}) == 1
    flat = [decoded(tmp_path, photo(size=size))[0].digest for size in ((64, 32), (32, 64))]
    assert len(set(flat)) == 2


# Speed


def test_a_photo_of_12_megapixels_takes_less_than_a_second_of_one_core(tmp_path: Path) -> None:
    source = tmp_path / "camera.jpg"
    source.write_bytes(jpeg(noise(1000).resize((4000, 3000)), exif=exif_of(6)))
    started = time.process_time()
    found = decode(source, tmp_path / "kept", "camera.jpg", MAX_PIXELS)
    assert time.process_time() - started < 0.7
    assert (found.photo.width, found.photo.height) == (3000, 4000)
