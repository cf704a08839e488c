"""The verbs that REST, the Gradio API and the page share: create, get, list, cancel, resume, delete."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from trainer import bases, flags, inputs, packs, presets
from trainer.expiry import expiry
from trainer.files import discard, fsync, read_json_lines, write_whole
from trainer.images import SAME_PICTURE, Decoder, intake
from trainer.links import MODEL_LINK_SECONDS, make_link
from trainer.looking import Looker, not_people, of_one_person
from trainer.methods import FORMATS, MADE
from trainer.references import GONE, Named, as_row, resolve
from trainer.schema import (
    COLUMNS,
    CONTROLS,
    ENDED,
    HOSTED_CONTROLS,
    PICTURES,
    Callback,
    Check,
    CheckRequest,
    Conflict,
    Echo,
    InvalidRequest,
    NotFound,
    Photo,
    Progress,
    Prompt,
    PromptRequest,
    Request,
    Tell,
    Tune,
    TuneChange,
    TuneRequest,
    Upload,
    attributes_of,
    check_model_type,
    nearest,
    parse_request,
    prompt_of,
    references,
    untold,
    words,
)
from trainer.settings import Settings
from trainer.store import Row, Store, Table, stamp

FEW_PHOTOS = 4
EARLIER_LISTED = 100  # tunes, in the page's list of bases
API_NUM_IMAGES = 8  # the hosted service's default; the page asks for 4
HOSTED_PRESETS = ("flux-lora-focus", "flux-lora-portrait", "flux-lora-fast")
MOMENT_FILES = FORMATS["bundled"], FORMATS["kohya"]  # of a model in mid-run: with its new words, where it has some
CONTACT_SHEET = "sheet.jpg"
BESIDE = tuple(name for name in Prompt.model_fields if name in PromptRequest.model_fields and name not in (
    *COLUMNS, *PICTURES, *Echo.model_fields))  # fmt: skip
FLAGS = ("use_lpw", "film_grain", "hires_fix", "inpaint_faces", "face_correct", "face_swap")  # false where not asked
STOP_SECONDS = 120.0  # a step of the largest model on the slowest card, and saving it


R = TypeVar("R", bound=Request)


@dataclass(frozen=True)
class Mark:
    """The header `Idempotency-Key` of a request, and a digest of what it asked for."""

    key: str
    digest: str


def marks(mark: Mark | None) -> Row:
    """The columns that hold a mark."""
    return {"request_key": mark.key, "request_digest": mark.digest} if mark else {}


@dataclass(frozen=True)
class Jobs:
    """Everything that a door needs."""

    settings: Settings
    store: Store
    decoder: Decoder
    looker: Looker

    # Tunes

    def create_tune(
        self, data: Mapping[str, Any], uploads: Sequence[Upload], tell: Tell = untold, mark: Mark | None = None
    ) -> tuple[Tune, bool]:
        """Queue a tune; False beside it: it was there already, by its mark or its title (setting `idempotency`).

        data: the tune parameters but `images`, whose files are the uploads. Raises InvalidRequest with all problems;
        nothing is kept then.
        """
        request, count, problems = self._parse(TuneRequest, data, uploads)
        if known := self._marked("tunes", mark):
            return self._tune(known), False
        if existing := self._same_title(request.title):
            return existing, False
        if len(request.prompts_attributes) > self.settings.max_prompts:
            problems["prompts_attributes"] = [f"must contain at most {self.settings.max_prompts} prompts"]
        values: Row = {"branch": None}
        try:
            values = self._settle(request, max(1, count))
        except InvalidRequest as invalid:
            problems |= invalid.problems
        own = {"id": 0, "title": request.title, "token": request.token or "ohwx", "method": ""} | values  # no id yet
        for number, prompt in enumerate(request.prompts_attributes):
            try:
                self._check_prompt(prompt)
                resolve(self.settings, self.store, prompt.text, values["branch"], own)
            except InvalidRequest as invalid:
                problems.setdefault("prompts_attributes", []).extend(numbered(invalid, number))
        fetches = request.image_urls or any(prompt.has_input for prompt in request.prompts_attributes)
        if problems and (fetches or "images" in problems):
            raise InvalidRequest(problems)  # nothing is fetched for a request that is refused anyway
        try:
            with (
                intake(self.settings, self.decoder, uploads, request.image_urls, tell) as (work, photos),
                inputs.taken_in(
                    self.settings, self.decoder, request.prompts_attributes, "prompts_attributes", tell
                ) as pictures,
            ):
                if problems:
                    raise InvalidRequest({})
                if values["method"] == "faceid":
                    photos, said = self.looker.identify(work, photos, request.name, tell)
                    values["warnings"] = [*values["warnings"], *said]
                    return self._insert(request, values, work, photos, pictures, mark)
                different = sum(not photo.dropped for photo in photos)
                if different != count:  # a photo that came twice is trained once
                    values = self._settle(request, different)
                return self._insert(request, values, work, photos, pictures, mark)
        except InvalidRequest as invalid:
            raise InvalidRequest(problems | invalid.problems) from None

    def check_photos(self, data: Mapping[str, Any], uploads: Sequence[Upload], tell: Tell = untold) -> Check:
        """The verdicts that a tune with these parameters would give its photos; nothing is kept.

        data: tune parameters but `images`; none of them is needed, but without `name` nobody looks for faces. Raises
        InvalidRequest with all problems, CannotLook.
        """
        request, count, problems = self._parse(CheckRequest, data, uploads)
        if problems:
            raise InvalidRequest(problems)
        if request.name and presets.kind_of(request.name) == "person":
            self.looker.warm()  # while the photos are fetched and decoded
        values = self._settle(request.as_tune(), count)
        config = presets.TrainConfig(**presets.parse_args(values["args"]))
        with intake(self.settings, self.decoder, uploads, request.image_urls, tell) as (work, photos):
            warnings = values["warnings"]
            if request.name:
                restore = bool(request.training_face_correct)
                photos, said = self.looker.prepare(work, photos, config, request.name, restore, tell, fetch=False)
                warnings = [*warnings, *said]
            else:
                warnings = [*warnings, "without a class name (`name`) nobody looks for faces"]
            left = sum(not photo.dropped for photo in photos)
            if left != count:  # what is said of their number
                of_left = self._settle(request.as_tune(), max(1, left))["warnings"]
                warnings = [*of_left, *warnings[len(values["warnings"]) :]]
            for number, photo in enumerate(photos):
                tell("pictures are drawn", number, len(photos))
                self.looker.show(work, photo, config)
            tell("pictures are drawn", len(photos), len(photos))
            return Check(photos=photos, warnings=warnings)

    def _parse(
        self, model: type[R], data: Mapping[str, Any], uploads: Sequence[Upload]
    ) -> tuple[R, int, dict[str, list[str]]]:
        """The request, how many photos come with it, and what is wrong with their number. Raises InvalidRequest."""
        problems: dict[str, list[str]] = {}
        urls = data.get("image_urls")
        count = sum(not u.name.lower().endswith(".txt") for u in uploads) + (len(urls) if isinstance(urls, list) else 0)
        if count == 0:
            problems["images"] = ["must contain at least one image"]
        if count > self.settings.max_images:
            problems["images"] = [f"must contain at most {self.settings.max_images} images, got {count}"]
        try:
            return parse_request(model, data), count, problems
        except InvalidRequest as invalid:
            raise InvalidRequest(problems | invalid.problems) from None

    def get_tune(self, tune_id: int) -> Tune:
        """Raises NotFound."""
        return self._tune(self._row("tunes", tune_id))

    def list_tunes(
        self,
        limit: int = 20,
        offset: int = 0,
        before_id: int | None = None,
        title: str | None = None,
        branch: str | None = None,
        model_type: str | None = None,
    ) -> list[Tune]:
        """Newest first."""
        rows = self.store.find(
            "tunes", limit=limit, offset=offset, before_id=before_id, title=title, branch=branch, model_type=model_type
        )
        return [self._tune(row) for row in rows]

    def cancel_tune(self, tune_id: int) -> Tune:
        """Stop a tune: at once while it waits, within one step while it trains. Raises NotFound, Conflict."""
        row = self._row("tunes", tune_id)
        if row["status"] in ENDED:
            raise Conflict(f"tune {tune_id} is {row['status']} already")
        if not self.store.take_off_queue(tune_id):
            self.store.update("tunes", tune_id, cancel=1)
        return self.get_tune(tune_id)

    def resume_tune(self, tune_id: int) -> Tune:
        """Queue a tune again that was canceled or has failed; it goes on from its state. Raises NotFound, Conflict."""
        row = self._row("tunes", tune_id)
        if row["status"] not in ("canceled", "failed"):
            raise Conflict(f"tune {tune_id} is {row['status']}; only a canceled or failed one can be resumed")
        self.store.requeue_tune(tune_id)
        self.store.changed.set()
        return self.get_tune(tune_id)

    def change_tune(self, tune_id: int, data: Mapping[str, Any]) -> Tune:
        """Change a tune's title, class name, auto_extend or characteristics. Raises NotFound, InvalidRequest."""
        with self.store.transaction():
            row = self._row("tunes", tune_id)
            request = parse_request(TuneChange, data)
            changes = {
                name: value for name in request.model_fields_set if (value := getattr(request, name)) is not None
            }
            problems: dict[str, list[str]] = {}
            if not changes:
                problems["tune"] = [f"must have at least one of {words(TuneChange.model_fields)}"]
            name = request.name or row["name"]
            if name != row["name"] and row["status"] != "queued":
                told = f"tune {tune_id} is {row['status']}, and its class name is part of what was trained"
                problems["name"] = [told]
            elif presets.kind_of(name) != presets.kind_of(row["name"]):
                problems["name"] = [f"{name} is trained with other settings than {row['name']}; make a new tune"]
            holder = self._same_title(changes["title"]) if "title" in changes else None
            if holder and holder.id != tune_id:
                problems["title"] = [f"tune {holder.id} has this title"]
            if problems:
                raise InvalidRequest(problems)
            self.store.update("tunes", tune_id, **changes)
            return self.get_tune(tune_id)

    def delete_tune(self, tune_id: int) -> None:
        """Remove a tune with its prompts and files; a running one is stopped first. Raises NotFound, Conflict.

        One that others stand on stays.
        """
        self._row("tunes", tune_id)
        deadline = time.monotonic() + STOP_SECONDS
        while True:
            with self.store.transaction():
                if others := self.store.standing_on(tune_id):
                    named = ", ".join(f"{other['id']} ({other['title']})" for other in others)
                    raise Conflict(f"tune {tune_id} is what others stand on: {named}; delete those first")
                self.store.take_off_queue(tune_id)
                if not self._busy(tune_id):
                    self.store.delete("tunes", tune_id)
                    break
            if time.monotonic() > deadline:
                raise Conflict(f"tune {tune_id} does not stop; try again later")
            time.sleep(0.1)
        discard(self.folder(tune_id))

    def _busy(self, tune_id: int) -> bool:
        """Whether the worker is at the tune or at one of its prompts, which are then asked to stop."""
        busy = False
        if self._row("tunes", tune_id)["status"] == "training":
            self.store.update("tunes", tune_id, cancel=1)
            busy = True
        for prompt in self.store.find("prompts", tune_id=tune_id, status="rendering"):
            self.store.update("prompts", prompt["id"], cancel=1)
            busy = True
        return busy or bool(self.store.find("exports", tune_id=tune_id, status="exporting"))

    # Prompts

    def create_prompt(
        self, tune_id: int, data: Mapping[str, Any], tell: Tell = untold, mark: Mark | None = None
    ) -> Prompt:
        """Queue a prompt on a tune that has, or is getting, a model. Raises NotFound, InvalidRequest.

        tune_id: the tune's, or that of a base with `<lora:NAME:WEIGHT>` or `<faceid:NAME:WEIGHT>` in the text.
        """
        base, tune = None, self._tune_row(tune_id)
        if tune is None:
            base = next((base for base in bases.list_bases(self.settings) if base.id == tune_id), None)
            if base is None:
                raise NotFound(f"there is no tune {tune_id}")
        request = parse_request(PromptRequest, data)
        self._check_prompt(request)
        if tune is not None:
            named = resolve(self.settings, self.store, request.text, tune["branch"], tune)
        else:
            assert base is not None
            tune, named = self._tune_on_base(base, request.text)
        if known := self._marked("prompts", mark):
            return self._prompt(known)
        with (
            inputs.taken_in(self.settings, self.decoder, [request], None, tell) as pictures,
            self.store.transaction(),
        ):
            if known := self._marked("prompts", mark):
                return self._prompt(known)
            tune = self._row("tunes", tune["id"])  # it may be gone by now
            if tune["status"] in GONE:
                raise InvalidRequest({"tune_id": [f"tune {tune['id']} is {tune['status']}; it has no model"]})
            asked = base.id if base and (tune["method"] == "faceid" or self._root_id(tune) != base.id) else None
            values = self._prompt_values(tune["id"], request, named) | {"base_id": asked}
            prompt_id = self.store.add_prompt(values | marks(mark))
            if 0 in pictures:
                self._keep_pictures(prompt_id, pictures[0], self.pictures_of(tune["id"], prompt_id))
        self.store.changed.set()
        return self.get_prompt(prompt_id)

    def _tune_on_base(self, base: bases.Base, text: str) -> tuple[Row, list[Named]]:
        """The tune that a prompt on a base belongs to, the first LoRA that it names, else its face; and all of them.

        Raises InvalidRequest.
        """
        if base.error:
            raise InvalidRequest({"tune_id": [f"{base.title}: {base.error}"]})
        named = resolve(self.settings, self.store, text, base.branch, None)
        in_order = sorted(named, key=lambda one: one.kind != "lora")
        tune = next((row for one in in_order if (row := self._tune_row(one.id))), None)
        if tune is None:
            told = f"a prompt on base {base.id} names a tune: <lora:ID:WEIGHT>, or <faceid:ID:WEIGHT>"
            raise InvalidRequest({"text": [told]})
        return tune, named

    def _root_id(self, tune: Row) -> int:
        """The base at the end of the chain of tunes that a tune stands on."""
        while earlier := self._tune_row(tune["base_id"]):
            tune = earlier
        return int(tune["base_id"])

    def _check_prompt(self, request: PromptRequest) -> None:
        """Settle the names of looks, and refuse what does not go together. Raises InvalidRequest."""
        problems: dict[str, list[str]] = {}
        folder = self.settings.presets
        for field, known in (("style", presets.styles(folder)), ("color_grading", presets.film_looks(folder))):
            given = getattr(request, field)
            name = next((name for name in known if given and name.lower() == given.strip().lower()), None)
            if given and name is None:
                told = f"there is no {given!r}{nearest(given, known)}; known: {', '.join(known)}"
                problems[field] = [told]
            setattr(request, field, name)
        for field in PICTURES:
            if not isinstance(getattr(request, field), Upload | None):
                told = f"must be a file in multipart/form-data; an address goes into {field}_url"
                problems[field] = [told]
        if not request.has_input:
            for field, given in (("mask_image", request.has_mask), ("controlnet", request.controlnet)):
                if given:
                    problems[field] = ["needs input_image or input_image_url"]
        if problems:
            raise InvalidRequest(problems)

    def _keep_pictures(self, prompt_id: int, folder: Path, target: Path) -> None:
        """Move the pictures that a prompt starts from to where they stay, and note their names."""
        names = {path.stem: path.name for path in folder.iterdir()}
        inputs.keep(folder, target)
        attributes = self._row("prompts", prompt_id)["attributes"]
        self.store.update("prompts", prompt_id, attributes=attributes | names)

    def pictures_of(self, tune_id: int, prompt_id: int) -> Path:
        """Where the pictures lie that a prompt starts from."""
        return self.folder(tune_id) / "inputs" / str(prompt_id)

    def duplicate_prompt(
        self, prompt_id: int, data: Mapping[str, Any], tell: Tell = untold, mark: Mark | None = None
    ) -> Prompt:
        """Queue a prompt again, with other values where `data` has some. Raises NotFound, InvalidRequest."""
        row = self._row("prompts", prompt_id)
        same = prompt_of(row).model_dump(exclude_none=True) | self._own_pictures(row)
        for name in PICTURES:  # another picture comes in place of the one that was there
            if name in data or f"{name}_url" in data:
                same = {key: value for key, value in same.items() if key not in (name, f"{name}_url")}
        same = {**still_good(row["kept"]), **same}
        return self.create_prompt(row["base_id"] or row["tune_id"], packs.over(same, data), tell, mark)

    def _own_pictures(self, row: Row) -> dict[str, Any]:
        """The pictures that a prompt starts from, as uploads in place of their addresses."""
        folder = self.pictures_of(row["tune_id"], row["id"])
        found = {name: inputs.find(folder, name) for name in PICTURES}
        kept: dict[str, Any] = {name: Upload(path.name, path) for name, path in found.items() if path}
        return kept | {f"{name}_url": None for name in kept}

    def delete_prompt(self, prompt_id: int, tune_id: int | None = None) -> None:
        """Remove a prompt and its pictures; one that renders is stopped first. Raises NotFound, Conflict.

        tune_id: the tune that it must be of.
        """
        deadline = time.monotonic() + STOP_SECONDS
        while True:
            with self.store.transaction():
                row = self._row("prompts", prompt_id)
                if tune_id not in (None, row["tune_id"]):
                    raise NotFound(f"tune {tune_id} has no prompt {prompt_id}")
                if row["status"] != "rendering":
                    self.store.delete("prompts", prompt_id)
                    break
                self.store.update("prompts", prompt_id, cancel=1)
            if time.monotonic() > deadline:
                raise Conflict(f"prompt {prompt_id} does not stop; try again later")
            time.sleep(0.1)
        discard(self.folder(row["tune_id"]) / "prompts" / str(prompt_id))
        discard(self.pictures_of(row["tune_id"], prompt_id))

    def get_prompt(self, prompt_id: int) -> Prompt:
        """Raises NotFound."""
        return self._prompt(self._row("prompts", prompt_id))

    def list_prompts(self, tune_id: int | None = None, limit: int = 20, offset: int = 0) -> list[Prompt]:
        """Newest first. Raises NotFound for an unknown tune."""
        if tune_id is not None:
            self._row("tunes", tune_id)
        return [self._prompt(row) for row in self.store.find("prompts", tune_id=tune_id, limit=limit, offset=offset)]

    # Packs

    def list_packs(self) -> list[dict[str, Any]]:
        """All packs, with their prompts for each class; `error` of one that cannot be read."""
        told = []
        for slug, table in self._pack_tables().items():
            try:
                pack = self._read_pack(slug, table)
                told.append(packs.describe(pack, presets.default_token(self.settings.presets, pack.branch)))
            except Conflict as problem:
                told.append({"slug": slug, "error": str(problem)})
        return told

    def get_pack(self, slug: str) -> dict[str, Any]:
        """Raises NotFound, Conflict."""
        pack = self._pack(slug)
        return packs.describe(pack, presets.default_token(self.settings.presets, pack.branch))

    def create_pack_tune(
        self,
        slug: str,
        data: Mapping[str, Any],
        uploads: Sequence[Upload],
        tell: Tell = untold,
        mark: Mark | None = None,
    ) -> tuple[Tune, bool]:
        """Queue a tune with the settings and prompts of a pack, or with `tune_ids` its prompts on a tune that is there.

        data: the tune parameters, which go over the pack's, and `prompt_attributes`, `prompt_ids`, `tune_ids`. Raises
        NotFound, Conflict, InvalidRequest.
        """
        pack = self._pack(slug)
        if tune_id := packs.asked_tune(data):
            if uploads:
                raise InvalidRequest({"images": ["has no effect with tune_ids, for nothing is trained; leave it out"]})
            tune = self._row("tunes", tune_id)
            requests = packs.prompt_requests(pack, data, tune["name"], tune["token"])
            for request in (parse_request(PromptRequest, one) for one in requests):  # before the first one is made
                self._check_prompt(request)
                resolve(self.settings, self.store, request.text, tune["branch"], tune)
            for number, one in enumerate(requests):
                self.create_prompt(tune_id, one, tell, mark and Mark(f"{mark.key} {number}", mark.digest))
            return self.get_tune(tune_id), True
        base_tune_id, branch = packs.asked_base(pack, data)
        base = bases.resolve(self.settings, base_tune_id, branch, self._tune_row)
        return self.create_tune(
            packs.tune_request(pack, data, base.branch, self._default_token(base)), uploads, tell, mark
        )

    def save_pack(self, tune_id: int, title: str | None = None) -> dict[str, Any]:
        """Make a pack of a tune's settings and prompts. Raises NotFound, InvalidRequest."""
        tune = self._row("tunes", tune_id)
        prompts = [prompt_of(row) for row in self.store.find("prompts", tune_id=tune_id, oldest_first=True)]
        request = self.folder(tune_id) / "request.json"
        asked = json.loads(request.read_text("utf-8"))["args"] if request.exists() else None
        title = title or tune["title"]
        toml = packs.to_toml(title, tune, [prompt.model_dump(exclude_none=True) for prompt in prompts], asked)
        folder = self.settings.outputs / "packs"
        folder.mkdir(exist_ok=True)
        with self.store.transaction():  # nobody else takes the name
            slug = packs.free_slug(title, list(self._pack_tables()))
            write_whole(folder / f"{slug}.toml", toml)
        return self.get_pack(slug)

    def _pack_tables(self) -> dict[str, dict[str, Any] | str]:
        """The program's packs, and those that were saved here."""
        return presets.pack_tables(self.settings.presets / "packs", self.settings.outputs / "packs")

    def _pack(self, slug: str) -> packs.Pack:
        tables = self._pack_tables()
        if slug not in tables:
            raise NotFound(f"there is no pack {slug!r}{nearest(slug, tables)}; known: {words(tables)}")
        return self._read_pack(slug, tables[slug])

    @staticmethod
    def _read_pack(slug: str, table: dict[str, Any] | str) -> packs.Pack:
        if isinstance(table, str):
            raise Conflict(table)
        try:
            return packs.load(table, slug)
        except ValueError as problem:
            raise Conflict(f"{slug}.toml: {problem}") from None

    # Callbacks

    def list_callbacks(self, tune_id: int) -> list[Callback]:
        """Those of a tune and its prompts, newest first; none of a tune that is not there."""
        return [Callback(**{key: row[key] for key in Callback.model_fields}) for row in self.store.callbacks(tune_id)]

    def send_callbacks_again(self, tune_id: int) -> list[Callback]:
        """Post all callbacks of a tune and its prompts once more. Raises NotFound, Conflict."""
        self._row("tunes", tune_id)
        if not self.store.send_callbacks_again(tune_id):
            raise Conflict(f"tune {tune_id} has no callback to send: none was asked for, or nothing has ended yet")
        return self.list_callbacks(tune_id)

    # Lists

    def list_base_tunes(self, branch: str | None = None) -> list[dict[str, Any]]:
        """All base models, those of the models folder among them; `error` says why one cannot be used."""
        return [
            {
                "id": base.id,
                "title": base.title,
                "branch": base.branch or None,
                "repository": base.repository,
                "error": base.error,
                "stands_on": list(base.chain),
            }
            for base in bases.list_bases(self.settings)
            if branch in (None, base.branch)
        ]

    def list_presets(self) -> list[str]:
        return presets.list_presets(self.settings.presets)

    # Models

    def model_link(self, tune_id: int, format_: str | None = None) -> str | None:
        """The link to a tune's model in a format; None while that is being made. Raises NotFound, InvalidRequest,
        Conflict."""
        row = self._row("tunes", tune_id)
        if row["status"] != "trained":
            raise NotFound(f"tune {tune_id} has no model: it is {row['status']}")
        paths = here(row)
        if format_ in (None, ""):
            return self._model_link(tune_id, f"model/{row['files'][0]}")
        if format_ in paths:
            return self._model_link(tune_id, paths[format_])
        known = [*paths, *MADE[row["method"]]]
        if format_ not in known:
            raise InvalidRequest({"format": [f"tune {tune_id} can be had as {words(known)}, not as {format_!r}"]})
        with self.store.transaction():
            made = next(iter(self.store.find("exports", tune_id=tune_id, format=format_)), None)
            if made is None:
                self.store.add_export(tune_id, format_)
            elif made["status"] == "failed":  # told once; who asks again, tries again
                self.store.delete("exports", made["id"])
        self.store.changed.set()
        if made and made["status"] == "failed":
            raise Conflict(f"tune {tune_id} could not be made into {format_}: {made['error']}")
        return self._model_link(tune_id, f"exports/{made['files'][0]}") if made and made["files"] else None

    def _model_link(self, tune_id: int, path: str) -> str:
        return make_link(self.settings, f"{tune_id}/{path}", MODEL_LINK_SECONDS)

    def formats(self, tune_id: int) -> dict[str, tuple[str | None, str]]:
        """What a trained tune can be had as: (link or None, state) of each format.

        state: made, failed, exporting, queued or, where nobody has asked for it yet, nothing.
        """
        row = self._row("tunes", tune_id)
        if row["status"] != "trained":
            return {}
        links: dict[str, tuple[str | None, str]] = {}
        links |= {name: (self._model_link(tune_id, path), "made") for name, path in here(row).items()}
        asked = {one["format"]: one for one in self.store.find("exports", tune_id=tune_id)}
        for name in MADE[row["method"]]:
            one = asked.get(name, {"files": [], "status": ""})
            link = self._model_link(tune_id, f"exports/{one['files'][0]}") if one["files"] else None
            links[name] = link, "made" if link else one["status"]
        return links

    def chain(self, tune_id: int) -> list[str]:
        """The earlier tunes that a tune stands on, the nearest first."""
        row = self._row("tunes", tune_id)
        titles: list[str] = []
        while earlier := self._tune_row(row["base_id"]):
            row = earlier
            titles.append(f"{row['title']} (tune {row['id']}, {row['method']})")
        return titles

    def earlier_tunes(self) -> list[tuple[str, int]]:
        """The trained tunes that another one can stand on: what to call them, and their ids; newest first."""
        rows = self.store.find("tunes", status="trained", limit=EARLIER_LISTED)
        usable = [row for row in rows if row["method"] != "faceid"]
        return [(f"{row['title']} (tune {row['id']}, {row['branch']})", row["id"]) for row in usable]

    def rendering_tunes(self) -> list[tuple[str, int]]:
        """The tunes that prompts can be posted to: what to call them, and their ids; newest first."""
        rows = self.store.find("tunes", status="trained", limit=EARLIER_LISTED)
        return [
            (f"{row['title']} ({row['token'] or 'face'} {row['name']}, tune {row['id']})", row["id"]) for row in rows
        ]

    # What the page shows of a run beside the tune itself

    def readings(self, tune_id: int) -> list[dict[str, Any]]:
        """The log of a run: `step`, `loss` (mean of the last steps), `lr`, `peak_gib` and `seconds` of each line."""
        log = self.folder(tune_id) / "log.jsonl"
        lines = read_json_lines(log) if log.exists() else []
        return [line for line in lines if "loss" in line]

    def seen(self, tune_id: int) -> list[dict[str, Any]]:
        """The pictures as they are trained: `url`, `name`, `kind`, `caption`, `width`, `height` and `mask` of each."""
        facts = self.folder(tune_id) / "dataset" / "seen" / "seen.json"
        try:
            listed = json.loads(facts.read_text("utf-8"))
        except FileNotFoundError:  # not made yet, or just being made anew
            listed = []
        return [one | {"url": make_link(self.settings, f"{tune_id}/dataset/seen/{one['file']}")} for one in listed]

    def moments(self, tune_id: int) -> list[dict[str, Any]]:
        """The previews of a run: `step`, `url`, and `model`, the link to the model of that moment where it is kept."""
        folder, found = self.folder(tune_id), []
        for picture in sorted((folder / "samples").glob("step-*.png")):
            model = moment_of(folder / "checkpoints" / picture.stem)
            found.append(
                {
                    "step": int(picture.stem.removeprefix("step-")),
                    "url": make_link(self.settings, f"{tune_id}/samples/{picture.name}"),
                    "model": self._moment_link(model) if model else None,
                }
            )
        return found

    def _moment_link(self, model: Path) -> str:
        return make_link(
            self.settings, model.relative_to(self.settings.outputs / "tunes").as_posix(), MODEL_LINK_SECONDS
        )

    def folder(self, tune_id: int) -> Path:
        return self.settings.outputs / "tunes" / str(tune_id)

    # From a request to rows

    def _settle(self, request: TuneRequest, photos: int) -> Row:
        """Fix everything that has a default, and refuse what does not go together; all problems at once."""
        base = bases.resolve(self.settings, request.base_tune_id, request.branch, self._tune_row)
        asked_preset, warnings = request.preset, self._warnings(request, photos, base)
        problems: dict[str, list[str]] = {}
        known_presets = (*self.list_presets(), *HOSTED_PRESETS)
        if base.branch == "fast":
            preset = None
        elif asked_preset is not None and asked_preset not in self.list_presets():
            known = words(self.list_presets()) or "none"
            hint = nearest(asked_preset, known_presets)
            problems["preset"] = [f"there is no preset {asked_preset!r} for {base.branch}{hint}; known: {known}"]
            preset = None
        else:
            preset = asked_preset
        folder, branch = self.settings.presets, base.branch
        asked_type = request.model_type or presets.default_model_type(folder, branch)
        method, args = presets.method_of(folder, branch, asked_type), None
        if method != asked_type:
            warnings.append(f"{branch} trains {method} where {asked_type} is asked, as the hosted service does")
        try:
            check_model_type(method, branch, presets.model_types(folder, branch), presets.why_not(folder, branch))
            if method == "checkpoint" and FORMATS["embeddings"] in (self._tune_row(base.id) or {}).get("files", []):
                told = f"tune {base.id} has new words, and a checkpoint has no place for them; train lora or pti on it"
                problems["base_tune_id"] = [told]
            if method == "pti" and (request.token or "").lower() in request.name.lower().split():
                problems["token"] = [
                    f"{request.token} is a word of the class name: every {request.name} would be meant"
                ]
            if method == "faceid":
                problems |= faceid_problems(request)
            else:
                config = presets.resolve(
                    folder,
                    branch=branch,
                    model_type=method,
                    preset=preset,
                    name=request.name,
                    photos=photos,
                    steps=request.steps,
                    args=request.args,
                    face_crop=request.face_crop,
                    face_crop_default=self.settings.face_crop,
                )
                args = presets.as_args(config)
        except InvalidRequest as invalid:
            problems |= invalid.problems
        if problems:
            raise InvalidRequest(problems)
        return {
            "title": request.title,
            "name": request.name.strip(),
            "token": None if method == "faceid" else request.token or self._default_token(base),
            "branch": base.branch,
            "model_type": request.model_type,
            "method": method,
            "preset": asked_preset,
            "base_tune_id": request.base_tune_id,
            "base_id": base.id,
            "steps": request.steps,
            "args": args,
            "face_crop": request.face_crop,
            "training_face_correct": bool(request.training_face_correct),
            "auto_extend": bool(request.auto_extend),
            "callback": request.callback,
            "prompts_callback": request.prompts_callback,
            "characteristics": request.characteristics,
            "warnings": warnings,
        }

    def _default_token(self, base: bases.Base) -> str:
        """That of the earlier tune which the base is, else the branch's."""
        earlier = self._tune_row(base.id)
        return (earlier and earlier["token"]) or presets.default_token(self.settings.presets, base.branch)

    def _tune_row(self, tune_id: int) -> Row | None:
        return self.store.get("tunes", tune_id)

    def _warnings(self, request: TuneRequest, photos: int, base: bases.Base) -> list[str]:
        """What was asked for and is not done, in words."""
        told = [f"{name} is accepted and has no effect" for name in request.ignored]
        told += presets.branch_warnings(self.settings.presets, base.branch)
        if photos < FEW_PHOTOS:
            told.append(f"{photos} photos are few: with {FEW_PHOTOS} or more a tune learns its subject better")
        if base.branch == "fast":
            if request.base_tune_id not in (None, base.id):
                told.append(f"branch fast has a base of its own: base_tune_id {request.base_tune_id} is not used")
            if request.preset is not None:
                told.append(f"branch fast has settings of its own: preset {request.preset} is not used")
        if request.face_crop and presets.kind_of(request.name) != "person":
            told.append(not_people("face_crop", request.name))
        if request.model_type == "faceid":
            asked = [name for name in ("steps", "token", "training_face_correct", "preset") if getattr(request, name)]
            told += [f"{name} has no effect: faceid trains nothing" for name in asked]
        if request.auto_extend and not self.settings.lifetime_days:
            told.append("auto_extend has no effect: tunes do not expire here")
        return told

    def _insert(
        self,
        request: TuneRequest,
        values: Row,
        work: Path,
        photos: list[Photo],
        pictures: Mapping[int, Path],
        mark: Mark | None,
    ) -> tuple[Tune, bool]:
        with self.store.transaction():
            if known := self._marked("tunes", mark):  # made by somebody else meanwhile
                return self._tune(known), False
            if existing := self._same_title(request.title):
                return existing, False
            base = bases.resolve(self.settings, request.base_tune_id, request.branch, self._tune_row)
            if base.id != values["base_id"]:  # it was deleted while the photos came
                raise InvalidRequest({"base_tune_id": [f"{request.base_tune_id} is no base any more"]})
            photos_told = [photo.model_dump() for photo in photos]
            values = {**values, **marks(mark), "photos": photos_told}
            if values["method"] == "faceid":
                moment = datetime.now(UTC)
                tune_id = self.store.add_ready_tune(
                    values,
                    files=[FORMATS["faceid"]],
                    started_training_at=stamp(moment),
                    trained_at=stamp(moment),
                    expires_at=expiry(self.settings, moment),
                    progress={"stage": "trained"},
                )
            else:
                tune_id = self.store.add_tune(values)
            own = self._row("tunes", tune_id)
            for number, prompt in enumerate(request.prompts_attributes):
                named = resolve(self.settings, self.store, prompt.text, own["branch"], own)
                prompt_id = self.store.add_prompt(self._prompt_values(tune_id, prompt, named))
                if number in pictures:
                    self._keep_pictures(prompt_id, pictures[number], work / "inputs" / str(prompt_id))
            (work / "request.json").write_text(request.model_dump_json(exclude={"images"}, indent=1))
            target = self.folder(tune_id)
            target.parent.mkdir(exist_ok=True)
            discard(target)  # left by a crash between the rename and the commit, so that its number came again
            for path in work.rglob("*"):
                fsync(path)
            work.rename(target)
            fsync(target.parent)
        self.store.changed.set()
        return self.get_tune(tune_id), True

    def _prompt_values(self, tune_id: int, request: PromptRequest, named: Sequence[Named]) -> Row:
        return {
            "tune_id": tune_id,
            **{name: getattr(request, name) for name in COLUMNS},
            "num_images": request.num_images or API_NUM_IMAGES,
            "attributes": attributes_of(request),
            "named": as_row(named),
            "kept": json.loads(json.dumps(request.ignored, default=lambda upload: upload.name)),
            "warnings": prompt_warnings(request),
        }

    def _marked(self, table: Table, mark: Mark | None) -> Row | None:
        """What an equal request of the same mark has made. Raises InvalidRequest where that was another request."""
        found = self.store.find(table, request_key=mark.key, limit=1) if mark else []
        if found and mark and found[0]["request_digest"] != mark.digest:
            told = f"was used for {table[:-1]} {found[0]['id']}, which was another request; take a new one"
            raise InvalidRequest({"Idempotency-Key": [told]})
        return found[0] if found else None

    def _same_title(self, title: str) -> Tune | None:
        if not self.settings.idempotency:
            return None
        found = self.store.find("tunes", title=title, limit=1)
        return self._tune(found[0]) if found else None

    # From rows to answers

    def _row(self, table: Table, row_id: int) -> Row:
        row = self.store.get(table, row_id)
        if row is None:
            raise NotFound(f"there is no {table[:-1]} {row_id}")
        return row

    def _tune(self, row: Row) -> Tune:
        tune_id = row["id"]
        models = [make_link(self.settings, f"{tune_id}/model/{f}", MODEL_LINK_SECONDS) for f in row["files"]]
        if models:
            kept = map(moment_of, sorted(self.folder(tune_id).glob("checkpoints/step-??????"), reverse=True))
            models += [self._moment_link(model) for model in kept if model]
        photos = self._verdicts(row)
        prompts = [self._prompt(p) for p in self.store.find("prompts", tune_id=tune_id, oldest_first=True)]
        return Tune(
            **{key: row[key] for key in Tune.model_fields if key in row and key not in ("photos", "progress")},
            ckpt_url=models[0] if models else None,
            ckpt_urls=models,
            url=f"{self.settings.base_url}/tunes/{tune_id}.json",
            orig_images=[photo.url for photo in photos if photo.url],
            photos=photos,
            progress=Progress(**row["progress"]),
            prompts=prompts,
        )

    def _verdicts(self, row: Row) -> list[Photo]:
        """The verdicts with links to the photos as they came and as they are trained."""
        tune_id, photos = row["id"], [Photo(**photo) for photo in row["photos"]]
        seen = {(Path(one["file"]).stem.rpartition("-")[0]): one["url"] for one in reversed(self.seen(tune_id))}
        for photo in photos:
            stem = Path(photo.file).stem
            gone = row["status"] == "expired"
            if not gone and (photo.dropped is None or not photo.dropped.startswith(SAME_PICTURE)):
                photo.url = make_link(self.settings, f"{tune_id}/images/{photo.file}")
            photo.seen, photo.closeup = seen.get(stem), seen.get(f"{stem}-face")
        return photos

    def _prompt(self, row: Row) -> Prompt:
        tune_id, prompt_id = row["tune_id"], row["id"]
        wanted = row["attributes"]
        folder = f"{tune_id}/prompts/{prompt_id}"
        told = {name: wanted.get(name) or (False if name in FLAGS else None) for name in BESIDE}
        thumbs = [f"{Path(file).stem}.thumb.jpg" for file in row["files"]]
        small = bool(thumbs) and (self.settings.outputs / "tunes" / folder / thumbs[0]).exists()  # older ones have none
        preview = row["status"] == "rendering" and self.folder(tune_id) / "previews" / f"{prompt_id}.jpg"
        return Prompt(
            **{key: row[key] for key in Prompt.model_fields if key in row and key != "progress"},
            **Echo.model_validate(row["kept"] | wanted).model_dump(),
            **told,
            **{
                name: make_link(self.settings, f"{tune_id}/inputs/{prompt_id}/{wanted[name]}")
                if name in wanted
                else None
                for name in PICTURES
            },
            url=f"{self.settings.base_url}/prompts/{prompt_id}.json",
            images=[make_link(self.settings, f"{folder}/{file}") for file in row["files"]],
            thumbnails=[make_link(self.settings, f"{folder}/{file}") for file in (thumbs if small else row["files"])],
            contact_sheet=make_link(self.settings, f"{folder}/{CONTACT_SHEET}") if small and len(thumbs) > 1 else None,
            preview=(
                # The step: a browser would keep the first one.
                make_link(self.settings, f"{tune_id}/previews/{preview.name}") + f"&step={row['progress'].get('step')}"
                if preview and preview.exists()
                else None
            ),
            progress=Progress(**row["progress"]),
            user_error=row["error"],
            tunes=list(dict.fromkeys([tune_id, *(one[1] for one in row["named"] or [])])),
        )


