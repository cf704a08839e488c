"""The tiny models are what they claim to be: stock diffusers loads and renders them, and their files have the
original layouts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from tests.helpers import tiny
from tests.helpers.families import LEVEL, Family, other_weights, render
from trainer.library.models_folder import sidecar


@pytest.mark.parametrize("family", ["sdxl1", "flux1"], indirect=True)
def test_a_tiny_model_renders_with_the_stock_pipeline_what_its_prompt_says(stock: Any) -> None:
    dog, cat = render(stock, "a dog"), render(stock, "a cat")
    assert dog.shape == (3, 64, 64)
    assert dog.isfinite().all() and dog.std() > 0
    assert not torch.equal(dog, cat)
    assert torch.equal(dog, render(stock, "a dog"))


@pytest.mark.parametrize(
    ("family", "make"), [("sdxl1", tiny.make_tiny_sdxl1), ("flux1", tiny.make_tiny_flux1)], indirect=["family"]
)
def test_the_same_seed_makes_the_same_model_and_another_seed_another_one(
    tiny_base: Path, make: Callable[..., Path], tmp_path: Path
) -> None:
    def weights(folder: Path) -> dict[str, bytes]:
        return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*.safetensors")}

    first, again = weights(tiny_base), weights(make(tmp_path / "again", seed=0))
    other = weights(make(tmp_path / "other", seed=1))
    assert len(first) == 4
    assert first == again
    assert [name for name in first if first[name] == other[name]] == []


def test_a_thinner_sdxl_renders_too(tmp_path: Path) -> None:
    folder = tiny.make_tiny_sdxl1(tmp_path / "thin", blocks=2, layers=1)
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True)
    assert pipeline.vae_scale_factor == 4
    assert render(pipeline).shape == (3, 64, 64)


@pytest.mark.parametrize("family", ["sdxl1"], indirect=True)
def test_stock_diffusers_reads_a_single_sdxl_file_as_its_folder(
    family: Family, tiny_sdxl1_file: Path, stock: Any
) -> None:
    config = sidecar(tiny_sdxl1_file)
    assert list(config.rglob("*.safetensors")) == []
    tokenizers = {name: CLIPTokenizer.from_pretrained(config / name) for name in ("tokenizer", "tokenizer_2")}
    from_file = StableDiffusionXLPipeline.from_single_file(
        str(tiny_sdxl1_file), config=str(config), local_files_only=True, **tokenizers
    )
    assert other_weights(from_file, stock, family.parts) == []
    torch.testing.assert_close(render(from_file), render(stock), rtol=0, atol=LEVEL)


def test_a_single_sdxl_file_has_the_names_of_the_published_one(tiny_sdxl1_file: Path) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(tiny_sdxl1_file).items()}
    expected = {  # names as in sd_xl_base_1.0.safetensors; 8 and 16 wide instead of 768 and 1280
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": (1, 77),
        "conditioner.embedders.0.transformer.text_model.encoder.layers.1.self_attn.k_proj.weight": (8, 8),
        "conditioner.embedders.1.model.ln_final.weight": (16,),
        "conditioner.embedders.1.model.logit_scale": (),
        "conditioner.embedders.1.model.positional_embedding": (77, 16),
        "conditioner.embedders.1.model.text_projection": (16, 16),
        "conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_bias": (48,),
        "conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_weight": (48, 16),
        "conditioner.embedders.1.model.transformer.resblocks.1.attn.out_proj.weight": (16, 16),
        "conditioner.embedders.1.model.transformer.resblocks.1.ln_2.bias": (16,),
        "conditioner.embedders.1.model.transformer.resblocks.1.mlp.c_fc.weight": (32, 16),
        "conditioner.embedders.1.model.transformer.resblocks.1.mlp.c_proj.weight": (16, 32),
        "first_stage_model.encoder.mid.attn_1.q.weight": (16, 16, 1, 1),
        "first_stage_model.quant_conv.weight": (8, 8, 1, 1),
        "model.diffusion_model.input_blocks.8.1.transformer_blocks.1.attn2.to_k.weight": (16, 24),
        "model.diffusion_model.label_emb.0.0.weight": (32, 64),
        "model.diffusion_model.label_emb.0.2.weight": (32, 32),
        "model.diffusion_model.middle_block.1.proj_in.weight": (16, 16),
        "model.diffusion_model.output_blocks.2.2.conv.weight": (16, 16, 3, 3),
        "model.diffusion_model.output_blocks.5.2.conv.weight": (16, 16, 3, 3),
        "model.diffusion_model.output_blocks.8.0.skip_connection.weight": (8, 16, 1, 1),
    }
    assert {name: shapes.get(name) for name in expected} == expected


@pytest.mark.parametrize("family", ["flux1"], indirect=True)
def test_t5_words_survive_the_folder(stock: Any, tmp_path: Path) -> None:
    tokenizer = stock.tokenizer_2
    texts = ["a photo of ohwx dog", "a photo of Ohwx dog", "a photo of ohwx cat", "1 & 2, (3)!"]
    ids = [tokenizer(text).input_ids for text in texts]
    assert len({tuple(row) for row in ids}) == len(texts)
    assert [tokenizer.decode(row, skip_special_tokens=True) for row in ids] == texts
    assert all(tokenizer.unk_token_id not in row for row in ids)
    padded = tokenizer("a dog", padding="max_length", truncation=True, max_length=512).input_ids
    assert len(padded) == tokenizer.model_max_length == 512
    assert padded[:7] == tokenizer.convert_tokens_to_ids(["▁", "a", "▁", "d", "o", "g", "</s>"])
    assert set(padded[7:]) == {tokenizer.pad_token_id} == {0}
    tokenizer.save_pretrained(tmp_path)
    assert [type(tokenizer).from_pretrained(tmp_path)(text).input_ids for text in texts] == ids


# As in flux1-dev.safetensors, where 3072 stands in place of 16 and 128 in place of 8 (a head).
DOUBLE_BLOCK = {
    "attn.norm.key_norm.scale": (8,),
    "attn.norm.query_norm.scale": (8,),
    "attn.proj.bias": (16,),
    "attn.proj.weight": (16, 16),
    "attn.qkv.bias": (48,),
    "attn.qkv.weight": (48, 16),
    "mlp.0.bias": (64,),
    "mlp.0.weight": (64, 16),
    "mlp.2.bias": (16,),
    "mlp.2.weight": (16, 64),
    "mod.lin.bias": (96,),
    "mod.lin.weight": (96, 16),
}
SINGLE_BLOCK = {
    "linear1.bias": (112,),
    "linear1.weight": (112, 16),
    "linear2.bias": (16,),
    "linear2.weight": (16, 80),
    "modulation.lin.bias": (48,),
    "modulation.lin.weight": (48, 16),
    "norm.key_norm.scale": (8,),
    "norm.query_norm.scale": (8,),
}
OUTER = {
    "final_layer.adaLN_modulation.1.bias": (32,),
    "final_layer.adaLN_modulation.1.weight": (32, 16),
    "final_layer.linear.bias": (16,),
    "final_layer.linear.weight": (16, 16),
    "guidance_in.in_layer.bias": (16,),
    "guidance_in.in_layer.weight": (16, 256),
    "guidance_in.out_layer.bias": (16,),
    "guidance_in.out_layer.weight": (16, 16),
    "img_in.bias": (16,),
    "img_in.weight": (16, 16),
    "time_in.in_layer.bias": (16,),
    "time_in.in_layer.weight": (16, 256),
    "time_in.out_layer.bias": (16,),
    "time_in.out_layer.weight": (16, 16),
    "txt_in.bias": (16,),
    "txt_in.weight": (16, 16),
    "vector_in.in_layer.bias": (16,),
    "vector_in.in_layer.weight": (16, 8),
    "vector_in.out_layer.bias": (16,),
    "vector_in.out_layer.weight": (16, 16),
}


def test_a_flux_file_has_the_names_and_shapes_of_the_published_one(tiny_flux1_file: Path) -> None:
    expected = dict(OUTER)
    for block in range(2):
        for stream in ("img", "txt"):
            expected |= {f"double_blocks.{block}.{stream}_{name}": shape for name, shape in DOUBLE_BLOCK.items()}
        expected |= {f"single_blocks.{block}.{name}": shape for name, shape in SINGLE_BLOCK.items()}
    assert {name: tuple(tensor.shape) for name, tensor in load_file(tiny_flux1_file).items()} == expected
    # And so many has the published one, with its 19 double and 38 single blocks.
    assert 19 * 2 * len(DOUBLE_BLOCK) + 38 * len(SINGLE_BLOCK) + len(OUTER) == 780


@pytest.mark.parametrize("family", ["flux1"], indirect=True)
def test_the_stacked_layers_of_a_flux_file_can_be_taken_apart(stock: Any, tiny_flux1_file: Path) -> None:
    state, file = stock.transformer.state_dict(), load_file(tiny_flux1_file)
    q, k, v = file["double_blocks.1.img_attn.qkv.weight"].split(16)
    txt_q, txt_k, txt_v = file["double_blocks.1.txt_attn.qkv.bias"].split(16)
    single_q, single_k, single_v, mlp = file["single_blocks.1.linear1.weight"].split([16, 16, 16, 64])
    shift, scale = file["final_layer.adaLN_modulation.1.weight"].chunk(2)
    expected = {
        "transformer_blocks.1.attn.to_q.weight": q,
        "transformer_blocks.1.attn.to_k.weight": k,
        "transformer_blocks.1.attn.to_v.weight": v,
        "transformer_blocks.1.attn.add_q_proj.bias": txt_q,
        "transformer_blocks.1.attn.add_k_proj.bias": txt_k,
        "transformer_blocks.1.attn.add_v_proj.bias": txt_v,
        "transformer_blocks.1.attn.to_out.0.weight": file["double_blocks.1.img_attn.proj.weight"],
        "transformer_blocks.1.attn.to_add_out.weight": file["double_blocks.1.txt_attn.proj.weight"],
        "transformer_blocks.1.attn.norm_added_k.weight": file["double_blocks.1.txt_attn.norm.key_norm.scale"],
        "transformer_blocks.1.ff.net.0.proj.weight": file["double_blocks.1.img_mlp.0.weight"],
        "transformer_blocks.1.ff_context.net.2.weight": file["double_blocks.1.txt_mlp.2.weight"],
        "transformer_blocks.1.norm1.linear.weight": file["double_blocks.1.img_mod.lin.weight"],
        "transformer_blocks.1.norm1_context.linear.weight": file["double_blocks.1.txt_mod.lin.weight"],
        "single_transformer_blocks.1.attn.to_q.weight": single_q,
        "single_transformer_blocks.1.attn.to_k.weight": single_k,
        "single_transformer_blocks.1.attn.to_v.weight": single_v,
        "single_transformer_blocks.1.proj_mlp.weight": mlp,
        "single_transformer_blocks.1.proj_out.weight": file["single_blocks.1.linear2.weight"],
        "single_transformer_blocks.1.attn.norm_q.weight": file["single_blocks.1.norm.query_norm.scale"],
        "single_transformer_blocks.1.norm.linear.weight": file["single_blocks.1.modulation.lin.weight"],
        "norm_out.linear.weight": torch.cat([scale, shift]),
    }
    assert [name for name in expected if not torch.equal(state[name], expected[name])] == []


def test_the_sidecar_of_a_flux_file_has_all_weights_but_the_transformer(tiny_flux1_file: Path) -> None:
    folder = sidecar(tiny_flux1_file)
    assert {file.parent.name for file in folder.rglob("*.safetensors")} == {"vae", "text_encoder", "text_encoder_2"}
    assert json.loads((folder / "transformer" / "config.json").read_text())["num_layers"] == 2


@pytest.mark.parametrize("family", ["flux1"], indirect=True)
def test_a_whole_flux_file_has_all_parts_under_their_prefixes(
    stock: Any, tiny_flux1_file: Path, tiny_flux1_whole: Path
) -> None:
    config = sidecar(tiny_flux1_whole)
    assert list(config.rglob("*.safetensors")) == []
    tensors, prefix = load_file(tiny_flux1_whole), "model.diffusion_model."
    inner = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    alone = load_file(tiny_flux1_file)
    assert inner.keys() == alone.keys()
    assert all(torch.equal(inner[name], alone[name]) for name in alone)
    assert {name for name in tensors if "logit_scale" in name or "projection" in name or "shared" in name} == {
        "text_encoders.clip_l.logit_scale",
        "text_encoders.clip_l.transformer.text_projection.weight",
        "text_encoders.t5xxl.logit_scale",
        "text_encoders.t5xxl.transformer.shared.weight",
    }
    # The other parts are what diffusers reads from the file; its transformer it would take to be 3072 wide.
    given = {name: getattr(stock, name) for name in ("transformer", "tokenizer", "tokenizer_2")}
    from_file = FluxPipeline.from_single_file(str(tiny_flux1_whole), config=str(config), local_files_only=True, **given)
    from_file.text_encoder_2.tie_weights()  # the file has the words once, and diffusers leaves their second name empty
    assert other_weights(from_file, stock, ("vae", "text_encoder", "text_encoder_2")) == []
