"""Each objective against a plain loop written with diffusers and peft alone: the same losses and the same weights.

The references import nothing of `trainer`; noise, timesteps, latents and conditions are the test's.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, FluxPipeline, FluxTransformer2DModel, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from peft import LoraConfig
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.bench import Bench, Told, config_of
from trainer import loop
from trainer.bases import Base
from trainer.branches import Branch, load_branch
from trainer.dataset import MicroBatch
from trainer.methods import lora
from trainer.objectives import logit_normal, masked_mean

STEPS, BATCH, LR = 20, 2, 1e-3
UNET_LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]
FLUX_LAYERS = [*UNET_LAYERS, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]


@dataclass
class Inputs:
    """What goes into each of the steps, (STEPS, BATCH, ...)."""

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    cond: dict[str, Tensor]

    def names(self, step: int) -> list[str]:
        return ["a picture of the test"]

    def batches(self, branch: Branch, step: int) -> Iterator[MicroBatch]:
        """As `dataset.Dataset` has it."""
        cond = {key: value[step] for key, value in self.cond.items()}
        yield MicroBatch(self.latents[step], cond, self.noise[step], self.timesteps[step], None, 1 / BATCH)


def inputs(channels: int, cond: dict[str, tuple[int, ...]], flow: bool) -> Inputs:
    """Random inputs; of a flow, the times lie in (0, 1)."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(STEPS, BATCH, *shape, generator=generator)

    times = torch.sigmoid(random()) if flow else torch.randint(0, 1000, (STEPS, BATCH), generator=generator)
    shape = (channels, 8, 8)
    return Inputs(random(*shape), random(*shape), times, {key: random(*size) for key, size in cond.items()})


def first_adapters(denoiser: Any) -> dict[str, Tensor]:
    """Weights for each adapter; neither half is zero, so that every one of them has a gradient from the first step."""
    generator = torch.Generator().manual_seed(5)
    adapters = {name: p for name, p in denoiser.named_parameters() if p.requires_grad}
    return {name: 0.1 * torch.randn(adapters[name].shape, generator=generator) for name in sorted(adapters)}


def plain_loop(denoiser: Any, layers: list[str], loss_of: Any, given: Inputs) -> tuple[list[float], dict[str, Tensor]]:
    """The shortest training loop: losses of each step, and the adapters after all."""
    denoiser.requires_grad_(False).eval()
    denoiser.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=layers))
    start = first_adapters(denoiser)
    trained = {name: p for name, p in denoiser.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, weight in trained.items():
            weight.copy_(start[name])
    optimizer = torch.optim.AdamW(trained.values(), lr=LR, weight_decay=0.01)
    losses = []
    for step in range(STEPS):
        cond = {key: value[step] for key, value in given.cond.items()}
        loss = loss_of(denoiser, given.latents[step], given.noise[step], given.timesteps[step], cond)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {name: p.detach().clone() for name, p in trained.items()}


def unet_reference(folder: Path, given: Inputs, min_snr: float) -> tuple[list[float], dict[str, Tensor]]:
    """diffusers' own training examples, sample by sample."""
    scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")

    def loss_of(unet: Any, latents: Tensor, noise: Tensor, timesteps: Tensor, cond: dict[str, Tensor]) -> Tensor:
        hidden = cond.pop("encoder_hidden_states")
        noisy = scheduler.add_noise(latents, noise, timesteps)
        predicted = unet(noisy, timesteps, hidden, added_cond_kwargs=cond or None).sample
        velocity = scheduler.config.prediction_type == "v_prediction"
        target = scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
        losses = []
        for row, snr in enumerate(compute_snr(scheduler, timesteps)):
            share = min(snr, torch.tensor(min_snr)) / (snr + 1 if velocity else snr) if min_snr else 1.0
            losses.append(torch.nn.functional.mse_loss(predicted[row], target[row]) * share)
        return torch.stack(losses).mean()

    return plain_loop(UNet2DConditionModel.from_pretrained(folder, subfolder="unet"), UNET_LAYERS, loss_of, given)


def flux_reference(folder: Path, given: Inputs, guidance: float) -> tuple[list[float], dict[str, Tensor]]:
    """What diffusers' train_dreambooth_lora_flux.py does, with the pipeline's own packing."""

    def loss_of(model: Any, latents: Tensor, noise: Tensor, times: Tensor, cond: dict[str, Tensor]) -> Tensor:
        sigmas = times[:, None, None, None]
        noisy = (1.0 - sigmas) * latents + sigmas * noise
        batch, channels, height, width = latents.shape
        packed = FluxPipeline._pack_latents(noisy, batch, channels, height, width)
        ids = FluxPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, "cpu", torch.float32)
        predicted = model(
            hidden_states=packed,
            timestep=times,
            guidance=torch.full((batch,), guidance),
            pooled_projections=cond["pooled_projections"],
            encoder_hidden_states=cond["encoder_hidden_states"],
            txt_ids=torch.zeros(cond["encoder_hidden_states"].shape[1], 3),
            img_ids=ids,
            return_dict=False,
        )[0]
        unpacked = FluxPipeline._unpack_latents(predicted, height * 8, width * 8, 8)
        return torch.mean((unpacked - (noise - latents)) ** 2)

    model = FluxTransformer2DModel.from_pretrained(folder, subfolder="transformer")
    return plain_loop(model, FLUX_LAYERS, loss_of, given)