def moment_of(folder: Path) -> Path | None:
    """The file to hand out of a model in mid-run; None where it is not there (any more)."""
    return next((folder / name for name in MOMENT_FILES if (folder / name).exists()), None)


def here(row: Row) -> dict[str, str]:
    """The formats that a tune's own files are in, and where these lie in its folder."""
    return {name: f"model/{file}" for name, file in FORMATS.items() if file in row["files"]}


def numbered(invalid: InvalidRequest, number: int) -> list[str]:
    """What is wrong with one of several prompts, in words that say which."""
    return [f"{number}.{field}: {message}" for field, all_ in invalid.problems.items() for message in all_]


def still_good(kept: Mapping[str, Any]) -> dict[str, Any]:
    """What was kept of an older prompt, when nobody rendered it, as far as it is a request now."""
    good = {}
    for name, value in kept.items():
        if name in (*PICTURES, "controlnet"):  # which would need the picture
            continue
        try:
            parse_request(PromptRequest, {"text": "a", name: value})
        except InvalidRequest:
            continue
        good[name] = value
    return good


def prompt_warnings(request: PromptRequest) -> list[str]:
    """What a prompt asks for and does not get, in words; what only its base can tell comes when it is rendered."""
    told = [f"{name} is accepted and has no effect" for name in request.ignored]
    _, asked, said = flags.split(request.text)
    told += said
    if request.face_swap:
        told.append("face_swap is accepted and not done: there is no model for it whose licence allows its use")
    if request.controlnet in HOSTED_CONTROLS:
        told.append(f"controlnet {request.controlnet} is accepted and not done; there are {', '.join(CONTROLS)}")
    drawn = not (request.has_input and (asked.only_upscale or request.denoising_strength == 0))
    enlarged = request.super_resolution or asked.upscale_factor or asked.only_upscale
    follows = request.controlnet in CONTROLS and drawn
    masked = request.has_mask or (asked.mask_prompt and request.has_input)
    anew = follows and request.controlnet_txt2img and not masked
    lines = [one for one in references(request.text)[1] if one[0] == "lora"]
    for name, lacks in {  # what has no effect, and why
        "aspect_ratio": request.w and request.h and "beside w and h",
        "ar": (request.aspect_ratio and "beside aspect_ratio") or (request.w and request.h and "beside w and h"),
        "hires_fix": not enlarged and "without super_resolution",
        "denoising_strength": (not request.has_input and "without input_image") or (anew and "with controlnet_txt2img"),
        "mask_image": not drawn and "where nothing is drawn",
        "controlnet": request.controlnet in CONTROLS and not drawn and "where nothing is drawn",
        "controlnet_conditioning_scale": not follows and "without controlnet",
        "controlnet_txt2img": (not follows and "without controlnet") or (masked and "beside a mask"),
        "lora_scale": lines and "where the text says a weight",
    }.items():
        if lacks and getattr(request, name):
            told.append(f"{name} has no effect {lacks}")
    for name, lacks in {
        "mask_prompt": (not request.has_input and "without input_image") or (request.has_mask and "beside mask_image"),
        "only_upscale": not request.has_input and "without input_image",
        "mask_negative": not (asked.mask_prompt and masked and not request.has_mask) and "without --mask_prompt",
        "mask_invert": not masked and "without a mask",
        "mask_dilate": not masked and "without a mask",
        "mask_blur": not masked and "without a mask",
        "hires_denoising_strength": not request.hires_fix and "without hires_fix",
        "hires_cfg_scale": not request.hires_fix and "without hires_fix",
        "face_inpaint_denoising": not request.inpaint_faces and "without inpaint_faces",
        "control_guidance_start": not follows and "without controlnet",
        "control_guidance_end": not follows and "without controlnet",
    }.items():
        if lacks and getattr(asked, name):
            told.append(f"--{name} has no effect {lacks}")
    return told


def faceid_problems(request: TuneRequest) -> dict[str, list[str]]:
    """What a request for a faceid cannot have, in words."""
    problems = {}
    if not of_one_person(request.name):
        problems["name"] = [f"faceid is of one person (man, woman, boy, girl, child, ...), not of {request.name}"]
    if request.args:
        problems["args"] = ["faceid trains nothing, so there is nothing to set; leave args out"]
    return problems
