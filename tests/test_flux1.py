"""Branch flux1: what it loads and encodes, and the names that its adapters have elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5EncoderModel

from tests.bench import Bench, Run, Told, config_of
from tests.tiny import write_flux_file
from trainer.bases import Base
from trainer.branches import flux1
from trainer.methods import lora

CPU = torch.device("cpu")
PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2")


def load(path: Path, cache: Path) -> flux1.Flux1:
    return flux1.load(Base(1, path.name, "flux1", path=path), CPU, cache)


# Loading


@pytest.mark.parametrize("kind", ["folder", "transformer alone", "whole file"])
def test_every_layout_has_the_very_same_weights(
    tiny_flux1: Path, tiny_flux1_file: Path, tmp_path: Path, kind: str
) -> None:
    path = tiny_flux1 if kind == "folder" else tiny_flux1_file
    if kind == "whole file":
        path = write_flux_file(tiny_flux1, tmp_path / "whole.safetensors", whole=True)
    stock, pipeline = FluxPipeline.from_pretrained(tiny_flux1, local_files_only=True), load(path, tmp_path).pipeline
    for part in PARTS:
        expected, got = getattr(stock, part).state_dict(), getattr(pipeline, part).state_dict()
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], expected[name]) for name in expected), part
    assert pipeline.tokenizer_2("a dog").input_ids == stock.tokenizer_2("a dog").input_ids


def test_the_transformer_is_read_only_when_it_is_asked_for(tiny_flux1: Path, tmp_path: Path) -> None:
    branch = load(tiny_flux1, tmp_path)
    branch.encode_prompts(["a dog"])
    branch.drop_text_encoders()
    assert branch._pipeline.transformer is None and branch._pipeline.text_encoder_2 is None
    assert branch.denoiser is branch.denoiser is branch._pipeline.transformer
    assert not any(weight.requires_grad for weight in branch.denoiser.parameters())


def change(tensors: dict[str, torch.Tensor], how: str) -> dict[str, torch.Tensor]:
    key = "double_blocks.1.img_attn.qkv.weight"
    if how == "missing":
        return {name: value for name, value in tensors.items() if name != key}
    if how == "misshapen":
        return tensors | {key: tensors[key][:-3].contiguous()}
    return tensors | {f"{key}.quant_map": torch.zeros(16)}


@pytest.mark.parametrize(
    ("how", "reason"), [("missing", "3 weights are missing"), ("misshapen", "rows, not"), ("quantised", "quantised")]
)
def test_a_file_that_is_not_whole_is_refused(tiny_flux1: Path, tmp_path: Path, how: str, reason: str) -> None:
    file = write_flux_file(tiny_flux1, tmp_path / "base.safetensors")
    save_file(change(load_file(file), how), file)
    branch = load(file, tmp_path)
    with pytest.raises(ValueError, match=reason):
        _ = branch.denoiser


def test_the_full_size_configuration_has_the_published_number_of_weights() -> None:
    with torch.device("meta"):
        transformer = FluxTransformer2DModel.from_config(flux1.CONFIG["transformer/config.json"])
        vae = AutoencoderKL.from_config(flux1.CONFIG["vae/config.json"])
        encoder = T5EncoderModel(T5Config(**flux1.CONFIG["text_encoder_2/config.json"]))
    sizes = [sum(weight.numel() for weight in part.parameters()) for part in (transformer, vae, encoder)]
    assert sizes == [11_901_408_320, 83_819_683, 4_762_310_656]


# Encoding


def test_captions_and_pictures_are_encoded_as_the_pipeline_does(tiny_flux1: Path, tmp_path: Path) -> None:
    branch, stock = load(tiny_flux1, tmp_path), FluxPipeline.from_pretrained(tiny_flux1, local_files_only=True)
    hidden, pooled, _ = stock.encode_prompt(["a dog", ""], None, device="cpu")
    cond = branch.encode_prompts(["a dog", ""])
    assert torch.allclose(cond["encoder_hidden_states"], hidden, atol=1e-4)
    assert torch.allclose(cond["pooled_projections"], pooled, atol=1e-5)
    pixels = torch.rand(1, 3, 64, 96) * 2 - 1
    mean, std = branch.encode_images(pixels)
    posterior = stock.vae.encode(pixels).latent_dist
    assert mean.shape == (1, 4, 8, 12)
    assert torch.allclose(mean, (posterior.mean - 0.1159) * 0.3611, atol=1e-6)
    assert torch.allclose(std, posterior.std * 0.3611, atol=1e-6)


def test_latents_are_packed_as_the_pipeline_does() -> None:
    latents = torch.randn(2, 4, 6, 10)
    packed = flux1.pack(latents)
    assert torch.equal(packed, FluxPipeline._pack_latents(latents, 2, 4, 6, 10))
    assert torch.equal(flux1.unpack(packed, 6, 10), latents)
    assert torch.equal(flux1.image_ids(6, 10, CPU), FluxPipeline._prepare_latent_image_ids(2, 3, 5, CPU, torch.float32))


# Adapters


@pytest.mark.parametrize(("targets", "count"), [("all", 419), ("attention", 19 * 8 + 38 * 3)])
def test_the_full_size_model_gets_as_many_adapters_as_is_known(targets: str, count: int) -> None:
    with torch.device("meta"):
        transformer = FluxTransformer2DModel.from_config(flux1.CONFIG["transformer/config.json"])
    ends = tuple(flux1.Flux1.lora_targets[targets])
    names = [name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    assert sum(name == end or name.endswith(f".{end}") for name in names for end in ends) == count


@pytest.fixture(scope="module", params=["attention", "all"])
def trained(
    request: pytest.FixtureRequest, tiny_flux1: Path, photos: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Run, Path]:
    """Adapters of scale 2, and the folder that they were saved into."""
    folder = tmp_path_factory.mktemp("flux")
    config = config_of(steps=4, lr=5e-2, resolution=64, rank=2, alpha=4, targets=request.param)
    run = Bench(tiny_flux1, folder / "cache", photos, config, "flux1").start()
    run.train(folder / "states", Told())
    (folder / "model").mkdir()
    lora.save(run.branch, folder / "model", config, {})
    return run, folder / "model"


def predicted(transformer: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    with torch.no_grad():
        return transformer(  # type: ignore[no-any-return]
            random(1, 16, 16), random(1, 7, 16), random(1, 8), torch.tensor([0.5]), flux1.image_ids(8, 8, CPU),
            torch.zeros(7, 3), torch.ones(1), return_dict=False,
        )[0]  # fmt: skip


def test_a_stock_pipeline_gives_what_the_trained_adapters_do(trained: tuple[Run, Path], tiny_flux1: Path) -> None:
    run, folder = trained
    stock = FluxPipeline.from_pretrained(tiny_flux1, local_files_only=True)
    base, expected = predicted(stock.transformer), predicted(run.branch.denoiser)
    stock.load_lora_weights(folder, weight_name="lora_diffusers.safetensors")
    assert float((expected - base).abs().max()) > 0.05
    assert torch.allclose(predicted(stock.transformer), expected, atol=1e-4)


def test_a_program_that_merges_kohya_keys_gives_the_same(trained: tuple[Run, Path], tiny_flux1: Path) -> None:
    run, folder = trained
    transformer = FluxTransformer2DModel.from_pretrained(tiny_flux1, subfolder="transformer")
    tensors = load_file(folder / "lora.safetensors")
    layers = {name.replace(".", "_"): parts for name, parts in flux1.original_layers(transformer)}
    names = {key.partition(".")[0] for key in tensors}
    with torch.no_grad():
        for name in names:  # as ComfyUI does, on the layers of the original release
            down, up, alpha = (tensors[f"{name}.{part}"] for part in ("lora_down.weight", "lora_up.weight", "alpha"))
            weights = [transformer.get_submodule(part).weight for part in layers[name.removeprefix("lora_unet_")]]
            change = alpha / len(down) * (up @ down)
            for weight, rows in zip(weights, change.split([len(weight) for weight in weights]), strict=True):
                weight += rows
    assert "lora_unet_double_blocks_0_img_attn_qkv" in names and "lora_unet_single_blocks_1_linear1" in names
    assert torch.allclose(predicted(transformer), predicted(run.branch.denoiser), atol=1e-4)


def test_diffusers_reads_our_kohya_keys_of_the_real_width(tmp_path: Path) -> None:
    config = flux1.CONFIG["transformer/config.json"] | {"num_layers": 1, "num_single_layers": 1}
    with torch.device("meta"):
        transformer = FluxTransformer2DModel.from_config(config)
    generator, adapters = torch.Generator().manual_seed(0), {}
    targets = tuple(flux1.Flux1.lora_targets["all"])
    for name, module in transformer.named_modules():
        if isinstance(module, torch.nn.Linear) and name.endswith(targets) and name != "proj_out":
            down = torch.randn(2, module.in_features, generator=generator)
            adapters[name] = down, torch.randn(module.out_features, 2, generator=generator)

    class Wide(flux1.Flux1):
        def __init__(self) -> None: ...

        denoiser = transformer  # type: ignore[assignment]

    tensors = {}
    for name, (down, up, parts) in Wide().kohya_layers(adapters).items():
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        tensors[f"{name}.alpha"] = torch.tensor(2.0 * parts)  # alpha as large as the rank: scale 1
    save_file(tensors, tmp_path / "lora.safetensors")
    read = FluxPipeline.lora_state_dict(tmp_path, weight_name="lora.safetensors")
    expected = {}
    for name, (down, up) in adapters.items():
        expected |= {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up}
    assert read.keys() == expected.keys()
    assert all(torch.allclose(read[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("float16", 2), ("bfloat16", 2)])
def test_the_model_is_saved_in_the_format_that_is_asked_for(
    trained: tuple[Run, Path], tmp_path: Path, dtype: str, size: int
) -> None:
    run, folder = trained
    config = run.config.model_copy(update={"save_dtype": dtype})
    lora.save(run.branch, tmp_path, config, {})
    for file in ("lora.safetensors", "lora_diffusers.safetensors"):
        saved, exact = load_file(tmp_path / file), load_file(folder / file)
        assert {tensor.dtype for tensor in saved.values()} == {getattr(torch, dtype)}
        assert {tensor.element_size() for tensor in saved.values()} == {size}
        assert all(torch.allclose(saved[name].float(), exact[name], rtol=1e-2, atol=1e-5) for name in exact)
