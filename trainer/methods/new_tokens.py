"""Learned tokens of a text encoder: a token means new embeddings in addition to the table (textual inversion).

The user writes the plain token, `ohwx`, as a separate word in any case; CLIP gets `<ohwx-0> <ohwx-1>`, which no
vocabulary has. Other text encoders get the token as written.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from trainer.branches import loading

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from transformers import PreTrainedTokenizerBase

# A pipeline's CLIP text encoders: their tokenizers, and their keys in the files that ComfyUI and A1111 read.
TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
KEYS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
NEAR = 1e-5
LEGACY_EOS = 2  # the wrong end-of-text id in CLIP's published configs


class NewWords(nn.Module):
    """A token embedding with additional rows (n, D) for the ids from `first` on; the original table is not trained."""

    def __init__(
        self, table: nn.Embedding | NewWords, rows: Tensor, first: int, token: str, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        super().__init__()
        # The table comes first: an encoder's dtype is that of its first weight.
        self.table = table
        # float32: bf16 is too coarse for small steps. Frozen until it is trained.
        self.new = nn.Embedding.from_pretrained(rows.float().clone())  # type: ignore[no-untyped-call]
        self.first, self.token = first, token
        self.tokenizer = tokenizer  # the original one, without these tokens
        self.norms: tuple[float, float] | None = None

    @property
    def rows(self) -> Tensor:
        """The new embeddings (n, D)."""
        rows: Tensor = self.new.weight
        return rows

    @property
    def weight(self) -> Tensor:
        """The table (V, D), as in a plain embedding."""
        weight: Tensor = self.table.weight
        return weight

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> (B, T, D)."""
        place = ids - self.first
        new = (place >= 0) & (place < len(self.rows))
        known: Tensor = self.table(ids.where(~new, 0))
        rows = self.rows.to(known.dtype)[place.clamp(0, len(self.rows) - 1)]
        return torch.where(new[..., None], rows, known)


def of(pipeline: DiffusionPipeline, part: str) -> NewWords | None:
    """The newest learned tokens of a text encoder; None where it has none, is not CLIP, or has been freed."""
    encoder = getattr(pipeline, part, None)
    table = None if encoder is None else encoder.get_input_embeddings()
    return table if isinstance(table, NewWords) else None


def rows_of(pipeline: DiffusionPipeline) -> dict[str, Tensor]:
    """Part of the pipeline -> its new rows (n, D), on the CPU."""
    found = {part: of(pipeline, part) for part in TOKENIZERS}
    return {part: words.rows.detach().cpu().clone() for part, words in found.items() if words}


def token_of(pipeline: DiffusionPipeline) -> str | None:
    words = of(pipeline, "text_encoder")
    return words.token if words else None


def spelled(token: str, count: int) -> list[str]:
    """The vocabulary entries of a token with `count` embeddings; in lower case, as CLIP's tokenizers read all texts."""
    return [f"<{token.lower()}-{number}>" for number in range(count)]


def expand(pipeline: DiffusionPipeline, prompt: str | list[str], tokenizer: PreTrainedTokenizerBase) -> str | list[str]:
    """Replace each token that this tokenizer knows by its vocabulary entries. It replaces diffusers'
    `maybe_convert_prompt`, which would also find the token inside other words (`sks` in "masks")."""
    if isinstance(prompt, list):
        return [str(expand(pipeline, one, tokenizer)) for one in prompt]
    for part, name in TOKENIZERS.items():
        for words in all_of(pipeline, part) if getattr(pipeline, name, None) is tokenizer else ():
            pattern = rf"(?<!\w){re.escape(words.token)}(?!\w)"
            prompt = re.sub(pattern, " ".join(spelled(words.token, len(words.rows))), prompt, flags=re.IGNORECASE)
    return prompt


def all_of(pipeline: DiffusionPipeline, part: str) -> Iterator[NewWords]:
    """All learned tokens of a text encoder, the newest first."""
    words: nn.Module | None = of(pipeline, part)
    while isinstance(words, NewWords):
        yield words
        words = words.table


