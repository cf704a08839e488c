"""The operations on prompts: create, duplicate, get, list, delete."""

from __future__ import annotations

import time
from collections.abc import Mapping

from trainer.contract.errors import Conflict, InvalidRequest, NotFound
from trainer.contract.fields import parse_request
from trainer.contract.parsed_text import ParsedText
from trainer.contract.photos import ProgressCallback, Upload, no_progress
from trainer.contract.prompts import PICTURES, Prompt, PromptRequest, prompt_of
from trainer.contract.rows import PromptRow, TuneRow
from trainer.files import discard
from trainer.library import bases
from trainer.library.bases import Base, Bases
from trainer.names import LORA_REFERENCE, MODEL_TYPES
from trainer.photos import inputs
from trainer.studio import pack_file
from trainer.studio.answers import prompt_answer
from trainer.studio.prompt_rules import check_prompt, keep_pictures, pictures_of, prompt_values
from trainer.studio.references import UNUSABLE, Named, resolve
from trainer.studio.rows import (
    STOP_SECONDS,
    IdempotencyKey,
    Services,
    find_by_idempotency_key,
    idempotency_columns,
    row_of,
    tune_folder,
    tune_row,
)


def create_prompt(
    services: Services,
    tune_id: int,
    data: Mapping[str, object],
    progress: ProgressCallback = no_progress,
    key: IdempotencyKey | None = None,
    listed: Bases | None = None,
) -> Prompt:
    """Queue a prompt on a tune that has a model or is being trained. Raises NotFound, InvalidRequest.

    tune_id: of a tune, or of a base if the text has `<lora:NAME:WEIGHT>` or `<faceid:NAME:WEIGHT>`. listed: all bases,
    if the request has listed them already.
    """
    listed = listed or bases.listed_once(services.settings)
    base, tune = None, tune_row(services, tune_id)
    if tune is None:
        base = next((base for base in listed() if base.id == tune_id), None)
        if base is None:
            raise NotFound(f"there is no tune {tune_id}")
    request = parse_request(PromptRequest, data)
    check_prompt(services, request)
    if tune is not None:
        named = resolve(services.store, listed, request.parsed, tune["branch"], tune)
    else:
        assert base is not None
        tune, named = tune_on_base(services, base, request.parsed, listed)
    if known := find_by_idempotency_key(services, "prompts", key):
        return prompt_answer(services, known)
    with (
        inputs.fetch_inputs(services.settings, services.decoder, [request], None, progress) as pictures,
        services.store.transaction(),
    ):
        if known := find_by_idempotency_key(services, "prompts", key):
            return prompt_answer(services, known)
        tune = row_of(services, "tunes", tune["id"])  # raises if it was deleted meanwhile
        if tune["status"] in UNUSABLE:
            raise InvalidRequest({"tune_id": [f"tune {tune['id']} is {tune['status']}; it has no model"]})
        trained = MODEL_TYPES[tune["method"]].trains
        asked = base.id if base and (not trained or root_id(services, tune) != base.id) else None
        values = prompt_values(services, tune["id"], request, named) | {"base_id": asked}
        prompt_id = services.store.add_prompt(values | idempotency_columns(key))
        if 0 in pictures:
            keep_pictures(services, prompt_id, pictures[0], pictures_of(services, tune["id"], prompt_id))
    services.store.changed.set()
    return get_prompt(services, prompt_id)


def tune_on_base(services: Services, base: Base, parsed: ParsedText, listed: Bases) -> tuple[TuneRow, list[Named]]:
    """The tune that a prompt on a base belongs to (that of its first LoRA, else of its face), and all its models.

    Raises InvalidRequest.
    """
    if base.error:
        raise InvalidRequest({"tune_id": [f"{base.title}: {base.error}"]})
    named = resolve(services.store, listed, parsed, base.branch, None)
    in_order = sorted(named, key=lambda one: one.kind != LORA_REFERENCE)
    tune = next((row for one in in_order if (row := tune_row(services, one.id))), None)
    if tune is None:
        message = f"a prompt on base {base.id} names a tune: <lora:ID:WEIGHT>, or <faceid:ID:WEIGHT>"
        raise InvalidRequest({"text": [message]})
    return tune, named


def root_id(services: Services, tune: TuneRow) -> int:
    """The id of the base that the first tune of a lineage was trained on."""
    while earlier := tune_row(services, tune["base_id"]):
        tune = earlier
    return int(tune["base_id"])


def duplicate_prompt(
    services: Services,
    prompt_id: int,
    data: Mapping[str, object],
    progress: ProgressCallback = no_progress,
    key: IdempotencyKey | None = None,
) -> Prompt:
    """Queue a prompt again, with the values in `data` changed. Raises NotFound, InvalidRequest."""
    row = row_of(services, "prompts", prompt_id)
    same = prompt_of(row).model_dump(exclude_none=True) | own_pictures(services, row)
    for name in PICTURES:  # a new picture replaces the old one
        if name in data or f"{name}_url" in data:
            same = {field: value for field, value in same.items() if field not in (name, f"{name}_url")}
    same = {**still_good(row["kept"]), **same}
    return create_prompt(services, row["base_id"] or row["tune_id"], pack_file.over(same, data), progress, key)


def own_pictures(services: Services, row: PromptRow) -> dict[str, object]:
    """The input pictures of a prompt, as uploads that replace their addresses."""
    folder = pictures_of(services, row["tune_id"], row["id"])
    found = {name: inputs.find(folder, name) for name in PICTURES}
    kept: dict[str, object] = {name: Upload(path.name, path) for name, path in found.items() if path}
    return kept | {f"{name}_url": None for name in kept}


def delete_prompt(services: Services, prompt_id: int, tune_id: int | None = None) -> None:
    """Remove a prompt and its pictures; its rendering is stopped first. Raises NotFound, Conflict.

    tune_id: the tune that it must belong to.
    """
    deadline = time.monotonic() + STOP_SECONDS
    while True:
        with services.store.transaction():
            row = row_of(services, "prompts", prompt_id)
            if tune_id not in (None, row["tune_id"]):
                raise NotFound(f"tune {tune_id} has no prompt {prompt_id}")
            if row["status"] != "rendering":
                services.store.delete("prompts", prompt_id)
                break
            services.store.update("prompts", prompt_id, cancel=1)
        if time.monotonic() > deadline:
            raise Conflict(f"prompt {prompt_id} does not stop; try again later")
        time.sleep(0.1)
    discard(tune_folder(services, row["tune_id"]) / "prompts" / str(prompt_id))
    discard(pictures_of(services, row["tune_id"], prompt_id))


def get_prompt(services: Services, prompt_id: int) -> Prompt:
    """Raises NotFound."""
    return prompt_answer(services, row_of(services, "prompts", prompt_id))


def list_prompts(services: Services, tune_id: int | None = None, limit: int = 20, offset: int = 0) -> list[Prompt]:
    """Newest first. Raises NotFound for an unknown tune."""
    if tune_id is not None:
        row_of(services, "tunes", tune_id)
    return [
        prompt_answer(services, row)
        for row in services.store.find("prompts", tune_id=tune_id, limit=limit, offset=offset)
    ]


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
