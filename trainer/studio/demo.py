"""The sample tune of `--demo`: five photos of a toy robot, drawn here, and two prompts."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter

from trainer.contract.photos import Upload
from trainer.contract.tunes import Tune
from trainer.names import DEMO_BRANCH
from trainer.studio import tunes
from trainer.studio.rows import Services

SIDE_PX = 512
SCENES = [  # sky or wall, floor, centre of the robot (share of the side), its size
    ("#a5d8ff", "#8ce99a", (0.50, 0.52), 1.00),
    ("#ffd8a8", "#a0703c", (0.42, 0.50), 0.85),
    ("#d0bfff", "#495057", (0.58, 0.55), 1.10),
    ("#ced4da", "#f1f3f5", (0.50, 0.48), 0.75),
    ("#1c3d5a", "#2b2b2b", (0.46, 0.53), 0.95),
]


def queue_demo(services: Services) -> Tune:
    """Queue the demo tune on branch fast, or return the one of an earlier start."""
    with tempfile.TemporaryDirectory() as folder:
        uploads = []
        for number, _ in enumerate(SCENES):
            path = Path(folder) / f"robot-{number + 1}.png"
            draw_photo(number).save(path)
            uploads.append(Upload(path.name, path))
        request = {
            "title": "Demo: a toy robot",
            "name": "toy robot",
            "branch": DEMO_BRANCH,
            "prompts_attributes": [
                {"text": "ohwx toy robot", "num_images": 4},
                {"text": "a photo of ohwx toy robot on a table", "num_images": 4, "seed": 7},
            ],
        }
        return tunes.create_tune(services, request, uploads)[0]


def draw_photo(number: int) -> Image.Image:
    """The robot in scene `number`, 512 x 512 RGB; drawn at twice the size and reduced, for smooth edges."""
    wall, floor, (cx, cy), size = SCENES[number]
    side = 2 * SIDE_PX
    image = Image.new("RGB", (side, side), wall)
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0.68 * side, side, side), floor)
    shadow = Image.new("L", (side, side))
    unit = size * side / 10

    def box(x: float, y: float, w: float, h: float) -> tuple[float, float, float, float]:
        """Centre and size in units, relative to the robot's centre -> corners in pixels."""
        left, top = cx * side + (x - w / 2) * unit, cy * side + (y - h / 2) * unit
        return left, top, left + w * unit, top + h * unit

    ImageDraw.Draw(shadow).ellipse(box(0.3, 3.1, 5, 0.9), 130)
    image.paste("black", mask=shadow.filter(ImageFilter.GaussianBlur(unit / 4)))
    for x in (-0.8, 0.8):  # legs and feet
        draw.rectangle(box(x, 2.3, 0.6, 1.4), "#868e96")
        draw.rounded_rectangle(box(x, 3.0, 1.2, 0.5), unit / 5, "#343a40")
    for x in (-1.95, 1.95):  # arms and hands
        draw.rounded_rectangle(box(x, 0.6, 0.5, 1.9), unit / 4, "#868e96")
        draw.ellipse(box(x, 1.65, 0.8, 0.8), "#fcc419")
    draw.rounded_rectangle(box(0, 0.6, 3.2, 2.6), unit / 3, "#e03131")
    draw.rounded_rectangle(box(0, 0.6, 1.8, 1.2), unit / 6, "#c92a2a")
    for x, colour in ((-0.5, "#69db7c"), (0.0, "#fcc419"), (0.5, "#4dabf7")):
        draw.ellipse(box(x, 0.6, 0.35, 0.35), colour)
    draw.rectangle(box(0, -1.0, 0.8, 0.6), "#868e96")
    draw.rounded_rectangle(box(0, -2.1, 2.8, 1.9), unit / 3, "#e03131")
    draw.line([*box(0, -3.6, 0, 0)[:2], *box(0, -3.0, 0, 0)[:2]], "#868e96", int(unit / 6))
    draw.ellipse(box(0, -3.75, 0.5, 0.5), "#fcc419")
    for x in (-0.65, 0.65):
        draw.ellipse(box(x, -2.3, 0.8, 0.8), "white")
        draw.ellipse(box(x + 0.08, -2.25, 0.36, 0.36), "#212529")
    draw.rounded_rectangle(box(0, -1.5, 1.3, 0.28), unit / 9, "#212529")
    grain = random.Random(number)  # noqa: S311  # noise as of a camera, so that no two flat areas are equal
    noise = Image.frombytes("L", (SIDE_PX, SIDE_PX), bytes(grain.choices(range(112, 144), k=SIDE_PX**2)))
    small = image.resize((SIDE_PX, SIDE_PX), Image.Resampling.LANCZOS)
    return Image.blend(small, Image.merge("RGB", (noise,) * 3), 0.06)
