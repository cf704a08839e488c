"""Base models: their ids, what the models folder may hold, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import tomlkit

from tests.helpers.fast import FAST_ID, fast_base
from trainer.contract.errors import InvalidRequest
from trainer.library import bases, weights
from trainer.library.bases import Base
from trainer.settings import Settings, read_settings

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"


def found(settings: Settings) -> dict[str, Base]:
    """What lies in the models folder, by title."""
    return {base.title: base for base in bases.list_bases(settings) if base.path and base.branch != "fast"}


def safetensors(header: object, data: bytes = b"") -> bytes:
    """A safetensors file of this header."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensors(*names: str, shapes: Mapping[str, object] | None = None) -> bytes:
    """A safetensors file that speaks of these tensors, in the real models' shapes or others, and holds nothing: its
    numbers are of a type that nobody knows the size of."""
    entries = {name: SHAPES.get(name, [0]) for name in names} | dict(shapes or {})
    return safetensors(
        {name: {"dtype": "F0", "shape": shape, "data_offsets": [0, 0]} for name, shape in entries.items()}
    )


UNET, CLIP, VAE, OPEN_CLIP = (
    "model.diffusion_model.input_blocks.0.0.weight",
    "cond_stage_model.transformer.text_model.final_layer_norm.weight",
    "first_stage_model.encoder.conv_in.weight",
    "conditioner.embedders.1.model.ln_final.weight",
)
QKV, IN, OUT = "double_blocks.0.img_attn.qkv.weight", "img_in.weight", "final_layer.linear.weight"
SHAPES = {UNET: [320, 4, 3, 3], QKV: [9216, 3072], IN: [3072, 64], OUT: [64, 3072]}  # of the real models


def problem_of(settings: Settings, base_tune_id: int | None, branch: str | None) -> dict[str, list[str]]:
    with pytest.raises(InvalidRequest) as refused:
        bases.resolve(settings, base_tune_id, branch)
    return refused.value.problems


@pytest.mark.parametrize(
    ("number", "branch", "repository"),
    [
        (690204, "sd15", "SG161222/Realistic_Vision_V5.1_noVAE"),
        (666678, "sdxl1", "stabilityai/stable-diffusion-xl-base-1.0"),
        (1504944, "flux1", "black-forest-labs/FLUX.1-dev"),
        (3063697, "flux1", "black-forest-labs/FLUX.1-Krea-dev"),
    ],
)
def test_known_bases_have_the_hosted_service_s_numbers(
    settings: Settings, number: int, branch: str, repository: str
) -> None:
    base = bases.resolve(settings, number, None)
    assert (base.id, base.branch, base.repository, base.path) == (number, branch, repository, None)
    assert bases.resolve(settings, number, branch) == base


def test_the_base_of_no_number_is_the_branch_s_first(settings: Settings) -> None:
    firsts = {branch: bases.resolve(settings, None, branch).repository for branch in (None, "sd15", "sdxl1", "flux1")}
    assert firsts == {
        None: SD15,
        "sd15": SD15,
        "sdxl1": "stabilityai/stable-diffusion-xl-base-1.0",
        "flux1": "black-forest-labs/FLUX.1-dev",
    }
    assert bases.resolve(settings, None, None).id == bases.hashed_id(SD15)  # the hosted service has no number for it


def test_a_base_has_the_revision_and_the_variant_that_its_row_says(tmp_path: Path, settings: Settings) -> None:
    folder = Path(shutil.copytree(settings.presets, tmp_path / "presets"))
    with (folder / "sdxl1.toml").open("a") as rows:
        rows.write('[[base]]\nid = 5\ntitle = "mine"\nrepository = "me/mine"\nrevision = "v2"\n')
    own = read_settings(outputs=settings.outputs, models=settings.models, presets=folder)
    told = {base.id: (base.revision, base.variant) for base in bases.list_bases(own) if base.branch == "sdxl1"}
    assert told == {666678: (None, "fp16"), 5: ("v2", None)}
    assert bases.resolve(own, 5, None) == Base(5, "mine", "sdxl1", repository="me/mine", revision="v2")


def test_hashed_ids_are_stable_and_within_limits(settings: Settings) -> None:
    assert bases.hashed_id("models/a.safetensors") == 1_307_270_872  # pinned: an id that moved would orphan tunes
    for number in range(200):
        assert 1_000_000_000 < bases.hashed_id(f"model {number}") < 2**31
    ids = [base.id for base in bases.list_bases(settings)]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("branch", ["sd15", "sdxl1", "flux1"])
