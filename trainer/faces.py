"""What the looking child process does with photos: finds, restores and crops faces, keeps identities, makes masks.

The only user of facexlib, gfpgan, cv2 and torchvision. Models are loaded once, from files whose sha256 was checked,
with `weights_only=True`. Pictures are (H, W, 3) arrays in RGB, 0 to 255, unless a model wants them otherwise.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torchvision.transforms.functional
from facexlib.detection.align_trans import get_reference_facial_points, warp_and_crop_face
from facexlib.detection.retinaface import RetinaFace, generate_config
from facexlib.detection.retinaface_utils import PriorBox, decode, decode_landm, py_cpu_nms
from PIL import Image, ImageDraw
from safetensors.torch import save
from torch import Tensor, nn

from trainer import dataset
from trainer.files import fsync, write_whole
from trainer.looking import Box, Found, Made, Task
from trainer.weights import ARCFACE

Array = np.ndarray[Any, np.dtype[Any]]

LONG_SIDE = 1024  # px at which faces are looked for; a smaller photo is enlarged, at most to twice its size
# Of the detector's score. On the tests' photos of people it finds every face but some that are painted, half hidden or
# behind glass, and nothing else. Animals are not asked: of cats' and dogs' faces some score 0.9, and no threshold sets
# them apart from people's.
THRESHOLD = 0.8
OVERLAP = 0.4  # of two boxes from which they are one face; facexlib's
FACE_PX = 112  # side of an aligned face, for its sharpness and its identity
IDENTIFIED = 8  # faces of a photo, the largest first: who stands further back is not the subject

# The hosted service's closeup: wider than the face by so much on each side, higher, and at least so many px.
CROP_SIDE, CROP_ABOVE, CROP_LEAST = 0.4, 0.5, 512
CLOSEUP_SHARE = 0.003  # of the photo's area: a smaller face makes no closeup there either
MASK_MARGIN = 0.15  # of the box on each side: the detector's boxes end at chin and brow

GAIN_PX = 256  # a face smaller than this gains by restoration (half of what the restorer works at) ...
GAIN_SHARPNESS = 100.0  # ... and so does one that is blurred; sharp faces of the tests' data have 200 and more
RESTORED_PX = 512  # the restorer's own size
# Where FFHQ's faces have eyes, nose and the corners of the mouth at 512 px (facexlib, FaceRestoreHelper).
FFHQ = np.array([[192.98, 239.95], [318.90, 240.19], [256.63, 314.02], [201.26, 371.41], [313.09, 371.15]])
EDGE = 0.1  # of the restored face's side: over this width it fades into the photo

MATTING_PX = 512  # MODNet's reference size, of the shorter side; a multiple of 32
WORDS_PX = 352  # CLIPSeg's
LEAST_SHARE = 0.005  # a mask that covers less of the picture has found nothing
SHOWN_PX = 320

# How each recognizer wants a face of 0 to 255: (mean, deviation) of red, green and blue.
RECOGNIZERS = {
    "face_recognition_sface_2021dec.onnx": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "mobilefacenet_112.onnx": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    ARCFACE.name: ((127.5,) * 3, (127.5,) * 3),  # insightface, model_zoo/arcface_onnx.py
}
PLAIN = {ARCFACE.name}  # adapters were trained on the identity of the face as it is (`normed_embedding`)


def begin() -> None:
    """Run first in the child. Threads that wait for each other would take the cores of a tune that trains."""
    torch.set_num_threads(1)


# Finding


def find(photo: Path, detector: Path, recognizer: Path | None) -> list[Found]:
    """The faces of a photo, best first."""
    image, scale = read_small(photo)
    rows = detect(image, load_detector(detector))
    rows = rows[np.argsort(-(rows[:, 2] - rows[:, 0]) * (rows[:, 3] - rows[:, 1]))]
    found = []
    for place, row in enumerate(rows):
        landmarks = row[5:].reshape(5, 2)
        face = align(image, landmarks)
        identity = identify(face, recognizer) if recognizer and place < IDENTIFIED else None
        box = tuple(float(value) / scale for value in row[:4])
        points = tuple((float(x) / scale, float(y) / scale) for x, y in landmarks)
        found.append(Found(box, float(row[4]), points, sharpness(face), identity))  # type: ignore[arg-type]
    return found


def detect(image: Array, model: RetinaFace) -> Array:
    """Rows of left, top, right, bottom, score, and five landmarks x, y, in pixels.

    facexlib's `RetinaFace.detect_faces`, but for its anchors: they are the same for all pictures of one size, and
    making them anew is a quarter of its time.
    """
    height, width = image.shape[:2]
    pixels = torch.from_numpy(image[:, :, ::-1].astype(np.float32)).permute(2, 0, 1)[None] - model.mean_tensor
    anchors, spread = anchors_of(height, width), model.cfg["variance"]
    with torch.inference_mode():
        boxes, scores, landmarks = model(pixels)
        likely = scores[0, :, 1] > THRESHOLD
        scale = torch.tensor([width, height], dtype=torch.float32)
        boxes = decode(boxes[0, likely], anchors[likely], spread) * scale.repeat(2)
        landmarks = decode_landm(landmarks[0, likely], anchors[likely], spread) * scale.repeat(5)
        rows = torch.cat([boxes, scores[0, likely, 1:], landmarks], dim=1).numpy()
    rows = rows[np.argsort(-rows[:, 4])]
    kept: Array = rows[py_cpu_nms(rows[:, :5], OVERLAP)]
    return kept


@lru_cache(maxsize=8)
def anchors_of(height: int, width: int) -> Tensor:
    """Where RetinaFace may put a face in a picture of this size."""
    anchors: Tensor = PriorBox(generate_config("mobile0.25"), image_size=(height, width)).forward()
    return anchors


def read_small(photo: Path) -> tuple[Array, float]:
    """A photo at the size at which faces are looked for, and the scale of it."""
    with Image.open(photo) as opened:
        width, height = opened.size
        scale = min(2.0, LONG_SIDE / max(width, height))
        size = round(width * scale), round(height * scale)
        opened.draft("RGB", size)  # a JPEG is decoded at a half or a quarter: four times as fast
        image = opened.convert("RGB").resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
    return np.asarray(image), scale


@lru_cache(maxsize=1)
def load_detector(file: Path) -> Any:
    """RetinaFace over MobileNet 0.25 (Deng et al. 2019, arXiv 1905.00641)."""
    model = RetinaFace(network_name="mobile0.25", device="cpu")
    return load(model, file)


def load(model: nn.Module, file: Path, key: str | None = None) -> Any:
    """Put weights into a model, all of them. key: under which the file has them."""
    state = torch.load(file, map_location="cpu", weights_only=True)
    state = state[key] if key else state
    model.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    return model.eval().requires_grad_(False)


def align(image: Array, landmarks: Array) -> Array:
    """A face, turned upright and scaled to 112 px, as recognizers are trained on it (ArcFace)."""
    where = get_reference_facial_points(default_square=True)
    return np.asarray(warp_and_crop_face(image, landmarks.tolist(), where, crop_size=(FACE_PX, FACE_PX)))


def sharpness(face: Array) -> float:
    """Variance of the Laplacian (Pech-Pacheco et al. 2000)."""
    return float(cv2.Laplacian(cv2.cvtColor(face, cv2.COLOR_RGB2GRAY), cv2.CV_64F).var())


def identify(face: Array, recognizer: Path) -> tuple[float, ...]:
    """Who an aligned face is: a vector of length 1.

    The mirrored face is added, which evens out light and pose, but for the recognizers that are PLAIN.
    """
    mean, deviation = (np.array(values, np.float32) for values in RECOGNIZERS[recognizer.name])
    pixels = (face.astype(np.float32) - mean) / deviation
    net = load_recognizer(recognizer)
    total = np.zeros(1, np.float32)
    for turned in (pixels,) if recognizer.name in PLAIN else (pixels, pixels[:, ::-1]):
        net.setInput(np.ascontiguousarray(turned.transpose(2, 0, 1)[None]))
        total = total + net.forward()[0]
    return tuple((total / np.linalg.norm(total)).tolist())


@lru_cache(maxsize=1)
def load_recognizer(file: Path) -> Any:
    return cv2.dnn.readNetFromONNX(str(file))


def save_identity(identity: Sequence[float], file: Path, metadata: Mapping[str, str]) -> None:
    """Write a person's identity (D,) as the tensor `identity`, float32 and of length 1; whole or not at all.

    Raises ValueError for a vector without a direction.
    """
    vector = torch.tensor(identity, dtype=torch.float64)
    length = vector.norm()
    if not (torch.isfinite(length) and length > 0):
        raise ValueError("the identity is not a vector of finite numbers with a direction")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, save({"identity": (vector / length).float()}, dict(metadata)))


# Making what the trainer reads


def prepare(task: Task) -> Made:
    """Write what a task asks for into its folder, each file whole or not at all; what lies there already stays."""
    made = Made()
    with Image.open(task.photo) as opened:
        image = opened.convert("RGB")
    stem, folder, scale = task.photo.stem, task.folder, 1.0
    if task.restorer:
        image, scale, made.restored = restore(image, task.faces, task.restorer, task.strength)
        if made.restored:
            write(image, folder / "restored" / f"{stem}.jpg")
    boxes = [scaled(face.box, scale) for face in task.subject]
    closeup = closeup_box(boxes, image.size) if task.closeup else None
    if closeup:
        write(image.crop(closeup), folder / "faces" / f"{stem}{dataset.FACE_SUFFIX}.jpg")
        made.closeup = True
    for kind, mask in masks(task, image, boxes).items():
        if mask is None or np.asarray(mask).mean() < 255 * LEAST_SHARE:
            continue
        write(mask, folder / "masks" / kind / f"{stem}.png")
        made.masks.append(kind)
        if closeup and (cropped := mask.crop(closeup)).getbbox():  # the face may lie outside what was found
            write(cropped, folder / "masks" / kind / f"{stem}{dataset.FACE_SUFFIX}.png")
    return made


def write(image: Image.Image, file: Path) -> None:
    """Whole, or not at all."""
    if file.exists():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    options: dict[str, Any] = {"quality": 95, "subsampling": 0} if file.suffix == ".jpg" else {"compress_level": 1}
    image.save(partial, "JPEG" if file.suffix == ".jpg" else "PNG", **options)
    fsync(partial)
    partial.rename(file)


def scaled(box: Box, scale: float) -> Box:
    left, top, right, bottom = (value * scale for value in box)
    return left, top, right, bottom


def around(boxes: list[Box]) -> Box:
    """The smallest box around all."""
    lefts, tops, rights, bottoms = zip(*boxes, strict=True)
    return min(lefts), min(tops), max(rights), max(bottoms)


def closeup_box(boxes: list[Box], size: tuple[int, int]) -> tuple[int, int, int, int] | None:
    """What a closeup shows of a photo of this size; None where the face is too small for one.

    The box of the face, wider by 40 % of its width on each side and by 50 % of its height above and below, at least
    512 px where the photo has them: the hosted service's numbers.
    """
    if not boxes:
        return None
    left, top, right, bottom = around(boxes)
    if (right - left) * (bottom - top) < CLOSEUP_SHARE * size[0] * size[1]:
        return None
    spans = (left, right, CROP_SIDE, size[0]), (top, bottom, CROP_ABOVE, size[1])
    (x0, x1), (y0, y1) = (widened(*span) for span in spans)
    return x0, y0, x1, y1


def widened(low: float, high: float, margin: float, limit: int) -> tuple[int, int]:
    """An interval with a margin at both ends, at least 512 long, moved and cut so as to lie between 0 and `limit`."""
    length = min(limit, max(CROP_LEAST, round((high - low) * (1 + 2 * margin))))
    start = round(min(max(0.0, (low + high) / 2 - length / 2), limit - length))
    return start, start + length


def masks(task: Task, image: Image.Image, boxes: list[Box]) -> dict[str, Image.Image | None]:
    """The masks that a task asks for, white on black, of the size of the image; None where nothing was found."""
    drawn: dict[str, Image.Image | None] = {}
    if task.mask_face:
        drawn["face"] = mask_boxes(boxes, image.size) if boxes else None
    if task.matting:
        drawn["subject"] = mask_people(image, task.matting)
    if task.segmenter:
        drawn["subject"] = mask_words(image, task.name, task.segmenter)
    return drawn


def mask_boxes(boxes: list[Box], size: tuple[int, int]) -> Image.Image:
    mask = Image.new("L", size)
    for left, top, right, bottom in boxes:
        aside, above = MASK_MARGIN * (right - left), MASK_MARGIN * (bottom - top)
        ImageDraw.Draw(mask).rectangle((left - aside, top - above, right + aside, bottom + above), fill=255)
    return mask


def mask_people(image: Image.Image, weights: Path) -> Image.Image:
    """Where people are, by MODNet (Ke et al. 2020, arXiv 2011.11961)."""
    scale = MATTING_PX / min(image.size)
    width, height = (max(32, round(side * scale / 32) * 32) for side in image.size)
    pixels = dataset.to_pixels(image.resize((width, height), Image.Resampling.BILINEAR))[None]
    with torch.no_grad():
        matte = load_matting(weights)(pixels, True)[2][0, 0]
    return grey(matte, image.size)


@lru_cache(maxsize=1)
def load_matting(weights: Path) -> Any:
    from facexlib.matting.modnet import MODNet

    return load(MODNet(backbone_pretrained=False), weights)


def mask_words(image: Image.Image, words: str, weights: Path) -> Image.Image | None:
    """Where the thing of this name is, by CLIPSeg (Lüddecke and Ecker 2021, arXiv 2112.10003); None where nowhere.

    Its probabilities are vague at the edges and seldom reach 1: from a fifth of the largest they count, from three
    fifths they count in full.
    """
    tokenizer, model = load_segmenter(weights.parent)
    pixels = dataset.to_pixels(image.resize((WORDS_PX, WORDS_PX), Image.Resampling.BILINEAR)) / 2 + 0.5
    mean, deviation = (torch.tensor(values)[:, None, None] for values in IMAGENET)
    tokens = tokenizer([words], return_tensors="pt")
    with torch.no_grad():
        answer = model(**tokens, pixel_values=((pixels - mean) / deviation)[None])
    likely = answer.logits.reshape(WORDS_PX, WORDS_PX).sigmoid()
    if likely.max() < 0.2:
        return None
    return grey(((likely / likely.max() - 0.2) / 0.4).clamp(0, 1), image.size)


def mask_png(picture: Path, words: str, weights: Path) -> bytes | None:
    """`mask_words` of a file, as a PNG."""
    with Image.open(picture) as opened:
        mask = mask_words(opened.convert("RGB"), words, weights)
    if mask is None:
        return None
    stream = io.BytesIO()
    mask.save(stream, "PNG")
    return stream.getvalue()


IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and deviation that CLIPSeg's preprocessing has


@lru_cache(maxsize=1)
def load_segmenter(folder: Path) -> Any:
    from transformers import CLIPSegForImageSegmentation, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    model = CLIPSegForImageSegmentation.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    return tokenizer, model.eval().requires_grad_(False)


def grey(mask: Tensor, size: tuple[int, int]) -> Image.Image:
    """A mask (H, W) of 0 to 1 as a picture of this size."""
    pixels = (mask.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    return Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR)


# Restoring


def gains(face: Found) -> bool:
    """Whether a face is so small or blurred that restoration adds to it instead of smoothing it."""
    left, top, right, bottom = face.box
    return max(right - left, bottom - top) < GAIN_PX or face.sharpness < GAIN_SHARPNESS


def restore(image: Image.Image, faces: list[Found], weights: Path, strength: float) -> tuple[Image.Image, float, int]:
    """Restore the faces that gain by it; returns the picture, by how much it was enlarged, and how many they were.

    A picture whose faces are tiny is enlarged, up to four times, so that what is restored is not thrown away again.
    strength: 0 leaves a face as it was, 1 takes the restorer's.
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
    """Restore faces of a picture in its file (a PNG), whether they gain by it or not: somebody asked for it."""
    with Image.open(picture) as opened:
        pixels = np.array(opened.convert("RGB"))
    model = load_restorer(weights)
    for face in faces:
        restore_face(pixels, np.array(face.landmarks), model, strength)
    Image.fromarray(pixels).save(picture, compress_level=1)


