"""The operations on tunes: create, get, list, cancel, resume, change, delete; and the check of photos."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar, Unpack

from trainer.clock import stamp
from trainer.config import kinds, train_config
from trainer.config.train_config import TrainConfig
from trainer.contract.errors import Conflict, InvalidRequest, words
from trainer.contract.fields import Request, parse_request
from trainer.contract.photos import Check, Photo, ProgressCallback, Upload, no_progress
from trainer.contract.rows import TuneValues
from trainer.contract.states import ENDED, Callback
from trainer.contract.tunes import CheckRequest, Tune, TuneChange, TuneRequest
from trainer.files import UNCOMMITTED, fsync, move_folder
from trainer.library import bases
from trainer.library.bases import Bases
from trainer.names import MODEL_TYPES
from trainer.photos import inputs
from trainer.photos.intake import intake
from trainer.photos.sorting import no_photos, sort_uploads
from trainer.studio import callbacks, checksums
from trainer.studio.answers import tune_answer
from trainer.studio.deletions import finish_deletions, note_deletions
from trainer.studio.expiry import expiry, in_trash
from trainer.studio.folders import adding_tunes
from trainer.studio.idempotency import (
    IdempotencyKey,
    body_digest,
    equal_tune,
    find_by_idempotency_key,
    idempotency_columns,
    title_warnings,
)
from trainer.studio.identity import find_identity, made_files
from trainer.studio.models import base_answer
from trainer.studio.prompt_rules import check_prompt, keep_pictures, numbered, prompt_values
from trainer.studio.references import NamedTune, resolve
from trainer.studio.rows import STOP_SECONDS, Services, row_of, tune_folder, tune_row, tunes_by_id, tunes_of
from trainer.studio.settle import caption_warnings, settle
from trainer.studio.store import Query

R = TypeVar("R", bound=Request)


def create_tune(
    services: Services,
    data: Mapping[str, object],
    uploads: Sequence[Upload],
    progress: ProgressCallback = no_progress,
    key: IdempotencyKey | None = None,
    listed: Bases | None = None,
) -> tuple[Tune, bool]:
    """Queue a tune. Returns (tune, False) if an equal request, by its idempotency key or its title, created it before.

    data: the tune parameters without `images`. uploads: the files of `images`. listed: all bases, if the request has
    listed them already. Raises InvalidRequest with all errors; nothing is kept then.
    """
    request, count, problems = _parse(services, TuneRequest, data, uploads)
    listed = listed or bases.listed_once(services.settings)
    if known := find_by_idempotency_key(services, "tunes", key):
        return tune_answer(services, known), False
    digest = body_digest(request, uploads)
    if existing := equal_tune(services, request.title, digest):
        return tune_answer(services, existing), False
    if len(request.prompts_attributes) > services.settings.max_prompts:
        problems["prompts_attributes"] = [f"must contain at most {services.settings.max_prompts} prompts"]
    values: TuneValues | None = None  # if the request is invalid
    try:
        values = settle(services, request, max(1, count), listed)
    except InvalidRequest as invalid:
        problems |= invalid.problems
    branch = values and values["branch"]
    own = own_name(request, values)
    for number, prompt in enumerate(request.prompts_attributes):
        try:
            check_prompt(services, prompt)
            resolve(services.store, listed, prompt.parsed, branch, own)
        except InvalidRequest as invalid:
            problems.setdefault("prompts_attributes", []).extend(numbered(invalid, number))
    fetches = request.image_urls or any(prompt.has_input for prompt in request.prompts_attributes)
    if problems and (fetches or "images" in problems):
        raise InvalidRequest(problems)  # nothing is downloaded for an invalid request
    try:
        with (
            intake(services.settings, services.decoder, uploads, request.image_urls, progress) as taken,
            inputs.fetch_inputs(
                services.settings, services.decoder, request.prompts_attributes, "prompts_attributes", progress
            ) as pictures,
        ):
            if problems or values is None:
                raise InvalidRequest({})
            work, photos, messages = taken.folder, taken.photos, [*taken.warnings]
            messages += caption_warnings(services, values, taken)
            different = sum(not photo.dropped for photo in photos)
            if not MODEL_TYPES[values["method"]].trains:
                photos, more = find_identity(services, values["branch"], request.name, work, photos, progress)
                messages = [*messages, *more]
            elif different != count:  # a duplicate photo is trained once, and a zip has many
                values = settle(services, request, different, listed)
            values["warnings"] = [*values["warnings"], *messages]
            return _insert(services, request, values, work, photos, pictures, key, digest, listed)
    except InvalidRequest as invalid:
        raise InvalidRequest(problems | invalid.problems) from None


def own_name(request: TuneRequest, values: TuneValues | None) -> NamedTune:
    """The names by which the prompts of a request may refer to its tune, which has no id yet."""
    if values is None:
        return {"id": 0, "title": request.title, "token": request.token or "ohwx", "method": ""}
    return {"id": 0, "title": values["title"], "token": values["token"], "method": values["method"]}


def check_photos(
    services: Services, data: Mapping[str, object], uploads: Sequence[Upload], progress: ProgressCallback = no_progress
) -> Check:
    """The verdicts on photos, as for a tune with these parameters; nothing is kept.

    data: tune parameters without `images`. All are optional, but without `name` face detection is skipped. Raises
    InvalidRequest with all errors, AnalysisUnavailable.
    """
    request, count, problems = _parse(services, CheckRequest, data, uploads)
    listed = bases.listed_once(services.settings)
    if problems:
        raise InvalidRequest(problems)
    if request.name and kinds.kind_of(request.name) == "person":
        services.analyzer.warm()  # while the photos are fetched and decoded
    values = settle(services, request.as_tune(), count, listed)
    config = TrainConfig(**train_config.parse_args(values["args"]))
    with intake(services.settings, services.decoder, uploads, request.image_urls, progress) as taken:
        work, photos, warnings = taken.folder, taken.photos, [*values["warnings"], *taken.warnings]
        warnings += caption_warnings(services, values, taken)
        if request.name:
            restore = bool(request.training_face_correct)
            photos, messages = services.analyzer.prepare(
                work, photos, config, request.name, restore, progress, fetch=False
            )
            warnings = [*warnings, *messages]
        else:
            warnings = [*warnings, "without a class name (`name`), face detection was skipped"]
        left = sum(not photo.dropped for photo in photos)
        if left != count:  # the warnings depend on the number of photos
            of_left = settle(services, request.as_tune(), max(1, left), listed)["warnings"]
            warnings = [*of_left, *warnings[len(values["warnings"]) :]]
        for number, photo in enumerate(photos):
            progress("pictures are drawn", number, len(photos))
            services.analyzer.show(work, photo, config)
        progress("pictures are drawn", len(photos), len(photos))
        return Check(photos=photos, warnings=warnings)


def _parse(
    services: Services, model: type[R], data: Mapping[str, object], uploads: Sequence[Upload]
) -> tuple[R, int, dict[str, list[str]]]:
    """The request, its number of photos, and the errors about that number; a zip or URL counts as one.

    Raises InvalidRequest.
    """
    problems: dict[str, list[str]] = {}
    urls, found = data.get("image_urls"), sort_uploads(uploads)
    count = found.count + (len(urls) if isinstance(urls, list) else 0)
    if count == 0:
        problems["images"] = [no_photos(found.left_out)]
    if count > services.settings.max_images:
        problems["images"] = [f"must contain at most {services.settings.max_images} images, got {count}"]
    try:
        return parse_request(model, data), count, problems
    except InvalidRequest as invalid:
        raise InvalidRequest(problems | invalid.problems) from None


def get_tune(services: Services, tune_id: int) -> Tune:
    """A tune, or a base as a tune. Raises NotFound."""
    row = tune_row(services, tune_id)
    if row is None and (base := bases.by_id(bases.listed_once(services.settings), tune_id)):
        return base_answer(services, base)
    return tune_answer(services, row or row_of(services, "tunes", tune_id))


def list_tunes(services: Services, **query: Unpack[Query]) -> list[Tune]:
    """Newest first; 20 if the query has no `limit`."""
    query.setdefault("limit", 20)
    return [tune_answer(services, row) for row in services.store.find("tunes", **query)]


def cancel_tune(services: Services, tune_id: int) -> Tune:
    """Stop a tune: at once if it is queued, within one step if it trains. Raises NotFound, Conflict."""
    with services.store.transaction():
        row = row_of(services, "tunes", tune_id)
        if row["status"] in ENDED:
            raise Conflict(f"tune {tune_id} is {row['status']} already")
        if not services.store.take_off_queue(tune_id):
            services.store.update("tunes", tune_id, cancel=1)
        return get_tune(services, tune_id)


def resume_tune(services: Services, tune_id: int) -> Tune:
    """Queue a canceled or failed tune again; it resumes from its last state. Raises NotFound, Conflict."""
    with services.store.transaction():
        row = row_of(services, "tunes", tune_id)
        if row["status"] not in ("canceled", "failed"):
            raise Conflict(f"tune {tune_id} is {row['status']}; only a canceled or failed one can be resumed")
        services.store.requeue_tune(tune_id)
    services.store.changed.set()
    return get_tune(services, tune_id)


def change_tune(services: Services, tune_id: int, data: Mapping[str, object]) -> Tune:
    """Change a tune's title, class name, auto_extend or characteristics. Raises NotFound, InvalidRequest."""
    with services.store.transaction():
        row = row_of(services, "tunes", tune_id)
        request = parse_request(TuneChange, data)
        changes = {name: value for name in request.model_fields_set if (value := getattr(request, name)) is not None}
        problems: dict[str, list[str]] = {}
        if not changes:
            problems["tune"] = [f"must have at least one of {words(TuneChange.model_fields)}"]
        name = request.name or row["name"]
        if name != row["name"] and row["status"] != "queued":
            message = f"tune {tune_id} is {row['status']}, and its class name is part of what was trained"
            problems["name"] = [message]
        elif kinds.kind_of(name) != kinds.kind_of(row["name"]):
            problems["name"] = [f"{name} is trained with other settings than {row['name']}; make a new tune"]
        if problems:
            raise InvalidRequest(problems)
        services.store.update("tunes", tune_id, **changes)
        return get_tune(services, tune_id)


