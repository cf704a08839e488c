"""The OpenAPI document: whatever is sent, nothing fails inside, and every answer is one that the document declares."""

from __future__ import annotations

import json
import math
import re
import socket
import uuid
from http.server import ThreadingHTTPServer
from typing import Any

import pytest
import schemathesis
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.helpers.api import create
from tests.helpers.web import address, client_of
from trainer.studio.rows import Services
from trainer.web.rest import create_app

pytest_plugins = ("tests.helpers.web",)

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that were made up lead nowhere; some of them exist."""

    def lookup(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", lookup)


def send_everywhere(services: Services, requests: int) -> int:
    """Send so many requests, half of them valid by the document; returns how many it were."""
    schema = schemathesis.openapi.from_asgi("/openapi.json", create_app(services))
    operations = [result.ok() for result in schema.get_all_operations()]
    client, sent = client_of(services), 0
    each = math.ceil(requests / (2 * len(operations)))
    for operation in operations:
        for mode in GenerationMode.POSITIVE, GenerationMode.NEGATIVE:
            if mode is GenerationMode.POSITIVE or operation.body or list(operation.iter_parameters()):
                sent += send_to(operation, mode, each, client)
    return sent


def send_to(operation: Any, mode: GenerationMode, requests: int, client: TestClient) -> int:
    """Send requests to one operation and check what it answers; returns how many it were."""
    sent = 0

    @settings(
        max_examples=requests, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=operation.as_strategy(generation_mode=mode))
    def send(case: Any) -> None:
        nonlocal sent
        if mode is GenerationMode.POSITIVE and case.path_parameters:  # of things that are there
            case.path_parameters.update(existing(client))
        sent += 1
        case.call_and_validate(checks=CHECKS)

    send()
    return sent


def existing(client: TestClient) -> dict[str, Any]:
    """A tune, a prompt and a pack that are there; what was sent before may have deleted the last ones."""
    if not client.get("/prompts", params={"limit": 1}).json():
        create(client, str(uuid.uuid4()), ("tune[prompts_attributes][][text]", "ohwx dog"))
    (prompt,) = client.get("/prompts", params={"limit": 1}).json()
    return {"tune_id": prompt["tune_id"], "prompt_id": prompt["id"], "slug": "pet-portraits"}


def test_two_hundred_requests_have_declared_answers(services: Services, no_network: None) -> None:
    assert send_everywhere(services, 200) > 150


@pytest.mark.long
def test_five_thousand_requests_have_declared_answers(services: Services, no_network: None) -> None:
    assert send_everywhere(services, 5800) > 5000


def test_its_examples_work(services: Services, photo_server: ThreadingHTTPServer) -> None:
    private = services.settings.model_copy(update={"private_urls": "allow"})
    client = client_of(Services(private, services.store, services.decoder, services.analyzer))
    tried = 0
    for path, methods in client.get("/openapi.json").json()["paths"].items():
        for method, operation in methods.items():
            if content := operation.get("requestBody", {}).get("content"):
                body = json.loads(
                    re.sub(r"https://example.com/[^\"]*", f"{address(photo_server)}/1.png",
                           json.dumps(content["application/json"]["example"]))
                )  # fmt: skip
                answer = client.request(method, path.format(**existing(client)), json=body)
                assert answer.status_code in (200, 201), answer.text
                tried += 1
    assert tried == 9


def test_the_document_names_every_route_and_no_file(services: Services) -> None:
    document = client_of(services).get("/openapi.json").json()
    assert not [path for path in document["paths"] if path.startswith("/files")]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert {"401", "422"} <= operation["responses"].keys(), f"{method} {path}"
    assert "signature" not in json.dumps(document["paths"])
