"""REST: routes, bodies and errors. No rules."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, FastAPI, Query, Request
from fastapi import Path as UrlPath
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, JSONResponse, RedirectResponse, Response

from trainer import __version__
from trainer.contract.photos import Check, no_progress
from trainer.contract.prompts import PICTURES, Prompt, PromptRequest
from trainer.contract.states import Callback
from trainer.contract.tunes import CheckRequest, Tune, TuneChange, TuneRequest
from trainer.studio import models, pack_verbs, prompts, settle, tunes
from trainer.studio.pack_file import SLUG
from trainer.studio.packs import PackRequest
from trainer.studio.rows import Services
from trainer.studio.store import Query as Wanted
from trainer.web import service_routes
from trainer.web.bodies import read_body, read_idempotency_key, sent, sent_tune
from trainer.web.openapi import REFUSALS, Done, add_error_answers, body_schema
from trainer.web.paths import AsRails, add_unrouted
from trainer.web.query import BeforeId, Filter, Limit, Offset, OptionalLimit, check_query, page_of, row_id

Slug = Annotated[str, UrlPath(pattern=f"^{SLUG.pattern}$")]
CALLS = (  # the paths of the API
    "/tunes", "/prompts", "/photos/", "/images/", "/gallery/", "/presets", "/packs", "/p/", "/users", "/themes",
)  # fmt: skip


PROMPT_BODY = {"requestBody": {"content": body_schema("prompt", PromptRequest)}}


def create_app(services: Services) -> FastAPI:
    """The app with all REST routes."""
    app = FastAPI(
        title="Tunebooth",
        version=__version__,
        redirect_slashes=False,
        responses=REFUSALS,
        dependencies=[Depends(check_query)],
    )
    app.add_middleware(AsRails, prefixes=CALLS)
    add_error_answers(app)
    for add_routes in (
        tune_routes, change_routes, file_routes, prompt_routes, prompt_change_routes, pack_routes, list_routes,
        service_routes.add_routes,
    ):  # fmt: skip
        add_routes(app, services)
    add_unrouted(app, CALLS)
    return app


def tune_routes(app: FastAPI, services: Services) -> None:
    """Create tunes, check photos, read tunes."""
    tune_body = {"requestBody": {"content": body_schema("tune", TuneRequest)}}

    @app.post("/tunes", status_code=201, response_model=Tune, responses={200: {"model": Tune}}, openapi_extra=tune_body)
    async def create_tune(request: Request) -> JSONResponse:
        """Create a tune and queue it. 200: a tune with this title existed already."""
        async with sent_tune(request, services) as (data, uploads):
            key = await run_in_threadpool(read_idempotency_key, request, data, uploads)
            tune, created = await run_in_threadpool(tunes.create_tune, services, data, uploads, no_progress, key)
        return JSONResponse(tune.model_dump(), 201 if created else 200)

    @app.post("/photos/check", openapi_extra={"requestBody": {"content": body_schema("tune", CheckRequest)}})
    async def check_photos(request: Request) -> Check:
        """Check photos for a tune with these parameters: a verdict for each photo; nothing is kept."""
        async with sent_tune(request, services) as (data, uploads):
            return await run_in_threadpool(tunes.check_photos, services, data, uploads)

    @app.get("/tunes")
    def list_tunes(
        limit: Limit = 20,
        offset: Offset = 0,
        before_id: BeforeId = None,
        title: Filter = None,
        name: Filter = None,
        names: Annotated[list[str] | None, Query(alias="name[]")] = None,
        branch: Filter = None,
        model_type: Filter = None,
    ) -> list[Tune]:
        """Tunes, newest first. `name`: of the class; several as `name[]`."""
        page: Wanted = {"limit": limit, "offset": offset, "before_id": before_id}
        columns: Wanted = {"title": title, "name": names or name, "branch": branch, "model_type": model_type}
        return tunes.list_tunes(services, **page | columns)

    @app.get("/tunes/{tune_id}")
    def get_tune(tune_id: int) -> Tune:
        return tunes.get_tune(services, tune_id)


def change_routes(app: FastAPI, services: Services) -> None:
    """Change, delete, cancel and resume tunes; callbacks."""

    @app.patch("/tunes/{tune_id}", openapi_extra={"requestBody": {"content": body_schema("tune", TuneChange)}})
    async def change_tune(tune_id: int, request: Request) -> Tune:
        """Change title, class name, auto_extend or characteristics."""
        data = await read_body(request, "tune", 0, None)
        return await run_in_threadpool(tunes.change_tune, services, tune_id, data)

    @app.delete("/tunes/{tune_id}")
    def delete_tune(tune_id: int) -> Done:
        """Remove a tune, its prompts and its files; a running one is stopped first."""
        tunes.delete_tune(services, tune_id)
        return Done(message="Tune successfully deleted")

    @app.post("/tunes/{tune_id}/cancel")
    def cancel_tune(tune_id: int) -> Tune:
        return tunes.cancel_tune(services, tune_id)

    @app.post("/tunes/{tune_id}/resume")
    def resume_tune(tune_id: int) -> Tune:
        return tunes.resume_tune(services, tune_id)

    @app.get("/tunes/{tune_id}/callbacks")
    def list_callbacks(
        tune_id: int, limit: OptionalLimit = None, offset: Offset = 0, before_id: BeforeId = None
    ) -> list[Callback]:
        """The callbacks of a tune and its prompts, sent or waiting; newest first."""
        tunes.get_tune(services, tune_id)  # raises NotFound
        found = tunes.list_callbacks(services, tune_id)
        return page_of(found, lambda callback: callback.id, limit, offset, before_id)

    @app.post("/tunes/{tune_id}/callbacks")
    def send_callbacks_again(tune_id: int) -> list[Callback]:
        """Send all callbacks of the tune and its prompts again."""
        return tunes.send_callbacks_again(services, tune_id)


def file_routes(app: FastAPI, services: Services) -> None:
    """Models and pictures: files behind signed links."""

    answers: dict[int | str, dict[str, object]] = {
        307: {"description": "Redirects to the file"},
        202: {"model": Done, "description": "It is being made; ask again"},
    }

    @app.get("/tunes/{tune_id}/model", status_code=307, responses=answers, response_model=None)
    def get_model(tune_id: int, wanted: Annotated[str | None, Query(alias="format")] = None) -> Response:
        """Redirect to the model file. `format`: kohya, diffusers, embeddings, bundled, checkpoint or faceid, if the
        model type has it; 202 until it is made."""
        link = models.model_link(services, tune_id, wanted)
        if link is None:
            waiting = Done(message=f"the model is being made into {wanted}; ask again in a few seconds")
            return JSONResponse(waiting.model_dump(), 202, {"Retry-After": "5"})
        return RedirectResponse(link)

    @app.get("/files/{path:path}", include_in_schema=False)
    def get_file(path: str, signature: str = "", expires: int = 0) -> FileResponse:
        file = models.open_file(services, path, expires, signature)
        model = file.suffix in (".safetensors", ".zip")
        name = f"tune-{path.partition('/')[0]}-{file.name}" if model else file.name
        picture = file.suffix in (".png", ".jpg")
        headers = {"X-Content-Type-Options": "nosniff", "Cache-Control": "private, max-age=86400"}
        return FileResponse(
            file, filename=name, content_disposition_type="inline" if picture else "attachment", headers=headers
        )


def prompt_routes(app: FastAPI, services: Services) -> None:
    """Create and read prompts."""

    @app.post("/tunes/{tune_id}/prompts", status_code=201, openapi_extra=PROMPT_BODY)
    async def create_prompt(tune_id: int, request: Request) -> Prompt:
        """Render a prompt with a tune or with a base (see `/gallery/tunes`)."""
        async with sent(request, services, "prompt", len(PICTURES)) as data:
            key = await run_in_threadpool(read_idempotency_key, request, data, [])
            return await run_in_threadpool(prompts.create_prompt, services, tune_id, data, no_progress, key)

    @app.get("/tunes/{tune_id}/prompts")
    def list_tune_prompts(
        tune_id: int, limit: Limit = 20, offset: Offset = 0, before_id: BeforeId = None, text: Filter = None
    ) -> list[Prompt]:
        """Prompts of a tune or base, newest first. `text`: only those that contain it."""
        return prompts.list_prompts(services, tune_id, limit, offset, before_id, text)

    @app.get("/prompts")
    def list_prompts(
        limit: Limit = 20, offset: Offset = 0, before_id: BeforeId = None, text: Filter = None
    ) -> list[Prompt]:
        """Prompts, newest first. `text`: only those that contain it."""
        return prompts.list_prompts(services, None, limit, offset, before_id, text)

    @app.get("/prompts/{prompt_id}")
    def get_prompt(prompt_id: int) -> Prompt:
        return prompts.get_prompt(services, prompt_id)

    @app.get("/tunes/{tune_id}/prompts/{prompt_id}")
    def get_tune_prompt(tune_id: int, prompt_id: int) -> Prompt:
        return prompts.get_prompt(services, prompt_id, tune_id)


def prompt_change_routes(app: FastAPI, services: Services) -> None:
    """Delete prompts; render them again."""

    @app.delete("/prompts/{prompt_id}")
    def delete_prompt(prompt_id: int) -> Done:
        """Remove a prompt and its pictures; its rendering is stopped first."""
        prompts.delete_prompt(services, prompt_id)
        return Done(message="Prompt successfully deleted")

    @app.delete("/tunes/{tune_id}/prompts/{prompt_id}")
    def delete_tune_prompt(tune_id: int, prompt_id: int) -> Done:
        prompts.delete_prompt(services, prompt_id, tune_id)
        return Done(message="Prompt successfully deleted")

    @app.post("/prompts/{prompt_id}/duplicate", status_code=201, openapi_extra=PROMPT_BODY)
    async def duplicate_prompt(prompt_id: int, request: Request) -> Prompt:
        """Render a prompt again; the body, which may be empty, has the parameters to change."""
        has_body = request.headers.get("content-length", "0") != "0" or "transfer-encoding" in request.headers
        if not has_body:
            return await run_in_threadpool(
                prompts.duplicate_prompt, services, prompt_id, {}, read_idempotency_key(request, {}, [])
            )
        async with sent(request, services, "prompt", len(PICTURES)) as data:
            key = await run_in_threadpool(read_idempotency_key, request, data, [])
            return await run_in_threadpool(prompts.duplicate_prompt, services, prompt_id, data, key)


def pack_routes(app: FastAPI, services: Services) -> None:
    """Packs."""

    @app.get("/packs")
    def list_packs(
        limit: OptionalLimit = None, offset: Offset = 0, before_id: BeforeId = None
    ) -> list[dict[str, object]]:
        """Packs: settings and prompts for a purpose."""
        return page_of(pack_verbs.list_packs(services), row_id, limit, offset, before_id)

    @app.get("/p/{slug}")
    def get_pack(slug: Slug) -> dict[str, object]:
        return pack_verbs.get_pack(services, slug)

    pack_body = {"requestBody": {"content": body_schema("tune", PackRequest)}}

    @app.post("/p/{slug}/tunes", status_code=201, responses={200: {"model": Tune}}, openapi_extra=pack_body)
    async def create_pack_tune(slug: Slug, request: Request, response: Response) -> Tune:
        """Create a tune with a pack's settings and prompts; with `tune_ids` render its prompts with a tune."""
        async with sent_tune(request, services) as (data, uploads):
            key = await run_in_threadpool(read_idempotency_key, request, data, uploads)
            tune, created = await run_in_threadpool(
                pack_verbs.create_pack_tune, services, slug, data, uploads, no_progress, key
            )
        response.status_code = 201 if created else 200
        return tune

    @app.post("/tunes/{tune_id}/pack", status_code=201)
    def save_pack(tune_id: int, title: str | None = None) -> dict[str, object]:
        """Make a pack of a tune's settings and prompts; `title` replaces the tune's title."""
        return pack_verbs.save_pack(services, tune_id, title)


def list_routes(app: FastAPI, services: Services) -> None:
    """What a tune can start from."""

    @app.get("/gallery/tunes")
    def list_base_tunes(
        branch: Filter = None,
        limit: OptionalLimit = None,
        title: Filter = None,
        model_type: Filter = None,
        offset: Offset = 0,
        before_id: BeforeId = None,
    ) -> list[dict[str, object]]:
        """Base models, to train tunes on and to post prompts to. `before_id`: those listed after this one."""
        found = models.list_base_tunes(services, branch, title=title, model_type=model_type)
        return page_of(found, row_id, limit, offset, before_id)

    @app.get("/presets")
    def list_presets(limit: OptionalLimit = None, offset: Offset = 0) -> list[str]:
        return page_of(settle.list_presets(services), None, limit, offset)
