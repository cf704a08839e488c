"""Base models: their ids, what the models folder may hold, and what is refused."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from trainer import bases
from trainer.bases import Base
from trainer.schema import InvalidRequest
from trainer.settings import Settings

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"


def found(settings: Settings) -> dict[str, Base]:
    """What lies in the models folder, by title."""
    return {base.title: base for base in bases.list_bases(settings) if base.path and base.branch != "fast"}


def safetensors(header: object, data: bytes = b"") -> bytes:
    """A safetensors file of this header."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def empty_tensors(*names: str) -> bytes:
    return safetensors({name: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for name in names})


UNET, CLIP, VAE = (
    "model.diffusion_model.input_blocks.0.0.weight",
    "cond_stage_model.transformer.text_model.final_layer_norm.weight",
    "first_stage_model.encoder.conv_in.weight",
)


def problem_of(settings: Settings, base_tune_id: int | None, branch: str | None) -> dict[str, list[str]]:
    with pytest.raises(InvalidRequest) as refused:
        bases.resolve(settings, base_tune_id, branch)
    return refused.value.problems


def test_known_bases_have_the_hosted_service_s_numbers(settings: Settings) -> None:
    base = bases.resolve(settings, 690204, None)
    assert (base.branch, base.repository) == ("sd15", "SG161222/Realistic_Vision_V5.1_noVAE")


def test_the_base_of_no_number_is_the_branch_s_first(settings: Settings) -> None:
    assert bases.resolve(settings, None, None).repository == SD15
    assert bases.resolve(settings, None, "sd15").repository == SD15


def test_hashed_ids_are_stable_and_within_limits(settings: Settings) -> None:
    assert bases.hashed_id("models/a.safetensors") == 1_307_270_872  # pinned: an id that moved would orphan tunes
    for number in range(200):
        assert 1_000_000_000 < bases.hashed_id(f"model {number}") < 2**31
    ids = [base.id for base in bases.list_bases(settings)]
    assert len(set(ids)) == len(ids)


def test_folders_and_single_files_are_bases(settings: Settings, tiny_sd15: Path, tiny_sd15_file: Path) -> None:
    shutil.copytree(tiny_sd15, settings.models / "photo" / "mine")
    shutil.copy(tiny_sd15_file, settings.models / "one.safetensors")
    shutil.copytree(tiny_sd15_file.with_suffix(""), settings.models / "one")  # its sidecar, no base on its own
    listed = found(settings)
    assert {title: (base.branch, base.error) for title, base in listed.items()} == {
        "photo/mine": ("sd15", None),
        "one.safetensors": ("sd15", None),
    }
    for base in listed.values():
        assert base.id == bases.hashed_id(base.title)
        assert bases.resolve(settings, base.id, None) == base
        assert bases.resolve(settings, base.id, "sd15") == base


BROKEN: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda whole: whole[:-10],
    "longer than its header says": lambda whole: whole + b"\0",
    "empty": lambda whole: b"",
    "header of garbage": lambda whole: whole[:8] + b"\xff" * (len(whole) - 8),
    "header of the wrong kind": lambda whole: safetensors([1, 2]),
    "offsets of the wrong kind": lambda whole: safetensors({UNET: {"data_offsets": [0, "many"]}}),
    "no offsets": lambda whole: safetensors({UNET: {"data_offsets": []}}),
    "header without end": lambda whole: struct.pack("<Q", 200_000) + b"[" * 200_000,
    "web page": lambda whole: b"<!DOCTYPE html><html><body>Please log in</body></html>",
    "pickle": lambda whole: b"PK\x03\x04" + bytes(100),
    "LoRA": lambda whole: empty_tensors("lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"),
    "FLUX LoRA": lambda whole: empty_tensors("diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight"),
    "Stable Diffusion 2": lambda whole: empty_tensors(UNET, VAE, "cond_stage_model.model.ln_final.weight"),
    "no text encoder": lambda whole: empty_tensors(UNET, VAE),
    "no VAE": lambda whole: empty_tensors(UNET, CLIP),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_file_that_is_no_base_is_listed_with_the_reason_and_refused(
    settings: Settings, tiny_sd15_file: Path, kind: str
) -> None:
    file = settings.models / "base.safetensors"
    file.write_bytes(tiny_sd15_file.read_bytes())
    assert found(settings)["base.safetensors"].error is None
    file.write_bytes(BROKEN[kind](tiny_sd15_file.read_bytes()))
    base = found(settings)["base.safetensors"]
    assert base.error
    assert problem_of(settings, base.id, None) == {"base_tune_id": [f"base.safetensors: {base.error}"]}


