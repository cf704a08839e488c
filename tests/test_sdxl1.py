"""Branch sdxl1: what it loads and encodes, and the names that its adapters have elsewhere."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from tests.bench import Bench, Told, config_of
from trainer.bases import Base
from trainer.branches import sdxl1
from trainer.methods import lora

CPU = torch.device("cpu")
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")


def load(path: Path, cache: Path) -> sdxl1.SDXL1:
    return sdxl1.load(Base(1, path.name, "sdxl1", path=path), CPU, cache)


def test_folder_and_single_file_have_the_very_same_weights(
    tiny_sdxl1: Path, tiny_sdxl1_file: Path, tmp_path: Path
) -> None:
    stock = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl1, local_files_only=True)
    for path in (tiny_sdxl1, tiny_sdxl1_file):
        pipeline = load(path, tmp_path).pipeline
        for part in PARTS:
            expected, got = getattr(stock, part).state_dict(), getattr(pipeline, part).state_dict()
            assert got.keys() == expected.keys()
            assert all(torch.equal(got[name], expected[name]) for name in expected), part


def test_a_folder_with_a_missing_weight_is_refused(tiny_sdxl1: Path, tmp_path: Path) -> None:
    for part in PARTS:
        folder = Path(shutil.copytree(tiny_sdxl1, tmp_path / part))
        file = next((folder / part).glob("*.safetensors"))
        tensors = load_file(file)
        del tensors[next(name for name in tensors if "mlp.fc2.weight" in name or "conv_out.weight" in name)]
        save_file(tensors, file, {"format": "pt"})
        with pytest.raises(ValueError, match="missing"):
            load(folder, tmp_path)


def test_captions_are_encoded_as_the_renderer_does_and_an_empty_one_is_zeros(tiny_sdxl1: Path, tmp_path: Path) -> None:
    branch = load(tiny_sdxl1, tmp_path)
    stock = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl1, local_files_only=True)
    hidden, empty, pooled, empty_pooled = stock.encode_prompt("a dog", device="cpu", negative_prompt=None)
    cond = branch.encode_prompts(["a dog", ""])
    assert torch.allclose(cond["encoder_hidden_states"], torch.cat([hidden, empty]), atol=1e-5)
    assert torch.allclose(cond["text_embeds"], torch.cat([pooled, empty_pooled]), atol=1e-5)
    assert not cond["text_embeds"][1].any()
    branch.pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    assert branch.encode_prompts([""])["text_embeds"].any()


def test_the_model_is_told_the_picture_s_size(tiny_sdxl1: Path, tmp_path: Path) -> None:
    told = load(tiny_sdxl1, tmp_path).encode_size((1200, 900), (16, 0), (1152, 896))
    assert told["time_ids"].tolist() == [[1200, 900, 16, 0, 1152, 896]]


def test_the_full_size_configuration_has_the_published_number_of_weights() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(sdxl1.CONFIG["unet/config.json"])
        encoder = CLIPTextModelWithProjection(CLIPTextConfig(**sdxl1.CONFIG["text_encoder_2/config.json"]))
    assert sum(weight.numel() for weight in unet.parameters()) == 2_567_463_684
    assert sum(weight.numel() for weight in encoder.parameters()) == 694_659_840


def test_kohya_s_names_of_the_full_size_model() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(sdxl1.CONFIG["unet/config.json"])
    ends = tuple(f".{target}" for target in sdxl1.UNET_TARGETS["all"])
    layers = [name for name, module in unet.named_modules() if name.endswith(ends) and hasattr(module, "weight")]
    names = {sdxl1.original_name(name).replace(".", "_") for name in layers}
    assert len(names) == len(layers) == 722  # the number that kohya's own trainer tells for SDXL
    assert names > {
        "input_blocks_4_1_proj_in",
        "input_blocks_8_1_transformer_blocks_9_attn1_to_q",
        "middle_block_1_transformer_blocks_0_ff_net_0_proj",
        "output_blocks_0_1_transformer_blocks_0_attn2_to_out_0",
        "output_blocks_5_1_proj_out",
    }
    assert not any("down_blocks" in name or "up_blocks" in name for name in names)


@pytest.mark.parametrize("file", ["lora.safetensors", "lora_diffusers.safetensors"])
def test_a_stock_pipeline_renders_what_the_trained_adapters_do(
    tiny_sdxl1: Path, photos: list[Path], tmp_path: Path, file: str
) -> None:
    config = config_of(steps=4, lr=5e-2, resolution=64, rank=2, alpha=4)
    run = Bench(tiny_sdxl1, tmp_path / "cache", photos, config, "sdxl1").start()
    run.train(tmp_path / "states", Told())
    (tmp_path / "model").mkdir()
    lora.save(run.branch, tmp_path / "model", config, {})
    stock = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl1, local_files_only=True)
    said = stock.encode_prompt("a dog", device="cpu", negative_prompt=None)
    keys = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")

    def picture(pipeline: object) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        inputs = dict(zip(keys, said, strict=True))
        size = {"height": 64, "width": 64, "num_inference_steps": 3, "output_type": "latent"}
        return pipeline(**inputs, **size, generator=generator).images  # type: ignore[operator]

    base = picture(stock)
    stock.load_lora_weights(tmp_path / "model", weight_name=file)
    expected = picture(run.branch.pipeline)
    assert float((expected - base).abs().max()) > 0.05
    assert float((picture(stock) - expected).abs().max()) < 1e-4
