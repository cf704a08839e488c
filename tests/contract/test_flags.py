"""Flags in prompts, as the hosted service has them: which are read, and that nothing is lost in silence."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.contract.flags import ELSEWHERE, NUMBERS, OURS, SWITCHES, WORDS, Flags, split

# What the hosted service's documentation and clients name, all told.
LISTED = (
    "mask_prompt mask_negative mask_invert mask_dilate mask_blur hires_denoising_strength face_inpaint_denoising"
    " outpaint outpaint_width outpaint_height outpaint_prompt tiled_upscale tiled_upscale_v2 hires_cfg_scale"
    " resemblance only_upscale upscale_factor upscale_v4 improve_similarity remove_background fix_bindi faceid_portrait"
    " input_faceid controlnets controlnet_weights control_guidance_start control_guidance_end fill multi"
)


def test_every_listed_flag_is_known() -> None:
    assert {*OURS, *ELSEWHERE} == set(LISTED.split())
    assert not set(OURS) & ELSEWHERE.keys()
    assert set(OURS) == {*WORDS, *SWITCHES, *NUMBERS, "mask_dilate"}


@pytest.mark.parametrize(
    ("text", "left", "values"),
    [
        ("a dog", "a dog", {}),
        ("a dog --mask_blur 4", "a dog", {"mask_blur": 4.0}),
        ("a dog --mask_blur 4 in the snow", "a dog in the snow", {"mask_blur": 4.0}),
        ("a dog --mask_blur 4, in the snow", "a dog in the snow", {"mask_blur": 4.0}),
        ("a dog --mask_blur 4 , in the snow", "a dog, in the snow", {"mask_blur": 4.0}),
        ("--mask_blur 4 a dog", "a dog", {"mask_blur": 4.0}),
        ("a dog --mask_blur=4 in the snow", "a dog in the snow", {"mask_blur": 4.0}),
        ("a dog\n--mask_blur\t4\n--upscale_factor 2.5\n", "a dog", {"mask_blur": 4.0, "upscale_factor": 2.5}),
        ("a dog --mask_prompt red  hat --mask_invert", "a dog", {"mask_prompt": "red hat", "mask_invert": True}),
        ("--mask_prompt red hat, scarf", "", {"mask_prompt": "red hat, scarf"}),
        ("a dog --mask_negative=hair --mask_blur 0", "a dog", {"mask_negative": "hair", "mask_blur": 0.0}),
        ("a --mask_invert dog", "a dog", {"mask_invert": True}),
        ("a --mask_invert false dog", "a dog", {}),
        ("a --mask_invert True, dog", "a dog", {"mask_invert": True}),
        ("a dog --only_upscale", "a dog", {"only_upscale": True}),
        ("a dog --only_upscale=false", "a dog", {}),
        ("x --mask_dilate 12 y", "x y", {"mask_dilate": "12"}),
        ("x --mask_dilate -5% y", "x y", {"mask_dilate": "-5%"}),
        ("x --mask_dilate 12px", "x", {"mask_dilate": "12"}),
        ("x --mask_dilate +2.50%", "x", {"mask_dilate": "2.5%"}),
        ("x --hires_denoising_strength .4 --hires_cfg_scale 5.5", "x",
         {"hires_denoising_strength": 0.4, "hires_cfg_scale": 5.5}),
        ("x --face_inpaint_denoising 1", "x", {"face_inpaint_denoising": 1.0}),
        ("x --control_guidance_start 0.2 --control_guidance_end 0.8", "x",
         {"control_guidance_start": 0.2, "control_guidance_end": 0.8}),
        # Two dashes that are no flag
        ("a dog -- in the snow", "a dog -- in the snow", {}),
        ("3--4 dogs, well--known", "3--4 dogs, well--known", {}),
        ("--", "--", {}),
        ("-- --", "-- --", {}),
        ("a ---mask_blur 4", "a ---mask_blur 4", {}),
        ("a --well-known --Dog --(mask_blur)", "a --well-known --Dog --(mask_blur)", {}),
        ("a (--mask_blur 4)", "a (--mask_blur 4)", {}),
    ],
)  # fmt: skip
def test_flags_are_read_and_leave_the_text(text: str, left: str, values: dict[str, Any]) -> None:
    assert split(text) == (left, Flags(**values), [])


@pytest.mark.parametrize(
    ("text", "left", "told"),
    [
        ("a dog --fix_bindi", "a dog", "--fix_bindi has no effect here and was left out of the prompt"),
        ("a --fix_bindi dog", "a dog", "--fix_bindi has no effect here and was left out of the prompt"),
        ("a dog --remove_background", "a dog", "--remove_background has no effect here and was left out of the prompt"),
        ("a --outpaint top-left dog", "a dog", "--outpaint top-left has no effect here"),
        ("a --outpaint_width 900 dog", "a dog", "--outpaint_width 900 has no effect here"),
        ("a dog --outpaint_prompt blue sky", "a dog", "--outpaint_prompt blue sky has no effect here"),
        ("a dog --controlnets pose depth", "a dog", "--controlnets pose depth has no effect here"),
        ("a --controlnet_weights 0.5 1 dog", "a dog", "--controlnet_weights 0.5 1 has no effect here"),
        ("a --multi 2 dogs", "a 2 dogs", "--multi has no effect here"),
        ("a dog --ar 16:9", "a dog", "--ar 16:9 is not known here and was left out of the prompt"),
        ("a dog --no people, cars", "a dog", "--no people, cars is not known here"),
        ("--v 5 a dog", "a dog", "--v 5 is not known here"),  # the prompt itself is not its value
        ("--raw a dog", "a dog", "--raw is not known here"),
        ("a dog --mask_blurr 4", "a dog", "--mask_blurr 4 is not known here"),
        ("a dog --no " + "x " * 90, "a dog", "--no" + " x" * 27 + " … is not known here"),
    ],
)
def test_what_has_no_effect_is_named(text: str, left: str, told: str) -> None:
    kept, flags, (warning,) = split(text)
    assert (kept, flags) == (left, Flags())
    assert warning.startswith(told) and warning.endswith("was left out of the prompt")


@pytest.mark.parametrize(
    ("text", "left", "told"),
    [
        ("x --mask_blur big y", "x y", "--mask_blur must be a number from 0 to 1000, got big; it was left out"),
        ("x --mask_blur -1", "x", "--mask_blur must be a number from 0 to 1000, got -1; it was left out"),
        ("x --mask_blur", "x", "--mask_blur must be a number from 0 to 1000, got nothing; it was left out"),
        ("x --mask_blur nan", "x", "--mask_blur must be a number from 0 to 1000, got nan; it was left out"),
        ("x --hires_cfg_scale 15.1", "x", "--hires_cfg_scale must be a number from 0 to 15, got 15.1; it was left out"),
        ("x --upscale_factor 8x", "x", "--upscale_factor must be a number from 1 to 4, got 8x; it was left out"),
        ("x --face_inpaint_denoising 1e-1", "x", "--face_inpaint_denoising must be a number from 0 to 1, got 1e-1;"
         " it was left out"),
        ("x --hires_denoising_strength a", "x", "--hires_denoising_strength must be a number from 0.1 to 1, got a;"
         " it was left out"),
        ("x --mask_dilate 5cm", "x", "--mask_dilate must be from -100% to 100% or -1000px to 1000px, got 5cm;"
         " it was left out"),
        ("x --mask_dilate 101%", "x", "--mask_dilate must be from -100% to 100% or -1000px to 1000px, got 101%;"
         " it was left out"),
        ("x --mask_prompt", "x", "--mask_prompt needs words after it; it was left out"),
        ("x --mask_prompt --mask_negative", "x", "--mask_prompt needs words after it; it was left out"),
        ("x --control_guidance_start 0.8 --control_guidance_end 0.5", "x",
         "--control_guidance_start (0 if not given) must be below --control_guidance_end (1 if not given),"
         " got 0.8 and 0.5; they were left out"),
        ("x --control_guidance_end 0", "x", "--control_guidance_start (0 if not given) must be below"
         " --control_guidance_end (1 if not given), got 0 and 0; they were left out"),
    ],
)  # fmt: skip
def test_wrong_values_give_warnings_and_are_left_out(text: str, left: str, told: str) -> None:
    kept, flags, warnings = split(text)
    assert (kept, flags, warnings[0]) == (left, Flags(), told)


@pytest.mark.parametrize(("value", "taken"), [("0", 0.1), ("0.05", 0.1), ("7", 1.0), ("-3", 0.1), ("9" * 400, 1.0)])
def test_the_denoising_strength_is_clamped_as_by_the_hosted_service(value: str, taken: float) -> None:
    _, flags, (warning,) = split(f"x --hires_denoising_strength {value}")
    assert flags == Flags(hires_denoising_strength=taken)
    assert warning.startswith("--hires_denoising_strength must be a number from 0.1 to 1, got ")
    assert warning.endswith(f"; {taken:g} was taken") and len(warning) < 150


def test_a_flag_that_is_given_twice() -> None:
    _, flags, warnings = split("x --mask_blur 3 --mask_blur 4")
    assert flags == Flags(mask_blur=4.0) and warnings == ["--mask_blur is given twice; the last one counts"]
    _, flags, warnings = split("x --mask_blur 3 --mask_blur much")
    assert flags == Flags(mask_blur=3.0) and "got much" in warnings[0]


def test_lines_of_attributes_below_the_text() -> None:
    text = "a dog\nin the snow --mask_prompt face\n\nnum_images=4\n w=512 \r\nnegative_prompt=dull, x=y\n\n"
    kept, flags, warnings = split(text)
    assert kept == "a dog\nin the snow" and flags == Flags(mask_prompt="face")
    assert warnings == [
        "num_images=4 below the text was left out: send it as the prompt's attribute num_images",
        "w=512 below the text was left out: send it as the prompt's attribute w",
        "negative_prompt=dull, x=y below the text was left out: send it as the prompt's attribute negative_prompt",
    ]
    for plain in ("w=512", "w=512\na dog", "a dog w=512", "a dog\ne = mc2", "a dog\n1=2"):
        assert split(plain) == (plain, Flags(), [])


@given(st.text().filter(lambda text: "--" not in text and "=" not in text))
def test_other_texts_stay_as_they_are(text: str) -> None:
    assert split(text) == (text.strip(), Flags(), [])


PIECES = ["--", "-", " ", "\n", "=", ",", "a dog", "5", "12%", "true", "--x", *(f" --{name} " for name in OURS)]


@given(st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=5))).map("".join))
def test_no_text_is_too_odd(text: str) -> None:
    kept, flags, warnings = split(text)
    assert kept == kept.strip() and all(isinstance(warning, str) for warning in warnings)
    for field in fields(flags):
        value = getattr(flags, field.name)
        low, high = NUMBERS.get(field.name, (0, 0))
        assert value is None or isinstance(value, bool | str) or low <= value <= high
    assert flags != Flags() or warnings or kept == text.strip() or any(name in text for name in SWITCHES)
    rest = iter(text)
    assert all(character in rest for character in kept if not character.isspace())  # in its order, and nothing new


def test_long_texts_take_no_time() -> None:
    kept, _, warnings = split("a dog" + " --x" * 2500)
    assert kept == "a dog" and len(warnings) == 2500
    assert len(split("a dog\n" + "w=1\n" * 2500)[2]) == 2500
