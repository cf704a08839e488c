"""Each objective against a plain loop written with diffusers and peft alone: the same losses and the same weights.

The references import nothing of `trainer`: they get the base's folder, tensors and numbers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
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

from tests.helpers import tiny
from tests.helpers.training import RecordedReport, TrainingSetup, config_of
from trainer.branches.objectives import logit_normal, masked_mean
from trainer.branches.protocol import Branch, load_branch
from trainer.library.bases import Base
from trainer.methods import lora
from trainer.training import loop
from trainer.training.dataset import MicroBatch

CPU = torch.device("cpu")
STEPS, BATCH, LR, WEIGHT_DECAY, RANK, ALPHA = 20, 2, 1e-3, 0.01, 2, 4
UNET_LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]
FLUX_LAYERS = [*UNET_LAYERS, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]


@dataclass(frozen=True, eq=False)  # hashed as the object that it is
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


@cache
def given_for(family: str, masked: bool = False) -> Given:
    """Random inputs of a family's tiny base; of a flow, the times lie in (0, 1). A mask changes nothing else."""
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
    latents, noise = random(4, 8, 8), random(4, 8, 8)
    mask = torch.rand(STEPS, BATCH, 1, 8, 8, generator=generator) * 2 if masked else None
    return Given(latents, noise, times, cond, mask)


def put_first_adapters(denoiser: Any) -> dict[str, torch.nn.Parameter]:
    """Give every adapter its weights to begin with, of which neither half is zero: all have gradients from step 1."""
    generator = torch.Generator().manual_seed(5)
    adapters = {name: param for name, param in denoiser.named_parameters() if param.requires_grad}
    with torch.no_grad():
        for name in sorted(adapters):
            adapters[name].copy_(0.1 * torch.randn(adapters[name].shape, generator=generator))
    return adapters


# The references: each is computed once for all tests that compare with it.


