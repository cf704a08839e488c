"""Prompts that start from a picture: how much of it stays, where, and what the flags in the text do with it."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from PIL import Image, ImageOps

from tests.helpers.pictures import apart, noise, pixels
from tests.helpers.rendering import CLOSE, CPU, FAMILIES, ROUNDING, Room, far, outside, unlike
from trainer.contract.errors import InvalidRequest
from trainer.contract.photos import Upload
from trainer.library import weights
from trainer.photos import inputs
from trainer.rendering import afterwards, draw
from trainer.rendering import upscale as upscale_
from trainer.rendering.renderer import Renderer
from trainer.rendering.upscale import upscaler
from trainer.studio import pack_verbs, prompts, rows

pytest_plugins = ("tests.helpers.web", "tests.helpers.rendering")
LEFT = (0, 0, 32, 64)  # half of a picture of 64 x 64 px


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures that prompts start from, and masks: white is redrawn."""
    folder = tmp_path_factory.mktemp("files")
    noise(64, 64, 5).resize((16, 16)).resize((64, 64)).save(folder / "square.png")
    noise(96, 48, 6).save(folder / "wide.png")
    noise(40, 60, 7).save(folder / "small.png")
    mask = Image.new("L", (64, 64))
    mask.paste(255, LEFT)
    mask.save(folder / "left.png")
    mask.resize((128, 128)).save(folder / "large left.png")
    return folder


def from_(files: Path, name: str = "square", mask: str | None = None, **more: Any) -> dict[str, Any]:
    asked = {"input_image": Upload(f"{name}.png", files / f"{name}.png"), "steps": 4}
    if mask:
        asked["mask_image"] = Upload(f"{mask}.png", files / f"{mask}.png")
    return asked | more


def start(files: Path, name: str = "square", size: tuple[int, int] = (64, 64)) -> Image.Image:
    with Image.open(files / f"{name}.png") as opened_:
        return ImageOps.fit(opened_.convert("RGB"), size, Image.Resampling.LANCZOS)


# How much of the picture stays


@pytest.mark.parametrize("branch", FAMILIES)
def test_a_picture_stays_or_is_drawn_over(room: Room, tunes: dict[str, int], files: Path, branch: str) -> None:
    none = room.render(tunes[branch], **from_(files, denoising_strength=0))
    assert apart(none.picture, start(files)) == 0 and none.warnings == []
    found = [room.render(tunes[branch], **from_(files, denoising_strength=value)).picture for value in (0.25, 0.5, 1)]
    assert all(unlike(one, start(files)) for one in found)
    assert far(found[0], found[1]) < far(found[0], found[2])  # what a random VAE makes of the picture goes last
    other = room.render(tunes[branch], **from_(files, "small", denoising_strength=0.25, w=64, h=64)).picture
    assert unlike(other, found[0])
    text = room.render(tunes[branch], steps=4).picture
    assert unlike(text, found[2])
    again = room.render(tunes[branch], **from_(files, denoising_strength=0.5)).picture
    assert apart(again, found[1]) <= ROUNDING