def add_code(folder: Path) -> None:
    (folder / "unet" / "pipeline.py").write_text("raise SystemExit\n")


def name_foreign_library(folder: Path) -> None:
    edit(folder / "model_index.json", unet=["evil_package", "UNet"])


def name_unknown_pipeline(folder: Path) -> None:
    edit(folder / "model_index.json", _class_name="KandinskyPipeline")


def name_a_list_as_pipeline(folder: Path) -> None:
    edit(folder / "model_index.json", _class_name=["StableDiffusionPipeline"])


def break_index(folder: Path) -> None:
    (folder / "model_index.json").write_text("{")


def make_it_version_2(folder: Path) -> None:
    edit(folder / "unet" / "config.json", cross_attention_dim=1024)


def drop_unet(folder: Path) -> None:
    shutil.rmtree(folder / "unet")


def list_for_unet_config(folder: Path) -> None:
    (folder / "unet" / "config.json").write_text("[]")


def edit(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


SPOILERS = [
    add_code, name_foreign_library, name_unknown_pipeline, name_a_list_as_pipeline, break_index, make_it_version_2,
    drop_unet, list_for_unet_config,
]  # fmt: skip


@pytest.mark.parametrize("spoil", SPOILERS)
def test_a_folder_that_is_no_base_is_listed_with_the_reason_and_refused(
    settings: Settings, tiny_sd15: Path, spoil: Callable[[Path], None]
) -> None:
    folder = settings.models / "base"
    shutil.copytree(tiny_sd15, folder)
    assert found(settings)["base"].error is None
    spoil(folder)
    base = found(settings)["base"]
    assert base.error and str(settings.models) not in base.error  # it is answered to whoever asks
    assert problem_of(settings, base.id, None) == {"base_tune_id": [f"base: {base.error}"]}


def test_a_link_out_of_the_models_folder_is_not_followed(settings: Settings, tiny_sd15_file: Path) -> None:
    (settings.models / "out.safetensors").symlink_to(tiny_sd15_file)
    assert found(settings)["out.safetensors"].error == "it lies outside the models folder"


@pytest.mark.parametrize(
    ("key", "branch"),
    [
        ("conditioner.embedders.1.model.ln_final.weight", "sdxl1"),
        ("model.diffusion_model.double_blocks.0.img_attn.qkv.weight", "flux1"),
    ],
)
def test_the_branch_of_a_file_is_read_from_its_content(settings: Settings, key: str, branch: str) -> None:
    (settings.models / "base.safetensors").write_bytes(empty_tensors(UNET, key))
    assert found(settings)["base.safetensors"].branch == branch


def test_an_unknown_id_is_refused(settings: Settings) -> None:
    assert "123456" in problem_of(settings, 123456, None)["base_tune_id"][0]


def test_a_base_of_another_branch_is_refused(settings: Settings) -> None:
    assert problem_of(settings, bases.FAST_ID, "sd15").keys() == {"base_tune_id"}
    assert bases.resolve(settings, bases.FAST_ID, None).branch == "fast"


def test_an_unknown_branch_is_refused_with_the_nearest(settings: Settings) -> None:
    assert "mean 'sd15'" in problem_of(settings, None, "sd16")["branch"][0]


def test_branch_fast_takes_any_id_and_uses_its_own_base(settings: Settings) -> None:
    own = bases.fast_base(settings)
    assert [bases.resolve(settings, base_id, "fast") for base_id in (None, 690204, 123456)] == [own] * 3
