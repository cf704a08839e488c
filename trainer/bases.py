"""base_tune_id -> Base. Finds and names base models; never loads one, and reads no more of a file than its header."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer import presets
from trainer.branches import BRANCHES
from trainer.methods import FORMATS
from trainer.schema import InvalidRequest, check_branch

if TYPE_CHECKING:
    from trainer.settings import Settings

FAST_ID = 1_000_000_000  # the small base of branch fast has no number at the hosted service
FAST_FOLDER = Path(__file__).parent / "branches" / "fast_base"
MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit

EDITING_MODEL = "it is a model for inpainting or editing, which takes a picture as input; those are not trained here"
WORDS_SUFFIX = "_emb.safetensors"
LORA_KEY = re.compile(r"\.(lora_down|lora_A|lora\.down)\.weight$")
LORA_BRANCHES = {  # told by these keys alone
    "flux1": re.compile(r"lora_unet_(double|single)_blocks_|transformer\.(single_)?transformer_blocks\."),
    "sdxl1": re.compile(r"lora_unet_(input_blocks|middle_block|output_blocks)_|lora_te2_"),
    "sd15": re.compile(r"lora_unet_(down_blocks|mid_block|up_blocks)_"),
}
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
    model: Path | None = None  # a LoRA that is put on it: a file, or the `model/` of an earlier tune
    rest: Base | None = None  # what has the parts that its file lacks
    root: str = ""  # the title of what the weights are of, where that is another one
    chain: tuple[str, ...] = ()  # of an earlier tune: the titles of what it stands on, the nearest first

    @property
    def weights(self) -> tuple[object, ...]:
        """What is the same where the same weights are loaded, whatever LoRA comes on them."""
        return self.branch, self.path, self.repository, self.revision, self.variant, self.rest and self.rest.weights


Tunes = Callable[[int], dict[str, Any] | None]  # a tune's row by its id


def fast_base() -> Base:
    """The base of branch fast, which is part of the package."""
    return Base(FAST_ID, "Tunebooth fast", "fast", path=FAST_FOLDER)


def list_bases(settings: Settings) -> list[Base]:
    """All bases: the presets' hub repositories, the fast one, and whatever lies in the models folder."""
    hub = [_of_hub(row, branch) for branch in BRANCHES for row in presets.base_rows(settings.presets, branch)]
    known = [*hub, fast_base()]
    found = _scan(settings.models)
    known += [base for base in found if base.model is None]
    return known + [_put_on(base, known) for base in found if base.model is not None]


def _put_on(lora: Base, known: list[Base]) -> Base:
    """A LoRA file on the base that it names as its own, else on the default one of its branch."""
    assert lora.model is not None
    facts = _safetensors_header(lora.model).get("__metadata__", {})
    ours = facts.get("tunebooth.root")
    named = {ours or facts.get("ss_sd_model_name")} - {None}
    under = next((base for base in known if named & {base.title, base.repository, Path(base.title).name}), None)
    if under is None or under.branch not in (lora.branch, "fast"):
        if ours:
            return replace(lora, error=f"it was trained on {ours!r}, which is not among the bases")
        under = next(base for base in known if base.branch == lora.branch)
    root = under.root or under.title
    return replace(under, id=lora.id, title=lora.title, model=lora.model, chain=(under.title,), root=root)


def _of_hub(row: presets.BaseRow, branch: str) -> Base:
    number = row.id or hashed_id(row.repository)
    return Base(number, row.title, branch, None, row.repository, row.revision, row.variant)


def resolve(
    settings: Settings, base_tune_id: int | None, branch: str | None, tunes: Tunes = lambda tune_id: None
) -> Base:
    """The base that a request means. tunes: to look up an earlier tune, which is a base, too.

    Raises InvalidRequest where there is none, or none of that branch.
    """
    if branch is not None:
        check_branch(branch)
    earlier = None if base_tune_id is None else tunes(base_tune_id)
    if branch == "fast" and (earlier is None or earlier["branch"] != "fast"):
        return fast_base()  # a way to test a call: it takes any base_tune_id and uses its own
    if base_tune_id is None:
        branch = branch or "sd15"
        return _of_hub(presets.base_rows(settings.presets, branch)[0], branch)
    base = next((base for base in list_bases(settings) if base.id == base_tune_id), None)
    if base is None and earlier is not None:
        base = of_tune(settings, earlier, tunes)
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


def of_tune(settings: Settings, tune: dict[str, Any], tunes: Tunes) -> Base:
    """An earlier tune as a base: what it stands on with its LoRA, or its checkpoint.

    Raises InvalidRequest for one that is not trained, or that has no weights.
    """
    tune_id, title, method = tune["id"], tune["title"], tune["method"]
    if tune["status"] != "trained":
        raise InvalidRequest({"base_tune_id": [f"tune {tune_id} is {tune['status']}; only a trained one is a base"]})
    if method == "faceid":
        raise InvalidRequest({"base_tune_id": [f"tune {tune_id} holds a face, and no weights that could be tuned"]})
    under = resolve(settings, tune["base_id"], tune["branch"], tunes)
    model = settings.outputs / "tunes" / str(tune_id) / "model"
    chain = (under.title, *under.chain)
    if method != "checkpoint":
        root = under.root or under.title
        return replace(under, id=tune_id, title=title, model=model, chain=chain, root=root)
    rest = under.rest or replace(under, model=None) if tune["branch"] == "flux1" else None  # its file: the transformer
    return Base(tune_id, title, tune["branch"], path=model / FORMATS["checkpoint"], rest=rest, chain=chain)


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
        if (
            path.name.endswith(WORDS_SUFFIX)
            and path.with_name(path.name.replace(WORDS_SUFFIX, ".safetensors")) in files
        ):
            continue  # the new words of the LoRA beside it
        branch, lora, error = "", None, None
        try:
            if not path.resolve().is_relative_to(root):
                raise ValueError("it lies outside the models folder")
            lora = None if path.is_dir() else _branch_of_lora(_safetensors_header(path))
            branch = lora or (_branch_of_folder(path) if path.is_dir() else _branch_of_file(path))
        except OSError as problem:
            error = f"it cannot be read: {problem.strerror}"
        except ValueError as problem:
            error = str(problem)
        base = Base(hashed_id(name), name, branch, error=error)
        found.append(replace(base, model=path) if lora else replace(base, path=path))
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
    raise ValueError("its tensors are of no family that is known here")


def _branch_of_lora(header: dict[str, Any]) -> str | None:
    """The branch of a LoRA with kohya's or diffusers' keys; None for what is no LoRA. Raises ValueError for others."""
    adapters = [key for key in header if LORA_KEY.search(key)]
    if not adapters:
        return None
    for branch, pattern in LORA_BRANCHES.items():
        if any(pattern.match(key) for key in adapters):
            return branch
    # diffusers' keys of both UNets are alike: what reads the text tells them apart by its width.
    widths = {_shape(header, key)[-1] for key in adapters if key.endswith("attn2.to_k.lora_A.weight")}
    if any(key.startswith("unet.") for key in adapters):
        return "sdxl1" if 2048 in widths or any(key.startswith("text_encoder_2.") for key in adapters) else "sd15"
    raise ValueError("it is a LoRA of no family that is known here")


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
