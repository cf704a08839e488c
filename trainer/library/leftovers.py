"""Tensors of single files that no loader needs, each kind with the reason why nothing is lost without it."""

from __future__ import annotations

import re
from collections.abc import Iterable

from trainer.library.prediction import EDM_MARKERS, V_MARKER, ZERO_SNR_MARKER
from trainer.library.weight_format import COMPANION

MARKERS = {V_MARKER, ZERO_SNR_MARKER, *EDM_MARKERS, "edm_vpred.sigma_min"}  # they were read from the header
HARMLESS: dict[str, str] = {
    r"model_ema\.": "a running average of the weights, which the release's samplers use only where it is asked for",
    r"(betas|alphas_cumprod(_prev)?|sqrt_.*|log_one_minus_.*|posterior_.*|lvlb_weights|logvar|scale_factor)$": (
        "buffers of the noise schedule, which are computed from the configuration"
    ),
    r"denoiser\.": "buffers of the noise schedule in Stability's generative-models",
    r"model\.(sigmas|log_sigmas|betas|alphas_cumprod)$": "buffers of the noise schedule",
    r"(cond_stage_model|conditioner|text_encoders)\..*position_ids$": "the numbers 0 to 76",
    r"(cond_stage_model|conditioner|text_encoders)\..*logit_scale$": "CLIP's temperature, for comparing with pictures",
    r"(cond_stage_model|conditioner\.embedders\.0|text_encoders\.clip_l)\..*text_projection(\.weight)?$": (
        "a projection of CLIP ViT-L/14, whose output these families do not use"
    ),
    r"(cond_stage_model|conditioner|text_encoders)\..*\.(visual|vision_model|visual_projection)\.": (
        "CLIP's image encoder, in OpenCLIP's names and in those of transformers"
    ),
    r"text_encoders\.t5xxl\..*embed_tokens\.weight$": "T5's embedding a second time, under its other name",
    r"text_encoders\..*spiece_model$": "a vocabulary, which is read from a tokenizer's own files",
    r"first_stage_model\.(loss|discriminator|model_ema)\b": "what trained the VAE",
    r"(safety_checker|discriminator|loss)\.": "what judges pictures, in training or afterwards",
    r"(state_dict|callbacks|optimizer.*|global_step|epoch)$": "the state of a training",
}
_HARMLESS = re.compile("|".join(f"(?:{pattern})" for pattern in HARMLESS))


def unneeded(keys: Iterable[str]) -> set[str]:
    """The keys of tensors that may be left out: markers, scales of weights, and what `HARMLESS` names."""
    return {key for key in keys if key in MARKERS or COMPANION.match(key) or _HARMLESS.match(key)}


def refuse_unknown(keys: Iterable[str]) -> None:
    """keys: of tensors that a loader has no place for. Raises ValueError if some may not be left out."""
    found = set(keys)
    if unknown := found - unneeded(found):
        raise ValueError(
            f"{len(unknown)} tensors are unknown, {min(unknown)} among them; without them it would be another model"
        )
