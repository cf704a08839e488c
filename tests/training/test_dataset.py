"""The training set: sizes, crops, masks, captions, order and chance. Most of it on a family without a network."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Collection
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d
from torch.nn.utils.rnn import pad_sequence

from tests.helpers.training import TrainingSetup, config_of
from trainer.config.train_config import TrainConfig
from trainer.photos.geometry import DIMMED, bucket, crops, cut, load_mask, to_pixels
from trainer.training import views as views_
from trainer.training.dataset import (
    Dataset,
    MicroBatch,
    build,
    captions_for,
    epoch_order,
    find_pictures,
    join,
    without_mask,
)
from trainer.training.seeds import derive
from trainer.training.views import Picture, Sample, View, to_weights, trained_size

LONGEST = 48  # letters of a caption


class Part(nn.Module):
    """A module that writes into a diary where it is put."""

    def __init__(self, name: str, diary: list[str]) -> None:
        super().__init__()
        self.name, self.diary = name, diary

    def to(self, *where: Any) -> Part:
        self.diary.append(f"{self.name} -> {where[0]}")
        return self


class Plain:
    """A family without a network: latents are the mean colours of 8x8 pixels, a caption is encoded to its letters.

    Its device is ordinary memory too, by another name, so that the diary can tell them apart.
    """

    device = torch.device("cpu", 0)
    latent_scale, size_multiple = 8, 16

    def __init__(self, std: float = 0.1) -> None:
        self.std = std
        self.diary: list[str] = []
        self.vae = Part("vae", self.diary)
        self.text_encoders = {"text_encoder": Part("text_encoder", self.diary)}

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        self.diary.append("encodes a picture")
        mean = avg_pool2d(pixels, self.latent_scale)
        return mean, torch.full_like(mean, self.std)

    def encode_prompts(self, captions: list[str]) -> dict[str, Tensor]:
        self.diary.append(f"encodes {captions}")
        return {"letters": torch.tensor([list(caption.encode().ljust(LONGEST)) for caption in captions])}

    def encode_size(self, original: tuple[int, int], crop: tuple[int, int], size: tuple[int, int]) -> dict[str, Tensor]:
        return {"told": torch.tensor([[*original, *crop, *size]])}

    def draw(self, latents: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        noise = torch.randn(latents.shape, generator=generator)
        return noise, torch.randint(1000, (len(latents),), generator=generator)

    def keep_text_encoders(self, names: Collection[str]) -> None:
        self.diary += [f"drops the {name}" for name in self.text_encoders if name not in names]
        self.text_encoders = {name: part for name, part in self.text_encoders.items() if name in names}


def said(cond: dict[str, Tensor]) -> list[str]:
    """The captions that the plain family encoded to this."""
    return [bytes(letters.tolist()).decode().rstrip() for letters in cond["letters"]]


def settled(**changes: object) -> TrainConfig:
    """A configuration in which nothing is mirrored, cropped or left out by chance, unless it says so."""
    return config_of(**{"flip": False, "crops": 1, "caption_dropout": 0, "resolution": 64, **changes})


def draw_picture(file: Path, size: tuple[int, int] = (64, 64), colour: Any = "gray") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(file)
    return file


def draw_mask(file: Path, size: tuple[int, int], box: tuple[int, int, int, int]) -> Path:
    """A white box (left, top, right, bottom) on black."""
    file.parent.mkdir(parents=True, exist_ok=True)
    mask = Image.new("L", size)
    mask.paste(255, box)
    mask.save(file)
    return file


def encode(tmp_path: Path, picture: Picture, **changes: object) -> Sample:
    config = settled(**changes)
    return views_.encode(Plain(), views_.read(picture, tmp_path), config.resolution[0], config)


def sample(name: str = "a", shape: tuple[int, int] = (1, 1), mean: float = 0, std: float = 1, **view: Any) -> Sample:
    """A sample of one view, made by hand."""
    views = View(
        torch.full((1, 1, *shape), mean), torch.full((1, 1, *shape), std), view.get("size", {}), view.get("masks", {})
    )
    return Sample(Picture(Path(f"{name}.png"), name, name, view.get("kind", "photo")), [views])


def dataset_of(samples: list[Sample], config: TrainConfig) -> Dataset:
    """A set of samples made by hand. The plain family encodes a caption to its letters."""
    captions = [*dict.fromkeys(one.picture.caption for one in samples), ""]
    return Dataset(samples, captions, [Plain().encode_prompts([caption]) for caption in captions], config)


# Sizes


@given(
    width=st.integers(16, 6000),
    height=st.integers(16, 6000),
    resolution=st.integers(8, 128).map(lambda number: 8 * number),
    multiple=st.sampled_from([16, 32, 64]),
)
@example(width=500, height=500, resolution=376, multiple=64)
@example(width=500, height=500, resolution=1072, multiple=16)
def test_a_bucket_is_the_nearest_full_size_in_aspect(width: int, height: int, resolution: int, multiple: int) -> None:
    wide, high = bucket((width, height), resolution, multiple)
    assert wide % multiple == high % multiple == 0
    assert wide * high <= resolution**2
    step = multiple * max(1, round(resolution / 16 / multiple))
    sides = range(step, 2 * resolution + 1, step)
    # Every size that no room is left above.
    full = [(w, h) for w in sides for h in sides if w * h <= resolution**2 < w * (h + step)]
    full = [one for one in full if 2 * min(one) >= resolution]

    def apart(one: tuple[int, int]) -> float:
        return abs(math.log(one[0] / one[1] * height / width))

    assert all(apart((wide, high)) <= apart(one) + 1e-6 for one in full)
    nearly_square = abs(math.log(width / height)) < 0.01
    if nearly_square:
        assert wide == high


@pytest.mark.parametrize("multiple", [4, 16, 32, 64])
def test_a_square_photo_is_trained_as_a_square_at_every_resolution(multiple: int) -> None:
    for resolution in range(64, 2049, 8):
        side, other = bucket((300, 300), resolution, multiple)
        assert side == other <= resolution
        assert side > resolution - max(multiple, resolution / 8)  # and of nearly all of the resolution
    for resolution in (512, 768, 1024):
        assert bucket((300, 300), resolution, multiple) == (resolution, resolution)


@pytest.mark.parametrize("size", [(300, 300), (300, 400), (5000, 100)])
def test_a_resolution_below_the_least_side_is_trained_at_that_side(size: tuple[int, int]) -> None:
    assert bucket(size, 32, 64) == (64, 64)


@pytest.mark.parametrize(
    ("size", "at_512_by_64", "at_512_by_16", "at_1024"),
    [
        ((1000, 1000), (512, 512), (512, 512), (1024, 1024)),
        ((3024, 4032), (448, 576), (448, 576), (896, 1152)),
        ((4032, 3024), (576, 448), (576, 448), (1152, 896)),
        ((4000, 6000), (384, 640), (416, 608), (832, 1216)),
        ((1080, 1920), (384, 640), (384, 672), (768, 1344)),
        ((1920, 1080), (640, 384), (672, 384), (1344, 768)),
        ((1000, 3000), (320, 768), (288, 896), (576, 1792)),
        ((100, 5000), (256, 1024), (256, 1024), (512, 2048)),
        ((5000, 100), (1024, 256), (1024, 256), (2048, 512)),
    ],
)
def test_usual_photos_have_these_sizes(
    size: tuple[int, int], at_512_by_64: tuple[int, int], at_512_by_16: tuple[int, int], at_1024: tuple[int, int]
) -> None:
    assert bucket(size, 512, 64) == at_512_by_64
    assert bucket(size, 512, 16) == at_512_by_16
    assert bucket(size, 1024, 64) == bucket(size, 1024, 16) == at_1024


@pytest.mark.parametrize(("resolution", "side"), [(64, 64), (72, 64), (96, 96), (8, 16)])
def test_without_buckets_every_photo_is_a_square(tmp_path: Path, resolution: int, side: int) -> None:
    # Of a side that the family can take: the resolution need not be one.
    family: Any = Plain()
    photo = Image.new("RGB", (300, 150))
    assert trained_size(family, photo, resolution, settled(buckets=False)) == (side, side)
    wide, high = trained_size(family, photo, 64, settled(buckets=True))
    assert wide > high


# Crops


sides = st.integers(16, 4000)
buckets = st.tuples(st.integers(1, 32), st.integers(1, 32)).map(lambda size: (16 * size[0], 16 * size[1]))


@given(image=st.tuples(sides, sides), size=buckets, count=st.integers(1, 4), seed=st.integers(0, 2**62))
@example(image=(1495, 995), size=(912, 624), count=1, seed=0)  # here rounding leaves less than no room at the left
def test_a_crop_is_as_large_as_the_image_allows_and_of_the_aspect_of_its_size(
    image: tuple[int, int], size: tuple[int, int], count: int, seed: int
) -> None:
    boxes = crops(image, size, count, seed)
    assert boxes == crops(image, size, count, seed)
    for left, top, right, bottom in boxes:
        assert left >= 0 and top >= 0
        assert right <= image[0] + 1e-6 and bottom <= image[1] + 1e-6
        assert (right - left) / (bottom - top) == pytest.approx(size[0] / size[1])
        assert right - left == pytest.approx(image[0]) or bottom - top == pytest.approx(image[1])
    left, top, right, bottom = boxes[0]
    assert (left + right, top + bottom) == pytest.approx(image)


@pytest.mark.parametrize(
    ("image", "size"), [((1495, 995), (912, 624)), ((333, 500), (448, 576)), ((60, 71), (448, 512))]
)
def test_every_crop_can_be_cut(image: tuple[int, int], size: tuple[int, int]) -> None:
    for box in crops(image, size, 4, 0):
        assert cut(Image.new("L", image), box, size, False).size == size


def test_other_crops_are_elsewhere_in_the_photo() -> None:
    boxes = crops((400, 100), (64, 64), 4, 0)
    assert len({box[0] for box in boxes}) == 4
    assert {(box[1], box[3]) for box in boxes} == {(0, 100)}  # there is nothing to choose from top to bottom
    assert crops((400, 100), (64, 64), 4, 1)[0] == boxes[0]  # the centre's
    assert crops((400, 100), (64, 64), 4, 1)[1:] != boxes[1:]


def test_there_is_one_crop_of_a_photo_that_fits() -> None:
    assert crops((128, 128), (64, 64), 4, 0) == [(0, 0, 128, 128)]
    assert len(crops((129, 128), (64, 64), 4, 0)) == 4


# Pixels


def white_box(pixels: Tensor) -> tuple[int, int, int, int]:
    """left, top, width and height of what is brighter than grey."""
    rows, columns = torch.nonzero(pixels.mean(0) > 0, as_tuple=True)
    left, top = int(columns.min()), int(rows.min())
    return left, top, int(columns.max()) - left + 1, int(rows.max()) - top + 1


@pytest.mark.parametrize("buckets", [False, True])
@pytest.mark.parametrize("size", [(300, 150), (150, 300), (200, 200), (40, 60), (333, 250), (600, 100)])
def test_a_circle_stays_a_circle(size: tuple[int, int], buckets: bool) -> None:
    image = Image.new("RGB", size, "black")
    x, y, r = size[0] / 2, size[1] / 2, min(size) / 4
    ImageDraw.Draw(image).ellipse((x - r, y - r, x + r - 1, y + r - 1), fill="white")
    wide, high = bucket(size, 128, 16) if buckets else (128, 128)
    for mirrored in (False, True):
        pixels = to_pixels(cut(image, crops(size, (wide, high), 1, 0)[0], (wide, high), mirrored))
        assert pixels.shape == (3, high, wide)
        left, top, width, height = white_box(pixels)
        scale = max(wide / size[0], high / size[1])
        assert abs(width - 2 * r * scale) <= 2 and abs(height - 2 * r * scale) <= 2
        assert abs(left + width / 2 - wide / 2) <= 2 and abs(top + height / 2 - high / 2) <= 2


def test_a_mirrored_photo_has_its_left_at_the_right() -> None:
    image = Image.new("RGB", (64, 64), "black")
    image.paste("white", (0, 0, 16, 32))
    assert white_box(to_pixels(cut(image, (0, 0, 64, 64), (64, 64), False))) == (0, 0, 16, 32)
    assert white_box(to_pixels(cut(image, (0, 0, 64, 64), (64, 64), True))) == (48, 0, 16, 32)


def test_pixels_fill_the_range_from_minus_one_to_one() -> None:
    red, green, blue = to_pixels(Image.new("RGB", (64, 48), (255, 0, 51)))
    assert red.shape == (48, 64)
    assert (red.unique().item(), green.unique().item()) == (1.0, -1.0)
    assert blue.unique().item() == pytest.approx(51 / 127.5 - 1)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_photos_of_every_mode_have_three_channels(tmp_path: Path, mode: str) -> None:
    Image.new("RGB", (80, 64), "white").convert(mode).save(tmp_path / "photo.jpg")
    [view] = encode(tmp_path, Picture(tmp_path / "photo.jpg", "a dog", "photo")).views
    assert view.mean.shape[1] == 3 and view.mean.min() > 0.9


def test_real_photos_load(dog_photos: Callable[[int], list[Path]], tmp_path: Path) -> None:
    for photo in dog_photos(2):
        [view] = encode(tmp_path, Picture(photo, "a dog", photo.name)).views
        assert view.mean.shape == (1, 3, 8, 8) and view.mean.std() > 0.1


# Views and samples


@pytest.mark.parametrize(
    ("kind", "changes", "views"),
    [
        ("photo", {}, 1),
        ("photo", {"flip": True}, 2),
        ("photo", {"crops": 3}, 3),
        ("photo", {"crops": 3, "flip": True}, 6),
        ("face", {"flip": True}, 1),  # no face is symmetric
        ("face", {"crops": 3, "flip": True}, 3),
        ("class", {"flip": True}, 2),
    ],
)
def test_each_crop_is_a_view_and_its_mirror_image_another(
    tmp_path: Path, kind: Any, changes: dict[str, object], views: int
) -> None:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (64, 160, 3), np.uint8)).save(tmp_path / "photo.png")
    made = encode(tmp_path, Picture(tmp_path / "photo.png", "a dog", "photo", kind), **changes).views
    assert len(made) == views
    means = [view.mean for view in made]
    assert all(not torch.allclose(one, other) for place, one in enumerate(means) for other in means[:place])
    if "flip" in changes and kind != "face":
        for straight, mirrored in zip(means[::2], means[1::2], strict=True):
            assert torch.allclose(straight.flip(-1), mirrored, atol=1e-6)


def test_the_family_gets_original_size_crop_corner_and_training_size(tmp_path: Path) -> None:
    picture = Picture(draw_picture(tmp_path / "photo.png", (320, 128)), "a dog", "photo")
    views = encode(tmp_path, picture, crops=2, flip=True).views
    centre, mirrored, crop, crop_mirrored = (view.size["told"].tolist()[0] for view in views)
    assert centre == mirrored == [128, 320, 0, 48, 64, 64]
    # At this size the photo is 160 wide: what is left of a crop is right of it in the mirror.
    assert crop[:3] == crop_mirrored[:3] == [128, 320, 0]
    assert crop[3] + 64 + crop_mirrored[3] == pytest.approx(160, abs=1)
    assert crop[3] not in (48, crop_mirrored[3])
    [wide] = encode(tmp_path, picture, buckets=True).views
    assert wide.size["told"].tolist() == [[128, 320, 3, 0, 32, 96]]  # 38 high, cut to 32


def test_several_resolutions_make_several_samples_of_a_photo(tmp_path: Path) -> None:
    pictures = [
        Picture(draw_picture(tmp_path / "a.png", (64, 64)), "a dog", "a"),
        Picture(draw_picture(tmp_path / "b.png", (300, 150)), "a dog", "b"),
    ]
    family: Any = Plain()
    data, _ = build(family, pictures, [], settled(resolution="64,128", buckets=True), tmp_path / "dataset")
    assert [(one.picture.name, one.shape) for one in data.samples] == [
        ("a", (8, 8)), ("a", (16, 16)), ("b", (6, 10)), ("b", (10, 22)),
    ]  # fmt: skip


# Masks


def test_a_mask_becomes_weights_of_mean_one_and_the_floor_outside(tmp_path: Path) -> None:
    picture = Picture(draw_picture(tmp_path / "photo.png", (128, 128)), "a dog", "photo")
    draw_mask(tmp_path / "masks" / "face" / "photo.png", (128, 128), (0, 0, 64, 128))
    for floor in (0, 0.1, 0.5, 1):
        [view] = encode(tmp_path, picture, mask="face", mask_floor=floor).views
        weights = view.masks["face"]
        assert weights.shape == (1, 1, 8, 8)
        assert weights.mean().item() == pytest.approx(1)
        inside, outside = weights[..., :3].unique(), weights[..., 5:].unique()  # between them it fades
        assert len(inside) == len(outside) == 1
        assert (outside / inside).item() == pytest.approx(floor)
    assert view.masks.keys() == {"face"}  # of the subject there is no mask


def test_a_mask_is_cropped_and_mirrored_with_its_photo(tmp_path: Path) -> None:
    draw_mask(tmp_path / "photo.png", (320, 128), (100, 0, 180, 128))  # the photo looks like its mask
    draw_mask(tmp_path / "masks" / "subject" / "photo.png", (320, 128), (100, 0, 180, 128))
    for buckets in (False, True):
        views = encode(
            tmp_path,
            Picture(tmp_path / "photo.png", "a dog", "photo"),
            crops=3,
            flip=True,
            mask_floor=0,
            buckets=buckets,
        ).views
        assert len(views) == 6
        for view in views:
            bright = (view.mean.mean(1, keepdim=True) + 1) / 2
            assert torch.allclose(view.masks["subject"], bright / bright.mean(), atol=0.02)


def test_a_crop_without_any_mask_pixel_counts_as_a_whole() -> None:
    for floor in (0.0, 0.1):
        weights = to_weights(Image.new("L", (64, 64)), torch.zeros(1, 4, 8, 8), floor)
        assert torch.allclose(weights, torch.ones(1, 1, 8, 8))


def test_a_mask_of_another_size_or_all_black_is_refused(tmp_path: Path) -> None:
    file = draw_mask(tmp_path / "photo.png", (64, 48), (0, 0, 8, 8))
    assert load_mask(file, (64, 48)).getbbox() == (0, 0, 8, 8)
    with pytest.raises(ValueError, match=r"photo.png has 64 x 48 pixels, its picture 48 x 64"):
        load_mask(file, (48, 64))
    with pytest.raises(ValueError, match=r"photo.png is all black: nothing would be learned"):
        load_mask(draw_mask(file, (64, 48), (0, 0, 0, 0)), (64, 48))


def test_class_pictures_have_no_mask(tmp_path: Path) -> None:
    file = draw_picture(tmp_path / "0000.png")
    draw_mask(tmp_path / "masks" / "face" / "0000.png", (64, 64), (0, 0, 8, 8))
    assert encode(tmp_path, Picture(file, "a dog", "photo"), mask="face").views[0].masks
    assert not encode(tmp_path, Picture(file, "a dog", "class picture", "class"), mask="face").views[0].masks


@pytest.mark.parametrize(("widen", "steps"), [(0, 0), (0.1, 10), (0.25, 25), (0.5, 50), (0.75, 75), (1, 100)])
def test_the_mask_is_widened_in_exactly_its_share_of_the_steps(widen: float, steps: int) -> None:
    family: Any = Plain()
    face, subject = torch.tensor([[[[2.0, 0.0]]]]), torch.tensor([[[[0.5, 1.5]]]])
    masks = {"face": face, "subject": subject}
    data = dataset_of(
        [sample(shape=(1, 2), masks=masks)], settled(batch=1, micro_batch=1, mask="face", mask_widen=widen)
    )
    seen = [batch.mask for step in range(100) for batch in data.batches(family, step)]
    wide = [mask is not None and torch.equal(mask, subject) for mask in seen]
    assert sum(wide) == steps
    assert sum(mask is not None and torch.equal(mask, face) for mask in seen) == 100 - steps
    tens = [sum(wide[start : start + 10]) for start in range(0, 100, 10)]
    assert max(tens) - min(tens) <= 1  # and not all of them at one end


def test_a_view_without_the_mask_counts_as_a_whole_among_others() -> None:
    family: Any = Plain()
    face = torch.tensor([[[[2.0, 0.0]]]])
    samples = [sample("a", (1, 2), masks={"face": face}), sample("b", (1, 2))]
    for mask, expected in (("face", {"a": face, "b": torch.ones_like(face)}), ("subject", None), ("none", None)):
        [batch] = dataset_of(samples, settled(mask=mask)).batches(family, 0)
        if expected is None:
            assert batch.mask is None
        else:
            assert batch.mask is not None
            for name, weights in zip(said(batch.cond), batch.mask, strict=True):
                assert torch.equal(weights, expected[name][0])


def test_missing_masks_and_crops_give_warnings(tmp_path: Path) -> None:
    photos = [Picture(tmp_path / f"{name}.jpg", "a dog", f"{name} at home.jpg") for name in "ab"]
    asked = settled(mask="face", mask_widen=0.5, face_set=True)
    assert without_mask(photos, tmp_path, settled()) == []
    assert without_mask(photos, tmp_path, asked) == [
        "no mask of the face for a at home.jpg, b at home.jpg: the whole picture is trained",
        "no mask of the subject for a at home.jpg, b at home.jpg: the whole picture is trained",
        "no face crops: only the photos themselves are trained",
    ]
    for name in "ab":
        draw_mask(tmp_path / "masks" / "subject" / f"{name}.png", (64, 64), (0, 0, 8, 8))
    draw_mask(tmp_path / "masks" / "face" / "a.png", (64, 64), (0, 0, 8, 8))
    with_face = [*photos, Picture(tmp_path / "a-face.jpg", "closeup a dog", "a at home.jpg", "face")]
    draw_mask(tmp_path / "masks" / "face" / "a-face.png", (64, 64), (0, 0, 8, 8))
    draw_mask(tmp_path / "masks" / "subject" / "a-face.png", (64, 64), (0, 0, 8, 8))
    assert without_mask(with_face, tmp_path, asked) == [
        "no mask of the face for b at home.jpg: the whole picture is trained"
    ]


# Pictures and captions


def test_captions_are_the_hosted_service_s_unless_the_photo_has_a_text_file(tmp_path: Path) -> None:
    photos = [tmp_path / "a.jpg", tmp_path / "b.jpg"]
    assert captions_for(photos, "sks", "dog") == ["A photo of sks dog"] * 2
    (tmp_path / "b.txt").write_text("  a dög on a beach\n", "utf-8")
    assert captions_for(photos, "sks", "dog") == ["A photo of sks dog", "a dög on a beach"]


def test_the_caption_of_a_style_speaks_of_no_photo(tmp_path: Path) -> None:
    assert captions_for([tmp_path / "a.jpg"], "ohwx", "Style") == ["ohwx Style"]


def test_face_crops_are_found_with_their_photos_and_captioned_as_closeups(tmp_path: Path) -> None:
    names = {"0001.jpg": "me.jpg", "0002.png": "us.png"}
    for file in names:
        draw_picture(tmp_path / "images" / file)
    (tmp_path / "images" / "0002.txt").write_text("ohwx woman at sea")
    face = draw_picture(tmp_path / "dataset" / "faces" / "0001-face.png")
    other = draw_picture(tmp_path / "dataset" / "faces" / "0002-face.jpg")
    draw_picture(tmp_path / "dataset" / "faces" / "0003-face.jpg")  # of a photo that is not in the tune
    photos = [
        Picture(tmp_path / "images" / "0001.jpg", "A photo of ohwx woman", "me.jpg"),
        Picture(tmp_path / "images" / "0002.png", "ohwx woman at sea", "us.png"),
    ]
    assert find_pictures(tmp_path, names, "ohwx", "woman", settled(face_set=False)) == photos
    assert find_pictures(tmp_path, names, "ohwx", "woman", settled(face_set=True)) == [
        *photos,
        Picture(face, "closeup A photo of ohwx woman", "me.jpg", "face"),
        Picture(other, "closeup ohwx woman at sea", "us.png", "face"),
    ]


# Building the set


@pytest.fixture
def pictures(tmp_path: Path) -> list[Picture]:
    """A photo, a tall photo, a face crop of it and a class picture, all white; the tall one has a mask."""
    draw_mask(tmp_path / "dataset" / "masks" / "face" / "b.png", (100, 200), (0, 0, 100, 100))
    return [
        Picture(draw_picture(tmp_path / "images" / "a.png", (64, 64), "white"), "a dog", "a at home.png"),
        Picture(draw_picture(tmp_path / "images" / "b.png", (100, 200), "white"), "a cat", "b at home.png"),
        Picture(
            draw_picture(tmp_path / "faces" / "b-face.png", (64, 64), "white"), "closeup a cat", "b at home.png", "face"
        ),
        Picture(draw_picture(tmp_path / "class" / "0000.png", (64, 64), "white"), "a dog", "class picture 0", "class"),
    ]


def test_every_photo_is_shown_as_it_is_trained(tmp_path: Path, pictures: list[Picture]) -> None:
    family: Any = Plain()
    config = settled(buckets=True, mask="face", crops=3, flip=True)
    data, _ = build(family, pictures, [], config, tmp_path / "dataset")
    seen = tmp_path / "dataset" / "seen"
    rows = json.loads((seen / "seen.json").read_text())
    a = {"name": "a at home.png", "kind": "photo", "caption": "a dog", "width": 64, "height": 64, "mask": None}
    b = {"name": "b at home.png", "kind": "photo", "caption": "a cat", "width": 48, "height": 80, "mask": "face"}
    closeup = a | {"name": "b at home.png", "kind": "face", "caption": "closeup a cat"}
    assert rows == [
        {"file": "a-64x64.jpg", **a},
        {"file": "b-48x80.jpg", **b},
        {"file": "b-face-64x64.jpg", **closeup},
    ]  # and no class pictures
    assert {file.name for file in seen.iterdir()} == {"seen.json", *(row["file"] for row in rows)}
    for row, one in zip(rows, data.samples, strict=True):
        with Image.open(seen / row["file"]) as shown:
            assert shown.size == (row["width"], row["height"]) == (8 * one.shape[1], 8 * one.shape[0])
    with Image.open(seen / "a-64x64.jpg") as shown:
        assert np.asarray(shown).min() > 250
    with Image.open(seen / "b-48x80.jpg") as shown:  # what the loss does not look at is dimmed
        top, bottom = np.asarray(shown)[:36], np.asarray(shown)[44:]
        assert top.min() > 250
        assert np.abs(bottom - 255 * DIMMED).max() < 6


def test_the_shown_pictures_are_replaced_by_those_of_the_next_run(tmp_path: Path, pictures: list[Picture]) -> None:
    family: Any = Plain()
    build(family, pictures, [], settled(resolution=64), tmp_path / "dataset")
    build(family, pictures[:1], [], settled(resolution=96), tmp_path / "dataset")
    assert {file.name for file in (tmp_path / "dataset" / "seen").iterdir()} == {"seen.json", "a-96x96.jpg"}


@pytest.mark.parametrize("text_encoder_lr", [0, 1e-4])
def test_encoders_are_on_the_device_only_while_they_encode(
    tmp_path: Path, pictures: list[Picture], text_encoder_lr: float
) -> None:
    family: Any = Plain()
    data, prompts = build(
        family, pictures, ["a dog in space"], settled(text_encoder_lr=text_encoder_lr), tmp_path / "dataset",
        ["text_encoder"] if text_encoder_lr else [],
    )  # fmt: skip
    assert family.diary == [
        "text_encoder -> cpu:0",
        "encodes ['a dog']", "encodes ['a cat']", "encodes ['closeup a cat']", "encodes ['']",  # once each
        "encodes ['a dog in space']",
        "text_encoder -> cpu",
        *([] if text_encoder_lr else ["drops the text_encoder"]),
        "vae -> cpu:0", *["encodes a picture"] * 4, "vae -> cpu",
    ]  # fmt: skip
    # Those that are trained stay, and are asked in each step; of the others only what they said is left.
    assert bool(family.text_encoders) == (data.cond is None) == bool(text_encoder_lr)
    assert [said(prompt) for prompt in prompts] == [["a dog in space"]]
    family.diary.clear()
    spoken = [said(batch.cond) for step in range(3) for batch in data.batches(family, step)]
    assert sorted({caption for captions in spoken for caption in captions}) == ["a cat", "a dog", "closeup a cat"]
    distinct = [list(dict.fromkeys(captions)) for captions in spoken]
    assert family.diary == ([f"encodes {captions}" for captions in distinct] if text_encoder_lr else [])


def test_encoders_leave_the_device_where_encoding_fails(tmp_path: Path, pictures: list[Picture]) -> None:
    family: Any = Plain()
    draw_mask(tmp_path / "dataset" / "masks" / "face" / "b.png", (100, 200), (0, 0, 0, 0))
    with pytest.raises(ValueError, match="all black"):
        build(family, pictures, [], settled(mask="face"), tmp_path / "dataset")
    assert family.diary[-1] == "vae -> cpu"
    assert not list((tmp_path / "dataset").glob("seen*"))  # nothing half-written


def test_captions_that_are_encoded_in_each_step_are_those_encoded_once(
    thin_sd15: Path, tmp_path: Path, photos: list[Path]
) -> None:
    # The adapters of the text encoder change nothing before they are trained.
    cached = TrainingSetup(thin_sd15, tmp_path, photos, config_of(text_encoder_lr=0)).start()
    anew = TrainingSetup(thin_sd15, tmp_path, photos, config_of(text_encoder_lr=1e-3)).start()
    assert cached.data.cond is not None
    assert anew.data.cond is None
    assert (cached.branch.text_encoders.keys(), anew.branch.text_encoders.keys()) == (set(), {"text_encoder"})
    different = set()
    for step in range(6):
        ours, theirs = ([batch.cond for batch in run.data.batches(run.branch, step)] for run in (cached, anew))
        for one, other in zip(ours, theirs, strict=True):
            assert one.keys() == other.keys()
            assert all(torch.allclose(one[key], other[key], atol=1e-6) for key in one)
            different |= {float(row.sum()) for row in one["encoder_hidden_states"]}
    assert len(different) > 2  # the captions are not all alike to the encoder


class Ragged(Plain):
    """Texts have different lengths: letters (B, L, 1), padded with zeros to the longest, and lengths (B,)."""

    def encode_prompts(self, captions: list[str]) -> dict[str, Tensor]:
        texts = [torch.tensor(list(caption.encode()), dtype=torch.long).reshape(-1, 1) for caption in captions]
        return {"letters": pad_sequence(texts, batch_first=True), "lengths": torch.tensor([len(one) for one in texts])}


@pytest.mark.parametrize("text_encoder_lr", [0, 1e-3])
def test_texts_of_different_lengths_are_padded_to_the_longest(text_encoder_lr: float) -> None:
    family: Any = Ragged()
    names = ["a dog", "a dog on a sofa", "dogs"]
    config = settled(batch=4, micro_batch=4, caption_dropout=0.3, text_encoder_lr=text_encoder_lr)
    captions = [*names, ""]
    cond = [family.encode_prompts([caption]) for caption in captions]
    data = Dataset([sample(name) for name in names], captions, None if text_encoder_lr else cond, config)
    seen = set()
    for step in range(8):
        for batch in data.batches(family, step):
            letters, lengths = batch.cond["letters"], batch.cond["lengths"].tolist()
            assert letters.shape == (len(batch.latents), max(lengths), 1)
            assert not any(row[length:].any() for row, length in zip(letters, lengths, strict=True))
            seen |= {bytes(row[:length, 0].tolist()).decode() for row, length in zip(letters, lengths, strict=True)}
    assert seen == set(captions)


def test_texts_of_one_length_are_put_together_as_they_are() -> None:
    texts = [torch.rand(1, 3, 2), torch.rand(2, 3, 2)]
    assert torch.equal(join(texts), torch.cat(texts))
    assert join([torch.tensor([3]), torch.tensor([5])]).tolist() == [3, 5]  # lengths have no second dimension


# Chance


def test_each_use_of_randomness_has_a_seed_of_its_own() -> None:
    uses = [(seed, step, purpose) for seed in (0, 1) for step in (0, 1, 10) for purpose in ("noise", "order")]
    seeds = {derive(*use) for use in uses}
    assert len(seeds) == len(uses)
    assert seeds == {derive(*use) for use in uses}
    assert all(0 <= seed < 2**63 for seed in seeds)


shapes = st.lists(st.sampled_from([(8, 8), (8, 12), (12, 8)]), min_size=1, max_size=12)


def named(shapes: list[tuple[int, int]]) -> list[Sample]:
    return [sample(str(number), shape) for number, shape in enumerate(shapes)]


@given(shapes=shapes, seed=st.integers(0, 2**32 - 1))
def test_each_sample_is_seen_once_per_epoch_next_to_those_of_its_shape(
    shapes: list[tuple[int, int]], seed: int
) -> None:
    samples = named(shapes)
    for epoch in range(3):
        turn = epoch_order(seed, samples, epoch * len(samples), len(samples))
        assert Counter(one.picture.name for one in turn) == Counter(one.picture.name for one in samples)
        changes = sum(one.shape != other.shape for one, other in pairwise(turn))
        assert changes == len(set(shapes)) - 1


@given(shapes=shapes, seed=st.integers(0, 2**32 - 1), start=st.integers(0, 40), batch=st.integers(1, 5))
def test_the_order_is_the_same_wherever_a_run_starts(
    shapes: list[tuple[int, int]], seed: int, start: int, batch: int
) -> None:
    samples = named(shapes)
    whole = epoch_order(seed, samples, 0, 60)
    parts = [one for place in range(start, 60, batch) for one in epoch_order(seed, samples, place, batch)]
    assert parts[: 60 - start] == whole[start:]


def test_the_order_differs_in_each_epoch_and_for_each_seed() -> None:
    samples = named([(8, 8), (8, 12)] * 4)
    orders = {
        tuple(one.picture.name for one in epoch_order(seed, samples, epoch * 8, 8))
        for seed in range(5)
        for epoch in range(5)
    }
    assert len(orders) > 20
    first = {order[0] for order in orders}
    assert len(first) > 4  # of either shape
    assert epoch_order(42, samples, 0, 50) == epoch_order(42, samples, 0, 50) != epoch_order(43, samples, 0, 50)


def test_a_step_names_its_pictures_by_the_names_that_the_user_knows() -> None:
    samples = [sample("b"), sample("a"), sample("c", kind="class")]
    assert dataset_of(samples, settled(prior_weight=1)).names(0) == ["a", "b", "c"]
    data = dataset_of(samples[:2], settled(batch=1))
    assert data.names(0) + data.names(1) in (["a", "b"], ["b", "a"])


@pytest.mark.parametrize("share", [0, 0.25, 1])
def test_the_empty_caption_takes_the_place_of_its_share(share: float) -> None:
    family: Any = Plain()
    samples = [sample(name) for name in "abcd"]
    config = settled(batch=4, micro_batch=4, caption_dropout=share)
    data = dataset_of(samples, config)
    spoken, silent = [], set()
    for step in range(500):
        [batch] = data.batches(family, step)
        own = [one.picture.caption for one in epoch_order(config.seed, samples, step * 4, 4)]
        assert all(caption in ("", expected) for caption, expected in zip(said(batch.cond), own, strict=True))
        spoken += said(batch.cond)
        silent.add(said(batch.cond).count(""))
    assert spoken.count("") / 2000 == pytest.approx(share, abs=0.03)
    assert silent == {0: {0}, 0.25: {0, 1, 2, 3, 4}, 1: {4}}[share]  # of the four in a step, each by itself


def test_each_step_draws_new_latents_from_each_photo_s_own_distribution() -> None:
    family: Any = Plain()
    numbers = {"a": (-10.0, 1.0), "b": (10.0, 3.0)}
    data = dataset_of([sample(name, mean=mean, std=std) for name, (mean, std) in numbers.items()], settled())
    drawn: dict[str, list[float]] = {"a": [], "b": []}
    noises, times = [], []
    for step in range(1000):
        [batch] = data.batches(family, step)
        [again] = data.batches(family, step)
        assert torch.equal(batch.latents, again.latents)  # a function of the step
        for name, latent in zip(said(batch.cond), batch.latents, strict=True):
            drawn[name].append(latent.item())
        noises.append(batch.noise.flatten())
        times.append(batch.timesteps)
    for name, (mean, std) in numbers.items():
        values = torch.tensor(drawn[name])
        assert values.mean().item() == pytest.approx(mean, abs=0.3)
        assert values.std().item() == pytest.approx(std, rel=0.1)
    # And what is drawn for one is no hint at what is drawn for another, nor at its noise.
    noise = torch.stack(noises)
    apart = (torch.tensor(drawn["a"]) + 10, noise[:, 0], noise[:, 1], torch.stack(times)[:, 0].float())
    together = torch.corrcoef(torch.stack(apart)) - torch.eye(4)
    assert together.abs().max() < 0.12


def test_all_views_of_a_photo_have_their_turn() -> None:
    family: Any = Plain()
    views = [View(torch.full((1, 1, 1, 1), float(number)), torch.zeros(1, 1, 1, 1), {}, {}) for number in range(4)]
    one = Sample(Picture(Path("a.png"), "a", "a"), views)
    data = dataset_of([one], settled(batch=1))
    seen = Counter(batch.latents.item() for step in range(400) for batch in data.batches(family, step))
    assert seen.keys() == {0, 1, 2, 3}
    assert min(seen.values()) > 60


# Micro-batches


MIXED = [(4, 4), (4, 6), (4, 4), (4, 4), (6, 4), (4, 6), (4, 4)]


def step_of(micro_batch: int, step: int, prior_weight: float) -> list[MicroBatch]:
    """One step of photos in three shapes, one of them twice, with class pictures where they have a weight."""
    family: Any = Plain()
    made = [
        sample(
            f"photo {number}",
            shape,
            size={"told": torch.tensor([[number]])},
            masks={"face": torch.full((1, 1, *shape), 0.1 * number)},
        )
        for number, shape in enumerate(MIXED)
    ]
    if prior_weight:
        made += [
            sample(f"class {number}", (4, 4), size={"told": torch.tensor([[-1]])}, kind="class") for number in range(5)
        ]
    config = settled(batch=8, micro_batch=micro_batch, prior_weight=prior_weight, mask="face", caption_dropout=0.3)
    return list(dataset_of(made, config).batches(family, step))


def rows(batches: list[MicroBatch]) -> list[dict[str, Any]]:
    """What each sample of a step is given."""
    return [
        {
            "caption": said(batch.cond)[row],
            "told": batch.cond["told"][row].item(),
            "latents": batch.latents[row].tolist(),
            "noise": batch.noise[row].tolist(),
            "time": batch.timesteps[row].item(),
            "mask": 1 if batch.mask is None else batch.mask[row].mean().item(),
            "share": batch.share,
        }
        for batch in batches
        for row in range(len(batch.latents))
    ]


@pytest.mark.parametrize("prior_weight", [0, 0.5, 1])
@pytest.mark.parametrize("step", [0, 1, 7])
def test_a_step_is_the_same_in_micro_batches_of_any_size(step: int, prior_weight: float) -> None:
    whole = rows(step_of(64, step, prior_weight))
    assert len(whole) == (16 if prior_weight else 8)
    for micro_batch in (1, 2, 4, 8):
        batches = step_of(micro_batch, step, prior_weight)
        assert rows(batches) == whole
        assert max(len(batch.latents) for batch in batches) <= micro_batch
    drawn = [row["noise"] for row in whole]
    assert all(one != other for place, one in enumerate(drawn) for other in drawn[:place])  # to each its own
    assert sum(row["share"] for row in whole) == pytest.approx(1 + prior_weight)
    assert rows(step_of(64, step + 1, prior_weight)) != whole


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_all_that_is_in_a_micro_batch_belongs_together(micro_batch: int) -> None:
    for batch in step_of(micro_batch, 0, 0.5):
        count, _, height, width = batch.latents.shape
        assert batch.noise.shape == batch.latents.shape
        assert batch.timesteps.shape == (count,)
        assert {len(tensor) for tensor in batch.cond.values()} == {count}
        prior = (batch.cond["told"] == -1).tolist()
        assert prior in ([[True]] * count, [[False]] * count)  # whose shares differ
        assert batch.share == (0.5 / 8 if prior[0][0] else 1 / 8)
        assert (
            batch.mask is None
            if prior[0][0]
            else batch.mask is not None and batch.mask.shape == (count, 1, height, width)
        )


def test_class_pictures_take_turns_of_their_own() -> None:
    family: Any = Plain()
    samples = [sample(f"photo {number}") for number in range(4)]
    prior = [sample(f"class {number}", kind="class") for number in range(6)]
    config = settled(batch=2, prior_weight=0.5)

    def spoken(data: Dataset) -> list[str]:
        return [caption for step in range(6) for batch in data.batches(family, step) for caption in said(batch.cond)]

    both = Counter(spoken(dataset_of([*samples, *prior], config)))
    assert both == Counter(
        {f"photo {number}": 3 for number in range(4)} | {f"class {number}": 2 for number in range(6)}
    )
    alone = [caption for caption in spoken(dataset_of([*samples, *prior], config)) if caption.startswith("photo")]
    assert alone == spoken(dataset_of(samples, config))  # photos come as they would without


def test_gradients_of_a_step_in_pieces_are_those_of_the_whole_step(
    thin_sd15: Path, tmp_path: Path, photos: list[Path]
) -> None:
    gradients = []
    for micro_batch in (3, 1):
        run = TrainingSetup(thin_sd15, tmp_path, photos, config_of(batch=3, micro_batch=micro_batch)).start()
        batches = list(run.data.batches(run.branch, 0))
        assert len(batches) == 3 // micro_batch
        for batch in batches:
            losses = run.branch.loss(batch.latents, batch.cond, batch.noise, batch.timesteps, run.config, batch.mask)
            (losses.sum() * batch.share).backward()
        gradients.append([param.grad for group in run.groups for param in group["params"]])
    assert any(gradient.abs().max() > 1e-4 for gradient in gradients[0])
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(*gradients, strict=True))


def test_a_photo_is_decoded_once_for_all_uses(
    tmp_path: Path, tiny_sd15: Path, photos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []
    open_image = Image.open

    def spy(file: Path, *arguments: object) -> Image.Image:
        opened.append(Path(file))
        return open_image(file, *arguments)

    config = config_of(resolution="32,64", crops=2, flip="true")
    bench = TrainingSetup(tiny_sd15, tmp_path, photos, config)
    monkeypatch.setattr(views_.Image, "open", spy)
    run = bench.start()
    assert len(run.data.samples) == 2 * len(photos)
    assert sorted(opened) == sorted(photos)
