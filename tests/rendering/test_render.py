"""Prompts are rendered as they ask: each attribute changes the picture as it should, and nothing stays of it.

Everything goes through the verbs and the bench of the worker, on tiny bases, with LoRAs of random weights.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny, DiffusionPipeline
from huggingface_hub import constants
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file

from tests.helpers.marks import long_but
from tests.helpers.pictures import apart, pixels
from tests.helpers.rendering import CLOSE, CPU, FAMILIES, ROUNDING, Room, far, outside, unlike
from tests.helpers.shared import SHARED
from trainer.config import branch_file, looks, resolve, toml_file
from trainer.contract.photos import Upload
from trainer.contract.prompts import SCHEDULERS
from trainer.library import weights
from trainer.methods import lora
from trainer.photos.analysis import PhotoAnalyzer
from trainer.rendering import afterwards, film, paste, pictures, renderer, schedulers, upscale
from trainer.rendering import preview as preview_
from trainer.rendering.preview import Preview
from trainer.studio import prompts, rows
from trainer.studio.tunes import get_tune

pytest_plugins = ("tests.helpers.web", "tests.helpers.rendering")
FACES = SHARED / "data" / "faces"


# Attributes of drawing

CHANGES: dict[str, dict[str, Any]] = {
    "text": {"text": "ohwx cat"},
    "seed": {"seed": 8},
    "steps": {"steps": 3},
    "cfg_scale": {"cfg_scale": 2},
    "lora_scale": {"lora_scale": 0.5},
    "style": {"style": "Cinematic"},
    "color_grading": {"color_grading": "Ektar"},
    "film_grain": {"film_grain": True},
    "negative_prompt": {"negative_prompt": "a blurry cat"},
    "use_lpw": {"use_lpw": True, "text": "ohwx (dog:1.5)"},
}
LATER = ("seed", "steps", "style", "color_grading", "film_grain")  # these take the same code in every family
WAYS = [
    pytest.param(branch, name, marks=pytest.mark.long if branch != "sd15" and name in LATER else [])
    for branch in FAMILIES
    for name in CHANGES
    if branch != "flux1" or name not in ("negative_prompt", "use_lpw")
]


@pytest.mark.parametrize(("branch", "name"), WAYS)
def test_each_attribute_changes_the_picture_and_nothing_stays_of_it(
    room: Room, tunes: dict[str, int], branch: str, name: str
) -> None:
    plain = room.render(tunes[branch])
    changed = room.render(tunes[branch], **CHANGES[name])
    assert apart(changed.picture, plain.picture) > 2 * CLOSE
    assert plain.picture.size == changed.picture.size == (64, 64)
    assert plain.warnings == changed.warnings == []
    again = room.render(tunes[branch])
    assert apart(again.picture, plain.picture) <= ROUNDING and again.facts == plain.facts
    told = {"style", "negative_prompt", "text"} & CHANGES[name].keys() or name in ("steps", "cfg_scale", "seed")
    assert bool(told) == ((changed.facts | {"more": {}, "loras": []}) != (plain.facts | {"more": {}, "loras": []}))


@pytest.mark.parametrize("branch", ["sd15", "sdxl1"])
def test_a_negative_prompt_works_by_guidance(room: Room, tunes: dict[str, int], branch: str) -> None:
    plain, negative = (
        room.render(tunes[branch], cfg_scale=1, **more).picture for more in ({}, {"negative_prompt": "a blurry cat"})
    )
    assert not unlike(plain, negative)


def test_flux_leaves_out_what_it_has_no_use_for_and_says_so(room: Room, tunes: dict[str, int]) -> None:
    plain = room.render(tunes["flux1"], "ohwx (dog:1.5)").picture
    for asked, told in (
        ({"negative_prompt": "blurry"}, "negative_prompt has no effect on flux1"),
        ({"scheduler": "euler_a"}, "scheduler has no effect on flux1"),
        ({"use_lpw": True}, "use_lpw works with CLIP text encoders"),
    ):
        for _ in range(2):  # what is remembered of the first must not swallow the warning
            done = room.render(tunes["flux1"], "ohwx (dog:1.5)", **asked)
            assert [told in warning for warning in done.warnings] == [True]
            assert apart(done.picture, plain) <= ROUNDING


def test_a_base_that_was_replaced_under_its_name_is_loaded_anew(room: Room, tunes: dict[str, int]) -> None:
    plain = room.render(tunes["sd15"]).picture
    file = next((room.base("sd15") / "unet").glob("*.safetensors"))
    before = file.read_bytes()
    weights = load_file(file)
    save_file({key: value.flip(0).contiguous() for key, value in weights.items()}, file, {"format": "pt"})
    try:
        assert file.stat().st_size == len(before)
        replaced = room.render(tunes["sd15"]).picture
        assert unlike(replaced, plain)
        assert not unlike(replaced, room.render(tunes["sd15"], bench=room.new_bench()).picture)
    finally:
        file.write_bytes(before)
    assert not unlike(room.render(tunes["sd15"]).picture, plain)


@pytest.mark.parametrize("branch", FAMILIES)
def test_pictures_have_seeds_that_follow_each_other(room: Room, tunes: dict[str, int], branch: str) -> None:
    four = room.render(tunes[branch], num_images=4)
    alone = [room.render(tunes[branch], seed=7 + number).picture for number in range(4)]
    assert len(four.pictures) == 4
    assert max(apart(one, other) for one, other in zip(four.pictures, alone, strict=True)) <= CLOSE
    assert min(far(one, other) for one in alone for other in alone if one is not other) > 5 * CLOSE
    again = room.render(tunes[branch], num_images=4)
    assert max(apart(*pair) for pair in zip(again.pictures, four.pictures, strict=True)) <= ROUNDING
    assert [pictures.read_facts(four.folder / f"{number}.png")["seed"] for number in range(4)] == [7, 8, 9, 10]


def test_without_a_seed_it_is_42(room: Room, tunes: dict[str, int]) -> None:
    assert not unlike(room.render(tunes["sd15"], seed=None).picture, room.render(tunes["sd15"], seed=42).picture)
    assert unlike(room.render(tunes["sd15"], seed=None).picture, room.render(tunes["sd15"], seed=0).picture)
    last = room.render(tunes["sd15"], seed=2**32 - 1, num_images=2)
    assert unlike(*last.pictures)


@pytest.mark.parametrize("branch", ["sd15", pytest.param("sdxl1", marks=pytest.mark.long)])
def test_schedulers_are_unlike_each_other_and_leave_the_base_s_own(
    room: Room, tunes: dict[str, int], branch: str
) -> None:
    plain = room.render(tunes[branch], steps=4)
    found = {}
    for name in SCHEDULERS:
        done, again = (room.render(tunes[branch], steps=4, scheduler=name) for _ in range(2))
        assert not unlike(done.picture, again.picture), name
        assert done.facts["sampler"] == schedulers.SCHEDULERS[name][0] and done.warnings == []
        found[name] = done.picture
        assert not unlike(room.render(tunes[branch], steps=4).picture, plain.picture), name
    same = {(one, other) for one in found for other in found if one < other and not unlike(found[one], found[other])}
    assert same == set()
    own = {name for name in found if not unlike(found[name], plain.picture)}
    assert own == ({"euler"} if branch == "sdxl1" else set())  # SDXL's own
    assert plain.facts["sampler"] == {"sd15": "PNDM", "sdxl1": "Euler"}[branch]


@pytest.mark.parametrize("scheduler", ["euler_a", "dpm++sde", "lcm"])
def test_the_noise_of_each_step_is_the_picture_s_own_too(room: Room, tunes: dict[str, int], scheduler: str) -> None:
    two = room.render(tunes["sd15"], num_images=2, scheduler=scheduler, steps=3).pictures
    second = room.render(tunes["sd15"], seed=8, scheduler=scheduler, steps=3).picture
    assert apart(two[1], second) <= CLOSE


@pytest.mark.parametrize("branch", ["sd15", "sdxl1"])
def test_brackets_are_weights_only_where_that_is_asked_for(
    room: Room, tunes: dict[str, int], branch: str, heard: list[tuple[str, str | None]]
) -> None:
    plain, weighted = (room.render(tunes[branch], text, use_lpw=True).picture for text in ("a dog", "a (dog:1.5)"))
    assert unlike(plain, weighted)
    as_it_stands = room.render(tunes[branch], "a (dog:1.5)").picture
    assert unlike(as_it_stands, weighted) and heard == [("a (dog:1.5)", None)]
    assert not unlike(room.render(tunes[branch], "a dog").picture, plain)  # no weights are no change


@pytest.fixture
def heard(room: Room, tunes: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    """The texts, and negative ones, that are encoded from now on."""
    texts: list[tuple[str, str | None]] = []
    for branch in FAMILIES:
        if room.renderer(branch)._loaded is None:
            room.render(tunes[branch])
        room.renderer(branch)._loaded.texts.clear()
        loaded = room.renderer(branch)._loaded.branch

        def say(text: str, negative: str | None, real: Any = loaded.encode_for_pipeline) -> Any:
            texts.append((text, negative))
            return real(text, negative)

        monkeypatch.setattr(loaded, "encode_for_pipeline", say)
    return texts


def test_a_style_is_put_around_the_text_and_after_the_negative_one(
    room: Room, tunes: dict[str, int], heard: list[tuple[str, str | None]]
) -> None:
    room.render(tunes["sd15"], style="cinematic")
    room.render(tunes["sd15"], style="Cinematic", negative_prompt="fog")
    room.render(tunes["flux1"], style="Cinematic")
    style = looks.styles(room.settings.presets)["Cinematic"]
    text = style.prompt.replace("{prompt}", "ohwx dog")
    assert heard == [(text, style.negative), (text, f"fog, {style.negative}"), (text, None)]


def test_texts_are_encoded_once_for_the_same_models(
    room: Room, tunes: dict[str, int], heard: list[tuple[str, str | None]]
) -> None:
    for seed in range(3):
        room.render(tunes["sd15"], "a red dog", seed=seed)
    assert heard == [("a red dog", None)]
    room.render(tunes["sd15"], "a red dog", lora_scale=0.5)
    room.render(tunes["sd15"], "a red dog", lora_scale=0.5, seed=1)
    assert len(heard) == 2
    room.render(room.tune(seed=5), "a red dog")
    assert len(heard) == 3
    room.render(tunes["sd15"], "a red dog", negative_prompt="")
    assert len(heard) == 4


# Sizes


@pytest.mark.parametrize(
    ("asked", "size"),
    [
        ({"w": 128, "h": 64}, (128, 64)),
        ({"w": 72, "h": 88}, (72, 88)),
        ({"w": 96}, (96, 64)),
        ({"aspect_ratio": "16:9"}, (80, 48)),
        ({"aspect_ratio": "9:16"}, (48, 80)),
        ({"aspect_ratio": "16:9", "w": 144}, (144, 80)),
        ({"aspect_ratio": "16:9", "w": 64, "h": 96}, (64, 96)),
        ({"ar": "portrait"}, (48, 80)),
        ({"ar": "landscape"}, (80, 48)),
        ({"ar": "1:1"}, (64, 64)),
        ({"ar": "portrait", "aspect_ratio": "21:9"}, (96, 48)),
    ],
)
@pytest.mark.parametrize("branch", ["sd15", *(pytest.param(name, marks=pytest.mark.long) for name in FAMILIES[1:])])
def test_pictures_have_the_asked_size(
    room: Room, tunes: dict[str, int], branch: str, asked: dict[str, Any], size: tuple[int, int]
) -> None:
    told = []
    if "aspect_ratio" in asked and {"h", "ar"} & asked.keys():
        told = [f"{'ar' if 'ar' in asked else 'aspect_ratio'} has no effect with"]
    if branch == "flux1" and 72 in asked.values():
        size, told = (80, 96), ["flux1 renders 80 x 96 pixels: its sides are multiples of 16"]
    done = room.render(tunes[branch], **asked)
    assert done.picture.size == size and len(done.warnings) == len(told)
    assert all(warning.startswith(start) for warning, start in zip(done.warnings, told, strict=True))
    assert (done.facts["width"], done.facts["height"]) == size
    assert pixels(done.picture).std() > 10


@pytest.mark.parametrize(
    ("asked", "size", "told"),
    [
        ({}, (64, 64), []),
        ({"w": 64, "h": 64}, (64, 64), []),
        ({"w": 128, "h": 64}, (64, 32), ["fast renders 64 x 32 pixels; w and h have no effect"]),
        ({"w": 512, "h": 1024}, (32, 64), ["fast renders 32 x 64 pixels; w and h have no effect"]),
        ({"aspect_ratio": "16:9"}, (64, 40), []),
        ({"ar": "portrait"}, (40, 64), []),
    ],
)
def test_fast_renders_64_pixels_on_the_longer_side(
    room: Room, fast: int, asked: dict[str, Any], size: tuple[int, int], told: list[str]
) -> None:
    done = room.render(fast, **asked)
    assert (done.picture.size, done.warnings) == (size, told)


@pytest.fixture(scope="module")
def fast(open_room: Room) -> int:
    return open_room.tune("fast")


# Afterwards


def test_super_resolution_enlarges_what_was_drawn(room: Room, tunes: dict[str, int], monkeypatch: Any) -> None:
    model = upscale.upscaler(room.settings.weights / weights.UPSCALER.name, CPU)
    plain, large = (room.render(tunes["sd15"], super_resolution=on) for on in (False, True))
    assert (plain.picture.size, large.picture.size, large.facts["width"]) == ((64, 64), (256, 256), 256)
    assert not unlike(large.picture, upscale.upscale(plain.picture, model, 4))
    monkeypatch.setattr(upscale, "SMALL", 64 * 64)  # 512 x 512 px, which takes long
    twice = room.render(tunes["sd15"], super_resolution=True).picture
    assert not unlike(twice, upscale.upscale(plain.picture, model, 2))


@pytest.mark.long
@pytest.mark.parametrize(("w", "factor"), [(504, 4), (512, 2)])
def test_pictures_are_enlarged_four_times_below_512_px_squared(
    room: Room, tunes: dict[str, int], w: int, factor: int
) -> None:
    done = room.render(tunes["sd15"], super_resolution=True, w=w, h=512, steps=1)
    assert done.picture.size == (factor * w, factor * 512)


def test_without_the_upscaler_pictures_come_as_they_were_drawn_and_say_so(
    room: Room, tunes: dict[str, int], monkeypatch: Any
) -> None:
    bench = room.new_bench()
    monkeypatch.setattr(weights, "UPSCALER", replace(weights.UPSCALER, name="RealESRGAN_x8plus.pth"))
    done = room.render(tunes["sd15"], super_resolution=True, bench=bench)
    assert done.picture.size == (64, 64) and room.leftovers() == []
    (told,) = done.warnings
    assert told.startswith("super_resolution: pictures are not enlarged: ")
    assert "put RealESRGAN_x8plus.pth into the weights folder" in told


@pytest.mark.parametrize("branch", FAMILIES)
def test_hires_fix_draws_the_enlarged_picture_again(room: Room, tunes: dict[str, int], branch: str) -> None:
    asked = {"super_resolution": True, "steps": 4}
    large, fixed = (room.render(tunes[branch], hires_fix=on, **asked) for on in (False, True))
    assert large.picture.size == fixed.picture.size == (256, 256) and large.warnings == fixed.warnings == []
    assert unlike(large.picture, fixed.picture)
    much = room.render(tunes[branch], "ohwx dog --hires_denoising_strength 1", hires_fix=True, **asked).picture
    assert unlike(much, large.picture) and unlike(much, fixed.picture)
    freely = room.render(tunes[branch], "ohwx dog --hires_cfg_scale 15", hires_fix=True, **asked).picture
    assert unlike(freely, fixed.picture)


def test_hires_fix_has_no_effect_alone_or_on_fast(room: Room, tunes: dict[str, int], fast: int) -> None:
    plain = room.render(tunes["sd15"]).picture
    alone = room.render(tunes["sd15"], hires_fix=True)
    assert alone.warnings == ["hires_fix has no effect without super_resolution"] and not unlike(alone.picture, plain)
    large, fixed = (room.render(fast, super_resolution=True, hires_fix=on) for on in (False, True))
    assert not unlike(large.picture, fixed.picture)
    assert fixed.warnings == ["hires_fix has no effect: the base of fast knows one size only"]


def test_a_size_that_the_base_cannot_draw_comes_back_from_hires_fix(room: Room, tunes: dict[str, int]) -> None:
    done = room.render(tunes["sd15"], "ohwx dog --upscale_factor 1.3", super_resolution=True, hires_fix=True, steps=4)
    assert done.picture.size == (83, 83)


def test_film_comes_last_and_grain_after_colour(room: Room, tunes: dict[str, int]) -> None:
    plain = room.render(tunes["sd15"], num_images=2).pictures
    done = room.render(tunes["sd15"], num_images=2, color_grading="film portra", film_grain=True).pictures
    look = looks.film_looks(room.settings.presets)["Film Portra"]
    for number in range(2):
        assert not unlike(done[number], film.grain(film.grade(plain[number], look), 7 + number))


@pytest.fixture(scope="module")
def people(open_room: Room) -> int:
    return open_room.tune(name="woman", seed=3)


TWO_FACES = [(10.0, 12.0, 34.0, 40.0), (80.0, 70.0, 104.0, 98.0)]
LARGE = {"w": 128, "h": 128, "steps": 4}


def test_every_face_is_drawn_again_and_nothing_else(room: Room, people: int) -> None:
    plain = room.render(people, **LARGE).picture
    room.eyes.boxes = TWO_FACES
    done = room.render(people, inpaint_faces=True, **LARGE)
    squares = [paste.face_square(box, (128, 128)) for box in TWO_FACES]
    assert done.warnings == [] and outside(done.picture, plain, squares) == 0
    assert all(far(done.picture.crop(square), plain.crop(square)) > 1 for square in squares)
    weakly = room.render(people, "ohwx dog --face_inpaint_denoising 0.3", inpaint_faces=True, **LARGE).picture
    strongly = room.render(people, "ohwx dog --face_inpaint_denoising 1", inpaint_faces=True, **LARGE).picture
    assert unlike(weakly, plain) and unlike(weakly, strongly) and unlike(done.picture, strongly)
    none = room.render(people, "ohwx dog --face_inpaint_denoising 0", inpaint_faces=True, **LARGE)
    assert not unlike(none.picture, plain)
    assert not unlike(room.render(people, **LARGE).picture, plain)


@pytest.mark.parametrize("branch", FAMILIES[1:])
def test_faces_of_other_families_are_drawn_again_too(room: Room, branch: str) -> None:
    person = room.tune(branch, name="man")
    plain = room.render(person, **LARGE).picture
    room.eyes.boxes = TWO_FACES[:1]
    done = room.render(person, inpaint_faces=True, **LARGE)
    square = paste.face_square(TWO_FACES[0], (128, 128))
    assert outside(done.picture, plain, [square]) == 0 < far(done.picture, plain)


def test_faces_of_each_picture_are_its_own(room: Room, people: int) -> None:
    room.eyes.boxes = TWO_FACES[:1]
    two = room.render(people, inpaint_faces=True, num_images=2, **LARGE).pictures
    second = room.render(people, inpaint_faces=True, seed=8, **LARGE).picture
    assert apart(two[1], second) <= CLOSE


@pytest.mark.parametrize(
    ("boxes", "told"),
    [
        ([], "no face was found in a picture"),
        ([(0, 0, 100, 100)], "above 30% is large enough as it is"),
        ([(0, 0, 5, 5)], "below 0.3% is too small"),
        ([(20, 20, 80, 80)], "at 108 px the face is drawn large already"),
    ],
)
def test_a_face_that_is_not_drawn_again_gives_a_warning(
    room: Room, people: int, boxes: list[tuple[float, float, float, float]], told: str
) -> None:
    plain = room.render(people, **LARGE).picture
    room.eyes.boxes = boxes
    done = room.render(people, inpaint_faces=True, **LARGE)
    assert [warning.startswith("inpaint_faces: ") and told in warning for warning in done.warnings] == [True]
    assert not unlike(done.picture, plain)


def test_without_a_model_of_people_no_faces_are_detected(room: Room, tunes: dict[str, int], people: int) -> None:
    plain = room.render(tunes["sd15"], **LARGE).picture
    room.eyes.boxes = TWO_FACES
    done = room.render(tunes["sd15"], inpaint_faces=True, **LARGE)
    assert done.warnings == ["inpaint_faces has no effect: none of the models is of people"]
    assert not unlike(done.picture, plain) and room.eyes.seen == []
    named = room.render(tunes["sd15"], f"ohwx dog <lora:{people}:0.5>", inpaint_faces=True, **LARGE)
    assert named.warnings == [] and room.eyes.seen


@pytest.mark.parametrize("name", ["inpaint_faces", "face_correct"])
def test_without_face_analysis_the_picture_stays_and_a_warning_says_why(room: Room, people: int, name: str) -> None:
    plain = room.render(people).picture
    room.eyes.why_not = "the detector is not here"
    done = room.render(people, num_images=2, **{name: True})
    assert done.warnings == [f"{name}: the detector is not here"]
    assert apart(done.pictures[0], plain) <= CLOSE


def test_restored_faces_are_taken_over(room: Room, tunes: dict[str, int]) -> None:
    plain = room.render(tunes["sd15"]).picture
    room.eyes.boxes = [(8, 8, 24, 24)]
    done = room.render(tunes["sd15"], face_correct=True)  # of whatever it is
    expected = plain.copy()
    expected.paste(ImageOps.invert(plain.crop((8, 8, 24, 24))), (8, 8))
    assert done.warnings == [] and not unlike(done.picture, expected)
    room.eyes.boxes = []
    none = room.render(tunes["sd15"], face_correct=True)
    assert none.warnings == ["face_correct: no face was found in a picture"] and not unlike(none.picture, plain)


def test_face_swap_is_accepted_and_not_done(room: Room, tunes: dict[str, int]) -> None:
    plain, done = (room.render(tunes["sd15"], face_swap=on) for on in (False, True))
    assert plain.warnings == [] and "face_swap is accepted and not done" in done.warnings[0]
    assert not unlike(plain.picture, done.picture)


def test_what_comes_after_drawing_comes_in_the_hosted_service_s_order(
    room: Room, people: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = []

    def watch(owner: Any, name: str, told: str) -> None:
        real = getattr(owner, name)

        def watched(*args: Any, **more: Any) -> Any:
            order.append(told)
            return real(*args, **more)

        monkeypatch.setattr(owner, name, watched)

    for owner, name in ((upscale, "upscale"), (paste, "paste"), (film, "grade"), (film, "grain")):
        watch(owner, name, name)
    watch(room.eyes, "restore", "restore")
    watch(afterwards, "redraw", "draw again")
    room.eyes.boxes = [(10, 10, 60, 60)]
    room.render(
        people, super_resolution=True, hires_fix=True, inpaint_faces=True, face_correct=True, color_grading="Ektar",
        film_grain=True,
    )  # fmt: skip
    assert order == ["upscale", "draw again", "draw again", "paste", "restore", "grade", "grain"]


class SameProcess:
    """Does what the child that looks would be asked to, here."""

    def start(self) -> None: ...

    def close(self) -> None: ...

    def run(self, _seconds: float, name: str, *args: Any) -> Any:
        from trainer.photos import subprocess_worker

        return subprocess_worker.call("trainer.photos.faces", name, *args)


@pytest.fixture
def analyzer(room: Room, monkeypatch: pytest.MonkeyPatch) -> PhotoAnalyzer:
    """The real looker, for the bench of sd15."""
    if not FACES.is_dir():
        pytest.skip("the photos in ../shared are not on this machine")
    shutil.copy(SHARED / "weights" / weights.DETECTOR.name, room.settings.weights)
    made = PhotoAnalyzer(room.settings)
    monkeypatch.setattr(made, "_worker_process", SameProcess())
    monkeypatch.setattr(room.renderer("sd15"), "_analyzer", made)
    return made


def test_a_real_face_is_found_and_drawn_again(room: Room, people: int, analyzer: PhotoAnalyzer) -> None:
    file = FACES / "single" / "astronaut.png"
    asked = {"input_image": Upload(file.name, file), "denoising_strength": 0, "w": 160, "h": 160, "steps": 4}
    plain = room.render(people, **asked).picture
    plain.save(saved := room.settings.outputs / "seen.png")
    (face,) = analyzer.faces(saved)
    saved.unlink()
    done = room.render(people, inpaint_faces=True, **asked)
    square = paste.face_square(face.box, plain.size)
    assert done.warnings == [] and square[2] - square[0] < 100
    assert outside(done.picture, plain, [square]) == 0 and far(done.picture.crop(square), plain.crop(square)) > 1


def test_a_real_face_is_restored(room: Room, tunes: dict[str, int], analyzer: PhotoAnalyzer, monkeypatch: Any) -> None:
    from trainer.photos import restore

    real = restore.gfpgan
    monkeypatch.setattr(restore, "gfpgan", lambda: real(1, 0.25))
    monkeypatch.setattr(weights, "RESTORER", replace(weights.RESTORER, sha256=None))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.save({"params_ema": real(1, 0.25).state_dict()}, room.settings.weights / weights.RESTORER.name)
    restore.load_restorer.cache_clear()
    file = FACES / "single" / "astronaut.png"
    asked = {"input_image": Upload(file.name, file), "denoising_strength": 0, "w": 160, "h": 160}
    plain = room.render(tunes["sd15"], **asked).picture
    done = room.render(tunes["sd15"], face_correct=True, **asked)
    restore.load_restorer.cache_clear()
    box = Image.eval(
        ImageOps.grayscale(Image.fromarray(abs(pixels(done.picture) - pixels(plain)).astype("uint8"))), bool
    )
    changed = box.getbbox()
    assert done.warnings == [] and changed is not None
    assert 30 < changed[2] - changed[0] < 120  # the face, and not the whole picture


# What is written


def test_each_file_says_how_it_was_made(room: Room, tunes: dict[str, int]) -> None:
    done = room.render(
        tunes["sd15"], "ohwx dog --mask_blur 3", negative_prompt="fog", num_images=2, scheduler="euler_a", steps=3,
        cfg_scale=5, lora_scale=0.7, film_grain=True, color_grading="Ektar",
    )  # fmt: skip
    title = get_tune(room.services, tunes["sd15"]).title
    assert sorted(file.name for file in done.folder.iterdir()) == [
        "0.png", "0.thumb.jpg", "1.png", "1.thumb.jpg", "sheet.jpg",
    ]  # fmt: skip
    expected = {
        "prompt": "ohwx dog", "negative_prompt": "fog", "seed": 8, "steps": 3, "sampler": "Euler a", "cfg_scale": 5.0,
        "width": 64, "height": 64, "model": title, "base": "sd15", "loras": [[title, 0.7]],
        "more": {"lora_scale": 0.7, "film_grain": True, "color_grading": "Ektar"},
    }  # fmt: skip
    assert pictures.read_facts(done.folder / "1.png") == expected
    with Image.open(done.folder / "1.png") as image:
        assert image.info["parameters"].splitlines() == [
            "ohwx dog", "Negative prompt: fog",
            f'Steps: 3, Sampler: Euler a, CFG scale: 5, Seed: 8, Size: 64x64, Model: {title}, Lora: "{title}: 0.7"',
        ]  # fmt: skip
    with Image.open(done.folder / "sheet.jpg") as sheet:
        assert sheet.size == (2 * 64 + pictures.GAP, 64)
    assert len(done.prompt.images) == len(done.prompt.thumbnails) == 2 and done.prompt.contact_sheet


def test_pictures_may_be_jpegs(room: Room, tunes: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    plain = room.render(tunes["sd15"])
    assert plain.prompt.contact_sheet is None and not (plain.folder / "sheet.jpg").exists()
    renderer = room.renderer("sd15")
    monkeypatch.setattr(renderer, "_settings", renderer._settings.model_copy(update={"picture_format": "jpeg"}))
    done = room.render(tunes["sd15"])
    assert [file.name for file in sorted(done.folder.iterdir())] == ["0.jpg", "0.thumb.jpg"]
    assert done.facts == plain.facts and 0 < far(done.picture, plain.picture) < 20


# Memory, previews, stopping


@pytest.fixture
def little_memory(room: Room, tunes: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Let the pipeline have room for so many pictures only, and none without tiling: the batches that were tried."""

    def have(most: int, tiled: bool = False, error: Exception | None = None) -> list[int]:
        room.render(tunes["sd15"])
        stock, tried = room.pipeline("sd15"), []
        monkeypatch.setattr(stock.vae, "use_tiling", False)
        real = type(stock).__call__

        @functools.wraps(real)
        def call(self: Any, *args: Any, **more: Any) -> Any:
            tried.append(more["num_images_per_prompt"])
            if tried[-1] > most or (tiled and not self.vae.use_tiling):
                raise error or torch.OutOfMemoryError("CUDA out of memory")
            return real(self, *args, **more)

        monkeypatch.setattr(type(stock), "__call__", call)
        return tried

    return have


