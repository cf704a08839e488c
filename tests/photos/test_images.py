"""Intake: which photos are taken, what becomes of them, and that a refusal leaves nothing behind."""

from __future__ import annotations

import errno
import io
import multiprocessing
import os
import struct
import threading
import time
import zlib
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from PIL import Image, ImageChops, ImageStat
from PIL.PngImagePlugin import PngInfo

from tests.helpers.shared import SHARED
from tests.helpers.web import left_behind, photo, upload
from trainer.contract.errors import InvalidRequest
from trainer.contract.photos import Photo, Upload
from trainer.photos.decode import Decoded
from trainer.photos.decoder import Decoder
from trainer.photos.intake import intake
from trainer.studio import tunes
from trainer.studio.rows import Services

pytest_plugins = ("tests.helpers.web",)

FACES = SHARED / "data" / "faces"
REQUEST = {"title": "Ada", "name": "woman", "branch": "fast"}


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str, bytes], Upload]:
    """file(name, content): an upload of that name."""
    return lambda name, content: upload(tmp_path / "sent", name, content)


def face(path: str) -> Upload:
    """A picture of ../shared. Skips the test where they are not on this machine."""
    if not FACES.is_dir():
        pytest.skip("the pictures in ../shared/data are not on this machine")
    return Upload(Path(path).name, FACES / path)


def taken(services: Services, *uploads: Upload) -> tuple[list[Photo], list[Image.Image], dict[str, str]]:
    """The verdicts, the pictures as they are kept, and the captions beside them."""
    with intake(services.settings, services.decoder, uploads, []) as found:
        work, photos = found.folder, found.photos
        images = [Image.open(work / "images" / verdict.file) for verdict in photos if not verdict.dropped]
        for image in images:
            image.load()
        captions = {path.stem: path.read_text("utf-8") for path in (work / "images").glob("*.txt")}
    assert left_behind(services) == []
    return photos, images, captions


def refused(services: Services, *uploads: Upload) -> list[str]:
    """What is said against the images of a request. Nothing of it may be kept."""
    with pytest.raises(InvalidRequest) as problem:
        tunes.create_tune(services, REQUEST, uploads)
    assert left_behind(services) == []
    assert problem.value.problems.keys() == {"images"}
    return problem.value.problems["images"]


def difference(one: Image.Image, other: Image.Image) -> float:
    """Mean absolute difference of two pictures, of 255."""
    small = [image.convert("RGB").resize((128, 128)) for image in (one, other)]
    return max(ImageStat.Stat(ImageChops.difference(*small)).mean)


