"""REST: the calls that clients of the hosted service make beside those on tunes and prompts. No rules."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.responses import Response
from pydantic import BaseModel

from trainer.contract.errors import InvalidRequest
from trainer.settings import Settings
from trainer.studio.rows import Services

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
    for add in (account_routes,):
        add(app, services)


def user_of(settings: Settings) -> User:
    return User(
        idempotency=settings.idempotency, lifetime_days=settings.lifetime_days, face_crop=settings.face_crop
    )


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

    @app.post("/themes", status_code=201)
    def create_theme() -> Response:
        """Always refused, with 422."""
        raise InvalidRequest({"theme": [NO_THEMES]})
