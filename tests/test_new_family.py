"""A family that the program does not have, Z-Image, arrives as one file, one TOML and one word.

All three are in tests/helpers/new_family/. Nothing else is told about it.
"""

from __future__ import annotations

import ast
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ZImageImg2ImgPipeline, ZImagePipeline, ZImageTransformer2DModel
from PIL import Image
from safetensors.torch import save_file

import trainer.branches
from tests.helpers.new_family.make import make_tiny_zimage
from tests.helpers.studio import Studio
from tests.helpers.training import config_of
from trainer import names
from trainer.branches.protocol import load_branch
from trainer.config.branch_file import PROGRAM
from trainer.contract.photos import Upload
from trainer.contract.tunes import Tune
from trainer.library import bases
from trainer.photos.decoder import Decoder
from trainer.studio import answers, prompts, rows, tunes

pytest_plugins = ("tests.helpers.web",)

FAMILY = Path(__file__).parent / "helpers" / "new_family"
STEPS = 6
TEXT = "ohwx dog in the snow"
DRAWN = {"num_images": 1, "steps": 4, "seed": 7, "cfg_scale": 3, "w": 64, "h": 64}
NOISE_LEFT = 0.75  # on the picture of the image prompt
ROUNDING = 2  # of 255: what another order of sums changes


@pytest.fixture(scope="module", autouse=True)
def family() -> Iterator[None]:
    """The file beside those of the other families, and the word beside theirs."""

    def progress(words: tuple[str, ...]) -> None:
        for name, module in list(sys.modules.items()):
            if name.startswith("trainer.") and hasattr(module, "BRANCHES"):
                module.BRANCHES = words

    known = names.BRANCHES
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.branches, "__path__", [*trainer.branches.__path__, str(FAMILY)])
        progress((*known, "zimage"))
        yield
        progress(known)
    sys.modules.pop("trainer.branches.zimage", None)


@pytest.fixture(scope="module")
def presets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program's presets, and the TOML of the family."""
    folder = Path(shutil.copytree(PROGRAM, tmp_path_factory.mktemp("new") / "presets"))
    shutil.copy(FAMILY / "zimage.toml", folder)
    return folder


@pytest.fixture(scope="module")
def tiny_zimage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_zimage(tmp_path_factory.mktemp("tiny") / "zimage")


@pytest.fixture(scope="module")
def studio(
    tmp_path_factory: pytest.TempPathFactory, decoder: Decoder, photos: list[Path], presets: Path, tiny_zimage: Path
) -> Iterator[Studio]:
    folder = tmp_path_factory.mktemp("studio")
    shutil.copytree(tiny_zimage, folder / "models" / "my-z-image")
    opened = Studio(folder, decoder, photos, presets=presets, picture_format="png")
    opened.worker.start()
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def tune(studio: Studio, tmp_path_factory: pytest.TempPathFactory) -> Tune:
    """A LoRA that was trained on photos with captions of two lengths, and its two prompts."""
    caption = tmp_path_factory.mktemp("captions") / f"{studio.photos[0].stem}.txt"
    caption.write_text("ohwx dog on a sofa beside a window, seen from above on a rainy day")
    request = {
        "title": "Rex", "name": "dog", "branch": "zimage", "base_tune_id": found(studio).id, "steps": STEPS,
        "args": "resolution=64 rank=4 alpha=4 lr=2e-2 warmup_steps=0 batch=3 save_dtype=float32",
        "prompts_attributes": [{"text": TEXT, **DRAWN}],
    }  # fmt: skip
    uploads = [Upload(path.name, path) for path in [*studio.photos, caption]]
    created, *_ = tunes.create_tune(studio.services, request, uploads)
    picture = Upload("start.png", studio.photos[1])
    asked = {"text": TEXT, "input_image": picture, "denoising_strength": NOISE_LEFT, **DRAWN}
    prompts.create_prompt(studio.services, created.id, asked)
    return studio.ended(created.id)


def found(studio: Studio) -> bases.Base:
    return next(base for base in bases.list_bases(studio.settings) if base.title == "my-z-image")


def test_its_file_takes_nothing_from_another_family() -> None:
    imported = {
        name
        for node in ast.walk(ast.parse((FAMILY / "zimage.py").read_text()))
        if isinstance(node, ast.ImportFrom)
        for name in [node.module, *(f"{node.module}.{one.name}" for one in node.names)]
    }
    assert "trainer.branches.protocol" in imported
    assert not imported & {f"trainer.branches.{branch}" for branch in names.BRANCHES}


def test_it_is_found_in_the_models_folder(studio: Studio) -> None:
    base = found(studio)
    assert (base.branch, base.error) == ("zimage", None)


