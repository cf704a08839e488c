"""Conversion to 8-bit sRGB: from other depths, palettes, transparency, CMYK, LAB and embedded profiles."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageChops, ImageCms

SAME_COLOUR = 2  # of 255: a profile that changes colours by more is not sRGB


def to_srgb(image: Image.Image, depth: int) -> tuple[Image.Image, str | None]:
    """The picture in 8-bit sRGB, and a description of its own format where that is another.

    16 bits are scaled, not clipped; transparent parts become white; an embedded profile is converted to sRGB.
    """
    profile, was = image.info.get("icc_profile"), colours_of(image, depth)
    if image.mode.startswith("I") or image.mode == "F":
        image = to_grey(image)
    if image.has_transparency_data:
        image, transparent = over_white(image)
        was += ["transparency"] * transparent
    if image.mode == "LAB":
        profile, image = None, from_lab(image)
    if image.mode not in ("RGB", "L", "CMYK"):
        image = image.convert("RGB")
    if profile:
        plain = image.mode == "RGB"
        image, described = from_profile(image, profile)
        was += [described] * (plain and described != "")  # grey and CMYK are in the list already
    if image.mode != "RGB":
        image = image.convert("RGB")
    return image, ", ".join(was) or None


def colours_of(image: Image.Image, depth: int) -> list[str]:
    """A description of the colour format; empty for RGB of 8 bits."""
    if image.mode in ("I", "F"):
        return ["32-bit grey"]
    if image.mode.startswith("I;16"):
        return [f"{depth if depth > 8 else 16}-bit grey"]
    if depth > 8:
        return [f"{depth}-bit colours"]
    names = {"P": "palette", "PA": "palette", "1": "black and white", "L": "grey", "LA": "grey"}
    return [] if image.mode.startswith("RGB") else [names.get(image.mode, image.mode)]


def to_grey(image: Image.Image) -> Image.Image:
    """16 and more bits -> 8 bits. No file says which larger value is white: the next usual limit is taken."""
    if image.mode.startswith("I;16"):
        white, image = 65_535.0, image.convert("I")
    else:
        high = float(image.getextrema()[1])  # type: ignore[arg-type]  # one band, so two numbers
        white = next((limit for limit in (1.0, 255.0, 65_535.0) if high <= limit), high)
    grey = image.point(lambda value: value * (255 / white)).convert("L")
    grey.info.pop("transparency", None)  # a value of the old range
    return grey


def over_white(image: Image.Image) -> tuple[Image.Image, bool]:
    """The picture on white, and whether any pixel is transparent: many alpha channels are opaque."""
    layers = image if image.mode in ("LA", "RGBA") else image.convert("RGBA")
    if layers.getchannel("A").getextrema() == (255, 255):
        return layers.convert("RGB"), False
    flat = Image.new("RGB", layers.size, "white")
    flat.paste(layers, mask=layers)
    return flat, True


def from_lab(image: Image.Image) -> Image.Image:
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    assert converted is not None  # it is when done in place
    return converted


def from_profile(image: Image.Image, profile: bytes) -> tuple[Image.Image, str]:
    """The picture in sRGB, and the profile's name where it is not sRGB; else "".

    Where a profile is broken or does not fit the picture, the values are taken as sRGB.
    """
    try:
        given = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(given, ImageCms.createProfile("sRGB"), image.mode, "RGB")
        if changes_nothing(transform, image.mode):
            return image, ""
        converted = ImageCms.applyTransform(image, transform)
        described = "".join(char for char in ImageCms.getProfileDescription(given) if char.isprintable()).strip()
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return image, ""
    return converted or image, described[:40].strip() or "a colour profile"


def changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether a profile is sRGB, by its effect on a chart; its name says little, and all pixels would take longer."""
    if mode not in ("L", "RGB"):
        return False
    chart = Image.linear_gradient("L") if mode == "L" else colour_chart()
    converted = ImageCms.applyTransform(chart, transform) or chart
    extremes = ImageChops.difference(converted, chart.convert("RGB")).getextrema()
    return all(high <= SAME_COLOUR for _, high in extremes)  # type: ignore[misc]  # three bands


def colour_chart() -> Image.Image:
    """All combinations of 16 reds, greens and blues."""
    steps = np.linspace(0, 255, 16).round().astype(np.uint8)
    return Image.fromarray(np.stack(np.meshgrid(steps, steps, steps), -1).reshape(64, 64, 3))
