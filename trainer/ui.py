"""The page and the Gradio endpoints: the shared verbs, with a face. No rules, no torch."""

from __future__ import annotations

import asyncio
import functools
import os
import tempfile
from collections.abc import Callable, Coroutine, Iterable, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # nothing is sent anywhere; read at import

import gradio as gr
from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool
from gradio.utils import get_upload_folder

from trainer import packs, page, presets, tools
from trainer.branches import BRANCHES
from trainer.jobs import Jobs
from trainer.methods import METHODS
from trainer.schema import (
    ASPECT_RATIOS,
    CONTROLS,
    ENDED,
    PICTURES,
    SCHEDULERS,
    CannotLook,
    CheckRequest,
    Conflict,
    InvalidRequest,
    NotFound,
    PromptRequest,
    Tell,
    Tune,
    TuneRequest,
    Upload,
    default_caption,
)

WATCH_SECONDS = 1.0
SHELF_SECONDS = 10.0
TUNES_ON_PAGE = 50
PAGE_NUM_IMAGES = 4
OWN = ("branch's own", "")  # the choice that leaves a parameter null
PROMPT_FIELDS = (  # of a prompt, beside its text, in the order in which they are placed
    "num_images", "seed", "aspect_ratio", "style", "steps", "cfg_scale", "w", "h", "negative_prompt", "scheduler",
    "color_grading", "super_resolution", "hires_fix", "film_grain", "inpaint_faces", "face_correct", "use_lpw",
)  # fmt: skip
PACK_FIELDS = ("branch", "model_type", "preset", "base_tune_id")  # that a pack sets in the form
START_FIELDS = (  # of a prompt that starts from a picture
    "input_image", "mask_image", "denoising_strength", "controlnet", "controlnet_conditioning_scale",
    "controlnet_txt2img",
)  # fmt: skip


def mount(app: FastAPI, jobs: Jobs) -> FastAPI:
    """Put the page and the Gradio API onto the REST app."""
    tools.mount(app, [endpoint for endpoint in endpoints(jobs) if endpoint.__name__ != "create_tune"], gr.Error)
    mounted: FastAPI = gr.mount_gradio_app(
        app,
        build(jobs),
        path="/",
        ssr_mode=False,
        show_error=False,  # our own errors are shown all the same; what an unexpected one says stays in the log
        footer_links=["api"],
        max_file_size=f"{jobs.settings.max_image_mb}mb",
        theme=gr.themes.Base(
            primary_hue="orange", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
        ),
        css=page.CSS,
    )
    return mounted


def build(jobs: Jobs) -> gr.Blocks:
    """The page: a form on the left, the tunes on the right."""
    with gr.Blocks(title="Tunebooth", analytics_enabled=False, delete_cache=(3600, 24 * 3600)) as blocks:
        gr.HTML(
            '<div class="tb-head"><h1><i></i>Tunebooth</h1><span>Your photos, your model, your machine.</span></div>'
        )
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=380), gr.Tabs():
                with gr.Tab("New tune"):
                    form = Form(jobs)
                with gr.Tab("More pictures", elem_id="more"):
                    more = PromptForm(jobs)
                with gr.Tab("Packs", elem_id="packs"):
                    shelf = gr.HTML(elem_id="shelf")
            with gr.Column(scale=6, min_width=420):
                gr.Markdown("### Now")
                now = gr.HTML(page.current(None, [], [], 0), elem_id="now")
                seen = gr.HTML(elem_id="trained-pictures")
                gr.Markdown("### All tunes")
                tunes = gr.HTML(elem_id="tunes")
        shown = gr.State(("", "", ""))
        live = [now, seen, tunes, shown]
        watch = functools.partial(live_parts, jobs)
        quiet: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        gr.Timer(WATCH_SECONDS).tick(watch, shown, live, **quiet)
        blocks.load(watch, shown, live, **quiet)
        blocks.load(form.choices, None, [form.fields["base_tune_id"], form.fields["preset"]], **quiet)
        form.checker.click(
            form.check,
            form.inputs,
            [form.thumbnails, *form.outputs],
            api_visibility="private",
            concurrency_limit=None,
            show_progress_on=form.thumbnails,
        )
        form.button.click(
            form.submit,
            form.inputs,
            form.outputs,
            api_visibility="private",
            concurrency_limit=None,
            show_progress="minimal",
        ).then(watch, shown, live, **quiet)
        more.button.click(
            more.submit,
            more.inputs,
            more.note,
            api_visibility="private",
            concurrency_limit=None,
            show_progress="minimal",
        ).then(watch, shown, live, **quiet)
        more.tune.focus(more.choices, None, more.tune, **quiet)
        blocks.load(more.choices, None, more.tune, **quiet)
        stock = functools.partial(pack_shelf, jobs)
        gr.Timer(SHELF_SECONDS).tick(stock, None, [shelf, form.pack], **quiet)
        blocks.load(stock, None, [shelf, form.pack], **quiet)
        form.pack.change(form.take_pack, form.pack, [form.fields[name] for name in PACK_FIELDS], **quiet)
        for endpoint in endpoints(jobs):
            gr.api(endpoint, api_name=endpoint.__name__, concurrency_limit=None)
    return blocks


