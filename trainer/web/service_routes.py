"""REST: the calls that clients of the hosted service make in addition to those on tunes and prompts. No rules."""

from __future__ import annotations

from typing import Annotated

from fastapi import FastAPI, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response
from pydantic import BaseModel

from trainer.contract.errors import InvalidRequest
from trainer.contract.inspection import Inspection, InspectRequest
from trainer.contract.prompts import Prompt, PromptChange
from trainer.settings import Settings
from trainer.studio import likes, pack_verbs, prompt_filing
from trainer.studio.inspection import inspect_image
from trainer.studio.rows import Services
from trainer.web.bodies import read_body, sent
from trainer.web.openapi import body_schema, flat_body

NO_THEMES = "needs a language model that writes prompts, and there is none here; take a pack, see GET /packs"


class User(BaseModel):
    """The one user of this app: the keys that clients of the hosted service read, then settings.

    usd_balance_mc: 0, since nothing costs anything here.
    """

    id: int = 1
    name: str = "Tunebooth"
    email: str | None = None
    usd_balance_mc: int = 0
    auto_extend_tunes: bool = False
    top_off_amount: int | None = None
    purchased_plugin_at: str | None = None
    idempotency: str
    lifetime_days: int | None
    face_crop: bool


def add_routes(app: FastAPI, services: Services) -> None:
    """All routes of this module."""
    for add in (account_routes, gallery_routes, like_routes, prompt_filing_routes, image_routes):
        add(app, services)


def user_of(settings: Settings) -> User:
    return User(idempotency=settings.idempotency, lifetime_days=settings.lifetime_days, face_crop=settings.face_crop)


def account_routes(app: FastAPI, services: Services) -> None:
    """The user, and themes."""

    @app.get("/users")
    def get_user() -> User:
        """The one user of this app; a client checks its key with this call."""
        return user_of(services.settings)

    @app.get("/themes")
    def list_themes() -> list[dict[str, object]]:
        """Always empty: the hosted service lets a language model write prompts for a theme."""
        return []

    @app.post("/themes", status_code=201, response_class=Response)
    def create_theme() -> Response:
        """Always refused, with 422."""
        raise InvalidRequest({"theme": [NO_THEMES]})


def gallery_routes(app: FastAPI, services: Services) -> None:
    """Packs that come with the program."""

    @app.get("/gallery/packs")
    def list_gallery_packs(
        limit: Annotated[int, Query(ge=1, le=120)] = 20,
        offset: Annotated[int, Query(ge=0, lt=2**63)] = 0,
        before_id: Annotated[int | None, Query(ge=0, lt=2**63)] = None,
        public: Annotated[bool | None, Query(description="no effect: all are public")] = None,
        listed: Annotated[bool | None, Query(description="no effect: all are listed")] = None,
    ) -> list[dict[str, object]]:
        """The packs that come with the program; those that users saved are in `/packs` alone."""
        return pack_verbs.list_gallery_packs(services, limit, offset, before_id)


def like_routes(app: FastAPI, services: Services) -> None:
    """Likes of prompts. The hosted service documents both paths, and 201 without a body for both methods."""

    @app.post("/prompts/{prompt_id}/likes", status_code=201, response_class=Response)
    @app.post("/prompts/{prompt_id}/like", status_code=201, include_in_schema=False)
    def like_prompt(prompt_id: int) -> Response:
        """Like a prompt's pictures. A second like changes nothing."""
        likes.like(services, prompt_id)
        return Response(status_code=201)

    @app.delete("/prompts/{prompt_id}/likes", status_code=201, response_class=Response)
    @app.delete("/prompts/{prompt_id}/like", status_code=201, include_in_schema=False)
    def unlike_prompt(prompt_id: int) -> Response:
        """Take a like back."""
        likes.unlike(services, prompt_id)
        return Response(status_code=201)


def prompt_filing_routes(app: FastAPI, services: Services) -> None:
    """What the hosted service changes of a prompt: the pack and the workspace that it is filed under."""
    body = {"requestBody": {"content": body_schema("prompt", PromptChange)}}

    @app.patch("/prompts/{prompt_id}", openapi_extra=body)
    async def change_prompt(prompt_id: int, request: Request) -> Prompt:
        """File a prompt under a pack or workspace: accepted, without an effect; the answer's `warnings` say so."""
        data = await read_body(request, "prompt", 0, None)
        return await run_in_threadpool(prompt_filing.change_prompt, services, prompt_id, data)

    @app.patch("/tunes/{tune_id}/prompts/{prompt_id}", openapi_extra=body)
    async def change_tune_prompt(tune_id: int, prompt_id: int, request: Request) -> Prompt:
        data = await read_body(request, "prompt", 0, None)
        return await run_in_threadpool(prompt_filing.change_prompt, services, prompt_id, data, tune_id)


def image_routes(app: FastAPI, services: Services) -> None:
    """The inspection of one photo."""
    body = {"requestBody": {"content": flat_body(InspectRequest)}}

    @app.post("/images/inspect", response_model_exclude_none=True, openapi_extra=body)
    async def inspect(request: Request) -> Inspection:
        """Say what is seen in one photo, before it is sent with a tune; nothing is kept."""
        async with sent(request, services, None, 1) as data:
            return await run_in_threadpool(inspect_image, services, data)