def delete_tune(services: Services, tune_id: int) -> None:
    """Delete a tune with its prompts and files; a running one is stopped first.

    Raises NotFound; Conflict if it is the base of other tunes or does not stop.
    """
    outputs = services.settings.outputs
    deadline = time.monotonic() + STOP_SECONDS
    while True:
        with services.store.transaction():
            row_of(services, "tunes", tune_id)
            if others := services.store.dependents(tune_id):
                named = ", ".join(f"{other['id']} ({other['title']})" for other in others)
                raise Conflict(f"tune {tune_id} is the base of tunes {named}; delete those first")
            services.store.take_off_queue(tune_id)
            if not _busy(services, tune_id):
                services.store.delete("tunes", tune_id)
                note_deletions(
                    outputs, services.store, tune_folder(services, tune_id), *in_trash(services.settings, tune_id)
                )
                break
        if time.monotonic() > deadline:
            raise Conflict(f"tune {tune_id} does not stop; try again later")
        time.sleep(0.1)
    finish_deletions(outputs, services.store)


def _busy(services: Services, tune_id: int) -> bool:
    """Whether the worker runs the tune or a prompt that uses it; this asks the tune and its own prompts to stop."""
    busy = False
    if row_of(services, "tunes", tune_id)["status"] == "training":
        services.store.update("tunes", tune_id, cancel=1)
        busy = True
    for prompt in services.store.find("prompts", status="rendering"):
        if prompt["tune_id"] == tune_id:
            services.store.update("prompts", prompt["id"], cancel=1)
            busy = True
        busy = busy or tune_id in tunes_of(prompt)  # prompts of another tune or of a base are not stopped
    return busy or bool(services.store.find("exports", tune_id=tune_id, status="exporting"))