def live_parts(jobs: Jobs, shown: tuple[str, str, str]) -> tuple[Any, Any, Any, Any]:
    """The live parts of the page, and what they are; what has not changed is left alone, so that nothing folds up or
    flickers."""
    tunes = jobs.list_tunes(limit=TUNES_ON_PAGE)
    running = [tune for tune in tunes if _busy(tune)]
    tune = running[-1] if running else (tunes[0] if tunes else None)
    readings, moments, seen = (part(tune.id) if tune else [] for part in (jobs.readings, jobs.moments, jobs.seen))
    training = next((one.title for one in tunes if one.status == "training"), None)
    waits = f"waits until {training} is trained" if training else ""
    parts = (
        page.current(tune, readings, moments, len(running) - 1 if running else 0, waits),
        page.trained_pictures(seen),
        page.earlier(tunes, {tune.id: beside(jobs, tune.id) for tune in tunes}, waits),
    )
    now, pictures, earlier = (part if part != old else gr.skip() for part, old in zip(parts, shown, strict=True))
    return now, pictures, earlier, parts if parts != shown else gr.skip()


def beside(jobs: Jobs, tune_id: int) -> page.Beside:
    try:
        return page.Beside(jobs.list_callbacks(tune_id), jobs.chain(tune_id), jobs.formats(tune_id))
    except NotFound:  # deleted since it was listed
        return page.Beside()


def pack_shelf(jobs: Jobs) -> tuple[str, Any]:
    """The packs as cards, and as choices."""
    known = jobs.list_packs()
    usable = [(pack["title"], pack["slug"]) for pack in known if "error" not in pack]
    return packs.cards(known), gr.update(choices=[("none", ""), *usable])


def _busy(tune: Tune) -> bool:
    return tune.status not in ENDED or any(prompt.status not in ENDED for prompt in tune.prompts)


def picture_fields(jobs: Jobs) -> dict[str, Any]:
    """Fields for PROMPT_FIELDS, placed where this is called. Numbers are texts: an empty gr.Number turns into 0 when
    its accordion is opened."""
    folder = jobs.settings.presets
    fields: dict[str, Any] = {}

    def choose(name: str, label: str, known: Iterable[str], own: str = "none") -> None:
        fields[name] = gr.Dropdown(choices=[(own, ""), *known], value="", label=label, min_width=110)

    def write(name: str, label: str, placeholder: str = "") -> None:
        fields[name] = gr.Textbox(label=label, placeholder=placeholder, min_width=100)

    with gr.Row():
        fields["num_images"] = gr.Slider(1, 8, PAGE_NUM_IMAGES, step=1, label="Pictures of each prompt")
        write("seed", "Seed", "42")
    with gr.Row():
        choose("aspect_ratio", "Aspect ratio", ASPECT_RATIOS, "base's own")
        choose("style", "Style", presets.styles(folder))
    with gr.Row():
        for name, label in (("steps", "Sampling steps"), ("cfg_scale", "cfg_scale"), ("w", "Width"), ("h", "Height")):
            write(name, label)
    write("negative_prompt", "Negative prompt")
    with gr.Row():
        choose("scheduler", "Scheduler", SCHEDULERS, "base's own")
        choose("color_grading", "Film", presets.film_looks(folder))
    for row in (
        (("super_resolution", "Enlarge"), ("hires_fix", "and add detail"), ("film_grain", "Film grain")),
        (("inpaint_faces", "Redraw faces"), ("face_correct", "Restore faces"), ("use_lpw", "Weights (word:1.2)")),
    ):
        with gr.Row():
            for name, label in row:
                fields[name] = gr.Checkbox(label=label, min_width=110)
    assert tuple(fields) == PROMPT_FIELDS
    return fields


