"""Pivotal tuning (Roich et al. 2021, arXiv 2106.05744; for diffusion: cloneofsimo/lora): learned tokens and a LoRA.

The embeddings of a few learned tokens are trained in the first part of the run, the adapters in the whole run.
"""

from __future__ import annotations

from pathlib import Path

from trainer.branches.protocol import Branch
from trainer.config.train_config import TrainConfig
from trainer.methods import lora, new_tokens
from trainer.methods.protocol import Group

LARGE = False
checkable_files, apply = lora.checkable_files, lora.apply


def needed_text_encoders(branch: Branch, config: TrainConfig) -> list[str]:
    """See `Method.needed_text_encoders`."""
    return list(branch.text_encoders if config.text_encoder_lr else branch.token_encoders)


def prepare(branch: Branch, config: TrainConfig, token: str, name: str, earlier: Path | None) -> list[str]:
    """Load the earlier LoRA and continue its tokens; without any, new ones start as the mean of the class name's."""
    warnings = lora.prepare(branch, config, token, name, earlier)
    brought = new_tokens.rows_of(branch.parts)
    if brought and len(next(iter(brought.values()))) == config.tokens:
        return warnings
    if brought:
        count = len(next(iter(brought.values())))
        warnings.append(
            f"the earlier model has {count} learned tokens for its token, not {config.tokens}: they start again"
        )
        new_tokens.remove(branch.parts)
    parts = [part for part in new_tokens.TOKENIZERS if part in branch.token_encoders]
    starts = {part: new_tokens.meaning(branch.parts, part, name) for part in parts}
    new_tokens.add(branch.parts, token, {part: start.repeat(config.tokens, 1) for part, start in starts.items()})
    return warnings


def attach(branch: Branch, config: TrainConfig) -> list[Group]:
    """The adapters' groups, and one of the learned tokens, which is not trained after `token_share` of the steps."""
    groups = lora.attach(branch, config)
    rows = {
        f"{part}.new_words": found.rows
        for part in new_tokens.TOKENIZERS
        if (found := new_tokens.of(branch.parts, part))
    }
    for tensor in rows.values():
        tensor.requires_grad_(True)
    # No decay: it would shrink the embeddings to zero.
    words: Group = {
        "params": list(rows.values()),
        "names": list(rows),
        "lr": config.token_lr,
        "weight_decay": 0.0,
        "until": config.token_steps,
    }
    return [*groups, words]


def after_step(branch: Branch) -> None:
    """Keep the norms of learned tokens in the range of the table's."""
    new_tokens.keep_norms(branch.parts)


def save(branch: Branch, folder: Path, config: TrainConfig, metadata: dict[str, str]) -> list[str]:
    """See `lora.save`; metadata says that the files belong together."""
    return lora.save(branch, folder, config, metadata | {"tunebooth.tokens": str(config.tokens)})
