"""The text encoder and the UNet of branch fast, trained together on captioned scenes."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence
from functools import partial
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

# Velocities (Salimans & Ho 2022) over the linear schedule (Ho et al. 2020). Captions give the colour and place of
# things of about 60 latents; these are open only where the noise has over 60 times the variance of the signal: 36 %
# of this schedule, 8 % of the cosine one. It ends in pure noise, where sampling starts (Lin et al. 2023).
SCHEDULE = {
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "steps_offset": 1,  # unused with this spacing, but the pipeline needs it
    "clip_sample": False,
}


# Facts in captions, with their possible values. The size of a thing that is shown close is "close".
FACTS: dict[str, list[str]] = {
    "noun": list(scenes.NOUNS),
    "colour": list(scenes.COLOURS),
    "place": list(scenes.PLACES),
    "size": [*scenes.SIZES, "close"],
    "material": ["", *scenes.MATERIALS],
    "ground": list(scenes.GROUNDS),
    "ground colour": ["", *scenes.COLOURS],
    "light": list(dict.fromkeys(scenes.LIGHTS)),
    "style": ["", *scenes.STYLES],
    "role": ["thing", "other", "ground", "light"],  # what the token describes
    "name": list(string.ascii_lowercase),  # letters of a made-up name
}
WEIGHTS = {"size": 0.5, "material": 0.5, "role": 0.5, "name": 0.15}  # of the facts' codes; else 1
CODE_SCALE = 3.0
COPIES = 4  # of the tokens with facts; more copies get more of the UNet's attention from the start
RIDGE = 20.0  # for decoding: there are nearly as many codes as dimensions, and errors would be amplified
GRID = 4  # bumps along a side that encode a place
BUMP = 0.2  # width of a bump, as a share of the side


def make_tokenizer(captions: Sequence[str], length: int, folder: Path) -> CLIPTokenizer:
    """A byte-pair tokenizer in CLIP's format: each word of the captions is one token, others are spelled."""
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
        cross_attention_dim=unet["told"],
        encoder_hid_dim=text["width"],  # a linear layer, trained with the text encoder
        encoder_hid_dim_type="text_proj",
        resnet_time_scale_shift="scale_shift",
        # The pooled caption is also added to the time embedding: it teaches colours and grounds long before
        # cross-attention does.
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


def make_codes(width: int) -> dict[str, Tensor]:
    """Fact -> a vector for each value, (values, width): random, but similar for places that are near."""
    generator = torch.Generator().manual_seed(0)
    codes = {fact: torch.randn(len(values), width, generator=generator) for fact, values in FACTS.items()}
    middles = torch.tensor([scenes.PLACES[place] for place in FACTS["place"]])
    grid = (torch.arange(GRID) + 0.5) / GRID
    apart = torch.cdist(middles, torch.cartesian_prod(grid, grid))
    bumps = torch.exp(-((apart / BUMP) ** 2) / 2)
    placed = (bumps - bumps.mean(dim=0)) @ torch.randn(GRID**2, width, generator=generator)
    codes["place"] = placed / placed.std()
    return {fact: CODE_SCALE * WEIGHTS.get(fact, 1.0) * code for fact, code in codes.items()}


def facts_of(scene: scenes.Scene, name: str = "") -> list[dict[str, str]]:
    """Facts of each of the last tokens: of the main thing, the other thing, the ground, the light."""
    size = "close" if scene.close else scene.size
    thing = {"noun": scene.noun, "colour": scene.colour, "place": scene.place, "size": size}
    other = dict(zip(("noun", "colour", "place"), scene.other, strict=True)) if scene.other else {}
    return [
        {"role": "thing", **thing, "material": scene.material, "name": name},
        {"role": "other", **other} if other else {},
        {"role": "ground", "ground": scene.ground, "ground colour": scene.ground_colour},
        {"role": "light", "light": scene.light, "style": scene.style},
    ]


def encode_facts(codes: dict[str, Tensor], token_facts: list[dict[str, str]]) -> Tensor:
    """The sum of the codes of each token's facts, (tokens, width). A name has a code for each letter."""
    tokens = torch.zeros(len(token_facts), codes["role"].shape[1])
    for token, facts in zip(tokens, token_facts, strict=True):
        for fact, value in facts.items():
            for one in value if fact == "name" else [value]:
                token += codes[fact][FACTS[fact].index(one)]
    return tokens


