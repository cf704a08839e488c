"""The VAE of branch fast: 64 px to 16x16x4 latents, trained on dead leaves to the best mean PSNR."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from benchmarks.fast_base.fit import fit

ERROR_FLOOR = 1e-4  # of the squared error, 46 dB: no need to be better
FIRST_DEVIATION = 0.05  # of the posterior; the latents' own is 1


def make_vae(settings: dict[str, Any], side: int) -> AutoencoderKL:
    """4x smaller; only convolutions, for any size; a norm over all channels keeps their differences."""
    blocks = tuple(settings["blocks"])
    return AutoencoderKL(
        sample_size=side,
        block_out_channels=blocks,
        down_block_types=("DownEncoderBlock2D",) * len(blocks),
        up_block_types=("UpDecoderBlock2D",) * len(blocks),
        latent_channels=4,
        layers_per_block=settings["layers"],
        norm_num_groups=1,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )


def train_vae(pictures: Tensor, settings: dict[str, Any], seed: int, folder: Path, device: torch.device) -> Any:
    """pictures (N, 3, H, W), 8 bits; the last 64 are held back for measuring. Returns the trained AutoencoderKL.

    Such a network learns slowly from random weights: its norms remove the scale that PSNR measures. The path around
    them is linear, and a linear code of dead leaves is good (the best one of 16x16 blocks, by principal components,
    reconstructs photos at 24.9 dB). So this path is trained alone first, and the whole network starts from it.
    """
    held_back, pictures = pictures[-64:], pictures[:-64]
    torch.manual_seed(seed)
    vae = make_vae(settings, pictures.shape[-1]).to(device)
    modules = nn.ModuleDict({"vae": vae})

    def pixels(recipe: dict[str, Any], generator: torch.Generator) -> Tensor:
        return to_pixels(draw(pictures, recipe["batch"], recipe["crop"], generator), device)

    def path_loss(generator: torch.Generator) -> Tensor:
        target = pixels(settings["path"], generator)
        return log_error(path(vae.decoder, vae.post_quant_conv(path_latents(vae, target))), target)

    def loss(generator: torch.Generator) -> Tensor:
        """The error and the KL term of Kingma & Welling 2013."""
        target = pixels(settings["whole"], generator)
        posterior = vae.encode(target).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        return log_error(vae.decode(posterior.mean + posterior.std * noise).sample, target) + settings["kl"] * kl

    fit("path", modules, path_loss, settings["path"], seed, folder, dict)
    open_at_path(vae, to_pixels(pictures[:256], device))
    fit("vae", modules, loss, settings["whole"], seed, folder, lambda: {"psnr": psnr(vae, held_back)})
    vae.eval().requires_grad_(False)
    whiten(vae, pictures[:512])
    return vae


def log_error(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean log squared error: the negative PSNR, up to a factor."""
    return ((predicted - target).square().mean(dim=(1, 2, 3)) + ERROR_FLOOR).log().mean()


def path(half: Any, hidden: Tensor, until: str = "conv_out") -> Tensor:
    """The encoder or the decoder without residuals, norms and activations: a linear chain of convolutions."""
    hidden = half.conv_in(hidden)
    for block in getattr(half, "down_blocks", None) or half.up_blocks:
        for resnet in block.resnets:
            hidden = hidden if resnet.conv_shortcut is None else resnet.conv_shortcut(hidden)
        for sampler in getattr(block, "downsamplers", None) or getattr(block, "upsamplers", None) or ():
            hidden = sampler(hidden)
    return hidden if until == "conv_norm_out" else half.conv_out(hidden)


def path_latents(vae: Any, pixels: Tensor) -> Tensor:
    mean: Tensor = vae.quant_conv(path(vae.encoder, pixels)).chunk(2, dim=1)[0]
    return mean


