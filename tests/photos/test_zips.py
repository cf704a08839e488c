"""Zips of photos: taken as if their photos were sent singly, within the limits of photos; errors name zip and entry."""

from __future__ import annotations

import io
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.web import left_behind, photo, upload
from trainer.contract.errors import InvalidRequest
from trainer.photos import zips
from trainer.photos.intake import intake
from trainer.studio import tunes
from trainer.studio.chosen import chosen
from trainer.studio.rows import Services

pytest_plugins = ("tests.helpers.web",)

REQUEST = {"title": "Rex", "name": "dog", "branch": "fast"}
Files = Sequence[tuple[str | zipfile.ZipInfo, bytes]]
COLOURS = ("teal", "red", "lime", "blue", "yellow", "black")


def zipped(*files: tuple[str | zipfile.ZipInfo, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, content in files:
            archive.writestr(name, content, method)
    return stream.getvalue()


def photos(*names: str) -> Files:
    return [(name, photo(colour)) for name, colour in zip(names, COLOURS, strict=False)]


@pytest.fixture
def send(services: Services, tmp_path: Path) -> Callable[..., Any]:
    """send(photos.zip=content, ...): what the intake takes: names of photos, captions by name, warnings."""

    def take(*files: tuple[str, bytes], **limits: int) -> tuple[list[str], dict[str, str], list[str]]:
        settings = services.settings.model_copy(update=limits)
        sent = [upload(tmp_path / "sent", name, content) for name, content in files]
        with intake(settings, services.decoder, sent, []) as found:
            captions = {}
            for one in found.photos:
                text = (found.folder / "images" / one.file).with_suffix(".txt")
                captions |= {one.name: text.read_text("utf-8")} if text.exists() else {}
            assert [path.name for path in found.folder.iterdir()] == ["images"]
        assert left_behind(services) == []
        return [one.name for one in found.photos], captions, found.warnings

    return take


def refused(send: Callable[..., Any], *files: tuple[str, bytes], **limits: int) -> list[str]:
    with pytest.raises(InvalidRequest) as problem:
        send(*files, **limits)
    assert problem.value.problems.keys() == {"images"}
    return problem.value.problems["images"]


# What is taken


def test_photos_in_a_zip_are_taken_by_their_own_names(send: Callable[..., Any]) -> None:
    content = zipped(*photos("1.png", "beach/2.png", "beach/deep/3.png"), ("beach/", b""))
    names, captions, warnings = send(("photos.zip", content), ("4.png", photo("blue")))
    assert sorted(names) == ["1.png", "2.png", "3.png", "4.png"]
    assert (captions, warnings) == ({}, [])


@pytest.mark.parametrize("name", ["photos.zip", "photos.ZIP", "download", "export.php"])
def test_a_zip_is_known_by_its_content(send: Callable[..., Any], name: str) -> None:
    assert send((name, zipped(*photos("1.png"))))[0] == ["1.png"]


def test_a_photo_that_is_called_a_zip_is_a_photo(send: Callable[..., Any]) -> None:
    assert send(("rex.zip", photo(form="JPEG") + zipped(*photos("1.png"))))[0] == ["rex.zip"]


def test_captions_in_a_zip_belong_to_the_photos_beside_them(send: Callable[..., Any]) -> None:
    texts = [("a/1.txt", b"first"), ("b/1.txt", "\ufeffzw\u00f6lf".encode()), ("a/2.TXT", b"second")]
    _, captions, warnings = send(("photos.zip", zipped(*photos("a/1.png", "b/1.jpg", "a/2.png"), *texts)))
    assert captions == {"1.png": "first", "1.jpg": "zwölf", "2.png": "second"}
    assert warnings == []


def test_a_caption_beside_the_zip_comes_first(send: Callable[..., Any]) -> None:
    content = zipped(*photos("rex.png", "ada.png"), ("rex.txt", b"old"), ("ada.txt", b"ada"))
    _, captions, warnings = send(("photos.zip", content), ("rex.txt", b"new"))
    assert captions == {"rex.png": "new", "ada.png": "ada"}
    assert warnings == ["left out (another caption was sent for its photo): photos.zip/rex.txt"]


def test_leftovers_in_a_zip_are_left_out(send: Callable[..., Any]) -> None:
    """As the Finder packs a folder."""
    double = b"\0\5\x16\7" + bytes(60)
    content = zipped(
        *photos("beach/1.png"), ("beach/.DS_Store", b"\0\0\0\1Bud1"), ("__MACOSX/beach/._1.png", double),
        ("beach/1.MOV", struct.pack(">I4s4sI", 16, b"ftyp", b"qt  ", 0)), ("beach/1.png.json", b"{}"),
    )  # fmt: skip
    names, _, warnings = send(("photos.zip", content))
    assert names == ["1.png"]
    told = "\n".join(warnings)
    for name in ("beach/.DS_Store", "__MACOSX/beach/._1.png", "beach/1.MOV", "beach/1.png.json"):
        assert f"photos.zip/{name}" in told


def test_names_in_a_zip_are_never_paths(send: Callable[..., Any], tmp_path: Path) -> None:
    before = {path for path in tmp_path.parent.rglob("*") if "outputs" not in path.parts}
    names, _, _ = send(
        ("photos.zip", zipped(*photos("../../up.png", "/etc/root.png", "C:\\photos\\win.png", "a/../b.png")))
    )
    assert names == ["up.png", "root.png", "win.png", "b.png"]
    new = {path for path in tmp_path.parent.rglob("*") if "outputs" not in path.parts} - before
    assert {path.parent.name for path in new} <= {"sent", tmp_path.name}


def test_names_may_be_of_any_encoding(send: Callable[..., Any]) -> None:
    """UTF-8 that is not marked so, as the Finder writes it; and an old code page."""
    names = []
    for raw in ("Zoë.png".encode(), "Zoë.png".encode("cp1252")):
        content = zipped(("Zo...png"[: len(raw)].ljust(len(raw), "x"), photo()))
        placeholder = "Zo...png"[: len(raw)].ljust(len(raw), "x").encode()
        assert content.count(placeholder) == 2
        names += send(("photos.zip", content.replace(placeholder, raw)))[0]
    assert names[0] == "Zoë.png"
    assert names[1].endswith(".png") and names[1].isprintable()


def test_a_tune_of_a_zip_is_that_of_its_photos(services: Services, tmp_path: Path) -> None:
    files = photos("1.png", "2.png", "3.png", "4.png", "5.png")
    one, _ = tunes.create_tune(services, REQUEST, [upload(tmp_path / "sent", "photos.zip", zipped(*files))])
    other, _ = tunes.create_tune(
        services, REQUEST | {"title": "2"}, [upload(tmp_path / "sent", str(name), content) for name, content in files]
    )
    assert [photo.name for photo in one.photos] == [photo.name for photo in other.photos]
    assert (one.args, one.warnings) == (other.args, other.warnings)


def test_an_empty_zip_is_left_out_beside_photos_and_refused_alone(send: Callable[..., Any]) -> None:
    assert send(("empty.zip", zipped()), ("1.png", photo()))[2] == ["left out (a zip without photos): empty.zip"]
    assert refused(send, ("empty.zip", zipped())) == [
        "must contain at least one image; left out (a zip without photos): empty.zip"
    ]


def in_64_bits(size: int | None = None) -> bytes:
    """The records of a zip of more than 4 GB, in a small one (APPNOTE.TXT, 4.3.14 to 4.3.16). size: of its list."""
    whole = zipped(*photos("1.png"))
    start, end = whole.index(b"PK\1\2"), whole.index(b"PK\5\6")
    long = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, size or end - start, start)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, end, 1)
    return whole[:end] + long + locator + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, 2**32 - 1, 2**32 - 1, 0)