def test_where_memory_is_short_fewer_pictures_are_drawn_at_once(
    room: Room, tunes: dict[str, int], little_memory: Callable[..., list[int]]
) -> None:
    expected = room.render(tunes["sd15"], num_images=5)
    tried = little_memory(1)
    done = room.render(tunes["sd15"], num_images=5)
    assert tried == [5, 3, 2, 1, 1, 1, 1, 1]
    assert max(apart(*pair) for pair in zip(done.pictures, expected.pictures, strict=True)) <= CLOSE
    assert [pictures.read_facts(done.folder / f"{number}.png")["seed"] for number in range(5)] == [7, 8, 9, 10, 11]
    assert done.prompt.progress.step == done.prompt.progress.steps == 2 * 5


def test_the_last_resort_is_to_decode_in_tiles(
    room: Room, tunes: dict[str, int], little_memory: Callable[..., list[int]]
) -> None:
    expected = room.render(tunes["sd15"], num_images=2)
    tried = little_memory(2, tiled=True)
    done = room.render(tunes["sd15"], num_images=2)
    assert tried == [2, 1, 1, 1] and room.pipeline("sd15").vae.use_tiling
    assert max(apart(*pair) for pair in zip(done.pictures, expected.pictures, strict=True)) <= CLOSE


def test_what_never_fits_fails_in_words_and_so_does_another_error(
    room: Room, tunes: dict[str, int], little_memory: Callable[..., list[int]]
) -> None:
    tried = little_memory(0)
    done = room.run(tunes["sd15"], num_images=2)
    assert tried == [2, 1, 1] and done.prompt.status == "failed"
    assert "CUDA out of memory" in str(done.prompt.error) and not done.folder.exists()


