"""The VAE of branch fast: 64 px to 16x16x4 latents, trained on dead leaves to the best mean PSNR."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from benchmarks.fast_base.fit import fit

ERROR_FLOOR = 1e-4  # of the squared error, 46 dB: what is better than that need not get better still


def make_vae(settings: dict[str, Any], side: int) -> AutoencoderKL:
    """4x smaller, convolutions alone, so that any size will do."""
    blocks = tuple(settings["blocks"])
    return AutoencoderKL(
        sample_size=side,
        block_out_channels=blocks,
        down_block_types=("DownEncoderBlock2D",) * len(blocks),
        up_block_types=("UpDecoderBlock2D",) * len(blocks),
        latent_channels=4,
        layers_per_block=settings["layers"],
        norm_num_groups=settings["groups"],
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )


def train_vae(pictures: Tensor, settings: dict[str, Any], seed: int, folder: Path, device: torch.device) -> Any:
    """pictures (N, 3, H, W), 8 bits; the last 64 are held back to measure by. Returns the trained AutoencoderKL."""
    held_back, pictures = pictures[-64:], pictures[:-64]
    torch.manual_seed(seed)
    vae = make_vae(settings, pictures.shape[-1]).to(device)

    def loss(generator: torch.Generator) -> Tensor:
        """Mean log squared error, whose negative is PSNR but for a factor, and the KL term of Kingma & Welling 2013."""
        pixels = to_pixels(draw(pictures, settings["batch"], settings["crop"], generator), device)
        posterior = vae.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
        error = (vae.decode(posterior.mean + posterior.std * noise).sample - pixels).square().mean(dim=(1, 2, 3))
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        return (error + ERROR_FLOOR).log().mean() + settings["kl"] * kl

    fit("vae", nn.ModuleDict({"vae": vae}), loss, settings, seed, folder, lambda: {"psnr": psnr(vae, held_back)})
    vae.eval().requires_grad_(False)
    normalise(vae, pictures[:512])
    return vae


def draw(pictures: Tensor, count: int, crop: int, generator: torch.Generator) -> Tensor:
    """`count` crops, (B, 3, crop, crop), flipped, turned, and with their channels in any order."""
    crops = []
    for index in torch.randint(len(pictures), (count,), generator=generator).tolist():
        top, left, turns, flip = torch.randint(2**20, (4,), generator=generator).tolist()
        room = pictures.shape[-1] - crop + 1
        piece = pictures[index, :, top % room : top % room + crop, left % room : left % room + crop]
        piece = piece[torch.randperm(3, generator=generator)].rot90(turns % 4, (1, 2))
        crops.append(piece.flip(2) if flip % 2 else piece)
    return torch.stack(crops)


def to_pixels(pictures: Tensor, device: torch.device) -> Tensor:
    """8 bits -> [-1, 1]."""
    return pictures.to(device).float() / 127.5 - 1


@torch.no_grad()
def psnr(vae: Any, pictures: Tensor) -> float:
    """Mean peak signal-to-noise ratio of pictures (N, 3, H, W), 8 bits, that went through the VAE and came back, dB."""
    ratios = []
    for batch in pictures.split(16):
        pixels = to_pixels(batch, vae.device)
        back = vae.decode(vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
        ratios.append(10 * torch.log10(4 / (back - pixels).square().mean(dim=(1, 2, 3))))
    return float(torch.cat(ratios).mean())


@torch.no_grad()
def normalise(vae: Any, pictures: Tensor) -> None:
    """Give each latent channel mean 0 and deviation 1, by weights alone: pipelines know one factor for all channels."""
    latents = torch.cat([vae.encode(to_pixels(batch, vae.device)).latent_dist.mode() for batch in pictures.split(16)])
    shift, scale = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    encoder, decoder = vae.quant_conv, vae.post_quant_conv
    count = len(scale)
    encoder.weight[:count] /= scale.view(-1, 1, 1, 1)
    encoder.bias[:count] = (encoder.bias[:count] - shift) / scale
    encoder.bias[count:] -= 2 * scale.log()  # the log variance
    decoder.bias += decoder.weight[:, :, 0, 0] @ shift
    decoder.weight *= scale.view(1, -1, 1, 1)
