"""Models in the text of a prompt: which are meant, how strongly, that they are swapped, and that the base stays."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from diffusers import StableDiffusionPipeline
from PIL import Image

from tests.helpers import tiny
from tests.helpers.pictures import apart
from tests.helpers.rendering import Done, Room, far, opened, unlike
from trainer.branches import protocol
from trainer.contract.errors import InvalidRequest
from trainer.contract.photos import Upload
from trainer.library import weights
from trainer.library.bases import hashed_id
from trainer.methods import lora
from trainer.photos.decoder import Decoder
from trainer.rendering import renderer
from trainer.studio import prompts, rows
from trainer.studio.tunes import get_tune
from trainer.work.job_runner import JobRunner

pytest_plugins = ("tests.helpers.web", "tests.helpers.rendering")


@pytest.fixture(scope="module")
def open_room(
    tmp_path_factory: pytest.TempPathFactory, decoder: Decoder, photos: list[Path], request: pytest.FixtureRequest
) -> Iterator[Room]:
    for made in opened(tmp_path_factory.mktemp("references"), decoder, photos[0], request):
        unet = StableDiffusionPipeline.from_pretrained(
            made.base("sd15"), local_files_only=True, safety_checker=None
        ).unet
        tiny.make_tiny_faceid(made.settings.weights / weights.face_adapter(made.settings, "sd15").name, unet)
        yield made


@pytest.fixture(scope="module")
def two(open_room: Room) -> tuple[int, int]:
    """Two LoRAs on sd15."""
    return open_room.tune(seed=1, token="rexx"), open_room.tune(seed=2, token="bobb")


def refusal(room: Room, at: int, text: str) -> str:
    with pytest.raises(InvalidRequest) as refused:
        room.run(at, text)
    assert list(refused.value.problems) == ["text"]
    return " ".join(refused.value.problems["text"])


# How strongly


def test_weights_mix_the_models(room: Room, two: tuple[int, int]) -> None:
    first, second = two
    root = hashed_id("sd15")

    def mixed(one: float, other: float) -> Image.Image:
        return room.render(root, f"a dog <lora:{first}:{one:g}> <lora:{second}:{other:g}>").picture

    base, ann, bob, both = mixed(0, 0), mixed(1, 0), mixed(0, 1), mixed(1, 1)
    assert not unlike(base, room.render(first, "a dog", lora_scale=0).picture)
    assert not unlike(ann, room.render(first, "a dog").picture)
    assert not unlike(bob, room.render(second, "a dog").picture)
    assert min(far(both, ann), far(both, bob), far(both, base), far(ann, bob)) > 0.5
    half = mixed(0.5, 0)
    assert 0 < far(half, base) < far(ann, base) and 0 < far(half, ann) < far(ann, base)
    negative, less = mixed(-1, 0), mixed(-0.25, 0)
    assert min(far(negative, ann), far(negative, base)) > 0.5 and far(less, base) < far(negative, base)
    assert unlike(mixed(0.25, 0), mixed(0.255, 0))  # no digit is lost
    assert not unlike(mixed(0, 0), base)


@pytest.mark.parametrize("branch", ["sdxl1", "flux1"])
def test_two_models_are_loaded_in_other_families_too(room: Room, branch: str) -> None:
    first, second = room.tune(branch, seed=1), room.tune(branch, seed=2)
    ann, both = (room.render(first, text).picture for text in ("a dog", f"a dog <lora:{second}:1>"))
    bob = room.render(second, "a dog").picture
    assert min(far(both, ann), far(both, bob), far(ann, bob)) > 0.5
    assert apart(room.render(first, f"a dog <lora:{first}:0> <lora:{second}:1>").picture, bob) <= 1
    assert apart(room.render(first, "a dog").picture, ann) <= 1


def test_a_tune_s_own_model_has_lora_scale_or_the_weight_in_the_text(room: Room, two: tuple[int, int]) -> None:
    half = room.render(two[0], "a dog", lora_scale=0.5)
    assert not unlike(half.picture, room.render(two[0], f"a dog <lora:{two[0]}:0.5>").picture)
    assert not unlike(half.picture, room.render(two[0], f"a dog <lora:{two[0]}:0.5>", lora_scale=2).picture)
    assert unlike(half.picture, room.render(two[0], "a dog", lora_scale=-0.5).picture)
    title = get_tune(room.services, two[0]).title
    assert half.facts["loras"] == [[title, 0.5]]


def test_a_checkpoint_has_one_strength_and_says_so(room: Room, two: tuple[int, int]) -> None:
    whole = room.tune(kind="whole")
    plain, scaled = (room.render(whole, "a dog", **more) for more in ({}, {"lora_scale": 0.5}))
    assert not unlike(plain.picture, scaled.picture) and plain.warnings == []
    assert not unlike(plain.picture, room.render(two[0], "a dog", lora_scale=0).picture)  # its weights are the base's
    with_lora = room.render(whole, f"a dog <lora:{two[0]}:1>").picture
    assert not unlike(with_lora, room.render(two[0], "a dog").picture)
    assert ["0.5 is not used" in warning for warning in scaled.warnings] == [True]


# Which are meant


def test_a_model_is_meant_by_its_number_token_title_or_file(room: Room, two: tuple[int, int]) -> None:
    first, second = two
    file = room.write_lora(room.settings.models / "film look.safetensors", "sd15", seed=9)
    expected = room.render(first, f"a dog <lora:{second}:0.5>").picture
    title = get_tune(room.services, second).title
    for name in ("bobb", title, f" {second} "):
        done = room.render(first, f"a dog <lora:{name}:0.5>")
        assert not unlike(done.picture, expected) and done.prompt.tunes == [first, second]
    found = [
        room.render(first, f"a dog <lora:{name}>")
        for name in ("film look", "film look.safetensors", hashed_id("film look.safetensors"))
    ]
    assert all(not unlike(done.picture, found[0].picture) for done in found)
    assert unlike(found[0].picture, expected) and unlike(found[0].picture, room.render(first, "a dog").picture)
    assert found[0].facts["loras"] == [[get_tune(room.services, first).title, 1.0], ["film look.safetensors", 1.0]]
    assert found[0].facts["prompt"] == "a dog"
    file.unlink()
    assert "there is no LoRA with this id, token or title" in refusal(room, first, "a dog <lora:film look:1>")


def test_a_file_that_was_deleted_fails_the_prompt_in_words(room: Room, two: tuple[int, int]) -> None:
    file = room.write_lora(room.settings.models / "soon gone.safetensors", "sd15", seed=9)
    prompt = prompts.create_prompt(room.services, two[0], {"text": "a dog <lora:soon gone:1>", "num_images": 1})
    file.unlink()
    done = room.go(prompt)
    assert done.prompt.status == "failed" and "file of the models folder, was deleted" in str(done.prompt.error)


def test_a_prompt_on_a_base_belongs_to_the_base(room: Room, two: tuple[int, int]) -> None:
    root = hashed_id("sd15")
    bare, own = room.render(root, "a dog"), room.render(two[0], "a dog", lora_scale=0)
    assert bare.prompt.tune_id == root and not unlike(bare.picture, own.picture)
    assert bare.facts["model"] == "sd15"
    room.write_lora(room.settings.models / "theirs.safetensors", "sd15", seed=9)
    done = room.render(root, f"a dog <lora:theirs:1> <lora:{two[1]}:1>")
    assert done.prompt.tune_id == root and two[1] in done.prompt.tunes
    (room.settings.models / "theirs.safetensors").unlink()


def test_several_of_one_token_are_refused_by_their_numbers(room: Room, two: tuple[int, int]) -> None:
    twins = [room.tune(token="twin"), room.tune(token="twin")]
    told = refusal(room, two[0], "a dog <lora:twin:1>")
    assert "several have this name" in told and all(f"{one} (" in told for one in twins)
    assert room.render(twins[0], "a dog <lora:twin:0.5>").prompt.tunes == [twins[0]]  # its own is meant


def test_what_is_no_lora_for_this_base_is_refused_by_name(room: Room, two: tuple[int, int]) -> None:
    other, whole, face = room.tune("sdxl1"), room.tune(kind="whole"), room.tune(kind="faceid")
    room.write_lora(room.settings.models / "for flux.safetensors", "flux1", seed=9)
    for name, told in {
        "nobody": "there is no LoRA with this id, token or title",
        "987654": "there is no LoRA with this id, token or title",
        str(other): f"tune {other} is of branch sdxl1, not sd15",
        str(whole): f"tune {whole} is a whole model",
        str(face): f"tune {face} is a face: write <faceid:{face}:1>",
        "for flux": "it is of branch flux1, not sd15",
    }.items():
        said = refusal(room, two[0], f"a dog <lora:{name}:1>")
        assert f"<lora:{name}>" in said and told in said
    assert "it is named twice" in refusal(room, two[0], f"a <lora:{two[1]}:1> <lora:bobb:0.5>")
    told = refusal(room, two[0], "<lora:nobody:1> <faceid:77:1>")
    assert "<lora:nobody>" in told and "<faceid:77>" in told  # all at once
    (room.settings.models / "for flux.safetensors").unlink()


def test_models_in_characteristics_are_plain_text(room: Room, two: tuple[int, int], monkeypatch: Any) -> None:
    value = f"red <lora:{two[1]}:1> --mask_invert {{{{size}}}}"
    tune = room.tune(characteristics={"colour": value, "size": "large"})
    done = room.render(tune, "a {{colour}} {{ size }} dog{{age}}")
    assert done.facts["prompt"] == f"a {value} large dog" and done.prompt.tunes == [tune]
    assert done.warnings == ["there is no characteristic 'age'; it was left out of the prompt"]
    assert done.facts["loras"] == [[get_tune(room.services, tune).title, 1.0]]


# New words


@pytest.fixture(scope="module")
def words(open_room: Room) -> list[int]:
    return [open_room.tune(kind="pti", seed=seed, words="ohwx") for seed in (11, 12)]


def test_learned_tokens_are_read_from_the_folder_of_their_model(
    room: Room, two: tuple[int, int], words: list[int]
) -> None:
    own, other = (room.render(words[0], text) for text in ("a dog ohwx", "a dog ohww"))
    assert own.warnings == [] and unlike(own.picture, other.picture)
    base = room.render(two[0], "a dog ohwx", lora_scale=0).picture
    again = room.render(words[0], "a dog ohwx").picture
    assert not unlike(again, own.picture)
    assert not unlike(room.render(two[0], "a dog ohwx", lora_scale=0).picture, base)  # no word of it stays


def test_the_same_token_in_two_models_gives_a_warning_each_time(room: Room, words: list[int]) -> None:
    first, second = words
    bench = room.new_bench()
    for _ in range(2):
        done = room.render(first, f"a dog ohwx <lora:{second}:1>", bench)
        assert done.warnings == [
            "two of these models have learned tokens for 'ohwx': here it means the one named first"
        ]
    assert unlike(done.picture, room.render(second, f"a dog ohwx <lora:{first}:1>", bench).picture)


def test_nothing_stays_of_models_that_came_with_a_warning(room: Room, two: tuple[int, int], words: list[int]) -> None:
    bench = room.new_bench()
    base = room.render(two[0], "a dog", bench, lora_scale=0).picture
    assert room.render(words[0], f"a dog <lora:{words[1]}:1>", bench).warnings
    assert not unlike(room.render(two[0], "a dog", bench, lora_scale=0).picture, base)


def test_nothing_stays_of_a_model_that_does_not_fit(room: Room, two: tuple[int, int]) -> None:
    bench, broken = room.new_bench(), room.tune()
    base = room.render(two[0], "a dog", bench, lora_scale=0).picture
    room.write_lora(rows.tune_folder(room.services, broken) / "model" / lora.DIFFUSERS_FILE, "sdxl1", seed=1)
    done = room.run(two[0], f"a dog <lora:{broken}:1>", bench)
    assert done.prompt.status == "failed" and "does not fit its base" in str(done.prompt.error)
    assert not unlike(room.render(two[0], "a dog", bench, lora_scale=0).picture, base)


# Models are swapped, the base stays


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The bases that are loaded from now on."""
    titles: list[str] = []
    real = protocol.load_branch

    def load(base: Any, *args: Any) -> Any:
        titles.append(base.branch)
        return real(base, *args)

    monkeypatch.setattr(renderer, "load_branch", load)
    return titles


