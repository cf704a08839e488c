"""After diffusion: pictures are enlarged without seams, look like film, and get their parts back without an edge."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from tests.helpers.pictures import apart, esrgan, noise, pixels
from trainer.config import looks
from trainer.rendering import film, paste, upscale
from trainer.rendering.upscale import Upscaler

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("weights") / "RealESRGAN_x4plus.pth"
    torch.save({"params_ema": esrgan()}, file)  # as it is published
    return file


@pytest.fixture(scope="module")
def model(file: Path) -> Upscaler:
    return upscale.upscaler(file, CPU)


def whole(image: Image.Image, model: Upscaler) -> Image.Image:
    """What the network makes of the whole picture."""
    with torch.inference_mode():
        bigger = model.network.model(torch.from_numpy(pixels(image)).permute(2, 0, 1)[None].float() / 255)
    levels = (bigger[0].clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
    return Image.fromarray(levels.numpy())


def test_a_published_file_is_read_as_float32_on_the_cpu(model: Upscaler) -> None:
    assert (model.scale, model.multiple, model.network.dtype) == (4, 1, torch.float32)
    assert not model.network.model.training
    assert not any(weight.requires_grad for weight in model.network.model.parameters())
    picture = whole(noise(40, 40), model)
    assert pixels(picture).std() > 20 and np.ptp(pixels(picture)) > 200  # or no comparison below would say anything


def test_other_namings_and_safetensors_are_the_same_model(model: Upscaler, tmp_path: Path) -> None:
    older = model.network.model.state_dict()  # the names of the first ESRGAN, such as 4x-NMKD-Siax has
    assert "model.0.weight" in older
    torch.save(older, tmp_path / "older.pth")
    save_file(esrgan(), tmp_path / "x4.safetensors")
    image = noise(24, 17)
    for name in ("older.pth", "x4.safetensors"):
        read = upscale.upscaler(tmp_path / name, CPU)
        weights, expected = read.network.model.state_dict(), model.network.model.state_dict()
        assert weights.keys() == expected.keys()
        assert [key for key in expected if not torch.equal(weights[key], expected[key])] == []
        # One level: kernels sum in an order that depends on where in memory the weights were loaded.
        assert apart(upscale.upscale(image, read), whole(image, model)) <= 1


def test_a_card_computes_in_what_the_model_supports() -> None:
    def chosen(half: bool, bfloat: bool, device: str) -> torch.dtype:
        network = SimpleNamespace(supports_half=half, supports_bfloat16=bfloat)
        return upscale.dtype_for(network, torch.device(device))

    assert chosen(True, True, "cuda") == torch.float16
    assert chosen(False, False, "cuda") == torch.float32
    assert chosen(True, True, "cpu") == torch.float32


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "cannot be read as an upscaler"),
        (b"<html>not found</html>", "cannot be read as an upscaler"),
        ({"params_ema": esrgan() | {"conv_body.weight": torch.ones(1)}}, "cannot be read as an upscaler"),
        ({name: value for name, value in esrgan().items() if "rdb3" not in name}, "cannot be read as an upscaler"),
        ({"weight": torch.ones(1)}, "its weights are of no model that spandrel knows"),
        ([torch.ones(1)], "cannot be read as an upscaler"),
        (esrgan(0), "no upscaler but a model for Restoration of scale 1; what is wanted is single-image"),
        (esrgan(channels=4), "turns 4 channels into 3; pictures have 3"),
    ],
)
def test_what_is_no_upscaler_is_refused_in_words(content: Any, told: str, tmp_path: Path) -> None:
    file = tmp_path / "other.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(ValueError, match=rf"^other\.pth .*{told}"):
        upscale.upscaler(file, CPU)


class Evil:
    """What a pickle can do when it is read."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return (Path.touch, (self.trace,))


def test_no_code_in_a_file_is_run(tmp_path: Path) -> None:
    torch.save({"params_ema": esrgan(), "more": Evil(tmp_path / "trace")}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"evil\.pth cannot be read"):
        upscale.upscaler(tmp_path / "evil.pth", CPU)
    assert not (tmp_path / "trace").exists()
    torch.load(tmp_path / "evil.pth", weights_only=False)
    assert (tmp_path / "trace").exists()  # the trap works


