"""Captions that teach something else than the user means: refused by name, or trained with a warning that says what.

Each faulty caption has a sibling that is accepted without a warning. The same answer comes over REST, over the check of
photos, from zips and from the page's table.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from tests.helpers.api import post
from tests.helpers.web import Value, left_behind, photo, upload
from trainer.config import branch_file
from trainer.contract.errors import InvalidRequest
from trainer.contract.photos import Upload
from trainer.names import BRANCHES
from trainer.photos.caption_rules import estimate_tokens
from trainer.photos.caption_text import decode_caption
from trainer.studio.chosen import chosen
from trainer.studio.rows import Services
from trainer.studio.tunes import check_photos, create_tune
from trainer.training.dataset import captions_for
from trainer.web.caption_table import table, with_captions

pytest_plugins = ("tests.helpers.web",)

COLOURS = ("teal", "red", "lime", "blue")
GOOD = "a photo of ohwx dog"
LONG = " ".join(["a brown dog on a green sofa in the sun"] * 20)
REQUEST = {"title": "Rex", "name": "dog", "branch": "fast"}
Files = Sequence[tuple[str, bytes]]
# What p0.txt holds, and what is trained. None: nothing is said.
ACCEPTED: dict[str, tuple[bytes, str]] = {
    "plain": (GOOD.encode(), GOOD),
    "UTF-8 with its mark": (GOOD.encode("utf-8-sig"), GOOD),
    "UTF-8 beyond ASCII": ("the dog’s ohwx in Zürich, 東京".encode(), "the dog’s ohwx in Zürich, 東京"),
    "UTF-16 with its mark": (GOOD.encode("utf-16"), GOOD),
    "UTF-16, big end first, with its mark": (b"\xfe\xff" + GOOD.encode("utf-16-be"), GOOD),
    "UTF-32 with its mark": (GOOD.encode("utf-32"), GOOD),
    "line breaks of Windows": (b"a photo\r\nof ohwx dog\r\n", GOOD),
    "line breaks of Unix": (b"a photo\nof ohwx dog\n", GOOD),
    "line breaks of old Macs": (b"a photo\rof ohwx dog", GOOD),
    "an empty line and a tab": (b"a photo\n\n\tof ohwx dog", GOOD),
    "the token in capitals": (b"a photo of OHWX dog", "a photo of OHWX dog"),
    "the token before an apostrophe": (b"ohwx's tail", "ohwx's tail"),
    "as long as is read": (b"ohwx " + b"dog " * 45, "ohwx " + "dog " * 44 + "dog"),
}
WARNED: dict[str, tuple[bytes, str, str]] = {
    "no token": (b"a brown animal on a sofa", "captions without the token ohwx: p0.png", "is without the token ohwx"),
    "the token inside a word": (b"an ohwxes dog", "captions without the token ohwx: p0.png", "without the token ohwx"),
    "too long": (
        f"ohwx {LONG} end".encode(), "captions of more than 46 tokens", "has about 202 tokens, and the text encoder",
    ),
    "the token is cut": (
        f"{LONG} ohwx".encode(), "the token ohwx is in the part of the caption that is cut: p0.png", "sun ohwx'",
    ),
    "Windows-1252": ("the dog’s ohwx".encode("cp1252"), "captions that are not UTF-8: p0.png", "'the dog’s ohwx'"),
    "nothing": (b"", "empty captions: p0.png", "its caption is empty: the default caption is used"),
    "only blanks": (b" \r\n", "empty captions: p0.png", "its caption is empty"),
    "only a mark": (b"\xef\xbb\xbf", "empty captions: p0.png", "its caption is empty"),
}  # fmt: skip
REFUSED: dict[str, tuple[bytes, str]] = {
    "UTF-16 without a mark": (
        GOOD.encode("utf-16-le"),
        "in UTF-16 without the mark that says so; save p0.txt as UTF-8",
    ),
    "UTF-16, big end first, without a mark": (GOOD.encode("utf-16-be"), "in UTF-16 without the mark"),
    "UTF-16 with half a letter": (GOOD.encode("utf-16") + b"x", "is not UTF-16 text; save p0.txt as UTF-8"),
    "NUL": (b"a photo\0 of ohwx dog", "has a caption with NUL characters; save p0.txt as UTF-8"),
    "NUL at the end": (b"a photo of ohwx dog\0", "with NUL characters"),
    "a bell": (b"a photo of ohwx dog\7", "with control characters (U+0007)"),
    "an escape in UTF-16": ("ohwx \x1b[1m".encode("utf-16"), "with control characters (U+001B)"),
    "a C1 control": ("ohwx \x9d dog".encode(), "with control characters (U+009D)"),
    "Cyrillic of Windows": ("фото ohwx собаки".encode("cp1251"), "is not UTF-8 text; save p0.txt as UTF-8"),
    "Japanese of Windows": ("東京のohwx犬".encode("shift-jis"), "is not UTF-8 text"),
    "Chinese in UTF-16 without a mark": ("这只狗在沙发上".encode("utf-16-le"), "is not UTF-8 text"),
}


@pytest.fixture(autouse=True)
def undrawn(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    """A check draws the pictures as they are trained in a child process that loads torch; not here."""
    monkeypatch.setattr(services.analyzer, "show", lambda *_: None)


def photos(count: int = 4) -> list[tuple[str, bytes]]:
    return [(f"p{number}.png", photo(COLOURS[number])) for number in range(count)]


def zipped(files: Files) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in files:
            archive.writestr(name, content)
    return stream.getvalue()


def posted(client: TestClient, files: Files, path: str = "/tunes", **more: str) -> tuple[int, dict[str, Any]]:
    fields: list[tuple[str, Value]] = [(f"tune[{key}]", value) for key, value in (REQUEST | more).items()]
    response = post(client, [*fields, *(("tune[images][]", file) for file in files)], path)
    return response.status_code, response.json()


def trained(services: Services, tune: dict[str, Any]) -> list[str]:
    folder = services.settings.outputs / "tunes" / str(tune["id"]) / "images"
    return captions_for(sorted(folder.glob("*.png")), tune["token"], tune["name"])


def sent_by_page(services: Services, folder: Path, files: Files) -> list[Upload]:
    """What the page sends whose table of captions was shown and not edited."""
    folder.mkdir()
    for name, content in files:
        (folder / name).write_bytes(content)
    paths = [folder / name for name, _ in files]
    found = chosen(services, [str(path) for path in paths]).photos
    rows = table([], found, "", "A photo of ohwx dog")
    return with_captions([Upload(path.name, path) for path in paths], rows, "A photo of ohwx dog", folder, found)


def named(texts: Sequence[bytes]) -> list[tuple[str, bytes]]:
    """A photo for each text, of its own colour, with the text as its caption."""
    files = [(f"p{number}.png", photo(f"rgb({number * 9}, 99, 200)")) for number in range(len(texts))]
    return [*files, *((f"p{number}.txt", text) for number, text in enumerate(texts))]


def notes(answer: dict[str, Any]) -> list[list[str]]:
    """The notes about captions of each photo."""
    return [[note for note in one["notes"] if "caption" in note] for one in answer["photos"]]


def about_captions(answer: dict[str, Any]) -> list[str]:
    return [one for one in answer["warnings"] if "caption" in one]


def test_good_captions_are_trained_as_meant_without_a_warning(
    services: Services, client: TestClient, tmp_path: Path
) -> None:
    files = named([content for content, _ in ACCEPTED.values()])
    status, tune = posted(client, files)
    assert (status, tune["warnings"], notes(tune)) == (201, [], [[]] * len(ACCEPTED))
    assert trained(services, tune) == [text for _, text in ACCEPTED.values()]
    sent = sent_by_page(services, tmp_path / "page", files)
    found = chosen(services, [str(one.path) for one in sent])
    assert [text for _, text in found.photos] == [text for _, text in ACCEPTED.values()]
    assert sorted(one.path.read_bytes() for one in sent) == sorted(content for _, content in files)
    _, in_zip = posted(client, [("photos.zip", zipped(files))], title="zip")
    assert in_zip["warnings"] == [] and trained(services, in_zip) == trained(services, tune)


def test_doubtful_captions_are_trained_with_a_warning(services: Services, client: TestClient, tmp_path: Path) -> None:
    """The same over REST, in a check, from the page and in a zip."""
    files = named([*(content for content, *_ in WARNED.values()), GOOD.encode()])
    status, tune = posted(client, files)
    assert status == 201
    for number, (name, (_, warning, note)) in enumerate(WARNED.items()):
        kind, _, _ = warning.partition(":")
        (line,) = [one for one in tune["warnings"] if one.startswith(kind)]
        assert f"p{number}.png" in line, name
        assert note in "\n".join(notes(tune)[number]), name
    assert notes(tune)[-1] == [] and f"p{len(WARNED)}.png" not in str(tune["warnings"])
    heard = (about_captions(tune), notes(tune))
    assert len(heard[0]) == 5  # one for each kind, however many photos it names
    _, check = posted(client, files, "/photos/check")
    assert (about_captions(check), notes(check)) == heard
    paged, _ = create_tune(services, REQUEST | {"title": "page"}, sent_by_page(services, tmp_path / "page", files))
    assert (about_captions(paged.model_dump()), notes(paged.model_dump())) == heard
    _, in_zip = posted(client, [("photos.zip", zipped(files))], title="zip")
    assert (about_captions(in_zip), notes(in_zip)) == heard
    empty = [
        text
        for text, (_, warning, _) in zip(trained(services, tune), WARNED.values(), strict=False)
        if "empty" in warning
    ]
    assert empty == ["A photo of ohwx dog"] * 3


def test_captions_that_cannot_be_meant_are_refused_by_name(
    services: Services, client: TestClient, tmp_path: Path
) -> None:
    files = named([*(content for content, _ in REFUSED.values()), GOOD.encode()])
    from_page = sent_by_page(services, tmp_path / "page", files)
    shown = chosen(services, [str(one.path) for one in from_page]).notes
    answers = [posted(client, files, "/tunes"), posted(client, files, "/photos/check")]
    in_zip = posted(client, [("photos.zip", zipped(files))])
    with pytest.raises(InvalidRequest) as problem:
        create_tune(services, REQUEST, from_page)
    for status, answer in [*answers, in_zip]:
        assert status == 422 and len(answer["images"]) == len(REFUSED)
    for number, (name, (_, message)) in enumerate(REFUSED.items()):
        message = message.replace("p0.txt", f"p{number}.txt")
        for told in [answer["images"][number] for _, answer in answers] + [
            problem.value.problems["images"][number],
            shown[number],
        ]:
            assert told.startswith(f"p{number}.png has a caption ") and message in told, name
        assert in_zip[1]["images"][number].startswith(f"photos.zip/p{number}.png has a caption ")
    assert left_behind(services) == []


def test_the_token_of_the_request_is_looked_for(client: TestClient) -> None:
    files = [*photos(), ("p0.txt", b"zwx dog")]
    for path in ("/tunes", "/photos/check"):
        _, answer = posted(client, files, path, token="zwx")
        assert [one for one in answer["warnings"] if "token" in one] == []
    assert "captions without the token ohwx: p0.png" in "\n".join(posted(client, files, title="2")[1]["warnings"])


def test_photos_without_the_token_are_listed_once(client: TestClient) -> None:
    texts = [(f"p{number}.txt", b"a sofa") for number in range(4)]
    _, tune = posted(client, [*photos(), *texts])
    (warning,) = tune["warnings"]
    assert "p0.png, p1.png, p2.png, p3.png" in warning


# One caption, several photos


def test_photos_of_one_stem_share_a_caption_and_are_told(services: Services, client: TestClient) -> None:
    files = [("a.png", photo("teal")), ("a.jpg", photo("red", form="JPEG")), *photos()[2:], ("a.txt", GOOD.encode())]
    _, tune = posted(client, files)
    assert tune["warnings"] == [
        "a.txt is the caption of a.png, a.jpg; for captions of their own, name them as the photos: a.png.txt"
    ]
    folder = services.settings.outputs / "tunes" / str(tune["id"]) / "images"
    assert [path.read_text() for path in sorted(folder.glob("*.txt"))] == [GOOD] * 2
    own = [("a.png.txt", b"ohwx dog at home"), ("a.jpg.txt", b"ohwx dog at sea")]
    _, tune = posted(client, [*files[:4], *own], title="2")
    folder = services.settings.outputs / "tunes" / str(tune["id"]) / "images"
    assert [path.read_text() for path in sorted(folder.glob("*.txt"))] == ["ohwx dog at home", "ohwx dog at sea"]
    assert tune["warnings"] == []


def test_two_captions_of_one_photo_must_say_the_same(client: TestClient) -> None:
    files = [*photos(), ("p0.txt", GOOD.encode()), ("p0.TXT", b"ohwx at sea")]
    assert posted(client, files) == (
        422,
        {"images": ["p0.png has 2 captions that differ (p0.txt and p0.TXT); send one, or give the photos other names"]},
    )
    assert posted(client, [*files[:5], ("p0.TXT", GOOD.encode())])[1]["warnings"] == []


def test_photos_that_are_equal_may_dispute_a_caption(client: TestClient) -> None:
    files = [*photos(), ("q.png", photo("teal")), ("p0.txt", GOOD.encode()), ("q.txt", b"ohwx at sea")]
    _, tune = posted(client, files)
    assert tune["warnings"] == [
        "photos that equal another one and have another caption: q.png; that of the first one is trained"
    ]
    assert notes(tune)[4] == ["its own caption is left out: another one is trained for p0.png"]
    assert posted(client, [*files[:6], ("q.txt", GOOD.encode())], title="2")[1]["warnings"] == []


def test_the_page_keeps_captions_of_photos_of_one_name_apart(services: Services, tmp_path: Path) -> None:
    archive = zipped(
        [("a/1.png", photo("teal")), ("b/1.png", photo("red")), ("a/1.txt", b"ohwx one"), ("b/1.txt", b"ohwx two")]
    )
    sent = [upload(tmp_path / "sent", "photos.zip", archive)]
    found = [(Upload("1.png", sent[0].path, f"photos.zip/{at}"), f"ohwx {text}") for at, text in ("a1", "b2")]
    rows = table([], found, "", "")
    assert with_captions(sent, rows, "", tmp_path, found) == sent
    rows[1][1] = "ohwx at sea"
    assert table(rows, found, "", "")[0][1] == "ohwx 1"
    edited = with_captions(sent, rows, "", tmp_path, found)
    tune, _ = create_tune(services, REQUEST, edited)
    folder = services.settings.outputs / "tunes" / str(tune.id) / "images"
    assert [path.read_text() for path in sorted(folder.glob("*.txt"))] == ["ohwx one", "ohwx at sea"]


def test_captions_that_are_edited_on_the_page_get_the_same_checks(services: Services, tmp_path: Path) -> None:
    sent = [upload(tmp_path / "sent", name, content) for name, content in photos()]
    found = [(one, None) for one in sent]
    rows = [
        [one.name, text]
        for one, text in zip(sent, ("a sofa", "ohwx dog\r\nat sea", "", "A photo of ohwx dog"), strict=True)
    ]
    uploads = with_captions(sent, rows, "A photo of ohwx dog", tmp_path, found)
    check = check_photos(services, {"branch": "fast", "name": "dog"}, uploads)
    assert notes(check.model_dump()) == [["its caption is without the token ohwx"], [], [], []]


# How long a caption may be


@pytest.mark.parametrize("branch", BRANCHES)
def test_each_family_says_how_many_tokens_it_reads(services: Services, branch: str) -> None:
    """77 and 512 less the marks: the length of CLIP's positions (its config.json), and FLUX.1-dev's of T5."""
    expected = {"sd15": 75, "sdxl1": 75, "flux1": 511, "fast": 46}
    assert branch_file.caption_tokens(services.settings.presets, branch) == expected[branch]


@pytest.mark.parametrize(
    ("text", "count"),
    [("a photo of a dog", 5), ("1999", 4), ("dog, cat!", 4), ("photorealistic", 2), ("東京の犬", 4), ("", 0)],
)
def test_tokens_are_counted_as_clip_splits_a_text(text: str, count: int) -> None:
    """CLIP's pattern: words, single digits, runs of signs (openai/CLIP, simple_tokenizer.py)."""
    assert estimate_tokens(text, None) == (count, None)


def test_the_estimate_says_where_a_caption_is_cut() -> None:
    text = "dog " * 75 + "cat"
    assert estimate_tokens(text, 76) == (76, None)
    assert estimate_tokens(text, 75) == (76, 300)


def test_a_family_with_a_longer_encoder_reads_more(services: Services) -> None:
    most = branch_file.caption_tokens(services.settings.presets, "flux1")
    assert estimate_tokens(f"ohwx {LONG}", most)[1] is None
    assert estimate_tokens(f"ohwx {LONG} {LONG} {LONG}", most)[1] is not None


def test_a_caption_is_not_too_large() -> None:
    assert decode_caption(b"x" * 10_000, "a.txt").text == "x" * 10_000
    with pytest.raises(ValueError, match="more than 10000 bytes"):
        decode_caption(b"x" * 10_001, "a.txt")
