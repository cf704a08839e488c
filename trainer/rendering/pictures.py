"""Files of rendered pictures: pictures, thumbnails and a contact sheet, with the facts of how each was made.

Other programs read one text: the prompt, a line `Negative prompt: ...`, and a line `Steps: 30, Sampler: Euler a, ...`.
AUTOMATIC1111's web UI writes it under the PNG keyword `parameters`, and in JPEGs as EXIF UserComment. All facts are
also written as JSON, which `read_facts` returns.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Literal

from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo
from pydantic import TypeAdapter

QUALITY = 95  # of JPEGs
SMALL_QUALITY = 85
THUMB, CELL, PREVIEW = 256, 512, 512  # pixels of the long side, at most
GAP = 4  # pixels between the cells of a sheet
PAPER = (255, 255, 255)  # background of transparent pictures and sheets
COMMENT_ENCODING = b"UNICODE\0"  # the EXIF standard's prefix of a UserComment in UTF-16
FACTS = TypeAdapter(dict[str, object])
MOST_EXIF = 65_533  # bytes with prefix: a JPEG segment has a length of 16 bits


@dataclass(frozen=True)
class Facts:
    """How one picture was made. All of it is written into the file: it must not contain paths of this machine.

    sampler: its usual name. model, base: titles. loras: titles and weights. more: every other attribute that was used,
    as JSON values.
    """

    prompt: str
    negative_prompt: str | None
    seed: int
    steps: int
    sampler: str
    cfg_scale: float
    width: int
    height: int
    model: str
    base: str
    loras: list[tuple[str, float]] = field(default_factory=list)
    more: dict[str, object] = field(default_factory=dict)


def write(
    folder: Path, images: Sequence[Image.Image], facts: Sequence[Facts], picture_format: Literal["png", "jpeg"]
) -> list[str]:
    """Write `0.png` or `0.jpg`, ..., `0.thumb.jpg`, ..., and `sheet.jpg` for two or more; returns the pictures' names.

    A picture with transparency, or with facts too long for a JPEG (64 KiB), is always a PNG. Raises ValueError unless
    there are as many facts as images.
    """
    names = []
    plain = [without_metadata(image) for image in images]
    for number, (image, one) in enumerate(zip(plain, facts, strict=True)):
        exif = exif_of(one)
        if picture_format == "jpeg" and image.mode == "RGB" and len(exif.tobytes()) <= MOST_EXIF:
            names.append(f"{number}.jpg")
            image.save(folder / names[-1], quality=QUALITY, subsampling="4:4:4", exif=exif)
        else:
            names.append(f"{number}.png")
            info = PngInfo()
            info.add_text("parameters", parameters(one))  # an iTXt chunk where it is not Latin-1
            info.add_text("tunebooth", as_json(one))
            image.save(folder / names[-1], pnginfo=info)
        (folder / f"{number}.thumb.jpg").write_bytes(small_jpeg(image, THUMB))
    if len(plain) > 1:
        sheet(plain).save(folder / "sheet.jpg", quality=SMALL_QUALITY)
    return names


def parameters(facts: Facts) -> str:
    """The text that other programs read. `Lora` lists names and weights: `dog: 0.8, film: 1`."""
    settings = {
        "Steps": facts.steps,
        "Sampler": facts.sampler,
        "CFG scale": f"{facts.cfg_scale:g}",
        "Seed": facts.seed,
        "Size": f"{facts.width}x{facts.height}",
        "Model": facts.model,
        "Lora": ", ".join(f"{name}: {weight:g}" for name, weight in facts.loras),
    }
    lines = [facts.prompt]
    if facts.negative_prompt:
        lines.append(f"Negative prompt: {facts.negative_prompt}")
    lines.append(", ".join(f"{name}: {quoted(str(value))}" for name, value in settings.items() if value != ""))
    return "\n".join(lines)


def quoted(value: str) -> str:
    """A value in the line of settings; as JSON where a reader could not find its end."""
    odd = any(character in value for character in ',:"\n\r') or value != value.strip()
    return json.dumps(value, ensure_ascii=False) if odd else value


def read_facts(file: Path) -> dict[str, object]:
    """The facts that `write` put into a picture. Raises ValueError for other pictures, OSError for other files."""
    try:
        with Image.open(file) as image:
            text = image.getexif().get(ExifTags.Base.ImageDescription) if image.format == "JPEG" else None
            text = image.info.get("tunebooth") if image.format == "PNG" else text
        return FACTS.validate_json(text if isinstance(text, str) else "")
    except (ValueError, SyntaxError, LookupError, TypeError, struct.error, Image.DecompressionBombError):
        raise ValueError(
            f"{file.name} does not say how it was made: it was not rendered here, or was saved by another program"
        ) from None


def preview_bytes(image: Image.Image) -> bytes:
    """A small JPEG without facts."""
    return small_jpeg(without_metadata(image), PREVIEW)


def as_json(facts: Facts) -> str:
    """Facts as JSON in ASCII, because EXIF allows only ASCII in an ImageDescription."""
    return json.dumps(asdict(facts))


def exif_of(facts: Facts) -> Image.Exif:
    exif = Image.Exif()  # big-endian, as the UTF-16BE of the comment
    exif[ExifTags.Base.ImageDescription] = as_json(facts)
    comment = COMMENT_ENCODING + parameters(facts).encode("utf-16-be")
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
    return exif


def without_metadata(image: Image.Image) -> Image.Image:
    """A copy in RGB or RGBA without comments and profiles: they would be saved too."""
    plain = image.convert("RGBA" if image.has_transparency_data else "RGB")
    plain.info.clear()
    return plain


def on_paper(image: Image.Image) -> Image.Image:
    """RGB or RGBA -> RGB on white."""
    if image.mode == "RGB":
        return image
    paper = Image.new("RGB", image.size, PAPER)
    paper.paste(image, mask=image.getchannel("A"))
    return paper


def small(image: Image.Image, side: int) -> Image.Image:
    """RGB, long side at most `side` pixels; never enlarged."""
    smaller = on_paper(image).copy()
    smaller.thumbnail((side, side), Image.Resampling.LANCZOS)
    return smaller


def small_jpeg(image: Image.Image, side: int) -> bytes:
    content = BytesIO()
    small(image, side).save(content, "jpeg", quality=SMALL_QUALITY)
    return content.getvalue()


def sheet(images: Sequence[Image.Image]) -> Image.Image:
    """All pictures in a grid with about as many columns as rows; from left to right, then down."""
    cells = [small(image, CELL) for image in images]
    columns = math.ceil(math.sqrt(len(cells)))
    rows = math.ceil(len(cells) / columns)
    width, height = max(cell.width for cell in cells), max(cell.height for cell in cells)
    made = Image.new("RGB", (columns * (width + GAP) - GAP, rows * (height + GAP) - GAP), PAPER)
    for number, cell in enumerate(cells):
        left, top = number % columns * (width + GAP), number // columns * (height + GAP)
        made.paste(cell, (left + (width - cell.width) // 2, top + (height - cell.height) // 2))
    return made