def header_of(width: int, height: int) -> bytes:
    """A PNG that promises so many pixels and has none."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    facts = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + facts + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("name", "side", "form", "tolerance"),
    [("astronaut_cmyk.jpg", 512, "JPEG", 2), ("astronaut_palette.png", 256, "PNG", 10)],
)
def test_pictures_of_other_modes_become_rgb(
    services: Services, name: str, side: int, form: str, tolerance: float
) -> None:
    (verdict,), (image,), _ = taken(services, face(f"odd/{name}"))
    assert (verdict.name, verdict.width, verdict.height) == (name, side, side)
    assert (image.mode, image.size, image.format) == ("RGB", (side, side), form)
    with Image.open(FACES / "single" / "astronaut.png") as original:
        assert difference(image, original) < tolerance


def test_what_is_transparent_becomes_white(services: Services) -> None:
    _, (image,), _ = taken(services, face("odd/astronaut_rgba.png"))
    assert (image.mode, image.size) == ("RGB", (256, 256))
    with Image.open(FACES / "odd" / "astronaut_rgba.png") as original:
        clear = original.getchannel("A").point(lambda alpha: 255 * (alpha == 0))
        solid = original.getchannel("A").point(lambda alpha: 255 * (alpha == 255))
        assert clear.getbbox() and solid.getbbox()
        assert ImageStat.Stat(image, clear).mean == [255, 255, 255]
        assert ImageStat.Stat(image, solid).mean == ImageStat.Stat(original.convert("RGB"), solid).mean


def test_sixteen_bits_are_scaled_not_clipped(services: Services) -> None:
    photos, (deep, plain), _ = taken(services, face("odd/astronaut_grey16.png"), face("odd/astronaut_grey.jpg"))
    assert [(verdict.width, verdict.height) for verdict in photos] == [(256, 256), (512, 512)]
    assert deep.mode == plain.mode == "RGB"
    assert difference(deep, plain) < 3
    assert difference(deep, Image.new("RGB", deep.size, "white")) > 50  # what clipping would make of it


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_photos_stand_upright(services: Services, orientation: int) -> None:
    (turned, straight), (image, original), _ = taken(
        services, face(f"exif/astronaut_orientation_{orientation}.jpg"), face("single/astronaut.png")
    )
    assert turned.rotated and not straight.rotated
    assert difference(image, original) < 3
    assert difference(image.rotate(90), original) > 30


def test_a_turned_photo_has_the_size_of_the_upright_one(services: Services) -> None:
    (verdict,), (image,), _ = taken(services, face("exif/noface_portrait_orientation_6.jpg"))  # stored as 1024 x 683
    assert (verdict.width, verdict.height) == image.size == (683, 1024)


def test_files_that_cannot_be_decoded_are_refused_by_name(services: Services) -> None:
    told = refused(services, face("odd/not_an_image.jpg"), face("single/astronaut.png"), face("odd/truncated.jpg"))
    assert len(told) == 2  # the good one between them is not kept either
    assert told[0].startswith("not_an_image.jpg is not an image that can be read")
    assert told[1].startswith("truncated.jpg is damaged and cannot be decoded")


ODD = {
    "empty": (b"", "is empty"),
    "a web page": (b"<!DOCTYPE html><html><body>404</body></html>", "is not an image that can be read"),
    "a drawing in SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is not an image that can be read"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n", "is not an image that can be read"),
    "one byte": (b"\x89", "is not an image that can be read"),
    "half a photo": (photo(size=(300, 300), form="BMP")[:4000], "is damaged and cannot be decoded"),
    "too small": (photo(size=(31, 64)), "is 31 x 64 pixels; its short side must have at least 32"),
    "too thin": (photo(size=(32, 321)), "is 32 x 321 pixels; that is too long and thin (at most 10 to 1)"),
    "a bomb": (header_of(60_000, 60_000), "has too many pixels; at most 100 million are allowed"),
    "a little too large": (header_of(10_001, 10_000), "has too many pixels; at most 100 million are allowed"),
    "no pixels": (header_of(0, 0), ""),  # said in the words of the library
}


@pytest.mark.parametrize("kind", ODD)
def test_what_is_no_usable_photo_is_refused(
    services: Services, file: Callable[[str, bytes], Upload], kind: str
) -> None:
    content, reason = ODD[kind]
    (told,) = refused(services, file("cat.png", content))
    assert told.startswith(f"cat.png {reason}")


@pytest.mark.parametrize("size", [(32, 32), (32, 320)])
def test_the_smallest_and_the_thinnest_are_taken(
    services: Services, file: Callable[[str, bytes], Upload], size: tuple[int, int]
) -> None:
    (verdict,), _, _ = taken(services, file("cat.png", photo(size=size)))
    assert (verdict.width, verdict.height) == size


def test_a_file_may_be_so_large_and_no_larger(services: Services, file: Callable[[str, bytes], Upload]) -> None:
    small = Services(
        services.settings.model_copy(update={"max_image_mb": 1}), services.store, services.decoder, services.analyzer
    )
    (told,) = refused(small, file("cat.png", photo() + bytes(2**20)))
    assert told == "cat.png has 1.0 MB; at most 1 MB are allowed"
    taken(small, file("cat.png", photo() + bytes(2**20 - 10_000)))


def test_no_images_and_too_many_are_refused(services: Services, file: Callable[[str, bytes], Upload]) -> None:
    few = Services(
        services.settings.model_copy(update={"max_images": 3}), services.store, services.decoder, services.analyzer
    )
    photos = [file(f"{number}.png", photo()) for number in range(4)]
    assert refused(few) == ["must contain at least one image"]
    assert refused(few, *photos) == ["must contain at most 3 images, got 4"]
    assert len(taken(few, *photos[:3], file("0.txt", b"captions do not count"))[0]) == 3


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_is_taken(
    services: Services, file: Callable[[str, bytes], Upload], form: str
) -> None:
    stream = io.BytesIO()
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue", "lime")]
    frames[0].save(stream, form, save_all=True, append_images=frames[1:], duration=100)
    _, (image,), _ = taken(services, file("wave.gif", stream.getvalue()))
    assert difference(image, frames[0]) < 3


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_nothing_that_a_camera_wrote_down_is_kept(
    services: Services, file: Callable[[str, bytes], Upload], form: str
) -> None:
    exif = Image.Exif()
    exif[0x010E] = "SECRET place"  # ImageDescription
    stream, notes = io.BytesIO(), PngInfo()
    notes.add_text("Comment", "SECRET note")
    options = {"JPEG": {"comment": b"SECRET note"}, "PNG": {"pnginfo": notes}, "WEBP": {"xmp": b"SECRET note"}}
    Image.effect_noise((64, 64), 50).convert("RGB").save(stream, form, exif=exif, **options[form])
    assert stream.getvalue().count(b"SECRET") == 2
    sent = file("home.jpg", stream.getvalue())
    with intake(services.settings, services.decoder, [sent], []) as found:
        kept = (found.folder / "images" / found.photos[0].file).read_bytes()
    assert b"SECRET" not in kept
    with Image.open(io.BytesIO(kept)) as image:
        assert image.info.keys() <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_a_broken_colour_profile_is_left_out(
    services: Services, file: Callable[[str, bytes], Upload], form: str
) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (64, 64), "teal").save(stream, form, icc_profile=b"no profile at all")
    _, (image,), _ = taken(services, file("rex.jpg", stream.getvalue()))
    assert difference(image, Image.new("RGB", (64, 64), "teal")) < 5
    assert "icc_profile" not in image.info


def test_captions_are_paired_by_name(services: Services, file: Callable[[str, bytes], Upload]) -> None:
    uploads = [
        file("rex.txt", "\ufeff  a dög on a beach\n".encode()),  # as Windows writes it
        file("ada.png", photo()),
        file("rex.png", photo("red")),
        file("ada.TXT", b"a cat"),
        file("bob.png", photo("lime")),
    ]
    photos, _, captions = taken(services, *uploads)
    assert [verdict.name for verdict in photos] == ["ada.png", "rex.png", "bob.png"]
    assert captions == {"000": "a cat", "001": "a dög on a beach"}


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("max.txt", b"a dog", "max.txt is a caption without an image of the same name"),
        ("rex.txt", b"\xff\xfea", "rex.png has a caption that is not UTF-16 text; save rex.txt as UTF-8"),
        ("rex.txt", b"x" * 10_001, "rex.png has a caption of more than 10000 bytes"),
    ],
)
def test_a_caption_that_cannot_be_used_is_refused(
    services: Services, file: Callable[[str, bytes], Upload], name: str, content: bytes, told: str
) -> None:
    assert refused(services, file("rex.png", photo()), file(name, content)) == [told]


def test_names_of_files_are_never_paths(services: Services, file: Callable[[str, bytes], Upload]) -> None:
    names = ["../../up.png", "/etc/passwd", "a\\b.png", "x" * 300, "same.png", "same.png"]
    photos, _, _ = taken(services, *(file(name, photo()) for name in names))
    assert [verdict.name for verdict in photos] == names
    assert [verdict.file for verdict in photos] == [f"{number:03d}.png" for number in range(len(names))]


# The child process


def children() -> list[BaseProcess]:
    """The decoder's child, where it runs; what else a test may have started is no process of this kind."""
    return multiprocessing.active_children()


