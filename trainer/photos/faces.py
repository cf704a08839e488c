"""The work of the child process that analyzes photos: faces are found, restored and cropped; identities; masks.

The only user of facexlib, gfpgan, cv2 and torchvision. Models are loaded once, from files whose sha256 was checked,
with `weights_only=True`. Pictures are (H, W, 3) arrays in RGB, 0 to 255, unless a model wants them otherwise.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
import torch
from facexlib.detection.align_trans import get_reference_facial_points, warp_and_crop_face
from facexlib.detection.retinaface import RetinaFace, generate_config
from facexlib.detection.retinaface_utils import PriorBox, decode, decode_landm, py_cpu_nms
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from trainer.files import fsync, write_whole
from trainer.library.weights import ARCFACE
from trainer.photos import geometry
from trainer.photos.found import Box, Found, Made, Task
from trainer.photos.masks import LEAST_SHARE, masks
from trainer.photos.nets import LONG_SIDE, Array, load
from trainer.photos.restore import restore

# Of the detector's score. On the tests' photos of people it finds all faces except some that are painted, half hidden
# or behind glass, and nothing else. Photos of animals are skipped: some faces of cats and dogs score 0.9, so no
# threshold separates them from people.
THRESHOLD = 0.8
OVERLAP = 0.4  # IoU from which two boxes are one face; facexlib's value
FACE_PX = 112  # side of an aligned face, for its sharpness and its identity
IDENTIFIED = 8  # faces of a photo, the largest first: a smaller face is not the subject
# The hosted service's closeup: margins on each side and above, in box sizes, and the least side in px.
CROP_SIDE, CROP_ABOVE, CROP_LEAST = 0.4, 0.5, 512
CLOSEUP_SHARE = 0.003  # of the photo's area: smaller faces get no closeup, as in the hosted service
SHOWN_PX = 320
# Input normalization of each recognizer, for values 0 to 255: (mean, deviation) of red, green and blue.
RECOGNIZERS = {
    "face_recognition_sface_2021dec.onnx": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "mobilefacenet_112.onnx": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    ARCFACE.name: ((127.5,) * 3, (127.5,) * 3),  # insightface, model_zoo/arcface_onnx.py
}
PLAIN = {ARCFACE.name}  # not averaged with the mirrored face, as adapters were trained (`normed_embedding`)


def begin() -> None:
    """Runs first in the child process. One thread: more would take the cores of a tune that trains."""
    torch.set_num_threads(1)


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

    facexlib's `RetinaFace.detect_faces` with cached anchors: they depend on the size only, and computing them takes a
    quarter of its time.
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
    """RetinaFace's anchors for a picture of this size."""
    anchors: Tensor = PriorBox(generate_config("mobile0.25"), image_size=(height, width)).forward()
    return anchors


def read_small(photo: Path) -> tuple[Array, float]:
    """A photo at the size for face detection, and its scale."""
    with Image.open(photo) as opened:
        width, height = opened.size
        scale = min(2.0, LONG_SIDE / max(width, height))
        size = round(width * scale), round(height * scale)
        opened.draft("RGB", size)  # a JPEG is decoded at a half or a quarter: four times as fast
        image = opened.convert("RGB").resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
    return np.asarray(image), scale


@lru_cache(maxsize=1)
def load_detector(file: Path) -> RetinaFace:
    """RetinaFace over MobileNet 0.25 (Deng et al. 2019, arXiv 1905.00641)."""
    model = RetinaFace(network_name="mobile0.25", device="cpu")
    return load(model, file)


def align(image: Array, landmarks: Array) -> Array:
    """A face, rotated upright and scaled to 112 px, as recognizers expect it (ArcFace)."""
    where = get_reference_facial_points(default_square=True)
    return np.asarray(warp_and_crop_face(image, landmarks.tolist(), where, crop_size=(FACE_PX, FACE_PX)))


def sharpness(face: Array) -> float:
    """Variance of the Laplacian (Pech-Pacheco et al. 2000)."""
    return float(cv2.Laplacian(cv2.cvtColor(face, cv2.COLOR_RGB2GRAY), cv2.CV_64F).var())


