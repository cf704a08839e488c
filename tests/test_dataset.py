"""The training set: order, seeds, pixels and captions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw

from tests.bench import Bench, config_of
from trainer.dataset import Dataset, captions_for, derive, load_pixels, order


@pytest.mark.parametrize("photos", [1, 2, 7])
def test_each_photo_is_seen_once_per_epoch(photos: int) -> None:
    epochs = [order(42, photos, epoch * photos, photos) for epoch in range(20)]
    assert all(sorted(epoch) == list(range(photos)) for epoch in epochs)
    assert photos == 1 or len({tuple(epoch) for epoch in epochs}) > 1  # shuffled anew


def test_the_order_is_a_function_of_the_seed() -> None:
    whole = order(42, 7, 0, 50)
    in_batches = [row for start in range(0, 50, 4) for row in order(42, 7, start, 4)]
    assert in_batches[:50] == whole  # wherever a run starts
    assert order(43, 7, 0, 50) != whole


def test_each_use_of_randomness_has_a_seed_of_its_own() -> None:
    uses = [(seed, step, purpose) for seed in (0, 1) for step in (0, 1, 10) for purpose in ("noise", "order")]
    seeds = {derive(*use) for use in uses}
    assert len(seeds) == len(uses)
    assert seeds == {derive(*use) for use in uses}
    assert all(0 <= seed < 2**63 for seed in seeds)


def white_box(pixels: torch.Tensor) -> tuple[int, int, int, int]:
    """left, top, width and height of what is brighter than grey."""
    rows, columns = torch.nonzero(pixels.mean(0) > 0, as_tuple=True)
    left, top = int(columns.min()), int(rows.min())
    return left, top, int(columns.max()) - left + 1, int(rows.max()) - top + 1


@pytest.mark.parametrize("size", [(300, 150), (150, 300), (200, 200), (40, 60)])
def test_photos_are_cut_to_their_centre_and_never_stretched(tmp_path: Path, size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, "black")
    x, y, r = size[0] / 2, size[1] / 2, min(size) / 4
    ImageDraw.Draw(image).ellipse((x - r, y - r, x + r - 1, y + r - 1), fill="white")
    image.save(tmp_path / "circle.png")
    pixels = load_pixels(tmp_path / "circle.png", 64)
    assert pixels.shape == (3, 64, 64)
    left, top, width, height = white_box(pixels)
    assert abs(width - 32) <= 1 and abs(height - 32) <= 1
    assert abs(left - 16) <= 1 and abs(top - 16) <= 1


def test_pixels_fill_the_range_from_minus_one_to_one(tmp_path: Path) -> None:
    image = Image.new("RGB", (64, 64), (255, 0, 51))
    image.save(tmp_path / "plain.png")
    red, green, blue = load_pixels(tmp_path / "plain.png", 64)
    assert (red.unique().item(), green.unique().item()) == (1.0, -1.0)
    assert blue.unique().item() == pytest.approx(51 / 127.5 - 1)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_photos_of_every_mode_have_three_channels(tmp_path: Path, mode: str) -> None:
    Image.new("RGB", (80, 64), "white").convert(mode).save(tmp_path / "photo.jpg")
    assert load_pixels(tmp_path / "photo.jpg", 32).min() > 0.9


def test_real_photos_load(dog_photos: Callable[[int], list[Path]]) -> None:
    for photo in dog_photos(2):
        pixels = load_pixels(photo, 64)
        assert pixels.shape == (3, 64, 64) and pixels.std() > 0.1


def test_captions_are_the_hosted_service_s_unless_a_text_lies_beside_the_photo(tmp_path: Path) -> None:
    photos = [tmp_path / "a.jpg", tmp_path / "b.jpg"]
    assert captions_for(photos, "sks", "dog") == ["A photo of sks dog"] * 2
    (tmp_path / "b.txt").write_text("  a dög on a beach\n", "utf-8")
    assert captions_for(photos, "sks", "dog") == ["A photo of sks dog", "a dög on a beach"]


def test_the_caption_of_a_style_speaks_of_no_photo(tmp_path: Path) -> None:
    assert captions_for([tmp_path / "a.jpg"], "ohwx", "Style") == ["ohwx Style"]


@pytest.mark.parametrize("share", [0, 0.25, 1])
def test_the_empty_caption_takes_the_place_of_its_share(share: float) -> None:
    photos, config = 4, config_of(batch=4, caption_dropout=share)
    said = {"row": torch.arange(photos + 1)}  # the last is the empty caption's
    data = Dataset(["a"] * photos, torch.zeros(photos, 1, 1, 1), torch.zeros(photos, 1, 1, 1), said)
    nobody: Any = None  # no branch is asked where captions are encoded once
    rows = [data.batch(nobody, config, step)[1]["row"].tolist() for step in range(500)]
    assert sum(batch.count(photos) for batch in rows) / 2000 == pytest.approx(share, abs=0.03)
    for step, batch in enumerate(rows):
        expected = order(config.seed, photos, step * 4, 4)
        assert all(row in (photos, own) for row, own in zip(batch, expected, strict=True))


def test_latents_are_drawn_anew_in_each_step_from_each_photo_s_own_distribution() -> None:
    config = config_of(batch=2)
    mean, std = torch.tensor([-10.0, 10.0]).view(2, 1, 1, 1), torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)
    data = Dataset(["a", "b"], mean, std, {"row": torch.arange(3)})
    nobody: Any = None
    drawn: dict[int, list[float]] = {0: [], 1: []}
    for step in range(1000):
        latents, _, generator = data.batch(nobody, config, step)
        again, _, _ = data.batch(nobody, config, step)
        assert torch.equal(latents, again)  # a function of the step
        for row, latent in zip(order(config.seed, 2, step * 2, 2), latents, strict=True):
            drawn[row].append(latent.item())
        assert generator.initial_seed() == derive(config.seed, step, "noise")
    for row in (0, 1):
        values = torch.tensor(drawn[row])
        assert values.mean().item() == pytest.approx(mean[row].item(), abs=0.3)
        assert values.std().item() == pytest.approx(std[row].item(), rel=0.1)


def test_captions_that_are_encoded_in_each_step_are_those_encoded_once(
    thin_sd15: Path, tmp_path: Path, photos: list[Path]
) -> None:
    # The adapters of the text encoder change nothing before they are trained.
    cached = Bench(thin_sd15, tmp_path, photos, config_of(text_encoder_lr=0)).start()
    anew = Bench(thin_sd15, tmp_path, photos, config_of(text_encoder_lr=1e-3)).start()
    assert cached.data.cond is not None
    assert anew.data.cond is None
    for step in range(6):
        ours, theirs = (run.data.batch(run.branch, run.config, step)[1] for run in (cached, anew))
        assert ours.keys() == theirs.keys()
        assert all(torch.allclose(ours[key], theirs[key], atol=1e-6) for key in ours)