def test_models_are_swapped_on_a_base_that_is_loaded_once(
    room: Room, two: tuple[int, int], words: list[int], loaded: list[str]
) -> None:
    bench, face = room.new_bench(), room.tune(kind="faceid")
    first, second = two

    def render_at(at: int, text: str = "a dog", **more: Any) -> Done:
        return room.render(at, text, bench, **more)

    before = [render_at(first, lora_scale=0).picture, render_at(first).picture, render_at(second).picture]
    for text in (f"a dog <lora:{second}:0.5>", f"a dog <lora:{words[0]}:1>", f"a dog <faceid:{face}:1>"):
        assert unlike(render_at(first, text).picture, before[1])
    assert unlike(render_at(face).picture, before[0])
    after = [render_at(second).picture, render_at(first).picture, render_at(first, lora_scale=0).picture]
    assert not any(unlike(*pair) for pair in zip(before, reversed(after), strict=True))
    assert loaded == ["sd15"]
    render_at(room.tune("fast"))
    assert not unlike(render_at(first).picture, before[1])
    assert loaded == ["sd15", "fast", "sd15"]  # one base at a time is in memory


@pytest.mark.long
def test_a_face_is_put_into_every_drawing(room: Room, two: tuple[int, int], photos: list[Path], tmp_path: Path) -> None:
    face = room.tune(kind="faceid")
    Image.new("L", (64, 64), 255).save(tmp_path / "b.png")
    start = {"input_image": Upload("a.png", photos[0]), "denoising_strength": 0.6, "steps": 4}
    mask = {"mask_image": Upload("b.png", tmp_path / "b.png")}
    for asked in ({}, {"num_images": 2}, {"cfg_scale": 1}, start, start | mask, {"scheduler": "dpm++sde"}):
        without, within = (room.render(two[0], f"a dog{more}", **asked) for more in ("", f" <faceid:{face}:1>"))
        assert all(unlike(*pair) for pair in zip(without.pictures, within.pictures, strict=True)), asked
        assert within.warnings == []
    room.eyes.boxes = [(20, 20, 60, 60)]
    person = room.render(face, "a man", w=128, h=128, inpaint_faces=True)  # a faceid is of people
    assert person.warnings == [] and unlike(person.picture, room.render(face, "a man", w=128, h=128).picture)