def plain_loop(
    denoiser: Any, layers: list[str], parts_of: Callable[..., tuple[Tensor, Tensor, list[float]]], given: Given
) -> Result:
    """The shortest training loop there is. parts_of gives prediction, target and each sample's share of the loss."""
    denoiser.requires_grad_(False)
    denoiser.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=layers))
    adapters = put_first_adapters(denoiser)
    optimizer = torch.optim.AdamW(adapters.values(), lr=LR, weight_decay=WEIGHT_DECAY)
    losses = []
    for step in range(STEPS):
        cond = {key: value[step] for key, value in given.cond.items()}
        predicted, target, share = parts_of(given.latents[step], given.noise[step], given.timesteps[step], **cond)
        error = (predicted - target) ** 2 * (1 if given.mask is None else given.mask[step])
        loss = sum(sample.mean() * weight for sample, weight in zip(error, share, strict=True)) / BATCH
        loss.backward()
        torch.nn.utils.clip_grad_norm_(adapters.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {name: param.detach() for name, param in adapters.items()}


@cache
def plain_unet(folder: Path, given: Given, min_snr: float) -> Result:
    """As in diffusers' train_text_to_image.py and train_text_to_image_sdxl.py."""
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    velocity = scheduler.config.prediction_type == "v_prediction"

    def parts_of(
        latents: Tensor, noise: Tensor, timesteps: Tensor, encoder_hidden_states: Tensor, **added: Tensor
    ) -> tuple[Tensor, Tensor, list[float]]:
        noisy = scheduler.add_noise(latents, noise, timesteps)
        predicted = unet(noisy, timesteps, encoder_hidden_states, added_cond_kwargs=added or None).sample
        target = scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
        snr = compute_snr(scheduler, timesteps).tolist()
        share = [min(one, min_snr) / (one + 1 if velocity else one) if min_snr else 1.0 for one in snr]
        return predicted, target, share

    return plain_loop(unet, UNET_LAYERS, parts_of, given)


@cache
def plain_flux(folder: Path, given: Given, guidance: float | None) -> Result:
    """As in diffusers' train_dreambooth_lora_flux.py, with the pipeline's own packing."""
    transformer = FluxTransformer2DModel.from_pretrained(folder, subfolder="transformer")

    def parts_of(
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

    return plain_loop(transformer, FLUX_LAYERS, parts_of, given)


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
    told = RecordedReport()
    assert loop.train(branch, groups, data, config, told, tmp_path / "states")
    return told.losses, {name: param.detach() for name, param in adapters.items()}  # each step is saved, so is read


def assert_same(one: Result, other: Result) -> None:
    """To the rounding of float32; AdamW scales up what rounding leaves of a gradient that is nearly 0."""
    assert one[0] == pytest.approx(other[0], rel=1e-5) and len(one[0]) == STEPS
    assert one[1].keys() == other[1].keys() and len(one[1]) > 20
    for name, weight in one[1].items():
        assert torch.allclose(weight, other[1][name], rtol=1e-5, atol=1e-6), name


def assert_others(one: Result, other: Result) -> None:
    """What the check above would say to a loop that is not the same."""
    assert one[0] != pytest.approx(other[0], rel=1e-3)
    assert any(not torch.allclose(weight, other[1][name], rtol=1e-2, atol=1e-4) for name, weight in one[1].items())


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def predicting_sd15(request: pytest.FixtureRequest, thin_sd15: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion 1.5 that predicts the noise, and one that predicts the velocity. Read only."""
    folder = Path(shutil.copytree(thin_sd15, tmp_path_factory.mktemp(request.param) / "base"))
    scheduler = folder / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"prediction_type": request.param}))
    return folder


@pytest.mark.parametrize("min_snr", [0.0, 5.0])
def test_sd15_trains_as_a_plain_loop_does(predicting_sd15: Path, tmp_path: Path, min_snr: float) -> None:
    given = given_for("sd15")
    mine = ours("sd15", predicting_sd15, given, tmp_path, min_snr=min_snr)
    assert_same(mine, plain_unet(predicting_sd15, given, min_snr))
    assert_others(mine, plain_unet(predicting_sd15, given, 5.0 - min_snr))


@pytest.mark.parametrize("masked", [False, True])
def test_sdxl1_trains_as_a_plain_loop_does(thin_sdxl1: Path, tmp_path: Path, masked: bool) -> None:
    given = given_for("sdxl1", masked)
    mine = ours("sdxl1", thin_sdxl1, given, tmp_path, min_snr=5)
    assert_same(mine, plain_unet(thin_sdxl1, given, 5.0))
    if masked:
        other = given_for("sdxl1")
    else:
        other = replace(given, cond=given.cond | {"time_ids": given.cond["time_ids"].flip(-1)})
    assert_others(mine, plain_unet(thin_sdxl1, other, 5.0))


@pytest.mark.parametrize("masked", [False, True])
def test_flux1_trains_as_a_plain_loop_does(tiny_flux1: Path, tmp_path: Path, masked: bool) -> None:
    given = given_for("flux1", masked)
    mine = ours("flux1", tiny_flux1, given, tmp_path, guidance=1)
    assert_same(mine, plain_flux(tiny_flux1, given, 1.0))
    if masked:
        assert_others(mine, plain_flux(tiny_flux1, given_for("flux1"), 1.0))
    else:
        assert_others(mine, plain_flux(tiny_flux1, given, 3.5))  # so that the guidance must have reached the model


def test_a_flux_without_guidance_trains_as_a_plain_loop_does(tiny_flux1: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_flux1, tmp_path / "schnell"))
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"guidance_embeds": False}))
    weights = next((folder / "transformer").glob("*.safetensors"))
    kept = {name: tensor for name, tensor in load_file(weights).items() if "guidance" not in name}
    save_file(kept, weights, {"format": "pt"})
    given = given_for("flux1")
    mine = ours("flux1", folder, given, tmp_path, guidance=3.5)  # which it is not told
    assert_same(mine, plain_flux(folder, given, None))
    assert_others(mine, plain_flux(tiny_flux1, given, 3.5))


# Parts


@pytest.mark.parametrize("base", ["thin_sd15", "thin_sdxl1", "tiny_flux1"])
def test_the_mask_weighs_the_loss(base: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    family = base.partition("_")[2]
    branch, given = load(family, request.getfixturevalue(base), tmp_path), given_for(family)
    cond = {key: value[0] for key, value in given.cond.items()}

    @torch.no_grad()
    def loss(weight: Tensor | None) -> Tensor:
        return branch.loss(given.latents[0], cond, given.noise[0], given.timesteps[0], config_of(), weight)

    left = torch.zeros(BATCH, 1, 8, 8)
    left[..., :4] = 1
    assert loss(None).shape == (BATCH,)
    assert torch.equal(loss(torch.ones(BATCH, 1, 8, 8)), loss(None))
    assert torch.allclose(loss(left) + loss(1 - left), loss(None))
    assert (loss(left) < loss(None)).all() and (loss(left) > 0).all()


def test_a_mask_says_where_errors_count() -> None:
    error = torch.zeros(1, 3, 4, 4)
    error[..., :2] = 8.0
    left = torch.zeros(1, 1, 4, 4)
    left[..., :2] = 2.0  # mean 1
    assert masked_mean(error, None).tolist() == [4.0]
    assert masked_mean(error, left).tolist() == [8.0]
    assert masked_mean(error, 2 - left).tolist() == [0.0]


def test_times_of_a_flow_are_logit_normal() -> None:
    times = logit_normal(100_000, torch.Generator().manual_seed(0))
    assert times.shape == (100_000,) and times.min() > 0 and times.max() < 1
    assert times.mean().item() == pytest.approx(0.5, abs=0.003)
    # Below -1, 0 and 1 lie these shares of a standard normal; the logistic function maps them to these times.
    shares = torch.tensor([0.158655, 0.5, 0.841345])
    assert times.quantile(shares).tolist() == pytest.approx([0.268941, 0.5, 0.731059], abs=0.005)
    logits = torch.logit(times)
    assert logits.mean().item() == pytest.approx(0, abs=0.02) and logits.std().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("base", ["thin_sd15", "thin_sdxl1", "tiny_flux1"])
def test_what_is_drawn_fits_the_family_and_depends_on_the_generator_alone(
    base: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    branch = load(base.partition("_")[2], request.getfixturevalue(base), tmp_path)
    latents = torch.zeros(2000, 4, 2, 2)
    noise, timesteps = branch.draw(latents, torch.Generator().manual_seed(0))
    again = branch.draw(latents + 1, torch.Generator().manual_seed(0))
    assert torch.equal(noise, again[0]) and torch.equal(timesteps, again[1])
    assert noise.shape == latents.shape and timesteps.shape == (2000,)
    assert noise.mean().abs() < 0.05 and noise.std().item() == pytest.approx(1, abs=0.05)
    if base == "tiny_flux1":
        assert timesteps.min() > 0 and timesteps.max() < 1
    else:  # whole numbers, all of a thousand
        assert not timesteps.is_floating_point()
        assert 0 <= timesteps.min() < 10 and 990 <= timesteps.max() < 1000
        assert timesteps.float().mean().item() == pytest.approx(499.5, abs=20)


# Waiting for the device

SYNCHRONISING = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select", "unique")


class Watch(TorchDispatchMode):
    """Remembers which operators ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **kwargs or {})

    def waited(self) -> list[str]:
        return [name for name in self.names if name in SYNCHRONISING]


@pytest.mark.parametrize("base", ["thin_sd15", "thin_sdxl1", "tiny_flux1"])
def test_no_step_waits_for_the_device(
    base: str, photos: list[Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    config = config_of(min_snr=5, micro_batch=1)
    run = TrainingSetup(request.getfixturevalue(base), tmp_path, photos, config, base.partition("_")[2]).start()
    params = [param for group in run.groups for param in group["params"]]
    optimizer = torch.optim.AdamW(params, fused=True)
    with Watch() as watch:
        readings = [loop.step_once(run.branch, run.data, config, step, optimizer, params) for step in (0, 1)]
    assert watch.names.count("_fused_adamw_") == 2 and len(watch.names) > 1000  # it has seen both steps whole
    assert watch.waited() == []
    for wait in (lambda: readings[0][0].item(), lambda: bool(readings[0].any()), lambda: readings[0].nonzero()):
        with Watch() as watch:
            wait()
        assert len(watch.waited()) == 1  # what the check above would see