def test_a_zip_may_have_the_records_of_a_large_one(send: Callable[..., Any]) -> None:
    assert send(("photos.zip", in_64_bits()))[0] == ["1.png"]
    assert refused(send, ("photos.zip", in_64_bits(2**30))) == ["photos.zip has too many files; send the photos alone"]


# What is refused


def encrypted() -> bytes:
    content = bytearray(zipped(*photos("1.png")))
    for mark, at in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        content[content.index(mark) + at] |= 1
    return bytes(content)


def damaged() -> bytes:
    content = bytearray(zipped(("1.png", photo()), method=zipfile.ZIP_STORED))
    content[60] ^= 0xFF
    return bytes(content)


def a_link() -> bytes:
    link = zipfile.ZipInfo("1.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    return zipped((link, b"/etc/passwd"))


def lies_about_size() -> bytes:
    """An entry that declares 100 bytes and has 50 MB."""
    content = bytearray(zipped(("1.png", bytes(50 * 2**20))))
    for mark, at in ((b"PK\3\4", 22), (b"PK\1\2", 24)):
        start = content.index(mark) + at
        content[start : start + 4] = struct.pack("<I", 100)
    return bytes(content)


def other_name_inside() -> bytes:
    """The entry's own header has a name that is no UTF-8, and says that it is."""
    content = zipped(("Zoë.png", photo()))
    return content.replace("Zoë".encode(), b"Zo\xff\xff", 1)


def at(offset: int) -> Callable[[], bytes]:
    """A zip whose entry begins at another place, which is in the field for zips of more than 4 GB (4.5.3)."""

    def make() -> bytes:
        whole = zipped(*photos("1.png"))
        start, end = whole.index(b"PK\1\2"), whole.index(b"PK\5\6")
        entry, extra = whole[start:end], struct.pack("<HHQ", 1, 8, offset)
        entry = entry[:30] + struct.pack("<H", len(extra)) + entry[32:42] + b"\xff" * 4 + entry[46:] + extra
        return whole[:start] + entry + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, len(entry), start, 0)

    return make


