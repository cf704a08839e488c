"""What the decoding child process does: one photo file -> one upright 8-bit sRGB file, and what can be said of it."""

from __future__ import annotations

import hashlib
import re
import resource
import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pillow_heif
from PIL import Image, UnidentifiedImageError

from trainer.contract.photos import Photo
from trainer.photos.colours import to_srgb

# Told by content, never by name; MPO comes as JPEG, and HEIC as HEIF.
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "HEIF", "BMP", "TIFF", "GIF")
READABLE = "JPEG, PNG, WebP, AVIF, HEIC, BMP, TIFF, GIF"
LOSSY = ("JPEG", "MPO", "HEIF", "AVIF")  # kept as JPEG: to write 12 megapixels takes 0.06 s, and 0.7 s as PNG
MIN_SIDE_PX = 32
MAX_ASPECT = 10
MEMORY_BYTES = 2 * 2**30  # a 100-megapixel RGBA picture with its copies fits
SAID_CHARS = 200  # of what a decoder says against a file
STRIP_PX = 512  # lines that are hashed at once, so that the pixels need not be in memory twice
RAW_16_BIT = re.compile(r"\b(I|LA|RGB[AX]?|CMYK);16")  # Pillow's name of what it unpacks; BGR;16 are 16 bits a pixel
ORIENTATION = 0x0112  # in EXIF
# What reading EXIF raises: anything may write it, and garbage leads wherever its numbers point.
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
SMALL_PX = 512  # of the short side: below it, families that train at 512 px and more are shown an enlarged photo
SHARPNESS_PX = 512  # long side at which sharpness is measured; smaller photos as they are
# On the 82 pictures of subjects and people that the tests use: 118 and more as they are; 10 and less after a blur of a
# hundredth of their long side. Four pictures of 128 px and less stay above 100 then: a blur of a pixel is none.
BLURRED_BELOW = 40
# Of 64. A copy of those pictures at 90 % of the size, saved as JPEG of quality 70, differs in 3 at most; two of
# different photos in 7 and more (passport photos of one man), of different things in 16 and more.
ALIKE_BITS = 5


class Refused(ValueError):
    """A photo that is refused for what it is: the second half of a sentence that begins with the file's name."""


@dataclass(frozen=True)
class Decoded:
    """A verdict, and what tells photos that repeat each other: sha256 of the pixels, and a hash of how it looks."""

    photo: Photo
    digest: str
    look: int


@dataclass
class Stored:
    """How a file has its picture."""

    form: str
    depth: int  # bits of a colour
    turned: bool  # the file says that it does not stand upright


def begin() -> None:
    """Run first in the child: decoders that want more memory than any photo needs get none; all are loaded."""
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
    except Exception as error:  # noqa: BLE001  # the edge of a process, for strangers' files: decoders raise anything
        message = " ".join(str(error).split())[:SAID_CHARS]  # some decoders write several lines
        raise Refused(f"is damaged and cannot be decoded ({type(error).__name__}: {message})") from None
    image.info.clear()  # comments and profiles would be written along with the pixels
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
    )
    grey = small_grey(image)
    judge(photo, sharpness(grey))
    return Decoded(photo, digest_of(image), look_of(grey))


# Reading


