"""The work of the decoding child process: one photo file -> one upright 8-bit sRGB file, and its verdict."""

from __future__ import annotations

import hashlib
import re
import resource
import struct
import warnings
import zlib
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pillow_heif
from PIL import Image, UnidentifiedImageError

from trainer.contract.photos import Photo
from trainer.photos.colours import to_srgb
from trainer.photos.frames import notes_on_frames
from trainer.photos.unended import TAKEN, lacks_end, read_unended

# Recognized by content, never by file name; MPO counts as JPEG, HEIC as HEIF.
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "HEIF", "BMP", "TIFF", "GIF")
READABLE = "JPEG, PNG, WebP, AVIF, HEIC, BMP, TIFF, GIF"
LOSSY = ("JPEG", "MPO", "HEIF", "AVIF")  # kept as JPEG: writing 12 megapixels takes 0.06 s, and 0.7 s as PNG
UNENDED_READ = ("JPEG", "MPO", "PNG")  # whose decoders may not notice that the last bytes are missing
MIN_SIDE_PX = 32
MAX_ASPECT = 10
MEMORY_BYTES = 2 * 2**30  # a 100-megapixel RGBA picture with its copies fits
REASON_CHARS = 200  # of a decoder's message
STRIP_PX = 512  # lines that are hashed at once: the pixels are not copied as a whole
RAW_16_BIT = re.compile(r"\b(I|LA|RGB[AX]?|CMYK);16")  # Pillow's raw modes; BGR;16 has 16 bits a pixel
ORIENTATION = 0x0112  # EXIF tag
# Reading EXIF may raise all of these: damaged offsets point anywhere.
BROKEN_EXIF = (
    ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError, SyntaxError, TypeError,
    ValueError, struct.error, zlib.error,
)  # fmt: skip
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SMALL_PX = 512  # of the short side: smaller photos are enlarged for families that train at 512 px and more
SHARPNESS_PX = 512  # long side at which sharpness is measured; smaller photos are not scaled
# Measured on the tests' 82 pictures of subjects and people: 118 and more unchanged, 10 and less after a blur of a
# hundredth of the long side (except four pictures of 128 px and less, where that is only one pixel).
BLURRED_BELOW = 40
# Of 64 bits. Copies of those pictures at 90 % of the size and JPEG quality 70 differ in 3 bits at most; different
# photos in 7 and more (passport photos of one man); photos of different things in 16 and more.
ALIKE_BITS = 5


class Refused(ValueError):
    """The photo is refused. The message is the second half of a sentence that begins with the file's name."""


@dataclass(frozen=True)
class Decoded:
    """A verdict, and two values that find duplicates: sha256 of the pixels, and a perceptual hash."""

    photo: Photo
    digest: str
    look: int


@dataclass
class Stored:
    """How the file stores its picture."""

    form: str
    depth: int  # bits per colour
    turned: bool  # the file says that the stored picture is rotated
    notes: list[str]  # what is left out of it