def test_another_error_is_no_reason_to_try_again(
    room: Room, tunes: dict[str, int], little_memory: Callable[..., list[int]]
) -> None:
    tried = little_memory(0, error=RuntimeError("a bug"))
    done = room.run(tunes["sd15"], num_images=2)
    assert (tried, done.prompt.status, done.prompt.error) == (
        [2],
        "failed",
        "unexpected error: a bug; the app's log has the details",
    )
    assert not done.folder.exists() and room.leftovers() == []


@pytest.fixture
def tiny_decoder(tmp_path: Path, room: Room, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A hub's cache with a tiny decoder for each family, and previews that are always due."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoencoderTiny(
            encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4,
            num_encoder_blocks=(1,) * 4, num_decoder_blocks=(1,) * 4,
        )  # fmt: skip
    for branch in FAMILIES:
        repository = branch_file.render_config(room.settings.presets, branch).preview
        cached = tmp_path / f"models--{str(repository).replace('/', '--')}"
        (cached / "refs").mkdir(parents=True)
        (cached / "refs" / "main").write_text("0" * 40)
        model.save_pretrained(cached / "snapshots" / ("0" * 40))
        room.renderer(branch).release()  # the decoder comes with the base
    monkeypatch.setattr(Preview, "SHARE", 1.0)
    monkeypatch.setattr(Preview, "FIRST_SECONDS", 0.0)
    yield model
    for branch in FAMILIES:
        room.renderer(branch).release()