def test_folders_and_single_files_are_bases(settings: Settings, branch: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(f"tiny_{branch}")
    file: Path = request.getfixturevalue(f"tiny_{branch}_file")
    shutil.copytree(folder, settings.models / "photo" / "mine")
    shutil.copy(file, settings.models / "one.safetensors")
    shutil.copytree(file.with_suffix(""), settings.models / "one")  # its sidecar, no base on its own
    listed = found(settings)
    assert {title: (base.branch, base.error) for title, base in listed.items()} == {
        "photo/mine": (branch, None),
        "one.safetensors": (branch, None),
    }
    for base in listed.values():
        assert base.id == bases.hashed_id(base.title)
        assert bases.resolve(settings, base.id, None) == base
        assert bases.resolve(settings, base.id, branch) == base


INSIDE = "model.diffusion_model."  # where FLUX.1's transformer stands in a file that holds other parts, too


@pytest.mark.parametrize(
    ("content", "branch"),
    [
        (tensors(UNET, CLIP, VAE), "sd15"),
        (tensors(UNET, OPEN_CLIP, VAE), "sdxl1"),
        (tensors(QKV, IN, OUT), "flux1"),
        (tensors(shapes={f"{INSIDE}{name}": SHAPES[name] for name in (QKV, IN, OUT)}), "flux1"),
    ],
)
def test_the_branch_of_a_file_is_read_from_its_header(settings: Settings, content: bytes, branch: str) -> None:
    (settings.models / "base.safetensors").write_bytes(content)
    base = found(settings)["base.safetensors"]
    assert (base.branch, base.error) == (branch, None)


NOT_ONE, UNREADABLE = "it is not a safetensors file", "its header cannot be read"
EDITS, UNKNOWN = "a model for inpainting or editing", "of no family that is known here"
BROKEN: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "truncated": (lambda whole: whole[:-10], "it is broken: its header speaks of"),
    "longer than its header says": (lambda whole: whole + b"\0", "it is broken: its header speaks of"),
    "empty": (lambda whole: b"", NOT_ONE),
    "header of garbage": (lambda whole: whole[:8] + b"\xff" * (len(whole) - 8), UNREADABLE),
    "header of the wrong kind": (lambda whole: safetensors([1, 2]), UNREADABLE),
    "offsets of the wrong kind": (lambda whole: safetensors({UNET: {"data_offsets": [0, "many"]}}), UNREADABLE),
    "no offsets": (lambda whole: safetensors({UNET: {"data_offsets": []}}), UNREADABLE),
    "header without end": (lambda whole: struct.pack("<Q", 200_000) + b"[" * 200_000, UNREADABLE),
    "shape of the wrong kind": (lambda whole: tensors(CLIP, VAE, shapes={UNET: 5}), UNREADABLE),
    "web page": (lambda whole: b"<!DOCTYPE html><html><body>Please log in</body></html>", NOT_ONE),
    "pickle": (lambda whole: b"PK\x03\x04" + bytes(100), NOT_ONE),
    "LoRA of none": (lambda whole: tensors("diffusion_model.blocks.0.attn.lora_A.weight"), "a LoRA of no family"),
    "Stable Diffusion 2": (
        lambda whole: tensors(UNET, VAE, "cond_stage_model.model.ln_final.weight"),
        "a Stable Diffusion 2 model",
    ),
    "no text encoder": (lambda whole: tensors(UNET, VAE), "it has no text encoder"),
    "no VAE": (lambda whole: tensors(UNET, CLIP), "it has no VAE"),
    "SDXL without VAE": (lambda whole: tensors(UNET, OPEN_CLIP), "it has no VAE; a whole Stable Diffusion XL"),
    "inpainting": (lambda whole: tensors(CLIP, VAE, shapes={UNET: [320, 9, 3, 3]}), EDITS),
    "editing": (lambda whole: tensors(CLIP, VAE, shapes={UNET: [320, 8, 3, 3]}), EDITS),
    "SDXL inpainting": (lambda whole: tensors(OPEN_CLIP, VAE, shapes={UNET: [320, 9, 3, 3]}), EDITS),
    "FLUX.1 Fill": (lambda whole: tensors(QKV, OUT, shapes={IN: [3072, 384]}), EDITS),
    "FLUX.1 Depth": (lambda whole: tensors(QKV, OUT, shapes={IN: [3072, 128]}), EDITS),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_file_that_is_no_base_is_listed_with_the_reason_and_refused(
    settings: Settings, tiny_sd15_file: Path, kind: str
) -> None:
    file = settings.models / "base.safetensors"
    file.write_bytes(tiny_sd15_file.read_bytes())
    assert found(settings)["base.safetensors"].error is None
    spoil, reason = BROKEN[kind]
    file.write_bytes(spoil(tiny_sd15_file.read_bytes()))
    base = found(settings)["base.safetensors"]
    assert base.error and reason in base.error
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


def make_it_inpaint(folder: Path) -> None:
    edit(folder / "unet" / "config.json", in_channels=9)


def make_it_fill(folder: Path) -> None:
    edit(folder / "transformer" / "config.json", in_channels=96, out_channels=16)


def name_the_pipeline_of_fill(folder: Path) -> None:
    edit(folder / "model_index.json", _class_name="FluxFillPipeline")


def quantize(folder: Path) -> None:
    edit(folder / "transformer" / "config.json", quantization_config={"quant_method": "bitsandbytes"})


def quantize_the_text_encoder(folder: Path) -> None:
    edit(folder / "text_encoder" / "config.json", quantization_config={"quant_method": "torchao"})


def schedule_by_edm(folder: Path) -> None:
    """As in playgroundai/playground-v2.5-1024px-aesthetic."""
    edit(folder / "scheduler" / "scheduler_config.json", _class_name="EDMDPMSolverMultistepScheduler")


def predict_the_picture(folder: Path) -> None:
    edit(folder / "scheduler" / "scheduler_config.json", prediction_type="sample")


def schedule_a_flow(folder: Path) -> None:
    edit(folder / "scheduler" / "scheduler_config.json", _class_name="FlowMatchEulerDiscreteScheduler")


def edit(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


SPOILERS: list[tuple[str, Callable[[Path], None], str]] = [
    ("sd15", add_code, "it brings code (pipeline.py)"),
    ("sd15", name_foreign_library, "its unet asks for code of 'evil_package'"),
    ("sd15", name_unknown_pipeline, "names 'KandinskyPipeline'"),
    ("sd15", name_a_list_as_pipeline, "its model_index.json names"),
    ("sd15", break_index, "its model_index.json is not a JSON object"),
    ("sd15", make_it_version_2, "a Stable Diffusion 2 model"),
    ("sd15", drop_unet, "it cannot be read: No such file"),
    ("sd15", list_for_unet_config, "its config.json is not a JSON object"),
    ("sd15", make_it_inpaint, EDITS),
    ("sdxl1", make_it_inpaint, EDITS),
    ("flux1", make_it_fill, EDITS),
    ("sdxl1", schedule_by_edm, "it has the noise levels of EDM (EDMDPMSolverMultistepScheduler)"),
    ("sd15", predict_the_picture, "says that it predicts 'sample'"),
    ("sd15", schedule_a_flow, "says that it predicts 'a flow'"),
    ("sdxl1", quantize_the_text_encoder, "its text_encoder is quantized (torchao)"),
    ("flux1", quantize, "its transformer is quantized (bitsandbytes)"),
    ("flux1", name_the_pipeline_of_fill, "names 'FluxFillPipeline'"),
]


@pytest.mark.parametrize(("branch", "spoil", "reason"), SPOILERS)
def test_a_folder_that_is_no_base_is_listed_with_the_reason_and_refused(
    settings: Settings, branch: str, spoil: Callable[[Path], None], reason: str, request: pytest.FixtureRequest
) -> None:
    folder = settings.models / "base"
    shutil.copytree(request.getfixturevalue(f"tiny_{branch}"), folder)
    assert found(settings)["base"].error is None
    spoil(folder)
    base = found(settings)["base"]
    assert base.error and reason in base.error
    assert str(settings.models) not in base.error  # it is answered to whoever asks
    assert problem_of(settings, base.id, None) == {"base_tune_id": [f"base: {base.error}"]}


def test_flux_that_says_how_many_channels_come_out_is_no_editing_model(settings: Settings, tiny_flux1: Path) -> None:
    # FLUX.1-dev's own configuration leaves it out, others write it.
    folder = settings.models / "base"
    shutil.copytree(tiny_flux1, folder)
    for channels in (None, 16):
        edit(folder / "transformer" / "config.json", in_channels=16, out_channels=channels)
        assert found(settings)["base"].error is None


def test_a_base_has_another_key_once_a_file_of_it_is_replaced(settings: Settings, tiny_sd15_file: Path) -> None:
    """Whoever has loaded it compares the keys."""
    folder, file = settings.models / "folder", settings.models / "one.safetensors"
    shutil.copytree(tiny_sd15_file.with_suffix(""), folder)
    shutil.copytree(folder, file.with_suffix(""))
    shutil.copy(tiny_sd15_file, file)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"as large")
    seen = [{title: base.weights for title, base in found(settings).items()}]
    assert seen[0] == {title: base.weights for title, base in found(settings).items()}

    def same_size(at: Path) -> None:
        facts = at.stat()
        at.write_bytes(at.read_bytes()[::-1])
        os.utime(at, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))

    def same_time(at: Path) -> None:
        facts = at.stat()
        at.write_bytes(at.read_bytes() + b" ")
        os.utime(at, ns=(facts.st_atime_ns, facts.st_mtime_ns))

    for title, at, change in (
        ("folder", folder / "unet" / "diffusion_pytorch_model.safetensors", same_size),
        ("folder", folder / "scheduler" / "scheduler_config.json", same_time),
        ("one.safetensors", file, lambda at: os.utime(at)),
        ("one.safetensors", file.with_suffix("") / "scheduler" / "scheduler_config.json", same_time),
        ("one.safetensors", file.with_suffix(".yaml"), lambda at: at.write_text("model:")),
    ):
        change(at)
        now = {title: base.weights for title, base in found(settings).items()}
        assert [name for name in now if now[name] != seen[-1][name]] == [title], at
        seen.append(now)