@pytest.mark.parametrize("size", [(192, 161), (256, 40), (101, 233)])
def test_tiles_leave_no_seam(size: tuple[int, int], model: Upscaler) -> None:
    """Where they see as far as the network does: 19 px here, and 24 of an overlap of 32 are used."""
    image, told = noise(*size), []
    tiled = upscale.upscale(image, model, tile=128, watch=lambda *counts: told.append(counts))
    assert apart(tiled, whole(image, model)) <= 1
    assert len(told) > 1 and told == [(number + 1, len(told)) for number in range(len(told))]


def test_less_overlap_shows_so_the_test_above_can_fail(model: Upscaler) -> None:
    image = noise(252, 100)
    assert apart(upscale.upscale(image, model, tile=128, overlap=2), whole(image, model)) > 20


def test_seams_are_ramps() -> None:
    """A network that makes each tile brighter than the one before: nothing jumps, in either direction."""
    made: list[Tensor] = []

    def network(tile: Tensor) -> Tensor:
        made.append(tile)
        return torch.full_like(tile, len(made) * 20 / 255).repeat_interleave(2, -1).repeat_interleave(2, -2)

    image = Image.new("RGB", (200, 200))
    tiled = pixels(upscale.upscale(image, fake(network, 2), tile=128, overlap=16))[..., 0]
    assert len(made) == 4 and tiled[0, 0] == 20 and tiled[-1, -1] == 80
    assert np.abs(np.diff(tiled, axis=0)).max() <= 4 and np.abs(np.diff(tiled, axis=1)).max() <= 4  # 40 in 16 px: 2.5
    assert (np.diff(tiled, axis=1) >= 0).all() and (np.diff(tiled, axis=0) >= 0).all()


def fake(call: Any, scale: int, multiple: int = 1) -> Upscaler:
    """A network of any behaviour."""

    class Network:
        device, dtype = CPU, torch.float32

        def __call__(self, tile: Tensor) -> Tensor:
            answer: Tensor = call(tile)
            return answer

    return Upscaler("fake.pth", Network(), scale, multiple)


@pytest.mark.parametrize("multiple", [1, 4])
def test_tiles_cover_everything_and_share_enough(multiple: int) -> None:
    for length in [*range(1, 400), 1024, 1536, 2047]:
        for tile, overlap in [(64, 16), (128, 32), (512, 32)]:
            spans = upscale.spans(length, tile, overlap, multiple)
            assert spans[0][0] == 0 and spans[-1][1] == length
            assert all(start % multiple == 0 for start, _ in spans)
            assert all(end - start < tile + multiple for start, end in spans)
            shared = [before[1] - after[0] for before, after in pairwise(spans)]
            assert all(2 * overlap - multiple < one for one in shared)
            assert all(one < two for one, two in pairwise(spans))


def test_a_network_that_groups_pixels_is_tiled_along_its_groups(tmp_path: Path) -> None:
    """RealESRGAN_x2plus has the layers of x4 over pixels in groups of 2 x 2."""
    torch.save({"params_ema": esrgan(channels=12)}, tmp_path / "x2.pth")
    model = upscale.upscaler(tmp_path / "x2.pth", CPU)
    assert (model.scale, model.multiple) == (2, 4)
    image = noise(200, 152)
    assert apart(upscale.upscale(image, model, tile=183, overlap=52), whole(image, model)) <= 1
    assert apart(upscale.upscale(image, replace(model, multiple=1), tile=183, overlap=52), whole(image, model)) > 20


@pytest.mark.parametrize("size", [(1, 1), (1, 20), (20, 1), (2, 3), (7, 5), (13, 20), (19, 19)])
def test_tiny_pictures_are_enlarged_too(size: tuple[int, int], model: Upscaler) -> None:
    image = noise(*size)
    enlarged = upscale.upscale(image, model)
    assert enlarged.size == (size[0] * 4, size[1] * 4) and enlarged.mode == "RGB"
    if min(size) > 1:
        assert apart(enlarged, whole(image, model)) <= 1
    assert upscale.upscale(image, model, factor=0.1).size == tuple(max(1, round(side * 0.1)) for side in size)


