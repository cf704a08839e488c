"""Faces, closeups, restoration and masks: what is seen in real photos, and what is made of them."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import shutil
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image, ImageChops

from tests.helpers import training
from tests.helpers.analyzer import SharedAnalyzer
from tests.helpers.shared import SHARED
from tests.helpers.studio import Studio
from tests.helpers.training import TrainingSetup
from tests.helpers.web import address, left_behind, photo, upload
from trainer.config import resolve
from trainer.config.train_config import TrainConfig
from trainer.contract.errors import AnalysisUnavailable, InvalidRequest
from trainer.contract.photos import Check, Photo, Upload
from trainer.files import sweep
from trainer.library import weights
from trainer.library.weights import Unavailable
from trainer.photos import masks, restore
from trainer.photos.analysis import PhotoAnalyzer, naming
from trainer.photos.decoder import Decoder
from trainer.photos.faces import closeup_box, find, prepare
from trainer.photos.found import Found, Task
from trainer.photos.subject import choose
from trainer.photos.subprocess_worker import Closed, SubprocessWorker
from trainer.photos.unfinished import remove_unfinished
from trainer.settings import Settings, read_settings
from trainer.studio import answers
from trainer.studio.inspection import inspect_image
from trainer.studio.rows import Services, tune_folder
from trainer.studio.store import Store
from trainer.studio.tunes import check_photos, create_tune, resume_tune

pytest_plugins = ("tests.helpers.web",)

FACES = SHARED / "data" / "faces"
needs_shared = pytest.mark.skipif(
    not (FACES.is_dir() and (SHARED / "weights").is_dir()), reason="the photos in ../shared are not on this machine"
)


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory, decoder: Decoder) -> Iterator[Services]:
    """The verbs with a child that has real detector and recognizer weights; it lives through all tests here."""
    folder = tmp_path_factory.mktemp("seeing")
    settings = read_settings(outputs=folder / "outputs", models=folder / "models", weights=SHARED / "weights")
    store, analyzer = Store(settings.outputs), SharedAnalyzer(settings)
    yield Services(settings, store, decoder, analyzer)
    analyzer.close()
    store.close()


def of(*names: str) -> list[Upload]:
    """Pictures of ../shared as uploads."""
    return [Upload(name, FACES / name) for name in names]


def checked(services: Services, *names: str, **more: Any) -> Check:
    """The verdicts on pictures of ../shared, as photos of a person."""
    check = check_photos(services, {"name": "person", **more}, of(*names))
    assert left_behind(services) == []
    return check


# What is seen: one row for each file of ../shared/data/faces

SEEN = {  # file: (fewest faces, most, turned, what is known of it)
    "exif/astronaut_orientation_3.jpg": (1, 1, True, ""),
    "exif/astronaut_orientation_6.jpg": (1, 1, True, ""),
    "exif/astronaut_orientation_8.jpg": (1, 1, True, ""),
    "exif/hopper_orientation_6.jpg": (1, 1, True, ""),
    "exif/noface_portrait_orientation_6.jpg": (0, 0, True, "a person from behind"),
    "group/festival_1.jpg": (16, 21, False, "many more, painted and half hidden, are missed"),
    "group/market_two.jpg": (2, 2, False, ""),
    "group/solvay_1927.jpg": (29, 29, False, ""),
    "group/two_women_phones.jpg": (2, 2, False, "one small and out of focus"),
    "lowres/astronaut_96.jpg": (1, 1, False, ""),
    "lowres/astronaut_face_48.png": (1, 1, False, ""),
    "lowres/hopper_128.png": (1, 1, False, ""),
    "noface/cat_chelsea.jpg": (0, 1, False, "a cat, which no threshold sets apart"),
    "noface/coffee.jpg": (0, 0, False, ""),
    "noface/rocket.jpg": (0, 0, False, ""),
    "odd/astronaut_cmyk.jpg": (1, 1, False, ""),
    "odd/astronaut_grey.jpg": (1, 1, False, ""),
    "odd/astronaut_grey16.png": (1, 1, False, ""),
    "odd/astronaut_palette.png": (1, 2, False, "dithering makes a second one at times"),
    "odd/astronaut_rgba.png": (1, 1, False, ""),
    "person_a/01.jpg": (1, 1, False, ""),
    "person_a/02.jpg": (1, 1, False, ""),
    "person_a/03.jpg": (1, 1, False, "sunglasses"),
    "person_b/01.jpg": (1, 1, False, ""),
    "person_b/02.jpg": (1, 1, False, ""),
    "person_b/03.jpg": (1, 1, False, ""),
    "profile/cameraman_grey.png": (1, 1, False, "behind a camera"),
    "profile/cosmonaut_profile.jpg": (1, 4, False, "small ones behind glass waver"),
    "profile/old_man_side.jpg": (1, 1, False, "side and dark"),
    "single/astronaut.png": (1, 1, False, ""),
    "single/outdoor_portrait.jpg": (1, 1, False, ""),
}
REFUSED = {
    "odd/not_an_image.jpg": "is not an image that can be read",
    "odd/truncated.jpg": "is damaged and cannot be decoded",
}


@needs_shared
def test_the_table_has_a_row_for_every_file() -> None:
    files = {path.relative_to(FACES).as_posix() for path in FACES.rglob("*") if path.is_file()}
    assert files == SEEN.keys() | REFUSED.keys()


@needs_shared
@pytest.mark.parametrize("name", SEEN)
def test_each_photo_gets_the_right_verdict(seeing: Services, name: str) -> None:
    fewest, most, turned, _known = SEEN[name]
    (verdict,) = checked(seeing, name).photos
    assert verdict.faces is not None and fewest <= len(verdict.faces) <= most
    assert verdict.rotated is turned
    assert verdict.dropped is None
    assert sum(face.main for face in verdict.faces) == min(1, len(verdict.faces))
    assert (not verdict.faces) == any("no face was found: kept" in note for note in verdict.notes)
    assert verdict.seen and verdict.seen.startswith("data:image/jpeg;base64,")
    for face in verdict.faces:
        left, top, right, bottom = face.box
        assert left < verdict.width and top < verdict.height and right > 0 and bottom > 0 and face.score > 0.8


@needs_shared
@pytest.mark.parametrize("name", REFUSED)
def test_files_that_cannot_be_read_are_refused_by_name(seeing: Services, name: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        checked(seeing, name, "single/astronaut.png")
    (told,) = refusal.value.problems["images"]
    assert told.startswith(f"{name} {REFUSED[name]}")
    assert left_behind(seeing) == []


@needs_shared
def test_the_face_is_where_it_is(seeing: Services) -> None:
    """Eileen Collins' face in the astronaut's photo, turned or not, within a few pixels."""
    check = checked(seeing, "single/astronaut.png", "exif/astronaut_orientation_6.jpg")
    for verdict in check.photos:
        assert verdict.faces
        assert verdict.faces[0].box == pytest.approx((178, 58, 270, 177), abs=8)


# Who is the subject


@needs_shared
def test_the_person_who_recurs_is_distinguished_from_a_stranger(seeing: Services) -> None:
    mine = [f"person_a/0{number}.jpg" for number in (1, 2, 3)]
    check = checked(seeing, *mine, "single/outdoor_portrait.jpg", face_crop=True)
    assert [verdict.same_person for verdict in check.photos] == [True, True, True, False]
    assert [verdict.cropped for verdict in check.photos] == [True, True, True, False]
    assert "not the person of the other photos" in check.photos[3].notes[-1]


@needs_shared
def test_without_recognition_weights_persons_are_not_compared(
    seeing: Services, tmp_path: Path, decoder: Decoder
) -> None:
    own = tmp_path / "weights"
    own.mkdir()
    shutil.copy(SHARED / "weights" / weights.DETECTOR.name, own)
    settings = seeing.settings.model_copy(update={"weights": own})
    analyzer = PhotoAnalyzer(settings)
    analyzer._worker_process = seeing.analyzer._worker_process  # no second process for this
    blind = Services(settings, seeing.store, decoder, analyzer)
    check = checked(blind, "person_a/01.jpg", "person_a/02.jpg", "single/outdoor_portrait.jpg")
    assert [verdict.same_person for verdict in check.photos] == [None] * 3


def found(x: float, side: float = 100, who: Sequence[float] | None = None, sharp: float = 200) -> Found:
    """A face in the middle row of a photo of 1000 x 1000."""
    identity = tuple(np.array(who) / np.linalg.norm(who)) if who is not None else None
    return Found((x - side / 2, 500 - side / 2, x + side / 2, 500 + side / 2), 0.99, ((0, 0),) * 5, sharp, identity)


PHOTO = Photo(name="a.jpg", file="000.jpg", width=1000, height=1000, format="JPEG")
ADA, BOB, EVE = (1, 0, 0), (0, 1, 0), (0, 0, 1)


def test_the_main_face_is_large_central_and_sharp() -> None:
    large, central, blurred = found(900, 160), found(500, 150), found(500, 160, sharp=5)
    ((main,),), _ = choose([PHOTO], [[large, central, blurred]], "woman", None)
    assert main == central


def test_the_person_of_most_photos_wins_over_a_larger_face() -> None:
    crowd = [
        [found(500, 100, ADA), found(200, 150, BOB)],
        [found(500, 100, ADA)],
        [found(300, 120, EVE), found(600, 100, ADA)],
        [found(500, 100, EVE)],
        [],
    ]
    main, same = choose([PHOTO] * 5, crowd, "woman", 0.4)
    assert [faces[0].identity[0] if faces and faces[0].identity else None for faces in main] == [1, 1, 1, 0, None]
    assert same == [True, True, True, False, None]


def test_no_majority_no_stranger() -> None:
    faces_of = [[found(500, who=ADA)], [found(500, who=BOB)], [found(500, who=EVE)]]
    assert choose([PHOTO] * 3, faces_of, "woman", 0.4)[1] == [None] * 3
    assert choose([PHOTO] * 2, faces_of[:2], "woman", 0.4)[1] == [None] * 2  # two photos show no majority


def test_of_a_couple_two_faces_are_the_subject_and_of_a_crowd_all() -> None:
    seen = [found(300), found(600), found(900, 30)]
    assert [len(faces) for faces in choose([PHOTO], [seen], "couple", None)[0]] == [2]
    assert [len(faces) for faces in choose([PHOTO], [seen], "young people", None)[0]] == [3]


# Closeups


def test_a_closeup_has_the_hosted_services_margins() -> None:
    assert closeup_box([(1000, 1000, 1400, 1500)], (3000, 3000)) == (840, 750, 1560, 1750)


def test_a_closeup_is_at_least_512_px_and_stays_within_the_photo() -> None:
    assert closeup_box([(500, 500, 600, 620)], (1000, 1000)) == (294, 304, 806, 816)
    assert closeup_box([(0, 0, 100, 120)], (1000, 400)) == (0, 0, 512, 400)
    assert closeup_box([(900, 300, 1000, 400)], (1000, 400)) == (488, 0, 1000, 400)


def test_a_face_of_less_than_three_thousandths_makes_no_closeup() -> None:
    assert closeup_box([(500, 500, 552, 552)], (1000, 1000)) is None
    assert closeup_box([(500, 500, 560, 560)], (1000, 1000)) is not None
    assert closeup_box([], (1000, 1000)) is None


# A tune of photos of people


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory, decoder: Decoder) -> Iterator[Studio]:
    """A studio whose worker runs, with the weights of ../shared."""
    photos = sorted((FACES / "person_a").glob("*.jpg"))
    made = Studio(tmp_path_factory.mktemp("studio"), decoder, photos, weights=SHARED / "weights")
    made.worker.start()
    yield made
    made.close()


@pytest.mark.long
@needs_shared
def test_a_tune_of_a_person_trains_on_closeups_and_says_so(studio: Studio) -> None:
    tune = studio.ended(studio.create("closeups", name="man", face_crop=True, steps=4, prompts_attributes=[]))
    assert tune.status == "trained", tune.error
    for verdict in tune.photos:
        assert verdict.cropped and verdict.faces and verdict.same_person
        assert verdict.url and verdict.seen and verdict.closeup
    seen = answers.trained_pictures(studio.services, tune.id)
    assert [one["kind"] for one in seen] == ["photo"] * 3 + ["face"] * 3
    assert {one["caption"] for one in seen if one["kind"] == "face"} == {"closeup A photo of ohwx man"}
    crop = Image.open(tune_folder(studio.services, tune.id) / "dataset" / "faces" / "000-face.jpg")
    assert crop.size == (512, 512)  # the face has 146 x 208 pixels
    assert not [warning for warning in tune.warnings if "face" in warning]


@pytest.mark.long
@needs_shared
def test_the_loss_uses_the_face_alone(studio: Studio) -> None:
    args = "mask=face mask_floor=0"
    tune = studio.ended(studio.create("face mask", name="man", args=args, steps=4, prompts_attributes=[]))
    assert tune.status == "trained", tune.error
    assert [verdict.masks for verdict in tune.photos] == [["face"]] * 3
    assert {one["mask"] for one in answers.trained_pictures(studio.services, tune.id)} == {"face"}
    (face,) = tune.photos[0].faces or []
    mask = np.asarray(Image.open(tune_folder(studio.services, tune.id) / "dataset" / "masks" / "face" / "000.png"))
    rows, columns = np.nonzero(mask)
    left, top, right, bottom = face.box
    aside, above = 0.15 * (right - left), 0.15 * (bottom - top)
    drawn = (columns.min(), rows.min(), columns.max(), rows.max())
    assert drawn == pytest.approx((left - aside, top - above, right + aside, bottom + above), abs=2)


@pytest.mark.long
@needs_shared
def test_photos_without_a_face_are_dropped_or_kept_as_the_configuration_says(studio: Studio) -> None:
    studio_photos, studio.photos = studio.photos, [*studio.photos, FACES / "noface" / "coffee.jpg"]
    try:
        asked = {"name": "man", "steps": 4, "prompts_attributes": []}
        tunes = [studio.create(f"faceless={word}", args=f"faceless={word}", **asked) for word in ("drop", "keep")]
        dropped, kept = (studio.ended(tune) for tune in tunes)
    finally:
        studio.photos = studio_photos
    assert dropped.status == kept.status == "trained"
    assert [verdict.dropped for verdict in dropped.photos] == [None] * 3 + ["no face was found (faceless=drop)"]
    assert [one["name"] for one in answers.trained_pictures(studio.services, dropped.id)] == [
        "01.jpg",
        "02.jpg",
        "03.jpg",
    ]
    assert "3 of 4 photos are left; steps and batch are those for 4" in dropped.warnings
    assert "no face was found: kept as it is (faceless=keep)" in kept.photos[3].notes
    assert "coffee.jpg" in [one["name"] for one in answers.trained_pictures(studio.services, kept.id)]


@needs_shared
def test_a_tune_that_was_stopped_while_its_photos_are_analyzed_resumes(studio: Studio) -> None:
    """A cancel in that stage ends it there; resumed, it looks again and trains."""
    tune_id = studio.create("stopped", name="man", steps=4, prompts_attributes=[])
    studio.store.at_photos[tune_id] = lambda: studio.store.update("tunes", tune_id, cancel=1)
    assert studio.ended(tune_id).status == "canceled"
    assert not (tune_folder(studio.services, tune_id) / "state").exists()
    resume_tune(studio.services, tune_id)
    tune = studio.ended(tune_id)
    assert tune.status == "trained" and all(verdict.faces for verdict in tune.photos)


@needs_shared
def test_only_photos_of_people_are_analyzed(seeing: Services) -> None:
    check = checked(seeing, "noface/cat_chelsea.jpg", name="cat", face_crop=True, training_face_correct=True)
    assert check.photos[0].faces is None and not check.photos[0].cropped
    told = "is for photos of people, and cat is not: no faces are detected"
    assert {f"face_crop {told}", f"training_face_correct {told}"} <= set(check.warnings)


@needs_shared
@pytest.mark.long
def test_photos_are_checked_while_a_tune_trains(studio: Studio) -> None:
    tune_id = studio.create("busy", name="man", steps=48, prompts_attributes=[])
    checks: list[Check] = []

    def check() -> None:
        checks.append(check_photos(studio.services, {"name": "man"}, of("single/astronaut.png")))

    studio.store.at_step[(tune_id, 6)] = check  # asked in the middle of its steps, and answered before the next
    assert studio.ended(tune_id).status == "trained"
    assert checks and checks[0].photos[0].faces


# Which faces are cropped: request, preset, setting


def settled(**asked: Any) -> TrainConfig:
    known = {"branch": "flux1", "model_type": "lora", "name": "woman", "photos": 4, "steps": None, "args": None}
    return resolve.resolve(Path("presets"), **{**known, "preset": None, **asked})


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        ({}, False),
        ({"face_crop_default": True}, True),
        ({"preset": "flux-lora-portrait"}, True),
        ({"preset": "flux-lora-fast", "face_crop_default": True}, False),
        ({"preset": "flux-lora-portrait", "face_crop": False}, False),
        ({"face_crop": True}, True),
        ({"face_crop": True, "name": "dog"}, False),
        ({"preset": "flux-lora-portrait", "name": "dog"}, False),
        ({"face_crop_default": True, "args": "face_set=false"}, False),
    ],
)
def test_the_request_decides_then_the_preset_then_the_setting(asked: dict[str, Any], wanted: bool) -> None:
    assert settled(**asked).face_set is wanted


def test_face_crops_asked_for_twice_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="face_set is given twice: as face_crop and in args"):
        settled(face_crop=True, args="face_set=true")


# Restoration: GFPGAN's own code at a quarter of its width, its weights random


@pytest.fixture(scope="module")
def small_gfpgan(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Weights of the real architecture, narrow; and the code told to build that."""
    file = tmp_path_factory.mktemp("gfpgan") / weights.RESTORER.name
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.save({"params_ema": restore.gfpgan(1, 0.25).state_dict()}, file)
    patch = pytest.MonkeyPatch()
    real = restore.gfpgan
    patch.setattr(restore, "gfpgan", lambda: real(1, 0.25))
    restore.load_restorer.cache_clear()
    yield file
    restore.load_restorer.cache_clear()
    patch.undo()