def begin() -> None:
    """Runs first in the child process: limits its memory and loads all decoders."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    load_decoders()


def load_decoders() -> None:
    Image.init()
    if "HEIF" not in Image.OPEN:
        pillow_heif.options.DECODE_THREADS = 1  # the other core decodes the next photo
        pillow_heif.register_heif_opener(thumbnails=False)


def decode(source: Path, target: Path, name: str, max_pixels: int) -> Decoded:
    """Decode one photo and write it as `target`.jpg (from a lossy format) or .png: upright, 8-bit sRGB, no metadata.

    Raises Refused.
    """
    load_decoders()
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        image, stored = read(source, max_pixels)
        image, turned = upright(image)
        image, converted = to_srgb(image, stored.depth)
    except (Refused, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise Refused(f"has too many pixels; at most {max_pixels / 1e6:g} million are allowed") from None
    except UnidentifiedImageError:
        raise Refused(why_unidentified(source)) from None
    except Exception as error:  # noqa: BLE001  # the edge of a process, with untrusted files: decoders raise anything
        message = " ".join(str(error).split())[:REASON_CHARS]  # some decoders write several lines
        raise Refused(f"is damaged and cannot be decoded ({message or 'the decoder gave no reason'})") from None
    image.info.clear()  # else comments and profiles would be saved too
    lossy = stored.form in LOSSY or (stored.form == "WEBP" and not is_lossless_webp(source))
    file = target.with_suffix(".jpg" if lossy else ".png")
    options = {"quality": 95, "subsampling": 0} if lossy else {"compress_level": 1}
    image.save(file, None, **options)
    photo = Photo(
        name=name,
        file=file.name,
        width=image.width,
        height=image.height,
        format=format_name(stored.form),
        rotated=stored.turned or turned,
        converted=converted,
        notes=stored.notes,
    )
    grey = small_grey(image)
    judge(photo, sharpness(grey))
    return Decoded(photo, digest_of(image), difference_hash(grey))


# Reading


def read(source: Path, max_pixels: int) -> tuple[Image.Image, Stored]:
    """The first picture of a file, whose last bytes may be missing. Raises Refused, and what decoders raise."""
    try:
        image, stored = _read(source, max_pixels)
    except (Refused, Image.DecompressionBombError):
        raise
    except (OSError, SyntaxError, ValueError) as problem:
        with suppress(OSError, SyntaxError, ValueError):  # it is broken in another way, which `problem` names
            if found := _read_unended(source, max_pixels):
                return found
        raise problem from None
    if stored.form in UNENDED_READ and lacks_end(source.read_bytes()):  # the decoder may have read zeros as pixels
        if stored.form == "PNG":
            stored.notes.append(TAKEN)
        elif found := _read_unended(source, max_pixels):
            return found
        else:
            raise Refused("is damaged and cannot be decoded (its last lines are missing)")
    return image, stored


def _read_unended(source: Path, max_pixels: int) -> tuple[Image.Image, Stored] | None:
    """The picture of a file whose last bytes are missing; None: pixels are missing too."""
    facts: list[Stored] = []

    def read_whole(data: bytes) -> Image.Image:
        image, stored = _read(BytesIO(data), max_pixels)
        facts.append(stored)
        return image

    found = read_unended(source.read_bytes(), read_whole)
    if found is None:
        return None
    facts[0].notes.append(found[1])
    return found[0], facts[0]


def _read(source: Path | BytesIO, max_pixels: int) -> tuple[Image.Image, Stored]:
    with Image.open(source, formats=[form for form in FORMATS if form in Image.OPEN]) as image:
        check_size(*image.size, max_pixels)
        stored = Stored(str(image.format), bits_of(image), is_stored_turned(image), notes_on_frames(image))
        image.load()
        return image, stored


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Check the size before decoding. Raises Refused."""
    if width * height > max_pixels:
        raise Refused(f"has {width} x {height} pixels; at most {max_pixels / 1e6:g} million are allowed")
    if min(width, height) < MIN_SIDE_PX:
        raise Refused(f"is {width} x {height} pixels; its short side must have at least {MIN_SIDE_PX}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise Refused(f"is {width} x {height} pixels; that is too long and thin (at most {MAX_ASPECT} to 1)")


def why_unidentified(source: Path) -> str:
    """The reason: a damaged photo, or not a photo at all."""
    with source.open("rb") as file:
        head = file.read(16)
    for form in FORMATS:
        accepts = Image.OPEN[form][1] if form in Image.OPEN else None
        if accepts and accepts(head) is True:
            return f"is damaged and cannot be decoded (only its beginning is {format_name(form)})"
    return f"is not an image that can be read ({READABLE})"


def format_name(form: str) -> str:
    """The format's name as phones show it."""
    return "HEIC" if form == "HEIF" else form


def is_lossless_webp(source: Path) -> bool:
    """Decided by the name of the pixel chunk, which only a profile can precede."""
    with source.open("rb") as file:
        return b"VP8L" in file.read(2**16)


def bits_of(image: Image.Image) -> int:
    """Bits per colour in the file. Pillow keeps 16 bits of grey, and the upper 8 of other colours."""
    if any(RAW_16_BIT.search(str(tile.args)) for tile in getattr(image, "tile", [])):
        return 16
    depth = image.info.get("bit_depth", 8) if image.format == "HEIF" else 8
    return int(depth)


# Turning


def orientation_of(image: Image.Image) -> int:
    """Orientation by EXIF or XMP, 1 to 8; 1 (upright) where it cannot be read."""
    try:
        found = image.getexif().get(ORIENTATION)
    except BROKEN_EXIF:
        return 1
    return found if isinstance(found, int) and found in TURNS else 1


def is_stored_turned(image: Any) -> bool:
    """Whether the stored picture is rotated. Call it before the pixels are loaded: HEIC and TIFF decoders rotate then.

    HEIC has its own boxes for rotation; its EXIF orientation has no effect.
    """
    if image.format != "HEIF":
        return orientation_of(image) != 1
    try:
        steps = image._heif_file[image.tell()]._c_image.transformations
    except AttributeError:  # these names are not public; phones write the same into EXIF
        return image.info.get("original_orientation") in TURNS
    return any(step[0] in ("irot", "imir") and step != ("irot", 0) for step in steps)


def upright(image: Image.Image) -> tuple[Image.Image, bool]:
    """The upright picture, and whether it was rotated. `ImageOps` would also write new EXIF, and copy."""
    method = TURNS.get(orientation_of(image))
    if method is None:
        return image, False
    turned = image.transpose(method)
    turned.info = dict(image.info)
    return turned, True


# The verdict


def small_grey(image: Image.Image) -> Image.Image:
    """The picture in grey, reduced by the largest whole factor that leaves its long side 1024 px or more."""
    return image.reduce(max(1, max(image.size) // (2 * SHARPNESS_PX))).convert("L")


def judge(photo: Photo, sharp: float) -> None:
    """Add notes to the verdict: what was converted, and what may be a problem in training."""
    photo.sharpness = round(sharp, 1)
    photo.blurred = sharp < BLURRED_BELOW
    photo.too_small = min(photo.width, photo.height) < SMALL_PX
    if photo.rotated:
        photo.notes.append("turned upright")
    if photo.converted:
        photo.notes.append(f"converted to sRGB from {photo.converted}")
    if photo.blurred:
        photo.notes.append(f"blurred: sharpness {sharp:.0f}, where sharp photos have 100 and more")
    if photo.too_small:
        photo.notes.append(
            f"small: {photo.width} x {photo.height} pixels; 1024 of the short side are best, {SMALL_PX} the least"
        )


def sharpness(grey: Image.Image) -> float:
    """Variance of the Laplacian, 0 to 255 (Pech-Pacheco et al. 2000), at a long side of 512 px."""
    grey = grey.copy()
    grey.thumbnail((SHARPNESS_PX, SHARPNESS_PX), Image.Resampling.LANCZOS)
    if min(grey.size) < 3:
        return 0.0
    a = np.asarray(grey, np.float32)
    return float((a[1:-1, :-2] + a[1:-1, 2:] + a[:-2, 1:-1] + a[2:, 1:-1] - 4 * a[1:-1, 1:-1]).var())


def digest_of(image: Image.Image) -> str:
    """sha256 of pixels and size; it does not depend on the file format."""
    sha = hashlib.sha256(f"{image.width}x{image.height}".encode())
    for top in range(0, image.height, STRIP_PX):
        sha.update(image.crop((0, top, image.width, min(top + STRIP_PX, image.height))).tobytes())
    return sha.hexdigest()


def difference_hash(grey: Image.Image) -> int:
    """Perceptual hash of 64 bits (dHash; N. Krawetz, hackerfactor.com, 2013): similar pictures differ in few bits.
    Each bit: does brightness rise to the right, in 8 x 8 places?"""
    small = np.asarray(grey.resize((9, 8), Image.Resampling.LANCZOS), np.int16)
    return int.from_bytes(np.packbits(small[:, 1:] > small[:, :-1]).tobytes(), "big")


def alike(one: int, other: int) -> bool:
    """Whether two hashes are those of almost the same picture."""
    return (one ^ other).bit_count() <= ALIKE_BITS