def test_every_factor_is_reached(model: Upscaler) -> None:
    image = noise(30, 21)
    full = upscale.upscale(image, model)
    assert apart(upscale.upscale(image, model, factor=4), full) == 0
    for factor, size in ((2, (60, 42)), (1.5, (45, 32)), (6.0, (180, 126)), (1, (30, 21))):
        scaled = upscale.upscale(image, model, factor=factor)
        assert apart(scaled, full.resize(size, Image.Resampling.LANCZOS)) == 0
    for wrong in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"the factor is {wrong}; it must be above 0"):
            upscale.upscale(image, model, factor=wrong)


def test_pictures_in_other_modes_are_taken_as_rgb(model: Upscaler) -> None:
    image = noise(12, 12, mode="L")
    assert apart(upscale.upscale(image, model), upscale.upscale(image.convert("RGB"), model)) == 0


def test_the_factor_is_the_hosted_services() -> None:
    sizes = {(511, 512): 4, (512, 512): 2, (256, 1023): 4, (256, 1024): 2, (1024, 1024): 2, (64, 64): 4}
    assert {size: upscale.sr_factor(*size) for size in sizes} == sizes


def limited(room: int, sides: list[int]) -> Upscaler:
    """A network on a card that has room for tiles of this many px a side."""

    def network(tile: Tensor) -> Tensor:
        sides.append(max(tile.shape[-2:]))
        if sides[-1] > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return tile.repeat_interleave(2, -1).repeat_interleave(2, -2)

    return fake(network, 2)


def test_a_full_card_gets_smaller_tiles() -> None:
    image, sides = noise(700, 300), []
    assert apart(upscale.upscale(image, limited(150, sides)), image.resize((1400, 600), Image.Resampling.NEAREST)) == 0
    assert sides[:3] == [512, 256, 128] and set(sides[3:]) == {128}
    sides.clear()
    upscale.upscale(noise(300, 200), limited(150, sides))
    assert sides[:3] == [300, 150, 150]  # not 512, which would be the very same tile
    sides.clear()
    with pytest.raises(torch.OutOfMemoryError, match=r"fake\.pth has no room on the card, even for tiles of 64 px"):
        upscale.upscale(image, limited(60, sides))
    assert sides == [512, 256, 128, 64]


def test_half_precision_that_overflows_is_computed_in_full() -> None:
    class Network:
        device, dtype = CPU, torch.float16

        def float(self) -> None:
            self.dtype = torch.float32

        def __call__(self, tile: Tensor) -> Tensor:
            assert tile.dtype == self.dtype
            return tile if tile.dtype == torch.float32 else tile * torch.nan

    image = noise(20, 20)
    assert apart(upscale.upscale(image, Upscaler("half.pth", Network(), 1, 1)), image) == 0
    with pytest.raises(RuntimeError, match=r"fake\.pth gave values that are not finite numbers"):
        upscale.upscale(image, fake(lambda tile: tile * torch.nan, 1))


def test_half_precision_gives_the_same_picture(file: Path, model: Upscaler) -> None:
    half = upscale.upscaler(file, CPU)
    half.network.half()
    image = noise(24, 20)
    assert 0 < apart(upscale.upscale(image, half), upscale.upscale(image, model)) <= 2


def test_a_watcher_may_stop_it(model: Upscaler) -> None:
    def stop(_done: int, _tiles: int) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        upscale.upscale(noise(20, 20), model, watch=stop)


# Film


SAME = [[1, 0, 0], [0, 1, 0], [0, 0, 1]]


def look(curves: Any = (((0, 0), (1, 1)),) * 3, saturation: float = 1.0, matrix: Any = SAME) -> Any:
    return SimpleNamespace(curves=curves, saturation=saturation, matrix=matrix)


