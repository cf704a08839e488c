"""The text encoder and the UNet of branch fast, trained together on captioned scenes."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from benchmarks.fast_base import scenes
from benchmarks.fast_base.fit import fit

BOS, EOS = "<|startoftext|>", "<|endoftext|>"

# Velocities (Salimans & Ho 2022) over the linear schedule (Ho et al. 2020). What a caption tells, the colour and place
# of a thing of some 60 latents, is open only where the noise has over 60 times the variance of the signal: 36 % of this
# schedule, and 8 % of the cosine one. It is made to end in pure noise, where sampling starts (Lin et al. 2023).
SCHEDULE = {
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "steps_offset": 1,  # unused by this spacing, and asked for by the pipeline
    "clip_sample": False,
}


# What a caption may tell of a scene, and the values that it may have.
FACTS: dict[str, list[str]] = {
    "noun": list(scenes.NOUNS),
    "colour": list(scenes.COLOURS),
    "place": list(scenes.PLACES),
    "ground": list(scenes.GROUNDS),
    "ground_colour": ["", *scenes.COLOURS],
    "light": list(dict.fromkeys(scenes.LIGHTS)),
    "material": ["", *scenes.MATERIALS],
    "size": list(scenes.SIZES),
    "style": ["", *scenes.STYLES],
}


def make_tokenizer(captions: Sequence[str], length: int, folder: Path) -> CLIPTokenizer:
    """A byte-pair tokenizer in CLIP's files: each word of the captions is one token, any other is spelled."""
    alphabet = [*string.ascii_lowercase, *string.digits, *string.punctuation]
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=100_000,
        min_frequency=1,
        special_tokens=[BOS, EOS, *alphabet, *(f"{letter}</w>" for letter in alphabet)],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learner.train_from_iterator(sorted({word for caption in captions for word in re.findall(r"\w+", caption)}), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    vocab, merges = learner.model.save(str(folder))
    tokenizer = CLIPTokenizer(vocab, merges, unk_token=EOS, pad_token=EOS, model_max_length=length)
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_modules(text: dict[str, Any], unet: dict[str, Any], words: int, side: int) -> tuple[CLIPTextModel, Any]:
    """The text encoder and the UNet, with random weights."""
    blocks = tuple(unet["blocks"])
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=words,
            hidden_size=text["width"],
            intermediate_size=4 * text["width"],
            num_hidden_layers=text["layers"],
            num_attention_heads=text["heads"],
            max_position_embeddings=text["length"],
            projection_dim=text["width"],
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )
    denoiser = UNet2DConditionModel(
        sample_size=side,
        block_out_channels=blocks,
        down_block_types=tuple(unet["down"]),
        up_block_types=tuple(unet["up"]),
        layers_per_block=unet["layers"],
        norm_num_groups=unet["groups"],
        attention_head_dim=unet["heads"],
        cross_attention_dim=text["width"],
        resnet_time_scale_shift="scale_shift",
        # The caption as a whole is added to the time embedding as well: colours and grounds are learned from there
        # long before cross-attention finds its words.
        addition_embed_type="text",
        addition_embed_type_num_heads=text["heads"],
    )
    return encoder, denoiser