def restore_face(pixels: Array, landmarks: Array, model: nn.Module, strength: float) -> None:
    """Restore one face of a picture, in place, with an edge that fades. Only its surroundings are touched."""
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
def load_restorer(weights: Path) -> Any:
    """GFPGAN 1.4 (Wang et al. 2021, arXiv 2101.04061)."""
    return load(gfpgan(), weights, "params_ema")


def gfpgan(channel_multiplier: int = 2, narrow: float = 1.0) -> nn.Module:
    """Its architecture; the defaults are those of the released weights."""
    # basicsr, which gfpgan imports, still asks for a module that torchvision has renamed.
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


# Showing


def preview(photo: Path, mask: Path | None, resolution: int, buckets: bool) -> bytes:
    """A photo as the trainer sees it, what the loss leaves out dimmed, as a small JPEG."""
    with Image.open(photo) as opened:
        whole, side = opened.size, dataset.square(resolution, 64)
        size = dataset.bucket(whole, resolution, 64) if buckets else (side, side)
        opened.draft("RGB", (2 * SHOWN_PX, 2 * SHOWN_PX))
        image = opened.convert("RGB")
    scale = min(1.0, SHOWN_PX / max(size))
    shown = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
    pixels = dataset.cut(image, dataset.crops(image.size, size, 1, 0)[0], shown, False)
    if mask:
        light = dataset.cut(dataset.load_mask(mask, whole), dataset.crops(whole, size, 1, 0)[0], shown, False)
        pixels = Image.composite(pixels, pixels.point(lambda value: value * dataset.DIMMED), light)
    stream = io.BytesIO()
    pixels.save(stream, "JPEG", quality=85)
    return stream.getvalue()
