"""What the files in a tune's folder, or a prompt's, say about it: the values of its row.

Their content may come from another program. What cannot be read raises one of UNREADABLE.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from trainer.clock import now, stamp
from trainer.config.train_config import TrainConfig, as_args, parse_args
from trainer.contract import parsed_text
from trainer.contract.errors import InvalidRequest
from trainer.contract.fields import parse_request
from trainer.contract.flags import Flags
from trainer.contract.parsed_text import ParsedText
from trainer.contract.photos import Photo
from trainer.contract.prompts import COLUMNS, PICTURES, PromptRequest, attributes_of
from trainer.contract.rows import TuneValues
from trainer.contract.run_files import OBJECT, VERDICTS, read_log
from trainer.contract.tunes import TuneRequest
from trainer.files import read_for_show, read_json
from trainer.library import bases
from trainer.library.bases import Bases
from trainer.library.header import read_header
from trainer.names import FORMATS, METHODS, MODEL_TYPES
from trainer.photos import inputs
from trainer.photos.kept import kept_photos
from trainer.rendering.pictures import read_facts
from trainer.studio.expiry import expiry
from trainer.studio.folders import entries
from trainer.studio.prompt_rules import API_NUM_IMAGES
from trainer.studio.prompts import still_good
from trainer.studio.rows import Services, tunes_by_id
from trainer.studio.settle import settle, token_for, tune_values

UNREADABLE = (
    InvalidRequest, OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError,
    SyntaxError,
)  # fmt: skip
FIELD = re.compile(r"\{\{[^{}]*\}\}")  # a characteristic in a prompt's text
PICTURE = re.compile(r"([0-9]+)\.(png|jpg)")


@dataclass(frozen=True)
class TuneFiles:
    """A tune's row, and the prompts of its request."""

    values: dict[str, object]
    prompts: list[PromptRequest]

    @property
    def trained(self) -> bool:
        return self.values["status"] == "trained"


@dataclass(frozen=True)
class PromptFiles:
    """A prompt's row but for where it belongs, its request, and the titles of the LoRAs in its pictures."""

    values: dict[str, object]
    files: list[str]
    request: PromptRequest
    loras: list[str]


# Tunes


def read_tune(services: Services, folder: Path, listed: Bases) -> TuneFiles:
    """The row of the tune in a folder: trained where it has a model, else canceled. Raises one of UNREADABLE."""
    files, facts = read_model(folder / "model")
    photos = read_photos(folder)
    if not files and not photos:
        raise ValueError("it has neither a model nor photos")
    request = read_request(services, folder / "request.json", files, facts, listed)
    words = training_words(folder / "config.json", facts)
    count = sum(not photo.dropped for photo in photos)
    values: dict[str, object] = {**settled(services, request, count, files, facts, words, listed)}
    log = read_lines(folder / "log.jsonl")
    steps = parse_args(str(values["args"])).get("steps", "0") if values["args"] else "0"
    done = [step for line in log if isinstance(step := line.get("step"), int)]
    step = int(steps) if files else max(done, default=0)
    losses = [loss for line in log if isinstance(loss := line.get("loss"), int | float)]
    progress: dict[str, object] = {
        "stage": "trained" if files else "stopped",
        "step": step,
        "steps": int(steps),
        "loss": None,
    }
    progress |= {"loss": losses[-1]} if losses else {}
    begun = next((str(line["at"]) for line in log if "at" in line), None)
    trained = written(folder / "model" / files[0]) if files else None
    made = folder / "request.json"
    values |= {
        "photos": [photo.model_dump() for photo in photos],
        "files": files,
        "status": "trained" if files else "canceled",
        "progress": progress,
        "created_at": written(made if made.exists() else folder),
        "updated_at": now(),
        "started_training_at": begun or trained,
        "trained_at": trained,
        "eta": trained if words else None,
        "expires_at": expiry(services.settings, datetime.now(UTC)) if files else None,
    }
    return TuneFiles(values, request.prompts_attributes)