def list_callbacks(services: Services, tune_id: int) -> list[Callback]:
    """The callbacks of a tune and its prompts, newest first; none if there is no such tune."""
    return [Callback.model_validate(row) for row in services.store.callbacks(tune_id)]


def send_callbacks_again(services: Services, tune_id: int) -> list[Callback]:
    """Send all callbacks of a tune and its prompts again. Raises NotFound, Conflict."""
    with services.store.transaction():
        row_of(services, "tunes", tune_id)
        if not callbacks.send_again(services.store, tune_id):
            raise Conflict(f"tune {tune_id} has no callback to send: none was requested, or nothing has ended yet")
        return list_callbacks(services, tune_id)


def _insert(
    services: Services,
    request: TuneRequest,
    values: TuneValues,
    work: Path,
    photos: list[Photo],
    pictures: Mapping[int, Path],
    key: IdempotencyKey | None,
    digest: str,
    listed: Bases,
) -> tuple[Tune, bool]:
    if request.base_tune_id is not None or any(prompt.parsed.models for prompt in request.prompts_attributes):
        listed()  # scan the models folder before the transaction, in which other writers wait
    with adding_tunes(services.store, services.settings.outputs) as folders:
        if known := find_by_idempotency_key(services, "tunes", key):  # another request was faster
            return tune_answer(services, known), False
        if existing := equal_tune(services, request.title, digest):
            return tune_answer(services, existing), False
        base = bases.resolve(services.settings, request.base_tune_id, request.branch, tunes_by_id(services), listed)
        if base.id != values["base_id"]:  # it was deleted during the upload
            raise InvalidRequest({"base_tune_id": [f"{request.base_tune_id} is no base any more"]})
        row = {**values, **idempotency_columns(key), "body_digest": digest}
        row |= {"photos": [photo.model_dump() for photo in photos]}
        if not MODEL_TYPES[values["method"]].trains:
            ready = datetime.now(UTC)
            tune_id = services.store.add_ready_tune(
                row,
                files=made_files(work, MODEL_TYPES[values["method"]]),
                started_training_at=stamp(ready),
                trained_at=stamp(ready),
                expires_at=expiry(services.settings, ready),
                progress={"stage": "trained"},
            )
            checksums.note(services.store, tune_id, checksums.of_folder(work, "model"))
        else:
            tune_id = services.store.add_tune(row)
        if messages := title_warnings(services, request.title, tune_id):
            services.store.update("tunes", tune_id, warnings=[*values["warnings"], *messages])
        own = row_of(services, "tunes", tune_id)
        for number, prompt in enumerate(request.prompts_attributes):
            named = resolve(services.store, listed, prompt.parsed, own["branch"], own)
            prompt_id = services.store.add_prompt({"tune_id": tune_id, **prompt_values(prompt, named)})
            if number in pictures:
                keep_pictures(services, prompt_id, pictures[number], work / "inputs" / str(prompt_id))
        (work / "request.json").write_text(request.model_dump_json(exclude={"images"}, indent=1))
        target = tune_folder(services, tune_id)
        target.parent.mkdir(exist_ok=True)
        (work / UNCOMMITTED).touch()
        for path in work.rglob("*"):
            fsync(path)
        move_folder(work, target)
        folders.append(target)
        fsync(target.parent)
    (target / UNCOMMITTED).unlink(missing_ok=True)
    services.store.changed.set()
    return get_tune(services, tune_id), True
