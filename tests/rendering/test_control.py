"""ControlNets: what they look at, which base they fit, and that the stock pipelines heed them and nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, ControlNetUnionModel, FluxControlNetModel
from PIL import Image, ImageDraw, ImageOps
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    DPTImageProcessor,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrImageProcessor,
    RTDetrResNetConfig,
    VitPoseBackboneConfig,
    VitPoseConfig,
    VitPoseForPoseEstimation,
    VitPoseImageProcessor,
)

from tests.helpers.shared import SHARED
from trainer.branches.protocol import load_branch
from trainer.contract.prompts import CONTROLS
from trainer.library.bases import Base
from trainer.rendering import control, preprocessors
from trainer.rendering.pipelines import pipeline_for
from trainer.rendering.preprocessors import Point

CPU = torch.device("cpu")
DOG = SHARED / "data" / "subjects" / "dog" / "00.jpg"
needs_shared = pytest.mark.skipif(not DOG.is_file(), reason="the photos in ../shared are not on this machine")
SIDE = 64
ROUNDING = 1e-4  # of latents, which lie between -6 and 6 here


def nowhere(name: str) -> Path:
    raise AssertionError(f"nobody needs {name}")


def square(size: int = 256) -> Image.Image:
    """A dark square in the middle half of a light picture."""
    picture = Image.new("RGB", (size, size), (200, 200, 200))
    ImageDraw.Draw(picture).rectangle((size // 4, size // 4, 3 * size // 4, 3 * size // 4), fill=(40, 60, 80))
    return picture


# What a control model looks at


def test_there_is_an_outline_of_every_kind() -> None:
    assert set(preprocessors.PREPROCESSORS) == set(CONTROLS)
    with pytest.raises(ValueError, match=r"no control 'mlsd'; there are canny, depth, pose, tile, lineart"):
        preprocessors.control_image("mlsd", square(), nowhere, CPU)


@pytest.mark.parametrize("kind", ["canny", "lineart"])
@pytest.mark.parametrize("size", [64, 256, 900])
def test_lines_are_where_edges_are_and_nowhere_else(kind: str, size: int) -> None:
    drawn = preprocessors.control_image(kind, square(size), nowhere, CPU)
    assert drawn.size == (size, size) and drawn.mode == "RGB"
    light = np.asarray(drawn).max(2)
    edge, reach = size // 4, max(3, size // 50)
    for row in (light[size // 2], light[:, size // 2]):
        assert row[edge - reach : edge + reach].max() > 200
        assert row[3 * edge - reach : 3 * edge + reach].max() > 200
        for inside in (row[: edge - 2 * reach], row[edge + 2 * reach : 3 * edge - 2 * reach]):
            assert inside.max() == 0


@needs_shared
@pytest.mark.parametrize("kind", ["canny", "lineart"])
def test_a_photo_becomes_a_line_drawing(kind: str) -> None:
    """A few white lines on much black: those of a synthetic square in the photo are among them."""
    with Image.open(DOG) as opened:
        photo = ImageOps.fit(opened.convert("RGB"), (320, 256))
    before = photo.tobytes()
    bare = np.asarray(preprocessors.control_image(kind, photo, nowhere, CPU)).max(2)
    assert photo.tobytes() == before
    assert 0.005 < (bare > 127).mean() < 0.25 and (bare < 32).mean() > 0.7
    ImageDraw.Draw(photo).rectangle((0, 0, 60, 60), fill=(0, 0, 0))
    changed = np.asarray(preprocessors.control_image(kind, photo, nowhere, CPU)).max(2)
    assert changed.shape == (256, 320)
    assert (changed[10:50, 57:64].max(1) > 127).mean() > 0.8 and changed[10:50, 10:50].max() == 0


def test_tile_is_the_picture_itself() -> None:
    grey = square().convert("L")
    assert preprocessors.control_image("tile", square(), nowhere, CPU).tobytes() == square().tobytes()
    assert preprocessors.control_image("tile", grey, nowhere, CPU).tobytes() == grey.convert("RGB").tobytes()


# By models


def make_depth(folder: Path) -> None:
    backbone = Dinov2Config(
        image_size=70, patch_size=14, hidden_size=16, num_hidden_layers=4, num_attention_heads=2,
        out_indices=[1, 2, 3, 4], reshape_hidden_states=False,
    )  # fmt: skip
    DepthAnythingForDepthEstimation(
        DepthAnythingConfig(
            backbone_config=backbone, patch_size=14, reassemble_hidden_size=16, neck_hidden_sizes=[8, 8, 8, 8],
            fusion_hidden_size=8, head_hidden_size=8,
        )
    ).save_pretrained(folder)  # fmt: skip
    size = {"height": 70, "width": 70}
    DPTImageProcessor(size=size, keep_aspect_ratio=True, ensure_multiple_of=14).save_pretrained(folder)


def make_people(folder: Path, person: bool) -> None:
    """What finds four people everywhere, or four chairs."""
    model = RTDetrForObjectDetection(
        RTDetrConfig(
            backbone_config=RTDetrResNetConfig(
                embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], layer_type="basic",
                out_features=["stage2", "stage3", "stage4"],
            ),
            encoder_hidden_dim=16, encoder_in_channels=[8, 8, 8], encoder_ffn_dim=16, encoder_attention_heads=2,
            d_model=16, num_queries=4, decoder_in_channels=[16, 16, 16], decoder_ffn_dim=16, decoder_layers=1,
            decoder_attention_heads=2, decoder_n_points=2, num_denoising=0, anchor_image_size=None,
            id2label={0: "person", 1: "chair"}, label2id={"person": 0, "chair": 1},
        )
    )  # fmt: skip
    for layer in model.model.decoder.class_embed:
        nn.init.zeros_(layer.weight)
        layer.bias.data = torch.tensor([8.0, -8.0] if person else [-8.0, 8.0])
    model.save_pretrained(folder)
    RTDetrImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)


def make_pose(folder: Path, sure: float) -> None:
    """What sees every point at about `sure`, at a random place."""
    backbone = VitPoseBackboneConfig(
        image_size=[64, 48], patch_size=[16, 16], hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        out_indices=[2],
    )  # fmt: skip
    model = VitPoseForPoseEstimation(VitPoseConfig(backbone_config=backbone, num_labels=17, use_simple_decoder=True))
    nn.init.normal_(model.head.conv.weight, std=0.01)
    nn.init.constant_(model.head.conv.bias, sure)
    model.save_pretrained(folder)
    VitPoseImageProcessor(size={"height": 64, "width": 48}).save_pretrained(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny random models that look at pictures, of the real architectures."""
    folder = tmp_path_factory.mktemp("models")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        make_depth(folder / "depth")
        make_people(folder / "people", True)
        make_people(folder / "chairs", False)
        make_pose(folder / "pose", 0.9)
        make_pose(folder / "unsure", -0.5)
    return folder