def read_model(model: Path) -> tuple[list[str], dict[str, str]]:
    """The files of a trained model, the most widely read one first, and what they say about their training."""
    files = [name for name in FORMATS.values() if (model / name).is_file()]
    if entries(model) and not files:
        raise ValueError(f"its model/ has none of the files {', '.join(FORMATS.values())}")
    facts: dict[str, str] = {}
    for name in reversed(files):
        try:
            facts |= read_header(model / name).metadata
        except ValueError as problem:
            raise ValueError(f"model/{name}: {problem}") from None
    return files, facts


def read_photos(folder: Path) -> list[Photo]:
    """The verdicts of the tune's preparation; before it, the photos as they are."""
    prepared = folder / "dataset" / "prepared.json"
    if prepared.exists():
        return [Photo.model_validate(photo.model_dump()) for photo in read_json(prepared, VERDICTS)]
    return kept_photos(folder / "images")


def read_request(
    services: Services, file: Path, files: list[str], facts: Mapping[str, str], listed: Bases
) -> TuneRequest:
    """The request of a tune, from its file, else from the metadata of its model. Raises one of UNREADABLE."""
    if file.exists():
        try:
            return parse_request(TuneRequest, read_object(file))
        except (OSError, ValueError, RecursionError, InvalidRequest) as problem:
            if "tunebooth.class" not in facts:
                raise ValueError(f"its request.json cannot be used: {problem}") from None
    if "tunebooth.class" not in facts:
        raise ValueError("it has no request.json, and its model does not say what it was trained on")
    title = facts["tunebooth.base"]
    named = [base.id for base in listed() if base.title == title]
    named += [row["id"] for row in services.store.find("tunes", title=title, status="trained")]
    if len(named) != 1:
        raise ValueError(f"it has no request.json, and {len(named)} bases are called {title!r}, as its base was")
    data = {"name": facts["tunebooth.class"], "title": facts["modelspec.title"], "base_tune_id": named[0]}
    learned = FORMATS["embeddings"] in files
    model_type = next(name for name in fitting(files) if MODEL_TYPES[name].learns_tokens == learned)
    return parse_request(TuneRequest, {**data, "model_type": model_type})


def training_words(config: Path, facts: Mapping[str, str]) -> dict[str, object]:
    """The hyper-parameters of a run that was begun; empty: it was not."""
    words: dict[str, object] = {**parse_known(facts.get("tunebooth.args", ""))}
    if config.exists():
        words |= {key: value for key, value in read_object(config).items() if key in TrainConfig.model_fields}
    return words


def parse_known(args: str) -> dict[str, str]:
    """The words of `args` that are known to this version."""
    pairs = (word.partition("=") for word in args.split())
    return {key: value for key, _, value in pairs if key in TrainConfig.model_fields}


def settled(
    services: Services,
    request: TuneRequest,
    count: int,
    files: list[str],
    facts: Mapping[str, str],
    words: dict[str, object],
    listed: Bases,
) -> TuneValues:
    """The columns that the request decides; what a run has already begun with wins over today's presets."""
    try:
        values = settle(services, request, max(1, count), listed)
    except InvalidRequest:
        if not words:  # nothing but the request says how it is to be trained
            raise
        base = bases.resolve(services.settings, request.base_tune_id, request.branch, tunes_by_id(services), listed)
        values = tune_values(request, base, token_for(services, base), request.model_type or "", None, [])
    if files and values["method"] not in fitting(files):
        values["method"] = fitting(files)[0]
    if MODEL_TYPES[values["method"]].trains:
        values["args"] = as_args(TrainConfig.model_validate({**parse_args(values["args"]), **words}))
        values["token"] = facts.get("tunebooth.token") or values["token"]
    return values


def fitting(files: list[str]) -> list[str]:
    """The model types whose tunes have such files."""
    formats = {name for name, file in FORMATS.items() if file in files}
    found = [name for name in METHODS if formats <= set(MODEL_TYPES[name].formats)]
    if not found:
        raise ValueError(f"its model/ mixes the files of several model types: {', '.join(files)}")
    return found


