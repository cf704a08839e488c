"""The branch that needs no GPU and no download: a very small base that goes through the very code of sd15."""

from __future__ import annotations

import json
import string
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from trainer.bases import Base
from trainer.branches import sd15
from trainer.files import whole_folder


def load(base: Base, device: torch.device, cache: Path) -> sd15.SD15:
    """Load the small base, making its folder first where it is not there yet."""
    assert base.path is not None, "bases.py gives the fast base its folder"
    if not base.path.exists():
        with whole_folder(base.path) as folder:
            make_base(folder)
    return sd15.load(base, device, cache)


def make_base(folder: Path) -> None:
    """Write the base as a diffusers folder: 64 px, 16x16x4 latents, 2.6 M weights, the same ones on every machine.

    The weights are random: the base renders coloured noise until a trained one takes its place.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(32, 64, 128),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=16,
            attention_head_dim=4,
            cross_attention_dim=64,
        )
        vae = AutoencoderKL(
            sample_size=64,
            block_out_channels=(16, 32, 32),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=16,
            scaling_factor=1.0,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(vocabulary()),
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=77,
                projection_dim=64,
                bos_token_id=0,
                eos_token_id=1,
                pad_token_id=1,
            )
        )
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
