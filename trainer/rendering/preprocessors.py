"""Preprocessors: from a picture to a control image (edges, depth, pose, lines, colours) for a ControlNet."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForDepthEstimation,
    AutoModelForObjectDetection,
    BaseImageProcessor,
    PreTrainedModel,
    VitPoseForPoseEstimation,
)

from trainer.branches import loading
from trainer.rendering.control import Picture

Find = Callable[[str], Path]  # the folder of an annotator model: "depth", "people" or "pose"
Point = tuple[float, float] | None  # x and y in pixels; None: not seen
DRAWN_PX = 512  # shorter side at which ControlNet 1.1's annotators draw; line widths refer to it
CANNY = 100, 200  # thresholds of ControlNet's demo for its canny model
# For the extended difference of Gaussians, at DRAWN_PX. The second deviation is 1.6 times the first, as in the paper.
# Both Gaussians have the same weight, so flat parts have no ink, even dark ones. Threshold and slope were chosen by
# eye on photos.
XDOG_SIGMA, XDOG_RATIO = 1.2, 1.6  # px; ratio of the second deviation to the first
XDOG_THRESHOLD, XDOG_SLOPE = -0.003, 80.0  # of brightness from 0 to 1
SMOOTH_LEVELS, SMOOTH_PX = 25.0, 3.0  # of the bilateral filter before it, which removes texture
LEAST_SURE = 0.5  # score of a person's box
LEAST_SEEN = 0.3  # score of a body's point, as in ViTPose's own demo
# OpenPose's 18 body points as indices into COCO's 17, which ViTPose finds; -1: the neck, the middle of the shoulders
# (Cao et al. 2017, arXiv 1611.08050, the COCO model).
BODY = (0, -1, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)
SHOULDERS = 5, 6  # COCO's
LIMBS = (
    (1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13),
    (1, 0), (0, 14), (14, 16), (0, 15), (15, 17),
)  # fmt: skip
# Point n and limb n have hue n of 18; limbs are drawn at 0.6 of their brightness.
COLOURS = [tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue / len(BODY), 1, 1)) for hue in range(len(BODY))]
LIMB_SHADE = 0.6
STROKE = 4  # px at DRAWN_PX: half a limb's width, and a point's radius


def control_image(kind: str, picture: Picture, find: Find, device: torch.device) -> Picture:
    """The control image of a picture for this kind (schema.CONTROLS), of the same size.

    find: returns the folder of an annotator model and may fetch it; it is called only for those that are needed. They
    are on the device only while they run. Raises ValueError where nothing is found, and what `find` and the loaders
    raise: OSError for missing files, ValueError for wrong ones.
    """
    if kind not in PREPROCESSORS:
        raise ValueError(f"there is no control {kind!r}; there are {', '.join(PREPROCESSORS)}")
    return PREPROCESSORS[kind](picture.convert("RGB"), find, device)


def canny(picture: Picture, _find: Find, _device: torch.device) -> Picture:
    """Edges (Canny 1986), white on black, one pixel wide."""
    return Image.fromarray(cv2.Canny(np.asarray(picture.convert("L")), *CANNY)).convert("RGB")


def tile(picture: Picture, _find: Find, _device: torch.device) -> Picture:
    """The picture itself: tile models add detail to it."""
    return picture


def lineart(picture: Picture, _find: Find, _device: torch.device) -> Picture:
    """A line drawing, white on black, by an extended difference of Gaussians (Winnemöller et al. 2012, "XDoG").

    ControlNet 1.1's lineart weights were trained with drawings of a network (Chan et al. 2022, arXiv 2203.12691). This
    method needs no weights: its lines are on the dark side of an edge, and texture makes more lines.
    """
    factor = min(1, DRAWN_PX / min(picture.size))  # in a smaller picture the lines would disappear
    size = [max(1, round(side * factor)) for side in picture.size]
    grey = np.asarray(picture.convert("L").resize(size, Image.Resampling.LANCZOS))
    for _ in range(2):  # as in Winnemöller et al. 2006, the basis of the paper
        grey = cv2.bilateralFilter(grey, 0, SMOOTH_LEVELS, SMOOTH_PX)
    light = grey.astype(np.float32) / 255
    near, far = (cv2.GaussianBlur(light, (0, 0), sigma) for sigma in (XDOG_SIGMA, XDOG_SIGMA * XDOG_RATIO))
    ink = np.tanh(XDOG_SLOPE * np.maximum(XDOG_THRESHOLD - (near - far), 0))
    drawn = Image.fromarray(np.rint(255 * ink).astype(np.uint8))
    return drawn.resize(picture.size, Image.Resampling.BILINEAR).convert("RGB")


@torch.no_grad()
def depth(picture: Picture, find: Find, device: torch.device) -> Picture:
    """Depth map by Depth Anything V2 (Yang et al. 2024, arXiv 2406.09414): the nearest point is 255, the farthest 0."""
    processor, model = _read(AutoModelForDepthEstimation, find("depth"), device)
    seen = model(**processor(images=picture, return_tensors="pt").to(device))
    size = picture.size[::-1]
    near = processor.post_process_depth_estimation(seen, target_sizes=[size])[0]["predicted_depth"].float().cpu()
    span = float(near.max() - near.min())
    share = (near - near.min()) / span if span > 0 else torch.zeros_like(near)
    return Image.fromarray((255 * share).round().to(torch.uint8).numpy()).convert("RGB")


@torch.no_grad()
def pose(picture: Picture, find: Find, device: torch.device) -> Picture:
    """Stick figures of the people, as `draw_people` draws them. Raises ValueError where no person is found.

    People are found by RT-DETR (Zhao et al. 2023, arXiv 2304.08069), their points by ViTPose (Xu et al. 2022, arXiv
    2204.12484).
    """
    processor, model = _read(AutoModelForObjectDetection, find("people"), device)
    seen = model(**processor(images=picture, return_tensors="pt").to(device))
    things = processor.post_process_object_detection(seen, LEAST_SURE, target_sizes=[picture.size[::-1]])[0]
    boxes = [
        [left, top, right - left, bottom - top]  # COCO's box format
        for label, (left, top, right, bottom) in zip(things["labels"].tolist(), things["boxes"].tolist(), strict=True)
        if model.config.id2label[label] == "person"
    ]
    people: list[list[Point]] = []
    if boxes:
        del model
        processor, model = _read(VitPoseForPoseEstimation, find("pose"), device)
        seen = model(**processor(picture, boxes=[boxes], return_tensors="pt").to(device))
        for found in processor.post_process_pose_estimation(seen, boxes=[boxes])[0]:
            sure = zip(found["keypoints"].tolist(), found["scores"].tolist(), strict=True)
            people.append(body([(x, y) if score >= LEAST_SEEN else None for (x, y), score in sure]))
    if not any(point for person in people for point in person):
        raise ValueError("no person was found in the picture; use another picture or control")
    return draw_people(people, picture.size)


def body(points: Sequence[Point]) -> list[Point]:
    """COCO's 17 points of a person -> OpenPose's 18: the neck is between the shoulders, where both are visible."""
    left, right = (points[place] for place in SHOULDERS)
    neck = ((left[0] + right[0]) / 2, (left[1] + right[1]) / 2) if left and right else None
    return [neck if place < 0 else points[place] for place in BODY]


def draw_people(people: Sequence[Sequence[Point]], size: tuple[int, int]) -> Picture:
    """OpenPose's stick figures on black, in its colours; size: width and height in px.

    people: 18 points each, in OpenPose's order. A limb is drawn where both its ends are visible.
    """
    canvas = np.zeros((size[1], size[0], 3), np.uint8)
    stroke = max(1, round(STROKE * min(size) / DRAWN_PX))
    for person in people:
        for (start, end), colour in zip(LIMBS, COLOURS, strict=False):
            one, other = person[start], person[end]
            if one and other:
                middle = round((one[0] + other[0]) / 2), round((one[1] + other[1]) / 2)
                half = round(math.dist(one, other) / 2)
                angle = math.degrees(math.atan2(other[1] - one[1], other[0] - one[0]))
                shade = [LIMB_SHADE * part for part in colour]
                cv2.ellipse(canvas, middle, (half, stroke), angle, 0, 360, shade, cv2.FILLED)
    for person in people:
        for point, colour in zip(person, COLOURS, strict=True):
            if point:
                cv2.circle(canvas, (round(point[0]), round(point[1])), stroke, colour, cv2.FILLED)
    return Image.fromarray(canvas)


def _read(
    kind: type[PreTrainedModel], folder: Path, device: torch.device
) -> tuple[BaseImageProcessor, PreTrainedModel]:
    """An annotator model and its image processor. Raises ValueError for missing weights."""
    processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    model, facts = kind.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
    )
    loading.refuse_gaps(facts["missing_keys"])
    return processor, model.eval().requires_grad_(False).to(device)


PREPROCESSORS: dict[str, Callable[[Picture, Find, torch.device], Picture]] = {
    "canny": canny,
    "depth": depth,
    "pose": pose,
    "tile": tile,
    "lineart": lineart,
}
ANNOTATORS = {"depth": ("depth",), "pose": ("people", "pose")}  # annotator models of each kind