def ours(
    family: str, folder: Path, given: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any
) -> tuple[list[float], dict[str, Tensor]]:
    """`loop.train` over the same inputs."""
    branch = load_branch(Base(1, family, family, path=folder), torch.device("cpu"), tmp_path)
    settings = {"lr": LR, "schedule": "constant", "warmup_steps": 0, "targets": "attention", "save_every": 100}
    config = config_of(steps=STEPS, batch=BATCH, text_encoder_lr=0, weight_decay=0.01, **settings | changes)
    groups = lora.attach(branch, config)
    start = first_adapters(branch.denoiser)
    names = [name.removeprefix("denoiser.") for name in groups[0]["names"]]
    with torch.no_grad():
        for name, param in zip(names, groups[0]["params"], strict=True):
            param.copy_(start[name])
    losses: list[float] = []
    step_once = loop.step_once

    def heard(*arguments: Any) -> Tensor:
        reading = step_once(*arguments)
        losses.append(float(reading[0]))
        return reading

    monkeypatch.setattr(loop, "step_once", heard)
    data: Any = given
    assert loop.train(branch, groups, data, config, Told(), tmp_path / "states")
    return losses, {name: p.detach() for name, p in zip(names, groups[0]["params"], strict=True)}


def assert_same(one: tuple[list[float], dict[str, Tensor]], other: tuple[list[float], dict[str, Tensor]]) -> None:
    assert one[0] == pytest.approx(other[0], rel=2e-5)
    assert one[1].keys() == other[1].keys() and len(one[1]) > 10
    for name, weight in one[1].items():
        assert torch.allclose(weight, other[1][name], rtol=1e-4, atol=2e-6), name


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("min_snr", [0.0, 5.0])
def test_sd15_trains_as_a_plain_loop_does(
    tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prediction_type: str, min_snr: float
) -> None:
    folder = Path(shutil.copytree(tiny_sd15, tmp_path / "base"))
    scheduler = folder / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"prediction_type": prediction_type}))
    given = inputs(4, {"encoder_hidden_states": (77, 16)}, flow=False)
    mine = ours("sd15", folder, given, tmp_path, monkeypatch, min_snr=min_snr)
    assert_same(mine, unet_reference(folder, given, min_snr))
    other = unet_reference(folder, given, 1.0)  # what a wrong weight would look like
    assert mine[0] != pytest.approx(other[0], rel=1e-3)


def test_sdxl1_trains_as_a_plain_loop_does(tiny_sdxl1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs(4, {"encoder_hidden_states": (77, 24), "text_embeds": (16,), "time_ids": (6,)}, flow=False)
    mine = ours("sdxl1", tiny_sdxl1, given, tmp_path, monkeypatch, min_snr=5)
    assert_same(mine, unet_reference(tiny_sdxl1, given, 5.0))


def test_flux1_trains_as_a_plain_loop_does(tiny_flux1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs(4, {"encoder_hidden_states": (12, 16), "pooled_projections": (8,)}, flow=True)
    mine = ours("flux1", tiny_flux1, given, tmp_path, monkeypatch, guidance=1)
    assert_same(mine, flux_reference(tiny_flux1, given, 1.0))
    other = flux_reference(tiny_flux1, given, 3.5)  # the guidance reaches the model
    assert mine[0] != pytest.approx(other[0], rel=1e-5)


# Parts


def test_a_mask_says_where_errors_count() -> None:
    error = torch.zeros(1, 3, 4, 4)
    error[..., :2] = 8.0
    left = torch.zeros(1, 1, 4, 4)
    left[..., :2] = 2.0  # mean 1
    assert masked_mean(error, None).tolist() == [4.0]
    assert masked_mean(error, left).tolist() == [8.0]
    assert masked_mean(error, 2 - left).tolist() == [0.0]


def test_times_of_a_flow_are_logit_normal() -> None:
    times = logit_normal(20_000, torch.Generator().manual_seed(0))
    logits = torch.logit(times)
    assert times.min() > 0 and times.max() < 1
    assert logits.mean().item() == pytest.approx(0, abs=0.03) and logits.std().item() == pytest.approx(1, abs=0.03)


# Waiting for the device

SYNCHRONISING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "item")


class Watch(TorchDispatchMode):
    """Remembers which operators ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("family", ["sd15", "sdxl1", "flux1"])
def test_no_step_waits_for_the_device(
    family: str, photos: list[Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    config = config_of(resolution=64, min_snr=5, mask="none", batch=2)
    run = Bench(request.getfixturevalue(f"tiny_{family}"), tmp_path, photos, config, family).start()
    params = [param for group in run.groups for param in group["params"]]
    optimizer = torch.optim.AdamW(params, fused=True)
    loop.step_once(run.branch, run.data, config, 0, optimizer, params)  # what is done once is done
    with Watch() as watch:
        loop.step_once(run.branch, run.data, config, 1, optimizer, params)
    assert len(watch.names) > 500
    assert [name for name in watch.names if name in SYNCHRONISING] == []
    with Watch() as watch:
        float(torch.ones(()))
    assert watch.names[-1] in SYNCHRONISING  # what the check above would see