def add(pipeline: DiffusionPipeline, token: str, rows: Mapping[str, Tensor]) -> None:
    """Add a token to a pipeline. rows: part -> (n, D). Raises ValueError for a part, or a D, that it does not have."""
    pipeline.maybe_convert_prompt = partial(expand, pipeline)
    for part, tensor in rows.items():
        encoder = getattr(pipeline, part, None)
        width = None if encoder is None else encoder.get_input_embeddings().weight.shape[1]
        if encoder is None or width != tensor.shape[1]:
            raise ValueError(
                f"learned tokens {tuple(tensor.shape)} do not fit {part}, whose tokens have {width} numbers"
            )
        tokenizer = getattr(pipeline, TOKENIZERS[part])
        names, wider = spelled(token, len(tensor)), copy.deepcopy(tokenizer)
        wider.add_tokens(names)
        table = encoder.get_input_embeddings()
        first = wider.convert_tokens_to_ids(names[0])
        encoder.set_input_embeddings(NewWords(table, tensor, first, token, tokenizer).to(table.weight.device))
        pipeline.register_modules(**{TOKENIZERS[part]: wider})
        # With it, transformers takes the highest id as the text's end: that would be a learned token.
        for module in encoder.modules():
            if getattr(module, "eos_token_id", None) == LEGACY_EOS:
                module.eos_token_id = tokenizer.eos_token_id


def remove(pipeline: DiffusionPipeline) -> None:
    """Remove all learned tokens."""
    vars(pipeline).pop("maybe_convert_prompt", None)
    for part in TOKENIZERS:
        while words := of(pipeline, part):
            getattr(pipeline, part).set_input_embeddings(words.table)
            pipeline.register_modules(**{TOKENIZERS[part]: words.tokenizer})


def meaning(pipeline: DiffusionPipeline, part: str, text: str) -> Tensor:
    """The mean (D,) of a text's embeddings: the initial value of a learned token."""
    ids = getattr(pipeline, TOKENIZERS[part])(text, add_special_tokens=False).input_ids
    table = getattr(pipeline, part).get_input_embeddings().weight
    mean: Tensor = table[ids].float().mean(0).detach().cpu()
    return mean


@torch.no_grad()
def keep_norms(pipeline: DiffusionPipeline) -> None:
    """Scale each new row back into the range of the table's norms.

    A row of large norm dominates the rest of the text (diffusers' advanced DreamBooth script limits the deviation of
    all new rows for the same reason).
    """
    for part in TOKENIZERS:
        if words := of(pipeline, part):
            norms = words.rows.norm(dim=1, keepdim=True)
            wanted = norms.clamp(*norm_range(words))
            # Rows outside only by rounding are not changed: a resumed run must not move them again.
            outside = (norms - wanted).abs() > NEAR * wanted
            words.rows.mul_(torch.where(outside, wanted / norms, 1.0))


def norm_range(words: NewWords) -> tuple[float, float]:
    """The smallest norm above 0 and the largest norm of the table's rows; computed once."""
    if words.norms is None:
        norms = words.weight.float().norm(dim=1)
        norms = norms[norms > 0]
        words.norms = float(norms.min()), float(norms.max())
    return words.norms


def save(pipeline: DiffusionPipeline, file: Path, metadata: dict[str, str]) -> None:
    """Write the new rows as `clip_l` (n, 768) and, with a second encoder, `clip_g` (n, 1280), float32."""
    save_file({KEYS[part]: rows for part, rows in rows_of(pipeline).items()}, file, metadata)


def load(file: Path) -> dict[str, Tensor]:
    """Part of a pipeline -> rows, from a file of its own or bundled with a LoRA (`bundle_emb.TOKEN.clip_l`).

    Raises ValueError for unknown keys, or several tokens.
    """
    parts = {key: part for part, key in KEYS.items()}
    found = {key: value for key, value in loading.read_tensors(file)[0].items() if is_rows(key)}
    names = [key.rpartition(".")[2] for key in found]
    if strange := [key for key in found if key.rpartition(".")[2] not in parts]:
        raise ValueError(f"{file.name} has learned tokens under {strange[0]!r}; known are {', '.join(parts)}")
    if len(set(names)) < len(names):
        raise ValueError(f"{file.name} has the words of several tokens; one is possible")
    return {parts[name]: value for name, value in zip(names, found.values(), strict=True)}


def is_rows(key: str) -> bool:
    """Whether a file's key belongs to learned tokens, not to a LoRA."""
    return key in KEYS.values() or key.startswith("bundle_emb.")