def test_it_trains_and_renders(studio: Studio, tune: Tune) -> None:
    assert (tune.status, tune.error, tune.branch) == ("trained", None, "zimage")
    assert [(prompt.status, prompt.error) for prompt in tune.prompts] == [("rendered", None)] * 2
    trained = {one["caption"] for one in answers.trained_pictures(studio.services, tune.id)}
    assert len({len(caption) for caption in trained}) == 2
    row = studio.store.get("tunes", tune.id)
    assert row is not None and row["files"] == ["lora.safetensors", "lora_diffusers.safetensors"]


def test_its_lora_files_are_found_in_the_models_folder(studio: Studio, tune: Tune) -> None:
    model = rows.tune_folder(studio.services, tune.id) / "model"
    for file in ("lora.safetensors", "lora_diffusers.safetensors"):
        copy = Path(shutil.copy(model / file, studio.settings.models / f"rex-{file}"))
        base = next(base for base in bases.list_bases(studio.settings) if base.title == copy.name)
        copy.unlink()
        assert (base.branch, base.error, base.model, base.root) == ("zimage", None, copy, "my-z-image")


@pytest.mark.parametrize("file", ["lora_diffusers.safetensors", "lora.safetensors"])
def test_stock_diffusers_draws_the_same_with_its_lora(studio: Studio, tune: Tune, tiny_zimage: Path, file: str) -> None:
    stock = ZImagePipeline.from_pretrained(tiny_zimage, local_files_only=True)
    bare = draw(stock), draw_from(stock, studio.photos[1])
    stock.load_lora_weights(rows.tune_folder(studio.services, tune.id) / "model", weight_name=file)
    tuned = draw(stock), draw_from(stock, studio.photos[1])
    ours = [np.asarray(picture.convert("RGB"), float) for picture in studio.pictures(tune.id)]
    for before, after, picture in zip(bare, tuned, ours, strict=True):
        assert np.abs(picture - after).max() <= ROUNDING
        assert np.abs(picture - before).max() > 4 * ROUNDING  # the LoRA changes the picture


def draw(pipeline: Any) -> np.ndarray:
    """(64, 64, 3) from 0 to 255."""
    pipeline.set_progress_bar_config(disable=True)
    return np.asarray(pipeline(TEXT, width=64, height=64, **sampled()).images[0], float)


def draw_from(pipeline: ZImagePipeline, photo: Path) -> np.ndarray:
    start = Image.open(photo).convert("RGB")
    again = ZImageImg2ImgPipeline(**pipeline.components)
    again.set_progress_bar_config(disable=True)
    return np.asarray(again(TEXT, image=start, strength=NOISE_LEFT, **sampled()).images[0], float)


def sampled() -> dict[str, Any]:
    return {
        "num_inference_steps": DRAWN["steps"],
        "guidance_scale": float(DRAWN["cfg_scale"]),
        "generator": torch.Generator().manual_seed(DRAWN["seed"]),
    }


def test_the_loss_of_a_text_does_not_depend_on_the_other_texts(tiny_zimage: Path, tmp_path: Path) -> None:
    branch = branch_of(tiny_zimage, tmp_path)
    latents, noise = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    times, config = torch.tensor([0.2, 0.7]), config_of()
    with torch.no_grad():
        both = branch.encode_prompts(["a dog", "a dog on a sofa beside a window"])
        together = branch.loss(latents, both, noise, times, config)
        for one, caption in enumerate(["a dog", "a dog on a sofa beside a window"]):
            at = slice(one, one + 1)
            alone = branch.loss(latents[at], branch.encode_prompts([caption]), noise[at], times[at], config)
            assert torch.allclose(alone, together[at], rtol=1e-4)
    assert len(set(both["lengths"].tolist())) == 2


def test_its_weights_are_written_and_read_under_the_original_names(tiny_zimage: Path, tmp_path: Path) -> None:
    branch = branch_of(tiny_zimage, tmp_path)
    expected = {name: weight.clone() for name, weight in branch.denoiser.state_dict().items()}
    file = tmp_path / "whole.safetensors"
    save_file({name: weight.contiguous() for name, weight in branch.original_weights().items()}, file)
    stock = ZImageTransformer2DModel.from_single_file(
        str(file), config=str(tiny_zimage), subfolder="transformer", local_files_only=True
    )
    with torch.no_grad():
        for weight in branch.denoiser.parameters():
            weight.zero_()
    branch.load_weights(file, tmp_path)
    for module in (stock, branch.denoiser):
        state = module.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], weight) for name, weight in expected.items())


def branch_of(folder: Path, cache: Path) -> Any:
    return load_branch(bases.Base(1, "z", "zimage", path=folder), torch.device("cpu"), cache)