def long_list() -> bytes:
    """A list of 3 MB of entries, which are the same file."""
    whole = zipped(("1.png", b""))
    start = whole.index(b"PK\1\2")
    entry = whole[start : whole.index(b"PK\5\6")]
    count = 3 * 2**20 // len(entry)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, count * len(entry), start, 0)
    return whole[:start] + entry * count + end


REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "password": (encrypted, "photos.zip/1.png is protected by a password; make the zip again without one"),
    "zip in a zip": (
        lambda: zipped(("in/more.zip", zipped(*photos("1.png")))),
        "photos.zip/in/more.zip is a zip in a zip; send it by itself",
    ),
    "rar in a zip": (lambda: zipped(("x.rar", b"Rar!\x1a\7\0")), "photos.zip/x.rar is not a photo but a RAR archive"),
    "document": (lambda: zipped(("a/letter.pdf", b"%PDF-1.7")), "photos.zip/a/letter.pdf is not an image that can"),
    "no photo": (lambda: zipped(("a/1.png", b"")), "photos.zip/a/1.png is empty"),
    "damaged photo": (
        lambda: zipped(("a/1.bmp", photo(form="BMP")[:4000])),
        "photos.zip/a/1.bmp is damaged and cannot be decoded",
    ),
    "damaged entry": (damaged, "photos.zip/1.png is damaged in the zip and cannot be unpacked"),
    "link": (a_link, "photos.zip/1.png is a link, not a photo"),
    "bzip2": (
        lambda: zipped(*photos("1.png"), method=zipfile.ZIP_BZIP2),
        "photos.zip/1.png is packed with bzip2; make the zip again with the usual one (Deflate)",
    ),
    "half of it": (lambda: zipped(*photos("1.png"))[:-30], "photos.zip is a damaged zip, or was not transferred as"),
    "no zip": (lambda: b"<html>", "photos.zip is a damaged zip, or was not transferred as a whole"),
    "other name inside": (other_name_inside, "photos.zip/Zoë.png is damaged in the zip and cannot be unpacked"),
    "behind its end": (at(2**40), "photos.zip is a damaged zip, or was not transferred as a whole"),
    "where no file reaches": (at(2**63 - 1), "photos.zip is a damaged zip, or was not transferred as a whole"),
    "at no number": (at(2**64 - 1), "photos.zip is a damaged zip, or was not transferred as a whole"),
    "wrong size": (lies_about_size, "photos.zip/1.png is damaged in the zip and cannot be unpacked"),
    "long list": (long_list, "photos.zip has too many files; send the photos alone"),
    "large photo": (
        lambda: zipped(("a/1.png", bytes(41 * 2**20))),
        "photos.zip/a/1.png has 41.0 MB; at most 40 MB are allowed",
    ),
    "caption alone": (
        lambda: zipped(*photos("1.png"), ("a/2.txt", b"x")),
        "photos.zip/a/2.txt is a caption without an image of the same name",
    ),
    "long caption": (
        lambda: zipped(*photos("a/1.png"), ("a/1.txt", b"x" * 10_001)),
        "photos.zip/a/1.png has a caption of more than 10000 bytes",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_taken_is_refused_by_the_zip_and_its_entry(send: Callable[..., Any], kind: str) -> None:
    make, reason = REFUSED[kind]
    (told,) = refused(send, ("photos.zip", make()), ("rex.png", photo()))
    assert told.startswith(reason)


@pytest.mark.parametrize(
    ("name", "head", "what"),
    [
        ("p.rar", b"Rar!\x1a\7\1\0", "a RAR archive"), ("p.7z", b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
        ("p.tar", bytes(257) + b"ustar\0" + b"00", "a tar archive"), ("p.tgz", b"\x1f\x8b\x08", "a gzip archive"),
        ("p.zip", b"Rar!\x1a\7\0", "a RAR archive"),
    ],
)  # fmt: skip
def test_another_archive_is_refused_with_what_to_send(
    send: Callable[..., Any], name: str, head: bytes, what: str
) -> None:
    assert refused(send, (name, head), ("1.png", photo())) == [
        f"{name} is not a photo but {what}; send the photos in a zip"
    ]


def test_a_document_is_no_zip_of_photos(send: Callable[..., Any]) -> None:
    for name, first in (("a.docx", "_rels/.rels"), ("a.odt", "mimetype"), ("a.bin", "[Content_Types].xml")):
        (told,) = refused(send, (name, zipped((first, b"x"), *photos("media/1.png"))))
        assert told.startswith(f"{name} is not an image that can be read")


def test_limits_hold_for_all_photos_together(send: Callable[..., Any]) -> None:
    content = zipped(*photos("1.png", "2.png", "3.png"))
    assert len(send(("a.zip", content), ("4.png", photo("blue")), max_images=4)[0]) == 4
    assert refused(send, ("a.zip", content), ("b.zip", content), max_images=5) == [
        "must contain at most 5 images, got 6 (a.zip, b.zip included)"
    ]
    big = zipped(*((f"{number}.bmp", bytes(2**20)) for number in range(3)))
    assert refused(send, ("big.zip", big), max_body_mb=2) == [
        "have 3 MB in zips, unpacked; at most 2 MB are allowed (big.zip included)"
    ]


def test_a_bomb_costs_neither_time_nor_memory(services: Services, tmp_path: Path) -> None:
    """Ten times 400 MB in 4 MB: refused by the sizes that are declared, before any is unpacked."""
    packer = zlib.compressobj(9, wbits=-15)
    packed = b"".join(packer.compress(bytes(2**20)) for _ in range(400)) + packer.flush()
    size, crc, stream = 400 * 2**20, 0, io.BytesIO()
    head = struct.pack("<HHHHHLLLHH", 20, 0, 8, 0, 0x21, crc, len(packed), size, 5, 0)
    stream.write(b"PK\3\4" + head + b"1.png" + packed)
    start = stream.tell()
    entry = b"PK\1\2\24\0" + head + struct.pack("<HHHLL", 0, 0, 0, 0, 0) + b"1.png"
    stream.write(entry * 10)
    stream.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 10, 10, 10 * len(entry), start, 0))
    sent = upload(tmp_path / "sent", "photos.zip", stream.getvalue())
    with pytest.raises(InvalidRequest) as problem:
        tunes.create_tune(services, REQUEST, [sent])
    assert problem.value.problems["images"] == ["photos.zip/1.png has 400.0 MB; at most 40 MB are allowed"] * 10
    assert left_behind(services) == []


