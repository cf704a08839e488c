"""Leftovers of file managers and phones beside photos: they are left out with a note, whatever door they come by."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from tests.helpers.web import left_behind, multipart, photo, upload
from trainer.contract.errors import InvalidRequest
from trainer.photos.decode import load_decoders
from trainer.photos.leftovers import leftover_of
from trainer.photos.sorting import NAMED, left_out_notes
from trainer.studio import tunes
from trainer.studio.rows import Services

pytest_plugins = ("tests.helpers.web",)

REQUEST = {"title": "Rex", "name": "dog", "branch": "fast"}
DS_STORE = b"\0\0\0\1Bud1" + bytes(40)
APPLE_DOUBLE = b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(40)  # RFC 1740
THUMBS_DB = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(40)  # an OLE file


def ftyp(major: bytes, *others: bytes) -> bytes:
    """The first box of an ISO media file (ISO/IEC 14496-12, 4.3)."""
    return struct.pack(">I4s4sI", 16 + 4 * len(others), b"ftyp", major, 0) + b"".join(others) + bytes(40)


def heic() -> bytes:
    load_decoders()
    stream = io.BytesIO()
    Image.new("RGB", (64, 48), "teal").save(stream, "HEIF")
    return stream.getvalue()


LEFTOVERS = {  # name -> content and what is said of it
    ".DS_Store": (DS_STORE, "a file of macOS"),
    "._IMG_1.jpg": (APPLE_DOUBLE, "a file of macOS"),
    "._caption.txt": (APPLE_DOUBLE, "a file of macOS"),
    "Icon\r": (b"", "a file of macOS"),
    "Thumbs.db": (THUMBS_DB, "a file of Windows"),
    "ehthumbs.db": (THUMBS_DB, "a file of Windows"),
    "desktop.ini": (b"[.ShellClassInfo]\r\n", "a file of Windows"),
    ".directory": (b"[Desktop Entry]\n", "a file of KDE"),
    ".nomedia": (b"", "a file of Android"),
    ".picasa.ini": (b"[IMG_1.jpg]\nfilters=crop64=1\n", "a file of Picasa"),
    "IMG_1.MOV": (ftyp(b"qt  "), "a video"),
    "IMG_2.mp4": (ftyp(b"isom", b"iso2", b"avc1", b"mp41"), "a video"),
    "clip.jpg": (ftyp(b"mp42", b"isom"), "a video"),  # a wrong name
    "IMG_3.avi": (b"RIFF\0\0\0\0AVI LIST", "a video"),
    "VID_1.3gp": (b"", "a video"),
    "MVI_1.THM": (photo(form="JPEG"), "the small picture of a video"),
    "IMG_1.AAE": (b"<?xml version='1.0'?><plist/>", "edits of Apple Photos"),
    "IMG_1.jpg.json": (b'{"title": "IMG_1.jpg"}', "facts about photos, as Google Takeout writes them"),
    "IMG_1.xmp": (b"<x:xmpmeta/>", "edits of a photo program"),
    ".IMG_9.HEIC.icloud": (
        b"bplist00", "a placeholder of iCloud: the photo itself was not downloaded to that computer"
    ),
    "SYNOPHOTO_THUMB_XL.jpg": (photo(form="JPEG"), "a small copy of a photo, of a disk station"),
    ".thumbdata4": (b"\0" * 9, "a hidden file"),
    "IMG_4.jpg.crdownload": (b"", "an unfinished download"),
}  # fmt: skip
PHOTOS = {  # whatever they are called
    "._x.jpg": photo(form="JPEG"),
    "desktop.ini": photo(),
    "IMG_5.MOV": heic(),
    ".hidden.png": photo(),
    "IMG_6.json": photo(form="GIF"),
}
UNKNOWN = {  # refused by name, as ever
    "letter.pdf": b"%PDF-1.7\n",
    "letter.docx": b"PK\3\4" + bytes(26) + b"[Content_Types].xml",
    "photo.cr3": ftyp(b"crx ", b"isom"),
    "voice.m4a": ftyp(b"M4A ", b"mp42"),
    "notes": b"a plain text",
}


@pytest.mark.parametrize("name", LEFTOVERS)
def test_a_leftover_is_known_by_its_content_and_its_name(name: str) -> None:
    content, what = LEFTOVERS[name]
    assert leftover_of(name, content[:512]) == what


@pytest.mark.parametrize(("name", "content"), [*PHOTOS.items(), *UNKNOWN.items()])
def test_photos_and_unknown_files_are_no_leftovers(name: str, content: bytes) -> None:
    assert leftover_of(name, content[:512]) is None


@pytest.mark.parametrize(
    ("folder", "what"),
    [
        ("__MACOSX/beach", "in __MACOSX, a folder of a file manager"),
        ("beach/@eaDir/IMG_1.jpg", "in @eaDir, a folder of a file manager"),
        (".Trashes/501", "in .Trashes, a folder of a file manager"),
        ("beach/2026", None),
    ],
)
def test_what_lies_in_the_folder_of_a_file_manager_is_left_out(folder: str, what: str | None) -> None:
    assert leftover_of("IMG_1.jpg", photo(form="JPEG")[:512], folder) == what


def test_a_request_goes_on_without_its_leftovers(services: Services, tmp_path: Path) -> None:
    sent = [upload(tmp_path / "sent", name, content) for name, (content, _) in LEFTOVERS.items()]
    sent += [upload(tmp_path / "sent", name, content) for name, content in PHOTOS.items()]
    sent += [upload(tmp_path / "sent", "IMG_1.txt", b"a caption of a video")]
    tune, _ = tunes.create_tune(services, REQUEST, sent)
    assert [one.name for one in tune.photos] == list(PHOTOS)
    told = [warning for warning in tune.warnings if warning.startswith("left out")]
    assert "left out (a file of Windows): Thumbs.db, ehthumbs.db, desktop.ini" in told
    assert "left out (the caption of a file that is left out): IMG_1.txt" in told
    assert all(any(name in warning for warning in told) for name in LEFTOVERS)


def test_a_tune_counts_its_photos_without_the_leftovers(services: Services, tmp_path: Path) -> None:
    few = services.settings.model_copy(update={"max_images": 1})
    small = Services(few, services.store, services.decoder, services.analyzer)
    sent = [upload(tmp_path / "sent", name, LEFTOVERS[name][0]) for name in (".DS_Store", "IMG_1.MOV")]
    tune, _ = tunes.create_tune(small, REQUEST, [*sent, upload(tmp_path / "sent", "rex.png", photo())])
    alone, _ = tunes.create_tune(small, REQUEST | {"title": "2"}, [upload(tmp_path / "sent", "rex.png", photo("red"))])
    assert tune.args == alone.args  # the number of steps depends on that of photos


def test_a_request_of_nothing_but_leftovers_is_refused_with_their_names(services: Services, tmp_path: Path) -> None:
    sent = [upload(tmp_path / "sent", name, LEFTOVERS[name][0]) for name in (".DS_Store", "IMG_1.MOV")]
    for call in (tunes.create_tune, tunes.check_photos):
        with pytest.raises(InvalidRequest) as refused:
            call(services, REQUEST, sent)
        assert refused.value.problems == {
            "images": [
                "must contain at least one image; left out (a file of macOS): .DS_Store; left out (a video): IMG_1.MOV"
            ]
        }
    assert left_behind(services) == []


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_file_is_refused_by_its_name(services: Services, tmp_path: Path, name: str) -> None:
    sent = [upload(tmp_path / "sent", "rex.png", photo()), upload(tmp_path / "sent", name, UNKNOWN[name])]
    with pytest.raises(InvalidRequest) as refused:
        tunes.create_tune(services, REQUEST, sent)
    (problem,) = refused.value.problems["images"]
    assert problem.startswith(f"{name} is not an image that can be read (JPEG, PNG,")


def test_many_names_are_counted() -> None:
    (told,) = left_out_notes([(f"{number}.MOV", "a video") for number in range(NAMED + 3)])
    assert told.endswith("9.MOV and 3 more")


def folder_from_a_mac() -> tuple[bytes, dict[str, str]]:
    """shared/cases/10-folder-leftovers: `.DS_Store` beside a photo, as curl sends them."""
    fields = [("tune[name]", "dog"), ("tune[branch]", "fast"), ("tune[title]", "Rex")]
    return multipart([*fields, ("tune[images][]", ("p0.png", photo())), ("tune[images][]", (".DS_Store", DS_STORE))])


def test_a_folder_from_a_mac_is_a_tune(client: TestClient) -> None:
    body, headers = folder_from_a_mac()
    answer = client.post("/tunes", content=body, headers=headers)
    assert answer.status_code == 201, answer.text
    assert [one["name"] for one in answer.json()["photos"]] == ["p0.png"]
    assert "left out (a file of macOS): .DS_Store" in answer.json()["warnings"]


@pytest.mark.long
def test_a_folder_from_a_mac_is_checked(client: TestClient) -> None:
    body, headers = folder_from_a_mac()
    answer = client.post("/photos/check", content=body, headers=headers)
    assert answer.status_code == 200, answer.text
    assert [one["name"] for one in answer.json()["photos"]] == ["p0.png"]
    assert "left out (a file of macOS): .DS_Store" in answer.json()["warnings"]


def test_a_leftover_may_have_no_name(client: TestClient) -> None:
    """Its name is `/` or `.` in the form."""
    fields = [("tune[name]", "dog"), ("tune[branch]", "fast"), ("tune[title]", "Rex")]
    for name in ("/", "."):
        files = [("tune[images][]", ("rex.png", photo())), ("tune[images][]", (name, LEFTOVERS["IMG_1.MOV"][0]))]
        body, headers = multipart([*fields, *files])
        answer = client.post("/tunes", content=body, headers=headers)
        assert answer.status_code in (200, 201), answer.text
        assert [one["name"] for one in answer.json()["photos"]] == ["rex.png"]
        assert any(warning.startswith("left out (a video)") for warning in answer.json()["warnings"])
