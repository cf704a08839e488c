"""The operations on prompts: create, duplicate, get, list, delete."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from trainer.contract.disk import as_problems
from trainer.contract.errors import Conflict, InvalidRequest, NotFound
from trainer.contract.fields import parse_request
from trainer.contract.photos import ProgressCallback, Upload, no_progress
from trainer.contract.prompts import PICTURES, Prompt, PromptRequest, prompt_of
from trainer.contract.rows import PromptRow, TuneRow
from trainer.files import UNCOMMITTED, discarded_on_error
from trainer.library import bases
from trainer.library.bases import Base, Bases
from trainer.names import LORA_REFERENCE
from trainer.photos import inputs
from trainer.studio import pack_file
from trainer.studio.answers import prompt_answer
from trainer.studio.deletions import finish_deletions, note_deletions
from trainer.studio.idempotency import (
    IdempotencyKey,
    body_digest,
    equal_prompt,
    find_by_idempotency_key,
    idempotency_columns,
)
from trainer.studio.prompt_rules import check_prompt, keep_pictures, pictures_of, prompt_values
from trainer.studio.references import UNUSABLE, Named, resolve
from trainer.studio.rows import STOP_SECONDS, Services, place_of, prompt_home, row_of, tune_row


def create_prompt(
    services: Services,
    place_id: int,
    data: Mapping[str, object],
    progress: ProgressCallback = no_progress,
    key: IdempotencyKey | None = None,
    listed: Bases | None = None,
    *,
    always_new: bool = False,
) -> Prompt:
    """Queue a prompt on a tune that has a model or is being trained, or on a base. Raises NotFound, InvalidRequest.

    place_id: of the tune or base. listed: all bases, if the request has listed them already. always_new: create a
    prompt even if an equal one exists and the setting `idempotency` is `all`.
    """
    listed = listed or bases.listed_once(services.settings)
    place = tune_or_base(services, place_id, listed)
    tune, branch = (None, place.branch) if isinstance(place, Base) else (place, place["branch"])
    request = parse_request(PromptRequest, data)
    digest = None if always_new else body_digest(request)
    check_prompt(services, request)
    named = resolve(services.store, listed, request.parsed, branch, tune)
    if known := find_by_idempotency_key(services, "prompts", key) or equal_prompt(services, place_id, digest):
        return prompt_answer(services, known)
    with (
        as_problems(services.settings.outputs),
        inputs.fetch_inputs(services.settings, services.decoder, [request], None, progress) as pictures,
        discarded_on_error() as moved,
        services.store.transaction(),
    ):
        if known := find_by_idempotency_key(services, "prompts", key) or equal_prompt(services, place_id, digest):
            return prompt_answer(services, known)  # another request was faster
        where: dict[str, object] = {"tune_id": place_id}
        if tune is not None:
            if (status := row_of(services, "tunes", place_id)["status"]) in UNUSABLE:
                raise InvalidRequest({"tune_id": [f"tune {place_id} is {status}; it has no model"]})
        else:
            where = {"base_id": place_id, "lora_id": first_tune(services, named)}
        values = where | prompt_values(request, named) | {"body_digest": digest}
        prompt_id = services.store.add_prompt(values | idempotency_columns(key))
        if 0 in pictures:
            (pictures[0] / UNCOMMITTED).touch()
            moved.append(keep_pictures(services, prompt_id, pictures[0]))
    services.store.changed.set()
    if pictures:
        (pictures_of(services, row_of(services, "prompts", prompt_id)) / UNCOMMITTED).unlink(missing_ok=True)
    return get_prompt(services, prompt_id)


def tune_or_base(services: Services, place_id: int, listed: Bases) -> TuneRow | Base:
    """The tune or base with this id. Raises NotFound; InvalidRequest for a base that cannot be used."""
    if tune := tune_row(services, place_id):
        return tune
    base = bases.by_id(listed, place_id)
    if base is None:
        raise NotFound(f"there is no tune {place_id}")
    if base.error:
        raise InvalidRequest({"tune_id": [f"{base.title}: {base.error}"]})
    return base


def first_tune(services: Services, named: Sequence[Named]) -> int | None:
    """The tune of the first LoRA that a prompt on a base names, else of its face."""
    in_order = sorted(named, key=lambda one: one.kind != LORA_REFERENCE)
    return next((one.id for one in in_order if tune_row(services, one.id)), None)


def duplicate_prompt(
    services: Services, prompt_id: int, data: Mapping[str, object], key: IdempotencyKey | None = None
) -> Prompt:
    """Queue a prompt again, with the values in `data` changed. Raises NotFound, InvalidRequest."""
    row = row_of(services, "prompts", prompt_id)
    same = prompt_of(row).model_dump(exclude_none=True) | own_pictures(services, row)
    for name in PICTURES:  # a new picture replaces the old one
        if name in data or f"{name}_url" in data:
            same = {field: value for field, value in same.items() if field not in (name, f"{name}_url")}
    same = {**still_good(row["kept"]), **same}
    return create_prompt(services, place_of(row), pack_file.over(same, data), key=key, always_new=True)


def own_pictures(services: Services, row: PromptRow) -> dict[str, object]:
    """The input pictures of a prompt, as uploads that replace their addresses."""
    folder = pictures_of(services, row)
    found = {name: inputs.find(folder, name) for name in PICTURES}
    kept: dict[str, object] = {name: Upload(path.name, path) for name, path in found.items() if path}
    return kept | {f"{name}_url": None for name in kept}


def delete_prompt(services: Services, prompt_id: int, place_id: int | None = None) -> None:
    """Remove a prompt and its pictures; its rendering is stopped first. Raises NotFound, Conflict.

    place_id: a tune or base that it must be listed under.
    """
    deadline = time.monotonic() + STOP_SECONDS
    while True:
        with services.store.transaction():
            row = _listed_under(row_of(services, "prompts", prompt_id), place_id)
            if row["status"] != "rendering":
                services.store.delete("prompts", prompt_id)
                note_deletions(services.settings.outputs, services.store, *files_of(services, row))
                break
            services.store.update("prompts", prompt_id, cancel=1)
        if time.monotonic() > deadline:
            raise Conflict(f"prompt {prompt_id} does not stop; try again later")
        time.sleep(0.1)
    finish_deletions(services.settings.outputs, services.store)


def files_of(services: Services, row: PromptRow) -> list[Path]:
    """All files and folders of a prompt, whether they are there or not."""
    home, prompt_id = services.settings.outputs / prompt_home(row), row["id"]
    preview = home / "previews" / f"{prompt_id}.jpg"
    return [home / "prompts" / str(prompt_id), pictures_of(services, row), preview, preview.with_suffix(".part")]


def _listed_under(row: PromptRow, place_id: int | None) -> PromptRow:
    """The row. Raises NotFound unless it is listed under this tune or base; place_id None: under any."""
    if place_id not in (None, row["tune_id"], row["base_id"], row["lora_id"]):
        raise NotFound(f"tune {place_id} has no prompt {row['id']}")
    return row


def get_prompt(services: Services, prompt_id: int, place_id: int | None = None) -> Prompt:
    """place_id: a tune or base that it must be listed under. Raises NotFound."""
    return prompt_answer(services, _listed_under(row_of(services, "prompts", prompt_id), place_id))


def list_prompts(
    services: Services,
    place_id: int | None = None,
    limit: int = 20,
    offset: int = 0,
    before_id: int | None = None,
    text: str | None = None,
) -> list[Prompt]:
    """Newest first. place_id: only those of a tune or base. Raises NotFound for an unknown one.

    text: only prompts that have it in their text, in upper or lower case.
    """
    tune = place_id is None or tune_row(services, place_id)
    if not tune and not bases.by_id(bases.listed_once(services.settings), place_id or 0):
        raise NotFound(f"there is no tune {place_id}")
    rows = services.store.prompts_under(place_id, limit, offset, before_id, text)
    return [prompt_answer(services, row) for row in rows]


def still_good(kept: Mapping[str, object]) -> dict[str, object]:
    """The parameters that older versions kept without an effect, as far as they are valid now."""
    good = {}
    for name, value in kept.items():
        if name in (*PICTURES, "controlnet"):  # these need a picture, which was not kept
            continue
        try:
            parse_request(PromptRequest, {"text": "a", name: value})
        except InvalidRequest:
            continue
        good[name] = value
    return good
