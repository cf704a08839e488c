"""The weights under the original release's keys: what is written is what stock diffusers reads, and the other tools."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from peft import LoraConfig

from tests.helpers import tiny
from tests.helpers.families import CPU, FAMILIES, LEVEL, Family, original_tensors, other_weights, render
from tests.helpers.fast import fast_base
from tests.helpers.training import same
from trainer.branches.protocol import Branch, load_branch
from trainer.library.bases import Base
from trainer.library.models_folder import sidecar

BASES = {"tiny_sd15": "sd15", "thin_sd15": "sd15", "tiny_sdxl1": "sdxl1", "tiny_flux1": "flux1"}


@pytest.fixture(params=BASES)
def base(request: pytest.FixtureRequest) -> Path:
    """Each tiny model's folder. Read only."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def family(base: Path) -> Family:
    """Of the base."""
    return FAMILIES[{"thin": "sd15"}.get(base.name, base.name)]


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory) -> Branch:
    """Branch fast with its own base. Read only."""
    return load_branch(fast_base(), CPU, tmp_path_factory.mktemp("fast"))


@pytest.fixture
def branch(family: Family, base: Path, tmp_path: Path, kept: dict[tuple[str, str], Any]) -> Any:
    """The base as our branch loads it. Read only."""
    if ("branch", base.name) not in kept:
        kept["branch", base.name] = family.load(base, tmp_path)
    return kept["branch", base.name]


# Their names


@pytest.mark.parametrize("base", ["tiny_sd15", "tiny_sdxl1", "tiny_flux1"], indirect=True)
def test_weights_have_the_names_and_the_shapes_of_the_original_release(family: Family, branch: Any) -> None:
    modules = {part: getattr(branch.pipeline, part) for part in family.parts}
    assert same(branch.original_weights(), original_tensors(family.name, modules))


def entries(weights: Iterable[str], row: str) -> set[str]:
    """`input_blocks.1.0` and the like."""
    names = (name.removeprefix("model.diffusion_model.").split(".") for name in weights)
    return {".".join(name[1:3]) for name in names if name[0] == row}


@pytest.mark.parametrize("base", ["thin_sd15"], indirect=True)
def test_fewer_blocks_and_layers_are_counted_on_in_one_row(branch: Any) -> None:
    weights = branch.original_weights()
    # Two blocks of one layer: with attention and a downsampler, without; and on the way up the other way round.
    assert entries(weights, "input_blocks") == {"0.0", "1.0", "1.1", "2.0", "3.0"}
    assert entries(weights, "output_blocks") == {"0.0", "1.0", "1.1", "2.0", "2.1", "3.0", "3.1"}
    assert "model.diffusion_model.input_blocks.2.0.op.weight" in weights
    assert "model.diffusion_model.output_blocks.1.1.conv.weight" in weights
    assert "first_stage_model.decoder.up.1.upsample.conv.weight" in weights
    assert "first_stage_model.decoder.up.0.block.1.conv1.weight" in weights


def test_what_the_release_does_not_know_keeps_its_name(fast: Branch) -> None:
    weights = fast.original_weights()
    modules = (fast.pipeline.unet, fast.pipeline.vae, fast.pipeline.text_encoder)
    assert len(weights) == sum(len(module.state_dict()) for module in modules)  # none is lost, none is written twice
    unet = fast.pipeline.unet.state_dict()
    prefix = "model.diffusion_model."
    kept = {name for name in unet if prefix + name in weights}
    assert kept == {name for name in unet if name.startswith(("add_embedding.", "encoder_hid_proj."))}
    assert all(torch.equal(weights[prefix + name], unet[name]) for name in kept)
    # Four blocks of one layer, those in the middle with attention.
    assert entries(weights, "input_blocks") == {"0.0", "1.0", "2.0", "3.0", "3.1", "4.0", "5.0", "5.1", "6.0", "7.0"}
    attention = "down_blocks.2.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    assert torch.equal(weights[f"{prefix}input_blocks.5.1.transformer_blocks.0.attn2.to_k.weight"], unet[attention])


# Reading them back


def write(branch: Branch, folder: Path, file: Path) -> Path:
    """A file of a branch's weights; its sidecar has what the folder has besides."""
    without = "transformer/*.safetensors" if folder.name == "flux1" else "*/*.safetensors"
    return tiny.write_with_sidecar(branch.original_weights(), folder, file, without)


