"""Time to check twenty 12-megapixel photos of people; optionally a sheet of the results for visual inspection.

The photos are those of people next to the repository, enlarged to 4000 x 3000, with grain like a phone's. The first
check is cold: it starts the child process that analyzes photos (decoders start with the app). The next ones are the
waiting time of a user who dropped photos on the page, which starts that process.
Run: `uv run python -m benchmarks.check_photos` or `... --sheet sheet.png` for the closeups and masks of ten photos.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
from PIL import Image, ImageOps

from trainer.config import resolve
from trainer.contract.photos import Upload
from trainer.photos.analysis import PhotoAnalyzer
from trainer.photos.decoder import Decoder
from trainer.photos.intake import intake
from trainer.settings import read_settings
from trainer.studio import tunes
from trainer.studio.rows import Services
from trainer.studio.store import Store

SHARED = Path(__file__).parents[2] / "shared"
FACES = SHARED / "data" / "faces"
SIZE = (4000, 3000)
SHEET = [
    "person_a/01.jpg", "person_a/02.jpg", "person_a/03.jpg", "single/astronaut.png", "single/outdoor_portrait.jpg",
    "person_b/02.jpg", "profile/old_man_side.jpg", "profile/cosmonaut_profile.jpg", "group/market_two.jpg",
    "exif/astronaut_orientation_6.jpg",
]  # fmt: skip
CELL = 240


@contextmanager
def studio(folder: Path) -> Iterator[Services]:
    """The services with new child processes and the weights next to the repository."""
    settings = read_settings(outputs=folder / "outputs", models=folder / "models", weights=SHARED / "weights")
    store, decoder, analyzer = Store(settings.outputs), Decoder(settings), PhotoAnalyzer(settings)
    yield Services(settings, store, decoder, analyzer)
    for one in (analyzer, decoder, store):
        one.close()


def large_photos(folder: Path, count: int) -> list[Upload]:
    """Photos like a phone's: 12 megapixels, grain, JPEG q92."""
    sources = sorted(path for name in ("person_a", "person_b", "single", "group") for path in (FACES / name).iterdir())
    grain = np.random.default_rng(0).normal(0, 4, (SIZE[1], SIZE[0], 1)).astype(np.float32)
    made = []
    for number in range(count):
        with Image.open(sources[number % len(sources)]) as opened:
            image = ImageOps.fit(ImageOps.exif_transpose(opened).convert("RGB"), SIZE, Image.Resampling.BICUBIC)
        pixels = np.roll(grain, 97 * number, axis=1) + np.asarray(image, np.float32)
        file = folder / f"{number:02d}.jpg"
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(file, quality=92)
        made.append(Upload(file.name, file))
    return made


def children_mb() -> int:
    """Memory of all child processes, in MB."""
    return round(sum(child.memory_info().rss for child in psutil.Process().children(recursive=True)) / 2**20)


def measure(count: int, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        photos = large_photos(Path(name), count)
        size = sum(photo.path.stat().st_size for photo in photos) / 2**20
        print(f"{count} photos of {SIZE[0]} x {SIZE[1]}, {size:.0f} MB")
        with studio(Path(name)) as services:
            with intake(services.settings, services.decoder, photos[:4], []):  # starts the decoders
                taken = []
            for turn in range(rounds + 1):
                began = time.perf_counter()
                check = tunes.check_photos(services, {"name": "person", "face_crop": True}, photos)
                taken.append(time.perf_counter() - began)
                seen = sum(len(photo.faces or []) for photo in check.photos)
                kind = "cold" if turn == 0 else "warm"
                print(f"{kind}: {taken[-1]:.1f} s, {seen} faces, children {children_mb()} MB", flush=True)
            print(f"cold {taken[0]:.1f} s; warm, median of {rounds}: {statistics.median(taken[1:]):.1f} s")


def draw_sheet(target: Path) -> None:
    """Ten photos with their faces, closeups and face masks side by side."""
    rows = []
    with tempfile.TemporaryDirectory() as name, studio(Path(name)) as services:
        config = resolve.resolve(
            services.settings.presets, branch="sd15", model_type="lora", preset=None, name="person", photos=10,
            steps=None, args="mask=face", face_crop=True,
        )  # fmt: skip
        for file in SHEET:
            with intake(services.settings, services.decoder, [Upload(file, FACES / file)], []) as taken:
                work = taken.folder
                (photo,), _ = services.analyzer.prepare(work, taken.photos, config, "person", restore=False)
                whole = Image.open(work / "images" / photo.file).convert("RGB")
                mask = work / "dataset" / "masks" / "face" / "000.png"
                lit = (
                    Image.composite(whole, whole.point(lambda v: v * 0.3), Image.open(mask)) if mask.exists() else whole
                )
                closeup = work / "dataset" / "faces" / "000-face.jpg"
                cells = [
                    whole,
                    lit,
                    Image.open(closeup).convert("RGB") if closeup.exists() else Image.new("RGB", (9, 9)),
                ]
                rows.append([ImageOps.contain(cell, (CELL, CELL)) for cell in cells])
                print(f"{file}: {len(photo.faces or [])} faces, {photo.notes}")
    sheet = Image.new("RGB", (6 * CELL, 5 * CELL), "white")
    for number, row in enumerate(rows):
        for place, cell in enumerate(row):
            sheet.paste(cell, (CELL * (place + 3 * (number % 2)), CELL * (number // 2)))
    sheet.save(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--photos", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sheet", type=Path)
    asked = parser.parse_args()
    if asked.sheet:
        draw_sheet(asked.sheet)
    else:
        measure(asked.photos, asked.rounds)


if __name__ == "__main__":
    main()
