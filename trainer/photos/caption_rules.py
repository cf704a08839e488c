"""Checks of captions against the tune: the token, and the number of tokens that the text encoder reads."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trainer.contract.photos import Photo
from trainer.photos.sorting import listed

# A word, a digit or a run of signs: CLIP's tokenizer splits a text like this, before it splits rare words further.
PIECES = re.compile(r"[^\W\d_]+|\d|[^\w\s]+|_+")
LETTERS_OF_TOKEN = 12  # a word of so many Latin letters, or fewer, is mostly one token
SHOWN = 120  # characters of a caption in a note


@dataclass(frozen=True)
class CaptionRules:
    """What captions are checked against. most_tokens: that the text encoder reads; None: not known."""

    token: str
    most_tokens: int | None


@dataclass
class _Found:
    """The names of the photos with each finding."""

    no_token: list[str] = field(default_factory=list)
    too_long: list[str] = field(default_factory=list)
    token_cut: list[str] = field(default_factory=list)


def check_captions(folder: Path, photos: Sequence[Photo], rules: CaptionRules) -> list[str]:
    """Warnings about captions, one for each kind; the notes of the photos are extended.

    folder: of the photos, with `NAME.txt` beside those that have a caption.
    """
    found = _Found()
    for photo in photos:
        try:
            text = (folder / photo.file).with_suffix(".txt").read_text("utf-8")
        except FileNotFoundError:  # it gets the default caption
            continue
        _check(photo, text, rules, found)
    warnings = []
    token, most = rules.token, rules.most_tokens
    if found.no_token:
        warnings.append(
            f"captions without the token {token}: {listed(found.no_token)}; "
            f"{token} learns nothing from these photos: write it into their captions"
        )
    if found.token_cut:
        warnings.append(
            f"the token {token} is in the part of the caption that is cut: {listed(found.token_cut)}; "
            f"{token} learns nothing from these photos: write it at the start of their captions"
        )
    if found.too_long:
        warnings.append(
            f"captions of more than {most} tokens, which is all that the text encoder reads (an estimate from the "
            f"words): {listed(found.too_long)}; the notes of the photos show what is cut"
        )
    return warnings


def _check(photo: Photo, text: str, rules: CaptionRules, found: _Found) -> None:
    token = rules.token
    place = re.search(rf"(?<!\w){re.escape(token)}(?!\w)", text, re.IGNORECASE)
    if place is None:
        found.no_token.append(photo.name)
        photo.notes.append(f"its caption is without the token {token}")
    count, end = estimate_tokens(text, rules.most_tokens)
    if end is None:
        return
    cut = text[end:].strip()
    found.too_long.append(photo.name)
    photo.notes.append(
        f"its caption has about {count} tokens, and the text encoder reads {rules.most_tokens}; "
        f"about this is cut: {shorten(cut)}"
    )
    if place and place.end() > end:
        found.token_cut.append(photo.name)
        photo.notes.append(f"the token {token} is in the part of its caption that is cut")


def estimate_tokens(text: str, most: int | None) -> tuple[int, int | None]:
    """About how many tokens a text has, and where it is cut after `most` tokens; None: it is not cut.

    The real number depends on the vocabulary. Other scripts than Latin have about one token for three bytes of UTF-8.
    """
    count, end = 0, None
    for piece in PIECES.finditer(text):
        word = piece[0]
        one = 1 + (len(word) - 1) // LETTERS_OF_TOKEN if word[0].isalpha() else 1
        if not word.isascii():
            one = max(one, len("".join(letter for letter in word if ord(letter) > 0x24F).encode()) // 3)
        if end is None and most is not None and count + one > most:
            end = piece.start()
        count += one
    return count, end


def shorten(text: str) -> str:
    """A text in quotation marks, its middle left out if it is long."""
    half = SHOWN // 2
    return f"{text!r}" if len(text) <= SHOWN else f"{f'{text[:half]} ... {text[-half:]}'!r}"