LOOKS = looks.film_looks(ROOT / "presets")
RAMP = Image.fromarray(np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2))
HUES = {"red": 0, "yellow": 43, "green": 85, "cyan": 128, "blue": 170, "magenta": 213}
SKIN = (224, 172, 140), (188, 138, 110), (120, 82, 62)


def graded(name: str, *colours: tuple[int, int, int]) -> Any:
    """Colours (N, 3) in a look."""
    chart = Image.fromarray(np.array([colours], np.uint8))
    return pixels(film.grade(chart, LOOKS[name]))[0]


def chart(hue: str) -> list[tuple[int, int, int]]:
    """Patches of a hue, from pale to strong, that leave room for more."""
    hsv = [(HUES[hue], saturation, value) for saturation in (60, 100, 140) for value in (90, 140, 190)]
    return [Image.new("HSV", (1, 1), one).convert("RGB").getpixel((0, 0)) for one in hsv]  # type: ignore[misc]


def saturation(colours: Any) -> float:
    """Mean share of the brightest channel by which the darkest is below it."""
    levels = np.array(colours, float)
    return float(((levels.max(1) - levels.min(1)) / levels.max(1)).mean())


def luma(colours: Any) -> Any:
    return np.array(colours) @ film.LUMA


def contrast(name: str) -> float:
    dark, light = luma(graded(name, (64,) * 3, (192,) * 3))
    return float(light - dark) / 128


def test_the_looks_are_those_that_the_hosted_service_names() -> None:
    assert list(LOOKS) == ["Film Velvia", "Film Portra", "Ektar"]
    for one in LOOKS.values():
        assert np.allclose(np.sum(one.matrix, axis=1), 1) and len(one.curves) == 3
        for curve in one.curves:
            points = np.array(curve)
            assert (np.diff(points, axis=0) > 0).all() and points.min() >= 0 and points.max() <= 1
            assert points[0, 0] == 0 and points[-1, 0] == 1


def test_a_look_that_changes_nothing_changes_nothing() -> None:
    assert apart(film.grade(noise(50, 40), look()), noise(50, 40)) == 0


def test_the_parts_of_a_look_do_what_they_say() -> None:
    image = noise(50, 40)
    grey = pixels(film.grade(image, look(saturation=0.0)))
    assert np.abs(grey - luma(pixels(image))[..., None]).max() <= 1
    swapped = film.grade(image, look(matrix=[[0, 0, 1], [0, 1, 0], [1, 0, 0]]))
    assert np.abs(pixels(swapped) - pixels(image)[..., ::-1]).max() == 0
    only_red = film.grade(image, look([((0, 0.2), (1, 0.6)), ((0, 0), (1, 1)), ((0, 0), (1, 1))]))
    assert np.abs(pixels(only_red)[..., 0] - (51 + 0.4 * pixels(image)[..., 0])).max() <= 1
    assert np.abs(pixels(only_red) - pixels(image))[..., 1:].max() == 0


def test_curves_go_through_their_points_smoothly_and_never_back() -> None:
    points = [(0, 0.1), (0.2, 0.1), (0.25, 0.6), (0.7, 0.65), (1, 1)]
    x = np.linspace(0, 1, 2001)
    y = film.curve(points, x)
    assert np.allclose(film.curve(points, np.array([p[0] for p in points])), [p[1] for p in points])
    assert (np.diff(y) >= -1e-12).all() and y.min() > 0.1 - 1e-12 and y.max() < 1 + 1e-12
    slopes = np.diff(y) / np.diff(x)
    assert np.abs(np.diff(slopes)).max() < 1  # a broken line jumps by 10
    assert np.allclose(film.curve([(0, 0), (0.5, 0.25), (1, 0.5)], x), x / 2)


@pytest.mark.parametrize("name", LOOKS)
def test_greys_stay_in_order_and_nearly_grey(name: str) -> None:
    levels = pixels(film.grade(RAMP, LOOKS[name]))[0]
    assert (np.diff(levels, axis=0) >= 0).all() and np.ptp(luma(levels)) > 200
    assert np.ptp(levels, axis=1).max() <= 20
    assert len(set(map(tuple, levels))) > 190  # no steps