def identify(face: Array, recognizer: Path) -> tuple[float, ...]:
    """Identity of an aligned face: a vector of length 1.

    The mirrored face is added, which evens out light and pose, except for PLAIN recognizers.
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
def load_recognizer(file: Path) -> cv2.dnn.Net:
    return cv2.dnn.readNetFromONNX(str(file))


def save_identity(identity: Sequence[float], file: Path, metadata: Mapping[str, str]) -> None:
    """Write a person's identity (D,) as the tensor `identity`, float32 and of length 1, atomically.

    Raises ValueError for a vector without a direction.
    """
    vector = torch.tensor(identity, dtype=torch.float64)
    length = vector.norm()
    if not (torch.isfinite(length) and length > 0):
        raise ValueError("the identity is not a vector of finite numbers with a direction")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, save({"identity": (vector / length).float()}, dict(metadata)))


def prepare(task: Task) -> Made:
    """Write the files of a task into its folder, each one atomically; existing files stay."""
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
        write(image.crop(closeup), folder / "faces" / f"{stem}{geometry.FACE_SUFFIX}.jpg")
        made.closeup = True
    for kind, mask in masks(task, image, boxes).items():
        if mask is None or np.asarray(mask).mean() < 255 * LEAST_SHARE:
            continue
        write(mask, folder / "masks" / kind / f"{stem}.png")
        made.masks.append(kind)
        if closeup and (cropped := mask.crop(closeup)).getbbox():  # the face may be outside the mask
            write(cropped, folder / "masks" / kind / f"{stem}{geometry.FACE_SUFFIX}.png")
    return made


def write(image: Image.Image, file: Path) -> None:
    """Write an image atomically."""
    if file.exists():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    options = {"quality": 95, "subsampling": 0} if file.suffix == ".jpg" else {"compress_level": 1}
    try:
        image.save(partial, "JPEG" if file.suffix == ".jpg" else "PNG", **options)
        fsync(partial)
        partial.rename(file)
    finally:
        partial.unlink(missing_ok=True)  # incomplete after an error


def scaled(box: Box, scale: float) -> Box:
    left, top, right, bottom = (value * scale for value in box)
    return left, top, right, bottom


def around(boxes: list[Box]) -> Box:
    """The smallest box around all."""
    lefts, tops, rights, bottoms = zip(*boxes, strict=True)
    return min(lefts), min(tops), max(rights), max(bottoms)


def closeup_box(boxes: list[Box], size: tuple[int, int]) -> tuple[int, int, int, int] | None:
    """The box of a closeup in a photo of this size; None where the face is too small.

    The face's box with margins of 40 % of its width on each side and 50 % of its height above and below, at least
    512 px where the photo is large enough: the hosted service's numbers.
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
    """An interval with a margin at both ends, at least 512 long, moved and cut to fit into 0 to `limit`."""
    length = min(limit, max(CROP_LEAST, round((high - low) * (1 + 2 * margin))))
    start = round(min(max(0.0, (low + high) / 2 - length / 2), limit - length))
    return start, start + length


def preview(photo: Path, mask: Path | None, resolution: int, buckets: bool) -> bytes:
    """The training view of a photo as a small JPEG; what the loss ignores is dimmed."""
    with Image.open(photo) as opened:
        whole, side = opened.size, geometry.square(resolution, 64)
        size = geometry.bucket(whole, resolution, 64) if buckets else (side, side)
        opened.draft("RGB", (2 * SHOWN_PX, 2 * SHOWN_PX))
        image = opened.convert("RGB")
    scale = min(1.0, SHOWN_PX / max(size))
    shown = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
    pixels = geometry.cut(image, geometry.crops(image.size, size, 1, 0)[0], shown, False)
    if mask:
        light = geometry.cut(geometry.load_mask(mask, whole), geometry.crops(whole, size, 1, 0)[0], shown, False)
        pixels = Image.composite(pixels, pixels.point(lambda value: value * geometry.DIMMED), light)
    stream = io.BytesIO()
    pixels.save(stream, "JPEG", quality=85)
    return stream.getvalue()
