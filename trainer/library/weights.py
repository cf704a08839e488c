"""The weights of the small models that analyze photos: their sources, licences and sha256.

They are downloaded once into their own folder (setting `weights`) and checked by their sha256. On a machine without a
network, a person puts files of the same names into that folder.
"""

from __future__ import annotations

import hashlib
import logging
import uuid
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import httpx

from trainer.config import branch_file
from trainer.contract.photos import ProgressCallback, no_progress
from trainer.files import PARTIAL, fsync, write_whole
from trainer.settings import Settings, why_no_folder

log = logging.getLogger("tunebooth.weights")
FACEXLIB = "https://github.com/xinntao/facexlib/releases/download"
CLIPSEG_FOLDER = "clipseg-rd64-refined"
CLIPSEG_HUB = f"https://huggingface.co/CIDAS/{CLIPSEG_FOLDER}/resolve/main"


class Unavailable(Exception):
    """Weights are not available; the message for the user says why."""


@dataclass(frozen=True)
class Weights:
    """A file. sha256 None: none is published; then the sha256 of the first download is kept next to the file."""

    name: str
    what: str
    url: str
    sha256: str | None
    megabytes: float
    licence: str


DETECTOR = Weights(
    "detection_mobilenet0.25_Final.pth",
    "the face detector",
    f"{FACEXLIB}/v0.1.0/detection_mobilenet0.25_Final.pth",
    "2979b33ffafda5d74b6948cd7a5b9a7a62f62b949cef24e95fd15d2883a65220",
    1.8,
    "MIT (RetinaFace of biubug6, trained on WIDER FACE)",
)
RESTORER = Weights(
    "GFPGANv1.4.pth",
    "the face restorer",
    "https://github.com/TencentARC/GFPGAN/releases/download/v1.3.0/GFPGANv1.4.pth",
    "e2cd4703ab14f4d01fd1383a8a8b266f9a5833dacee8e6a79d3bf21a1b6be5ad",
    349,
    "Apache-2.0 (GFPGAN)",
)
UPSCALER = Weights(
    "RealESRGAN_x4plus.pth",
    "the model that enlarges pictures",
    "https://github.com/xinntao/Real-ESRGAN/releases/download/v0.1.0/RealESRGAN_x4plus.pth",
    "4fa0d38905f75ac06eb49a7951b426670021be3018265fd191d2125df9d682f1",
    67,
    "BSD-3-Clause (Real-ESRGAN)",
)
MATTING = Weights(
    "matting_modnet_portrait.pth",
    "the model that separates people from the background",
    f"{FACEXLIB}/v0.2.0/matting_modnet_portrait.pth",
    None,
    26,
    "Apache-2.0 (MODNet)",
)
NAMER = "the model that finds objects by their names"
SEGMENTER = tuple(
    Weights(f"{CLIPSEG_FOLDER}/{file}", NAMER, f"{CLIPSEG_HUB}/{file}", None, size, "Apache-2.0 (CLIPSeg)")
    for file, size in [("config.json", 0.1), ("preprocessor_config.json", 0.1), ("vocab.json", 0.9),
                       ("merges.txt", 0.5), ("tokenizer_config.json", 0.1), ("special_tokens_map.json", 0.1),
                       ("model.safetensors", 603)]
)  # fmt: skip
# Never downloaded, but used if present. The first is common (OpenCV Zoo); the second is the one of the tests.
RECOGNIZERS = (
    Weights(
        "face_recognition_sface_2021dec.onnx",
        "the face recognizer",
        "https://github.com/opencv/opencv_zoo/raw/main/models/face_recognition_sface/face_recognition_sface_2021dec.onnx",
        "0ba9fbfa01b5270c96627c4ef784da859931e02f04419c829e83484087c34e79",
        39,
        "Apache-2.0 (SFace, OpenCV Zoo)",
    ),
    Weights(
        "mobilefacenet_112.onnx",
        "the face recognizer",
        "https://github.com/foamliu/MobileFaceNet/raw/a6cc9032a659b615f477833e1a70b5e7931bcccc/weights/MobileFaceNet.onnx",
        "b7120c095d60094f28a4a54ba6a8bf51b297a6273fb40ef6350dfec1f63d9507",
        4,
        "Apache-2.0 (MobileFaceNet; trained on MS-Celeb-1M, which was withdrawn)",
    ),
)
# The recognizer of faceid tunes: IP-Adapter FaceID was trained on its identities.
ARCFACE = Weights(
    "w600k_r50.onnx",
    "the face recognizer of faceid tunes",
    "https://huggingface.co/public-data/insightface/resolve/main/models/buffalo_l/w600k_r50.onnx",
    "4c06341c33c2ca1f86781dab0e829f88ad5b64be9fba56e56bc9ebdefc619e43",
    174,
    "non-commercial research only (InsightFace)",
)


