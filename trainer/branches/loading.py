"""Loading of bases, for all families: diffusers folders, single files, and errors for damaged ones."""

from __future__ import annotations

import inspect
import json
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting
from diffusers.loaders.single_file_utils import SingleFileComponentError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from trainer.branches.protocol import Task
from trainer.files import unreadable, whole_folder
from trainer.library.bases import Base
from trainer.library.header import read_header
from trainer.library.hub import WrongConfig
from trainer.library.models_folder import sidecar
from trainer.library.weight_format import scales_of

Configs = dict[str, dict[str, Any]]  # JSON file of a diffusers folder -> its content
CONFIGS = Path(__file__).parent / "configs"
WEIGHTS_NAME = r"(model|diffusion_pytorch_model){variant}(-\d+-of-\d+)?{variant}\.safetensors"
SINGLE_FILE_JUNK = ("*.safetensors", "*.bin", "*.py")  # not copied from a sidecar folder with its configuration


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16, which has the range of float32; float32 on the CPU and on cards without bfloat16."""
    half = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if half else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


@contextmanager
def loading_errors(base: Base) -> Iterator[None]:
    """Raise the libraries' errors for a damaged base as ValueError with the base's name."""
    try:
        yield
    except NotImplementedError as problem:  # diffusers moves a weight that is missing from the file
        raise ValueError(f"{base.title} cannot be loaded: weights are missing from it") from problem
    except KeyError as problem:  # diffusers does not find a weight by name
        raise ValueError(f"{base.title} cannot be loaded: {problem} is missing from it") from problem
    # A configuration with values of other types than the libraries expect makes them raise those of the second line.
    except (
        RuntimeError, ValueError, SafetensorError, SingleFileComponentError, TypeError, AttributeError, LookupError,
        ArithmeticError, WrongConfig,
    ) as problem:  # fmt: skip
        raise ValueError(f"{base.title} cannot be loaded: {problem}") from problem


def read_base(
    base: Base,
    dtype: torch.dtype,
    cache: Path,
    read_folder: Callable[[Path, str | None, torch.dtype, Path], Any],
    read_file: Callable[[Path, str | None, torch.dtype, Path], Any],
) -> Any:
    """The complete, frozen pipeline of a base, loaded by the family's reader of folders or of single files.

    Raises OSError where files are missing, ValueError where their content does not fit the family.
    """
    assert base.path is not None, "load_branch fetches what is not here"
    with loading_errors(base):
        read = read_file if base.path.is_file() else read_folder
        pipeline = read(base.path, base.variant, dtype, cache)
    finish(base, pipeline)
    return pipeline


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file, and its metadata. Raises FileNotFoundError, Unreadable."""
    try:
        with safe_open(file, "pt") as tensors:
            metadata = dict(tensors.metadata() or {})
        return load_file(file), metadata
    except FileNotFoundError:
        raise
    except (OSError, SafetensorError) as problem:
        raise unreadable(file, problem) from None


def folder_source(folder: Path, variant: str | None) -> dict[str, Any]:
    """Arguments for `from_pretrained`: a local folder, and only safetensors.

    Raises ValueError where weights have scales or are quantized: the libraries would leave the scales out.
    """
    wanted = re.compile(WEIGHTS_NAME.format(variant=rf"(\.{re.escape(variant)})?" if variant else ""))
    for file in sorted(folder.glob("*/*.safetensors")):
        if not wanted.fullmatch(file.name):
            continue
        try:
            header = read_header(file)
        except ValueError:  # perhaps of a part that is not needed; else the loader refuses it
            continue
        if scales := scales_of(header):
            raise ValueError(
                f"{file.parent.name}/{file.name} has scales ({next(iter(scales.values()))}), which are read in single"
                " files only; use a folder with fp16, bf16 or plain fp8 weights"
            )
    return {
        "pretrained_model_name_or_path": folder,
        "local_files_only": True,
        "use_safetensors": True,
        "variant": variant,
    }


