"""The text of `args`, as people write it: `rank=4, lr=1e-4`, `--network_dim=4 learning_rate=0,0001`."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from trainer.config.toml_file import Table, read_toml

SPELLINGS = Path(__file__).with_name("args_spellings.toml")
SEPARATORS = "words are separated by blanks or commas, as rank=4 lr=1e-4; a decimal point is a point"
# A word up to its value: at the beginning, or after a blank, a comma or a semicolon.
KEY = re.compile(r"(?:(?<=[\s,;])|^)(?:-{0,2}(?P<key>[A-Za-z_][\w-]*)\s*[=:]\s*|--(?P<option>[A-Za-z_][\w-]*)\s+)")
THOUSANDS = re.compile(r"[1-9][0-9]{0,2}(?:,[0-9]{3})+")  # 1,000 is a thousand for some and one for others
DECIMAL_COMMA = re.compile(r"([+-]?[0-9]*),([0-9]+(?:[eE][+-]?[0-9]+)?)")


@cache
def spellings() -> Table:
    """`words`, `values` and `not_here` of the table of spellings."""
    return read_toml(SPELLINGS)


def split_args(text: str) -> tuple[list[tuple[str, str]], list[str]]:
    """The (word, value) pairs of a text in order, as they are written, and what is not one.

    JSON's braces and all quotes are left out. A comma belongs to a value if no word follows it.
    """
    text = re.sub(r"[{}\[\]\"']", "", text)
    found = list(KEY.finditer(text))
    ends = [*(key.start() for key in found), len(text)][1:]
    strange = text[: found[0].start() if found else len(text)].replace(",", " ").split()
    pairs = []
    for key, end in zip(found, ends if found else [], strict=True):
        joined = re.sub(r"\s*,\s*", ",", text[key.end() : end].strip(" \t\r\n,;"))
        value, *rest = re.split(r"[\s;]+", joined)
        pairs.append((key["key"] or key["option"], value))
        strange += rest
    return pairs, strange


def our_word(written: str) -> str:
    """Our word for a spelling; unknown ones in lower case with `_`."""
    plain = written.lower().replace("-", "_")
    return str(spellings()["words"].get(plain, plain))


def our_value(word: str, value: str, *, decimal: bool) -> str:
    """Our spelling of a value. decimal: the word takes a number with a decimal point. Raises ValueError for 1,000."""
    if decimal and THOUSANDS.fullmatch(value):
        raise ValueError(f"{value!r} may be a thousand or a decimal number; write it without a comma")
    if decimal and (comma := DECIMAL_COMMA.fullmatch(value)):
        return f"{comma[1] or '0'}.{comma[2]}"
    plain = value.lower()
    return str(spellings()["values"].get(word, {}).get(plain, plain))
