"""The names of model families and model types, and the properties of each model type."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

# The families, the oldest first. Each has trainer/branches/NAME.py and presets/NAME.toml.
BRANCHES = ("sd15", "sdxl1", "flux1", "fast")
DEFAULT_BRANCH = "sd15"  # of a request without a branch, as at the hosted service
DEMO_BRANCH = "fast"  # needs no card and no download: the default on the page, and of the demo
# How a prompt names a model: <lora:NAME:WEIGHT>, <faceid:NAME:WEIGHT>.
LORA_REFERENCE, FACE_REFERENCE = "lora", "faceid"
# The files of a trained tune, by their names in `GET /tunes/ID/model?format=`.
FORMATS = {
    "kohya": "lora.safetensors",
    "diffusers": "lora_diffusers.safetensors",
    "embeddings": "lora_emb.safetensors",
    "bundled": "lora_bundled.safetensors",
    "checkpoint": "checkpoint.safetensors",
    "faceid": "faceid.safetensors",
}
CHECKPOINT_FORMAT, FACE_FORMAT = "checkpoint", "faceid"
CHECKPOINT_FILE = FORMATS[CHECKPOINT_FORMAT]
IDENTITY_FILE = FORMATS[FACE_FORMAT]
LORA_FORMATS = ("kohya", "diffusers", "embeddings", "bundled")


@dataclass(frozen=True)
class ModelType:
    """The properties of the tunes of a model type."""

    description: str  # for the metadata of its files
    formats: tuple[str, ...]  # names in FORMATS: the files that a tune may have
    made: tuple[str, ...] = ()  # formats that are made at the first request
    words: tuple[str, ...] = ()  # words of `args` that only some model types have; for the others they are 0
    reference: str | None = None  # how a prompt's text names it; None: prompts are posted to it
    trains: bool = True  # False: the tune has no weights and is ready when its photos are analyzed
    whole_model: bool = False  # its weights replace the base's; a LoRA is added to the base's
    learns_tokens: bool = False  # trains embeddings of new tokens as well
    needs_person: bool = False  # the photos must show one person

    @property
    def adapter(self) -> bool:
        """Whether its weights are a LoRA, which is added to a base."""
        return self.reference == LORA_REFERENCE


MODEL_TYPES = {
    "lora": ModelType(
        description="a LoRA",
        formats=LORA_FORMATS,
        made=("checkpoint",),
        words=("rank", "alpha"),
        reference=LORA_REFERENCE,
    ),
    "pti": ModelType(
        description="a LoRA with learned tokens",
        formats=LORA_FORMATS,
        made=("checkpoint",),
        words=("rank", "alpha", "tokens", "token_lr", "token_share"),
        reference=LORA_REFERENCE,
        learns_tokens=True,
    ),
    "checkpoint": ModelType(
        description="a DreamBooth checkpoint",
        formats=(CHECKPOINT_FORMAT,),
        made=("diffusers",),
        whole_model=True,
    ),
    "faceid": ModelType(
        description="a face",
        formats=(FACE_FORMAT,),
        reference=FACE_REFERENCE,
        trains=False,
        needs_person=True,
    ),
}
METHODS = tuple(MODEL_TYPES)
DEFAULT_METHOD = "lora"  # the presets of the other LoRA types start from its table; photos are checked for it
# Words of `args` that only some model types have -> these model types.
WORDS = {
    word: tuple(name for name, one in MODEL_TYPES.items() if word in one.words)
    for word in chain.from_iterable(one.words for one in MODEL_TYPES.values())
}
