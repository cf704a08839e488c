"""Samplers on a base that predicts velocity, and whose noise schedule ends in pure noise."""

from __future__ import annotations

import pytest
import torch
from diffusers import EulerDiscreteScheduler, SchedulerMixin
from torch import Tensor

from trainer.contract.prompts import SCHEDULERS
from trainer.rendering.schedulers import make_scheduler

# As in trainer/branches/unet.py for a file with the markers v_pred and ztsnr.
OWN = EulerDiscreteScheduler(
    beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction",
    rescale_betas_zero_snr=True, timestep_spacing="trailing",
)  # fmt: skip
# Lin et al. 2023, arXiv 2305.08891, Algorithm 1.
ROOTS = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0).sqrt()
SIGNAL = (ROOTS - ROOTS[-1]) * ROOTS[0] / (ROOTS[0] - ROOTS[-1])
PICTURE = torch.linspace(-1, 1, 4 * 8 * 8, dtype=torch.float64).view(1, 4, 8, 8)


def velocity(noisy: Tensor, step: int) -> Tensor:
    """What a model predicts that knows one picture: v = a noise - s picture (Salimans & Ho 2022, appendix D)."""
    signal = SIGNAL[step]
    noise_share = (1 - signal**2).sqrt()
    noise = (noisy - signal * PICTURE) / noise_share
    return signal * noise - noise_share * PICTURE


def sampled(scheduler: SchedulerMixin, steps: int = 12) -> tuple[Tensor, int]:
    """The picture that a sampler draws from pure noise, and the step that it begins with."""
    generator = torch.Generator().manual_seed(0)
    scheduler.set_timesteps(steps)
    latents = torch.randn(PICTURE.shape, generator=generator).double() * scheduler.init_noise_sigma
    for step in scheduler.timesteps:
        # The input of the model has the variance of the noisy picture, whatever the sampler computes in.
        given = scheduler.scale_model_input(latents, step)
        latents = scheduler.step(velocity(given, round(float(step))), step, latents, generator=generator).prev_sample
    return latents, round(float(scheduler.timesteps[0]))


def tolerance(name: str | None) -> float:
    """TCD ends at the first step of training, where the noise has a deviation of 0.03."""
    return 0.15 if name == "tcd" else 1e-4


@pytest.mark.parametrize("name", [None, *SCHEDULERS])
def test_every_sampler_begins_in_pure_noise_and_ends_at_the_picture(name: str | None) -> None:
    scheduler = make_scheduler(OWN, name) if name else EulerDiscreteScheduler.from_config(OWN.config)
    drawn, first = sampled(scheduler)
    assert first == 999
    assert float((drawn - PICTURE).abs().max()) < tolerance(name)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_sampler_that_takes_the_velocity_for_noise_would_not(name: str) -> None:
    wrong = EulerDiscreteScheduler.from_config(
        OWN.config, prediction_type="epsilon", rescale_betas_zero_snr=False, timestep_spacing="leading"
    )
    drawn, _ = sampled(make_scheduler(wrong, name))
    assert float((drawn - PICTURE).abs().max()) > 3 * tolerance(name)
