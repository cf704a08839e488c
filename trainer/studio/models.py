"""Models to download and bases to train on: formats, links, base models, earlier tunes."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from trainer.clock import stamp
from trainer.config import branch_file
from trainer.contract.errors import Conflict, InvalidRequest, NotFound, words
from trainer.contract.states import Progress
from trainer.contract.tunes import Tune
from trainer.files import remove
from trainer.library import bases
from trainer.library.bases import Base
from trainer.names import LORA_REFERENCE, MODEL_TYPES
from trainer.studio import checksums
from trainer.studio.answers import here, prompt_answer
from trainer.studio.links import MODEL_LINK_SECONDS, make_link, open_link
from trainer.studio.rows import EARLIER_LISTED, Services, row_of, tune_folder, tune_row


def list_base_tunes(
    services: Services,
    branch: str | None = None,
    limit: int | None = None,
    title: str | None = None,
    model_type: str | None = None,
) -> list[dict[str, object]]:
    """All base models, including those of the models folder; `error` says why one cannot be used."""
    found = [
        base_row(services, base) | {"repository": base.repository, "error": base.error, "stands_on": list(base.chain)}
        for base in bases.list_bases(services.settings)
        if branch in (None, base.branch) and title in (None, base.title)
    ]
    return [row for row in found if model_type in (None, row["model_type"])][:limit]


def base_row(services: Services, base: Base) -> dict[str, object]:
    """The keys of a tune that a base has. name: empty, since a base has no class name."""
    return {
        "id": base.id,
        "title": base.title,
        "name": "",
        "branch": base.branch or None,
        "model_type": LORA_REFERENCE if base.model else None,
        "token": None,
        "url": f"{services.settings.base_url}/tunes/{base.id}.json",
        "orig_images": [],
    }


def base_answer(services: Services, base: Base) -> Tune:
    """A base as a tune, with the prompts that were posted to it."""
    file = base.model or base.path or services.settings.presets / f"{base.branch}.toml"
    since = stamp(datetime.fromtimestamp(file.stat().st_mtime, UTC)) if file.exists() else stamp(datetime.now(UTC))
    prompts = [prompt_answer(services, row) for row in reversed(services.store.prompts_under(base.id))]
    empty = dict.fromkeys(name for name, field in Tune.model_fields.items() if field.is_required())
    return Tune.model_validate(
        empty
        | base_row(services, base)
        | {"branch": base.branch, "ckpt_urls": [], "training_face_correct": False, "auto_extend": False}
        | {"characteristics": {}, "created_at": since, "updated_at": since, "error": base.error, "warnings": []}
        | {"status": "failed" if base.error else "trained", "progress": Progress(), "photos": [], "prompts": prompts}
    )


def model_link(services: Services, tune_id: int, format_: str | None = None) -> str | None:
    """The link to a tune's model in a format; None while it is made. Raises NotFound, InvalidRequest, Conflict."""
    with services.store.transaction():
        row = row_of(services, "tunes", tune_id)
        if row["status"] != "trained":
            raise NotFound(f"tune {tune_id} has no model: it is {row['status']}")
        paths = here(row)
        if not row["files"]:
            raise NotFound(f"tune {tune_id} has no model files")
        if format_ in (None, ""):
            return model_file_link(services, tune_id, f"model/{row['files'][0]}")
        if format_ in paths:
            return model_file_link(services, tune_id, paths[format_])
        known = [*paths, *MODEL_TYPES[row["method"]].made]
        if format_ not in known:
            raise InvalidRequest({"format": [f"tune {tune_id} is available as {words(known)}, not as {format_!r}"]})
        made = next(iter(services.store.find("exports", tune_id=tune_id, format=format_)), None)
        if made is None:
            services.store.add_export(tune_id, format_)
        elif made["status"] == "failed":  # the error is reported once; the next request tries again
            remove(tune_folder(services, tune_id) / "exports" / format_)  # worth nothing, so it goes before its row
            services.store.delete("exports", made["id"])
    services.store.changed.set()
    if made and made["status"] == "failed":
        raise Conflict(f"tune {tune_id} could not be made into {format_}: {made['error']}")
    return model_file_link(services, tune_id, f"exports/{made['files'][0]}") if made and made["files"] else None


def model_file_link(services: Services, tune_id: int, path: str) -> str:
    return make_link(services.settings, f"{tune_id}/{path}", MODEL_LINK_SECONDS)


def open_file(services: Services, path: str, expires: int, signature: str) -> Path:
    """The file that a link names; one of a model is verified first. Raises NotFound, ModelChanged."""
    file = open_link(services.settings, path, expires, signature)
    if file is None:
        raise NotFound("invalid or expired link")
    checksums.verify(services.store, services.settings.outputs, file)
    return file


def model_formats(services: Services, tune_id: int) -> dict[str, tuple[str | None, str]]:
    """The formats of a trained tune's model: (link or None, state) of each.

    state: made, failed, exporting, queued or, if it was not requested yet, empty.
    """
    row = row_of(services, "tunes", tune_id)
    if row["status"] != "trained":
        return {}
    links: dict[str, tuple[str | None, str]] = {}
    links |= {name: (model_file_link(services, tune_id, path), "made") for name, path in here(row).items()}
    asked = {one["format"]: one for one in services.store.find("exports", tune_id=tune_id)}
    for name in MODEL_TYPES[row["method"]].made:
        one = asked.get(name)
        if one is None:
            links[name] = None, ""
        elif one["files"]:
            links[name] = model_file_link(services, tune_id, f"exports/{one['files'][0]}"), "made"
        else:
            links[name] = None, one["status"]
    return links


def readers_of(services: Services, tune_id: int) -> dict[str, str]:
    """The programs that read each format of a tune's LoRA; empty if it has none, or its branch is broken."""
    row = row_of(services, "tunes", tune_id)
    presets = services.settings.presets
    if branch_file.branch_problem(presets, row["branch"]):
        return {}
    formats = here(row)
    return {name: text for name, text in branch_file.readers(presets, row["branch"]).items() if name in formats}


def lineage(services: Services, tune_id: int) -> list[str]:
    """The earlier tunes that a tune is derived from, the nearest first."""
    row = row_of(services, "tunes", tune_id)
    titles: list[str] = []
    while earlier := tune_row(services, row["base_id"]):
        row = earlier
        titles.append(f"{row['title']} (tune {row['id']}, {row['method']})")
    return titles


def earlier_tunes(services: Services) -> list[tuple[str, int]]:
    """The trained tunes that can be a base: (label, id), newest first."""
    rows = services.store.find("tunes", status="trained", limit=EARLIER_LISTED)
    usable = [row for row in rows if MODEL_TYPES[row["method"]].trains]
    return [(f"{row['title']} (tune {row['id']}, {row['branch']})", row["id"]) for row in usable]


def rendering_tunes(services: Services) -> list[tuple[str, int]]:
    """The tunes that prompts can be posted to: (label, id), newest first."""
    rows = services.store.find("tunes", status="trained", limit=EARLIER_LISTED)
    return [(f"{row['title']} ({row['token'] or 'face'} {row['name']}, tune {row['id']})", row["id"]) for row in rows]