def embed(tokenizer: CLIPTokenizer, encoder: Any, captions: Sequence[str], device: torch.device) -> Tensor:
    """B captions -> (B, length, width)."""
    length = tokenizer.model_max_length
    tokens = tokenizer(list(captions), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    hidden: Tensor = encoder(tokens.input_ids.to(device))[0]
    return hidden


def train_words(
    tokenizer: CLIPTokenizer,
    encoder: Any,
    shown: Sequence[scenes.Scene],
    recipe: dict[str, Any],
    seed: int,
    folder: Path,
    device: torch.device,
) -> None:
    """Teach the text encoder to tell scenes apart by their captions, before it speaks to the UNet.

    The last tokens, which have seen all others and are padding but in the longest captions, are to tell one fact of the
    scene each, by a linear layer. It takes minutes, and what a caption says of colour and place would take the UNet's
    error hours to teach.
    """
    heads = nn.ModuleDict({fact: nn.Linear(encoder.config.hidden_size, len(values)) for fact, values in FACTS.items()})
    heads.to(device)

    def told(captions: Sequence[str], picked: Sequence[scenes.Scene]) -> dict[str, tuple[Tensor, Tensor]]:
        """Of each fact the logits (B, values) and which value is true (B,)."""
        hidden = embed(tokenizer, encoder, captions, device)
        true = {fact: [values.index(getattr(scene, fact)) for scene in picked] for fact, values in FACTS.items()}
        return {
            fact: (heads[fact](hidden[:, -1 - place]), torch.tensor(true[fact], device=device))
            for place, fact in enumerate(FACTS)
        }

    def loss(generator: torch.Generator) -> Tensor:
        picked = torch.randint(len(shown), (recipe["batch"],), generator=generator).tolist()
        words = word_generator(generator)
        answers = told([scenes.tell(words, shown[index]) for index in picked], [shown[index] for index in picked])
        return torch.stack([nn.functional.cross_entropy(*answer) for answer in answers.values()]).sum()

    def judge() -> dict[str, float]:
        rng = np.random.default_rng(seed)
        unseen = [scenes.decide(rng, for_measure=True) for _ in range(recipe["judged"])]
        answers = told([scenes.tell(rng, scene, everything=True) for scene in unseen], unseen)
        return {fact: float((logits.argmax(dim=1) == true).float().mean()) for fact, (logits, true) in answers.items()}

    fit("words", nn.ModuleDict({"text_encoder": encoder, "heads": heads}), loss, recipe, seed, folder, judge)


def word_generator(generator: torch.Generator) -> np.random.Generator:
    return np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))


def near(place: str, side: int, weight: float) -> Tensor:
    """(1, H, W): `weight` in the disc of a quarter of the side around a place, 1 elsewhere; brought to mean 1."""
    x, y = scenes.PLACES[place]
    across = (torch.arange(side) + 0.5) / side
    there = torch.hypot(across[None, :] - x, across[:, None] - y) < 0.25
    weights = torch.where(there, weight, 1.0)[None]
    return weights / weights.mean()


def train_base(
    latents: Tensor,
    shown: Sequence[scenes.Scene],
    vae: Any,
    settings: dict[str, Any],
    seed: int,
    folder: Path,
    device: torch.device,
    judge: Callable[[StableDiffusionPipeline], dict[str, float]],
) -> StableDiffusionPipeline:
    """Train on latents (N, 4, H, W) of scenes, and return the pipeline; `judge` measures one while it is trained."""
    rng = np.random.default_rng(seed)
    captions = [scenes.tell(rng, scene, names=False) for scene in shown]
    tokenizer = make_tokenizer(captions, settings["text_encoder"]["length"], folder / "tokenizer")
    torch.manual_seed(seed)
    encoder, unet = make_modules(settings["text_encoder"], settings["unet"], len(tokenizer), latents.shape[-1])
    encoder.to(device)
    unet.to(device)
    train_words(tokenizer, encoder, shown, settings["words"], seed, folder, device)
    schedule = DDPMScheduler(**SCHEDULE)
    schedule.alphas_cumprod = schedule.alphas_cumprod.to(device)
    recipe = settings["base"]
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(**SCHEDULE, set_alpha_to_one=True),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)

    places = {place: near(place, latents.shape[-1], recipe["thing_weight"]) for place in scenes.PLACES}

    def loss(generator: torch.Generator) -> Tensor:
        """Squared error of the velocity, which counts more around the main thing; a caption is told in new words each
        time, and sometimes not at all."""
        picked = torch.randint(len(latents), (recipe["batch"],), generator=generator)
        words = word_generator(generator)
        told = [
            "" if words.random() < recipe["caption_dropout"] else scenes.tell(words, shown[index])
            for index in picked.tolist()
        ]
        clean = latents[picked].float().to(device)
        noise = torch.randn(clean.shape, generator=generator).to(device)
        late = torch.rand(len(clean), generator=generator).sqrt()  # twice as often where the layout is decided
        times = (len(schedule.alphas_cumprod) * late).long().to(device)
        noisy, target = schedule.add_noise(clean, noise, times), schedule.get_velocity(clean, noise, times)
        predicted = unet(noisy, times, embed(tokenizer, encoder, told, device), return_dict=False)[0]
        weight = torch.stack([places[shown[index].place] for index in picked.tolist()]).to(device)
        return ((predicted - target).square() * weight).mean()

    modules = nn.ModuleDict({"text_encoder": encoder, "unet": unet})
    fit("base", modules, loss, recipe, seed, folder, lambda: judge(pipeline))
    return pipeline
