"""The form of the page that creates a tune."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components import Component

from trainer.config import looks
from trainer.config.kinds import default_caption
from trainer.contract.disk import DiskProblem
from trainer.contract.errors import AnalysisUnavailable, Conflict, InvalidRequest, NotFound
from trainer.contract.photos import Upload
from trainer.contract.prompts import ASPECT_RATIOS, SCHEDULERS
from trainer.contract.tunes import CheckRequest
from trainer.names import BRANCHES, DEFAULT_METHOD, DEMO_BRANCH, METHODS
from trainer.studio import models, pack_verbs, settle, tunes
from trainer.studio.chosen import chosen
from trainer.studio.rows import Services
from trainer.web import html, spool
from trainer.web.caption_table import Rows, table, with_captions
from trainer.web.choices import look_names, token_of, usual_tokens
from trainer.web.html import note, thumbnails
from trainer.web.progress import progress_callback

PAGE_NUM_IMAGES = 4
OWN = ("branch's own", "")  # the choice that leaves a parameter null
PROMPT_FIELDS = (  # parameters of a prompt without its text, in the order of the page
    "num_images", "seed", "aspect_ratio", "style", "steps", "cfg_scale", "w", "h", "negative_prompt", "scheduler",
    "color_grading", "super_resolution", "hires_fix", "film_grain", "inpaint_faces", "face_correct", "use_lpw",
)  # fmt: skip
PACK_FIELDS = ("branch", "model_type", "preset", "base_tune_id")  # parameters that a pack sets in the form


def picture_fields(services: Services) -> dict[str, Component]:
    """The components of PROMPT_FIELDS. Numbers are text fields: an empty gr.Number becomes 0 in an opened accordion."""
    folder = services.settings.presets
    fields: dict[str, Component] = {}

    def choose(name: str, label: str, known: Iterable[str], own: str = "none") -> None:
        fields[name] = gr.Dropdown(choices=[(own, ""), *known], value="", label=label, min_width=110)

    def write(name: str, label: str, placeholder: str = "") -> None:
        fields[name] = gr.Textbox(label=label, placeholder=placeholder, min_width=100)

    with gr.Row():
        fields["num_images"] = gr.Slider(1, 8, PAGE_NUM_IMAGES, step=1, label="Pictures of each prompt")
        write("seed", "Seed", "42")
    with gr.Row():
        choose("aspect_ratio", "Aspect ratio", ASPECT_RATIOS, "base's own")
        choose("style", "Style", look_names("styles", looks.styles, folder))
    with gr.Row():
        for name, label in (("steps", "Sampling steps"), ("cfg_scale", "cfg_scale"), ("w", "Width"), ("h", "Height")):
            write(name, label)
    write("negative_prompt", "Negative prompt")
    with gr.Row():
        choose("scheduler", "Scheduler", SCHEDULERS, "base's own")
        choose("color_grading", "Film", look_names("film", looks.film_looks, folder))
    for row in (
        (("super_resolution", "Enlarge"), ("hires_fix", "and add detail"), ("film_grain", "Film grain")),
        (("inpaint_faces", "Redraw faces"), ("face_correct", "Restore faces"), ("use_lpw", "Weights (word:1.2)")),
    ):
        with gr.Row():
            for name, label in row:
                fields[name] = gr.Checkbox(label=label, min_width=110)
    assert tuple(fields) == PROMPT_FIELDS
    return fields


class Form:
    """The form that creates a tune. Each field has the name of its parameter, and a place for its errors."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self.fields: dict[str, Component] = {}
        self._notes: dict[str, gr.HTML] = {}
        self._folds: list[tuple[gr.Accordion, tuple[str, ...]]] = []
        add = self._add
        # Of any type: a whole folder may be dropped, with the leftovers in it, which are left out with a note.
        add("images", gr.File, label="Photos, or a zip of them", file_count="multiple", height=140)
        self.thumbnails = gr.HTML(elem_id="thumbnails")
        self.fields["images"].change(
            self.dropped,
            self.fields["images"],
            self.thumbnails,
            queue=False,
            show_progress="hidden",
            api_visibility="private",
        )
        spool.forget_removed(self.fields["images"])
        with gr.Row():
            add("name", gr.Textbox, label="Class name", placeholder="man, woman, dog, toy, style")
            add("title", gr.Textbox, label="Title", placeholder="made up when left empty")
        with gr.Row():
            add("branch", gr.Dropdown, choices=list(BRANCHES), value=DEMO_BRANCH, label="Branch")
            add("model_type", gr.Dropdown, choices=[OWN, *METHODS], value=DEFAULT_METHOD, label="Model type")
        with gr.Row():
            add("preset", gr.Dropdown, choices=[OWN], value="", label="Preset")
            add("token", gr.Textbox, label="Token", placeholder=usual_tokens(services.settings.presets))
            self.pack = gr.Dropdown(choices=[("none", "")], value="", label="Pack", elem_id="pack", min_width=110)
        with self._fold("Captions", "captions"):
            gr.Markdown(
                "What each photo is called while it is trained. Write what is not the subject: place, light, clothes."
            )
            self._captions = gr.Dataframe(
                headers=["photo", "caption"], column_count=2, type="array", interactive=True, static_columns=[0],
                show_label=False, elem_id="captions",
            )  # fmt: skip
            self._automatic = gr.State("")
        named = [self.fields[name] for name in ("images", "name", "token", "branch")]
        quiet = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        captions = [self._captions, self._automatic]
        gr.on([field.change for field in named], self.caption, [*named, *captions], captions, **quiet)
        add(
            "prompts_attributes",
            gr.Textbox,
            label="Prompts, one on each line",
            lines=3,
            placeholder="ohwx dog in the snow",
        )
        with gr.Row():
            self.checker = gr.Button("Check photos", size="lg", elem_id="check", scale=1)
            self.button = gr.Button("Create tune", variant="primary", size="lg", elem_id="create", scale=2)
        self._other = gr.HTML()
        self._advanced()

    def _advanced(self) -> None:
        """The accordions below the buttons."""
        add = self._add
        with self._fold("Characteristics", "characteristics"):
            gr.Markdown("`{{eye_color}}` in a prompt becomes the value of the key `eye_color`.")
            table = {"headers": ["key", "value"], "value": [["", ""], ["", ""]], "column_count": 2, "type": "array"}
            add("characteristics", gr.Dataframe, interactive=True, show_label=False, **table)
        with self._fold("Pictures", "prompts_attributes"):
            self._prompt_fields = list(picture_fields(self._services).values())
        with self._fold("Advanced", "base_tune_id", "steps", "args", "face_crop", "image_urls", "callback"):
            add("base_tune_id", gr.Dropdown, choices=[("branch's own", 0)], value=0, label="Base tune")
            with gr.Row():
                add("steps", gr.Textbox, label="Training steps", placeholder="as the preset says")
                add("args", gr.Textbox, label="Args", placeholder="rank=32 lr=2e-4 seed=7")
            choices = [("as set up", ""), ("yes", "true"), ("no", "false")]
            add("face_crop", gr.Dropdown, choices=choices, value="", label="Face crop")
            with gr.Row():
                add("training_face_correct", gr.Checkbox, label="Restore faces")
                add("auto_extend", gr.Checkbox, label="Renew at expiry")
            add("image_urls", gr.Textbox, label="Image URLs, one on each line", lines=2)
            add("callback", gr.Textbox, label="Callback URL")
            add("prompts_callback", gr.Textbox, label="Callback URL when all prompts are rendered")

    def _add(self, name: str, component: type[Component], **options: object) -> None:
        """Add a field, with a place for its errors below it."""
        with gr.Column(min_width=160, elem_classes="tb-field"):
            self.fields[name] = component(elem_id=f"field-{name}", **options)
            self._notes[name] = gr.HTML(elem_id=f"note-{name}")

    def _fold(self, label: str, *names: str) -> gr.Accordion:
        """An accordion that opens by a click, or if one of its fields has an error."""
        self._folds.append((gr.Accordion(label, open=False), names))
        return self._folds[-1][0]

    @property
    def inputs(self) -> list[Component]:
        return [*self.fields.values(), *self._prompt_fields, self._captions, self._automatic, self.pack]

    def take_pack(self, slug: str) -> list[object]:
        """Fill the form with the settings of a pack; the user may change them."""
        if not slug:
            return [gr.skip() for _ in PACK_FIELDS]
        try:
            pack = pack_verbs.get_pack(self._services, slug)
        except (Conflict, NotFound) as problem:  # its file has changed since the list was made
            gr.Warning(str(problem))
            return [gr.skip() for _ in PACK_FIELDS]
        return [pack[name] or (0 if name == "base_tune_id" else "") for name in PACK_FIELDS]

    @property
    def outputs(self) -> list[Component]:
        return [*self._notes.values(), self._other, *(fold for fold, _ in self._folds)]

    def choices(self) -> tuple[object, object]:
        """The current bases and presets: files may have been added since the start."""
        found = models.list_base_tunes(self._services)
        bases = [(f"{b['title']} ({'cannot be used' if b['error'] else b['branch']})", b["id"]) for b in found]
        named = [OWN, *((name, name) for name in settle.list_presets(self._services))]
        earlier = models.earlier_tunes(self._services)
        return gr.update(choices=[("branch's own", 0), *earlier, *bases]), gr.update(choices=named)

    def dropped(self, paths: list[str] | None) -> str:
        """Thumbnails of the chosen photos; the process that analyzes them is started as well."""
        if paths:
            self._services.analyzer.warm()
        found = chosen(self._services, paths)
        return thumbnails(found.single, found.notes, self._services.settings.prefix)

    def check(self, *values: Any) -> list[object]:
        """Show a verdict for each photo; then the errors, as in `submit`."""
        data, uploads = self._read(values)
        *_, rows, automatic, _ = values
        asked = {name: data[name] for name in CheckRequest.parameters() if name in data}
        try:
            spool.check_uploads("images", uploads)
            with self._with_captions(uploads, rows, automatic) as sent:
                verdicts = html.verdicts(
                    tunes.check_photos(self._services, asked, sent, progress_callback(gr.Progress()))
                )
            return [verdicts, *self._show_errors({})]
        except InvalidRequest as invalid:
            return [gr.skip(), *self._show_errors(invalid.problems)]
        except (AnalysisUnavailable, DiskProblem) as problem:
            return [gr.skip(), *self._show_errors({"images": [str(problem)]})]

    @contextmanager
    def _with_captions(self, uploads: list[Upload], rows: Rows, automatic: str) -> Iterator[list[Upload]]:
        """The uploads with the captions that were edited in the table."""
        incoming = self._services.settings.outputs / "incoming"
        incoming.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=incoming) as folder:
            found = chosen(self._services, [str(upload.path) for upload in uploads]).photos
            yield with_captions(uploads, rows, automatic, Path(folder), found)

    def _read(self, values: Sequence[Any]) -> tuple[dict[str, Any], list[Upload]]:
        """The values of the fields, and the files."""
        data = dict(zip(self.fields, values, strict=False))
        uploads = [Upload(Path(path).name, Path(path)) for path in data.pop("images") or []]
        data["base_tune_id"] = data["base_tune_id"] or None
        data["image_urls"] = str(data["image_urls"] or "").split()
        return data, uploads

    def submit(self, *values: Any) -> list[object]:
        """Create the tune; returns the updates of `_show_errors`, and of the photos: they leave the form when they
        were taken in."""
        data, uploads = self._read(values)
        sent = [upload.path for upload in uploads]
        *_, rows, automatic, pack = values
        shared = dict(zip(PROMPT_FIELDS, values[len(self.fields) : -3], strict=True))
        name = str(data["name"] or "").strip()
        data["title"] = self._unique_title(str(data["title"] or "").strip(), name)
        lines = str(data["prompts_attributes"] or "").splitlines()
        data["prompts_attributes"] = [{"text": line.strip(), **shared} for line in lines if line.strip()]
        written = [row for row in data["characteristics"] or [] if any(str(cell or "").strip() for cell in row)]
        data["characteristics"] = {str(key or "").strip(): str(value or "").strip() for key, value in written}
        problems: dict[str, list[str]] = {}
        try:
            spool.check_uploads("images", uploads)
            with self._with_captions(uploads, rows, automatic) as uploads:
                if pack:
                    usual = {"num_images": PAGE_NUM_IMAGES}
                    changed = {name: value for name, value in shared.items() if value and value != usual.get(name)}
                    # An empty field would delete the pack's value; PACK_FIELDS are sent, since the form shows them.
                    given = {name: value for name, value in data.items() if name in PACK_FIELDS or value}
                    data = given | {"prompt_attributes": changed}
                    tune, _ = pack_verbs.create_pack_tune(
                        self._services, pack, data, uploads, progress_callback(gr.Progress())
                    )
                else:
                    tune, _ = tunes.create_tune(self._services, data, uploads, progress_callback(gr.Progress()))
            spool.forget(sent)
            gr.Info(f"{tune.title} is queued", duration=4)
        except InvalidRequest as invalid:
            problems = invalid.problems
        except DiskProblem as problem:
            problems = {"images": [problem.as_refusal()]}
        return [*self._show_errors(problems), gr.skip() if problems else None]

    def _show_errors(self, problems: dict[str, list[str]]) -> list[object]:
        """Updates of the page: the errors below each field, other errors, and the accordions to open."""
        if problems:
            gr.Warning("Please check the form: the error is shown below each wrong field.", duration=6)
        other = [f"{field}: {'; '.join(messages)}" for field, messages in problems.items() if field not in self._notes]
        unfold = [gr.update(open=True) if set(names) & set(problems) else gr.skip() for _, names in self._folds]
        return [*(note(problems.get(name, [])) for name in self._notes), note(other), *unfold]

    def caption(
        self, paths: list[str] | None, name: str, token: str, branch: str, rows: list[list[str]], automatic: str
    ) -> tuple[list[list[str]], str]:
        """A caption for each photo: the edited one, else that of the uploaded text file, else the automatic one."""
        token = (token or "").strip() or token_of(self._services.settings.presets, branch) or ""
        now = default_caption(token, name.strip()) if (name or "").strip() else ""
        spool.note_use(paths or [])
        return table(rows, chosen(self._services, paths).photos, automatic, now), now

    def _unique_title(self, title: str, name: str) -> str:
        title = title or f"{name or 'tune'} {datetime.now(UTC):%Y-%m-%d %H:%M}"
        number, unique = 1, title
        while tunes.list_tunes(self._services, limit=1, title=unique):
            number += 1
            unique = f"{title} ({number})"
        return unique
