"""Each objective against a plain loop written with diffusers and peft alone: the same losses and the same weights.

The references import nothing of `trainer`: they get the base's folder, tensors and numbers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, FluxPipeline, FluxTransformer2DModel, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests import tiny
from tests.bench import Bench, Told, config_of
from trainer import loop
from trainer.bases import Base
from trainer.branches import Branch, load_branch
from trainer.dataset import MicroBatch
from trainer.methods import lora
from trainer.objectives import logit_normal

CPU = torch.device("cpu")
STEPS, BATCH, LR, WEIGHT_DECAY, RANK, ALPHA = 20, 2, 1e-3, 0.01, 2, 4
UNET_LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]
FLUX_LAYERS = [*UNET_LAYERS, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]


@dataclass(frozen=True)
class Given:
    """What goes into each of the steps, (STEPS, BATCH, ...); the mask (STEPS, BATCH, 1, H, W) weighs the error."""

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    cond: dict[str, Tensor]
    mask: Tensor | None = None


Result = tuple[list[float], dict[str, Tensor]]  # the loss of each step, and the adapters after all


@pytest.fixture(scope="module")
def thin_sdxl1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SDXL 1.0 of two blocks with a layer each. Read only."""
    return tiny.make_tiny_sdxl1(tmp_path_factory.mktemp("tiny") / "thin", blocks=2, layers=1)


def given_for(family: str, masked: bool = False) -> Given:
    """Random inputs of a family's tiny base; of a flow, the times lie in (0, 1)."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(STEPS, BATCH, *shape, generator=generator)

    cond = {
        "sd15": {"encoder_hidden_states": random(77, 16)},
        "sdxl1": {
            "encoder_hidden_states": random(77, 24),
            "text_embeds": random(16),
            "time_ids": torch.tensor([64.0, 96.0, 0.0, 16.0, 64.0, 64.0]) + random(6).round(),
        },
        "flux1": {"encoder_hidden_states": random(12, 16), "pooled_projections": random(8)},
    }[family]
    whole = torch.randint(0, 1000, (STEPS, BATCH), generator=generator)
    times = torch.sigmoid(random()) if family == "flux1" else whole
    mask = torch.rand(STEPS, BATCH, 1, 8, 8, generator=generator) * 2 if masked else None
    return Given(random(4, 8, 8), random(4, 8, 8), times, cond, mask)


def put_first_adapters(denoiser: Any) -> dict[str, torch.nn.Parameter]:
    """Give every adapter its weights to begin with, of which neither half is zero: all have gradients from step 1."""
    generator = torch.Generator().manual_seed(5)
    adapters = {name: param for name, param in denoiser.named_parameters() if param.requires_grad}
    with torch.no_grad():
        for name in sorted(adapters):
            adapters[name].copy_(0.1 * torch.randn(adapters[name].shape, generator=generator))
    return adapters


# The references


def plain_loop(denoiser: Any, layers: list[str], loss_of: Callable[..., Tensor], given: Given) -> Result:
    """The shortest training loop there is."""
    denoiser.requires_grad_(False)
    denoiser.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=layers))
    adapters = put_first_adapters(denoiser)
    optimizer = torch.optim.AdamW(adapters.values(), lr=LR, weight_decay=WEIGHT_DECAY)
    losses = []
    for step in range(STEPS):
        cond = {key: value[step] for key, value in given.cond.items()}
        predicted, target, share = loss_of(given.latents[step], given.noise[step], given.timesteps[step], **cond)
        error = (predicted - target) ** 2 * (1 if given.mask is None else given.mask[step])
        loss = sum(sample.mean() * weight for sample, weight in zip(error, share, strict=True)) / BATCH
        loss.backward()
        torch.nn.utils.clip_grad_norm_(adapters.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {name: param.detach() for name, param in adapters.items()}


def plain_unet(folder: Path, given: Given, min_snr: float) -> Result:
    """As in diffusers' train_text_to_image.py and train_text_to_image_sdxl.py."""
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    velocity = scheduler.config.prediction_type == "v_prediction"

    def loss_of(
        latents: Tensor, noise: Tensor, timesteps: Tensor, encoder_hidden_states: Tensor, **added: Tensor
    ) -> tuple[Tensor, Tensor, list[float]]:
        noisy = scheduler.add_noise(latents, noise, timesteps)
        predicted = unet(noisy, timesteps, encoder_hidden_states, added_cond_kwargs=added or None).sample
        target = scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
        snr = compute_snr(scheduler, timesteps).tolist()
        share = [min(one, min_snr) / (one + 1 if velocity else one) if min_snr else 1.0 for one in snr]
        return predicted, target, share

    return plain_loop(unet, UNET_LAYERS, loss_of, given)


