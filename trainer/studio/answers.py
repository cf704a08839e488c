"""Makes answers from rows: tunes, prompts, photos, and the data of a run for the page."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trainer.contract.photos import Photo
from trainer.contract.prompts import COLUMNS, PICTURES, Echo, Prompt, PromptRequest
from trainer.contract.rows import PromptRow, TuneRow
from trainer.contract.run_files import SEEN, read_log
from trainer.contract.states import ENDED, Progress
from trainer.contract.tunes import Tune
from trainer.files import is_there, read_for_show, read_json, steps_in
from trainer.names import FORMATS
from trainer.photos.intake import SAME_PICTURE
from trainer.studio.links import MODEL_LINK_SECONDS, link_path, make_link
from trainer.studio.rows import Services, broken_warnings, place_of, prompt_home, tune_folder

SNAPSHOT_FILES = FORMATS["bundled"], FORMATS["kohya"]  # the first is made if there are learned tokens
CONTACT_SHEET = "sheet.jpg"
ATTRIBUTES = tuple(name for name in Prompt.model_fields if name in PromptRequest.model_fields and name not in (
    *COLUMNS, *PICTURES, *Echo.model_fields))  # fmt: skip
FLAGS = ("use_lpw", "film_grain", "hires_fix", "inpaint_faces", "face_correct", "face_swap")  # false by default


def readings(services: Services, tune_id: int) -> list[dict[str, Any]]:
    """The log of a run. Each line has `step`, `loss` (mean of the last steps), `lr`, `peak_gib` and `seconds`."""
    lines = read_for_show(tune_folder(services, tune_id) / "log.jsonl", read_log) or []
    return [line for line in lines if "loss" in line]


def trained_pictures(services: Services, tune_id: int) -> list[dict[str, Any]]:
    """The pictures as they are trained. Each has `url`, `name`, `kind`, `caption`, `width`, `height` and `mask`."""
    file = tune_folder(services, tune_id) / "dataset" / "seen" / "seen.json"
    listed = read_for_show(file, partial(read_json, content=SEEN)) or []  # not written yet, or being replaced
    return [
        one.model_dump() | {"url": make_link(services.settings, f"{tune_id}/dataset/seen/{one.file}")} for one in listed
    ]


def saved_snapshots(services: Services, tune_id: int) -> list[dict[str, Any]]:
    """The previews of a run: `step`, `url`, and `model`, the link to the model at that step if it was saved."""
    folder, found = tune_folder(services, tune_id), []
    for picture in steps_in(folder / "samples", ".png"):
        model = snapshot_of(folder / "checkpoints" / picture.stem)
        found.append(
            {
                "step": int(picture.stem.removeprefix("step-")),
                "url": make_link(services.settings, f"{tune_id}/samples/{picture.name}"),
                "model": snapshot_link(services, model) if model else None,
            }
        )
    return found


def snapshot_link(services: Services, model: Path) -> str:
    return make_link(
        services.settings, model.relative_to(services.settings.outputs / "tunes").as_posix(), MODEL_LINK_SECONDS
    )


def tune_answer(services: Services, row: TuneRow) -> Tune:
    tune_id = row["id"]
    models = [make_link(services.settings, f"{tune_id}/model/{f}", MODEL_LINK_SECONDS) for f in row["files"]]
    if models:
        kept = map(snapshot_of, reversed(steps_in(tune_folder(services, tune_id) / "checkpoints")))
        models += [snapshot_link(services, model) for model in kept if model]
    photos = photo_answers(services, row)
    prompts = [prompt_answer(services, p) for p in reversed(services.store.prompts_under(tune_id))]
    computed = {
        "ckpt_url": models[0] if models else None,
        "ckpt_urls": models,
        "url": f"{services.settings.base_url}/tunes/{tune_id}.json",
        "orig_images": [photo.url for photo in photos if photo.url],
        "photos": photos,
        "progress": progress_answer(services, row),
        "prompts": prompts,
        "warnings": row["warnings"] + broken_warnings(row),
    }
    return Tune.model_validate({**row, **computed})


def progress_answer(services: Services, row: TuneRow | PromptRow) -> Progress:
    """The progress of a tune or prompt; while the queue is on hold, its stage is the reason."""
    progress = Progress.model_validate(row["progress"])
    if services.store.hold and row["status"] not in ENDED:
        progress.stage = services.store.hold
    return progress


def photo_answers(services: Services, row: TuneRow) -> list[Photo]:
    """The verdicts, with links to the photos as uploaded and as trained."""
    tune_id, photos = row["id"], [Photo.model_validate(photo) for photo in row["photos"]]
    seen = {
        (Path(one["file"]).stem.rpartition("-")[0]): one["url"] for one in reversed(trained_pictures(services, tune_id))
    }
    for photo in photos:
        stem = Path(photo.file).stem
        expired = row["status"] == "expired"
        if not expired and (photo.dropped is None or not photo.dropped.startswith(SAME_PICTURE)):
            photo.url = make_link(services.settings, f"{tune_id}/images/{photo.file}")
        photo.seen, photo.closeup = seen.get(stem), seen.get(f"{stem}-face")
    return photos


def prompt_answer(services: Services, row: PromptRow) -> Prompt:
    try:
        return _prompt_answer(services, row)
    except ValidationError:  # the database is damaged: no request has such attributes
        broken = [*row.get("broken", []), "attributes"]
        return _prompt_answer(services, {**row, "attributes": {}, "kept": {}, "broken": broken})


def _prompt_answer(services: Services, row: PromptRow) -> Prompt:
    prompt_id, place, home = row["id"], place_of(row), services.settings.outputs / prompt_home(row)
    wanted = row["attributes"]
    folder = home / "prompts" / str(prompt_id)
    attributes = {name: wanted.get(name) or (False if name in FLAGS else None) for name in ATTRIBUTES}
    thumbs = [f"{Path(file).stem}.thumb.jpg" for file in row["files"]]
    small = bool(thumbs) and is_there(folder / thumbs[0])  # not in older ones

    def link(file: Path) -> str:
        return make_link(services.settings, link_path(services.settings, file))

    preview = home / "previews" / f"{prompt_id}.jpg"
    preview_link = None
    if row["status"] == "rendering" and is_there(preview):  # the step: against the browser's cache
        preview_link = f"{link(preview)}&step={row['progress'].get('step')}"
    inputs = {
        name: link(home / "inputs" / str(prompt_id) / str(wanted[name])) if name in wanted else None
        for name in PICTURES
    }
    computed = {
        "tune_id": place,
        "url": f"{services.settings.base_url}/tunes/{place}/prompts/{prompt_id}.json",
        "images": [link(folder / file) for file in row["files"]],
        "thumbnails": [link(folder / file) for file in (thumbs if small else row["files"])],
        "contact_sheet": link(folder / CONTACT_SHEET) if small and len(thumbs) > 1 else None,
        "preview": preview_link,
        "progress": progress_answer(services, row),
        "user_error": row["error"],
        "warnings": row["warnings"] + broken_warnings(row),
        "tunes": list(dict.fromkeys([*filter(None, [row["tune_id"]]), *(one[1] for one in row["named"] or [])])),
        "liked": row["liked_at"] is not None,
    }
    echo = Echo.model_validate(row["kept"] | wanted).model_dump()
    return Prompt.model_validate({**row, **echo, **attributes, **inputs, **computed})


def snapshot_of(folder: Path) -> Path | None:
    """The file for download in the folder of a model saved during a run; None: it is missing."""
    return next((folder / name for name in SNAPSHOT_FILES if is_there(folder / name)), None)


def here(row: TuneRow) -> dict[str, str]:
    """The formats of a tune's own files, and their paths in its folder."""
    return {name: f"model/{file}" for name, file in FORMATS.items() if file in row["files"]}
