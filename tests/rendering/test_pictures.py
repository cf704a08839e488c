"""Rendered pictures as files: what is written beside them, and that others can read how they were made."""

from __future__ import annotations

import json
import random
import re
from dataclasses import asdict, replace
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from tests.helpers.faults import CONTENTS, as_json
from trainer.rendering import pictures
from trainer.rendering.pictures import Facts, parameters, preview_bytes, read_facts, write

FORMATS = ["png", "jpeg"]
FACTS = Facts(
    prompt="a red dog, in the snow",
    negative_prompt="dull",
    seed=42,
    steps=30,
    sampler="Euler a",
    cfg_scale=7.5,
    width=512,
    height=640,
    model="Rex",
    base="Realistic Vision",
    loras=[("Rex", 0.8), ("film", 1.0)],
    more={"style": "Cinematic", "face": {"strength": 0.5}, "hires_fix": True},
)
ODD = replace(
    FACTS,
    prompt='"Größe", <lora:1:0.8>\nin two lines, 雪 🐕: (x:1.2) \\ "',
    negative_prompt='dull,\n"blurry": ü 雪',
    model='Rex: the "best", 雪\nof \\ dogs',
    base="ü, 雪",
    cfg_scale=7.0,
    loras=[('a "b", c: d', -0.25)],
    more={"a": ["雪", None, 1.5]},
)


def picture(width: int = 96, height: int = 64, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Noise: nothing hides in it."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    return Image.fromarray(pixels[..., : len(mode)])


def as_others_read(text: str) -> dict[str, Any]:
    """The parameters as other programs take them apart: settings in the last line, the negative from its mark on."""
    *lines, last = text.split("\n")
    found: dict[str, Any] = {"prompt": [], "negative": []}
    part = "prompt"
    for line in lines:
        if line.startswith("Negative prompt:"):
            part, line = "negative", line.removeprefix("Negative prompt:").strip()
        found[part].append(line)
    found = {name: "\n".join(lines) for name, lines in found.items()}
    for name, value in re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last):
        found[name] = json.loads(value) if value[:1] == '"' == value[-1:] else value
    return found


def expected(facts: Facts) -> dict[str, Any]:
    return {
        "prompt": facts.prompt,
        "negative": facts.negative_prompt or "",
        "Steps": str(facts.steps),
        "Sampler": facts.sampler,
        "CFG scale": f"{facts.cfg_scale:g}",
        "Seed": str(facts.seed),
        "Size": f"{facts.width}x{facts.height}",
        "Model": facts.model,
    }


def text_in(file: Path) -> str:
    """The parameters of a file, by the standards' letters."""
    with Image.open(file) as image:
        if image.format == "PNG":
            return str(image.info["parameters"])
        comment = image.getexif().get_ifd(0x8769)[0x9286]
        assert comment[:8] == b"UNICODE\0"
        return str(comment[8:].decode("utf-16-be"))


def names_in(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


# What is said


def test_the_text_has_the_usual_form() -> None:
    assert parameters(FACTS) == (
        "a red dog, in the snow\nNegative prompt: dull\n"
        'Steps: 30, Sampler: Euler a, CFG scale: 7.5, Seed: 42, Size: 512x640, Model: Rex, Lora: "Rex: 0.8, film: 1"'
    )
    bare = replace(FACTS, negative_prompt=None, loras=[], cfg_scale=3.0)
    assert parameters(bare) == (
        "a red dog, in the snow\nSteps: 30, Sampler: Euler a, CFG scale: 3, Seed: 42, Size: 512x640, Model: Rex"
    )


def test_others_read_the_very_values() -> None:
    assert as_others_read(parameters(FACTS)) == expected(FACTS) | {"Lora": "Rex: 0.8, film: 1"}
    assert '"Rex: the \\"best\\", 雪\\nof' in parameters(ODD)
    odd = as_others_read(parameters(ODD))
    assert odd == expected(ODD) | {"Lora": 'a "b", c: d: -0.25'}


@given(st.text(alphabet=st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from('",:\n\\ '), min_size=1))
def test_titles_of_all_kinds_are_read_back(title: str) -> None:
    read = as_others_read(parameters(replace(FACTS, model=title, sampler=title)))
    assert (read["Model"], read["Sampler"], read["Seed"]) == (title, title, "42")


@pytest.mark.parametrize("picture_format", FORMATS)
@pytest.mark.parametrize("facts", [FACTS, ODD, replace(FACTS, negative_prompt=None, loras=[], more={})])
def test_a_file_says_how_it_was_made(tmp_path: Path, facts: Facts, picture_format: Any) -> None:
    (name,) = write(tmp_path, [picture()], [facts], picture_format)
    assert name == {"png": "0.png", "jpeg": "0.jpg"}[picture_format]
    told = json.loads(json.dumps(asdict(facts)))  # tuples are lists in JSON
    assert read_facts(tmp_path / name) == told
    assert text_in(tmp_path / name) == parameters(facts)
    assert str(tmp_path).encode() not in (tmp_path / name).read_bytes()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40), st.sampled_from(FORMATS))