def plain_flux(folder: Path, given: Given, guidance: float | None) -> Result:
    """As in diffusers' train_dreambooth_lora_flux.py, with the pipeline's own packing."""
    transformer = FluxTransformer2DModel.from_pretrained(folder, subfolder="transformer")

    def loss_of(
        latents: Tensor, noise: Tensor, times: Tensor, encoder_hidden_states: Tensor, pooled_projections: Tensor
    ) -> tuple[Tensor, Tensor, list[float]]:
        sigmas = times[:, None, None, None]
        noisy = (1.0 - sigmas) * latents + sigmas * noise
        batch, channels, height, width = latents.shape
        predicted = transformer(
            hidden_states=FluxPipeline._pack_latents(noisy, batch, channels, height, width),
            timestep=times,
            guidance=None if guidance is None else torch.full((batch,), guidance),
            pooled_projections=pooled_projections,
            encoder_hidden_states=encoder_hidden_states,
            txt_ids=torch.zeros(encoder_hidden_states.shape[1], 3),
            img_ids=FluxPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, CPU, torch.float32),
        ).sample
        predicted = FluxPipeline._unpack_latents(predicted, height * 8, width * 8, 8)
        return predicted, noise - latents, [1.0] * batch

    return plain_loop(transformer, FLUX_LAYERS, loss_of, given)


# Ours


class Supplied:
    """A training set as `loop.train` asks for it, of the test's own inputs."""

    def __init__(self, given: Given) -> None:
        self.given = given

    def names(self, step: int) -> list[str]:
        return []

    def batches(self, branch: Branch, step: int) -> Iterator[MicroBatch]:
        given = self.given
        cond = {key: value[step] for key, value in given.cond.items()}
        mask = None if given.mask is None else given.mask[step]
        yield MicroBatch(given.latents[step], cond, given.noise[step], given.timesteps[step], mask, 1 / BATCH)


def load(family: str, folder: Path, tmp_path: Path) -> Branch:
    return load_branch(Base(1, family, family, path=folder), CPU, tmp_path / "cache")


def ours(family: str, folder: Path, given: Given, tmp_path: Path, **changes: object) -> Result:
    """What `loop.train` makes of the same inputs, through the branch's loss."""
    branch = load(family, folder, tmp_path)
    config = config_of(
        steps=STEPS, batch=BATCH, lr=LR, weight_decay=WEIGHT_DECAY, rank=RANK, alpha=ALPHA, targets="attention",
        schedule="constant", warmup_steps=0, save_every=1, **changes,
    )  # fmt: skip
    groups = lora.attach(branch, config)
    adapters = put_first_adapters(branch.denoiser)
    data: Any = Supplied(given)
    told = Told()
    assert loop.train(branch, groups, data, config, told, tmp_path / "states")
    return told.losses, {name: param.detach() for name, param in adapters.items()}  # each step is saved, so is read


def assert_same(one: Result, other: Result) -> None:
    """To the rounding of float32; AdamW scales up what rounding leaves of a gradient that is nearly 0."""
    assert one[0] == pytest.approx(other[0], rel=1e-5) and len(one[0]) == STEPS
    assert one[1].keys() == other[1].keys() and len(one[1]) > 20
    for name, weight in one[1].items():
        assert torch.allclose(weight, other[1][name], rtol=1e-5, atol=1e-6), name


def assert_others(one: Result, other: Result, least: float) -> None:
    """Another loss in each step, and other weights."""
    assert all(abs(mine - theirs) > least * theirs for mine, theirs in zip(*(one[0], other[0]), strict=True))
    assert all(not torch.allclose(weight, other[1][name], rtol=1e-4, atol=1e-5) for name, weight in one[1].items())


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("min_snr", [0.0, 5.0])
def test_sd15_trains_as_a_plain_loop_does(
    thin_sd15: Path, tmp_path: Path, prediction_type: str, min_snr: float
) -> None:
    folder = Path(shutil.copytree(thin_sd15, tmp_path / "base"))
    scheduler = folder / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"prediction_type": prediction_type}))
    given = given_for("sd15")
    mine = ours("sd15", folder, given, tmp_path, min_snr=min_snr)
    assert_same(mine, plain_unet(folder, given, min_snr))
    other = plain_unet(folder, given, 0.0 if min_snr else 1e-3)  # what a weight left out, or put in, would look like
    assert mine[0] != pytest.approx(other[0], rel=1e-2)
