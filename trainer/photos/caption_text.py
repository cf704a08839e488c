"""The text of a caption file: its encoding and its characters. What cannot be meant as a caption is refused."""

from __future__ import annotations

import codecs
import re
import unicodedata
from dataclasses import dataclass

MAX_CAPTION_BYTES = 10_000
# The longer marks first: UTF-32 begins like UTF-16.
MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip
LINE_BREAKS = re.compile(r"[ \t]*(?:\r\n|[\r\n\t\u2028\u2029])[ \t\r\n\u2028\u2029]*")
CP1252 = "Windows-1252"
MOST_OTHER_LETTERS = 0.34  # of the letters: a text with more is in another code page, such as one of Cyrillic


@dataclass(frozen=True)
class CaptionText:
    """text: in one line, without blanks at the ends. guessed: the encoding, if it is a guess; else ""."""

    text: str
    guessed: str = ""


def decode_caption(data: bytes, name: str) -> CaptionText:
    """The text of a caption file; line breaks and tabs become blanks.

    name: of the file. Raises ValueError with the second half of a sentence that begins with the photo's name.
    """
    if len(data) > MAX_CAPTION_BYTES:
        raise ValueError(f"has a caption of more than {MAX_CAPTION_BYTES} bytes")
    help_ = f"save {name} as UTF-8"
    encoding = next((encoding for mark, encoding in MARKS if data.startswith(mark)), "utf-8")
    guessed = ""
    if encoding in ("utf-8", "utf-8-sig") and b"\0" in data:
        raise ValueError(f"has a caption {_what_has_nul(data)}; {help_}")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        if encoding != "utf-8" or not (text := _as_cp1252(data)):
            what = encoding.removesuffix("-sig").upper()
            raise ValueError(f"has a caption that is not {what} text; {help_}") from None
        guessed = CP1252
    if bad := sorted({one for one in text if unicodedata.category(one) == "Cc" and one not in "\t\r\n"}):
        codes = ", ".join(f"U+{ord(one):04X}" for one in bad)
        raise ValueError(f"has a caption with control characters ({codes}); remove them from {name}, or {help_}")
    return CaptionText(LINE_BREAKS.sub(" ", text).strip(), guessed)


def _what_has_nul(data: bytes) -> str:
    """Words for a text with NUL bytes: Latin letters in UTF-16 have one each, all at odd or all at even places."""
    even, odd = data[::2].count(0), data[1::2].count(0)
    if 3 * max(even, odd) >= len(data) and not (even and odd):
        return "in UTF-16 without the mark that says so"
    return "with NUL characters"


def _as_cp1252(data: bytes) -> str:
    """The text in Windows-1252; empty: it is probably in another encoding."""
    try:
        text = data.decode("cp1252")
    except UnicodeDecodeError:
        return ""
    letters = [one for one in text if one.isalpha()]
    others = sum(not one.isascii() for one in letters)
    return text if letters and others <= MOST_OTHER_LETTERS * len(letters) else ""