@pytest.fixture
def astronaut() -> tuple[Image.Image, Found]:
    if not FACES.is_dir():
        pytest.skip("the photos in ../shared are not on this machine")
    image = Image.open(FACES / "single" / "astronaut.png").convert("RGB")
    (face,) = find(FACES / "single" / "astronaut.png", SHARED / "weights" / weights.DETECTOR.name, None)
    return image, face


def test_a_small_face_is_restored_and_the_rest_is_left_alone(
    small_gfpgan: Path, astronaut: tuple[Image.Image, Found]
) -> None:
    image, face = astronaut
    better, scale, count = restore.restore(image, [face], small_gfpgan, 1.0)
    assert count == 1 and scale == pytest.approx(256 / 119, abs=0.05)
    enlarged = image.resize(better.size, Image.Resampling.LANCZOS)
    changed = ImageChops.difference(better, enlarged).convert("L")
    box = changed.getbbox()
    assert box is not None
    left, top, right, bottom = (side * scale for side in face.box)
    width, height = right - left, bottom - top
    assert box[0] > left - width and box[2] < right + width and box[1] > top - height and box[3] < bottom + height
    inside = changed.crop((int(left), int(top), int(right), int(bottom)))
    assert np.asarray(inside).mean() > 5


def test_the_restored_face_fades_into_the_photo(small_gfpgan: Path, astronaut: tuple[Image.Image, Found]) -> None:
    """No step at the rim, even where random weights restore a face to noise of full contrast."""
    image, face = astronaut
    pixels = np.array(image)
    restore.restore_face(pixels, np.array(face.landmarks), restore.load_restorer(small_gfpgan), 1.0)
    changed = np.abs(pixels.astype(int) - np.asarray(image)).max(axis=2)
    rows, columns = np.nonzero(changed)
    top, left = changed[rows.min()], changed[:, columns.min()]
    assert changed.max() > 200 and max(top.max(), left.max()) <= 5