class PromptForm:
    """More pictures of a tune that is there."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs
        self.tune = gr.Dropdown(choices=[], label="Tune", elem_id="prompt-tune")
        text = gr.Textbox(label="Prompt", lines=3, placeholder="ohwx dog in the snow", elem_id="prompt-text")
        self.button = gr.Button("Render", variant="primary", size="lg", elem_id="render")
        self.note = gr.HTML(elem_id="prompt-note")
        shared = picture_fields(jobs)
        with gr.Accordion("Start from a picture", open=False):
            with gr.Row():
                pictures = [
                    gr.File(label=label, file_types=["image"], height=110, elem_id=f"prompt-{name}")
                    for name, label in (("input_image", "Picture"), ("mask_image", "Mask: white is drawn anew"))
                ]
            strength = gr.Textbox(label="Denoising strength: 0 keeps the picture, 1 draws anew", placeholder="0.8")
            with gr.Row():
                kind = gr.Dropdown(choices=[("none", ""), *CONTROLS], value="", label="ControlNet")
                scale = gr.Textbox(label="Its strength", placeholder="1")
            anew = gr.Checkbox(label="Take only its outline (controlnet_txt2img)")
        start = dict(zip(START_FIELDS, (*pictures, strength, kind, scale, anew), strict=True))
        self._fields = {"text": text, **shared, **start}

    @property
    def inputs(self) -> list[Any]:
        return [self.tune, *self._fields.values()]

    def choices(self) -> Any:
        """The tunes there are now that have a model."""
        return gr.update(choices=self._jobs.rendering_tunes())

    def submit(self, tune_id: int | None, *values: Any) -> str:
        """Queue the prompt; returns what is wrong."""
        data = {name: value for name, value in zip(self._fields, values, strict=True) if value not in (None, False)}
        for name in PICTURES:
            if name in data:
                data[name] = Upload(Path(data[name]).name, Path(data[name]))
        try:
            if not tune_id:
                raise InvalidRequest({"tune": ["choose the tune that is to be drawn"]})
            prompt = self._jobs.create_prompt(int(tune_id), data, teller(gr.Progress()))
            gr.Info(f"prompt {prompt.id} is queued", duration=4)
        except NotFound as gone:
            return note([str(gone)])
        except InvalidRequest as invalid:
            return note([f"{field}: {'; '.join(told)}" for field, told in invalid.problems.items()])
        return ""


class Form:
    """The fields of the page, each under the parameter's own name, each with room for what is wrong with it."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs
        self.fields: dict[str, Any] = {}
        self._notes: dict[str, gr.HTML] = {}
        self._folds: list[tuple[gr.Accordion, tuple[str, ...]]] = []
        add = self._add
        add("images", gr.File, label="Photos", file_count="multiple", file_types=["image", ".txt"], height=140)
        self.thumbnails = gr.HTML(elem_id="thumbnails")
        self.fields["images"].change(
            self.dropped,
            self.fields["images"],
            self.thumbnails,
            queue=False,
            show_progress="hidden",
            api_visibility="private",
        )
        with gr.Row():
            add("name", gr.Textbox, label="Class name", placeholder="man, woman, dog, toy, style")
            add("title", gr.Textbox, label="Title", placeholder="made up when left empty")
        with gr.Row():
            add("branch", gr.Dropdown, choices=list(BRANCHES), value="fast", label="Branch")
            add("model_type", gr.Dropdown, choices=[OWN, *METHODS], value="lora", label="Model type")
        with gr.Row():
            add("preset", gr.Dropdown, choices=[OWN], value="", label="Preset")
            add("token", gr.Textbox, label="Token", placeholder="ohwx (sd15: sks)")
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
        quiet: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
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
        with self._fold("Characteristics", "characteristics"):
            gr.Markdown("`{{eye_color}}` in a prompt becomes the value of the key `eye_color`.")
            table = {"headers": ["key", "value"], "value": [["", ""], ["", ""]], "column_count": 2, "type": "array"}
            add("characteristics", gr.Dataframe, interactive=True, show_label=False, **table)
        with self._fold("Pictures", "prompts_attributes"):
            self._prompt_fields = list(picture_fields(self._jobs).values())
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

    def _add(self, name: str, component: type[Any], **options: Any) -> None:
        """Place a field, with room for what is wrong with it right below."""
        with gr.Column(min_width=160, elem_classes="tb-field"):
            self.fields[name] = component(elem_id=f"field-{name}", **options)
            self._notes[name] = gr.HTML(elem_id=f"note-{name}")

    def _fold(self, label: str, *names: str) -> gr.Accordion:
        """A part that is folded up until it is opened, or until something is wrong with one of its fields."""
        self._folds.append((gr.Accordion(label, open=False), names))
        return self._folds[-1][0]

    @property
    def inputs(self) -> list[Any]:
        return [*self.fields.values(), *self._prompt_fields, self._captions, self._automatic, self.pack]

    def take_pack(self, slug: str) -> list[Any]:
        """The settings of a pack, put into the form, where they can be changed."""
        if not slug:
            return [gr.skip() for _ in PACK_FIELDS]
        pack = self._jobs.get_pack(slug)
        return [pack[name] or (0 if name == "base_tune_id" else "") for name in PACK_FIELDS]

    @property
    def outputs(self) -> list[Any]:
        return [*self._notes.values(), self._other, *(fold for fold, _ in self._folds)]

    def choices(self) -> tuple[Any, Any]:
        """The bases and presets there are now: files may have been added since the start."""
        found = self._jobs.list_base_tunes()
        bases = [(f"{b['title']} ({'cannot be used' if b['error'] else b['branch']})", b["id"]) for b in found]
        named = [OWN, *((name, name) for name in self._jobs.list_presets())]
        earlier = self._jobs.earlier_tunes()
        return gr.update(choices=[("branch's own", 0), *earlier, *bases]), gr.update(choices=named)

    def dropped(self, paths: list[str] | None) -> str:
        """The photos that were dropped, small; and the process that looks at them is started meanwhile."""
        if paths:
            self._jobs.looker.warm()
        return thumbnails(paths)

    def check(self, *values: Any) -> list[Any]:
        """Show a verdict for each photo; then as `submit`."""
        data, uploads = self._read(values)
        asked = {name: data[name] for name in CheckRequest.parameters() if name in data}
        try:
            verdicts = page.verdicts(self._jobs.check_photos(asked, uploads, teller(gr.Progress())))
            return [verdicts, *self._told({})]
        except InvalidRequest as invalid:
            return [gr.skip(), *self._told(invalid.problems)]
        except CannotLook as problem:
            return [gr.skip(), *self._told({"images": [str(problem)]})]

    def _read(self, values: Sequence[Any]) -> tuple[dict[str, Any], list[Upload]]:
        """What stands in the fields, and the files."""
        data = dict(zip(self.fields, values, strict=False))
        uploads = [Upload(Path(path).name, Path(path)) for path in data.pop("images") or []]
        data["base_tune_id"] = data["base_tune_id"] or None
        data["image_urls"] = str(data["image_urls"] or "").split()
        return data, uploads

    def submit(self, *values: Any) -> list[Any]:
        """Create the tune; returns what is wrong beside each field, what is wrong elsewhere, and what to unfold."""
        data, uploads = self._read(values)
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
            with tempfile.TemporaryDirectory() as folder:
                uploads = with_captions(uploads, rows, automatic, Path(folder))
                if pack:
                    usual = {"num_images": PAGE_NUM_IMAGES}
                    changed = {name: value for name, value in shared.items() if value and value != usual.get(name)}
                    # An empty field would take the pack's own away; those of PACK_FIELDS show it.
                    given = {name: value for name, value in data.items() if name in PACK_FIELDS or value}
                    data = given | {"prompt_attributes": changed}
                    tune, _ = self._jobs.create_pack_tune(pack, data, uploads, teller(gr.Progress()))
                else:
                    tune, _ = self._jobs.create_tune(data, uploads, teller(gr.Progress()))
            gr.Info(f"{tune.title} is queued", duration=4)
        except InvalidRequest as invalid:
            problems = invalid.problems
        return self._told(problems)

    def _told(self, problems: dict[str, list[str]]) -> list[Any]:
        """What is wrong beside each field, what is wrong elsewhere, and what to unfold."""
        if problems:
            gr.Warning("The form needs a look: what is wrong is said beside the field.", duration=6)
        other = [f"{field}: {'; '.join(told)}" for field, told in problems.items() if field not in self._notes]
        unfold = [gr.update(open=True) if set(names) & set(problems) else gr.skip() for _, names in self._folds]
        return [*(note(problems.get(name, [])) for name in self._notes), note(other), *unfold]

    def caption(
        self, paths: list[str] | None, name: str, token: str, branch: str, rows: list[list[str]], automatic: str
    ) -> tuple[list[list[str]], str]:
        """A row for each photo: what was written there, else the text file that came along, else the automatic one."""
        token = (token or "").strip() or presets.default_token(self._jobs.settings.presets, branch)
        now = default_caption(token, name.strip()) if (name or "").strip() else ""
        written = {photo: caption for photo, caption in rows or [] if caption and caption != automatic}
        files = [Path(path) for path in paths or []]
        texts = {file.stem: file for file in files if file.suffix.lower() == ".txt"}
        table = []
        for photo in (file for file in files if file.suffix.lower() != ".txt"):
            text = texts.get(photo.stem)
            given = text.read_text("utf-8", errors="replace").strip() if text else now
            table.append([photo.name, written.get(photo.name, given)])
        return table, now

    def _unique_title(self, title: str, name: str) -> str:
        title = title or f"{name or 'tune'} {datetime.now(UTC):%Y-%m-%d %H:%M}"
        number, unique = 1, title
        while self._jobs.list_tunes(limit=1, title=unique):
            number += 1
            unique = f"{title} ({number})"
        return unique