# Prompts


def read_prompt(folder: Path, of_inputs: Path, asked: list[PromptRequest]) -> PromptFiles:
    """The prompt whose pictures are in a folder. Raises one of UNREADABLE.

    of_inputs: the folder of the pictures that it started from. asked: prompts that it may be; the one that it is is
    taken off the list, for it says more than the pictures do.
    """
    names = [path.name for path in entries(folder) if PICTURE.fullmatch(path.name)]
    files = sorted(names, key=lambda name: int(name.partition(".")[0]))
    if not files:
        raise ValueError("it has no pictures")
    facts = read_facts(folder / files[0])
    request = next((one for one in asked if is_of(one, facts, len(files))), None)
    warnings = []
    if request:
        asked.remove(request)
    else:
        request = request_of(facts, int(files[0].partition(".")[0]))
        warnings.append("restored from its pictures: references to models and flags are not in its text any more")
    values = prompt_values(request, of_inputs)
    moment = written(folder / files[0])
    ended = {"files": files, "num_images": len(files), "status": "rendered", "warnings": warnings}
    values |= ended | {"progress": {"stage": "rendered"}, "created_at": moment, "trained_at": moment}
    loras = facts.get("loras")
    return PromptFiles(values, files, request, [str(one[0]) for one in loras] if isinstance(loras, list) else [])


def waiting_prompt(request: PromptRequest) -> dict[str, object]:
    """The row of a prompt that was not rendered; it is queued again together with its tune."""
    values = prompt_values(request, Path("none"))
    return values | {"status": "canceled", "error": "the tune was not trained", "warnings": [], "created_at": now()}


def prompt_values(request: PromptRequest, of_inputs: Path) -> dict[str, object]:
    found = {name: inputs.find(of_inputs, name) for name in PICTURES}
    return {
        **{name: getattr(request, name) for name in COLUMNS},
        "num_images": request.num_images or API_NUM_IMAGES,
        "attributes": attributes_of(request) | {name: path.name for name, path in found.items() if path},
        "parsed": parsed_text.as_row(parsed_or_plain(request)),
        "named": None,
        "updated_at": now(),
    }


def parsed_or_plain(request: PromptRequest) -> ParsedText:
    """Its text, parsed; all of it as words if it has a tag that older versions drew and that is refused now."""
    try:
        return request.parsed
    except InvalidRequest:
        return ParsedText(request.text, (), Flags())


def is_of(request: PromptRequest, facts: Mapping[str, object], count: int) -> bool:
    """Whether so many pictures may have been rendered from a request: characteristics and a style are in their text."""
    if (request.num_images or API_NUM_IMAGES) != count or request.seed not in (None, facts.get("seed")):
        return False
    at, text = 0, str(facts["prompt"])
    for part in FIELD.split(parsed_or_plain(request).text):
        at = text.find(part, at)
        if at < 0:
            return False
        at += len(part)
    return True


def request_of(facts: Mapping[str, object], number: int) -> PromptRequest:
    """What can be asked for again of a picture's facts. number: of the picture, for each has its own seed."""
    more = facts.get("more")
    asked = dict(more) if isinstance(more, dict) else {}
    if not asked.get("super_resolution"):
        asked |= {"w": facts.get("width"), "h": facts.get("height")}
    asked |= {name: facts.get(name) for name in ("negative_prompt", "steps", "cfg_scale")}
    asked["seed"] = seed - number if isinstance(seed := facts.get("seed"), int) else None
    return parse_request(PromptRequest, {"text": facts["prompt"], **still_good(asked)})


# Files


def read_object(file: Path) -> dict[str, object]:
    """A JSON object. Raises OSError, ValueError."""
    return read_json(file, OBJECT)


def read_lines(file: Path) -> list[dict[str, object]]:
    return list(read_for_show(file, read_log) or ())


def written(file: Path) -> str:
    """When a file was written, as the API writes times."""
    return stamp(datetime.fromtimestamp(file.stat().st_mtime, UTC))
