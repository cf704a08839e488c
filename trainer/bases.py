"""base_tune_id -> Base. Finds and names base models; never loads one, and reads no more of a file than its header."""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer import presets
from trainer.branches import BRANCHES
from trainer.schema import InvalidRequest, check_branch

if TYPE_CHECKING:
    from trainer.settings import Settings

FAST_ID = 1_000_000_000  # the small base of branch fast has no number at the hosted service
FAST_FOLDER = Path(__file__).parent / "branches" / "fast_base"
MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit

EDITING_MODEL = "it is a model for inpainting or editing, which takes a picture as input; those are not trained here"
PIPELINES = {
    "StableDiffusionPipeline": "sd15",
    "StableDiffusionXLPipeline": "sdxl1",
    "FluxPipeline": "flux1",
}


@dataclass(frozen=True)
class Base:
    """What a tune starts from: a folder or file here, or a hub repository."""

    id: int
    title: str
    branch: str
    path: Path | None = None
    repository: str | None = None
    revision: str | None = None  # of the repository; None: its main one
    variant: str | None = None  # of its weight files
    error: str | None = None  # why it cannot be used


def fast_base() -> Base:
    """The base of branch fast, which is part of the package."""
    return Base(FAST_ID, "Tunebooth fast", "fast", path=FAST_FOLDER)


def list_bases(settings: Settings) -> list[Base]:
    """All bases: the presets' hub repositories, the fast one, and whatever lies in the models folder."""
    hub = [_of_hub(row, branch) for branch in BRANCHES for row in presets.base_rows(settings.presets, branch)]
    return [*hub, fast_base(), *_scan(settings.models)]


def _of_hub(row: presets.BaseRow, branch: str) -> Base:
    number = row.id or hashed_id(row.repository)
    return Base(number, row.title, branch, None, row.repository, row.revision, row.variant)


def resolve(settings: Settings, base_tune_id: int | None, branch: str | None) -> Base:
    """The base that a request means. Raises InvalidRequest where there is none, or none of that branch."""
    if branch is not None:
        check_branch(branch)
    if branch == "fast":
        return fast_base()  # a way to test a call: it takes any base_tune_id and uses its own
    if base_tune_id is None:
        branch = branch or "sd15"
        return _of_hub(presets.base_rows(settings.presets, branch)[0], branch)
    base = next((base for base in list_bases(settings) if base.id == base_tune_id), None)
    if base is None:
        raise InvalidRequest(
            {"base_tune_id": [f"no base model has the id {base_tune_id}; GET /gallery/tunes lists them"]}
        )
    if base.error:
        raise InvalidRequest({"base_tune_id": [f"{base.title}: {base.error}"]})
    check_branch(base.branch)
    if branch is not None and base.branch != branch:
        raise InvalidRequest({"base_tune_id": [f"{base.title} is of branch {base.branch}, not {branch}"]})
    return base


def hashed_id(name: str) -> int:
    """A number from 1e9 to 2^31 that stays the same for the same name."""
    digest = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    return FAST_ID + 1 + digest % (2**31 - FAST_ID - 1)


def sidecar(file: Path) -> Path:
    """The folder of the same name beside a single file: its configuration, and its tokenizer."""
    return file.with_suffix("")


def _scan(models: Path) -> list[Base]:
    """Diffusers folders and single files below the models folder; links that lead out of it are left alone."""
    if not models.is_dir():
        return []
    root = models.resolve()
    indexes = sorted(models.rglob("model_index.json"))
    folders = [index.parent for index in indexes]
    files = [file for file in sorted(models.rglob("*.safetensors")) if not set(file.parents) & set(folders)]
    sidecars = {sidecar(file) for file in files}
    found = []
    for path in [*(folder for folder in folders if folder not in sidecars), *files]:
        name = path.relative_to(models).as_posix()
        branch, error = "", None
        try:
            if not path.resolve().is_relative_to(root):
                raise ValueError("it lies outside the models folder")
            branch = _branch_of_folder(path) if path.is_dir() else _branch_of_file(path)
        except OSError as problem:
            error = f"it cannot be read: {problem.strerror}"
        except ValueError as problem:
            error = str(problem)
        found.append(Base(hashed_id(name), name, branch, path=path, error=error))
    return found


