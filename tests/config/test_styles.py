"""The templates of the attribute style."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

STYLES = tomllib.loads((Path(__file__).parents[2] / "presets" / "looks" / "styles.toml").read_text("utf-8"))
NAMES = [
    "Cinematic", "Animated", "Digital Art", "Photographic", "Fantasy art", "Neonpunk", "Enhance", "Comic book",
    "Lowpoly", "Line art",
]  # fmt: skip


def test_all_styles_of_the_hosted_service_are_there() -> None:
    assert list(STYLES) == NAMES
    assert len({style["prompt"] for style in STYLES.values()}) == len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_template_has_one_place_for_the_text_and_leaves_it_room(name: str) -> None:
    style = STYLES[name]
    assert style.keys() == {"prompt", "negative"}
    assert style["prompt"].count("{prompt}") == 1 and style["negative"]
    for text in (style["prompt"].replace("{prompt}", ""), style["negative"]):
        assert not set("{}()[]<>\\") & set(text) and "--" not in text  # nothing that means something in a prompt
        assert len(text.replace(",", " , ").split()) < 35  # of CLIP's 75 tokens
