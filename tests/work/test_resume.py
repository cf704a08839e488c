"""A tune that is resumed after its files were lost or changed: it goes on, begins anew or is refused, and says why."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.helpers.app import post, running, wait_for
from tests.helpers.studio import Studio, same
from trainer.contract.photos import Upload
from trainer.contract.tunes import Tune
from trainer.photos.intake import Decoder
from trainer.studio import prompts, tunes
from trainer.studio.rows import tune_folder
from trainer.training.state_check import sha256

pytest_plugins = ("tests.helpers.web",)

STEPS, STOP = 6, 3
PYTHON = ("Error", "Exception", "[Errno", "Traceback", "tensor a", "No such file")
Spoiler = Callable[[Path], None]


class Interrupted:
    """A tune that was canceled at step 3 of 6, with a copy of its folder."""

    def __init__(self, studio: Studio, copy: Path) -> None:
        self.studio, self.copy = studio, copy
        self.id = studio.create("Rex", steps=STEPS, args="save_every=2", prompts_attributes=[])
        self.folder = tune_folder(studio.services, self.id)
        studio.store.at_step[self.id, STOP] = lambda: tunes.cancel_tune(studio.services, self.id)
        studio.worker._work()
        assert studio.states(self.id) == ["step-000002", "step-000003"]
        shutil.copytree(self.folder, copy)

    def resumed(self, spoil: Spoiler, to_the_end: bool = False) -> Tune:
        """The tune after its files were spoiled and it was resumed."""
        studio = self.studio
        studio.store.update("tunes", self.id, status="canceled", warnings=[], files=[])
        shutil.rmtree(self.folder)
        shutil.copytree(self.copy, self.folder)
        spoil(self.folder)
        tunes.resume_tune(studio.services, self.id)
        if not to_the_end:  # after a step, for time
            studio.store._asked[self.id] = 0
            studio.store.at_step[self.id, 1] = lambda: tunes.cancel_tune(studio.services, self.id)
        studio.worker._work()
        return tunes.get_tune(studio.services, self.id)


@pytest.fixture(scope="module")
def interrupted(
    tmp_path_factory: pytest.TempPathFactory, decoder: Decoder, photos: list[Path]
) -> Iterator[Interrupted]:
    folder = tmp_path_factory.mktemp("resume")
    studio = Studio(folder, decoder, photos)
    yield Interrupted(studio, folder / "copy")
    studio.close()


def nothing(_: Path) -> None:
    """Nothing was lost or changed."""


def replaced_photo(folder: Path) -> None:
    Image.new("RGB", (80, 40), "blue").save(folder / "images/001.png")


def lost_photo(folder: Path) -> None:
    (folder / "images/001.png").unlink()


def caption(folder: Path) -> None:
    (folder / "images/002.txt").write_text("a photo of ohwx dog, lying")


def new_mask(folder: Path) -> None:
    (folder / "dataset/masks/subject").mkdir(parents=True)
    Image.new("L", (64, 64), 255).save(folder / "dataset/masks/subject/000.png")


def cut_newest(folder: Path) -> None:
    file = folder / "state/step-000003/state.safetensors"
    file.write_bytes(file.read_bytes()[:-9])


def no_states(folder: Path) -> None:
    shutil.rmtree(folder / "state")


def of_another_base(folder: Path) -> None:
    for file in folder.glob("state/*/manifest.json"):
        facts = json.loads(file.read_text())
        facts["inputs"]["base"] = 64 * "0"
        file.write_text(json.dumps(facts))


def of_another_tune(folder: Path) -> None:
    for file in folder.glob("state/*/manifest.json"):
        facts = json.loads(file.read_text())
        facts["inputs"]["tune"] = 99
        file.write_text(json.dumps(facts))


def other_shapes(folder: Path) -> None:
    for state in folder.glob("state/*"):
        found = load_file(state / "state.safetensors")
        save_file({key: value[:1].contiguous() if value.dim() else value for key, value in found.items()},
                  state / "state.safetensors")  # fmt: skip
        facts = json.loads((state / "manifest.json").read_text())
        facts["sha256"] = sha256(state / "state.safetensors")
        (state / "manifest.json").write_text(json.dumps(facts))


def no_images(folder: Path) -> None:
    shutil.rmtree(folder / "images")


def broken_photo(folder: Path) -> None:
    (folder / "images/001.png").write_bytes((folder / "images/001.png").read_bytes()[:100])


def broken_caption(folder: Path) -> None:
    (folder / "images/000.txt").write_bytes(b"\xff\xfe\xe4")


def broken_mask(folder: Path) -> None:
    new_mask(folder)
    (folder / "dataset/masks/subject/000.png").write_bytes(b"no picture")


def other_mask(folder: Path) -> None:
    new_mask(folder)
    Image.new("L", (9, 9), 255).save(folder / "dataset/masks/subject/000.png")


def no_dataset(folder: Path) -> None:
    shutil.rmtree(folder / "dataset")


def no_seen(folder: Path) -> None:
    shutil.rmtree(folder / "dataset/seen")


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def no_log(folder: Path) -> None:
    (folder / "log.jsonl").unlink()


def no_request(folder: Path) -> None:
    (folder / "request.json").unlink()


ON, ANEW = f"training goes on at step {STOP} of {STEPS}", f"training begins again at step 0 of {STEPS}"
UNUSED = f"{ANEW}, because no saved state can be used"
# what happened; where it goes on, None: it is refused; the words
FAULTS: list[tuple[Spoiler, int | None, list[str]]] = [
    (replaced_photo, STOP, [f"{ON}, with changes (1.png was changed)"]),
    (cut_newest, 2, [f"training goes on at step 2 of {STEPS}, because a later", "of step 3: state.safetensors is dam"]),
    (no_images, None, ["no photo of this tune is left: 0.png (images/000.png), 1.png (images/001.png), 2.png"]),
]
MORE_FAULTS: list[tuple[Spoiler, int | None, list[str]]] = [
    (nothing, STOP, []),
    (lost_photo, STOP, ["1.png (images/001.png) is missing: training goes on without", "1.png is no longer trained"]),
    (caption, STOP, [f"{ON}, with changes (the caption of 2.png was changed)"]),
    (new_mask, STOP, [f"{ON}, with changes (the mask of 0.png was changed)"]),
    (no_states, 0, [f"{ANEW}, because its saved states are missing"]),
    (of_another_base, 0, [UNUSED, "the base has other weights than then"]),
    (of_another_tune, 0, [UNUSED, "it is of tune 99"]),
    (other_shapes, 0, [UNUSED, "its weights have other shapes"]),
    (broken_photo, None, ["1.png: 001.png cannot be read: it is no picture, or a broken one. Put a copy in its place"]),
    (broken_caption, None, ["000.txt cannot be read: it is not text in UTF-8. Correct it, or delete it: then"]),
    (broken_mask, None, ["000.png cannot be read: it is no picture, or a broken one"]),
    (other_mask, None, ["the mask 000.png has 9 x 9 pixels, its picture 64 x 64"]),
    (no_dataset, STOP, ["the photos were analyzed again, because dataset/prepared.json is missing"]),
    (no_seen, STOP, []),
    (no_config, STOP, []),
    (no_log, STOP, []),
    (no_request, STOP, []),
]


def check(interrupted: Interrupted, spoil: Spoiler, step: int | None, words: list[str]) -> None:
    tune = interrupted.resumed(spoil)
    told = [tune.error or ""] if step is None else tune.warnings
    assert tune.status == ("failed" if step is None else "canceled"), tune.error
    assert all(any(one in message for message in told) for one in words), told
    assert bool(words) == bool("".join(told)), told
    assert not any(word in message for word in PYTHON for message in told)
    if step is not None:
        assert interrupted.studio.events(tune.id)[-1] == ("resumed" if step else "started", step)


@pytest.mark.parametrize(("spoil", "step", "words"), FAULTS, ids=[row[0].__name__ for row in FAULTS])
def test_a_resumed_tune_says_what_was_lost_or_changed(
    interrupted: Interrupted, spoil: Spoiler, step: int | None, words: list[str]
) -> None:
    check(interrupted, spoil, step, words)


@pytest.mark.long
@pytest.mark.parametrize(("spoil", "step", "words"), MORE_FAULTS, ids=[row[0].__name__ for row in MORE_FAULTS])
def test_a_resumed_tune_says_what_else_was_lost_or_changed(
    interrupted: Interrupted, spoil: Spoiler, step: int | None, words: list[str]
) -> None:
    check(interrupted, spoil, step, words)


@pytest.mark.long
def test_a_resumed_tune_has_the_weights_of_an_uninterrupted_one_only_if_nothing_changed(
    interrupted: Interrupted,
) -> None:
    whole = interrupted.studio.create("whole", steps=STEPS, args="save_every=2", prompts_attributes=[])
    interrupted.studio.worker._work()
    expected = interrupted.studio.weights(whole)
    for spoil, equal in ((nothing, True), (cut_newest, True), (replaced_photo, False)):
        tune = interrupted.resumed(spoil, to_the_end=True)
        assert tune.status == "trained"
        assert same(interrupted.studio.weights(tune.id), expected) == equal
        assert any("will differ from that of an uninterrupted run" in one for one in tune.warnings) != equal


@pytest.mark.long
def test_class_pictures_that_are_broken_are_drawn_again(interrupted: Interrupted) -> None:
    studio = interrupted.studio
    args = "prior_weight=1 prior_images=2"
    first = studio.create("with prior", steps=1, args=args, prompts_attributes=[])
    studio.worker._work()
    file = next((studio.settings.outputs / "cache" / "class").rglob("0001.png"))
    whole = file.read_bytes()
    file.write_bytes(whole[:90])
    second = studio.create("with prior again", steps=1, args=args, prompts_attributes=[])
    studio.worker._work()
    assert [tunes.get_tune(studio.services, number).status for number in (first, second)] == ["trained"] * 2
    assert Image.open(file).convert("RGB").size == Image.open(file.with_name("0000.png")).size


@pytest.mark.long
def test_a_killed_app_whose_photo_was_changed_goes_on_and_says_so(
    tmp_path: Path, dog_photos: Callable[[int], list[Path]]
) -> None:
    names = [photo.name for photo in dog_photos(3)]
    with running(tmp_path) as app:
        app.ready()
        post(app, "Rex", dog_photos(3), steps=400, args="save_every=5").raise_for_status()
        wait_for(lambda: app.tune(1)["progress"]["step"] > 10)
        app.kill()
    Image.new("RGB", (640, 480), "blue").save(tmp_path / "tunes/1/images/001.jpg")
    (tmp_path / "tunes/1/images/002.jpg").unlink()
    newest = sorted(tmp_path.glob("tunes/1/state/step-??????"))[-1]
    (newest / "state.safetensors").write_bytes(b"")
    with running(tmp_path) as app:
        app.ready()
        resumed = wait_for(lambda: [line["step"] for line in app.log(1) if line.get("event") == "resumed"])
        told, step = app.tune(1)["warnings"], int(newest.name.removeprefix("step-"))
        assert 0 < resumed[-1] < step
        assert any(f"that of step {step}: state.safetensors is damaged" in one for one in told)
        assert any(f"{names[1]} was changed" in one and f"{names[2]} is no longer trained" in one for one in told)
        assert any("(images/002.jpg) is missing: training goes on without" in one for one in told)
        app.http.post("/tunes/1/cancel").raise_for_status()
        tune = app.finished(1)
        assert tune["status"] == "canceled" and tune["warnings"] == told


# Prompts whose files changed while they waited


def test_a_prompt_that_waited_says_what_of_it_was_lost_or_changed(interrupted: Interrupted) -> None:
    studio = interrupted.studio
    tune_id = studio.create("for prompts", steps=1, prompts_attributes=[])
    picture = studio.photos[0]
    request = {"text": "ohwx dog", "num_images": 1, "steps": 1, "w": 64, "h": 64}

    def send(**more: object) -> int:
        return prompts.create_prompt(studio.services, tune_id, request | more).id

    def upload() -> Upload:
        return Upload(picture.name, picture)

    lost, broken, changed = (send(input_image=upload()) for _ in range(3))
    mask = send(input_image=upload(), mask_image=upload())
    plain = send(seed=3)
    inputs = tune_folder(studio.services, tune_id) / "inputs"
    (inputs / str(lost) / "input_image.png").unlink()
    (inputs / str(broken) / "input_image.png").write_bytes(b"no picture")
    Image.new("RGB", (64, 64), "blue").save(inputs / str(changed) / "input_image.png")
    (inputs / str(mask) / "mask_image.png").unlink()
    looks = send(seed=5)
    with studio.store.transaction() as db:
        db.execute("""UPDATE prompts SET attributes = '{"style": "Gone"}' WHERE id = ?""", (looks,))
    studio.worker._work()

    ended = {
        number: prompts.get_prompt(studio.services, number) for number in (lost, broken, changed, mask, plain, looks)
    }
    errors = {number: prompt.error for number, prompt in ended.items()}
    assert errors == {
        lost: "input_image.png of this prompt is missing. Send the prompt again with the picture",
        broken: "input_image.png of this prompt is damaged. Send the prompt again with the picture",
        changed: None,
        mask: "mask_image.png of this prompt is missing. Send the prompt again with the picture",
        plain: None,
        looks: "the style 'Gone' is no longer in the presets. Put it back, or send the prompt again with another one",
    }
    assert ended[changed].warnings == [
        "input_image was changed after the prompt was sent: the picture as it is now was used",
        *ended[changed].warnings[1:],
    ]
    model = tune_folder(studio.services, tune_id) / "model"
    for spoil, words in (
        (
            lambda: (model / "lora_diffusers.safetensors").unlink(),
            "is missing: lora_diffusers.safetensors in its folder",
        ),
        (lambda: shutil.rmtree(model), "is missing"),
    ):
        number = send(seed=4)
        spoil()
        studio.worker._work()
        error = str(prompts.get_prompt(studio.services, number).error)
        assert words in error and f"tune {tune_id} (for prompts)" in error and not any(one in error for one in PYTHON)