def _branch_of_folder(folder: Path) -> str:
    index = _json_object(folder / "model_index.json")
    pipeline = str(index.get("_class_name"))
    if pipeline not in PIPELINES:
        raise ValueError(f"its model_index.json names {pipeline!r}; known are {', '.join(PIPELINES)}")
    for name, entry in index.items():
        library = entry[0] if isinstance(entry, list) and entry else None
        if library not in ("diffusers", "transformers", None):
            raise ValueError(f"its {name} asks for code of {library!r}; only diffusers and transformers are loaded")
    if code := next(folder.rglob("*.py"), None):
        raise ValueError(f"it brings code ({code.name}), which is never run; take it out")
    branch = PIPELINES[pipeline]
    denoiser = _json_object(folder / ("transformer" if branch == "flux1" else "unet") / "config.json")
    if branch == "sd15" and denoiser.get("cross_attention_dim") == 1024:
        raise ValueError("it is a Stable Diffusion 2 model, which is not supported")
    channels = denoiser.get("in_channels")
    if channels != (denoiser.get("out_channels") or channels):
        raise ValueError(EDITING_MODEL)
    return branch


def _json_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"its {file.name} is not a JSON object")
    return content


def _branch_of_file(file: Path) -> str:
    header = _safetensors_header(file)
    flux = next((key for key in header if key.endswith("double_blocks.0.img_attn.qkv.weight")), None)
    if flux is not None:
        prefix = flux.removesuffix("double_blocks.0.img_attn.qkv.weight")
        if _shape(header, f"{prefix}img_in.weight")[1:] != _shape(header, f"{prefix}final_layer.linear.weight")[:1]:
            raise ValueError(EDITING_MODEL)
        return "flux1"
    if "model.diffusion_model.input_blocks.0.0.weight" in header:
        if _shape(header, "model.diffusion_model.input_blocks.0.0.weight")[1:2] != [4]:
            raise ValueError(EDITING_MODEL)
        if "conditioner.embedders.1.model.ln_final.weight" in header:
            if not any(key.startswith("first_stage_model.") for key in header):
                raise ValueError("it has no VAE; a whole Stable Diffusion XL checkpoint is needed")
            return "sdxl1"
        if "cond_stage_model.model.ln_final.weight" in header:
            raise ValueError("it is a Stable Diffusion 2 model, which is not supported")
        if not any(key.startswith("cond_stage_model.transformer.") for key in header):
            raise ValueError("it has no text encoder; a whole Stable Diffusion 1.5 checkpoint is needed")
        if not any(key.startswith("first_stage_model.") for key in header):
            raise ValueError("it has no VAE; a whole Stable Diffusion 1.5 checkpoint is needed")
        return "sd15"
    raise ValueError("its tensors are of no family that is known here (a LoRA, or another model?)")


def _shape(header: dict[str, Any], key: str) -> list[int]:
    shape = header.get(key, {}).get("shape")
    return shape if isinstance(shape, list) else []


def _safetensors_header(file: Path) -> dict[str, Any]:
    """The names and shapes in a safetensors file; checks that the file is as long as they say.

    Layout: https://github.com/huggingface/safetensors#format. Raises ValueError for what is not one.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
            raise ValueError("it is not a safetensors file, or a broken one")
        try:
            header = json.loads(stream.read(length))
            end = max((entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"), default=0)
            expected = 8 + length + int(end)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError, OverflowError):
            raise ValueError("it is not a safetensors file, or a broken one: its header cannot be read") from None
    if expected != size:
        raise ValueError(f"it is broken: its header speaks of {expected} bytes, it has {size}")
    return dict(header)