def test_a_configuration_beside_a_file_may_give_it_other_blocks(settings: Settings) -> None:
    """SSD-1B has fewer blocks than SDXL; stock diffusers reads its file with its own configuration."""
    file = settings.models / "ssd.safetensors"
    wide = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
    file.write_bytes(tensors(UNET, OPEN_CLIP, VAE, shapes={wide: [640, 2048]}))
    assert "fewer blocks" in str(found(settings)["ssd.safetensors"].error)
    (settings.models / "ssd" / "unet").mkdir(parents=True)
    (settings.models / "ssd" / "unet" / "config.json").write_text("{}")
    assert found(settings)["ssd.safetensors"].error is None


def test_presets_of_an_older_version_leave_to_the_program_what_a_family_is(
    tmp_path: Path, settings: Settings, tiny_sd15: Path, tiny_sdxl1_file: Path, tiny_flux1: Path
) -> None:
    """A user's own folder, copied before a family's TOML told how its files are known, or before the family came."""
    folder = Path(shutil.copytree(settings.presets, tmp_path / "presets"))
    for branch in ("sd15", "sdxl1", "fast"):
        table = tomlkit.parse((folder / f"{branch}.toml").read_text())
        for key in {"detect", "placeholder", "face_adapter"} | ({"base"} if branch == "fast" else set()):
            table.pop(key, None)
        (folder / f"{branch}.toml").write_text(tomlkit.dumps(table))
    (folder / "flux1.toml").unlink()
    own = read_settings(outputs=settings.outputs, models=settings.models, presets=folder)
    for name, source in (("sd15", tiny_sd15), ("sdxl1.safetensors", tiny_sdxl1_file), ("flux1", tiny_flux1)):
        (shutil.copytree if source.is_dir() else shutil.copy)(source, settings.models / name)
    assert bases.list_bases(own) == bases.list_bases(settings)
    assert {base.branch for base in found(own).values()} == {"sd15", "sdxl1", "flux1"}
    assert bases.resolve(own, 690204, "fast") == fast_base()
    assert weights.face_adapter(own, "sd15") == weights.face_adapter(settings, "sd15")


def test_an_unknown_id_is_refused(settings: Settings) -> None:
    assert "123456" in problem_of(settings, 123456, None)["base_tune_id"][0]


def test_a_base_of_another_branch_is_refused(settings: Settings) -> None:
    assert problem_of(settings, FAST_ID, "sd15").keys() == {"base_tune_id"}
    assert bases.resolve(settings, FAST_ID, None).branch == "fast"
    assert "is of branch flux1, not sdxl1" in problem_of(settings, 1504944, "sdxl1")["base_tune_id"][0]


def test_an_unknown_branch_is_refused_with_the_nearest(settings: Settings) -> None:
    assert "mean 'sd15'" in problem_of(settings, None, "sd16")["branch"][0]


def test_branch_fast_takes_any_id_and_uses_its_own_base(settings: Settings) -> None:
    own = fast_base()
    assert [bases.resolve(settings, base_id, "fast") for base_id in (None, 690204, 123456)] == [own] * 3
