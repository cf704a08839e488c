"""Losses that more than one family uses, and their parts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LEAST_SNR = 2**-24  # a schedule may end in pure noise, and the SNR is divided by


def masked_mean(error: Tensor, weight: Tensor | None) -> Tensor:
    """error (B, C, H, W), weight (B, 1, H, W) of mean 1 or None -> (B,)."""
    return (error if weight is None else error * weight).mean(dim=(1, 2, 3))


def noise_and_timesteps(scheduler: Any, latents: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noise like latents (B, C, H, W), and timesteps (B,): uniform integers below 1000."""
    noise = torch.randn(latents.shape, generator=generator, device=latents.device)
    count = scheduler.config.num_train_timesteps
    return noise, torch.randint(count, (len(latents),), generator=generator, device=latents.device)


def noise_loss(
    scheduler: Any,
    predicted: Tensor,
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    min_snr: float,
    weight: Tensor | None,
) -> Tensor:
    """Squared error of a UNet that predicts noise (Ho et al. 2020) or velocity (Salimans & Ho 2022), (B,).

    scheduler: diffusers' DDPMScheduler of the base; it has the prediction type. predicted, latents, noise (B, C, H, W);
    timesteps (B,), integers. min_snr: gamma of min-SNR weighting (Hang et al. 2023, arXiv 2303.09556); 0: no weighting.
    """
    velocity = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
    loss = masked_mean((predicted.float() - target) ** 2, weight)
    if min_snr:
        alphas_bar: Tensor = scheduler.alphas_cumprod[timesteps]
        snr = (alphas_bar / (1 - alphas_bar)).clamp(min=LEAST_SNR)
        loss = loss * snr.clamp(max=min_snr) / (snr + 1 if velocity else snr)
    return loss


def logit_normal(count: int, generator: torch.Generator) -> Tensor:
    """Times in (0, 1) whose logits are standard normal (Esser et al. 2024, arXiv 2403.03206, §3.1), (count,)."""
    return torch.sigmoid(torch.randn(count, generator=generator, device=generator.device))