@pytest.fixture
def written(
    branch: Any, base: Path, tmp_path_factory: pytest.TempPathFactory, kept: dict[tuple[str, str], Any]
) -> Path:
    """The file that is written of the base. Read only."""
    if ("written", base.name) not in kept:
        file = tmp_path_factory.mktemp("written") / f"{base.name}.safetensors"
        kept["written", base.name] = write(branch, base, file)
    return kept["written", base.name]


def test_a_written_file_is_the_folder_it_came_from(family: Family, branch: Any, written: Path, tmp_path: Path) -> None:
    again = family.load(written, tmp_path)
    assert again.pipeline.components.keys() == branch.pipeline.components.keys()
    assert other_weights(again.pipeline, branch.pipeline, family.parts) == []
    torch.testing.assert_close(render(again.pipeline), render(branch.pipeline), rtol=0, atol=LEVEL)


@pytest.mark.parametrize("base", ["tiny_sd15", "thin_sd15", "tiny_sdxl1"], indirect=True)
def test_stock_diffusers_reads_a_written_file_too(family: Family, base: Path, written: Path) -> None:
    from_file = family.stock.from_single_file(
        str(written), config=str(sidecar(written)), local_files_only=True, **family.stock_options
    )
    from_folder = family.load_stock(base)
    assert from_file.components.keys() == from_folder.components.keys()
    assert other_weights(from_file, from_folder, family.parts) == []
    torch.testing.assert_close(render(from_file), render(from_folder), rtol=0, atol=LEVEL)


def test_a_file_of_branch_fast_is_read_by_the_branch_itself(fast: Branch, tmp_path: Path) -> None:
    """Its layers that the release does not know are in the file, and diffusers does not look for them."""
    folder, parts = fast_base().path, FAMILIES["sd15"].parts
    assert folder is not None
    file = write(fast, folder, tmp_path / "fast.safetensors")
    read = load_branch(Base(1, "x", "fast", path=file), CPU, tmp_path)
    assert read.pipeline.components.keys() == fast.pipeline.components.keys()
    assert other_weights(read.pipeline, fast.pipeline, parts) == []
    with torch.no_grad():
        for weight in read.denoiser.parameters():
            weight.zero_()
    read.load_weights(file, tmp_path)
    assert other_weights(read.pipeline, fast.pipeline, parts) == []
    tensors = safetensors.torch.load_file(file)
    safetensors.torch.save_file({key: value for key, value in tensors.items() if "encoder_hid_proj" not in key}, file)
    with pytest.raises(ValueError, match="encoder_hid_proj"):
        load_branch(Base(1, "x", "fast", path=file), CPU, tmp_path)


# What is written


def test_the_weights_are_the_modules_own_without_a_gradient(family: Family, base: Path, tmp_path: Path) -> None:
    branch = family.load(base, tmp_path)
    branch.denoiser.requires_grad_(True).to(torch.float16)
    weights = branch.original_weights()
    assert not any(tensor.requires_grad for tensor in weights.values())
    ours = {tensor.data_ptr() for tensor in branch.denoiser.state_dict().values()}
    assert ours & {tensor.data_ptr() for tensor in weights.values()}  # what is not stacked is not copied
    of_denoiser = [name for name in weights if family.name == "flux1" or name.startswith("model.diffusion_model.")]
    assert {weights[name].dtype for name in of_denoiser} == {torch.float16}
    assert {weights[name].dtype for name in weights.keys() - of_denoiser} <= {torch.float32}


def test_adapters_are_left_out(family: Family, base: Path, tmp_path: Path) -> None:
    branch = family.load(base, tmp_path)
    before = branch.original_weights()
    adapter = LoraConfig(r=2, target_modules=branch.lora_targets["all"], init_lora_weights=False)
    branch.denoiser.add_adapter(adapter)
    assert any(".lora_A." in name for name in branch.denoiser.state_dict())
    assert same(branch.original_weights(), before)


@pytest.mark.parametrize("base", ["tiny_sd15", "tiny_sdxl1"], indirect=True)
def test_text_encoders_that_have_been_dropped_are_missed(family: Family, base: Path, tmp_path: Path) -> None:
    branch = family.load(base, tmp_path)
    last = [name for name in family.parts if name in branch.text_encoders][-1]
    branch.pipeline.register_modules(**{last: None})
    with pytest.raises(ValueError, match="text encoder has been dropped"):
        branch.original_weights()


@pytest.mark.parametrize("base", ["tiny_flux1"], indirect=True)
def test_a_flux1_file_does_without_text_encoders(family: Family, base: Path, tmp_path: Path) -> None:
    branch = family.load(base, tmp_path)
    before = branch.original_weights()
    branch.pipeline.register_modules(text_encoder=None, text_encoder_2=None)
    assert same(branch.original_weights(), before)
