"""Face restoration (GFPGAN), and the face sizes and sharpness that profit from it."""

from __future__ import annotations

import sys
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
import torch
import torchvision.transforms.functional
from PIL import Image
from torch import nn

from trainer.photos.found import Found
from trainer.photos.nets import LONG_SIDE, Array, load

GAIN_PX = 256  # a smaller face profits from restoration (half of the restorer's own size) ...
GAIN_SHARPNESS = 100.0  # ... and so does a blurred one; sharp faces in the tests' data have 200 and more
RESTORED_PX = 512  # the restorer's own size
# Eyes, nose and corners of the mouth of FFHQ's faces at 512 px (facexlib, FaceRestoreHelper).
FFHQ = np.array([[192.98, 239.95], [318.90, 240.19], [256.63, 314.02], [201.26, 371.41], [313.09, 371.15]])
EDGE = 0.1  # of the restored face's side: width of the fade into the photo


def gains(face: Found) -> bool:
    """Whether a face is so small or blurred that restoration adds detail instead of smoothing it."""
    left, top, right, bottom = face.box
    return max(right - left, bottom - top) < GAIN_PX or face.sharpness < GAIN_SHARPNESS


def restore(image: Image.Image, faces: list[Found], weights: Path, strength: float) -> tuple[Image.Image, float, int]:
    """Restore the faces that profit from it; returns the picture, its enlargement, and the number of restored faces.

    A picture with tiny faces is enlarged, up to four times, so that restored detail is kept. strength: 0 leaves a face
    unchanged, 1 takes the restorer's face.
    """
    chosen = [face for face in faces if gains(face)]
    if not chosen:
        return image, 1.0, 0
    smallest = min(max(face.box[2] - face.box[0], face.box[3] - face.box[1]) for face in chosen)
    scale = max(1.0, min(4.0, GAIN_PX / smallest, 2 * LONG_SIDE / max(image.size)))
    if scale > 1:
        size = round(image.width * scale), round(image.height * scale)
        image = image.resize(size, Image.Resampling.LANCZOS)
    pixels = np.array(image)
    model = load_restorer(weights)
    for face in chosen:
        restore_face(pixels, np.array(face.landmarks) * scale, model, strength)
    return Image.fromarray(pixels), scale, len(chosen)


def restore_all(picture: Path, faces: list[Found], weights: Path, strength: float) -> None:
    """Restore all these faces in a picture's file (a PNG), as the user asked for."""
    with Image.open(picture) as opened:
        pixels = np.array(opened.convert("RGB"))
    model = load_restorer(weights)
    for face in faces:
        restore_face(pixels, np.array(face.landmarks), model, strength)
    Image.fromarray(pixels).save(picture, compress_level=1)


def restore_face(pixels: Array, landmarks: Array, model: nn.Module, strength: float) -> None:
    """Restore one face of a picture, in place, with a soft edge. Other pixels stay unchanged."""
    matrix = cv2.estimateAffinePartial2D(landmarks, FFHQ, method=cv2.LMEDS)[0]
    if matrix is None:
        raise RuntimeError("a face could not be aligned, so it was not restored")
    side = RESTORED_PX
    inverse = cv2.invertAffineTransform(matrix)
    corners = np.array([[0, 0, 1], [side, 0, 1], [0, side, 1], [side, side, 1]]) @ inverse.T
    height, width = pixels.shape[:2]
    left, top = np.clip(np.floor(corners.min(0)), 0, (width, height)).astype(int)
    right, bottom = np.clip(np.ceil(corners.max(0)), 0, (width, height)).astype(int)
    region = pixels[top:bottom, left:right]
    matrix = matrix + np.array([[0, 0, 1], [0, 0, 1]]) * (matrix[:, :2] @ np.array([left, top]))[:, None]
    face = cv2.warpAffine(region, matrix, (side, side), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
    tensor = torch.from_numpy(face.astype(np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        better = model(tensor, return_rgb=False, randomize_noise=False)[0][0]
    if not torch.isfinite(better).all():
        raise RuntimeError("the face restorer gave values that are not finite numbers")
    restored = ((better.clamp(-1, 1) + 1) * 127.5).permute(1, 2, 0).numpy()
    mixed = strength * restored + (1 - strength) * face
    back = cv2.invertAffineTransform(matrix)
    size = (right - left, bottom - top)
    pasted = cv2.warpAffine(mixed, back, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    weight = cv2.warpAffine(soft_square(side), back, size, flags=cv2.INTER_LINEAR)[:, :, None]
    region[:] = np.clip(np.rint(weight * pasted + (1 - weight) * region), 0, 255).astype(np.uint8)


@lru_cache(maxsize=1)
def soft_square(side: int) -> Array:
    """1 inside, falling to 0 at the edge."""
    ramp = np.clip(np.minimum(np.arange(side), np.arange(side)[::-1]) / (EDGE * side), 0, 1).astype(np.float32)
    smooth = ramp * ramp * (3 - 2 * ramp)
    return smooth[:, None] * smooth[None, :]


@lru_cache(maxsize=1)
def load_restorer(weights: Path) -> nn.Module:
    """GFPGAN 1.4 (Wang et al. 2021, arXiv 2101.04061)."""
    return load(gfpgan(), weights, "params_ema")


def gfpgan(channel_multiplier: int = 2, narrow: float = 1.0) -> nn.Module:
    """GFPGAN's architecture; the defaults are those of the released weights."""
    # basicsr, which gfpgan imports, needs a module that torchvision has renamed.
    sys.modules.setdefault("torchvision.transforms.functional_tensor", torchvision.transforms.functional)
    from gfpgan.archs.gfpganv1_clean_arch import GFPGANv1Clean

    model: nn.Module = GFPGANv1Clean(
        out_size=RESTORED_PX,
        num_style_feat=512,
        channel_multiplier=channel_multiplier,
        decoder_load_path=None,
        fix_decoder=False,
        num_mlp=8,
        input_is_latent=True,
        different_w=True,
        narrow=narrow,
        sft_half=True,
    )
    return model