def test_the_number_of_captions_is_limited(send: Callable[..., Any]) -> None:
    texts = ((f"{number}.txt", b"") for number in range(zips.MOST_CAPTIONS + 1))
    (told,) = refused(send, ("photos.zip", zipped(*texts)))
    assert told == "photos.zip has more than 1000 text files; at most one for each photo is allowed"


def test_the_captions_of_all_zips_are_limited(send: Callable[..., Any]) -> None:
    """Each text is small when it is packed, and all are in memory."""
    half = zipped(*((f"{number}.txt", b"") for number in range(zips.MOST_CAPTIONS // 2 + 1)), *photos("1.png"))
    (told,) = refused(send, ("a.zip", half), ("b.zip", half))
    assert told == "have more than 1000 text files in zips; at most one for each photo is allowed"


# The page


def test_the_page_shows_what_is_in_a_zip(services: Services, tmp_path: Path) -> None:
    files = [("photos.zip", zipped(*photos("a/1.png", "2.png"), ("a/1.txt", b"first"), (".DS_Store", b"x")))]
    files += [("3.png", photo()), ("Thumbs.db", b"x"), ("2.txt", b"second"), ("broken.zip", b"PK\3\4")]
    paths = []
    for name, content in files:
        (tmp_path / name).write_bytes(content)
        paths.append(str(tmp_path / name))
    found = chosen(services, [*paths, str(tmp_path / "gone.png")])
    assert [(one.name, one.within, text) for one, text in found.photos] == [
        ("3.png", "", None),
        ("gone.png", "", None),
        ("1.png", "photos.zip/a", "first"),
        ("2.png", "photos.zip", "second"),
    ]
    assert found.single == [str(tmp_path / "3.png")]
    assert found.notes == [
        "photos.zip: 2 photos",
        "broken.zip is a damaged zip, or was not transferred as a whole; make it again",
        "left out (a file of Windows): Thumbs.db",
        "left out (a file of macOS): photos.zip/.DS_Store",
    ]