def test_prompts_of_all_kinds_come_back(tmp_path: Path, prompt: str, picture_format: Any) -> None:
    facts = replace(FACTS, prompt=prompt, negative_prompt=prompt)
    (name,) = write(tmp_path, [picture(8, 8)], [facts], picture_format)
    assert read_facts(tmp_path / name)["prompt"] == prompt
    assert text_in(tmp_path / name) == parameters(facts)


def test_png_text_is_latin_1_where_it_can_be(tmp_path: Path) -> None:
    write(tmp_path, [picture(), picture()], [replace(FACTS, prompt="Größe"), ODD], "png")
    chunks = [(tmp_path / f"{number}.png").read_bytes() for number in (0, 1)]
    assert b"tEXtparameters\0Gr\xf6" in chunks[0] and b"iTXt" not in chunks[0]
    assert b"iTXtparameters\0\0\0\0\0" + '"Größe"'.encode() in chunks[1]


def test_jpegs_are_big_endian_as_their_comment(tmp_path: Path) -> None:
    write(tmp_path, [picture()], [FACTS], "jpeg")
    content = (tmp_path / "0.jpg").read_bytes()
    assert b"Exif\0\0MM\0*" in content and b"UNICODE\0\0a\0 \0r\0e\0d" in content


def test_facts_too_long_for_a_jpeg_make_it_a_png(tmp_path: Path) -> None:
    long = replace(FACTS, prompt="雪" * 10_000, negative_prompt="🐕" * 10_000)
    fits = replace(FACTS, prompt="x" * 10_000, negative_prompt="y" * 10_000)
    assert write(tmp_path, [picture(), picture()], [long, fits], "jpeg") == ["0.png", "1.jpg"]
    assert read_facts(tmp_path / "0.png")["prompt"] == long.prompt
    assert read_facts(tmp_path / "1.jpg")["negative_prompt"] == fits.negative_prompt
    # At the very limit, too: the length grows by three bytes a letter.
    sizes = range(21_000, 22_100, 100)
    names = {size: write(tmp_path, [picture(8, 8)], [replace(FACTS, prompt="x" * size)], "jpeg")[0] for size in sizes}
    assert set(names.values()) == {"0.jpg", "0.png"}