def with_captions(uploads: list[Upload], rows: list[list[str]], automatic: str, folder: Path) -> list[Upload]:
    """The uploads with a text file for each caption that was written; it takes the place of one that came along."""
    written = {Path(photo).stem: caption for photo, caption in rows or [] if caption and caption.strip() != automatic}
    kept = [one for one in uploads if not (one.name.lower().endswith(".txt") and Path(one.name).stem in written)]
    for stem in {Path(one.name).stem for one in kept} & written.keys():
        file = folder / f"{stem}.txt"
        file.write_text(written[stem], "utf-8")
        kept.append(Upload(file.name, file))
    return kept


def note(messages: list[str]) -> str:
    return "".join(f'<p class="tb-note" role="alert">{escape(message)}</p>' for message in messages)


def teller(progress: Any) -> Tell:
    """Tell a Gradio progress bar how far a request has come."""
    return lambda what, done, of: progress((done, of), what)


def thumbnails(paths: list[str] | None) -> str:
    """The photos that were dropped, small, in the order of the list."""
    pictures = [path for path in paths or [] if not path.lower().endswith(".txt")]
    images = "".join(
        f'<img src="/gradio_api/file={escape(path)}" alt="{escape(Path(path).name)}">' for path in pictures
    )
    return f'<div class="tb-photos">{images}</div>' if images else ""


