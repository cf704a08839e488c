"""Branch fast learns its subject: the short version of benchmarks/likeness.py, on two real subjects."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest

from benchmarks import likeness, photos
from benchmarks.fast_base import measure
from tests.helpers.shared import SHARED

# Far from the bounds with one thread and with two, which round differently.
PAIR = ("dog", "backpack_dog")


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[likeness.Studio]:
    if not photos.SUBJECTS.is_dir():
        pytest.skip(f"there are no photos in {SHARED}")
    with closing(likeness.Studio(tmp_path_factory.mktemp("likeness"))) as studio:
        yield studio


@pytest.mark.long
@pytest.mark.parametrize("subject", PAIR)
def test_the_tuned_subject_is_nearest_and_the_rest_is_kept(studio: likeness.Studio, subject: str) -> None:
    of_photos = likeness.described(photos.read_photos())
    told = measure.held_back(likeness.REST, likeness.SEED)
    pipeline = likeness.load_base()
    untuned = Counter(likeness.vote(picture, of_photos) for picture in likeness.pictures_of(pipeline, subject))
    before = likeness.kept(pipeline, told)
    model, _ = studio.tune(subject)
    pipeline.load_lora_weights(model, weight_name="lora.safetensors")
    tuned = Counter(likeness.vote(picture, of_photos) for picture in likeness.pictures_of(pipeline, subject))
    assert likeness.is_right(tuned, subject), tuned
    assert not likeness.is_right(untuned, subject), untuned
    assert likeness.kept(pipeline, told) >= before - likeness.NEAR


@pytest.mark.long
@pytest.mark.parametrize("subject", ["dog"])  # of the backpack, 4 or 5 of 8, as the number of threads rounds
def test_new_words_learn_the_subject_as_well(studio: likeness.Studio, subject: str) -> None:
    of_photos = likeness.described(photos.read_photos())
    told = measure.held_back(likeness.REST, likeness.SEED)
    before = likeness.kept(likeness.load_base(), told)
    pipeline = likeness.load_tune(studio.tune(subject, model_type="pti")[0])
    votes = Counter(likeness.vote(picture, of_photos) for picture in likeness.pictures_of(pipeline, subject))
    assert likeness.is_right(votes, subject), votes
    assert likeness.kept(pipeline, told) >= before - likeness.NEAR


@pytest.mark.long
def test_a_checkpoint_learns_the_subject_and_class_pictures_hold_the_rest(studio: likeness.Studio) -> None:
    of_photos = likeness.described(photos.read_photos())
    told = measure.held_back(likeness.REST, likeness.SEED)
    base, kept, of_class = likeness.load_base(), {}, {}
    before = likeness.kept(base, told), likeness.class_kept(base, "dog", of_photos)
    for weight in (1, 0):
        pipeline = likeness.load_tune(studio.tune("dog", f"prior_weight={weight}", "checkpoint")[0])
        votes = Counter(likeness.vote(picture, of_photos) for picture in likeness.pictures_of(pipeline, "dog"))
        assert likeness.is_right(votes, "dog"), votes
        kept[weight], of_class[weight] = likeness.kept(pipeline, told), likeness.class_kept(pipeline, "dog", of_photos)
    assert kept[1] >= before[0] - 0.05 and of_class[1] >= before[1] - 0.05
    assert of_class[0] < of_class[1] - 0.2  # without them, every dog is the subject


def test_the_measure_sees_colours_and_where_they_are() -> None:
    red, blue = np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64, 3), np.uint8)
    red[..., 0], blue[..., 2] = 200, 200
    ringed = red.copy()
    ringed[16:48, 16:48] = blue[16:48, 16:48]
    of_photos = likeness.described({"red": [red], "blue": [blue], "ringed": [ringed]})
    assert likeness.vote(red + 5, of_photos) == "red"
    assert likeness.vote(blue + 5, of_photos) == "blue"
    assert likeness.vote(ringed + 5, of_photos) == "ringed"
    assert likeness.left_one_out({"red": [red, red], "blue": [blue, blue]}) == {
        "red": Counter(red=2),
        "blue": Counter(blue=2),
    }