def test_a_path_cannot_be_written_by_mistake(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        write(tmp_path, [picture()], [replace(FACTS, more={"input_image": tmp_path})], "png")


def test_pictures_of_others_say_nothing(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    picture().save(tmp_path / "b.jpg")
    picture().save(tmp_path / "c.webp")
    for number, content in enumerate(("[1]", "{", "[" * 50_000)):
        info = PngInfo()
        info.add_text("tunebooth", content)
        picture().save(tmp_path / f"d{number}.png", pnginfo=info)
    for file in tmp_path.iterdir():
        with pytest.raises(ValueError, match=rf"{file.name} does not say how it was made"):
            read_facts(file)
    (tmp_path / "x.png").write_bytes(b"no picture")
    with pytest.raises(OSError, match="cannot identify"):
        read_facts(tmp_path / "x.png")


# What is drawn


def test_pixels_are_kept(tmp_path: Path) -> None:
    image = picture()
    write(tmp_path, [image], [FACTS], "png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "0.png")), np.asarray(image))
    smooth = Image.linear_gradient("L").convert("RGB").resize((96, 64))
    smooth.paste((255, 0, 0), (40, 0, 41, 64))  # a thin red line, which coarser colours would smear
    write(tmp_path, [smooth], [FACTS], "jpeg")
    with Image.open(tmp_path / "0.jpg") as kept:
        assert (kept.format, kept.mode, kept.size) == ("JPEG", "RGB", (96, 64))
        assert [layer[1:3] for layer in kept.layer] == [(1, 1)] * 3  # 4:4:4
        assert kept.getpixel((40, 32))[0] - kept.getpixel((40, 32))[1] > 200
        assert np.abs(np.asarray(kept).astype(int) - np.asarray(smooth)).mean() < 2


def test_nothing_that_came_with_a_picture_goes_along(tmp_path: Path) -> None:
    image = picture()
    image.info |= {"comment": b"/home/me", "icc_profile": b"x" * 200, "exif": b"Exif\0\0secret", "dpi": (72, 72)}
    before = dict(image.info)
    for picture_format in FORMATS:
        (name,) = write(tmp_path, [image], [FACTS], picture_format)
        with Image.open(tmp_path / name) as kept:
            assert "comment" not in kept.info and "icc_profile" not in kept.info
        content = (tmp_path / name).read_bytes() + (tmp_path / "0.thumb.jpg").read_bytes()
        assert b"secret" not in content and b"/home" not in content
    assert image.info == before  # the caller's own is left alone


def test_transparent_pictures_are_pngs_in_either_format(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    assert write(tmp_path, [clear, picture(64, 64)], [FACTS, FACTS], "jpeg") == ["0.png", "1.jpg"]
    with Image.open(tmp_path / "0.png") as kept:
        assert kept.mode == "RGBA" and kept.getpixel((0, 0)) == (255, 0, 0, 0)
    for name in ("0.thumb.jpg", "sheet.jpg"):  # on white
        with Image.open(tmp_path / name) as small:
            assert min(small.getpixel((32, 32))) > 250


@pytest.mark.parametrize("mode", ["L", "P", "LA", "1", "CMYK"])
def test_pictures_of_other_modes(tmp_path: Path, mode: str) -> None:
    (name,) = write(tmp_path, [picture().convert(mode)], [FACTS], "jpeg")
    assert name == ("0.png" if mode == "LA" else "0.jpg") and read_facts(tmp_path / name)["seed"] == 42


@pytest.mark.parametrize(
    ("size", "thumb", "preview"),
    [
        ((1024, 768), (256, 192), (512, 384)),
        ((300, 600), (128, 256), (256, 512)),
        ((64, 48), (64, 48), (64, 48)),  # never enlarged
    ],
)
def test_small_ones(tmp_path: Path, size: tuple[int, int], thumb: tuple[int, int], preview: tuple[int, int]) -> None:
    image = picture(*size)
    assert write(tmp_path, [image], [FACTS], "png") == ["0.png"]
    assert names_in(tmp_path) == ["0.png", "0.thumb.jpg"]  # one picture needs no sheet
    with Image.open(tmp_path / "0.thumb.jpg") as small:
        assert (small.format, small.size) == ("JPEG", thumb)
        with pytest.raises(ValueError, match="does not say"):
            read_facts(tmp_path / "0.thumb.jpg")
    with Image.open(BytesIO(preview_bytes(image))) as small:
        assert (small.format, small.size) == ("JPEG", preview)
    assert image.size == size
    with Image.open(BytesIO(preview_bytes(picture(600, 600, "RGBA")))) as small:
        assert (small.mode, small.size) == ("RGB", (512, 512))


@pytest.mark.parametrize(
    ("count", "columns", "rows"), [(2, 2, 1), (3, 2, 2), (4, 2, 2), (5, 3, 2), (6, 3, 2), (7, 3, 3), (8, 3, 3)]
)
def test_the_sheet_is_near_square_and_in_order(tmp_path: Path, count: int, columns: int, rows: int) -> None:
    colours = [(25 * number, 30, 200 - 20 * number) for number in range(count)]
    images = [Image.new("RGB", (80, 120), colour) for colour in colours]
    names = write(tmp_path, images, [FACTS] * count, "png")
    assert names == [f"{number}.png" for number in range(count)]
    assert names_in(tmp_path) == sorted(["sheet.jpg", *names, *(f"{number}.thumb.jpg" for number in range(count))])
    gap = pictures.GAP
    with Image.open(tmp_path / "sheet.jpg") as made:
        assert made.size == (columns * 80 + (columns - 1) * gap, rows * 120 + (rows - 1) * gap)
        for number, colour in enumerate(colours):
            seen = made.getpixel((number % columns * (80 + gap) + 40, number // columns * (120 + gap) + 60))
            assert np.abs(np.subtract(seen, colour)).max() < 8
        assert min(made.getpixel((80 + gap // 2, 60))) > 200  # the gap
        if rows > 1:
            assert min(made.getpixel((40, 120 + gap // 2))) > 200
            assert np.abs(np.subtract(made.getpixel((40, 120 + gap + 1)), colours[columns])).max() < 30
        if count < columns * rows:
            assert min(made.getpixel((made.width - 40, made.height - 60))) > 250  # nothing is drawn twice


def test_cells_of_a_sheet_are_at_most_512_pixels_and_may_differ(tmp_path: Path) -> None:
    write(tmp_path, [picture(1024, 512), picture(100, 300)], [FACTS, FACTS], "jpeg")
    with Image.open(tmp_path / "sheet.jpg") as made:
        assert made.size == (2 * 512 + pictures.GAP, 300)
        assert min(made.getpixel((512 + pictures.GAP + 20, 150))) > 250  # the narrow one stands in the middle


def test_each_picture_has_its_facts(tmp_path: Path) -> None:
    write(tmp_path, [picture(), picture()], [FACTS, replace(FACTS, seed=43)], "png")
    assert [read_facts(tmp_path / f"{number}.png")["seed"] for number in (0, 1)] == [42, 43]
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        write(tmp_path, [picture(), picture()], [FACTS], "png")
    assert write(tmp_path / "nowhere", [], [], "png") == []


@pytest.mark.parametrize("picture_format", FORMATS)
def test_a_picture_whose_facts_are_broken_does_not_say_how_it_was_made(
    tmp_path: Path, picture_format: Literal["png", "jpeg"]
) -> None:
    name = write(tmp_path, [picture()], [FACTS], picture_format)[0]
    whole = (tmp_path / name).read_bytes()
    told = dict(read_facts(tmp_path / name))
    file = tmp_path / f"spoiled{Path(name).suffix}"
    generator = random.Random(7)
    for _ in range(300):  # a byte of the headers and facts is another one, or the file ends
        content = bytearray(whole)
        content[generator.randrange(min(len(whole), 1500))] = generator.randrange(256)
        file.write_bytes(content[: generator.randrange(len(whole))] if generator.random() < 0.3 else content)
        try:
            assert isinstance(read_facts(file), dict)
        except (ValueError, OSError) as problem:
            assert str(problem)
    for fault, spoil in CONTENTS.items():
        image = picture()
        if picture_format == "png":
            info = PngInfo()
            info.add_text("tunebooth", spoil(as_json(told)).decode("latin-1"))
            image.save(file, pnginfo=info)
        else:
            exif = Image.Exif()
            exif[ExifTags.Base.ImageDescription] = spoil(as_json(told))[:60_000].decode("latin-1")
            image.save(file, exif=exif)
        if fault in ("an empty object", "an object"):
            assert isinstance(read_facts(file), dict)
        else:
            with pytest.raises(ValueError, match="does not say how it was made"):
                read_facts(file)
