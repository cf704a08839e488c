"""Samplers by their names in prompts."""

from __future__ import annotations

from inspect import signature

import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    SchedulerMixin,
    TCDScheduler,
)

Options = dict[str, str | bool]
PLUS_PLUS: Options = {"algorithm_type": "dpmsolver++"}
SDE: Options = {"algorithm_type": "sde-dpmsolver++"}
KARRAS: Options = {"use_karras_sigmas": True}
# API name of a scheduler -> its usual name, its class, and options. The classes are those of diffusers' own table
# (docs, api/schedulers/overview), except that DPM++ SDE draws noise in every step, as its name says.
SCHEDULERS: dict[str, tuple[str, type[SchedulerMixin], Options]] = {
    "euler": ("Euler", EulerDiscreteScheduler, {}),
    "euler_a": ("Euler a", EulerAncestralDiscreteScheduler, {}),
    "dpm++2m": ("DPM++ 2M", DPMSolverMultistepScheduler, PLUS_PLUS),
    "dpm++2m_karras": ("DPM++ 2M Karras", DPMSolverMultistepScheduler, PLUS_PLUS | KARRAS),
    "dpm++sde": ("DPM++ SDE", DPMSolverSinglestepScheduler, SDE),
    "dpm++sde_karras": ("DPM++ SDE Karras", DPMSolverSinglestepScheduler, SDE | KARRAS),
    "lcm": ("LCM", LCMScheduler, {}),
    "tcd": ("TCD", TCDScheduler, {}),
}
ZERO_SNR = "rescale_betas_zero_snr"  # setting of a schedule that ends in pure noise (arXiv 2305.08891)
LEAST_KEPT = 2**-24
DISTILLED_STEPS = 50  # of the teacher model: LCM and TCD choose their steps among these (diffusers' default)


def make_scheduler(own: SchedulerMixin, name: str) -> SchedulerMixin:
    """The scheduler of this name, with the noise schedule of the base's own."""
    _, kind, options = SCHEDULERS[name]
    if own.config.get(ZERO_SNR) and ZERO_SNR not in signature(kind.__init__).parameters:
        return kind.from_config(own.config, **options, trained_betas=zero_snr_betas(own))
    return kind.from_config(own.config, **options)


def zero_snr_betas(own: SchedulerMixin) -> list[float]:
    """The betas of a schedule that ends in pure noise, for classes that do not compute them. The last step keeps a
    trace of the picture, as in diffusers' own classes, because the others would divide by zero."""
    kept = DDPMScheduler.from_config(own.config).alphas_cumprod.double()  # the picture's share after each step
    kept[-1] = LEAST_KEPT
    return [float(beta) for beta in 1 - kept / torch.cat([torch.ones(1), kept[:-1]])]


def sampler_of(scheduler: SchedulerMixin, name: str | None) -> str:
    """The usual name of a scheduler. name: in the API; None for the base's own."""
    return SCHEDULERS[name][0] if name else type(scheduler).__name__.removesuffix("Scheduler").removesuffix("Discrete")