def endpoints(jobs: Jobs) -> list[Callable[..., Any]]:
    """The functions that gradio_client calls. Types are told, not enforced, by Gradio: `schema` checks them."""

    @spoken
    async def submit_tune(
        name: str = "",
        title: str = "",
        images: list[gr.FileData] | None = None,
        image_urls: list[str] | None = None,
        callback: str | None = None,
        branch: str | None = None,
        steps: int | None = None,
        token: str | None = None,
        face_crop: bool | None = None,
        training_face_correct: bool | None = None,
        base_tune_id: int | None = None,
        model_type: str | None = None,
        auto_extend: bool | None = None,
        preset: str | None = None,
        characteristics: dict[str, str] | None = None,
        prompts_attributes: list[dict[str, Any]] | None = None,
        args: str | None = None,
        prompts_callback: str | None = None,
    ) -> dict[str, Any]:
        """Create a tune and answer at once."""
        given = locals()
        values = {key: given[key] for key in TuneRequest.parameters() if given[key] is not None}
        uploads = [_upload(image) for image in values.pop("images", [])]
        tune, _ = await run_in_threadpool(jobs.create_tune, values, uploads, teller(gr.Progress()))
        return tune.model_dump()

    @spoken
    async def check_photos(
        images: list[gr.FileData] | None = None,
        image_urls: list[str] | None = None,
        name: str | None = None,
        branch: str | None = None,
        preset: str | None = None,
        face_crop: bool | None = None,
        training_face_correct: bool | None = None,
        base_tune_id: int | None = None,
        model_type: str | None = None,
        args: str | None = None,
    ) -> dict[str, Any]:
        """A verdict for each photo, as a tune with these parameters would give it; nothing is kept."""
        given = locals()
        values = {key: given[key] for key in CheckRequest.parameters() if given[key] is not None}
        uploads = [_upload(image) for image in values.pop("images", [])]
        return (await run_in_threadpool(jobs.check_photos, values, uploads, teller(gr.Progress()))).model_dump()

    async def submit_and_wait(*positional: Any, **named: Any) -> dict[str, Any]:
        tune = Tune(**await submit_tune(*positional, **named))
        progress = gr.Progress()
        while _busy(tune):
            where = tune.progress
            loss = "" if where.loss is None else f", loss {where.loss:.4f}"
            share = where.step / where.steps if where.steps else 0.0
            steps = f": step {where.step} of {where.steps}" if where.steps else ""
            progress(share, f"{where.stage}{steps}{loss}")
            await asyncio.sleep(WATCH_SECONDS)
            tune = await run_in_threadpool(jobs.get_tune, tune.id)
        if tune.status == "failed":
            raise gr.Error(tune.error or "the tune failed", print_exception=False)
        return tune.model_dump()

    create_tune = functools.wraps(submit_tune)(spoken(submit_and_wait))  # the same parameters, written once
    create_tune.__name__ = "create_tune"
    create_tune.__doc__ = "Create a tune and wait for it and its prompts; it goes on when the caller leaves."

    @spoken
    async def get_tune(tune_id: int) -> dict[str, Any]:
        """One tune with its prompts."""
        return (await run_in_threadpool(jobs.get_tune, tune_id)).model_dump()

    @spoken
    async def list_tunes(
        limit: int = 20,
        offset: int = 0,
        title: str | None = None,
        branch: str | None = None,
        model_type: str | None = None,
    ) -> list[dict[str, Any]]:
        """Tunes, newest first."""
        tunes = await run_in_threadpool(jobs.list_tunes, limit, offset, None, title, branch, model_type)
        return [tune.model_dump() for tune in tunes]

    @spoken
    async def cancel_tune(tune_id: int) -> dict[str, Any]:
        """Stop a tune, within one step; its state is kept for resume_tune."""
        return (await run_in_threadpool(jobs.cancel_tune, tune_id)).model_dump()

    @spoken
    async def resume_tune(tune_id: int) -> dict[str, Any]:
        """Queue a canceled or failed tune again; it goes on from its last state."""
        return (await run_in_threadpool(jobs.resume_tune, tune_id)).model_dump()

    @spoken
    async def delete_tune(tune_id: int) -> dict[str, str]:
        """Remove a tune, its prompts and its files."""
        await run_in_threadpool(jobs.delete_tune, tune_id)
        return {"message": "Tune successfully deleted"}

    @spoken
    async def create_prompt(
        tune_id: int,
        text: str,
        negative_prompt: str | None = None,
        num_images: int | None = None,
        seed: int | None = None,
        steps: int | None = None,
        cfg_scale: float | None = None,
        w: int | None = None,
        h: int | None = None,
        callback: str | None = None,
        aspect_ratio: str | None = None,
        ar: str | None = None,
        scheduler: str | None = None,
        use_lpw: bool | None = None,
        lora_scale: float | None = None,
        style: str | None = None,
        color_grading: str | None = None,
        film_grain: bool | None = None,
        super_resolution: bool | None = None,
        hires_fix: bool | None = None,
        inpaint_faces: bool | None = None,
        face_correct: bool | None = None,
        face_swap: bool | None = None,
        input_image: gr.FileData | None = None,
        input_image_url: str | None = None,
        mask_image: gr.FileData | None = None,
        mask_image_url: str | None = None,
        denoising_strength: float | None = None,
        controlnet: str | None = None,
        controlnet_conditioning_scale: float | None = None,
        controlnet_txt2img: bool | None = None,
    ) -> dict[str, Any]:
        """Render a prompt with a tune."""
        given = locals()
        values = {key: given[key] for key in PromptRequest.parameters() if given[key] is not None}
        values |= {name: _upload(values[name], name) for name in PICTURES if name in values}
        tell = teller(gr.Progress())
        return (await run_in_threadpool(jobs.create_prompt, tune_id, values, tell)).model_dump()

    @spoken
    async def get_prompt(prompt_id: int) -> dict[str, Any]:
        """One prompt with its pictures."""
        return (await run_in_threadpool(jobs.get_prompt, prompt_id)).model_dump()

    @spoken
    async def list_prompts(tune_id: int | None = None, limit: int = 20, offset: int = 0) -> list[dict[str, Any]]:
        """Prompts, newest first."""
        prompts = await run_in_threadpool(jobs.list_prompts, tune_id, limit, offset)
        return [prompt.model_dump() for prompt in prompts]

    @spoken
    async def delete_prompt(prompt_id: int) -> dict[str, str]:
        """Remove a prompt and its pictures."""
        await run_in_threadpool(jobs.delete_prompt, prompt_id)
        return {"message": "Prompt successfully deleted"}

    @spoken
    async def list_base_tunes(branch: str | None = None) -> list[dict[str, Any]]:
        """Base models that a tune can start from."""
        return await run_in_threadpool(jobs.list_base_tunes, branch)

    @spoken
    async def list_presets() -> list[str]:
        """Names for the parameter preset."""
        return await run_in_threadpool(jobs.list_presets)

    return [
        create_tune, submit_tune, get_tune, list_tunes, cancel_tune, resume_tune, delete_tune,
        create_prompt, get_prompt, list_prompts, delete_prompt, list_base_tunes, list_presets, check_photos,
    ]  # fmt: skip


def spoken(endpoint: Callable[..., Coroutine[Any, Any, Any]]) -> Callable[..., Coroutine[Any, Any, Any]]:
    """Our own errors reach the client as `gr.Error` texts, others do not."""

    @functools.wraps(endpoint)
    async def wrapped(*positional: Any, **named: Any) -> Any:
        try:
            return await endpoint(*positional, **named)
        except (InvalidRequest, NotFound, Conflict, CannotLook) as problem:
            raise gr.Error(str(problem), print_exception=False) from None

    return wrapped


def _upload(image: Any, name: str = "images") -> Upload:
    if not isinstance(image, dict) or not image.get("path"):
        raise InvalidRequest({name: ["must be files: handle_file('photo.jpg') of gradio_client makes one"]})
    path = Path(str(image["path"])).resolve()
    # Gradio itself checks only what says that it is a file of its; anything else would be any file of this machine.
    if not path.is_relative_to(Path(get_upload_folder()).resolve()) or not path.is_file():
        raise InvalidRequest({name: ["must be files that were uploaded: handle_file('photo.jpg') does that"]})
    return Upload(Path(str(image.get("orig_name") or path)).name, path)
