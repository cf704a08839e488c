"""Weighted prompts of any length, for bases with CLIP text encoders only (sd15, sdxl1).

The syntax of the hosted service's `use_lpw`, `(word:1.3)`, is that of diffusers' community pipeline Long Prompt
Weighting (lpw_stable_diffusion): a text is encoded in chunks of 75 tokens, each token's hidden state is multiplied by
its weight, and then the mean of all is restored.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainer.methods.new_tokens import TOKENIZERS

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from transformers import PreTrainedTokenizerBase

UP, DOWN = 1.1, 1 / 1.1
MOST = 100.0  # a larger weight is a typing error; much larger ones would overflow hidden states
BREAK = "BREAK"
NUMBER = r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
MARK = re.compile(rf"\\[()\[\]]|[(\[\])]|:\s*({NUMBER})\s*\)|\b{BREAK}\b")
# Limits for restoring the mean: with negative weights it may be near or below 0, and the factor would become huge or
# negative. Usual weights (0.5 to 1.5) stay well within.
RATIOS = (0.5, 2.0)
Tokens = list[tuple[int, float]]


def parse(text: str) -> list[tuple[str, float]]:
    """Split a prompt into pieces of text and their weights, from -100 to 100; the piece `BREAK` begins a new chunk.

    `(word)` is 1.1, `[word]` 1/1.1, `(word:1.3)` 1.3; nested brackets multiply. `\\(`, `\\)`, `\\[` and `\\]` are plain
    brackets, and so are brackets without a partner.
    """
    marks = list(MARK.finditer(text))
    partners = pairs(marks)
    pieces: list[tuple[str, float]] = []
    weights = [1.0]

    def put(piece: str) -> None:
        weight = max(-MOST, min(MOST, weights[-1]))
        if pieces and pieces[-1][1] == weight and pieces[-1][0] != BREAK:
            pieces[-1] = (pieces[-1][0] + piece, weight)  # a word with a bracket inside is still one word
        elif piece:
            pieces.append((piece, weight))

    end = 0
    for number, mark in enumerate(marks):
        put(text[end : mark.start()])
        end = mark.end()
        if mark[0] == BREAK:
            pieces.append((BREAK, 1.0))
        elif mark[0][0] == "\\":
            put(mark[0][1])
        elif number not in partners:
            put(mark[0])
        elif mark[0] in "([":
            given = marks[partners[number]][1]
            weights.append(weights[-1] * (float(given) if given else UP if mark[0] == "(" else DOWN))
        else:
            weights.pop()
    put(text[end:])
    return pieces


def pairs(marks: list[re.Match[str]]) -> dict[int, int]:
    """Position of each bracket -> position of its partner. An open bracket inside a closed pair has no partner."""
    partners: dict[int, int] = {}
    opened: list[int] = []
    waiting = {"(": 0, "[": 0}  # open brackets of each kind: without it, many unmatched brackets would take long
    for number, mark in enumerate(marks):
        if mark[0] in waiting:
            opened.append(number)
            waiting[mark[0]] += 1
        elif mark[0][0] != "\\" and mark[0][-1] in ")]":
            kind = "(" if mark[0][-1] == ")" else "["
            while waiting[kind]:
                last = opened.pop()
                waiting[marks[last][0]] -= 1
                if marks[last][0] == kind:
                    partners |= {last: number, number: last}
                    break
    return partners


@torch.no_grad()
def encode(pipeline: DiffusionPipeline, text: str, negative: str | None) -> dict[str, Tensor]:
    """Prompt embeddings for a stock pipeline of SD 1.5 or SDXL, for one picture.

    prompt_embeds and negative_prompt_embeds (1, 77 n, D) of n chunks, as many as the longer text has; for SDXL
    pooled_prompt_embeds and negative_pooled_prompt_embeds (1, P) of the first chunk. For a text without weights that
    fits in one chunk, the values equal those of `pipeline.encode_prompt`. Raises ValueError for a pipeline with other
    text encoders than CLIP's.
    """
    parts = [part for part in TOKENIZERS if getattr(pipeline, part, None) is not None]
    for part in parts:
        kind = getattr(pipeline, part).config.model_type
        if not kind.startswith("clip"):
            raise ValueError(f"use_lpw works with CLIP text encoders (sd15, sdxl1), and this base has {kind}")
    wide = "text_encoder_2" in parts
    texts = {"prompt_embeds": text, "negative_prompt_embeds": negative or ""}
    read = {
        (key, part): chunks(pipeline, parse(one), getattr(pipeline, TOKENIZERS[part]))
        for key, one in texts.items()
        for part in parts
    }
    count = max(map(len, read.values()))
    # SDXL was trained with zeros for no text, and its pipeline uses them.
    zeros = wide and negative is None and pipeline.config.force_zeros_for_empty_prompt
    inputs: dict[str, Tensor] = {}
    for key in texts:
        pooled_key = key.replace("prompt", "pooled_prompt")
        if key.startswith("negative") and zeros:
            inputs[key] = torch.zeros_like(inputs["prompt_embeds"])
            inputs[pooled_key] = torch.zeros_like(inputs["pooled_prompt_embeds"])
            continue
        hidden = []
        for part in parts:
            padded = read[key, part] + [[]] * (count - len(read[key, part]))
            states, pooled = hidden_states(pipeline, part, padded, penultimate=wide)
            hidden.append(states)
        last = getattr(pipeline, parts[-1])
        inputs[key] = torch.cat(hidden, dim=-1).to(last.dtype)
        if wide:
            inputs[pooled_key] = pooled
    return inputs


def chunks(
    pipeline: DiffusionPipeline, pieces: list[tuple[str, float]], tokenizer: PreTrainedTokenizerBase
) -> list[Tokens]:
    """Token ids and weights in chunks of at most 75 (the tokenizer's length without begin and end); at least one."""
    room = tokenizer.model_max_length - 2
    made: list[Tokens] = [[]]
    for piece, weight in pieces:
        if piece == BREAK:
            made += [[]] if made[-1] else []
            continue
        spelled = pipeline.maybe_convert_prompt(piece, tokenizer)  # replaces learned tokens
        # verbose: else it would warn of texts longer than CLIP's limit.
        for token in tokenizer(spelled, add_special_tokens=False, verbose=False).input_ids:
            if len(made[-1]) == room:
                made.append([])
            made[-1].append((token, weight))
    return made if made[-1] else made[:-1] or made


def hidden_states(
    pipeline: DiffusionPipeline, part: str, texts: list[Tokens], *, penultimate: bool
) -> tuple[Tensor, Tensor]:
    """Chunks -> their weighted hidden states one after another, (1, 77 n, D), and the pooled first one, (1, P)."""
    encoder, tokenizer = getattr(pipeline, part), getattr(pipeline, TOKENIZERS[part])
    device, length = pipeline._execution_device, tokenizer.model_max_length
    states, pooled, weights = [], [], []
    for tokens in texts:  # one at a time: the embedding of a chunk does not depend on its neighbours
        ids = [tokenizer.bos_token_id, *(token for token, _ in tokens), tokenizer.eos_token_id]
        ids += [tokenizer.pad_token_id] * (length - len(ids))
        output = encoder(torch.tensor([ids], device=device), output_hidden_states=penultimate)
        pooled.append(output[0])
        states.append(output.hidden_states[-2] if penultimate else output[0])
        weights += [1.0, *(weight for _, weight in tokens)] + [1.0] * (length - 1 - len(tokens))
    hidden = torch.cat(states, dim=1).to(device)
    if any(weight != 1 for weight in weights):
        before = hidden.float()
        after = before * torch.tensor(weights, device=device)[None, :, None]
        ratio = torch.nan_to_num(before.mean() / after.mean(), nan=1.0).clamp(*RATIOS)
        hidden = after * ratio
    return hidden, pooled[0]