def read_text_encoder(kind: Any, subfolder: str, dtype: torch.dtype, source: Mapping[str, Any]) -> Any:
    """A text encoder, loaded alone: a pipeline does not report missing weights and leaves them random.

    Raises ValueError for missing weights.
    """
    path, variant = source["pretrained_model_name_or_path"], source.get("variant")
    options = {key: value for key, value in source.items() if key != "pretrained_model_name_or_path"}
    if variant and not any((Path(path) / subfolder).glob(f"*.{variant}*.safetensors")):
        options["variant"] = None  # a part may have only weights without a variant
    encoder, facts = kind.from_pretrained(path, subfolder=subfolder, dtype=dtype, output_loading_info=True, **options)
    refuse_gaps(facts["missing_keys"])
    return encoder


def finish(base: Base, pipeline: Any) -> None:
    """Check that a pipeline is complete, and freeze it. Raises OSError for a vocabulary, ValueError for weights."""
    pipeline.set_progress_bar_config(disable=True)
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            with loading_errors(base):
                freeze(part)
        elif name.startswith("tokenizer") and part is not None and len(part) <= len(part.all_special_tokens) + 1:
            # Without vocabulary files, transformers silently makes a tokenizer without words (T5's has only the mark of
            # a word's beginning).
            raise OSError(f"{base.title} has no vocabulary in {name}/")


def freeze(module: nn.Module) -> None:
    """Freeze a module. Raises ValueError where weights are missing."""
    refuse_gaps(name for name, weight in module.named_parameters() if weight.is_meta)
    # eval: dropout would use the global RNG, which is not restored on resume.
    module.requires_grad_(False).eval()


def refuse_gaps(missing: Iterable[str]) -> None:
    names = sorted(missing)
    if names:
        raise ValueError(f"{len(names)} weights are missing, {names[0]} among them")


def keep_parts(pipeline: Any, parts: dict[str, nn.Module], names: Collection[str]) -> dict[str, nn.Module]:
    """The named parts; the others are removed from the pipeline."""
    pipeline.register_modules(**dict.fromkeys(parts.keys() - set(names)))
    return {name: part for name, part in parts.items() if name in names}


def copy_weights(source: Any, target: Any) -> None:
    """Copy weights between the modules of the same names of two pipelines; the target may lack some."""
    for name, part in source.components.items():
        mine = target.components.get(name)
        if isinstance(part, nn.Module) and mine is not None:
            mine.load_state_dict(part.state_dict())


@torch.no_grad()
def encode_pixels(vae: Any, pixels: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """pixels (B, 3, H, W) in [-1, 1] -> mean and deviation of the latents, each (B, C, H/f, W/f), scaled."""
    posterior = vae.encode(pixels.to(device, vae.dtype)).latent_dist
    shift, scale = vae.config.shift_factor or 0.0, vae.config.scaling_factor
    return (posterior.mean - shift) * scale, posterior.std * scale


def task_pipeline(stock: Any, task: Task) -> tuple[Any, frozenset[str]]:
    """The stock pipeline for a task with the modules of a loaded one, and the names of its call's arguments."""
    pipeline = stock
    if task != "text":
        kind = AutoPipelineForImage2Image if task == "image" else AutoPipelineForInpainting
        pipeline = kind.from_pipe(stock, add_watermarker=False)
        pipeline.set_progress_bar_config(disable=True)
    return pipeline, arguments_of(pipeline)


def arguments_of(pipeline: Any) -> frozenset[str]:
    """The names of the arguments of a pipeline's call."""
    return frozenset(inspect.signature(pipeline.__call__).parameters)


def published_config(branch: str) -> Configs:
    """The published configuration of a family: JSON file of a diffusers folder -> its content."""
    content: Configs = json.loads((CONFIGS / f"{branch}.json").read_text("utf-8"))
    return content


def single_file_config(file: Path, cache: Path, family: Configs) -> Path:
    """The diffusers configuration for a single file: the family's, overridden by the file's sidecar.

    Without it diffusers would ask the hub, and assume full-size shapes. `family`: JSON file -> its content.
    """
    folder = cache / "configs" / f"{file.stem}-{file.stat().st_mtime_ns:x}"
    source = sidecar(file)
    if folder.exists():
        shutil.rmtree(folder)  # the sidecar may have been edited; copying a few JSON files is cheap
    with whole_folder(folder) as partial:
        for name, config in family.items():
            path = partial / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(config))
        if source.is_dir():
            shutil.copytree(source, partial, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*SINGLE_FILE_JUNK))
    return folder