def face_adapter(settings: Settings, branch: str) -> Weights:
    """The adapter that puts a face into pictures of a branch (IP-Adapter FaceID). Raises Unavailable."""
    try:
        return Weights(**branch_file.branch_table(settings.presets, branch)["face_adapter"])
    except (LookupError, TypeError):
        raise Unavailable(f"{branch}.toml has no valid [face_adapter]") from None


def find(settings: Settings, *wanted: Weights) -> Path | None:
    """The first of these files, None unless all are in the folder. Raises Unavailable for a wrong sha256."""
    if not all((settings.weights / one.name).is_file() for one in wanted):
        return None
    for one in wanted:
        file = settings.weights / one.name
        facts = file.stat()
        if _sha256(file, facts.st_mtime_ns, facts.st_size) != (one.sha256 or _first_sha256(file)):
            raise Unavailable(
                f"{one.name} in the weights folder is not {one.what}: its sha256 is wrong. Delete it, and the"
                " file of that name and .sha256 where there is one, so that it is fetched again"
            )
    return settings.weights / wanted[0].name


def find_recognizer(settings: Settings) -> Path | None:
    """The face recognizer, if one is in the folder."""
    found = (find(settings, one) for one in RECOGNIZERS)
    return next((file for file in found if file), None)


def find_identifier(settings: Settings) -> Path | None:
    """The face recognizer for faceid tunes, if one is in the folder: ArcFace, else the recognizer of other tunes.

    An adapter understands only identities of the recognizer that it was trained with.
    """
    return find(settings, ARCFACE) or find_recognizer(settings)


def obtain_identifier(settings: Settings, progress: ProgressCallback = no_progress) -> Path:
    """ArcFace, downloaded if needed; the recognizer of other tunes if that fails. Raises Unavailable."""
    if file := find(settings, ARCFACE):
        return file
    try:
        return obtain(settings, ARCFACE, progress=progress)
    except Unavailable:
        if file := find_recognizer(settings):
            return file
        raise


def obtain(settings: Settings, *wanted: Weights, progress: ProgressCallback = no_progress) -> Path:
    """The first of these files; missing ones are downloaded. Raises Unavailable."""
    for one in wanted:
        if not (settings.weights / one.name).is_file():
            _fetch(settings, one, progress)
    file = find(settings, *wanted)
    assert file is not None, "all of them are present now"
    return file


def _fetch(settings: Settings, one: Weights, progress: ProgressCallback) -> None:
    from huggingface_hub import constants  # has the library's switch for offline mode

    by_hand = f"put {one.name} into the weights folder, from {one.url}"
    if constants.is_offline_mode():
        raise Unavailable(f"{one.what} is not here and HF_HUB_OFFLINE is set; {by_hand}")
    log.info("fetching %s: %s, %g MB from %s, licence: %s", one.name, one.what, one.megabytes, one.url, one.licence)
    target = settings.weights / one.name
    partial = target.with_name(f"{target.name}{PARTIAL}{uuid.uuid4().hex[:8]}")
    digest, size = hashlib.sha256(), 0
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with httpx.stream("GET", one.url, follow_redirects=True, timeout=20.0) as response, partial.open("wb") as file:
            response.raise_for_status()
            for chunk in response.iter_bytes(2**20):
                digest.update(chunk)
                file.write(chunk)
                size += len(chunk)
                progress(f"{one.what} is fetched; its licence: {one.licence}", round(size / 1e6), round(one.megabytes))
        if one.sha256 not in (None, digest.hexdigest()):
            raise Unavailable(f"{one.what} arrived damaged: its sha256 is not the published one; {by_hand}")
        fsync(partial)
        _note_of(target).unlink(missing_ok=True)  # of an earlier file
        partial.rename(target)
    except httpx.HTTPError:
        raise Unavailable(f"{one.what} could not be fetched: no connection; {by_hand}") from None
    except OSError as problem:
        why = problem.strerror if settings.weights.is_dir() else why_no_folder("weights", settings.weights, problem)
        raise Unavailable(f"{one.what} could not be stored ({why}); {by_hand}") from None
    finally:
        partial.unlink(missing_ok=True)


def _first_sha256(file: Path) -> str:
    """The sha256 of the file at its first use."""
    note = _note_of(file)
    if not note.exists():
        facts = file.stat()
        write_whole(note, _sha256(file, facts.st_mtime_ns, facts.st_size))
    return note.read_text().strip()


def _note_of(file: Path) -> Path:
    return file.with_name(f"{file.name}.sha256")


@lru_cache(maxsize=64)
def _sha256(file: Path, _changed: int, _size: int) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
