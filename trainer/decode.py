"""What the decoding child process does: one photo file -> one upright 8-bit sRGB file."""

from __future__ import annotations

import io
import multiprocessing
import os
import resource
import threading
import warnings
from pathlib import Path
from typing import Any

from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from trainer.schema import Photo

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")  # told by content, never by name; MPO comes as JPEG
MIN_SIDE_PX = 32
MAX_ASPECT = 10
MEMORY_BYTES = 2 * 2**30  # a 100-megapixel RGBA picture with its copies fits


def limit() -> None:
    """Run first in the child: decoders that want more memory than any photo needs get none; it ends with the app."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _end_with_parent() -> None:
    """A pool's child waits for work for ever, also when its parent was killed."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def warm() -> None:
    """Load the decoders before the first photo comes."""
    Image.init()


def decode(source: Path, target: Path, name: str, max_pixels: int) -> Photo:
    """Decode one photo and write it as `target`.jpg (from a JPEG) or `target`.png: upright, 8-bit sRGB, no metadata.

    Raises ValueError with the second half of a sentence that begins with the file's name.
    """
    Image.init()
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        with Image.open(source, formats=[form for form in FORMATS if form in Image.OPEN]) as image:
            form, (width, height) = str(image.format), image.size
            if width * height > max_pixels:
                raise ValueError(f"has {width} x {height} pixels; at most {max_pixels / 1e6:g} million are allowed")
            if min(width, height) < MIN_SIDE_PX:
                raise ValueError(f"is {width} x {height} pixels; its short side must have at least {MIN_SIDE_PX}")
            if max(width, height) > MAX_ASPECT * min(width, height):
                raise ValueError(f"is {width} x {height} pixels; that is too long and thin (at most {MAX_ASPECT} to 1)")
            image.load()
            upright = ImageOps.exif_transpose(image)
            rotated = image.getexif().get(0x0112, 1) not in (0, 1)
            rgb = _to_srgb(upright)
    except ValueError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(f"has too many pixels; at most {max_pixels / 1e6:g} million are allowed") from None
    except UnidentifiedImageError:
        raise ValueError("is not an image that can be read (JPEG, PNG, WebP, AVIF, BMP, TIFF, GIF)") from None
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001  # a decoder may raise anything: SyntaxError and struct.error have been seen
        raise ValueError(f"is damaged and cannot be decoded ({type(error).__name__}: {error})") from None
    rgb.info.clear()  # comments and profiles would be written along with the pixels
    lossy = form in ("JPEG", "MPO")
    file = target.with_suffix(".jpg" if lossy else ".png")
    options: dict[str, Any] = {"quality": 95, "subsampling": 0} if lossy else {"compress_level": 1}
    rgb.save(file, **options)
    return Photo(name=name, file=file.name, width=rgb.width, height=rgb.height, format=form, rotated=rotated)


def _to_srgb(image: Image.Image) -> Image.Image:
    """16-bit grey is scaled, not clipped; transparency lies over white; an embedded profile is converted to sRGB."""
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I") or image.mode == "F":
        image = image.convert("I").point(lambda value: value / 257).convert("L")
    elif image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layers = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers).convert("RGB")
    elif image.mode == "P":
        image = image.convert("RGB")
    if profile and image.mode in ("RGB", "CMYK", "L"):
        try:
            converted = ImageCms.profileToProfile(
                image, ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB"), outputMode="RGB"
            )
            image = converted or image
        except (ImageCms.PyCMSError, OSError):
            image = image.convert("RGB")  # a broken profile: the plain numbers are the best guess
    return image.convert("RGB")
