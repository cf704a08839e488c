"""The calls of the hosted service beside tunes and prompts: the user, themes, packs, likes, inspection.

The shapes are those of its documentation (astria-docs, docs/api) and what its clients read.
"""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.testclient import TestClient

from tests.helpers.web import client_of
from trainer.studio.rows import Services

pytest_plugins = ("tests.helpers.web",)


# The user


@pytest.mark.parametrize("path", ["/users", "/users.json"])
def test_the_command_line_logs_in(client: TestClient, path: str) -> None:
    """astriaai/cli: `login` and `whoami` read these keys of GET /users."""
    user = client.get(path).raise_for_status().json()
    assert (user["id"], user["name"], user["email"], user["usd_balance_mc"]) == (1, "Tunebooth", None, 0)
    assert {"purchased_plugin_at", "auto_extend_tunes", "top_off_amount"} <= user.keys()


def test_the_user_is_that_of_the_settings(services: Services) -> None:
    changed = services.settings.model_copy(update={"idempotency": "all", "lifetime_days": 30, "face_crop": True})
    user = client_of(Services(changed, services.store, services.decoder, services.analyzer)).get("/users").json()
    assert (user["idempotency"], user["lifetime_days"], user["face_crop"]) == ("all", 30, True)


def test_there_are_no_themes(client: TestClient) -> None:
    answer = client.get("/themes")
    assert (answer.status_code, answer.json()) == (200, [])
    refused: Any = client.post("/themes", json={"theme": "Corporate headshots", "tune_ids": [1]})
    assert refused.status_code == 422 and "GET /packs" in refused.json()["theme"][0]