def test_strength_mixes(small_gfpgan: Path, astronaut: tuple[Image.Image, Found]) -> None:
    image, face = astronaut
    whole, half, none = (restore.restore(image, [face], small_gfpgan, strength)[0] for strength in (1.0, 0.5, 0.0))
    far, near = (np.abs(np.asarray(a, int) - np.asarray(none, int)).mean() for a in (whole, half))
    assert near == pytest.approx(far / 2, rel=0.1) and far > 0


def test_a_large_sharp_face_is_left_as_it_is(small_gfpgan: Path, astronaut: tuple[Image.Image, Found]) -> None:
    image, face = astronaut
    large = replace(face, box=(0, 0, 300, 300), sharpness=500)
    assert restore.restore(image, [large], small_gfpgan, 1.0) == (image, 1.0, 0)
    blurred = replace(large, sharpness=20)
    assert restore.restore(image, [blurred], small_gfpgan, 1.0)[1:] == (1.0, 1)


def test_an_error_in_the_restorer_is_an_error(
    small_gfpgan: Path, astronaut: tuple[Image.Image, Found], tmp_path: Path
) -> None:
    state = torch.load(small_gfpgan, weights_only=True)
    state["params_ema"]["toRGB.0.bias"] += float("nan")
    state["params_ema"]["final_linear.bias"] += float("nan")
    broken = tmp_path / "broken.pth"
    torch.save(state, broken)
    image, face = astronaut
    restore.load_restorer.cache_clear()
    with pytest.raises(RuntimeError, match="not finite"):
        restore.restore(image, [face], broken, 1.0)
    del state["params_ema"]["final_linear.bias"]
    torch.save(state, broken)
    restore.load_restorer.cache_clear()
    with pytest.raises(RuntimeError, match="Missing key"):
        restore.restore(image, [face], broken, 1.0)
    restore.load_restorer.cache_clear()


