"""What a prompt is rendered with: its base, its LoRAs and its face."""

from __future__ import annotations

from datetime import datetime
from functools import partial
from pathlib import Path

from trainer.config import branch_file, kinds
from trainer.contract.errors import JobRefused
from trainer.contract.rows import PromptRow, TuneRow
from trainer.library import bases, weights
from trainer.library.bases import Base, Bases
from trainer.names import FACE_REFERENCE, FORMATS, IDENTITY_FILE, LORA_REFERENCE, MODEL_TYPES
from trainer.rendering.job import FaceID, Lora, Models
from trainer.settings import Settings
from trainer.studio import references
from trainer.studio.references import Named
from trainer.studio.store import Store
from trainer.work.reporter import Reporter

CLOCK_SECONDS = 1.0  # clocks of disks are this coarse


def find_models(
    settings: Settings, store: Store, prompt: PromptRow, tune: TuneRow | None, reporter: Reporter
) -> Models:
    """The models of a prompt. tune: its own, or on a base the first that it names; None: neither."""
    listed = bases.listed_once(settings)
    base = _base_of_prompt(settings, store, prompt, tune, listed)
    named = references.of_row(store, listed, prompt, tune, base.branch)
    own = None if tune is None else settings.outputs / "tunes" / str(tune["id"]) / "model"
    loras = [Lora(base.model, 1.0, base.title)] if base.model and base.model != own else []
    face = next((one for one in named if one.kind == FACE_REFERENCE), None)
    if tune is not None:
        model_type = MODEL_TYPES[tune["method"]]
        asked = prompt["attributes"].get("lora_scale")
        scale = asked if isinstance(asked, int | float) else 1.0
        scale = next((one.weight for one in named if (one.kind, one.id) == (LORA_REFERENCE, tune["id"])), scale)
        if model_type.adapter:
            model, title = _lora(settings, store, tune["id"], base.branch, listed)
            loras.append(Lora(model, scale, title))
        elif model_type.whole_model and scale != 1.0:
            reporter.warn(f"{tune['title']} is a whole model, which has one strength: {scale:g} is not used")
        if face is None and model_type.reference == FACE_REFERENCE:
            face = Named(FACE_REFERENCE, tune["id"], 1.0)
    for one in named:
        if one.kind == LORA_REFERENCE and (tune is None or one.id != tune["id"]):
            model, title = _lora(settings, store, one.id, base.branch, listed)
            if changed_since(model, prompt):
                reporter.warn(f"{title} was changed after the prompt was sent: the file as it is now was used")
            loras.append(Lora(model, one.weight, title))
    rows = [tune, *(store.get("tunes", one.id) for one in named)]
    is_person = any(kinds.kind_of(row["name"]) == "person" for row in rows if row)
    title = tune["title"] if tune else base.title
    if face and branch_file.is_placeholder(settings.presets, base.branch):
        if store.get("tunes", face.id) is None:
            raise _no_face(face)
        reporter.warn(f"<faceid:{face.id}> is not drawn: a face on branch {base.branch} is a mock")
        face = None
    return Models(title, base, loras, _face(settings, face, base, reporter) if face else None, is_person)


def _base_of_prompt(settings: Settings, store: Store, prompt: PromptRow, tune: TuneRow | None, listed: Bases) -> Base:
    """The base of a prompt: its tune's base, or the base that it was posted to.

    If its lineage begins with that base, the tune's own base is used, such as a checkpoint derived from it.
    """
    if tune is not None and MODEL_TYPES[tune["method"]].trains and prompt["base_id"] in (None, _root(store, tune)):
        return bases.of_tune(settings, tune, partial(store.get, "tunes"), listed)
    base_id, branch = prompt["base_id"] or (tune and tune["base_id"]), tune and tune["branch"]
    return bases.resolve(settings, base_id, branch, partial(store.get, "tunes"), listed)


def _root(store: Store, tune: TuneRow) -> int:
    """The id of the base that the first tune of a lineage was trained on."""
    while earlier := store.get("tunes", tune["base_id"]):
        tune = earlier
    return tune["base_id"]


def _lora(settings: Settings, store: Store, lora_id: int, branch: str, listed: Bases) -> tuple[Path, str]:
    """The LoRA with this id (a tune's, or a file in the models folder), and its title. branch: of the base."""
    if tune := store.get("tunes", lora_id):
        if tune["status"] != "trained":
            raise JobRefused(f"<lora:{lora_id}>: tune {lora_id} is {tune['status']}; it has no model")
        model = settings.outputs / "tunes" / str(lora_id) / "model"
        if not (model / FORMATS["diffusers"]).is_file():
            raise JobRefused(
                f"the model of tune {lora_id} ({tune['title']}) is missing: {FORMATS['diffusers']} in its folder model."
                " Put a copy back, or train the tune again"
            )
        return model, tune["title"]
    file = next((base for base in listed() if base.id == lora_id and base.model), None)
    if file is None or file.model is None:
        raise JobRefused(f"<lora:{lora_id}>: that tune, or file of the models folder, was deleted")
    if file.error or file.branch != branch:
        why = file.error or f"it is of branch {file.branch} now, not {branch}"
        raise JobRefused(f"{file.title} was changed after the prompt was sent, and cannot be used: {why}")
    return file.model, file.title


def changed_since(model: Path, prompt: PromptRow) -> bool:
    """Whether a file of the models folder is newer than a prompt. The models of tunes have checksums."""
    sent = datetime.fromisoformat(prompt["created_at"]).timestamp()
    return model.is_file() and model.stat().st_mtime > sent + CLOCK_SECONDS


def _face(settings: Settings, named: Named, base: Base, reporter: Reporter) -> FaceID:
    """The face with this id, and the adapter that puts it into pictures of this base."""
    folder = settings.outputs / "tunes" / str(named.id) / "model"
    if not (folder / IDENTITY_FILE).exists():
        raise _no_face(named)
    wanted = weights.face_adapter(settings, base.branch)
    adapter = weights.obtain(settings, wanted, progress=lambda what, *_: reporter.stage(what))
    return FaceID(folder, adapter, named.weight)


def _no_face(named: Named) -> JobRefused:
    return JobRefused(f"<faceid:{named.id}>: that tune was deleted, and its face with it")
