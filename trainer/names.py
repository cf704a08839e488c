"""The names of model families and model types, and what follows from a name alone."""

from __future__ import annotations

BRANCHES = ("sd15", "sdxl1", "flux1", "fast")
IDENTITY_FILE = "faceid.safetensors"  # in a faceid tune's `model/`
METHODS = ("lora", "pti", "checkpoint", "faceid")  # faceid trains nothing: only `apply` and `remove` are there
# Words of `args` that only some of them have; for the others they are 0.
WORDS = {
    "rank": ("lora", "pti"),
    "alpha": ("lora", "pti"),
    "tokens": ("pti",),
    "token_lr": ("pti",),
    "token_share": ("pti",),
}
# The files of a trained tune by what `GET /tunes/ID/model?format=` calls them, and what is made of it when asked for.
FORMATS = {
    "kohya": "lora.safetensors",
    "diffusers": "lora_diffusers.safetensors",
    "embeddings": "lora_emb.safetensors",
    "bundled": "lora_bundled.safetensors",
    "checkpoint": "checkpoint.safetensors",
    "faceid": "faceid.safetensors",
}
MADE = {"lora": ("checkpoint",), "pti": ("checkpoint",), "checkpoint": ("diffusers",), "faceid": ()}