def test_no_folder_appears_in_the_working_directory(
    small_gfpgan: Path, astronaut: tuple[Image.Image, Found], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    restore.restore(*[astronaut[0], [astronaut[1]]], small_gfpgan, 1.0)
    assert list(tmp_path.iterdir()) == []


@needs_shared
def test_without_the_restorers_weights_a_tune_says_so_and_trains(studio: Studio) -> None:
    asked = {"name": "man", "training_face_correct": True, "steps": 4, "prompts_attributes": []}
    tune = studio.ended(studio.create("unrestored", **asked))
    assert tune.status == "trained"
    (told,) = [warning for warning in tune.warnings if "restored" in warning]
    assert told.startswith("faces are not restored: the face restorer is not here and HF_HUB_OFFLINE is set")
    assert not any(verdict.restored for verdict in tune.photos)


@pytest.mark.long
@needs_shared
def test_a_tune_with_restored_faces_trains_on_them(
    tmp_path: Path, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once at full width, through the child: random weights of 350 MB, whose sha256 is not the released ones'."""
    own = tmp_path / "weights"
    own.mkdir()
    shutil.copy(SHARED / "weights" / weights.DETECTOR.name, own)
    torch.save({"params_ema": restore.gfpgan().state_dict()}, own / weights.RESTORER.name)
    monkeypatch.setattr(weights, "RESTORER", replace(weights.RESTORER, sha256=None))
    studio = Studio(tmp_path, decoder, [FACES / "single" / "astronaut.png"], weights=own)
    studio.worker.start()
    asked = {"name": "woman", "training_face_correct": True, "face_crop": True, "steps": 4, "prompts_attributes": []}
    tune = studio.ended(studio.create("restored", **asked))
    studio.close()
    assert tune.status == "trained", tune.error
    assert tune.photos[0].restored and tune.photos[0].cropped
    folder = tune_folder(studio.services, tune.id)
    with (
        Image.open(folder / "dataset" / "restored" / "000.jpg") as better,
        Image.open(folder / "images/000.png") as was,
    ):
        assert better.width > 2 * was.width


# Masks: each segmenter's real architecture, its weights random


def tiny_clipseg(folder: Path) -> None:
    """CLIPSeg as transformers has it, small, with a tokenizer of two words, as files of its release."""
    from transformers import CLIPSegConfig, CLIPSegForImageSegmentation

    folder.mkdir(parents=True)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = CLIPSegConfig(
        text_config={**size, "vocab_size": 1000, "bos_token_id": 1, "eos_token_id": 2},
        vision_config={**size, "image_size": 352, "patch_size": 16},
        projection_dim=32,
        reduce_dim=16,
        extract_layers=[0, 1, 2],
        use_complex_transposed_convolution=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CLIPSegForImageSegmentation(config).save_pretrained(folder)
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    (folder / "special_tokens_map.json").write_text("{}")
    (folder / "preprocessor_config.json").write_text("{}")


@pytest.fixture(scope="module")
def segmenting(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A weights folder with MODNet and CLIPSeg."""
    from facexlib.matting.modnet import MODNet

    folder = tmp_path_factory.mktemp("segmenting")
    own = folder / "weights"
    tiny_clipseg(own / weights.CLIPSEG_FOLDER)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.save(MODNet(backbone_pretrained=False).state_dict(), own / weights.MATTING.name)
    if (SHARED / "weights").is_dir():
        shutil.copy(SHARED / "weights" / weights.DETECTOR.name, own)
    return read_settings(outputs=folder / "outputs", models=folder / "models", weights=own)


@pytest.mark.long
@pytest.mark.parametrize("name", ["man", "dog"])
def test_the_segmenters_mask_is_seen_in_the_loss(
    name: str, segmenting: Settings, tmp_path: Path, thin_sd15: Path, photos: list[Path]
) -> None:
    """A person's by matting, any other's by its name: written, read, and weighing the loss latent by latent."""
    if name == "man" and not (segmenting.weights / weights.DETECTOR.name).exists():
        pytest.skip("the photos in ../shared are not on this machine")
    images = tmp_path / "images"
    shutil.copytree(photos[0].parent, images)
    given = [Photo(name=path.name, file=path.name, width=64, height=64, format="PNG") for path in photos]
    config = training.config_of(mask="subject", mask_floor=0.1)
    analyzer = SharedAnalyzer(segmenting)
    verdicts, warnings = analyzer.prepare(tmp_path, given, config, name, restore=False)
    analyzer.close()
    assert warnings == [] and [verdict.masks for verdict in verdicts] == [["subject"]] * 3
    run = TrainingSetup(thin_sd15, tmp_path, [images / path.name for path in photos], config).start()
    for sample in run.data.samples:
        weight = sample.views[0].masks["subject"]
        assert weight.mean() == pytest.approx(1, abs=1e-5)
        assert weight.std() > 1e-3  # random weights draw something, and it is not flat
    batch = next(run.data.batches(run.branch, 0))
    assert batch.mask is not None and batch.mask.shape[-2:] == batch.latents.shape[-2:]
    losses = [
        run.branch.loss(batch.latents, batch.cond, batch.noise, batch.timesteps, config, mask)
        for mask in (batch.mask, None)
    ]
    assert not torch.equal(*losses)


def test_a_mask_that_covers_next_to_nothing_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, photos: list[Path]
) -> None:
    speck = Image.new("L", (64, 64))
    speck.paste(255, (0, 0, 4, 4))  # 0.4 %
    monkeypatch.setattr(masks, "mask_words", lambda *_: speck)
    task = Task(photos[0], tmp_path, "dog", [], [], segmenter=Path("weights"))
    made = prepare(task)
    assert made.masks == []
    assert list(tmp_path.rglob("*.png")) == []


def test_without_a_segmenters_weights_a_check_says_what_would_be_fetched(services: Services, tmp_path: Path) -> None:
    sent = upload(tmp_path / "sent", "rex.png", photo())
    check = check_photos(services, {"name": "dog", "args": "mask=subject"}, [sent])
    assert check.photos[0].masks == []
    assert "the model that finds objects by their names is not here yet: 605 MB are fetched when a tune needs it" in (
        check.warnings
    )


# Weights


class FileServer(BaseHTTPRequestHandler):
    """Another machine that has a file."""

    content = b"weights" * 1000

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        self.wfile.write(self.content)

    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def file_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a FileServer; and HF_HUB_OFFLINE is not set."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), FileServer)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"{address(server)}/detector.pth"
    server.shutdown()
    server.server_close()


SHA256 = "0a8a6f6b"  # of nothing here


def fetching(settings: Settings, tmp_path: Path) -> Settings:
    return settings.model_copy(update={"weights": tmp_path / "weights"})


def test_weights_are_fetched_once_and_checked(
    settings: Settings, tmp_path: Path, file_server: str, caplog: pytest.LogCaptureFixture
) -> None:
    import hashlib

    caplog.set_level("INFO", "tunebooth.weights")

    right = hashlib.sha256(FileServer.content).hexdigest()
    one = replace(weights.DETECTOR, url=file_server, sha256=right)
    mine, told = fetching(settings, tmp_path), []
    file = weights.obtain(mine, one, progress=lambda *words: told.append(words))
    assert file.read_bytes() == FileServer.content
    assert one.licence in told[-1][0] and one.licence in caplog.text
    assert [path.name for path in mine.weights.iterdir()] == [one.name]
    away = replace(one, url="http://127.0.0.1:9/nobody")
    assert weights.obtain(mine, away) == file  # nobody is asked again
    file.write_bytes(b"something else")
    with pytest.raises(Unavailable, match="is not the face detector: its sha256 is wrong"):
        weights.obtain(mine, away)


def test_a_file_that_is_not_the_published_one_is_not_kept(settings: Settings, tmp_path: Path, file_server: str) -> None:
    mine = fetching(settings, tmp_path)
    with pytest.raises(Unavailable, match="arrived damaged"):
        weights.obtain(mine, replace(weights.DETECTOR, url=file_server))
    assert list(mine.weights.iterdir()) == []


def test_weights_that_cannot_be_fetched_are_reported_with_what_to_do(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = fetching(settings, tmp_path)
    with pytest.raises(Unavailable, match=r"HF_HUB_OFFLINE is set; put detection_\S+ into the weights folder, from"):
        weights.obtain(mine, weights.DETECTOR)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(Unavailable, match=r"could not be fetched: no connection; put"):
        weights.obtain(mine, replace(weights.DETECTOR, url="http://127.0.0.1:9/nobody"))


def test_a_file_without_a_published_sha256_is_held_to_its_first_one(
    settings: Settings, tmp_path: Path, file_server: str
) -> None:
    mine, one = fetching(settings, tmp_path), replace(weights.MATTING, url=file_server)
    file = weights.obtain(mine, one)
    os.utime(file, (1, 1))
    assert weights.find(mine, one) == file
    file.write_bytes(b"changed")
    with pytest.raises(Unavailable, match="its sha256 is wrong"):
        weights.find(mine, one)
    file.unlink()  # as it says; fetched anew, it is held to what came
    FileServer.content, before = b"a newer version", FileServer.content
    try:
        assert weights.obtain(mine, one).read_bytes() == b"a newer version"
    finally:
        FileServer.content = before
    assert weights.find(mine, one) == file


def test_partial_downloads_of_a_killed_process_are_removed(settings: Settings, tmp_path: Path) -> None:
    mine = fetching(settings, tmp_path)
    (part := mine.weights / "clipseg-rd64-refined" / "model.safetensors.partial-1a2b3c4d").parent.mkdir(parents=True)
    part.write_bytes(b"half")
    (whole := mine.weights / "mine.onnx").write_bytes(b"whole")
    sweep(mine.weights)
    sweep(tmp_path / "nowhere")
    assert not part.exists() and whole.exists()


def test_a_restarted_preparation_removes_what_the_one_before_made(tmp_path: Path) -> None:
    own, made = tmp_path / "masks" / "face" / "000.png", tmp_path / "faces" / "001-face.jpg"
    own.parent.mkdir(parents=True)
    own.touch()
    remove_unfinished(tmp_path)
    made.parent.mkdir()
    made.touch()
    remove_unfinished(tmp_path)
    assert own.exists() and not made.exists()


def test_what_goes_wrong_with_a_photo_names_it() -> None:
    photo = Photo(name="rex.jpg", file="000.jpg", width=64, height=64, format="JPEG")
    for problem, told in [(ValueError("odd pixels"), "odd pixels"), (MemoryError(), "there is not enough memory")]:
        with pytest.raises(AnalysisUnavailable, match=f"rex.jpg could not be analyzed: {told}"), naming(photo):
            raise problem
    with pytest.raises(Closed), naming(photo):  # the app ends; that is nobody's fault
        raise Closed


@needs_shared
def test_the_weights_of_the_registry_are_those_next_to_the_repository() -> None:
    settings = read_settings(weights=SHARED / "weights", outputs=Path(os.devnull).parent / "shm", models=Path("/tmp"))
    assert weights.find(settings, weights.DETECTOR) and weights.find_recognizer(settings)


# The child


def test_a_child_that_cannot_start_says_why() -> None:
    with pytest.raises(RuntimeError, match="the process that does nothing did not start: No module named 'nowhere'"):
        SubprocessWorker("nowhere", "does nothing").run(1, "anything")


def test_a_child_does_not_start_while_another_thread_imports_cv2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cv2 puts its folder into the path for that time, where `typing` is not Python's."""
    (tmp_path / "typing.py").write_text("raise ImportError('not the one of Python')")
    before, child = sys.path, SubprocessWorker("trainer.photos.decode", "decodes photos")

    def imported() -> None:
        sys.path = before
        del sys.OpenCV_LOADER  # type: ignore[attr-defined]

    sys.OpenCV_LOADER = True  # type: ignore[attr-defined]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *before])
    threading.Timer(0.5, imported).start()
    child.start()
    child.close()


def test_closing_ends_a_child_in_the_middle_of_its_work(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    child, ended = SubprocessWorker("trainer.photos.decode", "decodes photos"), []

    def work() -> None:
        try:
            child.run(60, "decode", pipe, tmp_path / "kept", "rex.png", 10**6)
        except Closed:
            ended.append("closed")

    before = multiprocessing.active_children()
    thread = threading.Thread(target=work)
    thread.start()
    writer = os.open(pipe, os.O_WRONLY)  # returns once the child has it open
    child.close()
    thread.join()
    os.close(writer)
    assert ended == ["closed"]
    assert [one for one in multiprocessing.active_children() if one not in before] == []
    with pytest.raises(Closed):
        child.run(1, "decode")


@needs_shared
@pytest.mark.long
def test_a_photo_that_breaks_the_child_is_named(
    seeing: Services, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.photos.analysis.FIND_SECONDS", 1e-6)
    with pytest.raises(AnalysisUnavailable, match=r"astronaut\.png took too long to analyze; leave it out"):
        checked(seeing, "single/astronaut.png")
    assert left_behind(seeing) == []
    monkeypatch.undo()
    assert checked(seeing, "single/astronaut.png").photos[0].faces  # a new child


# Through the doors


def test_a_check_through_rest_keeps_nothing(client: Any, services: Services) -> None:
    files = [("tune[images][]", ("rex.png", photo(size=(300, 200)), "image/png"))]
    answer = client.post("/photos/check", data={"tune[name]": "dog"}, files=files)
    assert answer.status_code == 200, answer.text
    (verdict,) = answer.json()["photos"]
    assert (verdict["name"], verdict["width"], verdict["height"]) == ("rex.png", 300, 200)
    assert verdict["too_small"] and verdict["seen"].startswith("data:image/jpeg")
    assert left_behind(services) == []


def test_a_check_needs_photos_and_knows_its_parameters(client: Any) -> None:
    refusal = client.post("/photos/check", json={"tune": {"nmae": "dog", "title": "a title has no meaning here"}})
    assert refusal.status_code == 422
    assert refusal.json() == {
        "images": ["must contain at least one image"],
        "nmae": ["unknown parameter (did you mean 'name'?)"],
    }


def test_without_a_name_no_faces_are_detected(client: Any) -> None:
    files = [("tune[images][]", ("rex.png", photo(), "image/png"))]
    (verdict,) = client.post("/photos/check.json", files=files).json()["photos"]
    assert verdict["faces"] is None


def noise(seed: int) -> bytes:
    """A picture that looks like no other."""
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (8, 8, 3), np.uint8)).resize((600, 600)).save(
        stream, "PNG"
    )
    return stream.getvalue()


def test_a_photo_that_came_twice_is_trained_once(services: Services, tmp_path: Path) -> None:
    one, other = (noise(seed) for seed in (0, 1))
    sent = [upload(tmp_path / "sent", name, content) for name, content in
            [("a.png", one), ("b.png", other), ("c.png", one), ("b.txt", b"a red dog"),
             ("c.txt", b"a teal dog")]]  # fmt: skip
    tune, _ = create_tune(services, {"title": "twice", "name": "dog", "branch": "fast"}, sent)
    assert [verdict.duplicate_of for verdict in tune.photos] == [None, None, "a.png"]
    assert tune.photos[2].dropped == "the very same picture as a.png, which is trained"
    assert tune.photos[2].url is None and len(tune.orig_images) == 2
    kept = sorted(path.name for path in (tune_folder(services, tune.id) / "images").iterdir())
    assert kept == ["000.png", "000.txt", "001.png", "001.txt"]  # the caption stays with the picture
    alone, _ = create_tune(services, {"title": "once", "name": "dog", "branch": "fast"}, sent[:2])
    assert tune.args == alone.args  # as many steps as for two photos


@needs_shared
@pytest.mark.parametrize(
    ("file", "name", "several", "low"),
    [
        ("person_a/01.jpg", "man", False, False),
        ("group/market_two.jpg", "man", True, False),
        ("noface/coffee.jpg", "", False, False),
        ("lowres/astronaut_96.jpg", "man", False, True),
    ],
)
def test_the_inspection_of_one_photo(seeing: Services, file: str, name: str, several: bool, low: bool) -> None:
    told = inspect_image(seeing, {"name": "man", "file": of(file)[0]})
    assert (told.name, told.includes_multiple_people, told.low_resolution) == (name, several, low)
    assert bool(told.faces) == bool(name) and left_behind(seeing) == []