def train_words(
    tokenizer: CLIPTokenizer,
    encoder: Any,
    projection: nn.Linear,
    shown: Sequence[scenes.Scene],
    recipe: dict[str, Any],
    seed: int,
    folder: Path,
    device: torch.device,
) -> None:
    """Train the text encoder, and the layer of the UNet that takes its output, to encode the facts of captions.

    The last tokens see all others, and are padding except in the longest captions. They become the sums of the codes of
    facts: one token has all facts of a thing, so the UNet finds its colour and place together. All other tokens become
    zero. Training this with the UNet's error would take hours.
    """
    codes = make_codes(projection.out_features)
    targets = torch.stack([encode_facts(codes, facts_of(scene)) for scene in shown])
    slots = targets.shape[1]
    silent = torch.zeros(recipe["batch"], tokenizer.model_max_length - COPIES * slots, targets.shape[2])
    letters = codes["name"]

    def project(captions: Sequence[str]) -> Tensor:
        hidden: Tensor = projection(embed(tokenizer, encoder, captions, device))
        return hidden

    def loss(generator: torch.Generator) -> Tensor:
        picked = torch.randint(len(shown), (recipe["batch"],), generator=generator).tolist()
        words = word_generator(generator)
        target = targets[picked]
        captions = []
        for row, index in enumerate(picked):
            if words.random() < recipe["caption_dropout"]:
                captions.append("")
                target[row] = 0
                continue
            name = scenes.made_up(words, recipe["names"])
            captions.append(scenes.caption(words, shown[index], name=name))
            target[row, 0] += sum((letters[FACTS["name"].index(letter)] for letter in name), torch.zeros(()))
        wanted = torch.cat([silent, target.repeat(1, COPIES, 1)], dim=1).to(device)
        return (project(captions) - wanted).square().mean() / CODE_SCALE**2

    def judge() -> dict[str, float]:
        """Share of unseen scenes whose facts are decoded from the tokens (ridge regression on the codes)."""
        rng = np.random.default_rng(seed)
        unseen = [scenes.decide(rng, for_measure=True) for _ in range(recipe["judged"])]
        captions = [scenes.caption(rng, scene, everything=True) for scene in unseen]
        tokens = project(captions)[:, -slots:].cpu()
        right = {}
        for slot, facts in enumerate(zip(*[facts_of(scene) for scene in unseen], strict=True)):
            names = [fact for fact in facts[0] if fact != "name"]
            if all(facts):  # not every scene has a second thing
                table = torch.cat([codes[fact] for fact in names])
                shares = tokens[:, slot] @ table.T @ torch.linalg.inv(table @ table.T + RIDGE * torch.eye(len(table)))
                parts = shares.split([len(codes[fact]) for fact in names], dim=1)
                for fact, part in zip(names, parts, strict=True):
                    true = torch.tensor([FACTS[fact].index(one[fact]) for one in facts])
                    right[fact] = float((part.argmax(dim=1) == true).float().mean())
        return right

    fit("words", nn.ModuleDict({"text_encoder": encoder, "projection": projection}), loss, recipe, seed, folder, judge)


def word_generator(generator: torch.Generator) -> np.random.Generator:
    return np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))


def near(place: str, side: int, weight: float) -> Tensor:
    """(1, H, W): `weight` in the disc of a quarter of the side around a place, 1 elsewhere; scaled to mean 1."""
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
    """Train on latents (N, 4, H, W) of scenes, and return the pipeline; `judge` measures it during training."""
    rng = np.random.default_rng(seed)
    captions = [scenes.caption(rng, scene) for scene in shown]
    tokenizer = make_tokenizer(captions, settings["text_encoder"]["length"], folder / "tokenizer")
    torch.manual_seed(seed)
    encoder, unet = make_modules(settings["text_encoder"], settings["unet"], len(tokenizer), latents.shape[-1])
    encoder.to(device)
    unet.to(device)
    train_words(tokenizer, encoder, unet.encoder_hid_proj, shown, settings["words"], seed, folder, device)
    schedule = DDPMScheduler(**SCHEDULE)
    schedule.alphas_cumprod = schedule.alphas_cumprod.to(device)
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

    places = {place: near(place, latents.shape[-1], settings["base"]["thing_weight"]) for place in scenes.PLACES}

    def loss(recipe: dict[str, Any], generator: torch.Generator) -> Tensor:
        """Squared error of the velocity, with more weight around the main thing. Captions are worded differently each
        time, and sometimes dropped."""
        picked = torch.randint(len(latents), (recipe["batch"],), generator=generator)
        words = word_generator(generator)
        captions = [
            ""
            if words.random() < recipe["caption_dropout"]
            else scenes.caption(words, shown[index], name=scenes.made_up(words, recipe["names"]))
            for index in picked.tolist()
        ]
        clean = latents[picked].float().to(device)
        noise = torch.randn(clean.shape, generator=generator).to(device)
        late = torch.rand(len(clean), generator=generator) ** recipe["early"]
        times = (len(schedule.alphas_cumprod) * late).long().to(device)
        noisy, target = schedule.add_noise(clean, noise, times), schedule.get_velocity(clean, noise, times)
        predicted = unet(noisy, times, embed(tokenizer, encoder, captions, device), return_dict=False)[0]
        weight = torch.stack([places[shown[index].place] for index in picked.tolist()]).to(device)
        return ((predicted - target).square() * weight).mean()

    modules = nn.ModuleDict({"text_encoder": encoder, "unet": unet})
    for stage in ("base", "detail"):
        recipe = settings[stage]
        fit(stage, modules, partial(loss, recipe), recipe, seed, folder, lambda: judge(pipeline))
    return pipeline
