"""Photos that are in a tune's folder already, as verdicts."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from trainer.contract.photos import Photo

KEPT_FORMATS = {".jpg": "JPEG", ".png": "PNG"}  # as intake writes them


def kept_photos(images: Path) -> list[Photo]:
    """What can be said of the photos in `images/` without decoding them. Raises OSError for what is not one."""
    photos = []
    for file in sorted(images.iterdir()) if images.is_dir() else []:
        if form := KEPT_FORMATS.get(file.suffix):
            with Image.open(file, formats=[form]) as image:
                width, height = image.size
            photos.append(Photo(name=file.name, file=file.name, width=width, height=height, format=form))
    return photos