def read(source: Path, max_pixels: int) -> tuple[Image.Image, Stored]:
    """The first picture of a file. Raises Refused, and whatever decoders raise."""
    with Image.open(source, formats=[form for form in FORMATS if form in Image.OPEN]) as image:
        check_size(*image.size, max_pixels)
        stored = Stored(str(image.format), bits_of(image), is_stored_turned(image))
        image.load()
        return image, stored


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Raises Refused, before anything is decoded."""
    if width * height > max_pixels:
        raise Refused(f"has {width} x {height} pixels; at most {max_pixels / 1e6:g} million are allowed")
    if min(width, height) < MIN_SIDE_PX:
        raise Refused(f"is {width} x {height} pixels; its short side must have at least {MIN_SIDE_PX}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise Refused(f"is {width} x {height} pixels; that is too long and thin (at most {MAX_ASPECT} to 1)")


def why_unidentified(source: Path) -> str:
    """A file that begins as a photo does is told from what is none."""
    with source.open("rb") as file:
        head = file.read(16)
    for form in FORMATS:
        accepts = Image.OPEN[form][1] if form in Image.OPEN else None
        if accepts and accepts(head) is True:
            return f"is damaged and cannot be decoded (it begins as {format_name(form)}, and does not go on so)"
    return f"is not an image that can be read ({READABLE})"


def format_name(form: str) -> str:
    """A format as phones name it."""
    return "HEIC" if form == "HEIF" else form


def is_lossless_webp(source: Path) -> bool:
    """By the name of the chunk with the pixels, which stands behind a profile at most."""
    with source.open("rb") as file:
        return b"VP8L" in file.read(2**16)


def bits_of(image: Image.Image) -> int:
    """How many bits a colour has in the file. Pillow itself keeps 16 of grey, and the upper 8 of anything else."""
    if any(RAW_16_BIT.search(str(tile.args)) for tile in getattr(image, "tile", [])):
        return 16
    depth = image.info.get("bit_depth", 8) if image.format == "HEIF" else 8
    return int(depth)


# Turning


def orientation_of(image: Image.Image) -> int:
    """What EXIF or XMP says; 1, as it stands, where that cannot be understood."""
    try:
        found = image.getexif().get(ORIENTATION)
    except BROKEN_EXIF:
        return 1
    return found if isinstance(found, int) and found in TURNS else 1


def is_stored_turned(image: Any) -> bool:
    """Asked before the pixels are loaded, for the decoders of HEIC and of TIFF turn them then, and forget it.

    HEIC says it in boxes of its own; what EXIF says in a HEIC is for nothing.
    """
    if image.format != "HEIF":
        return orientation_of(image) != 1
    try:
        steps = image._heif_file[image.tell()]._c_image.transformations
    except AttributeError:  # these are no public names; phones write the same into EXIF
        return image.info.get("original_orientation") in TURNS
    return any(step[0] in ("irot", "imir") and step != ("irot", 0) for step in steps)


def upright(image: Image.Image) -> tuple[Image.Image, bool]:
    """The picture as it stands, and whether it had to be turned. `ImageOps` would also write new EXIF, and copy."""
    method = TURNS.get(orientation_of(image))
    if method is None:
        return image, False
    turned = image.transpose(method)
    turned.info = dict(image.info)
    return turned, True


# What can be said of it


def small_grey(image: Image.Image) -> Image.Image:
    """The picture without its colours, at half its size, a third ... as long as its long side is enough to look at."""
    return image.reduce(max(1, max(image.size) // (2 * SHARPNESS_PX))).convert("L")


def judge(photo: Photo, sharp: float) -> None:
    """Put into a verdict what the picture is good for, with a note for whatever was done or is in doubt."""
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
    """The same for the same pixels in the same size, whatever the files were."""
    sha = hashlib.sha256(f"{image.width}x{image.height}".encode())
    for top in range(0, image.height, STRIP_PX):
        sha.update(image.crop((0, top, image.width, min(top + STRIP_PX, image.height))).tobytes())
    return sha.hexdigest()


def look_of(grey: Image.Image) -> int:
    """A hash of 64 bits that is much the same for pictures that look the same: whether it gets brighter to the right,
    in 8 x 8 places (dHash; N. Krawetz, hackerfactor.com, 2013)."""
    small = np.asarray(grey.resize((9, 8), Image.Resampling.LANCZOS), np.int16)
    return int.from_bytes(np.packbits(small[:, 1:] > small[:, :-1]).tobytes(), "big")


def alike(one: int, other: int) -> bool:
    """Whether two hashes are those of almost the same picture."""
    return (one ^ other).bit_count() <= ALIKE_BITS
