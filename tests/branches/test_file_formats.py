"""Single files as others write them: what they predict, fp8 with scales, and tensors that no loader has a place for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.helpers.families import FAMILIES, Family
from tests.helpers.training import config_of
from trainer.branches import loading, unet
from trainer.library.models_folder import sidecar
from trainer.library.prediction import yaml_of
from trainer.methods import checkpoint

UNETS = ["sd15", "sdxl1"]
SCHEDULER = Path("scheduler/scheduler_config.json")
Tensors = dict[str, Tensor]
unets = pytest.mark.parametrize("family", UNETS, indirect=True)
# The steps of the zero-terminal-SNR schedule for SD (Lin et al. 2023, arXiv 2305.08891, Algorithm 1).
ROOTS = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0).sqrt()
ZERO_SNR = ((ROOTS - ROOTS[-1]) * ROOTS[0] / (ROOTS[0] - ROOTS[-1])) ** 2


def add(file: Path, metadata: dict[str, str] | None = None, **tensors: Tensor) -> None:
    save_file(load_file(file) | tensors, file, metadata)


def without_scheduler(file: Path) -> None:
    """Most users have no sidecar with a scheduler."""
    shutil.rmtree(sidecar(file) / "scheduler")


# What it predicts


@unets
def test_markers_decide_training_rendering_and_what_is_saved(family: Family, file: Path, tmp_path: Path) -> None:
    add(file, v_pred=torch.zeros(0), ztsnr=torch.zeros(0))  # as NoobAI-XL v-pred has them
    without_scheduler(file)
    branch = family.load(file, tmp_path / "cache")
    saved = tmp_path / "saved.safetensors"
    checkpoint.write(branch, saved, torch.float32, {"modelspec.title": "mine", "modelspec.prediction_type": "epsilon"})
    shutil.rmtree(sidecar(saved) / "scheduler")
    (sidecar(saved) / "model_index.json").unlink()
    with safe_open(saved, "pt") as tensors:
        # ComfyUI reads the markers (supported_models.py) and writes both of these (save_checkpoint); kohya the second.
        assert {"v_pred", "ztsnr"} <= set(tensors.keys())
        facts = tensors.metadata()
    assert (facts["modelspec.predict_key"], facts["modelspec.prediction_type"]) == ("v", "v")
    assert facts["modelspec.title"] == "mine"
    for read in (branch, family.load(saved, tmp_path / "cache")):
        assert read.metadata["modelspec.prediction_type"] == "v"
        assert torch.allclose(read.noise_scheduler.alphas_cumprod.double(), ZERO_SNR, atol=1e-6)
        sampler = read.pipeline.scheduler
        sampler.set_timesteps(4)
        assert sampler.config.prediction_type == "v_prediction"
        assert [round(float(step)) for step in sampler.timesteps] == [999, 749, 499, 249]  # trailing
        assert float(sampler.sigmas[0]) > 1000  # pure noise; without the marker it is 14.6


@pytest.mark.parametrize("family", ["sd15"], indirect=True)
def test_the_last_step_of_a_schedule_that_ends_in_noise_has_a_finite_loss(
    family: Family, file: Path, tmp_path: Path
) -> None:
    for predicted in ("epsilon", "v_prediction"):
        config = json.loads((sidecar(file) / SCHEDULER).read_text())
        config |= {"prediction_type": predicted, "rescale_betas_zero_snr": True}
        (sidecar(file) / SCHEDULER).write_text(json.dumps(config))
        branch = family.load(file, tmp_path / "cache")
        assert float(branch.noise_scheduler.alphas_cumprod[-1]) == 0
        cond = {"encoder_hidden_states": torch.zeros(2, 77, 16)}
        latents, noise = torch.ones(2, 4, 8, 8), torch.ones(2, 4, 8, 8)
        steps = torch.tensor([999, 500])
        loss, plain = (
            branch.loss(latents, cond, noise, steps, config_of(min_snr=gamma), None).detach() for gamma in (5, 0)
        )
        assert loss.isfinite().all() and (plain > 0).all()
        # min(SNR, gamma) / SNR is 1 up to gamma, for noise; / (SNR + 1) is 0 where there is no signal, for velocity.
        assert float(loss[0]) == pytest.approx(float(plain[0]) if predicted == "epsilon" else 0, rel=1e-6, abs=1e-6)


def v_marker(file: Path) -> None:
    add(file, v_pred=torch.zeros(1))


def both_markers(file: Path) -> None:
    add(file, v_pred=torch.zeros(1), ztsnr=torch.zeros(1))


def kohya_metadata(file: Path) -> None:
    add(file, {"modelspec.prediction_type": "v"})


def yaml_beside(file: Path) -> None:
    """As A1111 reads it: sd_models_config.py, find_checkpoint_config."""
    yaml_of(file).write_text('model:\n  params:\n    parameterization: "v"\n    linear_start: 0.00085\n')


def index_of_the_original(file: Path) -> None:
    """A sidecar with an index that names a scheduler which cannot end in pure noise."""
    both_markers(file)
    index = json.loads((sidecar(file) / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "PNDMScheduler"]
    (sidecar(file) / "model_index.json").write_text(json.dumps(index))


def nothing(_file: Path) -> None:
    pass


@unets
@pytest.mark.parametrize(
    ("change", "velocity", "zero_snr"),
    [
        (nothing, False, False),
        (v_marker, True, False),
        (both_markers, True, True),
        (kohya_metadata, True, False),
        (yaml_beside, True, False),
        (index_of_the_original, True, True),
    ],
)
def test_the_scheduler_follows_the_file_and_a_sidecar_comes_first(
    family: Family, file: Path, tmp_path: Path, change: Callable[[Path], None], velocity: bool, zero_snr: bool
) -> None:
    kept = (sidecar(file) / SCHEDULER).read_text()
    without_scheduler(file)
    change(file)
    folder = unet.single_file_config(file, tmp_path / "cache", family.module.CONFIG)
    scheduler = json.loads((folder / SCHEDULER).read_text())
    assert scheduler.get("prediction_type", "epsilon") == ("v_prediction" if velocity else "epsilon")
    assert scheduler.get("rescale_betas_zero_snr", False) == zero_snr
    assert scheduler.get("timestep_spacing") != "trailing" or zero_snr
    if zero_snr:
        index = json.loads((folder / "model_index.json").read_text())
        assert index["scheduler"] == ["diffusers", scheduler["_class_name"]] != ["diffusers", "PNDMScheduler"]
    (sidecar(file) / SCHEDULER).parent.mkdir()
    (sidecar(file) / SCHEDULER).write_text(kept)
    folder = unet.single_file_config(file, tmp_path / "cache", family.module.CONFIG)
    assert (folder / SCHEDULER).read_text() == kept


@pytest.mark.parametrize("family", ["sdxl1"], indirect=True)
def test_a_checkpoint_of_a_folder_that_predicts_velocity_says_so(family: Family, folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / SCHEDULER).read_text()) | {"prediction_type": "v_prediction"}
    (folder / SCHEDULER).write_text(json.dumps(config))
    checkpoint.write(family.load(folder, tmp_path), tmp_path / "saved.safetensors", torch.float32, {})
    with safe_open(tmp_path / "saved.safetensors", "pt") as tensors:
        assert set(tensors.keys()) & {"v_pred", "ztsnr"} == {"v_pred"}
        assert tensors.metadata()["modelspec.prediction_type"] == "v"


@unets
def test_a_base_with_another_noise_schedule_is_refused_by_the_loader_too(
    family: Family, folder: Path, tmp_path: Path
) -> None:
    """A row of a preset with a repository of the hub is not looked at before."""
    scheduler = {"_class_name": "EDMEulerScheduler", "sigma_max": 120.0, "prediction_type": "v_prediction"}
    (folder / SCHEDULER).write_text(json.dumps(scheduler))  # as diffusers' documentation has it for CosXL
    index = json.loads((folder / "model_index.json").read_text()) | {"scheduler": ["diffusers", "EDMEulerScheduler"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="noise levels of EDM"):
        family.load(folder, tmp_path)


# How it is stored

LARGEST = {torch.float8_e4m3fn: 448, torch.float8_e5m2: 57344}


def stored(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """The tensors as fp8 in every way that ComfyUI reads (quant_ops.py; the older ops.py, scaled_fp8_ops), and the
    weights that they stand for. Layers take turns: a scale for all, in the older and in newer words, one for each row,
    no scale."""
    file: Tensors = {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}
    weights: Tensors = {}
    layers = [key for key, value in tensors.items() if key.endswith(".weight") and value.dim() == 2]
    for key, value in tensors.items():
        way = layers.index(key) % 5 if key in layers else 5
        layer = key.removesuffix(".weight")
        dtype = torch.float8_e5m2 if way == 4 else torch.float8_e4m3fn
        if way < 3:
            scale = value.abs().amax(1, keepdim=way == 2) if way == 2 else value.abs().max().reshape([1] * way)
            scale = scale.clamp(min=1e-3) / LARGEST[dtype]
            file[f"{layer}.{'scale_weight' if way == 0 else 'weight_scale'}"] = scale
            file[f"{layer}.{'scale_input' if way == 0 else 'input_scale'}"] = torch.tensor(3.0)  # of products in fp8
            if way:
                told = json.dumps({"format": "float8_e4m3fn"}).encode()
                file[f"{layer}.comfy_quant"] = torch.tensor(list(told), dtype=torch.uint8)
            file[key] = (value / scale).to(dtype)
            weights[key] = file[key].float() * scale
        else:
            file[key] = value.to(dtype) if way < 5 else value
            weights[key] = file[key].float()
    return file, weights


@pytest.mark.parametrize("family", FAMILIES, indirect=True)
def test_fp8_is_multiplied_by_its_scales(family: Family, whole: Path, tmp_path: Path) -> None:
    plain = load_file(whole)
    numbers = {key: value for key, value in plain.items() if value.is_floating_point()}
    file, expected = stored(numbers)
    save_file({key: value.contiguous() for key, value in (plain | file).items()}, whole)
    got: Any = family.load(whole, tmp_path)
    save_file({key: expected.get(key, value).contiguous() for key, value in plain.items()}, whole)
    same: Any = family.load(whole, tmp_path)
    save_file(plain, whole)
    near: Any = family.load(whole, tmp_path)
    compared = 0
    for part in family.parts:
        of_plain, of_same = (getattr(one.pipeline, part).state_dict() for one in (near, same))
        for name, weight in getattr(got.pipeline, part).state_dict().items():
            assert torch.allclose(weight, of_same[name], rtol=1e-5, atol=1e-7), name
            # fp8 keeps two or three digits after the point in base 2.
            assert float((weight - of_plain[name]).abs().max()) <= float(of_plain[name].abs().max()) / 8, name
            compared += int(not torch.equal(weight, of_plain[name]))
    assert compared > 50  # most layers are stored as fp8


HARMLESS = (
    "model_ema.diffusion_modelinput_blocks00weight", "betas", "denoiser.sigmas", "first_stage_model.loss.logvar",
    "cond_stage_model.logit_scale", "conditioner.embedders.0.transformer.text_projection.weight", "safety_checker.a",
)  # fmt: skip
UNKNOWN = {
    "sd15": [
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.7.norm1.weight",
        "first_stage_model.decoder.mid.attn_9.q.weight",
        "cond_stage_model.transformer.text_model.encoder.layers.9.mlp.fc1.weight",
    ],
    "sdxl1": ["conditioner.embedders.1.model.transformer.resblocks.9.ln_1.weight"],
    "flux1": ["vae.decoder.mid.attn_9.q.weight", "text_encoders.t5xxl.transformer.encoder.block.9.layer.0.x.weight"],
}


@pytest.mark.parametrize(
    ("family", "key"), [(name, key) for name, keys in UNKNOWN.items() for key in keys], indirect=["family"]
)
def test_a_tensor_without_a_place_is_refused_by_its_name(family: Family, whole: Path, tmp_path: Path, key: str) -> None:
    add(whole, **{key: torch.ones(3)})
    with pytest.raises(ValueError, match=f"1 tensors are unknown, {key} among them"):
        family.load_lazily(whole, tmp_path)


@pytest.mark.parametrize("family", ["sd15"], indirect=True)
def test_tensors_that_no_loader_needs_are_left_out_and_others_beside_the_model_are_logged(
    family: Family, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    add(whole, **{key: torch.ones(3) for key in HARMLESS})
    family.load(whole, tmp_path)
    assert "tensors of a single file" not in caplog.text
    add(whole, **{"my_notes.weight": torch.ones(3)})
    family.load(whole, tmp_path)
    assert "1 tensors of a single file are not used, my_notes.weight among them" in caplog.text


@pytest.mark.parametrize("family", ["sd15"], indirect=True)
def test_a_format_that_only_the_tensor_names_is_refused(family: Family, whole: Path, tmp_path: Path) -> None:
    layer = "model.diffusion_model.time_embed.0"
    weight = load_file(whole)[f"{layer}.weight"]
    told = torch.tensor(list(b'{"format": "int8_tensorwise", "convrot": true}'), dtype=torch.uint8)
    add(whole, **{f"{layer}.weight": weight.to(torch.float8_e4m3fn), f"{layer}.comfy_quant": told})
    with pytest.raises(ValueError, match=r"int8_tensorwise\+convrot"):
        family.load(whole, tmp_path)


# Folders


@pytest.mark.parametrize("family", ["sd15"], indirect=True)
def test_a_folder_in_plain_fp8_is_read_and_one_with_scales_is_refused(
    family: Family, folder: Path, tmp_path: Path
) -> None:
    weights = next((folder / "unet").glob("*.safetensors"))
    tensors = {key: value.to(torch.float8_e5m2) for key, value in load_file(weights).items()}
    save_file(tensors, weights, {"format": "pt"})
    loaded = family.load(folder, tmp_path).pipeline.unet.state_dict()
    assert all(torch.equal(value, tensors[key].float()) for key, value in loaded.items())
    layer = "time_embedding.linear_1"
    save_file(tensors | {f"{layer}.weight_scale": torch.ones(1)}, weights, {"format": "pt"})
    with pytest.raises(ValueError, match=r"unet/.* has scales \(time_embedding.linear_1.weight_scale\)"):
        family.load(folder, tmp_path)
    save_file(tensors | {f"{layer}.weight.absmax": torch.ones(1)}, weights, {"format": "pt"})
    with pytest.raises(ValueError, match="quantized as bitsandbytes"):
        family.load(folder, tmp_path)


@pytest.mark.parametrize("part", ["safety_checker", "image_encoder"])
def test_a_part_of_a_folder_that_is_not_loaded_may_be_a_pointer_of_git_lfs(tmp_path: Path, part: str) -> None:
    """`git lfs pull --include "unet/*"` leaves them; diffusers reads the folder with `safety_checker=None`."""
    (tmp_path / part).mkdir()
    (tmp_path / part / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert loading.folder_source(tmp_path, None)["pretrained_model_name_or_path"] == tmp_path