@pytest.mark.parametrize("name", LOOKS)
def test_the_table_is_fine_enough(name: str) -> None:
    image = noise(64, 64)
    exact = film.developed(pixels(image) / 255, LOOKS[name]) * 255
    assert np.abs(pixels(film.grade(image, LOOKS[name])) - exact).mean() < 1


def test_velvia_is_saturated_and_hard() -> None:
    for hue in ("red", "green", "blue"):
        assert saturation(graded("Film Velvia", *chart(hue))) > 1.25 * saturation(chart(hue))
    assert contrast("Film Velvia") > 1.1
    assert luma(graded("Film Velvia", (40,) * 3)) < 30 and (graded("Film Velvia", (0,) * 3) == 0).all()


def test_portra_is_soft_warm_and_kind_to_skin() -> None:
    assert contrast("Film Portra") < 0.95
    assert (graded("Film Portra", (0,) * 3) >= 10).all()
    red, green, blue = graded("Film Portra", (128,) * 3)[0]
    assert red > green > blue
    everything = [patch for hue in HUES for patch in chart(hue)]
    assert saturation(graded("Film Portra", *everything)) < 0.95 * saturation(everything)
    for before, after in zip(SKIN, graded("Film Portra", *SKIN), strict=True):
        hues = [Image.new("RGB", (1, 1), tuple(map(int, one))).convert("HSV").getpixel((0, 0))[0]  # type: ignore[index]
                for one in (before, after)]  # fmt: skip
        assert abs(hues[0] - hues[1]) <= 4 and luma(after) > luma(before)


def test_ektar_is_red_and_cool_in_the_shadows() -> None:
    gains = {hue: saturation(graded("Ektar", *chart(hue))) / saturation(chart(hue)) for hue in HUES}
    assert gains["red"] > 1.15 and gains["red"] > max(gains["yellow"], gains["magenta"])  # the hues beside it
    red, green, blue = graded("Ektar", (40,) * 3)[0]
    assert blue > green > red and blue - red >= 8
    assert 1.0 < contrast("Ektar") < contrast("Film Velvia")


def test_the_looks_differ_from_each_other() -> None:
    patches = [patch for hue in HUES for patch in chart(hue)]
    shown = [graded(name, *patches) for name in LOOKS]
    for place, one in enumerate(shown):
        for other in [np.array(patches), *shown[place + 1 :]]:
            assert np.abs(one - other).mean() > 5


def test_grain_is_the_same_for_the_same_seed() -> None:
    image = Image.new("RGB", (90, 70), (120, 140, 100))
    assert apart(film.grain(image, 7), film.grain(image, 7)) == 0
    assert apart(film.grain(image, 7), film.grain(image, 8)) > 2
    film.grain(image, 2**32 - 1)  # the largest seed of a prompt


def grain_of(level: int, side: int = 256) -> Any:
    """What grain adds to a grey of this level."""
    image = Image.new("RGB", (side, side), (level,) * 3)
    return pixels(film.grain(image, 0)) - level


def test_grain_is_luminance_noise_of_two_scales() -> None:
    noisy = grain_of(128)
    assert np.ptp(noisy, axis=2).max() == 0
    grey = noisy[..., 0].astype(float)
    assert grey.std() == pytest.approx(2.55, rel=0.1)  # 0.01 of the range
    near, far = ((grey[:, distance:] * grey[:, :-distance]).mean() / grey.var() for distance in (1, 9))
    assert 0.15 < near < 0.6 and abs(far) < 0.05  # white noise has 0 in both