@pytest.mark.parametrize("branch", long_but(["flux1"], FAMILIES))
def test_a_preview_is_there_while_it_renders(
    room: Room, tunes: dict[str, int], tiny_decoder: Any, branch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    real = Preview.show

    def show(self: Any, latents: torch.Tensor, size: tuple[int, int]) -> None:
        real(self, latents, size)
        if self._file.exists():
            with Image.open(self._file) as image:
                seen.append((image.size, image.convert("RGB").tobytes(), list(self._file.parent.iterdir())))
            link = prompts.get_prompt(room.services, int(self._file.stem)).preview
            assert link and self._file.name in link

    monkeypatch.setattr(Preview, "show", show)
    done = room.render(tunes[branch], w=96, h=64, steps=4, num_images=2)
    assert len(seen) >= 2 and {size for size, _, _ in seen} == {(96, 64)}
    assert len({content for _, content, _ in seen}) > 1  # it goes on
    assert all(len(files) == 1 for _, _, files in seen)  # no half-written file beside it
    assert done.prompt.preview is None and not list((done.folder.parents[1] / "previews").iterdir())


def test_without_a_decoder_there_are_pictures_and_no_previews(
    room: Room, tunes: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    room.renderer("sd15").release()
    assert room.render(tunes["sd15"]).warnings == []
    assert room.renderer("sd15")._loaded.decoder is None


@pytest.mark.parametrize(("cost", "step"), [(0.02, 0.1), (0.05, 0.5), (0.001, 0.01), (2.0, 0.3)])
def test_previews_take_a_fiftieth_of_the_time_at_most(
    tmp_path: Path, cost: float, step: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(preview_, "time", SimpleNamespace(monotonic=lambda: now[0]))
    spent = []

    def decode(latents: torch.Tensor) -> Any:
        now[0] += cost
        spent.append(cost)
        return SimpleNamespace(sample=torch.zeros(1, 3, 8, 8))

    decoder = SimpleNamespace(decode=decode, device=CPU, dtype=torch.float32)
    processor = SimpleNamespace(postprocess=lambda pixels: [Image.new("RGB", (8, 8))])
    shares = []
    pipeline = SimpleNamespace(image_processor=processor)
    branch = SimpleNamespace(pipeline=pipeline, preview_latents=lambda latents, _size: latents)
    with Preview(tmp_path / "1.jpg", branch, decoder) as preview:
        for _ in range(2000):
            now[0] += step
            preview.show(torch.zeros(1, 4, 8, 8), (8, 8))
            shares.append(sum(spent) / now[0])
    assert spent and shares[-1] <= 0.02
    if cost <= Preview.FIRST_SECONDS:
        assert max(shares) <= 0.02


def test_a_prompt_that_is_canceled_stops_in_the_middle(
    room: Room, tunes: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, asked = room.store.cancel_wanted, []

    def cancel_wanted(table: Any, row_id: int) -> bool:
        asked.append(row_id)
        if len(asked) == 3:
            room.store.update("prompts", row_id, cancel=1)
        return real(table, row_id)

    monkeypatch.setattr(room.store, "cancel_wanted", cancel_wanted)
    done = room.run(tunes["sd15"], steps=20, num_images=2)
    assert done.prompt.status == "canceled" and 3 <= len(asked) <= 5
    assert not done.folder.exists() and room.leftovers() == [] and done.prompt.images == []
    monkeypatch.undo()
    assert not unlike(room.render(tunes["sd15"]).picture, room.render(tunes["sd15"]).picture)


def test_a_prompt_is_put_back_when_the_app_stops_and_is_rendered_afterwards(
    room: Room, tunes: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = room.render(tunes["sd15"], steps=6)
    real, asked = room.store.cancel_wanted, []

    def cancel_wanted(table: Any, row_id: int) -> bool:
        asked.append(row_id)
        if len(asked) == 3:
            room.stopping.set()
        return real(table, row_id)

    monkeypatch.setattr(room.store, "cancel_wanted", cancel_wanted)
    done = room.run(tunes["sd15"], steps=6)
    room.stopping.clear()
    assert done.prompt.status == "queued" and len(asked) == 4  # once more to tell why it stopped
    assert not done.folder.exists() and room.leftovers() == []
    again = room.go(done.prompt)
    assert again.prompt.status == "rendered" and not unlike(again.picture, expected.picture)


# As others render


@pytest.mark.parametrize("branch", long_but(["sd15", "flux1"], FAMILIES))
def test_stock_diffusers_renders_the_same_pixels(room: Room, tunes: dict[str, int], branch: str) -> None:
    more = {} if branch == "flux1" else {"negative_prompt": "fog and rain"}
    ours = room.render(tunes[branch], "a photo of ohwx dog", num_images=2, steps=4, cfg_scale=5, **more)
    quiet = {"safety_checker": None} if branch == "sd15" else {}
    stock = DiffusionPipeline.from_pretrained(room.base(branch), local_files_only=True, **quiet)
    stock.load_lora_weights(rows.tune_folder(room.services, tunes[branch]) / "model", weight_name=lora.DIFFUSERS_FILE)
    stock.set_progress_bar_config(disable=True)
    theirs = stock(
        "a photo of ohwx dog", width=64, height=64, num_inference_steps=4, guidance_scale=5, num_images_per_prompt=2,
        generator=[torch.Generator().manual_seed(seed) for seed in (7, 8)], **more,
    ).images  # fmt: skip
    assert max(apart(*pair) for pair in zip(ours.pictures, theirs, strict=True)) <= ROUNDING
    stock.unload_lora_weights()
    bare = stock(
        "a photo of ohwx dog", width=64, height=64, num_inference_steps=4, guidance_scale=5,
        generator=[torch.Generator().manual_seed(7)], **more,
    ).images[0]  # fmt: skip
    base = room.render(tunes[branch], "a photo of ohwx dog", lora_scale=0, steps=4, cfg_scale=5, **more).picture
    assert apart(bare, theirs[0]) > 10 and apart(bare, base) <= ROUNDING


def test_a_prompt_is_copied_with_everything_that_it_asks_for(room: Room, tunes: dict[str, int], photos: Any) -> None:
    file = photos[1]
    asked = {"input_image": Upload(file.name, file), "denoising_strength": 0.5, "style": "Cinematic", "steps": 4}
    first = room.render(tunes["sd15"], lora_scale=0.5, color_grading="Ektar", **asked)
    same = room.go(prompts.duplicate_prompt(room.services, first.prompt.id, {}))
    other = room.go(prompts.duplicate_prompt(room.services, first.prompt.id, {"seed": 8}))
    assert not unlike(same.picture, first.picture) and same.facts == first.facts
    assert unlike(other.picture, first.picture) and other.facts == first.facts | {"seed": 8}


# What is read


def test_rendering_parses_no_toml_and_no_text_and_reads_no_configuration_once_it_has_begun(
    room: Room, tunes: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"style": "Cinematic", "color_grading": "Ektar", "text": "ohwx dog --mask_blur 3"}
    prompt = prompts.create_prompt(room.services, tunes["sd15"], {"num_images": 1, "seed": 7, **asked})
    read, render = toml_file.read_toml, renderer.Renderer.render_prompt
    begun: list[str] = []

    def never(*arguments: object) -> Any:
        raise AssertionError(f"was read when the prompt came: {arguments}")

    def read_before(file: Path, *check: Any) -> dict[str, Any]:
        assert not begun, file
        return read(file, *check)

    def begin(*arguments: Any) -> Any:
        begun.append("rendering")
        return render(*arguments)

    monkeypatch.setattr(toml_file.tomllib, "loads", never)
    monkeypatch.setattr("trainer.contract.prompts.parse_text", never)
    for module in (branch_file, looks, resolve):
        monkeypatch.setattr(module, "read_toml", read_before)
    monkeypatch.setattr(renderer.Renderer, "render_prompt", begin)
    done = room.go(prompt)
    assert (done.prompt.status, done.prompt.error, begun) == ("rendered", None, ["rendering"])