def test_a_family_whose_pipeline_takes_no_strength_draws_all_steps(
    room: Room, tunes: dict[str, int], files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As that of FLUX.2, whose pipeline for texts takes a picture as a reference."""
    room.render(tunes["sd15"])
    loaded = room.renderer("sd15")._loaded.branch
    told: list[dict[str, Any]] = []

    class Referring:
        """The stock pipeline for texts, which is given a picture beside."""

        scheduler = loaded.pipeline.scheduler

        def __call__(self, *, image: Any, **arguments: Any) -> Any:
            told.append({"image": image, **arguments})
            return loaded.pipeline(**arguments)

    takes = frozenset({"image", "width", "height"})
    monkeypatch.setattr(loaded, "task_pipeline", lambda _task: (Referring(), takes), raising=False)
    done = room.render(tunes["sd15"], **from_(files, denoising_strength=0.25))
    assert "strength" not in told[0] and told[0]["num_inference_steps"] == 4
    assert apart(told[0]["image"], start(files)) == 0
    assert done.warnings == ["sd15 takes a picture as a reference: denoising strengths have no effect"]
    assert done.prompt.progress.step == done.prompt.progress.steps == 4


def test_the_strength_is_0_8_by_default(room: Room, tunes: dict[str, int], files: Path) -> None:
    plain, same, other = (
        room.render(tunes["sd15"], **from_(files, steps=5, **more)).picture
        for more in ({}, {"denoising_strength": 0.8}, {"denoising_strength": 0.6})
    )
    assert not unlike(plain, same) and unlike(plain, other)


@pytest.mark.parametrize("branch", FAMILIES)
@pytest.mark.parametrize("strength", [0.1, 1 / 161, 0.0005, 1e-12])
def test_the_weakest_noise_is_one_step_at_least(
    room: Room, tunes: dict[str, int], files: Path, branch: str, strength: float
) -> None:
    done = room.render(tunes[branch], **from_(files, steps=2, denoising_strength=strength))
    assert unlike(done.picture, start(files)) and done.warnings == []


def test_pictures_of_one_start_have_their_own_seeds(room: Room, tunes: dict[str, int], files: Path) -> None:
    two = room.render(tunes["sd15"], num_images=2, **from_(files, denoising_strength=0.5)).pictures
    second = room.render(tunes["sd15"], seed=8, **from_(files, denoising_strength=0.5)).picture
    assert unlike(*two) and apart(two[1], second) <= CLOSE


@pytest.mark.parametrize(
    ("name", "asked", "size"),
    [
        ("wide", {}, (96, 48)),
        ("small", {}, (48, 80)),
        ("wide", {"ar": "1:1"}, (64, 64)),
        ("wide", {"w": 64, "h": 64}, (64, 64)),
        ("wide", {"w": 64}, (64, 32)),
    ],
)
def test_the_picture_s_aspect_is_kept_unless_another_is_asked_for(
    room: Room, tunes: dict[str, int], files: Path, name: str, asked: dict[str, Any], size: tuple[int, int]
) -> None:
    done = room.render(tunes["sd15"], **from_(files, name, denoising_strength=0, **asked))
    assert done.picture.size == size and apart(done.picture, start(files, name, size)) == 0
    drawn = room.render(tunes["sd15"], **from_(files, name, denoising_strength=0.5, **asked))
    assert drawn.picture.size == size


@pytest.mark.parametrize("scheduler", ["euler_a", "dpm++sde_karras", "lcm", "tcd"])
def test_schedulers_draw_over_a_picture_too(room: Room, tunes: dict[str, int], files: Path, scheduler: str) -> None:
    plain, other, again = (
        room.render(tunes["sd15"], **from_(files, denoising_strength=0.5, **more)).picture
        for more in ({}, {"scheduler": scheduler}, {"scheduler": scheduler})
    )
    assert unlike(plain, other) and not unlike(other, again)


def test_a_strength_without_a_picture_gives_a_warning(room: Room, tunes: dict[str, int]) -> None:
    plain, done = (room.render(tunes["sd15"], **more) for more in ({}, {"denoising_strength": 0.1}))
    assert done.warnings == ["denoising_strength has no effect without input_image"]
    assert not unlike(plain.picture, done.picture)


# Where


@pytest.mark.parametrize("branch", FAMILIES)
def test_outside_the_mask_the_picture_stays_bit_for_bit(
    room: Room, tunes: dict[str, int], files: Path, branch: str
) -> None:
    done = room.render(tunes[branch], **from_(files, mask="left"))
    assert outside(done.picture, start(files), [LEFT]) == 0 and done.warnings == []
    assert far(done.picture.crop(LEFT), start(files).crop(LEFT)) > 5
    turned = room.render(tunes[branch], "ohwx dog --mask_invert", **from_(files, mask="left")).picture
    assert outside(turned, start(files), [(32, 0, 64, 64)]) == 0 and unlike(turned, start(files))
    larger = room.render(tunes[branch], **from_(files, mask="large left")).picture
    assert outside(larger, start(files), [(0, 0, 36, 64)]) == 0  # of any size; its edge is resampled


def test_a_mask_grows_shrinks_and_softens(room: Room, tunes: dict[str, int], files: Path) -> None:
    def changed(flags: str) -> Any:
        done = room.render(tunes["sd15"], f"ohwx dog {flags}", **from_(files, mask="left")).picture
        return (abs(pixels(done) - pixels(start(files))).max(axis=2) > 0).any(axis=0)

    assert not changed("")[32:].any()
    assert changed("--mask_dilate 8")[32:40].any() and not changed("--mask_dilate 8")[40:].any()
    assert not changed("--mask_dilate -8")[24:].any()
    assert changed("--mask_blur 2")[32:36].any() and not changed("--mask_blur 2")[44:].any()


def test_a_mask_is_found_by_words(room: Room, tunes: dict[str, int], files: Path) -> None:
    room.eyes.things = {"red hat": (8, 8, 40, 40), "eyes": (20, 20, 30, 30)}
    done = room.render(tunes["sd15"], "ohwx dog --mask_prompt red hat", **from_(files))
    assert outside(done.picture, start(files), [(8, 8, 40, 40)]) == 0 and unlike(done.picture, start(files))
    assert done.warnings == [] and done.facts["prompt"] == "ohwx dog"
    assert apart(room.eyes.seen[0], start(files)) == 0  # it is the picture that is looked at
    but = room.render(tunes["sd15"], "ohwx dog --mask_prompt red hat --mask_negative eyes", **from_(files)).picture
    inside = [box.crop((20, 20, 30, 30)) for box in (but, start(files))]
    assert apart(*inside) == 0 and unlike(but, start(files))


@pytest.mark.parametrize("why_not", ["", "the model is not here"])
def test_where_nothing_is_found_nothing_is_redrawn(
    room: Room, tunes: dict[str, int], files: Path, why_not: str
) -> None:
    room.eyes.why_not = why_not
    done = room.run(tunes["sd15"], "ohwx dog --mask_prompt a hat", **from_(files))
    told = why_not or "--mask_prompt: 'a hat' was not found in the picture"
    assert (done.prompt.status, done.prompt.error) == ("failed", told)
    assert not done.folder.exists() and room.leftovers() == []


# Worked on without drawing


def test_a_picture_is_only_enlarged(room: Room, tunes: dict[str, int], files: Path) -> None:
    model = upscaler(room.settings.weights / weights.UPSCALER.name, CPU)
    own = Image.open(files / "wide.png").convert("RGB")
    done = room.render(tunes["sd15"], "a --only_upscale", **from_(files, "wide"))
    assert not unlike(done.picture, upscale_.upscale(own, model, 4)) and done.picture.size == (384, 192)
    twice = room.render(tunes["sd15"], "a --only_upscale --upscale_factor 2", **from_(files, "wide")).picture
    assert not unlike(twice, upscale_.upscale(own, model, 2))
    drawn = room.render(tunes["sd15"], "ohwx dog --upscale_factor 2").picture
    plain = room.render(tunes["sd15"]).picture
    assert not unlike(drawn, upscale_.upscale(plain, model, 2))


def test_what_was_not_drawn_is_enlarged_once_and_not_beyond_a_limit(
    room: Room, tunes: dict[str, int], files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, int]] = []
    upscale = upscale_.upscale
    monkeypatch.setattr(upscale_, "upscale", lambda image, *a, **k: calls.append(image.size) or upscale(image, *a, **k))
    done = room.render(tunes["sd15"], "a --only_upscale", **from_(files, "wide", num_images=3))
    assert calls == [(96, 48)] and len(done.prompt.images) == 3
    monkeypatch.setattr(afterwards, "MOST_TO_ENLARGE", 24 * 48)
    monkeypatch.setattr(afterwards, "MOST_ENLARGED", 2 * 24 * 48)
    done = room.render(tunes["sd15"], "a --only_upscale", **from_(files, "wide"))
    assert calls[-1] == (48, 24) and done.picture.size == (68, 34)
    assert "96 x 48 pixels were made 48 x 24 first" in done.warnings[0]


def test_a_picture_comes_by_its_address_and_is_copied(
    room: Room, tunes: dict[str, int], files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = Upload("square.png", files / "square.png")
    monkeypatch.setattr(inputs, "fetch_all", lambda *_: [upload])
    done = room.render(tunes["sd15"], input_image_url="http://pictures.example/a.png", denoising_strength=0)
    assert apart(done.picture, start(files)) == 0
    copied = room.go(prompts.duplicate_prompt(room.services, done.prompt.id, {}))
    assert copied.prompt.status == "rendered" and apart(copied.picture, done.picture) == 0
    assert pack_verbs.save_pack(room.services, tunes["sd15"], "from pictures")["classes"]


def test_flags_are_not_read_as_text(room: Room, tunes: dict[str, int], files: Path) -> None:
    text = (
        "ohwx dog --upscale_factor 1.5 --hires_denoising_strength 0.5 --face_inpaint_denoising 0.3 --mask_blur 1"
        " --unheard_of 3"
    )
    done = room.render(tunes["sd15"], text)
    assert done.facts["prompt"] == "ohwx dog" and done.picture.size == (96, 96)
    assert [warning.split()[0] for warning in done.warnings] == [
        "--unheard_of", "--mask_blur", "--hires_denoising_strength", "--face_inpaint_denoising"
    ]  # fmt: skip


# After a control picture


@pytest.fixture
def controls(room: Room, tunes: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A hub that has one control model for everything, of sd15 and with large weights: what is fetched from it."""
    room.render(tunes["sd15"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ControlNetModel.from_unet(
            room.pipeline("sd15").unet, conditioning_embedding_out_channels=(8, 8, 8, 8), load_weights_from_unet=False
        )
        for weight in model.parameters():
            if not weight.any():
                torch.nn.init.normal_(weight, std=0.5)
    model.save_pretrained(tmp_path / "control")
    fetched: list[str] = []
    monkeypatch.setattr(draw.hub, "fetch_model", lambda name, *_: fetched.append(name) or tmp_path / "control")
    return fetched


def test_a_control_model_works_with_picture_or_text_and_stays_loaded(
    room: Room, tunes: dict[str, int], files: Path, controls: list[str]
) -> None:
    asked = from_(files, denoising_strength=0.8)
    plain = room.render(tunes["sd15"], **asked).picture
    done, idle, early = (
        room.render(tunes["sd15"], f"ohwx dog{flag}", controlnet="canny", controlnet_conditioning_scale=scale, **asked)
        for scale, flag in ((1, ""), (0, ""), (1, " --control_guidance_end 0.3"))
    )
    assert done.warnings == idle.warnings == early.warnings == []
    assert unlike(done.picture, plain) and apart(idle.picture, plain) <= CLOSE and unlike(early.picture, done.picture)
    freely = room.render(tunes["sd15"], controlnet="canny", controlnet_txt2img=True, **from_(files)).picture
    assert unlike(freely, done.picture) and unlike(freely, room.render(tunes["sd15"], steps=4).picture)
    for kind in ("canny", "lineart"):  # a prompt without one came in between, and then another one is asked for
        room.render(tunes["sd15"], controlnet=kind, **asked)
    assert [name.rpartition("_")[2] for name in controls] == ["canny", "canny", "lineart"]


def test_a_branch_without_a_control_model_says_so(room: Room, files: Path, controls: list[str]) -> None:
    fast = room.tune("fast")
    plain, done = (room.render(fast, **from_(files, **more)) for more in ({}, {"controlnet": "depth"}))
    assert done.warnings == ["controlnet depth: there is no control model for fast; it was left out"]
    assert controls == [] and not unlike(done.picture, plain.picture)


def test_nothing_is_read_of_the_presets_while_it_renders(
    room: Room, tunes: dict[str, int], files: Path, controls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Renderer.render_prompt
    parse, parsed, rendering = tomllib.loads, {True: 0, False: 0}, [False]

    def loads(text: str, **more: Any) -> Any:
        parsed[rendering[0]] += 1
        return parse(text, **more)

    def render_prompt(*args: Any) -> Any:
        rendering[0] = True
        try:
            return real(*args)
        finally:
            rendering[0] = False

    monkeypatch.setattr(tomllib, "loads", loads)
    monkeypatch.setattr(Renderer, "render_prompt", render_prompt)
    for file in room.settings.presets.rglob("*.toml"):  # whatever was read before is read again
        file.touch()
    looks = {"style": "Cinematic", "color_grading": "Ektar", "film_grain": True}
    more = {"controlnet": "canny", "super_resolution": True, "hires_fix": True, "inpaint_faces": True}
    done = room.render(tunes["sd15"], **from_(files), **looks, **more)
    assert controls and done.facts["more"]["color_grading"] == "Ektar"
    assert parsed[True] == 0 < parsed[False]


def test_fast_starts_from_pictures_too(room: Room, files: Path) -> None:
    tune = room.tune("fast")
    none, drawn = (room.render(tune, **from_(files, "wide", denoising_strength=value)).picture for value in (0, 0.5))
    assert none.size == drawn.size == (64, 32)
    assert apart(none, start(files, "wide", (64, 32))) == 0 and unlike(none, drawn)
    near, distant = (
        room.render(tune, **from_(files, "wide", denoising_strength=value, steps=10)).picture for value in (0.1, 1)
    )
    assert far(near, none) < far(distant, none)  # its VAE knows pictures


# How they come


def test_a_photo_stored_sideways_is_turned(room: Room, tunes: dict[str, int], tmp_path: Path) -> None:
    upright = Image.fromarray(
        np.repeat(np.linspace(0, 255, 64, dtype=np.uint8)[:, None, None], 128, axis=1).repeat(3, 2)
    )
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.jpg", quality=100, exif=exif)
    done = room.render(
        tunes["sd15"], input_image=Upload("a.jpg", tmp_path / "a.jpg"), denoising_strength=0, w=128, h=64
    )
    assert apart(done.picture, upright) < 8


def test_each_bad_picture_is_refused_by_name_and_nothing_is_kept(
    room: Room, tunes: dict[str, int], files: Path, tmp_path: Path
) -> None:
    (tmp_path / "bad.png").write_text("no picture")
    bad = Upload("bad.png", tmp_path / "bad.png")
    with pytest.raises(InvalidRequest) as refused:
        room.run(tunes["sd15"], input_image=bad, mask_image=bad)
    assert {name: "bad.png" in said[0] for name, said in refused.value.problems.items()} == {
        "input_image": True, "mask_image": True,
    }  # fmt: skip
    with pytest.raises(InvalidRequest):
        room.run(tunes["sd15"], **from_(files) | {"mask_image": bad})
    assert not list((room.settings.outputs / "incoming").glob("*"))
    folder = rows.tune_folder(room.services, tunes["sd15"]) / "inputs"
    known = {str(row["id"]) for row in room.store.find("prompts", tune_id=tunes["sd15"])}
    assert not folder.exists() or {path.name for path in folder.iterdir()} <= known


def test_pictures_go_with_their_prompt(room: Room, tunes: dict[str, int], files: Path) -> None:
    done = room.render(tunes["sd15"], **from_(files, mask="left"))
    kept = room.settings.outputs / "tunes" / str(tunes["sd15"]) / "inputs" / str(done.prompt.id)
    assert sorted(path.name for path in kept.iterdir()) == ["input_image.png", "mask_image.png"]
    copied = room.go(prompts.duplicate_prompt(room.services, done.prompt.id, {}))
    assert not unlike(copied.picture, done.picture)
    prompts.delete_prompt(room.services, done.prompt.id)
    assert not kept.exists() and not done.folder.exists()
    assert (room.settings.outputs / "tunes" / str(tunes["sd15"]) / "inputs" / str(copied.prompt.id)).exists()


def test_without_a_picture_flags_of_pictures_do_nothing(room: Room, tunes: dict[str, int]) -> None:
    plain = room.render(tunes["sd15"]).picture
    for flags in ("--mask_prompt a hat", "--mask_invert", "--only_upscale"):
        done = room.render(tunes["sd15"], f"ohwx dog {flags}")
        assert not unlike(done.picture, plain) and done.warnings[0].startswith(f"{flags.split()[0]} has no effect")