def test_grain_keeps_the_mean_and_is_strongest_in_mid_tones() -> None:
    for level in (0, 10, 64, 128, 200, 250, 255):
        assert abs(grain_of(level).mean()) < 0.1
    for seed in range(5):  # of a small picture, in which noise alone would have a mean of its own
        image = noise(16, 16)
        image = Image.blend(image, Image.new("RGB", image.size, (128,) * 3), 0.8)
        assert abs(pixels(film.grain(image, seed)).mean() - pixels(image).mean()) < 0.1
    spread = {level: float(grain_of(level).std()) for level in (0, 20, 64, 128, 192, 235, 255)}
    assert spread[0] == spread[255] == 0
    assert spread[20] < spread[64] < spread[128] > spread[192] > spread[235]


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (5, 7)])
def test_tiny_pictures_are_finished_too(size: tuple[int, int]) -> None:
    image = noise(*size)
    assert film.grade(image, LOOKS["Ektar"]).size == film.grain(image, 0).size == size
    assert apart(film.grain(image, 0), image) < 15


# Faces


def test_faces_are_worth_it_between_the_hosted_services_shares() -> None:
    size = 1000, 1000
    assert paste.worth_it((0, 0, 100, 100), size) is None
    assert paste.worth_it((0, 0, 60, 50), size) is None and paste.worth_it((0, 0, 500, 600), size) is None
    small = paste.worth_it((0, 0, 50, 50), size)
    assert small == "the face is 0.25% of the picture, and what is below 0.3% is too small to be re-rendered"
    large = paste.worth_it((0, 0, 700, 600), size)
    assert large == "the face is 42% of the picture, and what is above 30% is large enough as it is"
    assert paste.worth_it((10, 10, 10, 10), size) is not None


@pytest.mark.parametrize(
    ("box", "size", "square"),
    [
        ((400, 400, 500, 600), (1000, 1000), (270, 320, 630, 680)),  # 1.8 x 200, around (450, 500)
        ((0, 10, 100, 60), (1000, 1000), (0, 0, 180, 180)),
        ((950, 900, 1010, 1000), (1000, 1000), (820, 820, 1000, 1000)),
        ((100, 100, 300, 400), (400, 800), (0, 50, 400, 450)),  # 540 do not fit
        ((3, 2, 4, 4), (5, 4), (1, 0, 5, 4)),
        ((1.2, 1.4, 11.6, 9.3), (100, 100), (0, 0, 19, 19)),
    ],
)
def test_the_square_around_a_face(box: Any, size: tuple[int, int], square: Any) -> None:
    found = paste.face_square(box, size)
    assert found == square and all(type(side) is int for side in found)


def test_the_margin_can_be_another() -> None:
    assert paste.face_square((400, 400, 500, 500), (1000, 1000), margin=3) == (300, 300, 600, 600)


