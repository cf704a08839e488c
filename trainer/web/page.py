"""The page and the Gradio endpoints. No rules, no torch."""

from __future__ import annotations

import functools
import os

import gradio as gr
from fastapi import FastAPI
from starlette.routing import Mount

from trainer.contract.errors import NotFound
from trainer.studio import answers, models, pack_verbs
from trainer.studio.folders import find_orphans, orphans_note
from trainer.studio.rows import Services
from trainer.studio.tunes import list_callbacks, list_tunes
from trainer.web import html, mcp, spool
from trainer.web.endpoints import endpoints
from trainer.web.form import PACK_FIELDS, Form
from trainer.web.html import TuneDetails
from trainer.web.paths import answer_as_rest
from trainer.web.progress import WATCH_SECONDS, busy
from trainer.web.prompt_form import PromptForm
from trainer.web.templating import render

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # nothing is sent anywhere; read at import
SHELF_SECONDS = 10.0
TUNES_ON_PAGE = 50


def mount(app: FastAPI, services: Services) -> FastAPI:
    """Mount the page and the Gradio API on the REST app."""
    spool.take_over(services.settings.outputs)
    spool.add_route(app, services.settings.max_body_mb * 2**20)
    mcp.mount(app, [endpoint for endpoint in endpoints(services) if endpoint.__name__ != "create_tune"], gr.Error)
    mounted: FastAPI = gr.mount_gradio_app(
        app,
        build(services),
        path="/",
        ssr_mode=False,
        show_error=False,  # our own errors are still shown; unexpected ones are only in the log
        footer_links=["api"],
        max_file_size=f"{services.settings.max_body_mb}mb",  # a zip, or a video that is left out
        theme=gr.themes.Base(
            primary_hue="orange", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
        ),
        css=html.CSS,
    )
    for route in mounted.routes:
        if isinstance(route, Mount) and route.path == "" and isinstance(route.app, FastAPI):
            answer_as_rest(route.app)
    return mounted


def build(services: Services) -> gr.Blocks:
    """The page: forms on the left, tunes on the right."""
    with gr.Blocks(title="Tunebooth", analytics_enabled=False) as blocks:
        orphans = find_orphans(services.store, services.settings.outputs)
        gr.HTML(render("head.html", note=orphans_note(orphans, services.settings.outputs)))
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=380), gr.Tabs():
                with gr.Tab("New tune"):
                    form = Form(services)
                with gr.Tab("More pictures", elem_id="more"):
                    more = PromptForm(services)
                with gr.Tab("Packs", elem_id="packs"):
                    shelf = gr.HTML(elem_id="shelf")
            with gr.Column(scale=6, min_width=420):
                gr.Markdown("### Now")
                now = gr.HTML(html.current(None, [], [], 0), elem_id="now")
                seen = gr.HTML(elem_id="trained-pictures")
                gr.Markdown("### All tunes")
                tunes = gr.HTML(elem_id="tunes")
        shown = gr.State(("", "", ""))
        live = [now, seen, tunes, shown]
        watch = functools.partial(live_parts, services)
        quiet = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        pressed = {"concurrency_limit": None, "show_progress": "minimal", "api_visibility": "private"}
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
        created = [*form.outputs, form.fields["images"]]
        form.button.click(form.submit, form.inputs, created, **pressed).then(watch, shown, live, **quiet)
        more.button.click(more.submit, more.inputs, more.outputs, **pressed).then(watch, shown, live, **quiet)
        more.tune.focus(more.choices, None, more.tune, **quiet)
        blocks.load(more.choices, None, more.tune, **quiet)
        stock = functools.partial(pack_shelf, services)
        gr.Timer(SHELF_SECONDS).tick(stock, None, [shelf, form.pack], **quiet)
        blocks.load(stock, None, [shelf, form.pack], **quiet)
        form.pack.change(form.take_pack, form.pack, [form.fields[name] for name in PACK_FIELDS], **quiet)
        for endpoint in endpoints(services):
            gr.api(endpoint, api_name=endpoint.__name__, concurrency_limit=None)
    return blocks


def live_parts(services: Services, shown: tuple[str, str, str]) -> tuple[object, object, object, object]:
    """The live parts of the page, and their HTML for the next call; unchanged parts are skipped, to avoid flicker."""
    tunes = list_tunes(services, limit=TUNES_ON_PAGE)
    running = [tune for tune in tunes if busy(tune)]
    tune = running[-1] if running else (tunes[0] if tunes else None)
    readings, snapshots, seen = (
        part(tune.id) if tune else []
        for part in (
            functools.partial(answers.readings, services),
            functools.partial(answers.saved_snapshots, services),
            functools.partial(answers.trained_pictures, services),
        )
    )
    training = next((one.title for one in tunes if one.status == "training"), None)
    waits = f"waits until {training} is trained" if training else ""
    alerts = [alert for alert in (services.store.hold, services.settings.models_problem()) if alert]
    parts = (
        html.current(tune, readings, snapshots, len(running) - 1 if running else 0, waits, alerts),
        html.trained_pictures(seen),
        html.earlier(tunes, {tune.id: details(services, tune.id) for tune in tunes}, waits),
    )
    now, pictures, earlier = (part if part != old else gr.skip() for part, old in zip(parts, shown, strict=True))
    return now, pictures, earlier, parts if parts != shown else gr.skip()


def details(services: Services, tune_id: int) -> TuneDetails:
    try:
        return TuneDetails(
            list_callbacks(services, tune_id),
            models.lineage(services, tune_id),
            models.model_formats(services, tune_id),
            models.readers_of(services, tune_id),
        )
    except NotFound:  # deleted since it was listed
        return TuneDetails()


def pack_shelf(services: Services) -> tuple[str, object]:
    """The packs as cards and as choices."""
    known = pack_verbs.list_packs(services)
    usable = [(pack["title"], pack["slug"]) for pack in known if "error" not in pack]
    return html.cards(known), gr.update(choices=[("none", ""), *usable])
