"""Tiny random models with the layout of the real ones, made offline; the same ones from the same seed."""

from __future__ import annotations

import json
import re
import shutil
import string
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)


def make_tiny_sd15(folder: Path, seed: int = 0, blocks: int = 4, layers: int = 2) -> Path:
    """Write a Stable Diffusion 1.5 of about 0.3 M weights as a diffusers folder: all blocks of the real one, but thin.

    At 64 pixels its 8x8 latents are one in the middle block. With fewer `blocks` and `layers` a step takes less time,
    and the layout is no longer that of the real one.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16, 16, 16)[:blocks],
            down_block_types=("CrossAttnDownBlock2D",) * (blocks - 1) + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (blocks - 1),
            layers_per_block=layers,
            norm_num_groups=4,
            attention_head_dim=2,
            cross_attention_dim=16,
        )
        vae = AutoencoderKL(
            sample_size=64,
            block_out_channels=(8, 8, 16, 16)[:blocks],
            down_block_types=("DownEncoderBlock2D",) * blocks,
            up_block_types=("UpDecoderBlock2D",) * blocks,
            layers_per_block=layers,
            norm_num_groups=4,
        )
        text_encoder = CLIPTextModel(tiny_clip(16, "quick_gelu"))
    write_tokenizer(folder / "tokenizer")
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=unet,
        scheduler=PNDMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, skip_prk_steps=True, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def make_tiny_sdxl1(folder: Path, seed: int = 0, blocks: int = 3, layers: int = 2) -> Path:
    """Write an SDXL 1.0 of about 0.3 M weights as a diffusers folder: all blocks of the real one, but thin.

    At 64 pixels its 8x8x4 latents are 2x2 in the middle block. With fewer `blocks` (at least 2) and `layers` a step
    takes less time, and the layout is no longer that of the real one; the latents are then larger, as in the VAE each
    block but the last one halves the picture.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Different widths, as in the real one: diffusers tells the encoders in a single file by them.
        text_encoder = CLIPTextModel(tiny_clip(8, "quick_gelu"))
        text_encoder_2 = CLIPTextModelWithProjection(tiny_clip(16, "gelu"))
        unet = UNet2DConditionModel(
            sample_size=2 ** (6 - blocks),
            block_out_channels=(8, 16, 16)[:blocks],
            down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * (blocks - 1),
            up_block_types=("CrossAttnUpBlock2D",) * (blocks - 1) + ("UpBlock2D",),
            layers_per_block=layers,
            transformer_layers_per_block=(1, 1, 2)[:blocks],  # (1, 2, 10) in the real one
            norm_num_groups=4,
            attention_head_dim=2,  # this is how many heads there are, in spite of its name
            cross_attention_dim=8 + 16,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 16,  # six sizes and the pooled text
        )
        vae = AutoencoderKL(
            sample_size=64,
            block_out_channels=(8, 8, 16, 16)[: blocks + 1],
            down_block_types=("DownEncoderBlock2D",) * (blocks + 1),
            up_block_types=("UpDecoderBlock2D",) * (blocks + 1),
            layers_per_block=layers,
            norm_num_groups=4,
            scaling_factor=0.13025,
            force_upcast=True,
        )
    for name in ("tokenizer", "tokenizer_2"):
        write_tokenizer(folder / name)
    StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        tokenizer_2=CLIPTokenizer.from_pretrained(folder / "tokenizer_2", pad_token="!"),  # as OpenCLIP pads
        unet=unet,
        scheduler=EulerDiscreteScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            timestep_spacing="leading",
            steps_offset=1,
        ),
    ).save_pretrained(folder)
    return folder


