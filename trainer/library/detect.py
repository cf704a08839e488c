"""Detects the family of a folder or file by its index or header; no weights are read.

The rules of a family are in its TOML (trainer/config/detection.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from trainer.config.detection import Detection, Keys, LoraRule, LoraRules, other_families
from trainer.contract.run_files import OBJECT
from trainer.files import Unreadable, read_json
from trainer.library.foreign import LOOKALIKES, OTHERS, foreign
from trainer.library.header import Header
from trainer.library.leftovers import refuse_unknown
from trainer.library.lora_keys import layers_of, why_not_read, widths
from trainer.library.prediction import check_scheduler, prediction_of
from trainer.library.weight_format import scales_of

EDITING_MODEL = "it is a model for inpainting or editing, which has a picture as input; such models cannot be trained"
SAYS_FAMILY = ("ss_base_model_version", "ss_v2", "modelspec.architecture")  # metadata of kohya's tools and of others
Shapes = Mapping[str, list[int]]  # of the tensors of a file, by their names
Families = Mapping[str, Detection]  # by their names, in the order in which they are tried


def branch_of_folder(folder: Path, families: Families) -> str:
    """The family of a diffusers folder. Raises ValueError for unknown families, and for models that cannot be used."""
    index = _json_object(folder / "model_index.json")
    pipeline = str(index.get("_class_name"))
    branch = next((name for name, one in families.items() if one.pipeline == pipeline), None)
    if branch is None:
        known = ", ".join(one.pipeline for one in reversed(list(families.values())))
        raise ValueError(f"its model_index.json names {pipeline!r}; known are {known}")
    for name, entry in index.items():
        library = entry[0] if isinstance(entry, list) and entry else None
        if library not in ("diffusers", "transformers", None):
            raise ValueError(f"its {name} asks for code of {library!r}; only diffusers and transformers are loaded")
    if code := next(folder.rglob("*.py"), None):
        raise ValueError(f"it brings code ({code.name}), which is never run; take it out")
    family = families[branch]
    denoiser = _json_object(folder / family.denoiser / "config.json")
    for refusal in family.refusals:
        if refusal.config and all(denoiser.get(name) == value for name, value in refusal.config.items()):
            raise ValueError(refusal.because)
    channels = denoiser.get("in_channels")
    if channels != (denoiser.get("out_channels") or channels):
        raise ValueError(EDITING_MODEL)
    _check_quantization(folder, index)
    if family.prediction and (scheduler := folder / "scheduler" / "scheduler_config.json").exists():
        check_scheduler(_json_object(scheduler))
    return branch


def _check_quantization(folder: Path, parts: Iterable[str]) -> None:
    """Raises ValueError if the configuration of a part says that its weights are quantized."""
    for part in parts:
        if (file := folder / part / "config.json").is_file() and (how := _json_object(file).get("quantization_config")):
            method = how.get("quant_method") if isinstance(how, dict) else None
            raise ValueError(
                f"its {part} is quantized ({method or 'its config.json does not say how'}), which is not read; use a"
                " folder with fp16, bf16 or fp8 weights"
            )


def _json_object(file: Path) -> dict[str, object]:
    """Raises FileNotFoundError, ValueError."""
    try:
        return read_json(file, OBJECT)
    except Unreadable as problem:
        raise ValueError(f"its {file.name} is not a JSON object: {problem}") from None


def branch_of_file(header: Header, families: Families, sidecar: Path | None = None) -> str:
    """The family of a single file in the layout of the original release. Raises ValueError as `branch_of_folder`.

    sidecar: the folder of the same name, which may configure a denoiser with other blocks than the original's.
    """
    shapes = header.shapes
    if what := foreign(LOOKALIKES, shapes):
        raise ValueError(what)
    for branch, family in families.items():
        if any(_matches(keys, shapes, shapes) for keys in family.files):
            configured = sidecar is not None and (sidecar / family.denoiser / "config.json").exists()
            _check_file(header, family, configured)
            return branch
    if what := foreign(OTHERS, shapes):
        raise ValueError(what)
    scales_of(header)  # its refusal names the format
    raise ValueError("its tensors are of no family that is known here")


def _check_file(header: Header, family: Detection, configured: bool) -> None:
    """Raises ValueError for a single file of a family that cannot be used."""
    shapes = header.shapes
    if family.channels is not None:
        first, last = family.channels
        out = [last] if isinstance(last, int) else _shape(shapes, last)[:1]
        if _shape(shapes, first)[1:2] != out:
            raise ValueError(EDITING_MODEL)
    for refusal in family.refusals:
        if refusal.keys and _matches(refusal.keys, shapes, shapes) and not (configured and refusal.unless_configured):
            raise ValueError(refusal.because)
    scales_of(header)
    if family.prediction:
        prediction_of(header)
    if family.known:
        inside, known = family.known
        refuse_unknown(key for key in shapes if inside.match(key) and not known.match(key))


def branch_of_lora(header: Shapes, families: Families, metadata: Mapping[str, str] | None = None) -> str | None:
    """The family of a LoRA; None: it is not a LoRA. Raises ValueError for an unknown family, and for unread formats.

    The sizes of its layers decide, then layers that only one family has. Where several families remain, the metadata
    decides, and without it the oldest of them.
    """
    layers = layers_of(header)
    if not layers:
        return None
    sizes = {layer: widths(parts) for layer, parts in layers.items()}
    facts = "\n".join(f"{name}={value}" for name, value in (metadata or {}).items() if name in SAYS_FAMILY).lower()
    known = {family.pipeline for family in families.values()}
    candidates = [(name, families[name].loras) for name in reversed(list(families))]
    candidates += [(one.title, one.loras) for one in other_families() if one.pipeline not in known]
    found = [(evidence(rules, sizes), name, rules) for name, rules in candidates]
    best = [(name, rules) for level, name, rules in found if level and level == max(level for level, *_ in found)]
    named = [name for name, rules in best if any(pattern.search(facts) for pattern in rules.metadata)]
    names = [*named, *(name for name, _ in best)]
    if not names:
        raise ValueError(foreign(OTHERS, header) or "it is a LoRA of no family that is known here")
    if names[0] not in families:
        raise ValueError(f"it is a LoRA for {names[0]}, which is not supported")
    if problem := why_not_read(layers):
        raise ValueError(problem)
    return str(names[0])


def evidence(rules: LoraRules, layers: Mapping[str, tuple[int | None, int | None]]) -> int:
    """How sure a family is of a LoRA: 3: the sizes are its own; 2: it alone has such layers; 1: maybe; 0: not its own.

    layers: their input and output widths.
    """
    if any(_first(pattern, layers) for pattern in rules.never):
        return 0
    return max((_level(rule) for rule in rules.rules if _holds(rule, layers)), default=0)


def _level(rule: LoraRule) -> int:
    return 3 if rule.sizes else 2 if rule.sure else 1


def _holds(rule: LoraRule, layers: Mapping[str, tuple[int | None, int | None]]) -> bool:
    """See `LoraRule`."""
    if not all(_first(pattern, layers) for pattern in rule.has) or any(_first(one, layers) for one in rule.lacks):
        return False
    matched = 0
    for pattern, wanted in rule.sizes.items():
        given = {size for layer, size in layers.items() if pattern.match(layer)}
        matched += bool(given)
        if given and not any(all(w in (None, g) for w, g in zip(wanted, size, strict=True)) for size in given):
            return False
    return matched > 0 or not rule.sizes


def _matches(keys: Keys, among: Iterable[str], header: Shapes) -> bool:
    """Whether conditions hold: their keys are in `among`, or not, and have the required sizes."""
    return (
        all(_first(pattern, among) for pattern in keys.has)
        and not any(_first(pattern, among) for pattern in keys.lacks)
        and all(
            any(header[key][-1:] == [size] for key in among if pattern.match(key))
            for pattern, size in keys.sizes.items()
        )
    )


def _first(pattern: re.Pattern[str], keys: Iterable[str]) -> str | None:
    """The first key that a pattern matches."""
    return next((key for key in keys if pattern.match(key)), None)


def _shape(header: Shapes, pattern: re.Pattern[str]) -> list[int]:
    """The shape of the first tensor whose key a pattern matches; empty if none matches."""
    key = _first(pattern, header)
    return [] if key is None else header[key]