def test_training_gives_the_memory_back(room: Room, two: tuple[int, int], loaded: list[str]) -> None:
    bench = room.new_bench()
    before = room.render(two[0], "a dog", bench).picture
    bench._renderer.release()
    assert bench._renderer._loaded is None
    assert not unlike(room.render(two[0], "a dog", bench).picture, before) and len(loaded) == 2


def test_a_file_that_has_changed_is_read_again(room: Room, two: tuple[int, int], loaded: list[str]) -> None:
    file = room.write_lora(room.settings.models / "mine.safetensors", "sd15", seed=21)
    text = "a dog <lora:mine:1>"
    first = room.render(two[0], text).picture
    assert not unlike(room.render(two[0], text).picture, first)
    when = file.stat().st_mtime
    room.write_lora(file, "sd15", seed=22)
    os.utime(file, (when + 1, when + 1))
    second = room.render(two[0], text).picture
    assert unlike(second, first) and len(loaded) <= 1
    file.unlink()


@pytest.mark.long
def test_a_hundred_prompts_over_five_tunes_take_no_more_memory(room: Room, loaded: list[str]) -> None:
    tunes = [room.tune(seed=seed) for seed in range(3)]
    tunes += [room.tune(kind="pti", seed=5, words="ohwx"), room.tune(kind="faceid")]
    bench: JobRunner = room.new_bench()
    process, memory, pictures = psutil.Process(), {}, {}
    for number in range(1, 101):
        at = tunes[number % 5]
        text = f"ohwx dog {number}" if number % 3 else "ohwx dog"
        done = room.render(at, text, bench, num_images=1 + number % 2, steps=3)
        if text == "ohwx dog" and number % 2 == 0:
            assert not unlike(pictures.setdefault(at, done.picture), done.picture)
        if number in (20, 100):
            memory[number] = process.memory_info().rss
    assert len(pictures) == 5 and loaded == ["sd15"]
    assert memory[100] < 1.03 * memory[20], memory