def make_tiny_flux1(folder: Path, seed: int = 0) -> Path:
    """Write a FLUX.1-dev of about 0.14 M weights as a diffusers folder: two blocks of either kind, 16 wide.

    At 64 pixels its 8x8x4 latents are packed to 16 tokens of 16 channels; the text has 512 tokens, as in the real one.
    """
    words = t5_vocabulary()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = FluxTransformer2DModel(
            in_channels=4 * 4,  # 2x2 latents
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=8,
            guidance_embeds=True,
            axes_dims_rope=(2, 2, 4),
        )
        vae = AutoencoderKL(
            sample_size=64,
            block_out_channels=(8, 8, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            norm_num_groups=4,
            shift_factor=0.1159,
            scaling_factor=0.3611,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        text_encoder = CLIPTextModel(tiny_clip(8, "quick_gelu"))
        text_encoder_2 = T5EncoderModel(
            T5Config(
                vocab_size=len(words),
                d_model=16,
                d_kv=8,
                d_ff=32,
                num_layers=2,
                num_heads=2,
                feed_forward_proj="gated-gelu",
                tie_word_embeddings=False,
            )
        )
    write_tokenizer(folder / "tokenizer")
    FluxPipeline(
        vae=vae,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        tokenizer_2=T5Tokenizer(vocab=words, extra_ids=0, model_max_length=512),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0,
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=1.15,
            base_image_seq_len=256,
            max_image_seq_len=4096,
        ),
    ).save_pretrained(folder)
    return folder


def make_tiny_faceid(file: Path, unet: UNet2DConditionModel, vector: int = 128, seed: int = 0) -> Path:
    """Write an IP-Adapter FaceID for a UNet: its layout is that of the published files, and its LoRA has rank 4.

    vector: how many numbers an identity has; 512 in the published ones.
    """
    width, tokens, rank = unet.config.cross_attention_dim, 4, 4
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projection = nn.ModuleDict(
            {
                "proj": nn.Sequential(nn.Linear(vector, 2 * vector), nn.GELU(), nn.Linear(2 * vector, width * tokens)),
                "norm": nn.LayerNorm(width),
            }
        )
        layers: dict[str, Tensor] = {}
        # Counted are all attentions, in the order of the processors: those to itself at even numbers, those to the text
        # at odd ones. Only the latter see the face; the LoRA is in both.
        for number, name in enumerate(unet.attn_processors):
            attention = unet.get_submodule(name.removesuffix(".processor"))
            shapes = {
                "q": attention.to_q.weight.shape,
                "k": attention.to_k.weight.shape,
                "v": attention.to_v.weight.shape,
                "out": attention.to_out[0].weight.shape,
            }
            for part, (out, into) in shapes.items():
                layers[f"{number}.to_{part}_lora.down.weight"] = torch.randn(rank, into) / rank
                layers[f"{number}.to_{part}_lora.up.weight"] = torch.randn(out, rank) / rank
            if number % 2:
                for part in "kv":
                    layers[f"{number}.to_{part}_ip.weight"] = torch.randn(shapes["q"][0], width) / width**0.5
    torch.save({"image_proj": dict(projection.state_dict()), "ip_adapter": layers}, file)
    return file


def make_tiny_lora(file: Path, base: Path, seed: int = 0, rank: int = 2, words: str | None = None) -> Path:
    """Write a LoRA for a tiny base, in diffusers' keys: random, and so strong that pictures change by it.

    It lies on queries, keys and values of the denoiser and of CLIP. words: the token of two new words, which go into
    NAME_emb.safetensors beside it.
    """
    generator = torch.Generator().manual_seed(seed)
    found = {part: base / part for part in ("unet", "transformer", "text_encoder", "text_encoder_2")}
    state: dict[str, Tensor] = {}
    rows: dict[str, Tensor] = {}
    for part, folder in found.items():
        for weights in sorted(folder.glob("*.safetensors")):
            for key, value in load_file(weights).items():
                if key.endswith("token_embedding.weight"):
                    row = torch.randn(2, value.shape[1], generator=generator)
                    rows["clip_l" if part == "text_encoder" else "clip_g"] = row * float(value.std())
                if not re.search(r"\.(to_[qkv]|[qkv]_proj)\.weight$", key):
                    continue
                name = key.removesuffix(".weight")
                if part.startswith("text_encoder"):  # published files have the prefix
                    name = f"text_model.{name.removeprefix('text_model.')}"
                out, into = value.shape
                state[f"{part}.{name}.lora_A.weight"] = torch.randn(rank, into, generator=generator) / 2
                state[f"{part}.{name}.lora_B.weight"] = torch.randn(out, rank, generator=generator) / 2
    save_file(state, file, {"tunebooth.token": words, "tunebooth.tokens": "2"} if words else {})
    if words:
        save_file(rows, file.with_name(f"{file.stem}_emb.safetensors"))
    return file


def tiny_clip(width: int, activation: str) -> CLIPTextConfig:
    """A CLIP text encoder of two layers: SDXL reads what comes out of the last but one."""
    return CLIPTextConfig(
        vocab_size=len(vocabulary()),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        projection_dim=width,
        hidden_act=activation,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def vocabulary() -> list[str]:
    """A character vocabulary for CLIP's byte-pair tokenizer: no merges, so that every letter is a token."""
    characters = string.ascii_lowercase + string.digits + string.punctuation
    return ["<|startoftext|>", "<|endoftext|>", *characters, *(f"{c}</w>" for c in characters)]


def write_tokenizer(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(vocabulary())}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    end = "<|endoftext|>"
    vocab, merges = str(folder / "vocab.json"), str(folder / "merges.txt")
    CLIPTokenizer(vocab, merges, unk_token=end, model_max_length=77).save_pretrained(folder)


def t5_vocabulary() -> list[tuple[str, float]]:
    """A character vocabulary for T5's unigram tokenizer, each with its log probability; a word begins with the ▁."""
    characters = "▁" + string.ascii_letters + string.digits + string.punctuation
    return [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((character, -2.0) for character in characters)]


def write_single_file(folder: Path, file: Path) -> Path:
    """Write a diffusers folder of SD 1.5 or SDXL as one file with the keys of the original release, and its sidecar."""
    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    # The published files hold some things that are no weights of ours; a loader must not stumble over them.
    if isinstance(pipeline, StableDiffusionXLPipeline):
        tensors = sgm_tensors(pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2)
        tensors["conditioner.embedders.0.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
        tensors["conditioner.embedders.1.model.logit_scale"] = torch.tensor(4.6052)
    else:
        tensors = ldm_tensors(pipeline.unet, pipeline.vae, pipeline.text_encoder)
        tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
        tensors["alphas_cumprod"] = pipeline.scheduler.alphas_cumprod
    return write_with_sidecar(tensors, folder, file, without="*/*.safetensors")


def write_flux_file(folder: Path, file: Path, whole: bool = False) -> Path:
    """Write a diffusers folder of FLUX.1 as one file with the keys of the original release, and its sidecar folder.

    The file holds the transformer alone, and the sidecar the other parts' weights; or, with `whole`, it holds all of
    them under the names that ComfyUI gives them, and the sidecar has no weights.
    """
    pipeline = FluxPipeline.from_pretrained(folder, local_files_only=True)
    tensors = bfl_tensors(pipeline.transformer)
    if not whole:
        return write_with_sidecar(tensors, folder, file, without="transformer/*.safetensors")
    tensors = prefixed("model.diffusion_model.", tensors)
    tensors |= prefixed("vae.", ldm_vae_tensors(pipeline.vae))
    tensors |= prefixed("text_encoders.clip_l.transformer.", clip_tensors(pipeline.text_encoder))
    t5 = pipeline.text_encoder_2.state_dict()
    del t5["encoder.embed_tokens.weight"]  # the same as shared.weight, which the files hold only once
    tensors |= prefixed("text_encoders.t5xxl.transformer.", t5)
    # ComfyUI writes these too, which FLUX.1 makes no use of.
    tensors["text_encoders.clip_l.transformer.text_projection.weight"] = torch.eye(
        pipeline.text_encoder.config.hidden_size
    )
    tensors["text_encoders.clip_l.logit_scale"] = torch.tensor(4.6055)
    tensors["text_encoders.t5xxl.logit_scale"] = torch.tensor(4.6055)
    return write_with_sidecar(tensors, folder, file, without="*/*.safetensors")


def write_with_sidecar(tensors: dict[str, Tensor], folder: Path, file: Path, without: str) -> Path:
    """Write the tensors as a file, and beside it a copy of the folder `without` the files of this pattern."""
    # Cloned, since safetensors refuses tensors that share their memory.
    save_file({key: value.clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}, file)
    sidecar = shutil.copytree(folder, file.with_suffix(""))
    for weights in sidecar.glob(without):
        weights.unlink()
    return file


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in tensors.items()}


def ldm_tensors(unet: nn.Module, vae: nn.Module, text_encoder: nn.Module) -> dict[str, Tensor]:
    """All weights under the names that CompVis gave them (v1-inference.yaml), in the shapes that they have there."""
    tensors = {f"model.diffusion_model.{ldm_unet_key(key)}": value for key, value in unet.state_dict().items()}
    tensors |= prefixed("first_stage_model.", ldm_vae_tensors(vae))
    return tensors | prefixed("cond_stage_model.transformer.", clip_tensors(text_encoder))


def sgm_tensors(
    unet: nn.Module, vae: nn.Module, text_encoder: nn.Module, text_encoder_2: nn.Module
) -> dict[str, Tensor]:
    """All weights of an SDXL under the names that Stability gave them (generative-models, sd_xl_base.yaml)."""
    tensors = {
        f"model.diffusion_model.{ldm_unet_key(key, SGM_UNET_NAMES)}": value for key, value in unet.state_dict().items()
    }
    tensors |= prefixed("first_stage_model.", ldm_vae_tensors(vae))
    tensors |= prefixed("conditioner.embedders.0.transformer.", clip_tensors(text_encoder))
    return tensors | prefixed("conditioner.embedders.1.model.", open_clip_tensors(text_encoder_2))


def ldm_vae_tensors(vae: nn.Module) -> dict[str, Tensor]:
    tensors = {}
    for key, value in vae.state_dict().items():
        name = ldm_vae_key(key)
        if ".attn_1." in name and name.endswith(".weight") and value.ndim == 2:
            value = value[:, :, None, None]  # 1x1 convolutions there, linear layers here
        tensors[name] = value
    return tensors


def clip_tensors(text_encoder: nn.Module) -> dict[str, Tensor]:
    """transformers 5 dropped the prefix that all published files have."""
    return {f"text_model.{key.removeprefix('text_model.')}": value for key, value in text_encoder.state_dict().items()}


def open_clip_tensors(text_encoder: nn.Module) -> dict[str, Tensor]:
    """All weights under OpenCLIP's names: queries, keys and values are one (3 D, D), and the projection is its input
    times (D, P), where here it is a linear layer (P, D)."""
    tensors, state = {}, text_encoder.state_dict()
    for key, value in state.items():
        if ".k_proj." in key or ".v_proj." in key:
            continue
        if ".q_proj." in key:
            value = torch.cat([state[key.replace(".q_proj.", f".{letter}_proj.")] for letter in "qkv"])
            key = key.replace(".q_proj.", ".in_proj_")
        elif key == "text_projection.weight":
            value = value.T
        tensors[renamed(key, OPEN_CLIP_NAMES)] = value
    return tensors


def bfl_tensors(transformer: FluxTransformer2DModel) -> dict[str, Tensor]:
    """All weights under the names that Black Forest Labs gave them (flux, model.py), stacked as they are there."""
    tensors, state = {}, transformer.state_dict()
    blocks = [("", "", BFL_NAMES)]
    blocks += [
        (f"double_blocks.{i}.", f"transformer_blocks.{i}.", BFL_DOUBLE_NAMES)
        for i in range(transformer.config.num_layers)
    ]
    blocks += [
        (f"single_blocks.{i}.", f"single_transformer_blocks.{i}.", BFL_SINGLE_NAMES)
        for i in range(transformer.config.num_single_layers)
    ]
    for theirs, ours, names in blocks:
        for name, layers in names:
            if name.endswith("_norm"):
                tensors[f"{theirs}{name}.scale"] = state.pop(f"{ours}{layers}.weight")
                continue
            for kind in ("weight", "bias"):
                parts = [state.pop(f"{ours}{layer}.{kind}") for layer in layers.split()]
                if name == "final_layer.adaLN_modulation.1":
                    parts = list(parts[0].chunk(2)[::-1])  # shift and scale there, scale and shift here
                tensors[f"{theirs}{name}.{kind}"] = torch.cat(parts)
    assert not state, f"these have no name: {sorted(state)}"
    return tensors


# CompVis counts the layers of all blocks in one row: each entry has its resnet (0) and its attention (1). A downsampler
# is an entry of its own; an upsampler is the last part of the entry before it. The real model has two layers a block.
UNET_NAMES: list[tuple[str, Callable[..., str]]] = [
    (r"^conv_in", lambda: "input_blocks.0.0"),
    (r"^time_embedding\.linear_(\d)", lambda n: f"time_embed.{2 * n - 2}"),
    (r"^conv_norm_out", lambda: "out.0"),
    (r"^conv_out", lambda: "out.2"),
    (r"^down_blocks\.(\d)\.resnets\.(\d)", lambda block, layer: f"input_blocks.{1 + 3 * block + layer}.0"),
    (r"^down_blocks\.(\d)\.attentions\.(\d)", lambda block, layer: f"input_blocks.{1 + 3 * block + layer}.1"),
    (r"^down_blocks\.(\d)\.downsamplers\.0\.conv", lambda block: f"input_blocks.{3 + 3 * block}.0.op"),
    (r"^mid_block\.resnets\.(\d)", lambda layer: f"middle_block.{2 * layer}"),
    (r"^mid_block\.attentions\.0", lambda: "middle_block.1"),
    (r"^up_blocks\.(\d)\.resnets\.(\d)", lambda block, layer: f"output_blocks.{3 * block + layer}.0"),
    (r"^up_blocks\.(\d)\.attentions\.(\d)", lambda block, layer: f"output_blocks.{3 * block + layer}.1"),
    (r"^up_blocks\.(\d)\.upsamplers\.0", lambda block: f"output_blocks.{3 * block + 2}.{2 if block else 1}"),
]
UNET_RESNET_NAMES: list[tuple[str, Callable[..., str]]] = [
    (r"\.norm1\.", lambda: ".in_layers.0."),
    (r"\.conv1\.", lambda: ".in_layers.2."),
    (r"\.time_emb_proj\.", lambda: ".emb_layers.1."),
    (r"\.norm2\.", lambda: ".out_layers.0."),
    (r"\.conv2\.", lambda: ".out_layers.3."),
    (r"\.conv_shortcut\.", lambda: ".skip_connection."),
]
# SDXL's first block on the way up has attention too, so that its upsampler is the third part of its entry.
SGM_UNET_NAMES: list[tuple[str, Callable[..., str]]] = [
    (r"^add_embedding\.linear_(\d)", lambda n: f"label_emb.0.{2 * n - 2}"),
    (r"^up_blocks\.(\d)\.upsamplers\.0", lambda block: f"output_blocks.{3 * block + 2}.2"),
    *UNET_NAMES,
]
# The decoder's blocks are counted from the output there.
VAE_NAMES: list[tuple[str, Callable[..., str]]] = [
    (r"conv_norm_out", lambda: "norm_out"),
    (r"down_blocks\.(\d)\.resnets\.(\d)", lambda block, layer: f"down.{block}.block.{layer}"),
    (r"down_blocks\.(\d)\.downsamplers\.0", lambda block: f"down.{block}.downsample"),
    (r"up_blocks\.(\d)\.resnets\.(\d)", lambda block, layer: f"up.{3 - block}.block.{layer}"),
    (r"up_blocks\.(\d)\.upsamplers\.0", lambda block: f"up.{3 - block}.upsample"),
    (r"mid_block\.resnets\.(\d)", lambda layer: f"mid.block_{layer + 1}"),
    (r"mid_block\.attentions\.0", lambda: "mid.attn_1"),
    (r"group_norm", lambda: "norm"),
    (r"to_out\.0", lambda: "proj_out"),
    (r"to_([qkv])", lambda letter: letter),
    (r"conv_shortcut", lambda: "nin_shortcut"),
]
OPEN_CLIP_NAMES: list[tuple[str, Callable[..., str]]] = [
    (r"^text_model\.embeddings\.token_embedding", lambda: "token_embedding"),
    (r"^text_model\.embeddings\.position_embedding\.weight", lambda: "positional_embedding"),
    (r"^text_model\.final_layer_norm", lambda: "ln_final"),
    (r"^text_projection\.weight", lambda: "text_projection"),
    (r"^text_model\.encoder\.layers\.(\d)", lambda layer: f"transformer.resblocks.{layer}"),
    (r"layer_norm(\d)", lambda n: f"ln_{n}"),
    (r"self_attn", lambda: "attn"),
    (r"mlp\.fc1", lambda: "mlp.c_fc"),
    (r"mlp\.fc2", lambda: "mlp.c_proj"),
]
# Each name of Black Forest Labs, and the layers of diffusers that are stacked in it, in their order. What ends in _norm
# has a scale and no more; all others have a weight and a bias.
BFL_NAMES: list[tuple[str, str]] = [
    ("img_in", "x_embedder"),
    ("txt_in", "context_embedder"),
    ("time_in.in_layer", "time_text_embed.timestep_embedder.linear_1"),
    ("time_in.out_layer", "time_text_embed.timestep_embedder.linear_2"),
    ("guidance_in.in_layer", "time_text_embed.guidance_embedder.linear_1"),
    ("guidance_in.out_layer", "time_text_embed.guidance_embedder.linear_2"),
    ("vector_in.in_layer", "time_text_embed.text_embedder.linear_1"),
    ("vector_in.out_layer", "time_text_embed.text_embedder.linear_2"),
    ("final_layer.linear", "proj_out"),
    ("final_layer.adaLN_modulation.1", "norm_out.linear"),
]
BFL_DOUBLE_NAMES: list[tuple[str, str]] = [
    ("img_mod.lin", "norm1.linear"),
    ("img_attn.qkv", "attn.to_q attn.to_k attn.to_v"),
    ("img_attn.norm.query_norm", "attn.norm_q"),
    ("img_attn.norm.key_norm", "attn.norm_k"),
    ("img_attn.proj", "attn.to_out.0"),
    ("img_mlp.0", "ff.net.0.proj"),
    ("img_mlp.2", "ff.net.2"),
    ("txt_mod.lin", "norm1_context.linear"),
    ("txt_attn.qkv", "attn.add_q_proj attn.add_k_proj attn.add_v_proj"),
    ("txt_attn.norm.query_norm", "attn.norm_added_q"),
    ("txt_attn.norm.key_norm", "attn.norm_added_k"),
    ("txt_attn.proj", "attn.to_add_out"),
    ("txt_mlp.0", "ff_context.net.0.proj"),
    ("txt_mlp.2", "ff_context.net.2"),
]
BFL_SINGLE_NAMES: list[tuple[str, str]] = [
    ("modulation.lin", "norm.linear"),
    ("linear1", "attn.to_q attn.to_k attn.to_v proj_mlp"),
    ("norm.query_norm", "attn.norm_q"),
    ("norm.key_norm", "attn.norm_k"),
    ("linear2", "proj_out"),
]


def ldm_unet_key(key: str, names: list[tuple[str, Callable[..., str]]] = UNET_NAMES) -> str:
    """`down_blocks.1.resnets.0.conv1.weight` -> `input_blocks.4.0.in_layers.2.weight`."""
    # norm1 of a transformer block keeps its name, so that the resnets' names must be taken first.
    return renamed(renamed(key, UNET_RESNET_NAMES) if ".resnets." in key else key, names)


def ldm_vae_key(key: str) -> str:
    """`decoder.up_blocks.0.resnets.1.conv1.weight` -> `decoder.up.3.block.1.conv1.weight`."""
    return renamed(key, VAE_NAMES)


def renamed(key: str, names: list[tuple[str, Callable[..., str]]]) -> str:
    """Apply each rule once; what a pattern captures is handed to its function, digits as numbers."""
    for pattern, name in names:
        if found := re.search(pattern, key):
            captured = [int(part) if part.isdigit() else part for part in found.groups()]
            key = key[: found.start()] + name(*captured) + key[found.end() :]
    return key
