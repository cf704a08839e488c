"""The names of model families and model types, and what is true of each model type wherever it is met."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

# The families, in the order in which they came. Each has trainer/branches/NAME.py and presets/NAME.toml.
BRANCHES = ("sd15", "sdxl1", "flux1", "fast")
DEFAULT_BRANCH = "sd15"  # where a request names none, as at the hosted service
DEMO_BRANCH = "fast"  # needs no card and no download: the first choice on the page, and of the demo
# How a prompt names a model: <lora:NAME:WEIGHT>, <faceid:NAME:WEIGHT>.
LORA_REFERENCE, FACE_REFERENCE = "lora", "faceid"
# The files of a trained tune by what `GET /tunes/ID/model?format=` calls them.
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
    """What is true of the tunes of a model type."""

    description: str  # in the metadata of its files
    formats: tuple[str, ...]  # of the files that a tune may have, by the names in FORMATS
    made: tuple[str, ...] = ()  # formats that are made when they are first asked for
    words: tuple[str, ...] = ()  # of `args`, that only some model types have; for the others they are 0
    reference: str | None = None  # how a prompt names it; None: a prompt is posted to it
    trains: bool = True  # False: the tune is ready as soon as its photos are analysed, and has no weights
    whole_model: bool = False  # its weights take the place of the base's; a LoRA lies on them
    learns_tokens: bool = False  # embeddings of new tokens, beside the weights
    needs_person: bool = False  # the photos must show one person

    @property
    def adapter(self) -> bool:
        """Whether its weights are a LoRA, which lies on a base."""
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
DEFAULT_METHOD = "lora"  # the tables of the others start from its table; photos are checked for it
# Words of `args` that only some model types have, each with these.
WORDS = {
    word: tuple(name for name, one in MODEL_TYPES.items() if word in one.words)
    for word in chain.from_iterable(one.words for one in MODEL_TYPES.values())
}