@pytest.mark.parametrize("square", [(20, 30, 120, 130), (0, 0, 64, 64), (136, 86, 200, 150), (50, 50, 59, 59)])
def test_a_patch_fades_into_its_square(square: Any) -> None:
    left, top, right, bottom = square
    picture, patch = noise(200, 150), Image.new("RGB", (512, 512), (9, 200, 77))
    kept = picture.copy()
    pasted = paste.paste(picture, patch, square)
    assert apart(picture, kept) == 0  # a copy was pasted into
    before, after = pixels(picture), pixels(pasted)
    outside = np.ones(before.shape[:2], bool)
    outside[top + 1 : bottom - 1, left + 1 : right - 1] = False  # the edge of the square counts as outside
    assert (after[outside] == before[outside]).all()
    side = right - left
    inner = slice(top + side // 5, bottom - side // 5), slice(left + side // 5, right - side // 5)
    assert (after[inner] == (9, 200, 77)).all()


def test_a_patch_fades_smoothly() -> None:
    picture, patch = Image.new("RGB", (300, 300)), Image.new("RGB", (77, 77), (250, 250, 250))
    row = pixels(paste.paste(picture, patch, (50, 50, 250, 250)))[150, :, 0]
    assert row[50] == row[249] == 0 and row[70] == row[229] == 250
    assert (np.diff(row[50:71]) > 0).all() and np.diff(row).max() < 250 * 2 / 20  # smoothstep's steepest is 1.5 / width
    assert (row == row[::-1]).all()
    assert np.diff(row)[50] < 5  # it starts flat


def test_a_patch_is_scaled_to_its_square() -> None:
    picture, patch = noise(100, 100), noise(100, 100, 1).resize((800, 800), Image.Resampling.NEAREST)
    pasted = paste.paste(picture, patch, (0, 0, 100, 100))
    shrunk = patch.resize((100, 100), Image.Resampling.LANCZOS)
    box = (20, 20, 80, 80)
    assert apart(pasted.crop(box), shrunk.crop(box)) == 0


# Masks


def test_a_mask_keeps_the_originals_pixels_bit_for_bit() -> None:
    new, original = noise(256, 64), noise(256, 64, 1)
    mask = Image.fromarray(np.repeat(np.arange(256, dtype=np.uint8)[None], 64, axis=0))
    mixed, one, other = (pixels(image) for image in (paste.paste_mask(new, original, mask), new, original))
    assert (mixed[:, 0] == other[:, 0]).all() and (mixed[:, 255] == one[:, 255]).all()
    share = np.arange(256)[None, :, None] / 255
    assert np.abs(mixed - (share * one + (1 - share) * other)).max() <= 1
    with pytest.raises(ValueError, match="must have one size, and have 256 x 64, 256 x 64, 8 x 9 px"):
        paste.paste_mask(new, original, mask.resize((8, 9)))


def square_mask(side: int = 100, low: int = 40, high: int = 60) -> Image.Image:
    levels = np.zeros((side, side), np.uint8)
    levels[low:high, low:high] = 255
    return Image.fromarray(levels)


@pytest.mark.parametrize("px", [0, 1, 2, 3, 4, 5, 9, 13, 17, 39])
def test_a_mask_grows_and_shrinks_by_px(px: int) -> None:
    assert apart(paste.grow(square_mask(), px), square_mask(100, 40 - px, 60 + px)) == 0
    shrunk = square_mask(100, 40 + px, 60 - px) if px < 10 else Image.new("L", (100, 100))
    assert apart(paste.grow(square_mask(), -px), shrunk) == 0
    assert apart(paste.grow(square_mask(100, 50, 51), px), square_mask(100, 50 - px, 51 + px)) == 0  # without gaps


def test_a_mask_grows_by_words_and_shares() -> None:
    mask = square_mask()
    for amount, px in {"5": 5, " -3 ": -3, "5%": 5, "-2%": -2, "4.4": 4, "0%": 0, "+1": 1}.items():
        assert apart(paste.grow(mask, amount), paste.grow(mask, px)) == 0
    wide = mask.crop((0, 30, 100, 70))
    assert apart(paste.grow(wide, "5%"), paste.grow(wide, 5)) == 0  # of the longer side
    for wrong in ("", "%", "much", "5px", "nan", "inf", "1e999%"):
        with pytest.raises(ValueError, match=r"a mask cannot grow by .* such as 20 or -5, or a share such as 5%"):
            paste.grow(mask, wrong)


def test_a_growing_mask_keeps_to_the_picture() -> None:
    assert apart(paste.grow(square_mask(), 10**9), Image.new("L", (100, 100), 255)) == 0
    assert apart(paste.grow(square_mask(), -(10**9)), Image.new("L", (100, 100))) == 0
    corner = square_mask(100, 0, 50)
    assert apart(paste.grow(corner, -10), square_mask(100, 0, 40)) == 0  # not from the picture's edges
    soft = noise(60, 50, mode="L")
    assert apart(paste.grow(soft, 0), soft) == 0
    plain = pixels(soft)
    assert pixels(paste.grow(soft, 3))[20, 20] == plain[17:24, 17:24].max()
    assert pixels(paste.grow(soft, -3))[20, 20] == plain[17:24, 17:24].min()


def test_a_mask_is_softened() -> None:
    mask = square_mask(100, 20, 80)
    assert apart(paste.soften(mask, 0), mask) == 0
    row = pixels(paste.soften(mask, 4))[50]
    assert row[0] == 0 and row[50] == 255 and 100 < row[20] < 155
    assert (np.diff(row[:50]) >= 0).all() and np.diff(row).max() < 40
    assert 0 < row[16] < 60 and row[10] < 5
    for wrong in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"cannot be blurred by {wrong} px; it must be 0 or more"):
            paste.soften(mask, wrong)