@torch.no_grad()
def open_at_path(vae: Any, pixels: Tensor) -> None:
    """Set the other weights so that the whole network equals the linear path, for `pixels` and similar pictures.

    Residuals start at 0. Then only each half's last norm and SiLU differ from the path. The norm keeps the scale of its
    input where one constant channel dominates the deviation; SiLU(x) is nearly x where x is large.
    """
    latents = path_latents(vae, pixels)
    for resnet in (module for module in vae.modules() if isinstance(module, ResnetBlock2D)):
        resnet.conv2.weight.zero_()
        resnet.conv2.bias.zero_()
    for half, last, given in (
        (vae.encoder, vae.encoder.mid_block.resnets[-1], pixels),
        (vae.decoder, vae.decoder.up_blocks[-1].resnets[-1], vae.post_quant_conv(latents)),
    ):
        hidden = path(half, given, until="conv_norm_out")
        constant = 30 * float(hidden.std()) * hidden.shape[1] ** 0.5
        last.conv2.bias[0] = constant
        hidden[:, 0] += constant
        lift = float(hidden[:, 1:].abs().max())
        half.conv_norm_out.weight.fill_(float(hidden.var(dim=(1, 2, 3)).mean()) ** 0.5)
        half.conv_norm_out.bias.fill_(float(hidden.mean()) + lift)
        half.conv_norm_out.bias[0] -= constant
        half.conv_out.bias -= lift * half.conv_out.weight.sum(dim=(1, 2, 3))
    scale, count = latents.std(dim=(0, 2, 3)), latents.shape[1]
    change(vae, torch.diag(1 / scale), torch.zeros_like(scale))
    vae.quant_conv.weight[count:] = 0
    vae.quant_conv.bias[count:] = 2 * math.log(FIRST_DEVIATION)


def draw(pictures: Tensor, count: int, crop: int, generator: torch.Generator) -> Tensor:
    """`count` crops, (B, 3, crop, crop), flipped, rotated, with channels in random order."""
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
    """Mean peak signal-to-noise ratio of pictures (N, 3, H, W), 8 bits, after encoding and decoding, in dB."""
    ratios = []
    for batch in pictures.split(16):
        pixels = to_pixels(batch, vae.device)
        back = vae.decode(vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
        ratios.append(10 * torch.log10(4 / (back - pixels).square().mean(dim=(1, 2, 3))))
    return float(torch.cat(ratios).mean())


@torch.no_grad()
def whiten(vae: Any, pictures: Tensor) -> None:
    """Give the latents mean 0 and unit covariance by changing weights.

    Colours are in the directions of least variance, and the denoiser's error weighs all directions equally. The
    whitening is the symmetric one (ZCA; Bell & Sejnowski 1997). Each posterior deviation becomes a constant.
    """
    latents, variances = [], []
    for batch in pictures.split(16):
        posterior = vae.encode(to_pixels(batch, vae.device)).latent_dist
        latents.append(posterior.mean.movedim(1, 0).flatten(1))
        variances.append(posterior.var.movedim(1, 0).flatten(1))
    values, vectors = torch.linalg.eigh(torch.cov(torch.cat(latents, dim=1)))
    whitening = vectors @ torch.diag(values**-0.5) @ vectors.T
    change(vae, whitening, torch.cat(latents, dim=1).mean(dim=1))
    vae.quant_conv.weight[len(values) :] = 0
    vae.quant_conv.bias[len(values) :] = (whitening.square() @ torch.cat(variances, dim=1).mean(dim=1)).log()


def change(vae: Any, matrix: Tensor, shift: Tensor) -> None:
    """Map latents x to matrix (x - shift), (C, C) and (C,), in the encoder; the decoder inverts it."""
    encoder, decoder, count = vae.quant_conv, vae.post_quant_conv, len(shift)
    inverse = torch.linalg.inv(matrix)
    encoder.weight[:count] = torch.einsum("ij,jklm->iklm", matrix, encoder.weight[:count])
    encoder.bias[:count] = matrix @ (encoder.bias[:count] - shift)
    decoder.bias += decoder.weight[:, :, 0, 0] @ shift
    decoder.weight[:, :, 0, 0] = decoder.weight[:, :, 0, 0] @ inverse