def kill_children() -> None:
    for child in children():
        child.kill()
        child.join()


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    """A file that a decoder can open and then waits for, so that a test knows it to be in the middle of its work."""
    path = tmp_path / "pipe.png"
    os.mkfifo(path)
    return path


def in_background(decode: Callable[[], Decoded]) -> tuple[threading.Thread, list[Decoded | ValueError]]:
    """Decode in a thread; the list will hold the verdict, or why there is none."""
    outcome: list[Decoded | ValueError] = []

    def run() -> None:
        try:
            outcome.append(decode())
        except ValueError as problem:
            outcome.append(problem)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, outcome


def opened(pipe: Path, thread: threading.Thread) -> int:
    """Open the pipe once a child has it open for reading."""
    while thread.is_alive():
        try:
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as problem:
            assert problem.errno == errno.ENXIO  # nobody reads yet
            time.sleep(0.01)
    pytest.fail("no child has opened the file")


def test_a_child_killed_while_it_waits_costs_no_photo(services: Services, file: Callable[[str, bytes], Upload]) -> None:
    for _ in range(2):
        taken(services, file("rex.png", photo()))
        kill_children()
    taken(services, file("rex.png", photo()))


def test_a_child_killed_in_the_middle_is_replaced(decoder: Decoder, pipe: Path, tmp_path: Path) -> None:
    thread, outcome = in_background(lambda: decoder.decode(pipe, tmp_path / "kept", "rex.png"))
    writer = opened(pipe, thread)
    whole = tmp_path / "whole.png"
    whole.write_bytes(photo())
    whole.replace(pipe)
    kill_children()
    os.close(writer)
    thread.join()
    (verdict,) = outcome
    assert isinstance(verdict, Decoded) and verdict.photo.name == "rex.png"


def test_a_photo_that_kills_every_child_is_refused_and_the_next_is_taken(
    services: Services, file: Callable[[str, bytes], Upload], pipe: Path, tmp_path: Path
) -> None:
    thread, outcome = in_background(lambda: services.decoder.decode(pipe, tmp_path / "kept", "rex.png"))
    for _ in range(2):
        writer = opened(pipe, thread)
        kill_children()
        os.close(writer)
    thread.join()
    assert [str(problem) for problem in outcome] == ["crashed the image decoder; it is damaged, or made to do so"]
    taken(services, file("rex.png", photo()))


def test_a_photo_that_takes_too_long_is_refused_and_its_child_ended(
    services: Services, pipe: Path, tmp_path: Path
) -> None:
    before = children()
    hasty = Decoder(services.settings.model_copy(update={"decode_seconds": 0.01}))
    with pytest.raises(ValueError, match=r"could not be decoded within 0\.01 s"):
        hasty.decode(pipe, tmp_path / "kept", "rex.png")
    for child in children():
        if child not in before:
            child.join()  # returns: it was killed, although it waits for the pipe
    hasty.close()


def test_a_photo_that_needs_too_much_memory_is_refused(
    services: Services, file: Callable[[str, bytes], Upload], tmp_path: Path
) -> None:
    generous = Decoder(services.settings.model_copy(update={"max_megapixels": 2000}))
    with pytest.raises(ValueError, match="needs too much memory to be decoded"):
        generous.decode(file("big.png", header_of(40_000, 40_000)).path, tmp_path / "kept", "big.png")
    assert generous.decode(file("small.png", photo()).path, tmp_path / "kept", "small.png").photo.width == 64
    generous.close()