@pytest.fixture
def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 120, 3), np.uint8))


def test_depth_fills_the_range_of_grey(models: Path, noise: Image.Image) -> None:
    asked: list[str] = []

    def find(name: str) -> Path:
        asked.append(name)
        return models / name

    seen = preprocessors.control_image("depth", noise, find, CPU)
    assert seen.size == noise.size and asked == ["depth"]
    assert seen.getextrema() == ((0, 255),) * 3  # the farthest and the nearest
    levels = np.asarray(seen)
    assert (levels[..., 0] == levels[..., 1]).all() and len(np.unique(levels)) > 50
    flipped = preprocessors.control_image("depth", ImageOps.mirror(noise), find, CPU)
    assert flipped.tobytes() != seen.tobytes()


def test_missing_weights_of_an_annotator_are_reported(models: Path, noise: Image.Image, tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        make_depth(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["head.conv3.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"1 weights are missing, head\.conv3\.weight among them"):
        preprocessors.control_image("depth", noise, lambda _name: tmp_path, CPU)
    with pytest.raises(OSError):
        preprocessors.control_image("depth", noise, lambda _name: tmp_path / "none", CPU)


def test_people_become_stick_figures(models: Path, noise: Image.Image) -> None:
    asked: list[str] = []

    def find(name: str) -> Path:
        asked.append(name)
        return models / name

    seen = preprocessors.control_image("pose", noise, find, CPU)
    assert seen.size == noise.size and asked == ["people", "pose"]
    colours = {colour for _, colour in seen.getcolors(100_000)}
    assert (0, 0, 0) in colours and len(colours & set(preprocessors.COLOURS)) > 5


def test_a_picture_without_people_is_reported(models: Path, noise: Image.Image) -> None:
    for people, points in (("chairs", "pose"), ("people", "unsure")):
        folders = {"people": models / people, "pose": models / points}
        with pytest.raises(ValueError, match="no person was found in the picture"):
            preprocessors.control_image("pose", noise, folders.__getitem__, CPU)


def test_a_body_has_the_neck_between_its_shoulders() -> None:
    points: list[Point] = [(float(place), 10.0 * place) for place in range(17)]
    made = preprocessors.body(points)
    assert made[0] == points[0] and made[1] == (5.5, 55.0)
    assert made[2:8] == [points[place] for place in (6, 8, 10, 5, 7, 9)]  # right arm, left arm
    assert made[8:14] == [points[place] for place in (12, 14, 16, 11, 13, 15)]  # right leg, left leg
    assert made[14:] == [points[place] for place in (2, 1, 4, 3)]  # right eye, left eye, right ear, left ear
    points[6] = None
    assert preprocessors.body(points)[1] is None and preprocessors.body(points)[2] is None


def test_limbs_go_from_point_to_point_in_their_colours() -> None:
    person: list[Point] = [None] * 18
    person[1], person[2], person[3] = (256.0, 100.0), (156.0, 100.0), (156.0, 300.0)  # neck, right shoulder, elbow
    drawn = preprocessors.draw_people([person], (640, 512))
    assert drawn.size == (640, 512)
    assert drawn.getpixel((256, 100)) == preprocessors.COLOURS[1] == (255, 85, 0)
    assert drawn.getpixel((156, 300)) == preprocessors.COLOURS[3] == (255, 255, 0)
    assert drawn.getpixel((206, 100)) == (153, 0, 0)  # neck to right shoulder: the first limb
    assert drawn.getpixel((156, 200)) == (153, 102, 0)  # shoulder to elbow: the third one
    assert drawn.getpixel((206, 110)) == drawn.getpixel((166, 200)) == (0, 0, 0)
    person[2] = None
    alone = np.asarray(preprocessors.draw_people([person], (640, 512)))
    assert (alone.max(2) > 0).sum() < 150  # two points, and no limb has both ends
    assert (
        preprocessors.COLOURS[-1] == (255, 0, 85)
        and len(preprocessors.COLOURS) == 18
        and len(preprocessors.LIMBS) == 17
    )


def test_every_person_is_drawn_and_lines_widen_with_the_picture() -> None:
    def person(x: float, size: int) -> list[Point]:
        return [None, (x * size, 0.2 * size), (x * size, 0.8 * size), *[None] * 15]

    two = np.asarray(preprocessors.draw_people([person(0.25, 512), person(0.75, 512)], (512, 512))).max(2)
    wide = np.asarray(preprocessors.draw_people([person(0.25, 1024)], (1024, 1024))).max(2)
    assert (two[256] > 0).sum() == 2 * (two[256, :256] > 0).sum() == 2 * 9
    assert (wide[512] > 0).sum() == 17


# The models


FAMILIES = ("sd15", "sdxl1", "flux1")
OTHERS = ("sdxl1", "flux1", "sdxl1-union", "flux1-union")


@pytest.fixture(scope="module")
def branch_of(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """branch_of(name): the tiny base of a family, loaded once."""
    loaded: dict[str, Any] = {}

    def load(name: str) -> Any:
        if name not in loaded:
            folder = request.getfixturevalue(f"tiny_{name}")
            loaded[name] = load_branch(Base(1, "tiny", name, path=folder), CPU, tmp_path_factory.mktemp("cache"))
        return loaded[name]

    return load


@pytest.fixture(scope="module")
def made(branch_of: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """made(name): the folder of a control model for a family; "sdxl1-union" and "flux1-union" know several kinds."""
    root = tmp_path_factory.mktemp("controls")

    def make(name: str) -> Path:
        if not (root / name).exists():
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                awake(new_control(name, branch_of(name.split("-")[0]))).save_pretrained(root / name)
        return root / name

    return make


def new_control(name: str, branch: Any) -> Any:
    if name == "sdxl1-union":
        names = ("block_out_channels", "down_block_types", "layers_per_block", "transformer_layers_per_block",
                 "norm_num_groups", "attention_head_dim", "cross_attention_dim", "use_linear_projection",
                 "addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim")  # fmt: skip
        return ControlNetUnionModel(
            **{key: branch.denoiser.config[key] for key in names},
            conditioning_embedding_out_channels=(8, 8, 8, 8),
            num_control_type=6, num_trans_channel=8, num_trans_head=2, num_proj_channel=8,
        )  # fmt: skip
    if name.startswith("flux1"):
        names = ("in_channels", "attention_head_dim", "num_attention_heads", "joint_attention_dim",
                 "pooled_projection_dim", "guidance_embeds", "axes_dims_rope")  # fmt: skip
        config = {key: branch.denoiser.config[key] for key in names}
        return FluxControlNetModel(
            **config, num_layers=1, num_single_layers=0, num_mode=10 if name.endswith("union") else None
        )
    return ControlNetModel.from_unet(branch.denoiser, conditioning_embedding_out_channels=(8, 8, 8, 8))


EYES = ("controlnet_cond_embedding", "task_embedding", "control_add_embedding")


def awake(model: Any) -> Any:
    """With large weights where a new control model has zeros, or hardly looks at its picture."""
    for key, weight in model.named_parameters():
        if not weight.any() or key.startswith(EYES):
            nn.init.normal_(weight, std=0.5)
    return model


def drawn(
    branch: Any,
    task: Any,
    model: Any = None,
    scale: float = 1.0,
    seen: Image.Image | None = None,
    kind: str = "canny",
    count: int = 1,
    skipped: int = 0,
) -> Tensor:
    """The latents of a prompt, drawn from a text, a picture or a picture with a mask.

    skipped: random numbers that are taken from each generator before.
    """
    told: dict[str, Any] = {"width": SIDE, "height": SIDE}
    if task != "text":
        told |= {"image": square(SIDE), "strength": 1.0 if task == "inpaint" else 0.6}
    if task == "inpaint":
        told["mask_image"] = Image.linear_gradient("L").resize((SIDE, SIDE))
    pipeline, _ = pipeline_for(branch, task, model)
    if model is not None:
        seen = seen or preprocessors.control_image("canny", square(SIDE), nowhere, CPU)
        told |= control.arguments(branch, model, kind, seen, scale, task)
    generators = [torch.Generator().manual_seed(number) for number in range(count)]
    for generator in generators:
        torch.randn(skipped, generator=generator)
    with torch.no_grad():
        latents: Tensor = pipeline(
            **branch.encode_for_pipeline("a dog", None),
            **told,
            num_inference_steps=2,
            guidance_scale=3.0,
            num_images_per_prompt=count,
            generator=generators,
            output_type="latent",
        ).images
    return latents


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


@pytest.mark.parametrize("task", ["text", "image", "inpaint"])
@pytest.mark.parametrize("name", ["sd15", *(pytest.param(name, marks=pytest.mark.long) for name in OTHERS)])
def test_a_control_model_works_at_its_scale(branch_of: Any, made: Any, name: str, task: str) -> None:
    family = name.split("-")[0]
    branch, model = branch_of(family), control.load_control(branch_of(family), made(name))
    # FLUX.1's pipelines draw the latents of the control picture from the same generator, before all others.
    skipped = 4 * (SIDE // 8) ** 2 if family == "flux1" else 0
    bare, scheduler = drawn(branch, task, skipped=skipped), branch.pipeline.scheduler
    controlled = drawn(branch, task, model, 1.0)
    assert distance(controlled, bare) > 0.01
    assert distance(drawn(branch, task, model, 0.0), bare) < ROUNDING
    empty = Image.new("RGB", (SIDE, SIDE))
    assert distance(drawn(branch, task, model, 1.0, empty), controlled) > 1e-3  # it looks at its picture
    two = drawn(branch, task, model, 1.0, count=2)
    assert distance(two[:1], controlled) < ROUNDING and distance(two[0], two[1]) > 0.01
    assert branch.pipeline.scheduler is scheduler
    assert distance(drawn(branch, task, skipped=skipped), bare) < ROUNDING


@pytest.mark.parametrize("name", ["sdxl1-union", "flux1-union"])
def test_a_union_model_gets_the_kind_of_its_control_image(branch_of: Any, made: Any, name: str) -> None:
    family = name.split("-")[0]
    branch, model = branch_of(family), control.load_control(branch_of(family), made(name))
    canny, depth = (drawn(branch, "text", model, 1.0, square(SIDE), kind) for kind in ("canny", "depth"))
    assert distance(canny, depth) > 1e-3


@pytest.mark.parametrize("name", [*FAMILIES, "sdxl1-union"])
def test_a_pipeline_has_the_very_same_modules(branch_of: Any, made: Any, name: str) -> None:
    branch = branch_of(name.split("-")[0])
    model = control.load_control(branch, made(name))
    stock = branch.pipeline
    parts = {key: part for key, part in stock.components.items() if part is not None}
    weights = {key: (weight.data_ptr(), weight.dtype) for key, weight in branch.denoiser.named_parameters()}
    stock.vae.bfloat16()  # a base has parts of several types: none is turned into another one
    try:
        for task in ("text", "image", "inpaint"):
            pipeline = control.pipeline(branch, model, task)
            assert pipeline.components["controlnet"] is model
            assert all(pipeline.components[key] is part for key, part in parts.items())
            assert stock.vae.dtype == torch.bfloat16
    finally:
        stock.vae.float()
    assert {key: (one.data_ptr(), one.dtype) for key, one in branch.denoiser.named_parameters()} == weights
    assert {key: part for key, part in stock.components.items() if part is not None} == parts


def test_a_control_model_is_frozen_and_of_the_bases_type(branch_of: Any, made: Any) -> None:
    branch = branch_of("sd15")
    model = control.load_control(branch, made("sd15"))
    assert not model.training and not any(weight.requires_grad for weight in model.parameters())
    assert model.dtype == branch.dtype == torch.float32
    branch.dtype = torch.bfloat16
    try:
        assert control.load_control(branch, made("sd15")).dtype == torch.bfloat16
    finally:
        branch.dtype = torch.float32


def test_a_variant_alone_is_enough(branch_of: Any, made: Any, tmp_path: Path) -> None:
    ControlNetModel.from_pretrained(made("sd15")).half().save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "diffusion_pytorch_model.fp16.safetensors").exists()
    model = control.load_control(branch_of("sd15"), tmp_path)
    assert model.dtype == torch.float32
    whole = control.load_control(branch_of("sd15"), made("sd15"))
    assert distance(model.conv_in.weight, whole.conv_in.weight) < 1e-3


def test_a_union_model_is_recognized_by_its_weights(branch_of: Any, made: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(made("sdxl1-union"), tmp_path / "union")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"_class_name": "ControlNetModel"}))
    assert isinstance(control.load_control(branch_of("sdxl1"), folder), ControlNetUnionModel)


@pytest.mark.parametrize(
    ("base", "name", "told"),
    [
        ("sd15", "sdxl1", "for another family of models: its block_out_channels is"),
        ("sdxl1", "sd15", "for another family of models: its block_out_channels is"),
        ("sd15", "flux1", "it is a FluxControlNetModel, the base takes ControlNetModel$"),
        ("sdxl1", "flux1", "it is a FluxControlNetModel, the base takes ControlNetModel or ControlNetUnionModel"),
        ("flux1", "sd15", "it is a ControlNetModel, the base takes FluxControlNetModel"),
    ],
)
def test_a_control_model_of_another_family_is_refused(
    branch_of: Any, made: Any, base: str, name: str, told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        control.load_control(branch_of(base), made(name))


def test_another_width_of_the_text_is_refused(branch_of: Any, tmp_path: Path) -> None:
    config = {**branch_of("sd15").denoiser.config, "cross_attention_dim": 24}
    names = ("block_out_channels", "norm_num_groups", "attention_head_dim", "cross_attention_dim")
    ControlNetModel(**{key: config[key] for key in names}, down_block_types=config["down_block_types"]).save_pretrained(
        tmp_path
    )
    with pytest.raises(ValueError, match="its cross_attention_dim is 24, the base's is 16"):
        control.load_control(branch_of("sd15"), tmp_path)


def test_missing_and_broken_weights_are_reported(branch_of: Any, made: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(made("sd15"), tmp_path / "gap")
    file = folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["conv_in.weight"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"cannot be loaded: .*conv_in\.weight"):
        control.load_control(branch_of("sd15"), folder)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises((OSError, ValueError)):
        control.load_control(branch_of("sd15"), folder)
    file.unlink()
    with pytest.raises(OSError):
        control.load_control(branch_of("sd15"), folder)
    with pytest.raises(OSError):
        control.load_control(branch_of("sd15"), tmp_path / "none")


def test_modes_are_those_of_the_model_cards(branch_of: Any, made: Any) -> None:
    flux, sdxl = (control.load_control(branch_of(name), made(f"{name}-union")) for name in ("flux1", "sdxl1"))
    assert [control.control_mode(branch_of("flux1"), flux, kind) for kind in ("canny", "tile", "depth", "pose")] == [
        0,
        1,
        2,
        4,
    ]
    assert [control.control_mode(branch_of("sdxl1"), sdxl, kind) for kind in ("canny", "lineart", "depth", "pose")] == [
        3,
        3,
        1,
        0,
    ]
    with pytest.raises(ValueError, match="does not know lineart; it knows canny, tile, depth, pose"):
        control.control_mode(branch_of("flux1"), flux, "lineart")
    with pytest.raises(ValueError, match="does not know tile; it knows pose, depth, canny, lineart"):
        control.control_mode(branch_of("sdxl1"), sdxl, "tile")  # only the larger one does
    for name in FAMILIES:
        branch = branch_of(name)
        assert control.control_mode(branch, control.load_control(branch, made(name)), "canny") is None
